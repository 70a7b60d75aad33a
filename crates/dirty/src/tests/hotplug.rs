//! Slots and vCPUs come and go on the running kernel, while the guest writes.
// UNSAFETY: gives memory to a VM and to its tracker; test code.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use super::guest::{self, AREAS, Guest, Job, Setup, Shadow, Stop, Vcpu};
use crate::words::Words;
use crate::{
    AddSlotError, AddVcpuError, BackendChoice, Gfn, HarvestError, MemorySlot, NewError, SlotStart, Tracker,
    TrackerBusy, TrackerConfig,
};

const ID: u32 = 5;
const BASE: Gfn = Gfn(guest::PLUG.0 / 4096);
const PAGES: u64 = guest::PLUG.1;
const ROUNDS: u64 = 12;

/// Memory of a new slot, and a copy made of its reported pages.
struct Plugged {
    memory: Words,
    copy: Vec<u64>,
}

impl Plugged {
    fn new() -> Plugged {
        let words = PAGES as usize * 512;
        Plugged { memory: Words::reserve(words).unwrap(), copy: vec![u64::MAX; words] }
    }

    fn slot(&self) -> MemorySlot {
        MemorySlot { id: ID, base: BASE, pages: PAGES, host_addr: self.memory.as_ptr() as u64 }
    }

    fn copy_page(&mut self, gfn: Gfn) {
        let first = (gfn.0 - BASE.0) as usize * 512;
        for index in first..first + 512 {
            self.copy[index] = self.memory[index].load(Ordering::Relaxed);
        }
    }

    fn copy_all(&mut self) {
        (BASE.0..BASE.0 + PAGES).for_each(|gfn| self.copy_page(Gfn(gfn)));
    }

    fn differences(&self) -> usize {
        let differs = |page: &usize| {
            let range = page * 512..page * 512 + 512;
            let mut words = self.memory[range.clone()].iter().zip(&self.copy[range]);
            words.any(|(word, copy)| word.load(Ordering::Relaxed) != *copy)
        };
        (0..PAGES as usize).filter(differs).count()
    }
}

