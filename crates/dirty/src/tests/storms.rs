//! Everything at once, by many threads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::guest::{self, Job, Stop};
use super::kernel::FakeKernel;
use crate::{
    BackendChoice, DirtyKind, Fetch, Gfn, GlobalLog, HarvestError, HotPages, HotRule, MemoryLayout,
    MemorySlot, TrackerConfig,
};

fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// The place where threads wait while an epoch ends.
struct Barrier {
    stop: AtomicBool,
    parked: AtomicU64,
    end: AtomicBool,
}

impl Barrier {
    fn new() -> Barrier {
        Barrier { stop: AtomicBool::new(false), parked: AtomicU64::new(0), end: AtomicBool::new(false) }
    }
    /// False at the end.
    fn pass(&self) -> bool {
        if self.stop.load(Ordering::SeqCst) {
            self.parked.fetch_add(1, Ordering::SeqCst);
            while self.stop.load(Ordering::SeqCst) && !self.end.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            self.parked.fetch_sub(1, Ordering::SeqCst);
        }
        !self.end.load(Ordering::SeqCst)
    }
    fn stop(&self, count: u64) {
        self.stop.store(true, Ordering::SeqCst);
        while self.parked.load(Ordering::SeqCst) < count {
            std::thread::yield_now();
        }
    }
    fn go(&self, _count: u64) {
        self.stop.store(false, Ordering::SeqCst);
        while self.parked.load(Ordering::SeqCst) > 0 {
            std::thread::yield_now();
        }
    }
}

