//! The entropy device: virtio-rng. This host's kernel feeds it.
//!
//! The bytes become part of the guest's memory, so a guest that is resumed elsewhere has the same ones; only
//! bytes that it asks for afterwards come from the other host.

use std::convert::Infallible;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::warn;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use vm_memory::GuestMemory;

use super::chain::Broken;
use super::persist::{DecodeError, DeviceState, Fields, TransportState};
use super::ring::{Answer, Queues};
use super::slot::{Batch, Identity, Model, Outcome, Slot};
use super::{ActivateError, COMMON_FEATURES, DeviceHost};

#[cfg(test)]
mod tests;

/// Largest size of the queue.
const QUEUE_SIZE: u16 = 64;
/// Most bytes that one request gets, some microseconds' worth: a checkpoint waits for the current request. A
/// driver that wants more asks again; the used ring tells it how many bytes it got.
const REQUEST: usize = 4096;
/// The least cost of a request: answering a request for one byte takes about as long as this many bytes do.
const LEAST_COST: usize = 256;
/// What requests may cost in one [`WINDOW`]: more than a kernel ever asks for, and too little to keep this
/// host busy.
const BUDGET: usize = 256 << 10;
/// How long a budget lasts.
const WINDOW: Duration = Duration::from_millis(100);
/// How long until a host without random bytes is asked again.
const AGAIN: Duration = Duration::from_secs(1);

/// Gives random bytes.
pub trait EntropySource: Send + Sync + 'static {
    /// Fills all of `to`, without blocking.
    ///
    /// # Errors
    /// When there are none at the moment.
    fn fill(&self, to: &mut [u8]) -> io::Result<()>;
}

/// This host's kernel.
#[derive(Clone, Copy, Debug)]
pub struct HostEntropy(());

impl HostEntropy {
    /// Waits until the kernel has random bytes, which is soon after its start; from then on it never waits
    /// again (random(7)).
    ///
    /// # Errors
    /// The operating system's.
    pub fn new() -> io::Result<Self> {
        getrandom::fill(&mut [0])?;
        Ok(Self(()))
    }
}

impl EntropySource for HostEntropy {
    fn fill(&self, to: &mut [u8]) -> io::Result<()> {
        Ok(getrandom::fill(to)?)
    }
}

/// What is special about an entropy device.
pub struct Rng {
    source: Box<dyn EntropySource>,
    throttled: AtomicU64,
    failed: AtomicU64,
}

/// The pace of the device.
pub struct Pace {
    buffer: Box<[u8; REQUEST]>,
    budget: usize,
    /// When there is a new budget.
    renewed: Instant,
    /// Requests wait until this time.
    stalled: Option<Instant>,
    /// Whether the host's failure has been reported.
    warned: bool,
}

/// An entropy device. It is passive until it goes live: it gives nothing before.
pub type RngDevice<M> = Slot<M, Rng>;

impl<M: GuestMemory + Send + Sync + 'static> RngDevice<M> {
    /// An entropy device. This host's kernel feeds it.
    ///
    /// # Errors
    /// The operating system's, when it refuses the thread, its events or random bytes.
    pub fn new(host: DeviceHost<M>) -> io::Result<Self> {
        Self::with_source(HostEntropy::new()?, host)
    }

    /// An entropy device. `source` feeds it.
    ///
    /// # Errors
    /// The operating system's, when it refuses the thread or its events.
    pub fn with_source(source: impl EntropySource, host: DeviceHost<M>) -> io::Result<Self> {
        let pace = Pace {
            buffer: Box::new([0; REQUEST]),
            budget: BUDGET,
            renewed: Instant::now(),
            stalled: None,
            warned: false,
        };
        let (throttled, failed) = Default::default();
        Self::start(Rng { source: Box::new(source), throttled, failed }, pace, host)
    }

    /// How often the guest had to wait because it asked too fast.
    pub fn throttled(&self) -> u64 {
        self.model().throttled.load(Ordering::Relaxed)
    }

    /// How often the host had no random bytes.
    pub fn failed(&self) -> u64 {
        self.model().failed.load(Ordering::Relaxed)
    }
}

/// Nothing but the registers is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RngState;

impl DeviceState for RngState {
    const VERSION: u16 = 1;
    const BYTES: usize = 0;

    fn encode(&self, _out: &mut Vec<u8>) {}

    fn decode(_bytes: &mut Fields<'_>) -> Result<Self, DecodeError> {
        Ok(Self)
    }
}

impl<M: GuestMemory> Model<M> for Rng {
    type Core = Pace;
    type State = RngState;
    type Refusal = Infallible;

    const NAME: &'static str = "entropy device";
    const THREAD: &'static str = "outlive-rng";

    fn identity(&self) -> Identity {
        Identity { device_type: VIRTIO_ID_RNG, features: COMMON_FEATURES, queue_sizes: vec![QUEUE_SIZE] }
    }

    fn activate(&self, _pace: &mut Pace, queues: &Queues<M>) -> Result<(), ActivateError> {
        queues.need(0)
    }

    /// Answers requests until there are no more or the budget is used up.
    fn batch(&self, pace: &mut Pace, batch: Batch<'_, M>) -> Result<Outcome, Broken> {
        let now = Instant::now();
        // Also for a driver that has gone away: the thread sleeps only until then.
        pace.stalled = pace.stalled.filter(|&until| now < until);
        let Some(queues) = batch.queues.filter(|_| pace.stalled.is_none()) else {
            return Ok(Outcome::default());
        };
        if now >= pace.renewed {
            (pace.budget, pace.renewed) = (BUDGET, now + WINDOW);
        }
        let served = queues.serve(0, usize::MAX, batch.pass, |memory, chain| {
            let room = chain.room()?.min(REQUEST);
            if pace.budget == 0 {
                self.throttled.fetch_add(1, Ordering::Relaxed);
                pace.stalled = Some(pace.renewed);
                return Ok(Answer::Later);
            }
            let bytes = &mut pace.buffer[..room];
            if let Err(error) = self.source.fill(bytes) {
                self.failed.fetch_add(1, Ordering::Relaxed);
                if !std::mem::replace(&mut pace.warned, true) {
                    warn!(%error, "this host has no random bytes for the guest; asking again every second");
                }
                pace.stalled = Some(now + AGAIN);
                return Ok(Answer::Later);
            }
            chain.write(memory, 0, bytes)?;
            bytes.fill(0);
            pace.budget = pace.budget.saturating_sub(room.max(LEAST_COST));
            pace.warned = false;
            Ok(Answer::Used(room as u32))
        })?;
        if pace.stalled.is_some() {
            queues.look_at(1);
        }
        Ok(Outcome { more: served.more, wake: served.done > 0 })
    }

    fn deadline(&self, pace: &Pace) -> Option<Instant> {
        pace.stalled
    }

    fn save(&self, _pace: &Pace, _out: &mut Vec<u8>) {}

    fn check(&self, _state: &RngState, _transport: &TransportState) -> Result<(), Infallible> {
        Ok(())
    }

    fn restore(&self, _pace: &mut Pace, _state: RngState) {}
}
