//! The tracker: one object for the life of a VM, shared by its vCPU threads and the thread that ends epochs.
// UNSAFETY: its construction is unsafe to call, because it is told what memory the slots of a VM are.
#![allow(unsafe_code)]

mod config;
mod cycle;
mod enable;
mod fetch;
mod run_time;
mod slots;
mod stats;
mod vcpus;

use std::fmt;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use crate::backend::{BackendClaim, DirtyBackend, DirtyKind};
use crate::bits::Bits;
use crate::epoch::{Epoch, Part, Stopped};
use crate::flat::Flat;
use crate::gate::Gate;
use crate::global::GlobalLog;
use crate::hot::{HotPages, HotRule, HotSet};
use crate::kvm::Vm;
use crate::lane::Lane;
use crate::layout::MemoryLayout;
use crate::report;
use crate::source::ring::Fullness;
use crate::source::{Bitmap, ClearLog, HarvestError, RearmError, Rings, Source};

pub use config::{DisableError, EnableError, NewError, TrackerConfig};
pub use fetch::{Fetch, Fetched, Shard};
pub use slots::{AddSlotError, RemoveSlotError, SlotStart, TrackerBusy};
pub use stats::TrackerStats;
pub use vcpus::AddVcpuError;

use fetch::Bell;
use run_time::RunTime;
use slots::SlotTable;
use stats::Counters;
use vcpus::RingShape;

/// The meaning of KVM's report that a ring is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum RingExit {
    /// The dirty log is full: the trigger is reached, or the ring is. End the epoch.
    DirtyLogFull,
    /// The vCPU had used up its part of the trigger and got more: run on.
    Resume,
}

/// Dirty pages of an epoch that has not ended, as far as known: [`Tracker::estimate`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Estimate {
    /// Pages that KVM has logged for vCPUs and that were not fetched; pages of two vCPUs count twice. None if
    /// only a system call can tell (clear-log, bitmap): then count the fetched pages.
    pub logged: Option<usize>,
    /// Pages that the VMM has marked, and those that fetches have taken for other shards or given up.
    pub marked: usize,
    /// Pages that stay writable and may have changed.
    pub hot: usize,
}

