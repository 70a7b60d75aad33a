//! A VM and its tracker: one epoch, with the time of each step.
// UNSAFETY: tells the tracker what memory the slot of the VM is.
#![allow(unsafe_code)]

use std::time::Instant;

use kvm_ioctls::Kvm;
use outlive_dirty::{
    BackendChoice, DirtyBackend, Gfn, GlobalLog, HotPages, HotRule, MemoryLayout, MemorySlot, PAGE_SIZE,
    Tracker, TrackerConfig,
};

use crate::bare::{self, Bare};
use crate::guest::{Memory, Vm, borrow};
use crate::peer::Peer;
use crate::workload::{Job, Workload};

/// More than any epoch here has, hot pages and all.
pub(crate) const MAX_DIRTY: usize = 8192;

/// The part that finds the dirty pages of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Method {
    /// KVM_GET_DIRTY_LOG and a plain search, without the library.
    Peer,
    /// The ring without the library.
    Floor,
    FloorHot,
    Bitmap,
    ClearLog,
    Ring,
    /// These leave hot pages writable.
    ClearLogHot,
    RingHot,
}

impl Method {
    /// The name of its back end in tables and JSON lines.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Method::Peer | Method::Bitmap => "bitmap",
            Method::Floor | Method::FloorHot => "bare-ring",
            Method::ClearLog | Method::ClearLogHot => "clear-log",
            Method::Ring | Method::RingHot => "ring",
        }
    }

    pub(crate) fn is_hot(self) -> bool {
        matches!(self, Method::ClearLogHot | Method::RingHot | Method::FloorHot)
    }

    /// The library's configuration; None for parts that do without it.
    pub(crate) fn choice(self) -> Option<BackendChoice> {
        match self {
            Method::Peer | Method::Floor | Method::FloorHot => None,
            Method::Bitmap => Some(BackendChoice::Bitmap),
            Method::ClearLog | Method::ClearLogHot => Some(BackendChoice::ClearLog),
            Method::Ring | Method::RingHot => Some(BackendChoice::Ring),
        }
    }
}

/// The kernel's side of the measurement.
pub(crate) struct Host {
    pub(crate) kvm: Kvm,
    /// The rule for hot pages; None if this kernel cannot leave pages out of a re-arm.
    pub(crate) rule: Option<HotRule>,
}

impl Host {
    pub(crate) fn new(kvm: Kvm) -> Host {
        let rule = self_test(&kvm).unwrap_or_else(|why| {
            println!("no hot pages: {why}");
            None
        });
        Host { kvm, rule }
    }

    /// Whether a VM can have that back end here.
    pub(crate) fn has(&self, method: Method) -> bool {
        let Some(choice) = method.choice() else { return true };
        if method.is_hot() && self.rule.is_none() {
            return false;
        }
        let vm = self.kvm.create_vm().expect("a VM");
        DirtyBackend::probe(borrow(&self.kvm), borrow(&vm), choice, 1).is_ok()
    }
}

/// The rule that `HotPages::Auto` makes, once for all VMs of the bench, because it is measured and differs a
/// little each time.
fn self_test(kvm: &Kvm) -> Result<Option<HotRule>, String> {
    let vm = kvm.create_vm().map_err(|error| error.to_string())?;
    let backend = DirtyBackend::probe(borrow(kvm), borrow(&vm), BackendChoice::Auto, 1)
        .map_err(|error| error.to_string())?;
    let backend = backend.with_self_test(borrow(kvm));
    let test = backend.self_test().ok_or("the self-test could not be run")?;
    test.selective.clone()?;
    let rule = HotRule::for_costs(test.fault_ns, test.copy_ns, TrackerConfig::default().max_dirty_pages);
    println!("{test}\n{rule:?}");
    Ok(Some(rule))
}

/// Microseconds of the steps of an epoch, and how many pages it had.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Epoch {
    /// The guest's run.
    pub(crate) run: f64,
    /// Reading the state of the vCPU.
    pub(crate) state: f64,
    /// Taking the pages: for the peer KVM_GET_DIRTY_LOG, which re-arms them too.
    pub(crate) harvest: f64,
    /// Re-arming them: for the peer, the search of the bitmap.
    pub(crate) rearm: f64,
    /// Copying them.
    pub(crate) copy: f64,
    /// Forgetting them: the next epoch begins.
    pub(crate) begin: f64,
    /// Pages reported.
    pub(crate) pages: usize,
    /// Those of them whose write was trapped.
    pub(crate) trapped: usize,
}