/// vCPUs, a device, fetchers and the thread that ends epochs, all at once over the naive kernel; epochs are
/// dropped at each step. After every epoch the test compares a copy made of the reported pages.
fn storm(kind: DirtyKind, is_exact: bool, with_hot: bool, ring: u32, epochs: u64) {
    const N: u64 = 600;
    let hot = if with_hot {
        HotPages::Rule(HotRule { max_gap: 4, traps: 2, probe_after: 5, max_pages: 40, trap_ns: 0 })
    } else {
        HotPages::Off
    };
    let layout = MemoryLayout::new(vec![
        MemorySlot { id: 1, base: Gfn(0), pages: 200, host_addr: 0 },
        MemorySlot { id: 0, base: Gfn(200), pages: 400, host_addr: 0 },
    ])
    .unwrap();
    let config =
        TrackerConfig { max_vcpus: 2, max_slots: 0, max_dirty_pages: 60, trigger: 60, exact: is_exact, hot };
    let global = GlobalLog::new(N, 16);
    let (kernel, tracker) = FakeKernel::tracker(layout, config, kind, ring, global.clone()).unwrap();
    tracker.enable_stopped().unwrap();
    let memory: Vec<AtomicU64> = (0..N).map(|_| AtomicU64::new(0)).collect();
    let shadow = std::sync::Mutex::new(vec![0u64; N as usize]);
    let (guest_gate, fetch_gate) = (Barrier::new(), Barrier::new());
    let failed = std::sync::Mutex::new(None::<String>);
    let (refused, missed, twice) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let copy = |pages: &[Gfn]| {
        let mut shadow = shadow.lock().unwrap();
        for gfn in pages {
            shadow[gfn.0 as usize] = memory[gfn.0 as usize].load(Ordering::Relaxed);
        }
    };
    let fail = |text: String| {
        failed.lock().unwrap().get_or_insert(text);
    };
    std::thread::scope(|scope| {
        for vcpu in 0..2usize {
            let (kernel, tracker, memory, gate, fail) = (&kernel, &tracker, &memory, &guest_gate, &fail);
            scope.spawn(move || {
                let mut seed = 77 + vcpu as u64;
                let mut stamp = vcpu as u64;
                while gate.pass() {
                    stamp += 2;
                    let page = if random(&mut seed) % 3 == 0 {
                        random(&mut seed) % N
                    } else {
                        random(&mut seed) % 50
                    };
                    let again = random(&mut seed) % 8 == 0;
                    if !kernel.store(vcpu, Gfn(page), again, &memory[page as usize], stamp) {
                        match tracker.ring_full(vcpu) {
                            Ok(_) => std::thread::yield_now(),
                            Err(error) => fail(format!("ring_full {error:?}")),
                        }
                    }
                    if random(&mut seed) % 50 == 0 {
                        match tracker.harvest_vcpu(vcpu) {
                            Ok(_) | Err(HarvestError::Busy { .. }) => (),
                            Err(error) => fail(format!("harvest_vcpu {error:?}")),
                        }
                    }
                }
            });
        }
        {
            let (global, memory, gate) = (&global, &memory, &guest_gate);
            scope.spawn(move || {
                let (mut seed, mut stamp) = (5, 1 << 40);
                while gate.pass() {
                    stamp += 1;
                    let page = random(&mut seed) % N;
                    memory[page as usize].store(stamp, Ordering::Relaxed);
                    global.mark(Gfn(page));
                    (0..random(&mut seed) % 200).for_each(|_| std::hint::spin_loop());
                }
            });
        }
        for index in 0..2u64 {
            let (tracker, gate, fail, copy) = (&tracker, &fetch_gate, &fail, &copy);
            scope.spawn(move || {
                let mut seed = 1000 + index;
                let mut buffer = [Gfn(0); 300];
                while gate.pass() {
                    let room = [3usize, 40, 300][random(&mut seed) as usize % 3];
                    let how = Fetch { rearm: random(&mut seed) % 2 == 0, ..Fetch::default() };
                    match tracker.fetch(&mut buffer[..room], how) {
                        Ok(fetched) if random(&mut seed) % 8 == 0 => drop(fetched),
                        Ok(fetched) => match fetched.rearm() {
                            Ok(pages) => copy(pages),
                            Err(error) => fail(format!("rearm of a fetch {error:?}")),
                        },
                        Err(error) => fail(format!("fetch {error:?}")),
                    }
                    if random(&mut seed) % 4 == 0 {
                        std::thread::yield_now();
                    }
                    std::thread::sleep(std::time::Duration::from_micros(random(&mut seed) % 60));
                }
            });
        }
        let mut seed = 3;
        'epochs: for number in 0..epochs {
            std::thread::sleep(std::time::Duration::from_micros(200 + random(&mut seed) % 600));
            guest_gate.stop(3);
            loop {
                if failed.lock().unwrap().is_some() {
                    break 'epochs;
                }
                match tracker.stopped().state_saved().harvest() {
                    Ok(epoch) => {
                        if random(&mut seed) % 8 == 0 {
                            drop(epoch);
                            continue;
                        }
                        let epoch = match epoch.rearm() {
                            Ok(epoch) => epoch,
                            Err(error) => {
                                fail(format!("rearm {error:?}"));
                                break 'epochs;
                            }
                        };
                        if random(&mut seed) % 8 == 0 {
                            drop(epoch);
                            continue;
                        }
                        let pages = epoch.pages();
                        copy(pages);
                        let unique: std::collections::BTreeSet<_> = pages.iter().collect();
                        twice.fetch_add((pages.len() - unique.len()) as u64, Ordering::Relaxed);
                        epoch.copied().run();
                        break;
                    }
                    Err(HarvestError::Fetching | HarvestError::Busy { .. }) => {
                        refused.fetch_add(1, Ordering::Relaxed);
                        std::thread::yield_now();
                    }
                    Err(error) => {
                        fail(format!("harvest {error:?}"));
                        break 'epochs;
                    }
                }
            }
            fetch_gate.stop(2);
            // Pages that a fetcher dropped or was refused come with a later epoch.
            {
                let epoch = tracker.stopped().state_saved().harvest().unwrap();
                let epoch = match epoch.rearm() {
                    Ok(epoch) => epoch,
                    Err(error) => {
                        fail(format!("epoch {number}: rearm {error:?}"));
                        break 'epochs;
                    }
                };
                copy(epoch.pages());
                epoch.copied().run();
            }
            {
                let shadow = shadow.lock().unwrap();
                let wrong = (0..N as usize)
                    .filter(|&page| shadow[page] != memory[page].load(Ordering::Relaxed))
                    .count();
                missed.fetch_add(wrong as u64, Ordering::Relaxed);
                if wrong > 0 {
                    drop(shadow);
                    copy(&(0..N).map(Gfn).collect::<Vec<_>>());
                }
            }
            fetch_gate.go(2);
            guest_gate.go(3);
        }
        for gate in [&guest_gate, &fetch_gate] {
            gate.end.store(true, Ordering::SeqCst);
        }
    });
    let failed = failed.into_inner().unwrap();
    println!(
        "{kind} exact {is_exact} hot {with_hot}: missed {missed:?} twice {twice:?} refused {refused:?} failed {failed:?} {:?}",
        tracker.stats()
    );
    assert!(failed.is_none() && missed.into_inner() == 0 && twice.into_inner() == 0, "{failed:?}");
}