/// Finds the pages of a VM that changed in an epoch. Share it in an `Arc`.
///
/// It holds a duplicate of the VM's descriptor, so the VM lives at least as long. Make **one tracker for the
/// life of a VM** and enable and disable it as often as needed: only a reader that has read a ring from its
/// start knows where KVM writes next in it. Slots come and go ([`Tracker::add_slot`],
/// [`Tracker::remove_slot`]), and so do vCPUs ([`Tracker::add_vcpu`], [`Tracker::park_vcpu`]), up to the
/// numbers in [`TrackerConfig`]. It is `Send` and `Sync`: any thread may call any method, vCPU threads call
/// `harvest_vcpu` and `ring_full` for their own vCPU, and one thread at a time holds the [`Epoch`].
///
/// # How a page goes through it
///
/// A write is *trapped*, and its page is unarmed from then on. It is in one list (a vCPU's, or the epoch's)
/// until the epoch re-arms it, or in the set of hot pages, which is reported in every epoch. A write that
/// only the VMM knows of is *marked*; its page was never unarmed. So two bitmaps keep pages from being listed
/// twice: one of the unarmed pages, one of the marked pages of the epoch.
pub struct Tracker {
    slots: SlotTable,
    config: TrackerConfig,
    kind: DirtyKind,
    source: Box<dyn Source>,
    /// Lets the back end go when everything is off. None in memory without KVM.
    _claim: Option<BackendClaim>,
    /// A list for each possible vCPU.
    lanes: Vec<Lane>,
    /// The present number of vCPUs.
    vcpus: AtomicUsize,
    /// The properties of the rings, if there are any.
    ring: Option<RingShape>,
    global: Arc<GlobalLog>,
    /// Pages that were trapped and are not armed again: each is in a lane, in `flat`, in `hot` or fetched.
    trapped: Bits,
    /// The number of these pages.
    unarmed: AtomicUsize,
    /// Pages in `marked`.
    seen: Bits,
    /// Pages of the epoch that are armed: marked by the VMM, or those of an epoch that was dropped.
    marked: Flat,
    /// The pages of the epoch: trapped, then marked, then hot.
    flat: Flat,
    trapped_len: AtomicUsize,
    written_len: AtomicUsize,
    /// The place in `flat` where the hot pages begin.
    first_hot: AtomicUsize,
    /// Pages for the next re-arm to arm: after the harvest, those that are no longer hot; during the re-arm,
    /// trapped ones.
    to_arm: Flat,
    hot: Option<Arc<HotSet>>,
    run_time: RunTime,
    /// Whether pages may become hot.
    heats: AtomicBool,
    gate: Gate,
    /// Who holds the [`Token`]: `FREE`, `EPOCH` or `CHANGE`.
    token: AtomicU8,
    /// The open epoch has been re-armed.
    rearmed: AtomicBool,
    all: AtomicBool,
    /// A re-arm while the guest ran was not sure of its result: the next one arms everything.
    doubtful: AtomicBool,
    /// 0, or 1 + the vCPU whose ring was overrun, or `WRONG_RESET`.
    failed: AtomicUsize,
    /// Threads in `fetch`, and the pages that they have fetched but not re-armed.
    fetchers: AtomicUsize,
    /// The place where the next fetch begins, so that threads begin at different vCPUs.
    next_lane: AtomicUsize,
    /// Pages of this epoch that were in no vCPU's log.
    found: AtomicUsize,
    /// Trapped pages of this epoch that were fetched.
    fetched: AtomicUsize,
    /// One thread at a time takes the part of the log that belongs to no vCPU.
    shared: Lane,
    bell: Bell,
    /// Rung when entries were given back while the guest runs.
    room_bell: Bell,
    /// The hot pages are changed by one thread at a time while no epoch is open.
    heating: Lane,
    counters: Counters,
}

const WRONG_RESET: usize = usize::MAX;

impl Tracker {
    /// Checks the limits, maps the rings and reserves (not takes) memory for the lists.
    ///
    /// `vm` and `vcpus` are the descriptors of the VM that `backend` was probed for; the order of the vCPUs
    /// gives the numbers that [`Tracker::harvest_vcpu`] takes.
    ///
    /// # Safety
    /// Every slot of the layout is in this VM, with this number, base and size and with the memory at its
    /// host address, which stays mapped, until the tracker is dropped or [`Tracker::remove_slot`] has
    /// returned: turning a slot's log on or off tells KVM all of that again, and would create a slot that
    /// does not exist.
    pub unsafe fn new(
        layout: MemoryLayout,
        config: TrackerConfig,
        backend: DirtyBackend,
        global: Arc<GlobalLog>,
        vm: impl AsFd,
        vcpus: &[impl AsFd],
    ) -> Result<Tracker, NewError> {
        let claim = backend.claim().ok_or(NewError::BackendTaken)?;
        let vcpus: Vec<_> = vcpus.iter().map(AsFd::as_fd).collect();
        let minting: &[_] = if config.exact { &vcpus } else { &[] };
        let kernel = Arc::new(Vm::new(vm.as_fd(), minting).map_err(NewError::Vm)?);
        let largest = if config.max_slots > 0 { global.gfn_space() } else { layout.largest() };
        let shape = RingShape::of(&backend);
        let source: Box<dyn Source> = match backend.kind() {
            DirtyKind::Ring => {
                let rings = Rings::new(kernel, shape.map_all(&vcpus)?, config.max_vcpus);
                Box::new(if backend.has_backup() {
                    rings.with_backup(largest).map_err(NewError::Reserve)?
                } else {
                    rings
                })
            }
            DirtyKind::ClearLog => Box::new(ClearLog::reserve(kernel, largest).map_err(NewError::Reserve)?),
            DirtyKind::Bitmap | DirtyKind::Uffd => {
                Box::new(Bitmap::reserve(kernel, largest).map_err(NewError::Reserve)?)
            }
        };
        #[cfg(any(test, feature = "planted-bug"))]
        let source = crate::source::planted::wrap(source, backend.planted());
        let rule = rule(&config, &backend, &layout);
        let mut tracker = Self::with(layout, config, backend.kind(), source, rule, global, vcpus.len())?;
        tracker.ring = (backend.kind() == DirtyKind::Ring).then_some(shape);
        tracker._claim = Some(claim);
        Ok(tracker)
    }