impl Epoch {
    /// The whole cost of tracking in the pause.
    pub(crate) fn tracking(&self) -> f64 {
        self.harvest + self.rearm + self.begin
    }

    pub(crate) fn all(&self) -> f64 {
        self.run + self.state + self.copy + self.tracking()
    }
}

/// A stop-watch with laps.
struct Clock(Instant);

impl Clock {
    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        (now - std::mem::replace(&mut self.0, now)).as_nanos() as f64 / 1e3
    }
}

/// The destination of copies; warm, as in a VMM that does this hundreds of times a second.
///
/// A mapping, so that its pages are page-aligned: 16 bytes further, where the allocator puts large blocks,
/// some AMD processors copy ten times slower.
pub(crate) struct Staging(Memory);

impl Staging {
    pub(crate) fn new() -> Staging {
        let memory = Memory::reserve(MAX_DIRTY as u64 * PAGE_SIZE).expect("memory for the copies");
        (0..MAX_DIRTY as u64).for_each(|page| memory.write(page * PAGE_SIZE, &[1]));
        Staging(memory)
    }

    fn copy(&mut self, vm: &Vm, pages: &[Gfn]) {
        for (place, &gfn) in pages.iter().enumerate() {
            vm.memory.copy_page(gfn, &self.0, Gfn(place as u64));
        }
    }
}

/// The tracker goes before the VM.
enum Finder {
    Peer(Peer),
    Floor(Bare),
    Library(Box<Tracker>),
}

pub(crate) struct Machine {
    finder: Option<Finder>,
    pub(crate) vm: Vm,
    method: Method,
    backend: Option<DirtyBackend>,
    hot: HotPages,
    stamp: u64,
}

impl Machine {
    /// A VM whose dirty pages nobody tracks yet.
    pub(crate) fn new(host: &Host, gib: u64, vcpus: u64, method: Method) -> Machine {
        let Host { kvm, rule } = host;
        let mut backend = None;
        let vm = Vm::new(kvm, gib, vcpus, |vm| {
            if matches!(method, Method::Floor | Method::FloorHot) {
                bare::enable(vm);
            }
            backend = method.choice().map(|choice| {
                DirtyBackend::probe(borrow(kvm), borrow(vm), choice, vcpus as usize).expect("the back end")
            });
        });
        let vm = vm.unwrap_or_else(|error| panic!("a VM of {gib} GiB: {error}"));
        let hot = rule.filter(|_| method.is_hot()).map_or(HotPages::Off, HotPages::Rule);
        Machine { finder: None, vm, method, backend, hot, stamp: 0 }
    }

    pub(crate) fn method(&self) -> Method {
        self.method
    }

    /// Makes the guest write every page that the workload will ever write, so that memory and page tables
    /// exist. Call it before `enable`.
    pub(crate) fn touch(&mut self, workload: &Workload) {
        for epoch in 0..workload.lap() {
            let job = workload.job(epoch);
            self.stamp += 1;
            self.vm.set_job(
                0,
                self.stamp,
                &Job { hot: if epoch == 0 { job.hot } else { Default::default() }, ..job },
            );
            self.vm.vcpus[0].run();
        }
    }

    pub(crate) fn enable(&mut self) {
        self.finder = Some(match self.backend.take() {
            None => {
                self.vm.set_logging(true).expect("dirty log");
                if self.method == Method::Peer {
                    Finder::Peer(Peer::new(self.vm.pages(), MAX_DIRTY))
                } else {
                    let mut bare = Bare::new(&self.vm.vcpus[0], MAX_DIRTY);
                    // Earlier writes do not matter.
                    bare.harvest(|_| false);
                    bare.reset(&self.vm.fd);
                    Finder::Floor(bare)
                }
            }
            Some(backend) => {
                let tracker = self.new_tracker(backend);
                tracker.enable().expect("dirty tracking");
                Finder::Library(Box::new(tracker))
            }
        });
    }

