//! A virtio device in a slot of the board: what all devices have in common.
//!
//! ```text
//!  vCPU ── registers ──► MmioTransport ──► Core: queues and the model's own ◄── batches ── thread
//!                                            ▲
//!  coordinator: save, restore, reset, go live
//! ```
//!
//! A device's special part is its [`Model`]: what the driver reads, what the device does with its queues, and
//! what of it is saved. Registers, queues, thread and the order of a saved state are here, once.
//!
//! # Locks
//!
//! Taken in this order: the transport's, the core's. The thread holds the core for a batch, inside the gate;
//! so does the coordinator, while the gate is closed, and a vCPU's thread when the driver starts or resets
//! the device.

use std::error::Error;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use outlive_epoch::image::limits::MAX_DEVICE_STATE;
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::chain::Broken;
use super::mmio::{MmioTransport, TransportRestoreError};
use super::persist::{DecodeError, DeviceState, SavedState, TransportState};
use super::ring::Queues;
use super::worker::{Wake, Work, Worker, event};
use super::{ActivateError, DeviceHost, Waker};
use crate::bus::SharedDevice;
use crate::devices::complaints::{Complaints, complain};
use crate::devices::gate::{DeviceGate, Pass};
use crate::devices::{Device, DeviceRestoreError};

/// Bytes of a configuration space; those that a device does not use are zero.
pub const CONFIG_BYTES: usize = 64;

/// What a driver reads first of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The virtio device ID.
    pub device_type: u32,
    /// The feature bits offered.
    pub features: u64,
    /// The largest size of each queue; at most [`MAX_QUEUES`](super::MAX_QUEUES) of them, each a power of
    /// two.
    pub queue_sizes: Vec<u16>,
}

/// What a device does in a batch.
#[derive(Debug)]
pub struct Batch<'a, M> {
    /// The queues; `None` while the driver is not ready, has broken the rules, or the machine runs elsewhere.
    pub queues: Option<&'a mut Queues<M>>,
    /// The pass through the gate; it says when the batch must end soon.
    pub pass: &'a Pass<'a>,
}

/// The result of a batch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Another batch must follow at once.
    pub more: bool,
    /// A polling guest has something to check.
    pub wake: bool,
}

/// What is special about a device.
///
/// All threads share the model itself; what it works on is in [`Core`](Self::Core), under the device's lock.
pub trait Model<M: GuestMemory>: Send + Sync + Sized + 'static {
    /// What the lock guards.
    type Core: Send;
    /// The saved part.
    type State: DeviceState;
    /// Why a state that can be read does not fit this device.
    type Refusal: Error + Send + Sync;

    /// Name of the device in messages.
    const NAME: &'static str;
    /// Name of its thread, at most 15 bytes.
    const THREAD: &'static str;

    /// What the driver reads first; called once.
    fn identity(&self) -> Identity;

    /// The number of the device among several, for messages.
    fn number(&self) -> Option<u16> {
        None
    }

    /// The configuration space.
    fn config(&self, _core: &Self::Core) -> [u8; CONFIG_BYTES] {
        [0; CONFIG_BYTES]
    }

    /// Writes to the configuration space.
    fn write_config(&self, _core: &mut Self::Core, _offset: u64, _data: &[u8]) {}

    /// The driver is ready with these queues.
    ///
    /// # Errors
    /// When one is missing that the device needs.
    fn activate(&self, core: &mut Self::Core, queues: &Queues<M>) -> Result<(), ActivateError>;

    /// The driver no longer has queues; its settings are forgotten.
    fn reset(&self, _core: &mut Self::Core) {}

    /// The driver has broken the rules, and the device does nothing for it until it is reset.
    fn stop(&self, _core: &mut Self::Core) {}

    /// Works inside the gate; ends soon when [`Pass::must_leave`].
    ///
    /// # Errors
    /// [`Broken`] when the driver broke the rules.
    fn batch(&self, core: &mut Self::Core, batch: Batch<'_, M>) -> Result<Outcome, Broken>;

    /// Appends the device's own part of a saved state; must not allocate within
    /// [`DeviceState::BYTES`].
    fn save(&self, core: &Self::Core, out: &mut Vec<u8>);

    /// Whether a state fits this device.
    ///
    /// # Errors
    /// Why it does not.
    fn check(&self, state: &Self::State, transport: &TransportState) -> Result<(), Self::Refusal>;

    /// Loads a state that was checked. The queues exist by then.
    fn restore(&self, core: &mut Self::Core, state: Self::State);

    /// What the thread waits for beside the notifications of the queues.
    fn sources(&self) -> Vec<RawFd> {
        Vec::new()
    }

    /// Source number `source` is ready. Returns the queues to be looked at, a bit for each.
    fn ready(&self, _core: &mut Self::Core, _source: usize) -> u32 {
        0
    }

    /// When the thread must wake at the latest.
    fn deadline(&self, _core: &Self::Core) -> Option<Instant> {
        None
    }

    /// After each sleep of the thread, outside the gate.
    fn awake(&self, _shared: &Shared<M, Self>) {}

    /// Called after each batch, outside the gate: does what may take longer than a checkpoint should wait.
    fn rest(&self, _shared: &Shared<M, Self>) {}

    /// The machine begins to run here. All queues will be checked. Returns whether the configuration space
    /// has changed.
    fn go_live(&self, _core: &mut Self::Core, _queues: Option<&mut Queues<M>>, _announce: bool) -> bool {
        false
    }

    /// The machine has begun to run here; no lock is held but the transport's.
    fn gone_live(&self, _shared: &Shared<M, Self>, _announce: bool) {}

    /// The thread has ended, for good.
    fn ended(&self) {}
}