    /// A tracker for memory that this process writes itself, without KVM: userfaultfd with asynchronous
    /// write-protection and PAGEMAP_SCAN (Linux 6.7). It tracks the host addresses of the layout's slots; the
    /// frame numbers are the caller's own.
    ///
    /// Do not use it on the mapping that a running guest's memory slot uses: each scan would make KVM map all
    /// of it anew (275 times slower, measured). Use it on a second mapping of the same memory, which device
    /// emulation writes, for user-space emulators, and as an oracle. It does not see writes through other
    /// mappings and `pwrite` to a memfd, nor a hole that MADV_REMOVE punches, nor writes to a page that was
    /// pinned before it was taken: registered buffers of `io_uring`, vfio, and any call in flight that pins
    /// (`process_vm_writev`, `O_DIRECT`). Let such calls end before pages are taken, or mark their pages when
    /// they have ended.
    #[cfg(any(test, feature = "uffd"))]
    pub fn of_memory(
        layout: MemoryLayout,
        config: TrackerConfig,
        global: Arc<GlobalLog>,
    ) -> Result<Tracker, NewError> {
        let source = crate::source::Uffd::open(&layout).map_err(NewError::Uffd)?;
        Self::with(layout, config, DirtyKind::Uffd, Box::new(source), None, global, 0)
    }

    pub(crate) fn with(
        layout: MemoryLayout,
        config: TrackerConfig,
        kind: DirtyKind,
        source: Box<dyn Source>,
        rule: Option<HotRule>,
        global: Arc<GlobalLog>,
        vcpus: usize,
    ) -> Result<Tracker, NewError> {
        let TrackerConfig { max_vcpus, max_dirty_pages, trigger, .. } = config;
        if vcpus == 0 && kind != DirtyKind::Uffd {
            return Err(NewError::NoVcpus);
        }
        if vcpus > max_vcpus && max_vcpus != 0 {
            return Err(NewError::TooManyVcpus { given: vcpus, max_vcpus });
        }
        if trigger == 0 || trigger > max_dirty_pages {
            return Err(NewError::Trigger { trigger, max_dirty_pages });
        }
        let max_slots = config.max_slots;
        if max_slots != 0 && layout.slots().len() > max_slots {
            return Err(NewError::TooManySlots { given: layout.slots().len(), max_slots });
        }
        let needed = layout.gfn_space();
        if global.gfn_space() < needed {
            return Err(NewError::GlobalLogSize { covered: global.gfn_space(), needed });
        }
        // The maximum is reserved as address space; memory is taken for the present slots and vCPUs.
        let (space, pages) = match max_slots {
            0 => (needed, layout.pages()),
            _ => (global.gfn_space(), global.gfn_space()),
        };
        let reserved = || {
            let lanes = (0..vcpus.max(max_vcpus))
                .map(|_| Lane::reserve(max_dirty_pages))
                .collect::<std::io::Result<_>>()?;
            let list = || Flat::reserve(pages);
            let hot = rule.map(|rule| HotSet::reserve(rule, max_dirty_pages).map(Arc::new)).transpose()?;
            let bits = (Bits::reserve(space)?, Bits::reserve(space)?);
            std::io::Result::Ok((
                lanes,
                bits,
                [list()?, list()?, list()?],
                hot,
                [Lane::reserve(0)?, Lane::reserve(0)?],
            ))
        };
        let (lanes, (trapped, seen), [flat, marked, to_arm], hot, [shared, heating]) =
            reserved().map_err(NewError::Reserve)?;
        if !global.take() {
            return Err(NewError::GlobalLogTaken);
        }
        Ok(Tracker {
            slots: SlotTable::new(layout),
            config,
            kind,
            source,
            _claim: None,
            lanes,
            vcpus: AtomicUsize::new(vcpus),
            ring: None,
            global,
            trapped,
            unarmed: AtomicUsize::new(0),
            seen,
            marked,
            flat,
            trapped_len: AtomicUsize::new(0),
            written_len: AtomicUsize::new(0),
            first_hot: AtomicUsize::new(0),
            to_arm,
            hot,
            run_time: RunTime::default(),
            heats: AtomicBool::new(true),
            gate: Gate::new(),
            token: AtomicU8::new(FREE),
            rearmed: AtomicBool::new(false),
            all: AtomicBool::new(false),
            doubtful: AtomicBool::new(false),
            failed: AtomicUsize::new(0),
            fetchers: AtomicUsize::new(0),
            next_lane: AtomicUsize::new(0),
            found: AtomicUsize::new(0),
            fetched: AtomicUsize::new(0),
            shared,
            bell: Bell::default(),
            room_bell: Bell::default(),
            heating,
            counters: Counters::default(),
        })
    }

