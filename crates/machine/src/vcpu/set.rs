//! All vCPUs of a VM, as the controller sees them.

use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Instant;

use kvm_ioctls::VcpuFd;
use outlive_dirty::{Gfn, Tracker};
use vmm_sys_util::signal::Killable;

use super::copying::CopyJob;
use super::lent::{Lent, Who, Work};
use super::platform::Platform;
use super::rendezvous::{Command, Looks, Rendezvous};
use super::run::{Task, Vcpu, VcpuError, VcpuSlot, lock};
use super::state::Saver;
use super::times::{CaptureTimes, Return, Timeline};
use crate::bus::Bus;
use crate::event::{EventSink, MachineEvent, PowerRequest};
use crate::kvm::XsaveCall;
use crate::memory::Ram;
use crate::thread;

/// What all vCPU threads of one machine share.
pub(crate) struct Shared {
    pub(super) meeting: Rendezvous,
    pub(super) platform: Arc<Platform>,
    pub(super) pio: Arc<Bus>,
    pub(super) mmio: Arc<Bus>,
    pub(super) events: EventSink,
    pub(super) copy: CopyJob,
    pub(super) lent: Lent,
    pub(super) ram: Arc<Ram>,
    /// Set once, after the vCPUs are made, because the tracker maps their rings.
    pub(super) tracker: OnceLock<Arc<Tracker>>,
    pub(super) timeline: Timeline,
}

impl Shared {
    /// Controller: has the thread that arrives last do `work`, after [`VcpuSet::begin_capture`]; see
    /// [`Lent::lend`]. For the time of `work` the set is that thread's.
    ///
    /// # Errors
    /// How many vCPUs have not stopped in time. Nobody does `work` then, and nothing else may be ordered of the
    /// set.
    pub(crate) fn lend(
        &self,
        work: &mut Work<'_>,
        deadline: Option<Instant>,
        late: impl FnMut() -> Option<Instant>,
    ) -> Result<(), u32> {
        self.lent.lend(&self.meeting, work, deadline, late, || self.copy.work(&self.ram))
    }
}

/// The parts that the vCPU threads work on.
pub(crate) struct Parts {
    pub(crate) platform: Arc<Platform>,
    pub(crate) pio: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) events: EventSink,
    pub(crate) ram: Arc<Ram>,
}

/// The vCPU threads of one machine. They end when this is dropped.
pub(crate) struct VcpuSet {
    shared: Arc<Shared>,
    slots: Vec<Arc<VcpuSlot>>,
    threads: Vec<JoinHandle<()>>,
    running: bool,
}

/// How long the waits of this many vCPUs and of their controller watch before they sleep. A wake-up costs about
/// 5 to 50 us each time, and on a busy host a thread that sleeps may get its core back only after milliseconds. But
/// a thread that waits must not keep a core from others that need it.
fn looks(vcpus: usize) -> Looks {
    /// About 20 us, at 50 ns a look.
    const SHORT: u32 = 400;
    /// 75 us: the rest of the pause of a small checkpoint.
    const LONG: u32 = 1500;
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    // Each vCPU has just used one, and the thread that it waits for has one. In a meeting the other one may have
    // none: then a thread that sleeps gives it its own.
    let within = if cores >= vcpus { LONG } else { 0 };
    // One for each vCPU, one for the controller, one for the link.
    let other = if cores >= vcpus + 2 { SHORT } else { 0 };
    Looks { meeting: other, within, other }
}

impl VcpuSet {
    /// Starts a thread for each vCPU; all wait outside the guest.
    ///
    /// # Errors
    /// The operating system's error when a thread cannot be started.
    pub(crate) fn spawn(
        fds: Vec<VcpuFd>,
        msrs: &[u32],
        xsave: XsaveCall,
        parts: Parts,
    ) -> std::io::Result<Self> {
        thread::install_kick();
        let shared = Arc::new(Shared {
            meeting: Rendezvous::new(fds.len() as u32, looks(fds.len())),
            platform: parts.platform,
            pio: parts.pio,
            mmio: parts.mmio,
            events: parts.events,
            copy: CopyJob::default(),
            lent: Lent::default(),
            ram: parts.ram,
            tracker: OnceLock::new(),
            timeline: Timeline::start(),
        });
        let mut set = Self { shared, slots: Vec::new(), threads: Vec::new(), running: false };
        let mut vcpus = Vec::new();
        for (index, fd) in fds.into_iter().enumerate() {
            let saver = Saver::new(msrs, xsave);
            let (vcpu, slot) = Vcpu::new(index as u8, fd, saver, set.shared.clone());
            set.slots.push(slot);
            vcpus.push(vcpu);
        }
        for (index, vcpu) in vcpus.into_iter().enumerate() {
            set.threads.push(thread::spawn(format!("vcpu{index}"), move || vcpu.serve())?);
        }
        Ok(set)
    }

    /// From now on a capture harvests the dirty pages too.
    pub(crate) fn set_tracker(&self, tracker: Arc<Tracker>) {
        if self.shared.tracker.set(tracker).is_err() {
            tracing::error!("the tracker of a machine is set once");
        }
    }

    /// Lets the guest run.
    pub(crate) fn run(&mut self) {
        // Rule 2 of the module: every thread is parked, so nothing else writes immediate_exit.
        for (index, slot) in self.slots.iter().enumerate() {
            slot.immediate_exit.set(0);
            self.shared.platform.idle(index).resume();
        }
        self.shared.meeting.publish(Command::Run);
        self.running = true;
    }

    /// Takes all vCPUs out of the guest, with every I/O completed, and waits until they are out.
    pub(crate) fn stop(&mut self) {
        self.order(Command::Stop);
        self.shared.meeting.wait_all();
    }

