//! The thread of the entropy device, and how fast it gives.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tracing::warn;
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::queues::{Ended, Queues, REQUEST};
use super::source::EntropySource;
use super::stats::Counters;
use crate::devices::complaints::{Complaints, complain};
use crate::devices::gate::{DeviceGate, Pass};
use crate::devices::virtio::Waker;
use crate::devices::virtio::chains::Turn;
use crate::devices::virtio::worker::{Bell, Work, event};

/// Bytes given in one [`WINDOW`]: more than a kernel ever asks for, and too little to keep this host busy.
pub(super) const BUDGET: usize = 256 << 10;
/// How long a budget lasts.
const WINDOW: Duration = Duration::from_millis(100);
/// How long until a host without random bytes is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// What the thread, the device model and the machine share.
pub(super) struct Shared<M> {
    gate: Arc<DeviceGate>,
    waker: Arc<dyn Waker>,
    source: Box<dyn EntropySource>,
    pub(super) counters: Counters,
    pub(super) kicks: [EventFd; 1],
    bell: Bell,
    /// Of the driver's mistakes.
    complaints: Complaints,
    core: Mutex<Core<M>>,
}

struct Core<M> {
    queues: Option<Queues<M>>,
    live: bool,
    pending: bool,
    buffer: Box<[u8; REQUEST]>,
    budget: usize,
    /// When there is a new budget.
    renewed: Instant,
    /// Requests wait until then.
    stalled: Option<Instant>,
    /// The host's failure has been told.
    warned: bool,
}

impl<M: GuestMemory> Shared<M> {
    pub(super) fn new(
        source: Box<dyn EntropySource>,
        gate: Arc<DeviceGate>,
        waker: Arc<dyn Waker>,
    ) -> io::Result<Self> {
        let core = Core {
            queues: None,
            live: false,
            pending: false,
            buffer: Box::new([0; REQUEST]),
            budget: BUDGET,
            renewed: Instant::now(),
            stalled: None,
            warned: false,
        };
        Ok(Self {
            gate,
            waker,
            source,
            counters: Counters::default(),
            kicks: [event()?],
            bell: Bell::new()?,
            complaints: Complaints::default(),
            core: Mutex::new(core),
        })
    }

    pub(super) fn install(&self, queues: Queues<M>) {
        let mut core = self.core();
        core.queues = Some(queues);
        core.pending = true;
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
        let mut core = self.core();
        core.live = true;
        core.pending = true;
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
        let now = Instant::now();
        // Also for a driver that has gone away: the thread sleeps only until then.
        self.stalled = self.stalled.filter(|&until| now < until);
        let Some(queues) = self.queues.as_mut().filter(|queues| self.live && !queues.line.needs_reset())
        else {
            return false;
        };
        if !self.pending || self.stalled.is_some() {
            return false;
        }
        if now >= self.renewed {
            (self.budget, self.renewed) = (BUDGET, now + WINDOW);
        }
        let given = queues.give(&*shared.source, &mut self.buffer, &mut self.budget, &shared.counters, pass);
        match given {
            Ok((ended, done)) => {
                if done > 0 {
                    shared.waker.wake();
                }
                self.after(ended, shared, now)
            }
            Err(reason) => {
                complain!(error, shared.complaints, %reason, "the entropy device stops until the driver resets it");
                queues.line.fail();
                shared.waker.wake();
                false
            }
        }
    }

    fn after(&mut self, ended: Ended, shared: &Shared<M>, now: Instant) -> bool {
        match ended {
            Ended::Turn(turn) => {
                self.pending = turn == Turn::More;
                self.warned = false;
            }
            Ended::Throttled => {
                shared.counters.throttled.fetch_add(1, Ordering::Relaxed);
                self.stalled = Some(self.renewed);
                return false;
            }
            Ended::Dry(error) => {
                shared.counters.failed.fetch_add(1, Ordering::Relaxed);
                if !std::mem::replace(&mut self.warned, true) {
                    warn!(%error, "this host has no random bytes for the guest; asking again every second");
                }
                self.stalled = Some(now + AGAIN);
                return false;
            }
        }
        self.pending
    }
}

impl<M: GuestMemory + Send + Sync + 'static> Work for Shared<M> {
    fn name(&self) -> &'static str {
        "outlive-rng"
    }

    fn gate(&self) -> &DeviceGate {
        &self.gate
    }

    fn bell(&self) -> &Bell {
        &self.bell
    }

    fn sources(&self) -> Vec<RawFd> {
        vec![self.kicks[0].as_raw_fd()]
    }

    fn sleep_ms(&self) -> i32 {
        self.core().stalled.map_or(-1, |until| {
            let wait = until.saturating_duration_since(Instant::now());
            // Rounded up: a wait that ends too early would be a spin until the time has come.
            i32::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        })
    }

    fn awake(&self) {
        if self.core().stalled.is_some_and(|until| Instant::now() >= until) {
            self.bell.ring();
        }
    }

    fn batch(&self, ready: &[usize], pass: &Pass<'_>) -> bool {
        let mut core = self.core();
        core.pending |= !ready.is_empty();
        core.batch(self, pass)
    }
}