    /// The back end in use.
    pub fn kind(&self) -> DirtyKind {
        self.kind
    }

    /// The present memory slots: a copy.
    pub fn layout(&self) -> MemoryLayout {
        self.slots.copy()
    }

    /// The limits.
    pub fn config(&self) -> TrackerConfig {
        self.config
    }

    /// The rule by which pages become hot; None if none do.
    pub fn hot_rule(&self) -> Option<HotRule> {
        self.hot.as_ref().map(|hot| hot.rule())
    }

    /// Whether pages may become hot from now on, if there is a rule for them; at first they may. Pages that are
    /// hot already stay so until they cool. For the rounds of a migration or of a first copy, in which a page
    /// that is reported without having changed is sent once more each time. Any thread, any time.
    pub fn set_heating(&self, heats: bool) {
        self.heats.store(heats, Ordering::Relaxed);
    }

    /// The hot pages, if trapped pages may join them now.
    fn heating_set(&self) -> Option<&HotSet> {
        self.hot.as_deref().filter(|_| self.heats.load(Ordering::Relaxed))
    }

    /// Whether KVM stops the vCPUs at the trigger: the caller asked for [`TrackerConfig::exact`], and this
    /// back end and kernel support it. Known once tracking is enabled.
    pub fn is_exact(&self) -> bool {
        self.source.is_exact()
    }

    /// The global list.
    pub fn global(&self) -> &Arc<GlobalLog> {
        &self.global
    }

    /// Whether pages are being tracked.
    pub fn is_enabled(&self) -> bool {
        !self.gate.is_off()
    }

    // --- while the guest runs
    // ---------------------------------------------------------------------------------

    /// Dirty pages of this epoch as far as they can be seen without a system call; duplicates count, and hot
    /// pages whether or not they are written. Any thread.
    ///
    /// With the ring this counts every entry that KVM has published (on Intel processors with page
    /// modification logging a running vCPU holds back up to 512). With the other back ends it counts only the
    /// global list, until the harvest or a fetch.
    pub fn pending(&self) -> usize {
        let found = self.found.load(Ordering::Relaxed);
        let logged = self.source.pending() + found + self.global.pending() + self.hot_pages();
        logged.saturating_sub(self.fetched.load(Ordering::Relaxed))
    }

