//! The thread of the network device.
//!
//! It waits for the tap, the notifications of the queues and the output (room again). What it learns becomes
//! a flag; a device that goes live sets them all.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::announce::{self, Schedule};
use super::chains::{Bounce, Broken, bounce};
use super::control::Settings;
use super::mac::MacAddr;
use super::offload::{GUEST_ANNOUNCE, GUEST_OFFLOADS};
use super::output::Output;
use super::queues::{Queues, Turn, Way};
use super::stats::Counters;
use super::tap::FramePort;
use crate::devices::complaints::{Complaints, complain};
use crate::devices::gate::{DeviceGate, Pass};
use crate::devices::virtio::worker::{Wake, Work, event};
use crate::devices::virtio::{DeviceHost, Waker};

/// Most stale frames thrown away when the device goes live: more than a tap queues by default (1000).
const MAX_STALE: u64 = 10_000;

/// What the thread, the device model and the machine share. Locks are taken in this order: the transport's,
/// `core`, `settings`.
pub(super) struct Shared<M> {
    pub(super) port: Arc<dyn FramePort>,
    pub(super) output: Arc<Output>,
    pub(super) gate: Arc<DeviceGate>,
    pub(super) waker: Arc<dyn Waker>,
    pub(super) counters: Counters,
    /// Written when the driver notifies a queue.
    pub(super) kicks: Vec<EventFd>,
    /// Makes the thread look at the flags in `core`, at the settings and at the announcements.
    wake: Wake,
    /// Of the driver's mistakes.
    complaints: Complaints,
    core: Mutex<Core<M>>,
    /// Changed only with `core` locked.
    settings: Mutex<Settings>,
    /// What the port was last told. It is told by the thread outside the gate: these calls may take long.
    told: Mutex<Option<Told>>,
    announcing: Mutex<Option<(Schedule, [u8; announce::PACKET])>>,
}

/// The settings that the port has to know.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Told {
    offloads: u64,
    pairs: u16,
}

/// What is worked on inside the gate: by the thread in its batches, by the coordinator while the gate is
/// closed, and by a vCPU thread when the driver resets or starts the device.
struct Core<M> {
    queues: Option<Queues<M>>,
    live: bool,
    /// Queues to be looked at, a bit for each.
    pending: u32,
    /// Pairs for whose frames the output was full, a bit for each.
    stalled: u32,
    /// Frames and commands of the guest on their way.
    buffer: Bounce,
}

impl<M: GuestMemory> Shared<M> {
    pub(super) fn new(
        mac: MacAddr,
        port: Arc<dyn FramePort>,
        output: Arc<Output>,
        host: &DeviceHost<M>,
    ) -> io::Result<Self> {
        let queues = 2 * port.pairs() + 1;
        Ok(Self {
            port,
            output,
            gate: host.gate.clone(),
            waker: host.waker.clone(),
            counters: Counters::default(),
            kicks: (0..queues).map(|_| event()).collect::<io::Result<_>>()?,
            wake: Wake::new()?,
            complaints: Complaints::default(),
            core: Mutex::new(Core { queues: None, live: false, pending: 0, stalled: 0, buffer: bounce() }),
            settings: Mutex::new(Settings::new(mac)),
            told: Mutex::new(None),
            announcing: Mutex::new(None),
        })
    }

    /// The driver is ready with these queues.
    pub(super) fn install(&self, queues: Queues<M>) {
        let mut core = self.core();
        self.settings_mut().offloads = queues.features & GUEST_OFFLOADS;
        core.queues = Some(queues);
        core.look_everywhere();
        drop(core);
        self.wake.wake();
    }

    /// The driver has no queues any more, and its settings are those of a card with this address.
    pub(super) fn uninstall(&self, mac: MacAddr) {
        let mut core = self.core();
        core.queues = None;
        *self.settings_mut() = Settings::new(mac);
        drop(core);
        self.wake.wake();
    }

    /// The settings of a saved driver.
    pub(super) fn set_up(&self, settings: Settings) {
        let core = self.core();
        *self.settings_mut() = settings;
        drop(core);
        self.wake.wake();
    }

    pub(super) fn settings(&self) -> Settings {
        *self.settings_mut()
    }

    pub(super) fn with_queues<T>(&self, look: impl FnOnce(&Queues<M>) -> T) -> Option<T> {
        self.core().queues.as_ref().map(look)
    }

