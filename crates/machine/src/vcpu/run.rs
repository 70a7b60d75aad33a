//! The life of one vCPU thread.

// UNSAFETY: `immediate_exit` of the shared kvm_run page is written by the controller's thread.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kvm_bindings::{KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, kvm_mp_state};
use kvm_ioctls::{SyncReg, VcpuExit, VcpuFd};
use outlive_dirty::{HarvestError, RingExit};

use super::idle::{Idle, IdleState};
use super::platform::{AfterPort, GuestKind};
use super::port_io;
use super::rendezvous::{Command, Order};
use super::set::Shared;
use super::state::{Item, Saver, VcpuStateError};
use super::times::Marks;
use crate::event::{MachineEvent, PowerRequest, ResetWay};
use crate::thread;

/// KVM_EXIT_DIRTY_RING_FULL, which kvm-ioctls does not name (include/uapi/linux/kvm.h).
const EXIT_DIRTY_RING_FULL: u32 = 31;

/// Why a vCPU could not be captured.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// Its state could not be read.
    #[error("vCPU {vcpu}: {source}")]
    State {
        /// Which vCPU.
        vcpu: u8,
        /// Why.
        source: VcpuStateError,
    },
    /// Its dirty pages could not be harvested.
    #[error("vCPU {vcpu}: {source}")]
    Harvest {
        /// Which vCPU.
        vcpu: u8,
        /// Why.
        source: HarvestError,
    },
    /// This host cannot run the vCPU any more ([`MachineEvent::HostFault`]); what KVM says of its registers
    /// may belong to an earlier moment.
    #[error("vCPU {vcpu}: {why}")]
    HostFault {
        /// Which vCPU.
        vcpu: u8,
        /// What KVM said.
        why: String,
    },
}

/// The `immediate_exit` byte of a vCPU's kvm_run page.
#[derive(Clone, Copy)]
pub(super) struct ImmediateExit(*const AtomicU8);

// SAFETY: the byte is in the kvm_run mapping, which the `VcpuFd` in the vCPU's thread keeps mapped until the
// thread has ended; `VcpuSet` uses it only before it joins the thread. Access is atomic.
unsafe impl Send for ImmediateExit {}
// SAFETY: as above.
unsafe impl Sync for ImmediateExit {}

impl ImmediateExit {
    fn of(fd: &mut VcpuFd) -> Self {
        Self(std::ptr::from_mut(&mut fd.get_kvm_run().immediate_exit).cast::<AtomicU8>())
    }

    pub(super) fn set(self, value: u8) {
        // SAFETY: see the Send impl. KVM reads the byte with READ_ONCE.
        unsafe { &*self.0 }.store(value, Ordering::SeqCst);
    }
}

/// Work on a vCPU's own thread, outside the checkpoint cycle.
pub(super) type Task = Box<dyn FnOnce(&VcpuFd) -> Result<(), VcpuStateError> + Send>;

/// What the controller shares with one vCPU's thread.
pub(super) struct VcpuSlot {
    pub(super) saved: Mutex<Vec<u8>>,
    pub(super) task: Mutex<Option<Task>>,
    pub(super) error: Mutex<Option<VcpuError>>,
    pub(super) immediate_exit: ImmediateExit,
    pub(super) marks: Marks,
    /// The guest ended itself or crashed; the vCPU is not entered again until the guest restarts.
    pub(super) ended: AtomicBool,
    /// Why this host cannot run the vCPU any more. It is permanent: a restart of the guest does not repair
    /// the host.
    pub(super) fault: Mutex<Option<String>>,
}

/// A vCPU in its thread.
pub(super) struct Vcpu {
    index: u8,
    fd: VcpuFd,
    saver: Saver,
    slot: Arc<VcpuSlot>,
    shared: Arc<Shared>,
    idle: Arc<IdleState>,
    /// Set while the guest has asked to idle: until when, if there is a limit.
    idling: Option<Option<Instant>>,
    /// When the vCPU left the guest for a capture, until it goes back.
    left: Option<Instant>,
    last: LastRun,
}