    /// The known part of the epoch's dirty pages, without a system call, the same on every back end: for the
    /// stop rule of a migration. Any thread.
    pub fn estimate(&self) -> Estimate {
        let fetched = self.fetched.load(Ordering::Relaxed);
        let logged = (self.source.pending() + self.found.load(Ordering::Relaxed)).saturating_sub(fetched);
        Estimate {
            logged: self.source.counts().then_some(logged),
            marked: self.global.pending(),
            hot: self.hot_pages(),
        }
    }

    /// Whether the epoch has reached the trigger and should end. No system call. Any thread.
    pub fn should_stop(&self) -> bool {
        self.pending() >= self.config.trigger
    }

    fn hot_pages(&self) -> usize {
        self.hot.as_ref().map_or(0, |hot| hot.len())
    }

    #[cfg(test)]
    pub(crate) fn own_lane(&self, vcpu: usize) -> Option<crate::lane::Owner<'_>> {
        self.lanes[vcpu].own()
    }

    #[cfg(test)]
    pub(crate) fn hot_list(&self) -> Vec<crate::Gfn> {
        let mut pages = Vec::new();
        self.hot.iter().for_each(|hot| hot.for_each(|gfn| pages.push(gfn)));
        pages
    }

    /// The number of pages that vCPUs may dirty in the coming epoch, if KVM enforces it.
    fn room(&self) -> Option<usize> {
        self.config.exact.then(|| self.config.trigger.saturating_sub(self.hot_pages()).max(1))
    }

    /// Checks KVM's report that a ring is full, and says what to do. Call it at once, in the thread of the
    /// vCPU, when KVM_RUN has returned `KVM_EXIT_DIRTY_RING_FULL`. Where there are no rings it says
    /// [`RingExit::Resume`].
    ///
    /// # Errors
    /// [`HarvestError::Overrun`] if KVM keeps saying so about a ring that is not full: it has lost its place
    /// and would say so forever.
    ///
    /// # Panics
    /// If there is no such vCPU.
    pub fn ring_full(&self, vcpu: usize) -> Result<RingExit, HarvestError> {
        assert!(vcpu < self.vcpus(), "there is no vCPU {vcpu}");
        self.check()?;
        match self.source.fullness(vcpu) {
            Fullness::Full => (),
            // A fetching thread has made room since.
            Fullness::NotNow => return Ok(RingExit::Resume),
            Fullness::Never => return Err(self.noted(HarvestError::Overrun { vcpu })),
        }
        let topped_up = self.gate.is_open()
            && self.source.top_up(vcpu).map_err(|error| {
                self.rearm_failed(error);
                HarvestError::Failed
            })?;
        if topped_up {
            stats::add(&self.counters.grants, 1);
            return Ok(RingExit::Resume);
        }
        self.bell.ring();
        Ok(RingExit::DirtyLogFull)
    }

    /// Makes the next harvest return every page of the VM: full synchronisation.
    pub fn all_dirty(&self) {
        self.all.store(true, Ordering::Release);
    }

    // --- the end of an epoch
    // ----------------------------------------------------------------------------------

    /// Begins to end the epoch: every vCPU is out of KVM_RUN, and no device writes guest memory.
    ///
    /// Waits for a call of another thread that excludes epochs: [`Tracker::age`] and [`Tracker::add_vcpu`]
    /// (microseconds), [`Tracker::remove_slot`], and [`Tracker::add_slot`], [`Tracker::enable`] and
    /// [`Tracker::disable`] (milliseconds a GiB). [`Tracker::try_stopped`] does not wait.
    ///
    /// # Panics
    /// If an epoch is open already: there is one at a time.
    pub fn stopped(&self) -> Epoch<'_, Stopped> {
        loop {
            let token = cycle::soon(|| match Token::take_for(self, EPOCH) {
                Err(EPOCH) => panic!("one epoch at a time"),
                taken => taken.ok(),
            });
            if let Some(token) = token {
                return Epoch::begin(token);
            }
            // Not a yield: the other thread may have a lower priority than this one.
            std::thread::sleep(Duration::from_micros(20));
        }
    }

    /// As [`Tracker::stopped`], but None if an epoch is open, or if another thread enables or disables
    /// tracking, adds or removes a slot, adds a vCPU or lets hot pages [age](Tracker::age) at this moment.
    pub fn try_stopped(&self) -> Option<Epoch<'_, Stopped>> {
        Token::take_for(self, EPOCH).ok().map(Epoch::begin)
    }

    /// Excludes epochs, as the calls do that change the VM.
    #[cfg(test)]
    pub(crate) fn own_token(&self) -> Option<Token<'_>> {
        Token::take(self)
    }

    /// The `index`-th of `of` nearly equal parts of the pages, for threads that copy together.
    ///
    /// None unless the epoch is between `rearm` and `copied`: start the threads after `rearm` and wait for
    /// them before `copied`. `copied` waits for parts that are still held, and spins: never call it in a
    /// thread that holds one.
    pub fn part(&self, index: usize, of: usize) -> Option<Part<'_>> {
        (index < of && self.gate.read()).then(|| {
            let len = self.flat.len();
            Part { tracker: self, range: len * index / of..len * (index + 1) / of }
        })
    }

    pub(crate) fn part_done(&self) {
        self.gate.read_done();
    }

    /// Fails forever once pages were lost.
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

    /// A re-arm failed, and nobody knows what is armed: tracking is over. A caller that cannot pass the error
    /// on reports [`HarvestError::Failed`], so it is logged here.
    fn rearm_failed(&self, error: RearmError) -> RearmError {
        self.failed.store(WRONG_RESET, Ordering::Release);
        report::error(format_args!("dirty tracking has failed for good: {}", report::Chain(&error)));
        error
    }
}

