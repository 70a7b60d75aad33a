//! The thread of the network device.
//!
//! It waits for the tap, the notifications of the two queues and the output (room again). What it learns becomes a
//! flag; a device that goes live sets them all.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tracing::error;
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::announce::{Schedule, rarp};
use super::mac::MacAddr;
use super::output::{MAX_FRAME, Output};
use super::queues::{Bounce, Broken, Queues, RX, TX, Turn, bounce};
use super::stats::Counters;
use super::tap::FramePort;
use crate::devices::gate::{DeviceGate, Pass};
use crate::devices::virtio::Waker;
use crate::devices::virtio::worker::{Bell, Work, event};

/// Most stale frames thrown away when the device goes live: more than a tap queues by default (1000).
const MAX_STALE: u64 = 10_000;

/// What the thread, the device model and the machine share.
pub(super) struct Shared<M> {
    pub(super) port: Arc<dyn FramePort>,
    pub(super) output: Arc<Output>,
    pub(super) gate: Arc<DeviceGate>,
    pub(super) waker: Arc<dyn Waker>,
    pub(super) counters: Counters,
    /// Written when the driver notifies a queue.
    pub(super) kicks: [EventFd; 2],
    /// Makes the thread look at the flags in `core` and at the announcements.
    bell: Bell,
    core: Mutex<Core<M>>,
    announcing: Mutex<Option<(Schedule, [u8; super::announce::FRAME])>>,
}

/// What is worked on inside the gate: by the thread in its batches, by the coordinator while the gate is
/// closed, and by a vCPU thread when the driver resets or starts the device.
struct Core<M> {
    queues: Option<Queues<M>>,
    live: bool,
    rx_pending: bool,
    tx_pending: bool,
    /// The output was full when frames were last taken from the guest.
    tx_stalled: bool,
    rx_buffer: Bounce,
    tx_buffer: Bounce,
}

impl<M: GuestMemory> Shared<M> {
    pub(super) fn new(
        port: Arc<dyn FramePort>,
        output: Arc<Output>,
        gate: Arc<DeviceGate>,
        waker: Arc<dyn Waker>,
    ) -> io::Result<Self> {
        Ok(Self {
            port,
            output,
            gate,
            waker,
            counters: Counters::default(),
            kicks: [event()?, event()?],
            bell: Bell::new()?,
            core: Mutex::new(Core {
                queues: None,
                live: false,
                rx_pending: false,
                tx_pending: false,
                tx_stalled: false,
                rx_buffer: bounce(),
                tx_buffer: bounce(),
            }),
            announcing: Mutex::new(None),
        })
    }

    pub(super) fn install(&self, queues: Queues<M>) {
        let mut core = self.core();
        core.queues = Some(queues);
        core.rx_pending = true;
        core.tx_pending = true;
        drop(core);
        self.bell.ring();
    }

    pub(super) fn uninstall(&self) {
        self.core().queues = None;
    }

    pub(super) fn with_queues<T>(&self, look: impl FnOnce(&Queues<M>) -> T) -> Option<T> {
        self.core().queues.as_ref().map(look)
    }

    /// See [`super::NetDevice::go_live`].
    pub(super) fn go_live(&self, announce: Option<MacAddr>) {
        let mut core = self.core();
        let stale = drain(&*self.port, &mut core.rx_buffer);
        self.counters.stale.fetch_add(stale, Ordering::Relaxed);
        core.live = true;
        core.rx_pending = true;
        core.tx_pending = true;
        if let Some(queues) = &core.queues {
            queues.line.signal_used();
        }
        drop(core);
        self.waker.wake();
        if let Some(mac) = announce {
            *self.announcing() = Some((Schedule::new(Instant::now()), rarp(mac)));
            self.announce_if_due();
        }
        self.bell.ring();
    }

    pub(super) fn is_live(&self) -> bool {
        self.core().live
    }

    fn announce_if_due(&self) {
        let mut announcing = self.announcing();
        if let Some((schedule, frame)) = &mut *announcing {
            if schedule.take_due(Instant::now()) {
                self.output.announce(&frame[..]);
            }
            if schedule.next_at().is_none() {
                *announcing = None;
            }
        }
    }

    fn core(&self) -> MutexGuard<'_, Core<M>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn announcing(&self) -> MutexGuard<'_, Option<(Schedule, [u8; super::announce::FRAME])>> {
        self.announcing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: GuestMemory> Core<M> {
    /// Does a batch of what is pending. Says whether another batch must follow.
    fn batch(&mut self, shared: &Shared<M>, pass: &Pass<'_>) -> bool {
        let Some(queues) = self.queues.as_mut().filter(|queues| self.live && !queues.line.needs_reset())
        else {
            return false;
        };
        let mut run = || -> Result<(), Broken> {
            if self.tx_pending {
                let (turn, taken) =
                    queues.transmit(&shared.output, &mut self.tx_buffer, &shared.counters, pass)?;
                self.tx_pending = turn == Turn::More;
                // A guest whose frames had to stay with it may have gone idle for want of room to send.
                if taken > 0 && self.tx_stalled {
                    shared.waker.wake();
                }
                self.tx_stalled = turn == Turn::Full || self.tx_stalled && taken == 0;
            }
            if self.rx_pending {
                let (turn, delivered) =
                    queues.receive(&*shared.port, &mut self.rx_buffer, &shared.counters, pass)?;
                self.rx_pending = turn == Turn::More;
                if delivered > 0 {
                    shared.waker.wake();
                }
            }
            Ok(())
        };
        if let Err(reason) = run() {
            error!(%reason, "the network device stops until the driver resets it");
            queues.line.fail();
            shared.waker.wake();
            return false;
        }
        self.tx_pending || self.rx_pending
    }
}

/// Throws away what the tap has queued for a machine that did not run here.
fn drain(port: &dyn FramePort, buffer: &mut Bounce) -> u64 {
    let mut stale = 0;
    while stale < MAX_STALE && port.receive(&mut buffer[..MAX_FRAME]).is_ok() {
        stale += 1;
    }
    stale
}

/// Positions of the sources.
const TAP: usize = 0;
const RX_KICK: usize = 1;
const TX_KICK: usize = 2;
const SPACE: usize = 3;

impl<M: GuestMemory + Send + Sync + 'static> Work for Shared<M> {
    fn name(&self) -> &'static str {
        "outlive-net"
    }

    fn gate(&self) -> &DeviceGate {
        &self.gate
    }

    fn bell(&self) -> &Bell {
        &self.bell
    }

    fn sources(&self) -> Vec<RawFd> {
        let kick = |queue: usize| self.kicks[queue].as_raw_fd();
        vec![self.port.as_raw_fd(), kick(RX), kick(TX), self.output.space().as_raw_fd()]
    }

    fn sleep_ms(&self) -> i32 {
        let next = self.announcing().as_ref().and_then(|(schedule, _)| schedule.next_at());
        next.map_or(-1, |at| {
            let wait = at.saturating_duration_since(Instant::now());
            // Rounded up: a wait that ends too early would be a spin until the time has come.
            i32::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        })
    }

    fn awake(&self) {
        self.announce_if_due();
    }

    fn batch(&self, ready: &[usize], pass: &Pass<'_>) -> bool {
        let mut core = self.core();
        ready.iter().for_each(|&source| core.note(source));
        core.batch(self, pass)
    }
}

impl<M> Core<M> {
    fn note(&mut self, source: usize) {
        match source {
            TAP | RX_KICK => self.rx_pending = true,
            TX_KICK | SPACE => self.tx_pending = true,
            // The bell: whoever rang it has set the flags.
            _ => {}
        }
    }
}