/// Does `work` while vCPU 0 writes old memory and vCPU 1 the new slot, each time with a new stamp: a page
/// that is written unseen differs from its copy.
fn while_they_write<T>(
    tracker: &Tracker,
    vcpus: &mut [Vcpu],
    stamp: &AtomicU64,
    work: impl FnOnce() -> T,
) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for (index, (vcpu, area)) in vcpus.iter_mut().zip([AREAS[1], guest::PLUG]).enumerate() {
            let stop = &stop;
            scope.spawn(move || {
                // Once more after the work is done, however busy the machine is.
                let mut last = false;
                while !last {
                    last = stop.load(Ordering::Relaxed);
                    let stamp = stamp.fetch_add(1, Ordering::Relaxed);
                    vcpu.set_job_at(Job { stamp, writes: 500, area: 0 }, area);
                    assert_eq!(vcpu.run(), Stop::Done, "the ring has room for every page");
                    // Entries are taken before the slot is known, and while it is added.
                    match tracker.harvest_vcpu(index) {
                        Ok(_) | Err(HarvestError::Busy { .. }) => (),
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        std::thread::sleep(Duration::from_millis(1));
        let result = work();
        std::thread::sleep(Duration::from_millis(2));
        stop.store(true, Ordering::Relaxed);
        result
    })
}

/// Ends the epoch and copies its reported pages; returns how many of them are in the slot.
fn end(guest: &Guest, shadow: &mut Shadow, plugged: &mut Plugged) -> usize {
    let epoch = guest.tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap();
    let is_plugged = |gfn: &Gfn| (BASE.0..BASE.0 + PAGES).contains(&gfn.0);
    let (new, old): (Vec<_>, Vec<_>) = epoch.pages().iter().copied().partition(is_plugged);
    shadow.copy(guest, &old);
    new.iter().for_each(|&gfn| plugged.copy_page(gfn));
    epoch.copied().run();
    new.len()
}

fn nothing_is_lost(choice: BackendChoice, start: SlotStart) {
    let config = TrackerConfig {
        max_vcpus: 2,
        max_slots: 3,
        max_dirty_pages: 6000,
        trigger: 6000,
        ..TrackerConfig::default()
    };
    let Some(mut guest) = guest::start(choice, config) else { return };
    let mut vcpus = std::mem::take(&mut guest.vcpus);
    guest.tracker.enable_stopped().unwrap();
    let mut shadow = guest.shadow();
    let stamp = AtomicU64::new(1);
    for round in 0..ROUNDS {
        let mut plugged = Plugged::new();
        let slot = plugged.slot();
        // Whether or not the VMM has turned its log on itself.
        guest.make_slot(slot, round % 2 == 1);
        while_they_write(&guest.tracker, &mut vcpus, &stamp, || {
            // SAFETY: the slot was made so, of memory that stays until it is removed below.
            let add = || unsafe { guest.tracker.add_slot(slot, start) };
            while matches!(add(), Err(AddSlotError::Busy(TrackerBusy::Harvesting(_) | TrackerBusy::Fetching)))
            {
            }
            if start == SlotStart::Clean {
                plugged.copy_all();
            }
        });
        for _ in 0..2 {
            let reported = end(&guest, &mut shadow, &mut plugged);
            assert!(reported > 0, "vCPU 1 has written nothing");
            assert_eq!((plugged.differences(), shadow.differences(&guest).len()), (0, 0), "round {round}");
            while_they_write(&guest.tracker, &mut vcpus, &stamp, || ());
        }
        // In the right order, and in the wrong one, which costs nothing here.
        if round % 4 < 2 {
            guest.unmake_slot(slot);
            guest.tracker.remove_slot(ID).unwrap();
        } else {
            guest.tracker.remove_slot(ID).unwrap();
            guest.unmake_slot(slot);
        }
        assert_eq!(end(&guest, &mut shadow, &mut plugged), 0, "pages of a slot that is gone");
        assert_eq!(shadow.differences(&guest).len(), 0, "round {round}");
    }
    guest.tracker.disable().unwrap();
}

macro_rules! slots_that_come {
    ($($name:ident: $choice:ident, $start:ident;)*) => {$(
        #[test]
        fn $name() {
            nothing_is_lost(BackendChoice::$choice, SlotStart::$start);
        }
    )*};
}

slots_that_come! {
    a_dirty_slot_on_a_ring: Ring, Dirty;
    a_clean_slot_on_a_ring: Ring, Clean;
    a_dirty_slot_on_a_clear_log: ClearLog, Dirty;
    a_clean_slot_on_a_clear_log: ClearLog, Clean;
    a_dirty_slot_on_a_bitmap: Bitmap, Dirty;
    a_clean_slot_on_a_bitmap: Bitmap, Clean;
}

/// A slot is refused by the configured number, by the global list and by other slots, and then nothing of it
/// is tracked.
#[test]
fn a_slot_that_does_not_fit_is_refused() {
    let config = TrackerConfig { max_slots: 3, ..TrackerConfig::default() };
    let Some(guest) = guest::start(BackendChoice::Auto, config) else { return };
    let plugged = Plugged::new();
    let slot = plugged.slot();
    // SAFETY: a slot that is refused is not touched.
    let refused = |slot| unsafe { guest.tracker.add_slot(slot, SlotStart::Dirty) }.unwrap_err();
    guest.tracker.enable().unwrap();
    let high = MemorySlot { base: Gfn(1 << 30), ..slot };
    assert!(matches!(refused(high), AddSlotError::GlobalLogSize { slot: ID, .. }));
    assert!(matches!(refused(MemorySlot { base: Gfn(1), ..slot }), AddSlotError::Layout(_)));
    // It is not in the VM, and KVM is told to make it at an address that it does not accept.
    let wild = MemorySlot { host_addr: 1 << 60, ..slot };
    assert!(matches!(refused(wild), AddSlotError::Protect { slot: ID, .. }));
    assert_eq!(guest.tracker.layout().slots().len(), 2);
    let epoch = guest.tracker.stopped();
    assert!(matches!(refused(slot), AddSlotError::Busy(TrackerBusy::EpochOpen)));
    drop(epoch);
    guest.make_slot(slot, false);
    // SAFETY: it was made so, of memory that outlives the VM.
    unsafe { guest.tracker.add_slot(slot, SlotStart::Clean) }.unwrap();
    let other = MemorySlot { id: 9, base: Gfn(BASE.0 + PAGES), pages: 1, ..slot };
    assert!(matches!(refused(other), AddSlotError::Full(3)));
    assert_eq!(guest.tracker.layout().slots().len(), 3);
    guest.tracker.disable().unwrap();
}

fn a_vcpu_that_comes_is_tracked(choice: BackendChoice, exact: bool) {
    let config = TrackerConfig {
        max_vcpus: 2,
        max_dirty_pages: 4000,
        trigger: 4000,
        exact,
        ..TrackerConfig::default()
    };
    let setup = Setup { vcpus: 1, ..Setup::of(choice, config) };
    let Some(mut guest) = guest::start_with(setup) else { return };
    let mut first = guest.vcpus.remove(0);
    guest.tracker.enable_stopped().unwrap();
    let mut shadow = guest.shadow();
    let job = |stamp, area| Job { stamp, writes: 400, area };
    first.set_job(job(1, 1));
    let mut second = std::thread::scope(|scope| {
        let running = scope.spawn(|| assert_eq!(first.run(), Stop::Done));
        let second = guest.new_vcpu(1);
        assert_eq!(guest.add_vcpu(&second).unwrap(), 1);
        running.join().unwrap();
        second
    });
    for stamp in 2..12 {
        // vCPU 1 is parked for some of the epochs.
        let runs = stamp % 4 != 3;
        if runs {
            guest.tracker.unpark_vcpu(1)
        } else {
            guest.tracker.park_vcpu(1)
        }
        first.set_job(job(stamp, 1));
        second.set_job(job(stamp, 0));
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(first.run(), Stop::Done));
            if runs {
                scope.spawn(|| assert_eq!(second.run(), Stop::Done));
            }
        });
        if stamp % 2 == 0 {
            guest.tracker.harvest_vcpu(1).unwrap();
        }
        let epoch = guest.tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap();
        assert!(epoch.pages().len() > 300);
        shadow.copy(&guest, epoch.pages());
        epoch.copied().run();
        assert_eq!(shadow.differences(&guest), [], "epoch {stamp}");
        assert_eq!(guest.tracker.is_exact(), exact && choice == BackendChoice::Ring);
    }
    assert_eq!(guest.tracker.vcpus(), 2);
    let third = guest.new_vcpu(2);
    assert!(matches!(guest.add_vcpu(&third), Err(AddVcpuError::Full(2))));
}

