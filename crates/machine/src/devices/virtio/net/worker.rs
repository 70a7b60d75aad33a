//! The thread of the network device.
//!
//! It sleeps in `epoll` on the tap, the notifications of the two queues, the output (room again) and a
//! control event, all edge-triggered, so nothing has to be read to quiet them and a tap whose frames no one
//! wants does not spin. What it learns becomes a flag; work is done only inside the gate, a batch at a time.
//!
//! The flags are not part of a checkpoint: a device that goes live sets them all.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use tracing::{debug, error};
use vm_memory::GuestMemory;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::block_signal;

use super::announce::{Schedule, rarp};
use super::mac::MacAddr;
use super::output::{MAX_FRAME, Output};
use super::queues::{Bounce, Broken, Queues, RX, TX, Turn, bounce};
use super::stats::Counters;
use super::tap::FramePort;
use crate::devices::gate::{DeviceGate, Pass};
use crate::devices::virtio::Waker;

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
    /// Makes the thread look at `quit`, at the flags in `core` and at the announcements.
    control: EventFd,
    quit: AtomicBool,
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
            control: event()?,
            quit: AtomicBool::new(false),
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
        self.nudge();
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
        self.nudge();
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

    /// How long the thread may sleep, in milliseconds for `epoll_wait`; -1 is for ever.
    fn sleep_ms(&self) -> i32 {
        let next = self.announcing().as_ref().and_then(|(schedule, _)| schedule.next_at());
        next.map_or(-1, |at| {
            let wait = at.saturating_duration_since(Instant::now());
            // Rounded up: a wait that ends too early would be a spin until the time has come.
            i32::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(i32::MAX)
        })
    }

    fn nudge(&self) {
        // Fails only if the counter is full, and then the thread is being woken anyway.
        let _ = self.control.write(1);
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

fn event() -> io::Result<EventFd> {
    EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
}

/// What `epoll` says is ready.
#[derive(Clone, Copy)]
#[repr(u64)]
enum Ready {
    Control,
    Tap,
    RxKick,
    TxKick,
    Space,
}

impl Ready {
    const ALL: [Self; 5] = [Self::Control, Self::Tap, Self::RxKick, Self::TxKick, Self::Space];
}

/// The running thread; dropping it ends the thread, also from behind a closed gate.
pub(super) struct Worker<M: GuestMemory> {
    shared: Arc<Shared<M>>,
    thread: Option<JoinHandle<()>>,
}

impl<M: GuestMemory + Send + Sync + 'static> Worker<M> {
    pub(super) fn start(shared: Arc<Shared<M>>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        for ready in Ready::ALL {
            let fd = match ready {
                Ready::Control => shared.control.as_raw_fd(),
                Ready::Tap => shared.port.as_raw_fd(),
                Ready::RxKick => shared.kicks[RX].as_raw_fd(),
                Ready::TxKick => shared.kicks[TX].as_raw_fd(),
                Ready::Space => shared.output.space().as_raw_fd(),
            };
            let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, ready as u64))?;
        }
        let thread = {
            let shared = shared.clone();
            thread::Builder::new().name("outlive-net".into()).spawn(move || run(&shared, &epoll))?
        };
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl<M: GuestMemory> Drop for Worker<M> {
    fn drop(&mut self) {
        self.shared.quit.store(true, Ordering::Release);
        self.shared.gate.recheck();
        self.shared.nudge();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            error!("the network device's thread had panicked");
        }
    }
}

fn run<M: GuestMemory>(shared: &Shared<M>, epoll: &Epoll) {
    block_signals();
    let mut events = [EpollEvent::default(); Ready::ALL.len()];
    let mut more = false;
    loop {
        let sleep = if more { 0 } else { shared.sleep_ms() };
        let count = match epoll.wait(sleep, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                // The descriptors are all ours and open: this does not happen.
                error!(%error, "the network device cannot wait for events and ends");
                return;
            }
        };
        shared.announce_if_due();
        if count == 0 && !more && !shared.quit.load(Ordering::Acquire) {
            continue;
        }
        let Some(pass) = shared.gate.enter_unless(&shared.quit) else {
            debug!("the network device's thread ends");
            return;
        };
        let mut core = shared.core();
        for event in &events[..count] {
            core.note(event.data());
        }
        more = core.batch(shared, &pass);
    }
}

impl<M> Core<M> {
    fn note(&mut self, ready: u64) {
        const TAP: u64 = Ready::Tap as u64;
        const RX_KICK: u64 = Ready::RxKick as u64;
        const TX_KICK: u64 = Ready::TxKick as u64;
        const SPACE: u64 = Ready::Space as u64;
        match ready {
            TAP | RX_KICK => self.rx_pending = true,
            TX_KICK | SPACE => self.tx_pending = true,
            // Control: whoever wrote it has set the flags.
            _ => {}
        }
    }
}

/// Signals are for the threads that expect them. The ones that report a fault of this thread itself stay
/// open.
fn block_signals() {
    const FAULTS: [i32; 6] =
        [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGABRT];
    for signal in (1..=libc::SIGRTMAX()).filter(|signal| !FAULTS.contains(signal)) {
        // Fails for the few that cannot be blocked and the ones that are already.
        let _ = block_signal(signal);
    }
}
