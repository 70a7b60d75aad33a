//! The tracker: one object for the life of a VM, shared by its vCPU threads and the thread that ends epochs.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::backend::{Backend, Kind};
use crate::bits::Bits;
use crate::epoch::{Epoch, Part, Stopped};
use crate::flat::Flat;
use crate::gate::Gate;
use crate::global::GlobalLog;
use crate::kvm::{Kernel, Vm};
use crate::lane::{Lane, Owner};
use crate::layout::{Gfn, Layout};
use crate::ring::{Mapping, Ring};
use crate::source::{Bitmap, HarvestError, RearmError, Rings, Source};

/// Limits chosen by the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// vCPUs of the VM.
    pub vcpus: usize,
    /// Dirty pages an epoch is expected to have at most: memory for their lists is taken by `enable`. An epoch
    /// with more loses none, but takes memory and time when it is harvested.
    pub max_dirty_pages: usize,
    /// Dirty pages, over all vCPUs and the global list, at which [`Tracker::should_stop`] becomes true.
    pub trigger: usize,
}

/// Why there is no tracker.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// A VM has at least one vCPU.
    #[error("a tracker needs at least one vCPU")]
    NoVcpus,
    /// Not as many vCPU descriptors as `Config::vcpus`.
    #[error("{given} vCPU descriptors were given for {vcpus} vCPUs")]
    VcpuCount {
        /// Descriptors given.
        given: usize,
        /// `Config::vcpus`.
        vcpus: usize,
    },
    /// The trigger must be from 1 to `max_dirty_pages`.
    #[error("the dirty trigger of {trigger} pages is not between 1 and max_dirty_pages = {max_dirty_pages}")]
    Trigger {
        /// `Config::trigger`.
        trigger: usize,
        /// `Config::max_dirty_pages`.
        max_dirty_pages: usize,
    },
    /// The global list does not cover all of memory.
    #[error("the global list covers {covered} frame numbers, the layout has {needed}")]
    GlobalLogSize {
        /// What the global list was made for.
        covered: u64,
        /// What the layout needs: [`Layout::gfn_space`].
        needed: u64,
    },
    /// The global list belongs to another tracker.
    #[error("the global list is in use by another tracker")]
    GlobalLogTaken,
    /// A ring could not be mapped.
    #[error("cannot map the dirty ring of vCPU {vcpu}")]
    Map {
        /// The vCPU.
        vcpu: usize,
        /// What the kernel said.
        source: io::Error,
    },
    /// The VM's descriptor could not be duplicated.
    #[error("cannot duplicate the descriptor of the VM")]
    Vm(#[source] io::Error),
    /// Address space for the lists could not be reserved.
    #[error("cannot reserve address space for the dirty lists")]
    Reserve(#[source] io::Error),
}

/// Why tracking was not enabled. Nothing is left on.
#[derive(Debug, thiserror::Error)]
pub enum EnableError {
    /// It is enabled already.
    #[error("dirty tracking is enabled already")]
    Already,
    /// An epoch is open.
    #[error("an epoch is open")]
    EpochOpen,
    /// A vCPU thread is harvesting: the VM is not stopped.
    #[error("vCPU {0} is being harvested")]
    Busy(usize),
    /// The tracker has met a ring overrun or a wrong reset count, from which the rings of a VM do not recover.
    #[error("dirty tracking of this VM has failed earlier and cannot be enabled again")]
    Failed,
    /// KVM_SET_USER_MEMORY_REGION failed.
    #[error("cannot turn on the dirty log of memory slot {slot}")]
    Protect {
        /// The slot number.
        slot: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// What KVM had logged before could not be cleared away.
    #[error("cannot clear the dirty log")]
    Leftovers(#[source] HarvestError),
    /// The same, at its reset.
    #[error("cannot clear the dirty log")]
    LeftoverReset(#[source] RearmError),
}

/// Why tracking was not disabled.
#[derive(Debug, thiserror::Error)]
pub enum DisableError {
    /// An epoch is open: drop it first.
    #[error("an epoch is open")]
    EpochOpen,
    /// A vCPU thread is harvesting: the VM is not stopped.
    #[error("vCPU {0} is being harvested")]
    Busy(usize),
    /// KVM_SET_USER_MEMORY_REGION failed; the slot stays logged, all else is off.
    #[error("cannot turn off the dirty log of memory slot {slot}")]
    Protect {
        /// The slot number.
        slot: u32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Counters since the tracker was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Epochs completed ([`Epoch::run`]).
    pub epochs: u64,
    /// Pages of completed epochs.
    pub pages: u64,
    /// Ring entries and marks of pages that were in the epoch already.
    pub duplicates: u64,
    /// Pages that did not fit in a vCPU's list and went to the global one.
    pub spilled: u64,
    /// Epochs with more than `max_dirty_pages`.
    pub oversized: u64,
    /// Harvests that searched the global bitmap because the global list was full or a marker was at work.
    pub searches: u64,
    /// Ring entries and marks that are no page of the layout.
    pub ignored: u64,
    /// Resets that were interrupted, after which all of memory was write-protected anew.
    pub full_rearms: u64,
}

#[derive(Default)]
struct Counters {
    epochs: AtomicU64,
    pages: AtomicU64,
    duplicates: AtomicU64,
    spilled: AtomicU64,
    oversized: AtomicU64,
    ignored: AtomicU64,
    full_rearms: AtomicU64,
    /// `ignored` when it was last warned of.
    warned: AtomicU64,
}

fn add(counter: &AtomicU64, amount: u64) {
    if amount != 0 {
        counter.fetch_add(amount, Ordering::Relaxed);
    }
}

/// Knows which pages of a VM changed in an epoch. Share it in an `Arc`.
///
/// It holds a duplicate of the VM's descriptor, so the VM lives at least as long. Make **one tracker for the life
/// of a VM** and enable and disable it as often as needed: where KVM writes next in a ring is known only to
/// whoever has read it from its start.
pub struct Tracker {
    layout: Layout,
    config: Config,
    kind: Kind,
    kernel: Box<dyn Kernel>,
    source: Box<dyn Source>,
    lanes: Vec<Lane>,
    global: Arc<GlobalLog>,
    /// Pages that are in a lane or in `flat`.
    seen: Bits,
    flat: Flat,
    gate: Gate,
    /// Somebody holds an epoch, or is in enable or disable.
    epoch_open: AtomicBool,
    all: AtomicBool,
    /// 0, or 1 + the vCPU whose ring was overrun, or `WRONG_RESET`.
    failed: AtomicUsize,
    counters: Counters,
    #[cfg(test)]
    pub(crate) planted: AtomicU64,
}

const WRONG_RESET: usize = usize::MAX;

impl Tracker {
    /// Checks the limits, maps the rings and reserves (not takes) memory for the lists.
    ///
    /// `vm` and `vcpus` are the descriptors of the VM that `backend` was probed for; the vCPUs in the order of
    /// the numbers that [`Tracker::harvest_vcpu`] is called with.
    pub fn new(
        layout: Layout,
        config: Config,
        backend: Backend,
        global: Arc<GlobalLog>,
        vm: BorrowedFd<'_>,
        vcpus: &[BorrowedFd<'_>],
    ) -> Result<Tracker, NewError> {
        if vcpus.len() != config.vcpus {
            return Err(NewError::VcpuCount { given: vcpus.len(), vcpus: config.vcpus });
        }
        let source: Box<dyn Source> = match backend.kind() {
            Kind::Ring => {
                let map = |(vcpu, fd): (usize, &BorrowedFd<'_>)| {
                    Mapping::of_vcpu(*fd, backend.ring_entries())
                        .map(|mapping| Ring::new(Arc::new(mapping)))
                        .map_err(|source| NewError::Map { vcpu, source })
                };
                Box::new(Rings::new(vcpus.iter().enumerate().map(map).collect::<Result<_, _>>()?))
            }
            Kind::Bitmap => Box::new(Bitmap::reserve(&layout).map_err(NewError::Reserve)?),
        };
        let kernel = Box::new(Vm::new(vm).map_err(NewError::Vm)?);
        Self::with(layout, config, backend.kind(), kernel, source, global)
    }

    pub(crate) fn with(
        layout: Layout,
        config: Config,
        kind: Kind,
        kernel: Box<dyn Kernel>,
        source: Box<dyn Source>,
        global: Arc<GlobalLog>,
    ) -> Result<Tracker, NewError> {
        let Config { vcpus, max_dirty_pages, trigger } = config;
        if vcpus == 0 {
            return Err(NewError::NoVcpus);
        }
        if trigger == 0 || trigger > max_dirty_pages {
            return Err(NewError::Trigger { trigger, max_dirty_pages });
        }
        let needed = layout.gfn_space();
        if global.gfn_space() < needed {
            return Err(NewError::GlobalLogSize { covered: global.gfn_space(), needed });
        }
        let lane_capacity = match kind {
            Kind::Ring => max_dirty_pages.min(layout.pages() as usize),
            Kind::Bitmap => 0,
        };
        let lanes = (0..vcpus).map(|_| Lane::reserve(lane_capacity)).collect::<Result<_, _>>();
        let lanes = lanes.map_err(NewError::Reserve)?;
        let seen = Bits::reserve(needed).map_err(NewError::Reserve)?;
        let flat = Flat::reserve(layout.pages()).map_err(NewError::Reserve)?;
        // Last, as nothing may fail after it.
        if !global.take() {
            return Err(NewError::GlobalLogTaken);
        }
        Ok(Tracker {
            layout,
            config,
            kind,
            kernel,
            source,
            lanes,
            global,
            seen,
            flat,
            gate: Gate::new(),
            epoch_open: AtomicBool::new(false),
            all: AtomicBool::new(false),
            failed: AtomicUsize::new(0),
            counters: Counters::default(),
            #[cfg(test)]
            planted: AtomicU64::new(0),
        })
    }

    /// The back end in use.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The memory slots that are tracked.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The limits.
    pub fn config(&self) -> Config {
        self.config
    }

    /// The global list.
    pub fn global(&self) -> &Arc<GlobalLog> {
        &self.global
    }

    /// Whether pages are being tracked.
    pub fn is_enabled(&self) -> bool {
        !self.gate.is_off()
    }

    /// Counters since the tracker was made.
    pub fn stats(&self) -> Stats {
        let Counters { epochs, pages, duplicates, spilled, oversized, ignored, full_rearms, .. } =
            &self.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            epochs: get(epochs),
            pages: get(pages),
            duplicates: get(duplicates),
            spilled: get(spilled),
            oversized: get(oversized),
            searches: self.global.scans(),
            ignored: get(ignored) + self.global.ignored(),
            full_rearms: get(full_rearms),
        }
    }

    // --- on and off -------------------------------------------------------------------------------------------

    /// Takes the memory of the lists and makes KVM trap the first write to every page; the first epoch begins.
    ///
    /// The VM is stopped and no device writes its memory. Every page counts as clean from here on: what is in
    /// memory now must be copied by other means (the base copy), which may go on while the guest runs.
    pub fn enable(&self) -> Result<(), EnableError> {
        let _token = Token::take(self).ok_or(EnableError::EpochOpen)?;
        if !self.gate.is_off() {
            return Err(EnableError::Already);
        }
        if self.failed.load(Ordering::Acquire) != 0 {
            return Err(EnableError::Failed);
        }
        self.seen.populate();
        self.flat.populate(self.config.max_dirty_pages);
        self.lanes.iter().for_each(Lane::populate);
        self.source.populate();
        self.global.enable();
        if let Err(error) = self.arm() {
            self.set_logging(false).err();
            self.release_memory().err();
            return Err(error);
        }
        self.all.store(false, Ordering::Relaxed);
        self.gate.open();
        Ok(())
    }

    fn arm(&self) -> Result<(), EnableError> {
        self.set_logging(true).map_err(|(slot, source)| EnableError::Protect { slot, source })?;
        self.discard()
    }

    /// Stops tracking and frees the memory of the lists. The VM is stopped. Pages not yet reported are forgotten.
    pub fn disable(&self) -> Result<(), DisableError> {
        let _token = Token::take(self).ok_or(DisableError::EpochOpen)?;
        if self.gate.is_off() {
            return Ok(());
        }
        self.gate.turn_off();
        if let Err(vcpu) = self.release_memory() {
            self.gate.open();
            return Err(DisableError::Busy(vcpu));
        }
        // A ring left full would keep its vCPU from running for ever. A failed ring is past help.
        if let Err(error) = self.discard() {
            tracing::warn!(%error, "dirty log not cleared");
        }
        self.set_logging(false).map_err(|(slot, source)| DisableError::Protect { slot, source })
    }

    fn set_logging(&self, on: bool) -> Result<(), (u32, io::Error)> {
        let mut result = Ok(());
        for slot in self.layout.slots() {
            let this = self.kernel.set_logging(slot, on).map_err(|error| (slot.id, error));
            if on && this.is_err() {
                return this;
            }
            result = result.and(this);
        }
        result
    }

    /// Takes and re-arms what KVM has logged, and forgets it.
    fn discard(&self) -> Result<(), EnableError> {
        for (vcpu, lane) in self.lanes.iter().enumerate() {
            let _owner = lane.own().ok_or(EnableError::Busy(vcpu))?;
            let taken = self.source.take_vcpu(&self.layout, vcpu, &mut |_| ());
            taken.map_err(|error| EnableError::Leftovers(self.noted(error)))?;
        }
        let taken = self.source.take_shared(&*self.kernel, &self.layout, &mut |_| ());
        taken.map_err(EnableError::Leftovers)?;
        self.source.rearm(&*self.kernel, &self.layout).map_err(EnableError::LeftoverReset)?;
        self.source.begin();
        Ok(())
    }

    /// Err(vcpu) if that vCPU's thread is at work in its list.
    fn release_memory(&self) -> Result<(), usize> {
        for (vcpu, lane) in self.lanes.iter().enumerate() {
            lane.own().ok_or(vcpu)?.clear_all();
        }
        self.global.disable();
        self.seen.clear_all();
        self.flat.clear_all();
        Ok(())
    }

    // --- while the guest runs ---------------------------------------------------------------------------------

    /// Dirty pages of this epoch as far as they can be seen without a system call; duplicates count. Any thread.
    ///
    /// With the ring that is every entry KVM has published (on Intel processors with page modification logging a
    /// running vCPU holds back up to 512); with the bitmap it is the global list only, until the harvest.
    pub fn pending(&self) -> usize {
        self.source.pending() + self.global.pending()
    }

    /// Whether the epoch has reached the trigger and should end. No system call. Any thread.
    pub fn should_stop(&self) -> bool {
        self.pending() >= self.config.trigger
    }

    /// Takes what vCPU `vcpu` has logged into its own list, and says how many entries that were.
    ///
    /// For the thread of that vCPU, after KVM_RUN and after it has read the vCPU's state (some vCPU ioctls write
    /// guest memory); all vCPUs can do so at once, without a lock and without allocation. It may also be called
    /// in the middle of an epoch. Before [`Epoch::run`] of an epoch already harvested, and while tracking is off,
    /// it leaves everything where it is and returns 0.
    ///
    /// # Panics
    /// If there is no such vCPU.
    pub fn harvest_vcpu(&self, vcpu: usize) -> Result<usize, HarvestError> {
        let owner = self.lanes[vcpu].own().ok_or(HarvestError::Busy { vcpu })?;
        if !self.gate.is_open() {
            return Ok(0);
        }
        self.check()?;
        self.take_vcpu(vcpu, &owner)
    }

    /// Checks KVM's word that a ring is full. Call it at once when KVM_RUN has returned
    /// `KVM_EXIT_DIRTY_RING_FULL`, then end the epoch.
    ///
    /// # Errors
    /// [`HarvestError::Overrun`] if the ring is empty: KVM has lost its place and would say so for ever.
    ///
    /// # Panics
    /// If there is no such vCPU.
    pub fn ring_full(&self, vcpu: usize) -> Result<(), HarvestError> {
        self.check()?;
        if self.source.can_be_full(vcpu) { Ok(()) } else { Err(self.noted(HarvestError::Overrun { vcpu })) }
    }

    /// Makes the next harvest return every page of the VM: full synchronisation.
    pub fn all_dirty(&self) {
        self.all.store(true, Ordering::Release);
    }

    // --- the end of an epoch ----------------------------------------------------------------------------------

    /// Begins to end the epoch: every vCPU is out of KVM_RUN, and no device writes guest memory.
    ///
    /// # Panics
    /// If an epoch is open already: there is one at a time.
    pub fn stopped(&self) -> Epoch<'_, Stopped> {
        self.try_stopped().expect("one epoch at a time")
    }

    /// As [`Tracker::stopped`], but None if an epoch is open or tracking is being enabled or disabled.
    pub fn try_stopped(&self) -> Option<Epoch<'_, Stopped>> {
        Token::take(self).map(Epoch::begin)
    }

    /// The `index`-th of `of` nearly equal parts of the pages, for threads that copy together.
    ///
    /// None unless the epoch is between `rearm` and `copied`; those two wait for nobody, so tell the threads
    /// after the one and hear from them before the other. A part still held makes `copied` wait.
    pub fn part(&self, index: usize, of: usize) -> Option<Part<'_>> {
        (index < of && self.gate.read()).then(|| {
            let len = self.flat.len();
            Part { tracker: self, range: len * index / of..len * (index + 1) / of }
        })
    }

    pub(crate) fn part_done(&self) {
        self.gate.read_done();
    }

    /// The list of the epoch; for [`Epoch`] and [`Part`].
    pub(crate) fn flat(&self) -> &Flat {
        &self.flat
    }

    /// Takes all that is dirty into one list. On an error, and if the epoch is dropped, that list stays and the
    /// next harvest goes on from there.
    pub(crate) fn harvest(&self) -> Result<(), HarvestError> {
        if self.gate.is_off() {
            return Err(HarvestError::NotEnabled);
        }
        self.check()?;
        self.gate.close();
        for (vcpu, lane) in self.lanes.iter().enumerate() {
            let owner = lane.own().ok_or(HarvestError::Busy { vcpu })?;
            let taken = self.take_vcpu(vcpu, &owner);
            owner.drain(|gfn| self.append(gfn));
            taken?;
        }
        let (mut repeated, mut ignored) = (0, 0);
        let mut sink = |gfn: Option<Gfn>| match gfn {
            Some(gfn) if self.seen.claim(gfn) => self.append(gfn),
            Some(_) => repeated += 1,
            None => ignored += 1,
        };
        let taken = self.source.take_shared(&*self.kernel, &self.layout, &mut sink);
        self.global.drain(|gfn| sink(self.layout.contains(gfn).then_some(gfn)));
        add(&self.counters.duplicates, repeated);
        add(&self.counters.ignored, ignored);
        taken?;
        if self.all.swap(false, Ordering::AcqRel) {
            self.append_all();
        }
        Ok(())
    }

    fn take_vcpu(&self, vcpu: usize, owner: &Owner<'_>) -> Result<usize, HarvestError> {
        let (mut repeated, mut spilled, mut ignored) = (0, 0, 0);
        let taken = self.source.take_vcpu(&self.layout, vcpu, &mut |gfn| match gfn {
            None => ignored += 1,
            Some(gfn) if owner.is_full() && !self.seen.peek(gfn) => {
                self.global.record(gfn);
                spilled += 1;
            }
            Some(gfn) if self.seen.claim(gfn) => owner.push(gfn),
            Some(_) => repeated += 1,
        });
        add(&self.counters.duplicates, repeated);
        add(&self.counters.spilled, spilled);
        add(&self.counters.ignored, ignored);
        taken.map_err(|error| self.noted(error))
    }

    fn append(&self, gfn: Gfn) {
        #[cfg(test)]
        if self.drops_planted(gfn) {
            return;
        }
        self.flat.push(gfn);
    }

    fn append_all(&self) {
        for slot in self.layout.slots() {
            (slot.base.0..slot.end())
                .map(Gfn)
                .filter(|&gfn| self.seen.claim(gfn))
                .for_each(|gfn| self.append(gfn));
        }
    }

    pub(crate) fn rearm(&self) -> Result<(), RearmError> {
        let rearmed = self.source.rearm(&*self.kernel, &self.layout);
        if let Err(RearmError::Count { .. } | RearmError::Protect { .. }) = rearmed {
            self.failed.store(WRONG_RESET, Ordering::Release);
        }
        add(&self.counters.full_rearms, rearmed?.into());
        self.gate.let_read();
        Ok(())
    }

    /// Nobody reads the pages after this.
    pub(crate) fn close(&self) {
        self.gate.end_reading();
    }

    /// Forgets the pages of the epoch, in O(their number), and begins the next one.
    pub(crate) fn begin(&self) {
        let pages = self.flat.len();
        self.flat.for_each(|gfn| self.seen.release_word(gfn));
        self.flat.clear();
        self.source.begin();
        add(&self.counters.epochs, 1);
        add(&self.counters.pages, pages as u64);
        add(&self.counters.oversized, (pages > self.config.max_dirty_pages).into());
        self.warn_of_ignored();
    }

    /// Lets vCPU threads harvest again, after `begin` or when an epoch was dropped on the way.
    pub(crate) fn reopen(&self) {
        if !self.gate.is_off() {
            self.gate.open();
        }
    }

    fn warn_of_ignored(&self) {
        let ignored = self.counters.ignored.load(Ordering::Relaxed);
        // At 1, 2, 4, 8...: a VMM whose layout is wrong should hear of it, not drown in it.
        if ignored > 0 && ignored >= 2 * self.counters.warned.load(Ordering::Relaxed) {
            self.counters.warned.store(ignored, Ordering::Relaxed);
            tracing::warn!(ignored, "dirty log entries that are no page of the memory layout");
        }
    }

    /// Fails for ever once pages were lost.
    fn check(&self) -> Result<(), HarvestError> {
        match self.failed.load(Ordering::Acquire) {
            0 => Ok(()),
            WRONG_RESET => Err(HarvestError::Failed),
            vcpu => Err(HarvestError::Overrun { vcpu: vcpu - 1 }),
        }
    }

    fn noted(&self, error: HarvestError) -> HarvestError {
        if let HarvestError::Overrun { vcpu } = error {
            self.failed.store(vcpu + 1, Ordering::Release);
        }
        error
    }

    /// The planted bug: loses each n-th page, to see that the tests notice.
    #[cfg(test)]
    fn drops_planted(&self, gfn: Gfn) -> bool {
        let every = self.planted.load(Ordering::Relaxed);
        let drops =
            every != 0 && (gfn.0 ^ self.counters.epochs.load(Ordering::Relaxed)).is_multiple_of(every);
        if drops {
            self.seen.release(gfn);
        }
        drops
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        if let Err(error) = self.disable() {
            tracing::warn!(%error, "dirty tracking stays on");
        }
        self.global.give_back();
    }
}

impl fmt::Debug for Tracker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tracker")
            .field("kind", &self.kind)
            .field("config", &self.config)
            .field("enabled", &self.is_enabled())
            .field("stats", &self.stats())
            .finish_non_exhaustive()
    }
}

/// The right to end the epoch, or to enable and disable; there is one.
pub(crate) struct Token<'t> {
    pub(crate) tracker: &'t Tracker,
}

impl<'t> Token<'t> {
    fn take(tracker: &'t Tracker) -> Option<Token<'t>> {
        let taken = tracker.epoch_open.compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
        taken.is_ok().then(|| Token { tracker })
    }
}

impl Drop for Token<'_> {
    fn drop(&mut self) {
        self.tracker.epoch_open.store(false, Ordering::Release);
    }
}
