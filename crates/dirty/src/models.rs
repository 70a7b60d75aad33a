//! Loom models of the lock-free parts: every interleaving of a few threads, under the C11 memory model.
//!
//! The property of the global list is stated with a byte of "guest memory" for each page, written before the
//! mark and read by the harvest: whatever happens, the copy made from harvests ends up equal to the memory.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use crate::bits::Bits;
use crate::gate::Gate;
use crate::global::GlobalLog;
use crate::lane::Lane;
use crate::layout::Gfn;

/// A VM of two pages, its global list, and a standby that knows only what is harvested.
struct Vm {
    log: GlobalLog,
    memory: [AtomicU64; 2],
}

impl Vm {
    fn new(capacity: usize) -> Arc<Vm> {
        let log = GlobalLog::build(2, capacity);
        Arc::new(Vm { log, memory: [AtomicU64::new(0), AtomicU64::new(0)] })
    }

    fn write(&self, page: usize, value: u64) {
        self.memory[page].store(value, Ordering::Relaxed);
        self.log.record(Gfn(page as u64));
    }

    fn harvest(&self, copy: &mut [Option<u64>; 2]) {
        self.log
            .drain(|gfn| copy[gfn.0 as usize] = Some(self.memory[gfn.0 as usize].load(Ordering::Relaxed)));
    }

    fn value(&self, page: usize) -> u64 {
        self.memory[page].load(Ordering::Relaxed)
    }
}

fn write_in_thread(vm: &Arc<Vm>, page: usize, value: u64) -> thread::JoinHandle<()> {
    let vm = vm.clone();
    thread::spawn(move || vm.write(page, value))
}

/// Two writers, of the same or of two pages, while a harvest runs; then a last harvest.
///
/// With up to three preemptions: the schedules of three threads without that bound take hours.
fn writers_against_harvest(pages: [usize; 2], capacity: usize) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let vm = Vm::new(capacity);
        let writers = [write_in_thread(&vm, pages[0], 1), write_in_thread(&vm, pages[1], 2)];
        let mut copy = [None; 2];
        vm.harvest(&mut copy);
        writers.into_iter().for_each(|writer| writer.join().unwrap());
        vm.harvest(&mut copy);
        for page in pages {
            assert_eq!(copy[page], Some(vm.value(page)), "page {page}");
        }
    });
}

#[test]
fn no_write_is_lost_to_a_concurrent_harvest() {
    writers_against_harvest([0, 1], 2);
}

#[test]
fn no_write_of_one_page_is_lost_to_a_concurrent_harvest() {
    writers_against_harvest([0, 0], 2);
}

#[test]
fn no_write_is_lost_when_the_list_is_full() {
    writers_against_harvest([0, 1], 1);
}

/// The de-duplication: a mark finds its page marked already, by a thread that is still under way.
#[test]
fn a_returned_mark_is_in_the_next_harvest_even_if_another_marker_is_not_done() {
    loom::model(|| {
        let vm = Vm::new(2);
        let slow = write_in_thread(&vm, 0, 1);
        vm.log.record(Gfn(0));
        let mut copy = [None; 2];
        vm.harvest(&mut copy);
        assert!(copy[0].is_some());
        slow.join().unwrap();
        vm.harvest(&mut copy);
        assert_eq!(copy[0], Some(1));
    });
}

/// A marker that harvests overtake writes its hint into a list that is in use again.
#[test]
fn a_marker_that_harvests_overtake_does_not_hide_a_page() {
    loom::model(|| {
        let vm = Vm::new(1);
        let slow = write_in_thread(&vm, 0, 1);
        let mut copy = [None; 2];
        vm.harvest(&mut copy);
        vm.write(1, 2);
        vm.harvest(&mut copy);
        assert_eq!(copy[1], Some(2));
        vm.write(1, 3);
        slow.join().unwrap();
        vm.harvest(&mut copy);
        assert_eq!(copy, [Some(1), Some(3)]);
    });
}

#[test]
fn a_page_is_claimed_by_one_thread() {
    loom::model(|| {
        let bits = Arc::new(Bits::reserve(64).unwrap());
        let other = {
            let bits = bits.clone();
            thread::spawn(move || (bits.claim(Gfn(5)), bits.claim(Gfn(6))))
        };
        let mine = (bits.claim(Gfn(5)), bits.claim(Gfn(7)));
        let other = other.join().unwrap();
        assert!(mine.0 != other.0 && mine.1 && other.1);
        let mut set = Vec::new();
        bits.release_all(|gfn| set.push(gfn.0));
        assert_eq!(set, [5, 6, 7]);
    });
}

/// Three threads want to append to a list; those that may do so come one after the other.
#[test]
fn a_list_has_one_writer_at_a_time() {
    loom::model(|| {
        let lane = Arc::new(Lane::reserve(3).unwrap());
        let append = |gfn| {
            let lane = lane.clone();
            thread::spawn(move || lane.own().map(|owner| owner.push(Gfn(gfn))).is_some())
        };
        let threads = [append(1), append(2)];
        let mine = lane.own().map(|owner| owner.push(Gfn(3))).is_some();
        let mut expected: Vec<u64> = if mine { vec![3] } else { vec![] };
        for (gfn, thread) in (1..).zip(threads) {
            if thread.join().unwrap() {
                expected.push(gfn);
            }
        }
        let mut list = Vec::new();
        lane.own().unwrap().drain(|gfn| list.push(gfn.0));
        list.sort_unstable();
        expected.sort_unstable();
        assert_eq!(list, expected);
    });
}

