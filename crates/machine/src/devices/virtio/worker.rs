//! The thread of a device: it sleeps in `epoll` until something happens and works in batches inside the gate.
//!
//! Every source is watched edge-triggered, so none has to be read to reset it, and an unwanted one does not
//! make the thread spin. What a batch learns is no part of a checkpoint: a device that goes live checks
//! everything.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use tracing::{debug, error};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::devices::gate::{DeviceGate, Pass};
use crate::thread;

/// What a device's thread does.
pub(crate) trait Work: Send + Sync + 'static {
    /// Name of the thread, at most 15 bytes.
    fn name(&self) -> &'static str;

    /// The gate it works behind.
    fn gate(&self) -> &DeviceGate;

    /// Wakes the thread, and ends it.
    fn wake(&self) -> &Wake;

    /// What it waits for. [`batch`](Self::batch) gets the positions of the ready sources.
    fn sources(&self) -> Vec<RawFd>;

    /// When it must do a batch at the latest.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    /// After each sleep, outside the gate.
    fn awake(&self) {}

    /// Work inside the gate, also when a [`deadline`](Self::deadline) has passed; ends soon when
    /// [`Pass::must_leave`]. Returns whether another batch must follow at once.
    fn batch(&self, ready: &[usize], pass: &Pass<'_>) -> bool;

    /// Called after each batch, outside the gate: does what may take longer than a checkpoint should wait.
    fn rest(&self) {}
}

/// Wakes a device's thread, and ends it.
#[derive(Debug)]
pub(crate) struct Wake {
    event: EventFd,
    quit: AtomicBool,
}

impl Wake {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self { event: event()?, quit: AtomicBool::new(false) })
    }

    /// Makes the thread do a batch.
    pub(crate) fn wake(&self) {
        // Fails only if the counter is full, and then the thread is being woken anyway.
        let _ = self.event.write(1);
    }
}

/// An eventfd for the sources of a worker.
pub(crate) fn event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// The running thread; dropping it ends the thread, also from behind a closed gate.
pub(crate) struct Worker<W: Work> {
    work: Arc<W>,
    thread: Option<JoinHandle<()>>,
}

/// What `epoll` says of [`Wake`].
const WAKE: u64 = u64::MAX;

impl<W: Work> Worker<W> {
    pub(crate) fn start(work: Arc<W>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let sources = work.sources();
        let count = sources.len() + 1;
        let watch = |fd, token| {
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
        };
        watch(work.wake().event.as_raw_fd(), WAKE)?;
        for (position, fd) in sources.into_iter().enumerate() {
            watch(fd, position as u64)?;
        }
        let thread = {
            let work = work.clone();
            thread::spawn(work.name(), move || run(&*work, &epoll, count))?
        };
        Ok(Self { work, thread: Some(thread) })
    }
}

impl<W: Work> Drop for Worker<W> {
    fn drop(&mut self) {
        let wake = self.work.wake();
        wake.quit.store(true, Ordering::Release);
        self.work.gate().recheck();
        wake.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!(thread = self.work.name(), "a device's thread had panicked");
        }
    }
}

fn run<W: Work>(work: &W, epoll: &Epoll, sources: usize) {
    let quit = &work.wake().quit;
    let mut events = vec![EpollEvent::default(); sources];
    let mut ready = Vec::with_capacity(sources);
    let mut more = false;
    loop {
        let deadline = work.deadline();
        let sleep = if more { 0 } else { deadline.map_or(-1, milliseconds) };
        let count = match epoll.wait(sleep, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                // All descriptors are ours and open, so this does not happen.
                error!(%error, thread = work.name(), "a device cannot wait for events and ends");
                return;
            }
        };
        work.awake();
        let due = deadline.is_some_and(|at| at <= Instant::now());
        if count == 0 && !more && !due && !quit.load(Ordering::Acquire) {
            continue;
        }
        ready.clear();
        ready.extend(
            events[..count].iter().map(EpollEvent::data).filter(|&it| it != WAKE).map(|it| it as usize),
        );
        let Some(pass) = work.gate().enter_unless(quit) else {
            debug!(thread = work.name(), "a device's thread ends");
            return;
        };
        more = work.batch(&ready, &pass);
        drop(pass);
        work.rest();
    }
}

/// The time until `deadline`, for `epoll_wait`. Rounded up: after a wait that ends too early, the thread
/// would spin until the deadline.
fn milliseconds(until: Instant) -> i32 {
    let wait = until.saturating_duration_since(Instant::now());
    i32::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
}