#[test]
fn ring() {
    storm(DirtyKind::Ring, false, false, 4096, 800);
}

#[test]
fn ring_hot() {
    storm(DirtyKind::Ring, false, true, 4096, 800);
}

#[test]
fn ring_exact() {
    storm(DirtyKind::Ring, true, false, 4096, 800);
}

#[test]
fn small_ring_exact_hot() {
    storm(DirtyKind::Ring, true, true, 256, 800);
}

#[test]
fn clear_log_hot() {
    storm(DirtyKind::ClearLog, false, true, 256, 800);
}

#[test]
fn bitmap() {
    storm(DirtyKind::Bitmap, false, false, 256, 800);
}

/// 2, on real KVM: a migration's fetcher beside a vCPU that waits for it when its ring is full.
#[test]
fn a_fetcher_beside_a_full_ring_on_kvm() {
    let config =
        TrackerConfig { max_dirty_pages: 4000, trigger: 1500, exact: true, ..TrackerConfig::default() };
    let Some(mut guest) = guest::start(BackendChoice::Ring, config) else { return };
    let mut vcpu = guest.vcpus.remove(0);
    let tracker = guest.tracker.clone();
    tracker.enable_stopped().unwrap();
    assert!(tracker.is_exact());
    let stop = AtomicBool::new(false);
    let start = std::time::Instant::now();
    let (mut fulls, mut error) = (0, None);
    std::thread::scope(|scope| {
        let (stop, tracker) = (&stop, &tracker);
        scope.spawn(move || {
            let mut buffer = vec![Gfn(0); 4000];
            let mut total = 0;
            while !stop.load(Ordering::Relaxed) {
                let Ok(fetched) = tracker.fetch(&mut buffer, Fetch { rearm: true, ..Fetch::default() })
                else {
                    break;
                };
                total += fetched.len();
                drop(fetched.rearm());
                std::thread::sleep(std::time::Duration::from_millis(30)); // sends them
            }
            assert!(total > 0);
        });
        // Not for longer: where traps are slow the fetcher always comes before the ring is full, and nothing
        // else takes the vCPU out of KVM_RUN.
        let job = Job { stamp: 1, writes: 50_000, area: 1 };
        vcpu.set_job(job);
        while start.elapsed().as_secs() < 2 {
            match vcpu.run() {
                Stop::RingFull => {
                    fulls += 1;
                    if let Err(e) = tracker.ring_full(0) {
                        error = Some(format!("{e} after {:?}, {fulls} exits", start.elapsed()));
                        break;
                    }
                }
                Stop::Done => vcpu.set_job(job),
                Stop::Signal => (),
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    println!("{fulls} exits");
    assert_eq!(error, None);
}