    /// See [`super::NetDevice::go_live`]. Says whether the driver has been asked to announce the guest.
    pub(super) fn go_live(&self, announce: bool) -> bool {
        let mut core = self.core();
        let stale = drain(&*self.port, &mut core.buffer);
        let asks = announce
            && core.queues.as_ref().is_some_and(|queues| {
                queues.features & GUEST_ANNOUNCE != 0 && queues.control_index().is_some()
            });
        if asks {
            self.settings_mut().announce = true;
        }
        core.live = true;
        core.look_everywhere();
        let waiting = core.queues.as_mut().map_or(0, |queues| {
            queues.line.signal_used();
            queues.forget_waiting()
        });
        self.counters.stale.fetch_add(stale + waiting, Ordering::Relaxed);
        drop(core);
        self.waker.wake();
        if announce {
            let packet = announce::packet(self.settings().mac);
            *self.announcing() = Some((Schedule::new(Instant::now()), packet));
            self.announce_if_due();
        }
        self.wake.wake();
        asks
    }

    /// Makes the thread look at everything it is told.
    pub(super) fn ring(&self) {
        self.wake.wake();
    }

    pub(super) fn is_live(&self) -> bool {
        self.core().live
    }

    fn announce_if_due(&self) {
        let mut announcing = self.announcing();
        if let Some((schedule, packet)) = &mut *announcing {
            if schedule.take_due(Instant::now()) {
                self.output.announce(&packet[..]);
            }
            if schedule.next_at().is_none() {
                *announcing = None;
            }
        }
    }

    /// Tells the port what it has to know of the settings.
    fn tell_port(&self) {
        let Settings { offloads, pairs, .. } = self.settings();
        let wanted = Told { offloads, pairs };
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *told;
        if before.is_none_or(|before| before.offloads != offloads)
            && let Err(error) = self.port.set_offloads(offloads)
        {
            // Frames then come as before, and those that the guest cannot take are dropped.
            complain!(warn, self.complaints, %error, offloads, "the tap does not take over its offloads");
        }
        if before.is_none_or(|before| before.pairs != pairs)
            && let Err(error) = self.port.set_pairs(pairs.into())
        {
            complain!(warn, self.complaints, %error, pairs, "the tap does not change its number of queues");
        }
        *told = Some(wanted);
    }

    #[cfg(test)]
    pub(super) fn told(&self) -> Option<(u64, u16)> {
        let told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.map(|told| (told.offloads, told.pairs))
    }

    fn core(&self) -> MutexGuard<'_, Core<M>> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settings_mut(&self) -> MutexGuard<'_, Settings> {
        self.settings.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn announcing(&self) -> MutexGuard<'_, Option<(Schedule, [u8; announce::PACKET])>> {
        self.announcing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const fn rx_bit(pair: usize) -> u32 {
    1 << (2 * pair)
}

const fn tx_bit(pair: usize) -> u32 {
    rx_bit(pair) << 1
}

/// The transmit queues of all pairs.
const ALL_TX: u32 = 0xaaaa_aaaa;

impl<M: GuestMemory> Core<M> {
    fn look_everywhere(&mut self) {
        self.pending = !0;
    }

    /// Does a batch of what is pending. Says whether another batch must follow.
    fn batch(&mut self, shared: &Shared<M>, pass: &Pass<'_>) -> bool {
        let Self { queues, live, pending, stalled, buffer } = self;
        let Some(queues) = queues.as_mut().filter(|queues| *live && !queues.line.needs_reset()) else {
            return false;
        };
        let way = Way { port: &*shared.port, output: &shared.output, counters: &shared.counters, pass };
        let run = Run { queues, pending, stalled, buffer, waker: &*shared.waker, way };
        let before = shared.settings();
        let mut settings = before;
        let result = run.all(&mut settings);
        if settings != before {
            *shared.settings_mut() = settings;
            // What waits was meant for the settings before.
            (0..queues.forget_waiting()).for_each(|_| shared.counters.drop_received());
            // The port has to be told, and pairs that come into use to be looked at.
            *pending = !0;
            shared.wake.wake();
        }
        match result {
            Ok(more) => more,
            Err(reason) => {
                complain!(error, shared.complaints, %reason, "the network device stops until the driver resets it");
                queues.line.fail();
                shared.waker.wake();
                false
            }
        }
    }
}

/// One batch.
struct Run<'a, M> {
    queues: &'a mut Queues<M>,
    pending: &'a mut u32,
    stalled: &'a mut u32,
    buffer: &'a mut Bounce,
    waker: &'a dyn Waker,
    way: Way<'a>,
}

impl<M: GuestMemory> Run<'_, M> {
    fn all(mut self, settings: &mut Settings) -> Result<bool, Broken> {
        let mut more = self.control(settings)?;
        for pair in 0..settings.pairs.into() {
            more |= self.transmit(pair)?;
            more |= self.receive(pair, settings.offloads)?;
        }
        Ok(more)
    }