/// `harvest_vcpu` against the thread that ends the epoch: what a vCPU adds is in the epoch or stays in the
/// ring, and nothing gets into its list after that was taken.
#[test]
fn a_closed_epoch_takes_nothing_more() {
    loom::model(|| {
        let shared = Arc::new((Gate::new(), Lane::reserve(2).unwrap()));
        shared.0.open();
        let vcpu = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (gate, lane) = &*shared;
                let owner = lane.own()?;
                gate.is_open().then(|| owner.push(Gfn(9)))
            })
        };
        let (gate, lane) = &*shared;
        gate.close();
        let mut taken = None;
        let closed = lane.own().map(|owner| owner.drain(|gfn| taken = Some(gfn.0))).is_some();
        if !closed {
            gate.open();
        }
        let added = vcpu.join().unwrap().is_some();
        let mut left = None;
        lane.own().unwrap().drain(|gfn| left = Some(gfn.0));
        let expected = (added && closed).then_some(9);
        assert_eq!((taken, left), (expected, (added && !closed).then_some(9)));
    });
}

/// A thread that holds its part of the pages keeps the next epoch from changing them.
#[test]
fn pages_do_not_change_under_a_reader() {
    loom::model(|| {
        let shared = Arc::new((Gate::new(), AtomicU64::new(1)));
        shared.0.let_read();
        let reader = {
            let shared = shared.clone();
            thread::spawn(move || {
                let (gate, list) = &*shared;
                if gate.read() {
                    assert_eq!(list.load(Ordering::Relaxed), 1);
                    gate.read_done();
                }
            })
        };
        let (gate, list) = &*shared;
        gate.end_reading();
        list.store(2, Ordering::Relaxed);
        reader.join().unwrap();
        assert!(!gate.read());
    });
}

/// A page as KVM keeps it: whether its next write traps, and the entries that traps have made.
struct Page {
    kvm: loom::sync::Mutex<(bool, u32)>,
    value: [AtomicU64; 2],
    trapped: Bits,
    log: GlobalLog,
}

impl Page {
    fn new() -> Arc<Page> {
        Arc::new(Page {
            // The page has been written once.
            kvm: loom::sync::Mutex::new((false, 1)),
            value: [AtomicU64::new(1), AtomicU64::new(0)],
            trapped: Bits::reserve(64).unwrap(),
            log: GlobalLog::build(64, 1),
        })
    }

    /// KVM logs first and then lets the vCPU retry, so the store may come after somebody has read the entry.
    /// It never comes after the page was armed again: that flushes translations, and the store traps once
    /// more.
    fn vcpu_writes(&self, value: u64) {
        loop {
            let mut kvm = self.kvm.lock().unwrap();
            if !kvm.0 {
                self.value[0].store(value, Ordering::Relaxed);
                return;
            }
            *kvm = (false, kvm.1 + 1);
        }
    }

    /// A device writes its own part of the page and marks it.
    fn device_writes(&self, value: u64) {
        self.value[1].store(value, Ordering::Relaxed);
        self.log.record(Gfn(0));
    }

    /// `Tracker::fetch` with a re-arm, and the caller's copy. `release_first` is the order that is right.
    fn fetch(&self, copy: &mut [u64; 2], release_first: bool) {
        let entries = std::mem::take(&mut self.kvm.lock().unwrap().1);
        let mine = entries > 0 && self.trapped.claim(Gfn(0));
        let mut marked = false;
        self.log.drain(|gfn| marked = !self.trapped.is_claimed(gfn));
        if mine {
            if release_first {
                self.trapped.release(Gfn(0));
            }
            self.kvm.lock().unwrap().0 = true;
            if !release_first {
                self.trapped.release(Gfn(0));
            }
        }
        if mine || marked {
            *copy = [0, 1].map(|part: usize| self.value[part].load(Ordering::Relaxed));
        }
    }
}

fn fetches_against_writes(release_first: bool) {
    let mut model = loom::model::Builder::new();
    model.preemption_bound = Some(3);
    model.check(move || {
        let page = Page::new();
        let copies = Arc::new(loom::sync::Mutex::new([0, 0]));
        let writers = {
            let page = page.clone();
            thread::spawn(move || {
                page.device_writes(2);
                page.vcpu_writes(3);
            })
        };
        let other = {
            let (page, copies) = (page.clone(), copies.clone());
            thread::spawn(move || {
                let mut copy = [0, 0];
                page.fetch(&mut copy, release_first);
                keep(&copies, copy);
            })
        };
        let mut copy = [0, 0];
        page.fetch(&mut copy, release_first);
        keep(&copies, copy);
        writers.join().unwrap();
        other.join().unwrap();
        // The end of the epoch.
        let mut copy = *copies.lock().unwrap();
        page.fetch(&mut copy, release_first);
        assert_eq!(copy, [3, 2]);
    });
}

/// Values grow, so the newest copy of each part is the largest.
fn keep(copies: &loom::sync::Mutex<[u64; 2]>, copy: [u64; 2]) {
    let mut newest = copies.lock().unwrap();
    *newest = [0, 1].map(|part: usize| newest[part].max(copy[part]));
}

#[test]
fn no_write_is_lost_to_two_fetches() {
    fetches_against_writes(true);
}

/// The other order loses the write that traps between the arming and the release, and the model sees it.
#[test]
#[should_panic]
fn releasing_after_arming_loses_writes() {
    fetches_against_writes(false);
}