    /// Begins a stop with capture; other work can be done until [`captured`](Self::captured).
    pub(crate) fn begin_capture(&mut self) {
        self.order(Command::Capture);
    }

    /// Waits until every vCPU has stopped, saved its state and harvested its ring.
    ///
    /// # Errors
    /// The first error of a vCPU. All have stopped nevertheless.
    pub(crate) fn captured(&self) -> Result<(), VcpuError> {
        self.shared.meeting.wait_all();
        self.first_error()
    }

    /// When the vCPUs did their parts; valid after [`captured`](Self::captured).
    pub(crate) fn capture_times(&self) -> CaptureTimes {
        CaptureTimes::of(self.shared.timeline, self.slots.iter().map(|slot| &slot.marks))
    }

    /// How the guest resumed after the last capture; returned once.
    pub(crate) fn take_return(&self) -> Option<Return> {
        Return::take(self.shared.timeline, self.slots.iter().map(|slot| &slot.marks))
    }

    /// Waits for the same until `deadline`, but does not check for errors.
    ///
    /// # Errors
    /// How many have not stopped. Nothing else may be ordered of the set then.
    pub(crate) fn stopped_until(&self, deadline: Instant) -> Result<(), u32> {
        self.shared.meeting.wait_all_until(deadline)
    }

    /// Reads the saved state of vCPU `index`; valid after [`captured`](Self::captured).
    pub(crate) fn with_saved<T>(&self, index: usize, read: impl FnOnce(&[u8]) -> T) -> T {
        read(&lock(&self.slots[index].saved))
    }

    /// What the set shares with its threads.
    pub(crate) fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// Copies pages of the stopped VM, with several threads if `parallel`: the controller's, and those of the
    /// vCPUs. If there is one vCPU and its thread ends the pause, the controller comes to help as soon as it is
    /// awake.
    ///
    /// # Errors
    /// As [`CopyJob::run`].
    ///
    /// # Safety
    /// As [`CopyJob::run`].
    #[allow(unsafe_code)] // UNSAFETY: passes the caller's promise on.
    pub(crate) unsafe fn copy(&self, who: Who, gfns: &[Gfn], to: *mut u8, parallel: bool) -> Result<(), Gfn> {
        let shared = &self.shared;
        let helpers = parallel.then_some(|| {
            if who == Who::LastVcpu && self.len() == 1 {
                shared.meeting.call();
                shared.copy.work(&shared.ram);
                return shared.meeting.call_off();
            }
            shared.meeting.publish(Command::Copy);
            shared.copy.work(&shared.ram);
            if who == Who::LastVcpu {
                // It is one of those that are awaited.
                shared.meeting.arrive();
            }
            shared.meeting.wait_all();
        });
        // SAFETY: the caller's promise; `helpers` waits for all threads.
        unsafe { shared.copy.run(&shared.ram, gfns, to, helpers) }
    }

    /// Runs a task on every vCPU's thread. The VM must be stopped.
    ///
    /// # Errors
    /// The first error of a task.
    pub(crate) fn on_each(&mut self, task: impl Fn(usize) -> Task) -> Result<(), VcpuError> {
        for (index, slot) in self.slots.iter().enumerate() {
            *lock(&slot.task) = Some(task(index));
        }
        self.shared.meeting.publish(Command::Task);
        self.shared.meeting.wait_all();
        self.first_error()
    }

    /// The guest's request that has not been carried out yet: part of a checkpoint.
    pub(crate) fn asked(&self) -> Option<PowerRequest> {
        self.shared.platform.asked()
    }

    /// Takes over the request of the checkpoint's guest.
    pub(crate) fn set_asked(&self, request: Option<PowerRequest>) {
        self.shared.platform.ask(request);
    }

    /// Reports the guest's request again: whoever was told before is gone.
    pub(crate) fn tell_asked(&self) {
        if let Some(request) = self.asked() {
            (self.shared.events)(MachineEvent::Power(request));
        }
    }

    /// The guest restarts: vCPUs that it had ended run again, and none idles. The VM must be stopped.
    pub(crate) fn restart(&self) {
        self.shared.platform.restart();
        for (index, slot) in self.slots.iter().enumerate() {
            slot.ended.store(false, Ordering::Release);
            self.shared.platform.idle(index).wake();
        }
    }

    /// Forgets the faults of this host.
    pub(crate) fn forget_faults(&self) {
        self.slots.iter().for_each(|slot| drop(lock(&slot.fault).take()));
    }

    /// Number of vCPUs.
    pub(crate) fn len(&self) -> usize {
        self.slots.len()
    }

    fn first_error(&self) -> Result<(), VcpuError> {
        let mut first = Ok(());
        for slot in &self.slots {
            if let Some(error) = lock(&slot.error).take()
                && first.is_ok()
            {
                first = Err(error);
            }
        }
        first
    }

    /// Publishes a command and, if the guest runs, makes every vCPU leave it.
    fn order(&mut self, command: Command) {
        // Rule 1 of the module: immediate_exit, then the order, then the signal.
        if self.running {
            self.slots.iter().for_each(|slot| slot.immediate_exit.set(1));
        }
        self.shared.meeting.publish(command);
        if self.running {
            for (index, handle) in self.threads.iter().enumerate() {
                self.shared.platform.idle(index).interrupt();
                if let Err(error) = handle.kill(thread::kick()) {
                    tracing::error!(vcpu = index, %error, "a vCPU cannot be kicked");
                }
            }
            self.running = false;
        }
    }
}

impl Drop for VcpuSet {
    fn drop(&mut self) {
        self.order(Command::Quit);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a vCPU thread panicked");
            }
        }
    }
}