/// What is worked on under the lock.
#[derive(Debug)]
pub struct Core<M, C> {
    /// The queues of a driver that is ready.
    pub queues: Option<Queues<M>>,
    live: bool,
    /// The model's own.
    pub model: C,
}

/// What registers, thread and machine share.
pub struct Shared<M: GuestMemory, D: Model<M>> {
    /// What is special about the device.
    pub model: D,
    pub(super) identity: Identity,
    /// Written when the driver notifies a queue.
    pub(super) kicks: Vec<EventFd>,
    pub(super) gate: Arc<DeviceGate>,
    waker: Arc<dyn Waker>,
    wake: Wake,
    /// Of the driver's mistakes.
    complaints: Complaints,
    core: Mutex<Core<M, D::Core>>,
}

impl<M: GuestMemory, D: Model<M>> Shared<M, D> {
    /// What is worked on.
    pub fn core(&self) -> MutexGuard<'_, Core<M, D::Core>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the thread do a batch.
    pub fn wake_thread(&self) {
        self.wake.wake();
    }

    /// Reads the configuration space; bytes outside of it are zero.
    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        let space = self.model.config(&self.core().model);
        for (at, byte) in (0u64..).zip(data) {
            let at = usize::try_from(offset.saturating_add(at)).unwrap_or(usize::MAX);
            *byte = space.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes to the configuration space.
    pub(super) fn write_config(&self, offset: u64, data: &[u8]) {
        self.model.write_config(&mut self.core().model, offset, data);
    }

    /// The driver is ready.
    pub(super) fn activate(&self, queues: Queues<M>) -> Result<(), ActivateError> {
        let mut core = self.core();
        self.model.activate(&mut core.model, &queues)?;
        core.queues = Some(queues);
        drop(core);
        self.wake.wake();
        Ok(())
    }

    /// The driver no longer has queues. Once this returns, the device no longer touches guest memory.
    pub(super) fn reset(&self) {
        let mut core = self.core();
        core.queues = None;
        self.model.reset(&mut core.model);
        drop(core);
        self.wake.wake();
    }

    /// Does a batch. Returns whether another one must follow at once.
    pub(super) fn work(&self, ready: &[usize], pass: &Pass<'_>) -> bool {
        let mut core = self.core();
        let Core { queues, live, model } = &mut *core;
        for &source in ready {
            let pending = match source.checked_sub(self.kicks.len()) {
                None => 1 << source,
                Some(source) => self.model.ready(model, source),
            };
            queues.iter_mut().for_each(|queues| queues.look_at(pending));
        }
        let mut active = queues.as_mut().filter(|queues| *live && !queues.line().needs_reset());
        let result = self.model.batch(model, Batch { queues: active.as_deref_mut(), pass });
        let result = result.and_then(|outcome| active.map_or(Ok(()), Queues::signal).map(|()| outcome));
        let outcome = result.unwrap_or_else(|reason| {
            complain!(error, self.complaints, device = D::NAME, number = self.model.number(), %reason,
                "a device stops until the driver resets it");
            self.model.stop(model);
            queues.iter().for_each(|queues| queues.line().fail());
            // One more batch, for what the model does when it is awake.
            Outcome { more: true, wake: true }
        });
        if outcome.wake {
            self.waker.wake();
        }
        outcome.more
    }
}

impl<M, D> Work for Shared<M, D>
where
    M: GuestMemory + Send + Sync + 'static,
    D: Model<M>,
{
    fn name(&self) -> &'static str {
        D::THREAD
    }

