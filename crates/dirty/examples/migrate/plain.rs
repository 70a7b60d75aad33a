//! Live migration as VMMs do it today: KVM_GET_DIRTY_LOG of each slot into a new vector each time, joined
//! with the `AtomicBitmap` in which `vm-memory` records the writes of device models.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap};

use crate::guest::{self, PAGE, Region};
use crate::run::{Gate, Running, Work};
use crate::vm::{self, Plan, SourceVm, View, device_writes};
use crate::wire::{self, Sender};
use crate::{Case, Failure, Outcome, Round};

pub(crate) fn migrate(case: &Case) -> Result<Outcome, Failure> {
    let plan = Plan::new(case.gib, case.touched);
    let page = NonZeroUsize::new(PAGE as usize).ok_or("no page size")?;
    let mut vm = SourceVm::new(plan, case.vcpus, |_, bytes| AtomicBitmap::new(bytes, page), |_, _| Ok(()))?;
    let target = guest::memfd(plan.bytes)?;
    let (mut senders, receivers) = wire::connect(case.streams, View::of(&vm), plan, &target)?;
    let mut outcome = Outcome::new("get_dirty_log");

    let gate = Gate::default();
    let work = Work { plan, vcpus: case.vcpus, pages: case.dirty_pages(), round: case.round };
    let ring_full =
        |_: usize, _: Duration| -> Result<(), Failure> { Err("a full ring without a ring".into()) };
    let SourceVm { vcpus, memory, file, vm: fd, slots, .. } = &mut vm;
    let (memory, file) = (&*memory, &*file);
    let log = Log { vm: fd, slots, memory };
    thread::scope(|scope| -> Result<(), Failure> {
        let running = Running::start(scope, &gate, work, vcpus, &ring_full, move |count| {
            device_writes(memory, &plan, count)
        })?;
        thread::sleep(case.round);

        let begin = Instant::now();
        log.turn(true)?;
        outcome.turn_on = begin.elapsed();
        let copying = Instant::now();
        send_base(&plan, &vm::extents(file)?, &mut senders)?;
        outcome.base = copying.elapsed();
        let rounds = Instant::now();
        for round in 1..=case.rounds {
            thread::sleep((case.round * round as u32).saturating_sub(rounds.elapsed()));
            outcome.rounds.push(one_round(&log, &mut senders)?);
        }

        let standing = Instant::now();
        running.stop()?;
        outcome.last_pages = one_round(&log, &mut senders)?.pages;
        senders.iter_mut().try_for_each(Sender::finish)?;
        outcome.downtime = standing.elapsed();
        outcome.total = begin.elapsed();
        Ok(())
    })?;
    outcome.guest(&gate);
    let begin = Instant::now();
    log.turn(false)?;
    outcome.turn_off = begin.elapsed();
    drop(senders);
    for receiver in receivers {
        receiver.join().map_err(|_| "the receiver panicked")??;
    }
    outcome.different = wire::differing_pages(&vm.file, &target)?;
    Ok(outcome)
}

struct Log<'v> {
    vm: &'v VmFd,
    slots: &'v [Region],
    memory: &'v GuestMemoryMmap<AtomicBitmap>,
}

impl Log<'_> {
    fn turn(&self, on: bool) -> Result<(), Failure> {
        for (id, &slot) in self.slots.iter().enumerate() {
            guest::set_region(self.vm, id as u32, slot, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })?;
        }
        Ok(())
    }

    /// Guest addresses of all dirty pages. KVM arms them anew in the same step.
    fn dirty_pages(&self) -> Result<Vec<u64>, Failure> {
        let mut found = Vec::new();
        for (id, (slot, region)) in self.slots.iter().zip(self.memory.iter()).enumerate() {
            let by_vcpus = self.vm.get_dirty_log(id as u32, slot.bytes as usize)?;
            let by_devices = region.bitmap_of().get_and_reset();
            for (word, (vcpus, devices)) in by_vcpus.iter().zip(&by_devices).enumerate() {
                let mut bits = vcpus | devices;
                while bits != 0 {
                    found.push(slot.base + (word as u64 * 64 + u64::from(bits.trailing_zeros())) * PAGE);
                    bits &= bits - 1;
                }
            }
        }
        Ok(found)
    }
}

/// The bitmap itself: `GuestMemoryRegion::bitmap` gives only a slice of it.
trait BitmapOf {
    fn bitmap_of(&self) -> &AtomicBitmap;
}

impl BitmapOf for vm_memory::GuestRegionMmap<AtomicBitmap> {
    fn bitmap_of(&self) -> &AtomicBitmap {
        (**self).bitmap()
    }
}

/// The connection that sends a page: runs of 2 MiB in turn.
fn stream_of(gpa: u64, streams: usize) -> usize {
    (gpa >> 21) as usize % streams
}

fn send_base(plan: &Plan, base: &[Range<u64>], senders: &mut [Sender]) -> Result<(), Failure> {
    let pages =
        || base.iter().flat_map(|extent| extent.clone().step_by(PAGE as usize)).map(|at| plan.gpa(at));
    send_all(senders, &pages)
}

fn send_all<I: Iterator<Item = u64>>(
    senders: &mut [Sender],
    pages: &(impl Fn() -> I + Sync),
) -> Result<(), Failure> {
    let of = senders.len();
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (index, sender) in senders.iter_mut().enumerate() {
            let ours = move || pages().filter(move |&gpa| stream_of(gpa, of) == index);
            threads.push(scope.spawn(move || sender.send(ours())));
        }
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?.map_err(Failure::from))
    })
}

fn one_round(log: &Log<'_>, senders: &mut [Sender]) -> Result<Round, Failure> {
    let begin = Instant::now();
    let pages = log.dirty_pages()?;
    let find = begin.elapsed();
    let begin = Instant::now();
    send_all(senders, &|| pages.iter().copied())?;
    Ok(Round { pages: pages.len(), find, send: begin.elapsed() })
}