#[test]
fn a_vcpu_that_comes_is_tracked_on_a_ring() {
    a_vcpu_that_comes_is_tracked(BackendChoice::Ring, false);
}

#[test]
fn a_vcpu_that_comes_is_tracked_on_an_exact_ring() {
    a_vcpu_that_comes_is_tracked(BackendChoice::Ring, true);
}

#[test]
fn a_vcpu_that_comes_is_tracked_on_a_clear_log() {
    a_vcpu_that_comes_is_tracked(BackendChoice::ClearLog, false);
}

/// A ring that was read tells nobody where KVM writes next; a ring that only KVM has written to begins at its
/// start.
#[test]
fn a_ring_that_was_read_is_refused() {
    let config = TrackerConfig { max_vcpus: 4, ..TrackerConfig::default() };
    let setup = Setup { vcpus: 1, ..Setup::of(BackendChoice::Ring, config) };
    let Some(mut guest) = guest::start_with(setup) else { return };
    guest.tracker.enable_stopped().unwrap();
    let mut early = guest.new_vcpu(1);
    early.set_job(Job { stamp: 1, writes: 100, area: 0 });
    assert_eq!(early.run(), Stop::Done);
    assert_eq!(guest.add_vcpu(&early).unwrap(), 1);
    let epoch = guest.tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap();
    assert!(epoch.pages().len() > 50, "what it wrote before it was added");
    epoch.copied().run();
    let again = guest.add_vcpu(&early);
    assert!(matches!(again, Err(AddVcpuError::Ring(NewError::RingUsed { vcpu: 2 }))), "{again:?}");
    guest.vcpus.clear();
}