impl Vcpu {
    /// Prepares the vCPU; the slot is the controller's half.
    pub(super) fn new(index: u8, mut fd: VcpuFd, saver: Saver, shared: Arc<Shared>) -> (Self, Arc<VcpuSlot>) {
        for reg in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
            fd.set_sync_valid_reg(reg);
        }
        let slot = Arc::new(VcpuSlot {
            saved: Mutex::new(Vec::with_capacity(saver.capacity())),
            task: Mutex::new(None),
            error: Mutex::new(None),
            immediate_exit: ImmediateExit::of(&mut fd),
            marks: Marks::default(),
            ended: AtomicBool::new(false),
            fault: Mutex::new(None),
        });
        let idle = shared.platform.idle(usize::from(index)).clone();
        let vcpu = Self {
            index,
            fd,
            saver,
            slot: slot.clone(),
            shared,
            idle,
            idling: None,
            left: None,
            last: LastRun::Completed,
        };
        (vcpu, slot)
    }

    /// Serves orders until [`Command::Quit`].
    pub(super) fn serve(mut self) {
        thread::take_kicks();
        thread::precise_timers();
        let shared = self.shared.clone();
        let mut order = Order::FIRST;
        loop {
            order = shared.meeting.next(order);
            match order.command() {
                Command::Stay => {}
                Command::Run => {
                    if let Some(left) = self.left.take() {
                        self.slot.marks.back(shared.timeline, left);
                    }
                    self.run_guest(order);
                    continue;
                }
                Command::Stop => {
                    self.complete_io();
                    self.last = LastRun::Completed;
                }
                Command::Capture => {
                    self.capture();
                    if shared.meeting.arrive() {
                        order = shared.lent.take(&shared.meeting, order);
                    }
                    continue;
                }
                Command::Copy => shared.copy.work(&shared.ram),
                Command::Task => self.do_task(),
                Command::Quit => {
                    // The kvm_run mapping goes with `self`, so the controller must not touch
                    // `immediate_exit` after this arrival; it only joins.
                    shared.meeting.arrive();
                    return;
                }
            }
            shared.meeting.arrive();
        }
    }

    fn run_guest(&mut self, order: Order) {
        let shared = self.shared.clone();
        while shared.meeting.current() == order {
            if self.slot.ended.load(Ordering::Acquire) {
                shared.meeting.next(order);
                return;
            }
            if let Some(deadline) = self.idling {
                match self.idle.wait(deadline) {
                    Idle::Over => self.idling = None,
                    Idle::Interrupted => continue,
                }
            }
            if self.enter() == Entered::LogFull {
                // The tracker notes an overrun; the next harvest reports it.
                let exit = shared.tracker.get().map(|tracker| tracker.ring_full(usize::from(self.index)));
                if let Some(Ok(RingExit::Resume)) = exit {
                    continue;
                }
                (shared.events)(MachineEvent::DirtyLogFull);
                shared.meeting.next(order);
                return;
            }
        }
    }

    /// One `KVM_RUN` and what its exit requires.
    fn enter(&mut self) -> Entered {
        let Self { fd, shared, last, .. } = self;
        *last = LastRun::Open;
        let end = match fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => {
                let after = shared.platform.write(port, data);
                if after == AfterPort::NotOurs {
                    shared.pio.write(u64::from(port), data);
                }
                return self.after_port(after);
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                let data = std::ptr::from_mut(data);
                // SAFETY: this run has just returned it.
                for element in unsafe { port_io::elements(fd, data) } {
                    if !shared.platform.read(port, element) {
                        shared.pio.read(u64::from(port), element);
                    }
                }
                return Entered::Again;
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                shared.mmio.read(address, data);
                return Entered::Again;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                shared.mmio.write(address, data);
                return Entered::Again;
            }
            Ok(VcpuExit::Unsupported(EXIT_DIRTY_RING_FULL)) => return Entered::LogFull,
            Ok(VcpuExit::Intr | VcpuExit::Hlt | VcpuExit::IrqWindowOpen) => return Entered::Again,
            Ok(VcpuExit::Shutdown) if shared.platform.guest() == GuestKind::Linux => {
                let request = PowerRequest::Reset(ResetWay::TripleFault);
                return self.after_port(AfterPort::Power(request));
            }
            Ok(VcpuExit::Shutdown) => End::Guest("triple fault (KVM_EXIT_SHUTDOWN)".to_owned()),
            // No guest causes any of the following: it is the processor, KVM or the memory of this host.
            Ok(VcpuExit::FailEntry(reason, cpu)) => End::Host(format!(
                "the processor does not enter the guest (KVM_EXIT_FAIL_ENTRY, reason {reason:#x}, processor {cpu})"
            )),
            Ok(VcpuExit::InternalError) => {
                // SAFETY: the exit says which member of the union KVM has filled.
                let suberror = unsafe { fd.get_kvm_run().__bindgen_anon_1.internal }.suberror;
                End::Host(internal_error(suberror))
            }
            Ok(other) => End::Host(format!("KVM came back with {other:?}")),
            Err(error) => match error.errno() {
                libc::EINTR => {
                    // KVM completes an access before it checks for signals (`kvm_arch_vcpu_ioctl_run`).
                    *last = LastRun::Kicked;
                    return Entered::Interrupted;
                }
                libc::EAGAIN => return Entered::Again,
                _ => End::Host(format!("KVM_RUN: {error}")),
            },
        };
        self.end(end);
        Entered::Interrupted
    }

    /// Marks the vCPU as ended: it is not entered again.
    fn end(&mut self, end: End) {
        let vcpu = self.index;
        if let End::Host(why) = &end {
            *lock(&self.slot.fault) = Some(why.clone());
        }
        self.slot.ended.store(true, Ordering::Release);
        if self.shared.platform.first_end() {
            (self.shared.events)(match end {
                End::Guest(why) => MachineEvent::Crashed { vcpu, why },
                End::Host(why) => MachineEvent::HostFault { vcpu, why },
            });
        }
    }

    fn after_port(&mut self, after: AfterPort) -> Entered {
        match after {
            AfterPort::Idle(deadline) => self.idling = Some(deadline),
            AfterPort::Power(request) => {
                self.slot.ended.store(true, Ordering::Release);
                if self.shared.platform.first_end() {
                    self.shared.platform.ask(Some(request));
                    (self.shared.events)(MachineEvent::Power(request));
                }
            }
            AfterPort::Panicked => {
                if self.shared.platform.first_panic() {
                    (self.shared.events)(MachineEvent::GuestPanicked);
                }
            }
            AfterPort::Continue | AfterPort::NotOurs => {}
        }
        Entered::Again
    }

    /// Rule 3 of the module: enters with `immediate_exit` set until KVM says EINTR. An access that is split
    /// into parts comes back with the next part, which is served like any other. That last exit fills
    /// SYNC_REGS.
    fn complete_io(&mut self) {
        self.slot.immediate_exit.set(1);
        // KVM completes at most one access of 8 fragments. The bound guards against a kernel that ignores
        // immediate_exit, which would otherwise hang the stop.
        for _ in 0..1024 {
            match self.enter() {
                Entered::Interrupted => return,
                Entered::LogFull | Entered::Again => {}
            }
        }
        self.end(End::Host("KVM_RUN does not honour immediate_exit".to_owned()));
    }

    fn do_task(&mut self) {
        let Some(task) = lock(&self.slot.task).take() else { return };
        self.last = LastRun::Completed;
        if let Err(source) = task(&self.fd) {
            *lock(&self.slot.error) = Some(VcpuError::State { vcpu: self.index, source });
        }
    }

    /// No vCPU's state is read before all vCPUs are out of the guest. Otherwise a vCPU that still runs could
    /// send an interrupt to one whose local APIC has been read already, and the checkpoint would say that it
    /// was sent and not that it arrived. Whatever the completion of an access here causes counts as running.
    fn capture(&mut self) {
        self.left.get_or_insert_with(Instant::now);
        let alone = self.shared.meeting.is_of_one();
        // Each vCPU ioctl costs about 2 to 6 us of the pause. A vCPU that was kicked out has shown its
        // registers, and if there are no other vCPUs none of its registers can change any more. But an INIT
        // may have come, from the vCPU itself.
        let shown = alone && self.last == LastRun::Kicked && self.fd.sync_regs().events.smi.latched_init == 0;
        if !alone {
            if self.last == LastRun::Open {
                self.complete_io();
            }
            self.shared.meeting.meet();
        }
        let mp_state = self.fd.get_mp_state();
        if !shown {
            // After that, because it may change registers, and exactly once: it completes the current access
            // and shows the final registers.
            self.complete_io();
        }
        self.last = LastRun::Completed;
        self.slot.marks.stopped(self.shared.timeline);
        if let Err(error) = self.try_capture(mp_state) {
            *lock(&self.slot.error) = Some(error);
        }
    }

    fn try_capture(&mut self, mp_state: Result<kvm_mp_state, kvm_ioctls::Error>) -> Result<(), VcpuError> {
        let vcpu = self.index;
        if let Some(why) = lock(&self.slot.fault).clone() {
            return Err(VcpuError::HostFault { vcpu, why });
        }
        let failed = |source| VcpuError::State { vcpu, source };
        let mp_state =
            mp_state.map_err(|source| failed(VcpuStateError::Ioctl { item: Item::MpState, source }))?;
        let mut saved = lock(&self.slot.saved);
        self.saver.save(&mut self.fd, &mp_state, &mut saved).map_err(failed)?;
        self.slot.marks.saved(self.shared.timeline);
        if let Some(tracker) = self.shared.tracker.get() {
            // Rule 4 of the module: after the state.
            tracker.harvest_vcpu(usize::from(vcpu)).map_err(|source| VcpuError::Harvest { vcpu, source })?;
        }
        self.slot.marks.harvested(self.shared.timeline);
        Ok(())
    }
}

