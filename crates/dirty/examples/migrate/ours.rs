//! Live migration with outlive-dirty: each thread fetches a shard of the dirty pages while the guest runs,
//! copies its shard of the base meanwhile, and sends both over a connection of its own; one epoch brings the
//! rest.
// UNSAFETY: tells the tracker what memory the slots of the VM are.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use outlive_dirty::{
    BackendChoice, DirtyBackend, Fetch, Gfn, GlobalLog, HotPages, KvmFile, MemoryLayout, RegionLog, RingExit,
    Shard, Tracker, TrackerConfig,
};

use crate::guest::PAGE;
use crate::run::{Gate, Running, Work};
use crate::vm::{self, Plan, SourceVm, View, device_writes};
use crate::wire::{self, Sender};
use crate::{Case, Failure, Outcome, Round};

/// Pages that a thread copies for the base before it fetches again.
const CHUNK: usize = 512;

pub(crate) fn migrate(case: &Case) -> Result<Outcome, Failure> {
    let plan = Plan::new(case.gib, case.touched);
    let end = plan.regions().map(|(base, part)| base + part.end - part.start)[1];
    let global = GlobalLog::new(end / PAGE, 4096);
    let mut backend = None;
    let log = |base, _| RegionLog::new(global.clone(), Gfn::of(base));
    let mut vm = SourceVm::new(plan, case.vcpus, log, |kvm, vm| {
        // Before the first vCPU: a dirty ring is a property of the VM.
        let probed =
            DirtyBackend::probe(kvm.descriptor(), vm.descriptor(), BackendChoice::Auto, case.vcpus as usize)?;
        backend = Some(probed.with_self_test(kvm.descriptor()));
        Ok(())
    })?;
    let backend = backend.ok_or("the VM was not probed")?;
    let name = backend.kind().to_string();
    let tracker = tracker(&vm, backend, &global, case)?;
    let target = crate::guest::memfd(plan.bytes)?;
    let (senders, receivers) = wire::connect(case.streams, View::of(&vm), plan, &target)?;
    let mut outcome = Outcome::new(&name);

    let gate = Gate::default();
    let work = Work { plan, vcpus: case.vcpus, pages: case.dirty_pages(), round: case.round };
    let ring_full = |vcpu: usize, wait: Duration| {
        // The trigger is reached, or a ring is full: fetching makes room. The caller checks its own flags.
        if tracker.ring_full(vcpu)? == RingExit::DirtyLogFull {
            tracker.wait_for_room(vcpu, wait)?;
        }
        Ok(())
    };
    let SourceVm { vcpus, memory, file, .. } = &mut vm;
    let (memory, file) = (&*memory, &*file);
    let mut begin = Instant::now();
    if case.exact {
        // While the vCPUs are stopped, so that the trigger applies from the first page on.
        tracker.enable_stopped()?;
        outcome.turn_on = begin.elapsed();
    }
    thread::scope(|scope| -> Result<(), Failure> {
        let device = move |count| device_writes(memory, &plan, count);
        let running = Running::start(scope, &gate, work, vcpus, &ring_full, device)?;
        if !case.exact {
            thread::sleep(case.round);
            begin = Instant::now();
            tracker.enable()?;
            outcome.turn_on = begin.elapsed();
        }
        // All present pages, in the order of the file; from here on changed pages come by themselves.
        let base = vm::extents(file)?;
        let mut senders = pre_copy(&tracker, &plan, &base, senders, case, &mut outcome)?;

        let standing = Instant::now();
        running.stop()?;
        outcome.last_pages = last_epoch(&tracker, &mut senders)?;
        outcome.downtime = standing.elapsed();
        outcome.total = begin.elapsed();
        Ok(())
    })?;
    outcome.guest(&gate);
    let begin = Instant::now();
    tracker.disable()?;
    outcome.turn_off = begin.elapsed();
    for receiver in receivers {
        receiver.join().map_err(|_| "the receiver panicked")??;
    }
    outcome.different = wire::differing_pages(&vm.file, &target)?;
    Ok(outcome)
}

fn tracker(
    vm: &SourceVm<RegionLog>,
    backend: DirtyBackend,
    global: &Arc<GlobalLog>,
    case: &Case,
) -> Result<Tracker, Failure> {
    // The regions are the slots, numbered from 0 by address; the layout keeps them mapped.
    let layout = MemoryLayout::of_memory(&vm.memory, 0)?;
    let config = TrackerConfig::default()
        .with_max_dirty_pages(4 * case.trigger())
        .with_trigger(case.trigger())
        // With `exact` the last epoch never has more pages than this, while every shard is fetched: at the
        // trigger KVM stops the vCPUs until fetches have made room.
        .with_exact(case.exact)
        .with_hot(HotPages::Auto);
    let vcpus: Vec<_> = vm.vcpus.iter().map(|vcpu| vcpu.fd.descriptor()).collect();
    // SAFETY: the slots are as they were made, and the layout keeps their memory mapped.
    Ok(unsafe { Tracker::new(layout, config, backend, global.clone(), vm.vm.descriptor(), &vcpus)? })
}