    fn gate(&self) -> &DeviceGate {
        &self.gate
    }

    fn wake(&self) -> &Wake {
        &self.wake
    }

    fn sources(&self) -> Vec<RawFd> {
        self.kicks.iter().map(AsRawFd::as_raw_fd).chain(self.model.sources()).collect()
    }

    fn deadline(&self) -> Option<Instant> {
        self.model.deadline(&self.core().model)
    }

    fn awake(&self) {
        self.model.awake(self);
    }

    fn batch(&self, ready: &[usize], pass: &Pass<'_>) -> bool {
        self.work(ready, pass)
    }

    fn rest(&self) {
        self.model.rest(self);
    }
}

/// Why a saved state cannot be loaded. The device is then as after a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError<R: Error> {
    /// The bytes are not a state.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The state does not fit the registers or the guest's memory.
    #[error(transparent)]
    Transport(TransportRestoreError),
    /// The state does not fit this device.
    #[error(transparent)]
    Refused(R),
}

/// A virtio device: its registers, its thread and its model.
///
/// It starts passive: the guest may set it up, but nothing moves until [`go_live`](Device::go_live).
pub struct Slot<M: GuestMemory + Send + Sync + 'static, D: Model<M>> {
    transport: Arc<Mutex<MmioTransport<M, D>>>,
    shared: Arc<Shared<M, D>>,
    worker: Option<Worker<Shared<M, D>>>,
}