/// The rule for hot pages, or why there is none.
fn rule(config: &TrackerConfig, backend: &DirtyBackend, layout: &MemoryLayout) -> Option<HotRule> {
    // Pages that are trapped first, or again, still have an eighth of an epoch.
    let trigger = config.trigger - config.trigger / 8;
    let most = backend.most_hot_pages().min(trigger).min(layout.pages() as usize);
    let rule = match config.hot {
        HotPages::Off => return None,
        _ if backend.most_hot_pages() == 0 => {
            report::info(format_args!("no hot pages: the {} arms every page it reports", backend.kind()));
            return None;
        }
        HotPages::Rule(rule) => rule,
        HotPages::Auto => match backend.hot_rule(config.max_dirty_pages) {
            Ok(rule) => rule,
            Err(why) => {
                report::info(format_args!("no hot pages: {why}"));
                return None;
            }
        },
    };
    let rule = HotRule { max_pages: rule.max_pages.min(most), ..rule };
    (rule.max_gap > 0 && rule.max_pages > 0).then_some(rule)
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

/// Nobody holds the token.
const FREE: u8 = 0;
/// An epoch holds it.
const EPOCH: u8 = 1;
/// A call holds it that changes what epochs work on, and that ends by itself.
const CHANGE: u8 = 2;

/// The right to end the epoch, to enable and disable, to change slots and vCPUs, or to let hot pages age;
/// there is only one.
pub(crate) struct Token<'t> {
    pub(crate) tracker: &'t Tracker,
}

impl<'t> Token<'t> {
    /// For a call that ends by itself.
    fn take(tracker: &'t Tracker) -> Option<Token<'t>> {
        Token::take_for(tracker, CHANGE).ok()
    }

    /// Err says who holds it.
    fn take_for(tracker: &'t Tracker, holder: u8) -> Result<Token<'t>, u8> {
        let taken = tracker.token.compare_exchange(FREE, holder, Ordering::Acquire, Ordering::Relaxed);
        taken.map(|_| Token { tracker })
    }
}

impl Drop for Token<'_> {
    fn drop(&mut self) {
        self.tracker.token.store(FREE, Ordering::Release);
    }
}
