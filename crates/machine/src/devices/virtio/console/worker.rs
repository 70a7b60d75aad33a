//! The thread of the console: it waits for the notifications of the two queues and for what is typed.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::queues::{PART, Queues, RX, TX};
use super::stats::Counters;
use crate::devices::complaints::{Complaints, complain};
use crate::devices::gate::{DeviceGate, Pass};
use crate::devices::port::PortEnd;
use crate::devices::virtio::Waker;
use crate::devices::virtio::chains::{Broken, Turn};
use crate::devices::virtio::worker::{Bell, Work, event};

/// What the thread, the device model and the machine share.
pub(super) struct Shared<M> {
    pub(super) end: PortEnd,
    pub(super) gate: Arc<DeviceGate>,
    waker: Arc<dyn Waker>,
    pub(super) counters: Counters,
    pub(super) kicks: [EventFd; 2],
    bell: Bell,
    /// Of the driver's mistakes.
    complaints: Complaints,
    core: Mutex<Core<M>>,
}

struct Core<M> {
    queues: Option<Queues<M>>,
    live: bool,
    rx_pending: bool,
    tx_pending: bool,
    buffer: Box<[u8; PART]>,
}

impl<M: GuestMemory> Shared<M> {
    pub(super) fn new(end: PortEnd, gate: Arc<DeviceGate>, waker: Arc<dyn Waker>) -> io::Result<Self> {
        let core = Core {
            queues: None,
            live: false,
            rx_pending: false,
            tx_pending: false,
            buffer: Box::new([0; PART]),
        };
        Ok(Self {
            end,
            gate,
            waker,
            counters: Counters::default(),
            kicks: [event()?, event()?],
            bell: Bell::new()?,
            complaints: Complaints::default(),
            core: Mutex::new(core),
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

    pub(super) fn go_live(&self) {
        self.end.input.set_live(true);
        let mut core = self.core();
        core.live = true;
        core.rx_pending = true;
        core.tx_pending = true;
        if let Some(queues) = &core.queues {
            queues.line.signal_used();
        }
        drop(core);
        self.waker.wake();
        self.bell.ring();
    }

    fn core(&self) -> MutexGuard<'_, Core<M>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: GuestMemory> Core<M> {
    fn batch(&mut self, shared: &Shared<M>, pass: &Pass<'_>) -> bool {
        let Some(queues) = self.queues.as_mut().filter(|queues| self.live && !queues.line.needs_reset())
        else {
            return false;
        };
        let mut moved = 0;
        let mut run = || -> Result<(), Broken> {
            if self.tx_pending {
                let (turn, taken) =
                    queues.transmit(&*shared.end.sink, &mut self.buffer, &shared.counters, pass)?;
                self.tx_pending = turn == Turn::More;
                moved += taken;
            }
            if self.rx_pending {
                let (turn, filled) =
                    queues.receive(&shared.end.input, &mut self.buffer, &shared.counters, pass)?;
                self.rx_pending = turn == Turn::More;
                moved += filled;
            }
            Ok(())
        };
        let result = run();
        if let Err(reason) = &result {
            complain!(error, shared.complaints, %reason, "the console stops until the driver resets it");
            queues.line.fail();
        }
        if moved > 0 || result.is_err() {
            shared.waker.wake();
        }
        result.is_ok() && (self.tx_pending || self.rx_pending)
    }
}

/// Positions of the sources.
const RX_KICK: usize = 0;
const TX_KICK: usize = 1;
const TYPED: usize = 2;

impl<M: GuestMemory + Send + Sync + 'static> Work for Shared<M> {
    fn name(&self) -> &'static str {
        "outlive-console"
    }

    fn gate(&self) -> &DeviceGate {
        &self.gate
    }

    fn bell(&self) -> &Bell {
        &self.bell
    }

    fn sources(&self) -> Vec<RawFd> {
        let kick = |queue: usize| self.kicks[queue].as_raw_fd();
        vec![kick(RX), kick(TX), self.end.input.arrived().as_raw_fd()]
    }

    fn batch(&self, ready: &[usize], pass: &Pass<'_>) -> bool {
        let mut core = self.core();
        core.rx_pending |= ready.contains(&RX_KICK) || ready.contains(&TYPED);
        core.tx_pending |= ready.contains(&TX_KICK);
        core.batch(self, pass)
    }
}