    /// Takes a queue off the list if it is there.
    fn take(&mut self, bit: u32) -> bool {
        let pending = *self.pending & bit != 0;
        *self.pending &= !bit;
        pending
    }

    /// Puts a queue back on the list if there is more to do.
    fn put_back(&mut self, bit: u32, turn: Turn) -> bool {
        if turn == Turn::More {
            *self.pending |= bit;
        }
        turn == Turn::More
    }

    fn control(&mut self, settings: &mut Settings) -> Result<bool, Broken> {
        let Some(index) = self.queues.control_index() else { return Ok(false) };
        if !self.take(1 << index) {
            return Ok(false);
        }
        let turn = self.queues.obey(settings, self.buffer, self.way.pass)?;
        Ok(self.put_back(1 << index, turn))
    }

    fn transmit(&mut self, pair: usize) -> Result<bool, Broken> {
        if !self.take(tx_bit(pair)) {
            return Ok(false);
        }
        let (turn, taken) = self.queues.transmit(pair, &self.way, self.buffer)?;
        // A guest whose frames had to stay with it may have gone idle for want of room to send.
        if taken > 0 {
            if *self.stalled & 1 << pair != 0 {
                self.waker.wake();
            }
            *self.stalled &= !(1 << pair);
        }
        if turn == Turn::Full {
            *self.stalled |= 1 << pair;
        }
        Ok(self.put_back(tx_bit(pair), turn))
    }

    fn receive(&mut self, pair: usize, offloads: u64) -> Result<bool, Broken> {
        if !self.take(rx_bit(pair)) {
            return Ok(false);
        }
        let (turn, delivered) = self.queues.receive(pair, &self.way, offloads)?;
        if delivered > 0 {
            self.waker.wake();
        }
        Ok(self.put_back(rx_bit(pair), turn))
    }
}

/// Throws away what the tap has queued for a machine that did not run here.
fn drain(port: &dyn FramePort, buffer: &mut Bounce) -> u64 {
    let mut stale = 0;
    for pair in 0..port.pairs() {
        while stale < MAX_STALE && port.receive(pair, &mut buffer[..]).is_ok() {
            stale += 1;
        }
    }
    stale
}

impl<M: GuestMemory + Send + Sync + 'static> Work for Shared<M> {
    fn name(&self) -> &'static str {
        "outlive-net"
    }

    fn gate(&self) -> &DeviceGate {
        &self.gate
    }

    fn wake(&self) -> &Wake {
        &self.wake
    }

    /// The queues' notifications, then the ports, then the output.
    fn sources(&self) -> Vec<RawFd> {
        let kicks = self.kicks.iter().map(AsRawFd::as_raw_fd);
        let ports = (0..self.port.pairs()).map(|pair| self.port.fd(pair));
        kicks.chain(ports).chain([self.output.space().as_raw_fd()]).collect()
    }

    fn deadline(&self) -> Option<Instant> {
        self.announcing().as_ref().and_then(|(schedule, _)| schedule.next_at())
    }

    fn awake(&self) {
        self.announce_if_due();
        self.tell_port();
    }

    fn batch(&self, ready: &[usize], pass: &Pass<'_>) -> bool {
        let mut core = self.core();
        for &source in ready {
            core.pending |= match source.checked_sub(self.kicks.len()) {
                None => 1 << source,
                Some(pair) if pair < self.port.pairs() => rx_bit(pair),
                Some(_) => ALL_TX,
            };
        }
        core.batch(self, pass)
    }

    /// What passes through leaves here: a pause does not wait for the tap.
    fn rest(&self) {
        self.output.drain_if_open();
    }
}