    fn new_tracker(&self, backend: DirtyBackend) -> Tracker {
        let slot =
            MemorySlot { id: 0, base: Gfn(0), pages: self.vm.pages(), host_addr: self.vm.memory.host_addr() };
        let layout = MemoryLayout::new(vec![slot]).expect("one slot");
        let global = GlobalLog::new(layout.gfn_space(), 64);
        let vcpus: Vec<_> = self.vm.vcpus.iter().map(|vcpu| borrow(&vcpu.fd)).collect();
        let config = TrackerConfig::default().with_hot(self.hot);
        // SAFETY: the slot is as it was made, of memory that lives as long as the VM.
        unsafe { Tracker::new(layout, config, backend, global, borrow(&self.vm.fd), &vcpus) }
            .expect("a tracker")
    }

    pub(crate) fn tracker(&self) -> &Tracker {
        match &self.finder {
            Some(Finder::Library(tracker)) => tracker,
            _ => panic!("a VM without a tracker"),
        }
    }

    /// Tells every vCPU to write its part, and runs it.
    pub(crate) fn run_vcpus(&mut self, jobs: &[Job]) {
        self.stamp += 1;
        for (vcpu, job) in jobs.iter().enumerate() {
            self.vm.set_job(vcpu, self.stamp, job);
            self.vm.vcpus[vcpu].run();
        }
    }

    /// An epoch of the first vCPU. With `staging` it is a whole one: state is read and pages are copied. With
    /// `check` it verifies, between the steps, that every written page was reported.
    pub(crate) fn epoch(&mut self, job: &Job, mut staging: Option<&mut Staging>, check: bool) -> Epoch {
        let Machine { finder, vm, stamp, method, .. } = self;
        *stamp += 1;
        vm.set_job(0, *stamp, job);
        let mut epoch = Epoch::default();
        let mut clock = Clock(Instant::now());
        vm.vcpus[0].run();
        epoch.run = clock.lap();
        if staging.is_some() {
            vm.vcpus[0].read_state();
            epoch.state = clock.lap();
        }
        match finder.as_mut().expect("an enabled machine") {
            Finder::Peer(peer) => {
                peer.get(&vm.fd);
                epoch.harvest = clock.lap();
                peer.scan();
                epoch.rearm = clock.lap();
                if let Some(staging) = &mut staging {
                    staging.copy(vm, peer.pages());
                    epoch.copy = clock.lap();
                }
                epoch.pages = peer.pages().len();
                epoch.trapped = epoch.pages;
                if check {
                    check_pages(vm, *stamp, job, peer.pages(), *method);
                }
            }
            Finder::Floor(bare) => {
                let hot = method.is_hot();
                bare.harvest(|gfn| hot && job.hot.contains(gfn));
                epoch.harvest = clock.lap();
                bare.reset(&vm.fd);
                epoch.rearm = clock.lap();
                if let Some(staging) = &mut staging {
                    staging.copy(vm, bare.pages());
                    epoch.copy = clock.lap();
                }
                epoch.pages = bare.pages().len();
                epoch.trapped = bare.trapped();
                if check {
                    check_pages(vm, *stamp, job, bare.pages(), *method);
                }
            }
            Finder::Library(tracker) => {
                let harvested = tracker.stopped().state_saved().harvest().expect("harvest");
                epoch.harvest = clock.lap();
                let rearmed = harvested.rearm().expect("rearm");
                epoch.rearm = clock.lap();
                if let Some(staging) = &mut staging {
                    staging.copy(vm, rearmed.pages());
                    epoch.copy = clock.lap();
                }
                epoch.pages = rearmed.pages().len();
                epoch.trapped = rearmed.written().len();
                if check {
                    check_pages(vm, *stamp, job, rearmed.pages(), *method);
                }
                clock.lap();
                rearmed.copied().run();
                epoch.begin = clock.lap();
            }
        }
        assert!(
            epoch.pages as u64 >= job.count(),
            "{method:?} reported {} of {} pages",
            epoch.pages,
            job.count()
        );
        epoch
    }
}

fn check_pages(vm: &Vm, stamp: u64, job: &Job, reported: &[Gfn], method: Method) {
    let mut sorted = reported.to_vec();
    sorted.sort_unstable();
    for gfn in job.pages() {
        assert_eq!(vm.memory.stamp(gfn), stamp, "the guest did not write page {gfn}");
        assert!(sorted.binary_search(&gfn).is_ok(), "{method:?} missed page {gfn}");
    }
    let before = sorted.len();
    sorted.dedup();
    assert_eq!(sorted.len(), before, "{method:?} reported a page twice");
}