/// How the last `KVM_RUN` ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum LastRun {
    /// With an access, or what may be one: something may have to be completed.
    Open,
    /// By a kick, with current registers.
    Kicked,
    /// For a stop that is over. The vCPU has not shown what has happened to it since.
    Completed,
}

/// Why a vCPU is not entered again.
enum End {
    /// The guest broke.
    Guest(String),
    /// The host did.
    Host(String),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Entered {
    /// Served; enter again.
    Again,
    /// A kick, or the vCPU has ended.
    Interrupted,
    /// KVM's dirty ring is full.
    LogFull,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// KVM does not go on with the guest, for a reason that it numbers (`KVM_INTERNAL_ERROR_...` in linux/kvm.h).
fn internal_error(suberror: u32) -> String {
    let remedy = match suberror {
        KVM_INTERNAL_ERROR_EMULATION => {
            "it cannot emulate an instruction of the guest: use a newer host kernel, or a processor with EPT or nested \
             paging, where hardly anything is emulated; the host's kernel log may name the instruction"
        }
        KVM_INTERNAL_ERROR_DELIVERY_EV => {
            "an interrupt met a fault that it cannot handle: use a newer host kernel, and look into the host's kernel log"
        }
        _ => "look into the host's kernel log, and use a newer host kernel",
    };
    format!("KVM cannot go on (KVM_EXIT_INTERNAL_ERROR, suberror {suberror}): {remedy}")
}