/// A thread for each shard: the base copy with fetches in between, then the rounds.
fn pre_copy(
    tracker: &Tracker,
    plan: &Plan,
    base: &[Range<u64>],
    senders: Vec<Sender>,
    case: &Case,
    outcome: &mut Outcome,
) -> Result<Vec<Sender>, Failure> {
    let barrier = Barrier::new(senders.len());
    let of = senders.len() as u32;
    let ended = thread::scope(|scope| {
        let barrier = &barrier;
        let spawn = |(index, sender): (usize, Sender)| {
            let shard = Shard::new(index as u32, of).expect("a shard for each sender");
            let mut fetcher =
                Fetcher { tracker, plan, shard, shards: of, sender, buffer: vec![Gfn(0); 8192] };
            scope.spawn(move || -> Result<_, Failure> {
                let begin = Instant::now();
                fetcher.copy_base(base)?;
                let base = begin.elapsed();
                barrier.wait();
                let begin = Instant::now();
                let mut rounds = Vec::new();
                for round in 1..=case.rounds {
                    thread::sleep((case.round * round as u32).saturating_sub(begin.elapsed()));
                    rounds.push(fetcher.round(|_| true)?);
                    if index == 0 {
                        // A pass over the dirty pages is complete: hot ones are no longer trapped.
                        tracker.age()?;
                    }
                }
                Ok((fetcher.sender, base, rounds))
            })
        };
        let threads: Vec<_> = senders.into_iter().enumerate().map(spawn).collect();
        threads.into_iter().map(|thread| thread.join().map_err(|_| "a thread panicked")?).collect::<Vec<_>>()
    });
    let mut senders = Vec::new();
    outcome.rounds = vec![Round::default(); case.rounds];
    for one in ended {
        let (sender, base, rounds) = one?;
        senders.push(sender);
        outcome.base = outcome.base.max(base);
        outcome.rounds.iter_mut().zip(rounds).for_each(|(all, round)| all.beside(round));
    }
    Ok(senders)
}

struct Fetcher<'a> {
    tracker: &'a Tracker,
    plan: &'a Plan,
    shard: Shard,
    shards: u32,
    sender: Sender,
    buffer: Vec<Gfn>,
}

impl Fetcher<'_> {
    /// Copies this shard, and fetches in between so that no ring fills up. A page that is fetched before the
    /// base copy has reached it need not be sent: the copy reads it later.
    fn copy_base(&mut self, base: &[Range<u64>]) -> Result<(), Failure> {
        let pages = base.iter().flat_map(|extent| extent.clone().step_by(PAGE as usize));
        let gpas = pages.map(|offset| self.plan.gpa(offset));
        let shard = self.shard;
        let mut ours = gpas.filter(move |&gpa| shard.has(Gfn::of(gpa))).peekable();
        while ours.peek().is_some() {
            self.sender.send(ours.by_ref().take(CHUNK))?;
            // Everything read so far is below the next page of the base. A page that appeared after the base
            // was listed is not part of it.
            let next = ours.peek().copied().unwrap_or(u64::MAX);
            let plan = self.plan;
            let is_to_come = |gpa| gpa >= next && has(base, plan.offset(gpa));
            self.round(|gpa| !is_to_come(gpa))?;
        }
        Ok(())
    }

    /// Fetches, re-arms and sends those of the pages that are wanted, until little is left.
    fn round(&mut self, is_wanted: impl Fn(u64) -> bool) -> Result<Round, Failure> {
        let (mut round, mut left) = (Round::default(), self.shards);
        let how = Fetch { rearm: true, shard: Some(self.shard), ..Fetch::default() };
        loop {
            let begin = Instant::now();
            let pages = self.tracker.fetch(&mut self.buffer, how)?.rearm()?;
            round.find += begin.elapsed();
            round.pages += pages.len();
            let begin = Instant::now();
            self.sender.send(pages.iter().map(|gfn| gfn.gpa()).filter(|&gpa| is_wanted(gpa)))?;
            round.send += begin.elapsed();
            // Pages of other shards take places of the buffer too, so a fetch that does not fill it may leave
            // some of ours: one more for each shard. Not until nothing comes, as the guest may be faster than
            // this: what is left belongs to the next round, and at last to the epoch.
            let count = pages.len();
            left -= u32::from(count < self.buffer.len());
            if count == 0 || left == 0 {
                return Ok(round);
            }
        }
    }
}

/// Whether a page of the file is part of the base.
fn has(base: &[Range<u64>], offset: u64) -> bool {
    let next = base.partition_point(|extent| extent.end <= offset);
    base.get(next).is_some_and(|extent| extent.start <= offset)
}

/// The guest is stopped: the rest is divided among the connections.
fn last_epoch(tracker: &Tracker, senders: &mut [Sender]) -> Result<usize, Failure> {
    let epoch = tracker.stopped().state_saved().harvest()?.rearm()?;
    let (pages, of) = (epoch.pages(), senders.len() as u32);
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (index, sender) in senders.iter_mut().enumerate() {
            let shard = Shard::new(index as u32, of).expect("a shard for each sender");
            let ours = pages.iter().filter(move |&&gfn| shard.has(gfn)).map(|gfn| gfn.gpa());
            // Only this connection has ever sent these pages, so no older copy comes later.
            threads.push(scope.spawn(move || sender.send(ours).and_then(|()| sender.finish())));
        }
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?.map_err(Failure::from))
    })?;
    let count = pages.len();
    epoch.copied().run();
    Ok(count)
}