impl<M: GuestMemory + Send + Sync + 'static, D: Model<M>> Slot<M, D> {
    /// A device after power-on, at work.
    ///
    /// # Errors
    /// The operating system's, when it refuses the thread or its events.
    pub(super) fn start(model: D, core: D::Core, host: DeviceHost<M>) -> io::Result<Self> {
        let mut slot = Self::without_thread(model, core, host)?;
        slot.start_thread()?;
        Ok(slot)
    }

    /// A device after power-on whose thread does not run yet.
    pub(super) fn without_thread(model: D, core: D::Core, host: DeviceHost<M>) -> io::Result<Self> {
        let DeviceHost { memory, gate, interrupt, waker } = host;
        let identity = model.identity();
        let shared = Arc::new(Shared {
            kicks: identity.queue_sizes.iter().map(|_| event()).collect::<io::Result<_>>()?,
            wake: Wake::new()?,
            core: Mutex::new(Core { queues: None, live: false, model: core }),
            complaints: Complaints::default(),
            model,
            identity,
            gate,
            waker,
        });
        let transport = MmioTransport::new(memory, shared.clone(), interrupt);
        Ok(Self { transport: Arc::new(Mutex::new(transport)), shared, worker: None })
    }

    pub(super) fn start_thread(&mut self) -> io::Result<()> {
        self.worker = Some(Worker::start(self.shared.clone())?);
        Ok(())
    }

    /// Does what the thread does when it wakes, for a device without one. All queues are checked.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn turn(&self) -> bool {
        let ready: Vec<_> = (0..Work::sources(&*self.shared).len()).collect();
        let more = self.shared.work(&ready, &self.shared.gate.enter());
        self.shared.rest();
        more
    }

    /// The state as plain data; needs stopped vCPUs and a closed gate.
    #[cfg(test)]
    pub(super) fn state(&self) -> SavedState<D::State> {
        let mut bytes = Vec::new();
        self.save(&mut bytes);
        SavedState::decode(&bytes).expect("a device saves what can be read")
    }

    /// What registers, thread and machine share.
    pub(super) fn shared(&self) -> &Arc<Shared<M, D>> {
        &self.shared
    }

    /// What is special about the device.
    pub(super) fn model(&self) -> &D {
        &self.shared.model
    }

    /// Whether the machine runs here.
    pub fn is_live(&self) -> bool {
        self.shared.core().live
    }

    /// Changes what the driver reads in the configuration space, and tells the driver if `change` returns
    /// that something changed. Waits while the gate is closed.
    pub(super) fn reconfigure(&self, change: impl FnOnce(&mut D::Core) -> bool) {
        let _pass = self.shared.gate.enter();
        let mut transport = self.transport();
        if change(&mut self.shared.core().model) {
            transport.config_changed();
        }
    }

    /// Loads a saved state: see [`Device::restore`].
    ///
    /// # Errors
    /// [`RestoreError`]; the device is then as after a reset.
    pub fn take_over(&self, bytes: &[u8]) -> Result<(), RestoreError<D::Refusal>> {
        let mut transport = self.transport();
        transport.reset();
        let SavedState { device, transport: registers } = SavedState::<D::State>::decode(bytes)?;
        self.model().check(&device, &registers).map_err(RestoreError::Refused)?;
        transport.restore(&registers).map_err(RestoreError::Transport)?;
        self.model().restore(&mut self.shared.core().model, device);
        self.shared.wake_thread();
        Ok(())
    }

    pub(super) fn transport(&self) -> MutexGuard<'_, MmioTransport<M, D>> {
        self.transport.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: GuestMemory + Send + Sync + 'static, D: Model<M>> Device for Slot<M, D> {
    fn registers(&self) -> SharedDevice {
        self.transport.clone()
    }

    fn kicks(&self) -> &[EventFd] {
        &self.shared.kicks
    }

    fn go_live(&self, announce: bool) {
        let mut transport = self.transport();
        let mut core = self.shared.core();
        core.live = true;
        let Core { queues, model, .. } = &mut *core;
        if let Some(queues) = queues {
            queues.look_at(!0);
            queues.line().signal_used();
        }
        if self.model().go_live(model, queues.as_mut(), announce) {
            transport.config_changed();
        }
        drop(core);
        self.shared.waker.wake();
        self.model().gone_live(&self.shared, announce);
        self.shared.wake_thread();
    }

    fn state_bytes(&self) -> usize {
        const { assert!(SavedState::<D::State>::BYTES <= MAX_DEVICE_STATE) };
        SavedState::<D::State>::BYTES
    }

    fn save(&self, out: &mut Vec<u8>) {
        let transport = self.transport();
        out.extend_from_slice(&D::State::VERSION.to_le_bytes());
        self.model().save(&self.shared.core().model, out);
        transport.save().encode(out);
    }

    fn restore(&self, bytes: &[u8]) -> Result<(), DeviceRestoreError> {
        self.take_over(bytes).map_err(|error| DeviceRestoreError { device: D::NAME, source: error.into() })
    }

    fn reset(&self) {
        self.transport().reset();
    }
}

impl<M: GuestMemory + Send + Sync + 'static, D: Model<M>> Drop for Slot<M, D> {
    fn drop(&mut self) {
        drop(self.worker.take());
        self.shared.model.ended();
    }
}

impl<M: GuestMemory + Send + Sync + 'static, D: Model<M>> std::fmt::Debug for Slot<M, D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot").field("device", &D::NAME).finish_non_exhaustive()
    }
}
