//! The network card: what a driver reads and sets, and what the port and the network are told.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use thiserror::Error;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};
use vm_memory::GuestMemory;

use super::announce::{self, Schedule};
use super::control::Settings;
use super::frames::{Bounce, Pair, bounce, rx_bit};
use super::mac::MacAddr;
use super::nowhere::Nowhere;
use super::offload::{CTRL_VQ, GUEST_ANNOUNCE, GUEST_OFFLOADS, MQ, effective, offered};
use super::output::{MAX_PACKET, Output, OutputLimits, Pushed};
use super::persist::{CardState, ImpossibleSetting};
use super::stats::{Counters, NetStats};
use super::tail::InputTail;
use super::tap::{FramePort, Tap};
use crate::devices::complaints::{Complaints, complain};
use crate::devices::valve::Permit;
use crate::devices::virtio::chain::Broken;
use crate::devices::virtio::persist::{DeviceState, TransportState};
use crate::devices::virtio::ring::Queues;
use crate::devices::virtio::slot::{Batch, CONFIG_BYTES, Core, Identity, Model, Outcome, Shared, Slot};
use crate::devices::virtio::{ActivateError, DeviceHost, MAX_QUEUES};

/// Largest size of the queues that carry frames: 256 each way.
const FRAMES: u16 = 256;
/// Largest size of the control queue.
const COMMANDS: u16 = 64;

/// Most queue pairs: with the control queue they are at most [`MAX_QUEUES`].
pub const MAX_PAIRS: u16 = 8;
const _: () = assert!(2 * (MAX_PAIRS as usize) < MAX_QUEUES);

/// Most frames that wait for the guest beside those of the port.
const MAX_STRAYS: usize = 1024;
/// Most stale frames thrown away when the device goes live: more than a tap queues by default (1000).
const MAX_STALE: u64 = 10_000;
/// The transmit queues of all pairs.
const ALL_TX: u32 = 0xaaaa_aaaa;

/// What the user chooses about a network device.
#[derive(Clone, Debug)]
pub struct NetConfig {
    /// The tap, with as many queues as there are pairs. Opening one takes rights that the process of a VM need not
    /// have, so others may have opened it. `None`: the card is connected to nothing.
    pub tap: Option<Arc<Tap>>,
    /// Address of the guest's interface.
    pub mac: MacAddr,
    /// How many queue pairs the guest may use: 1 to [`MAX_PAIRS`]. The same on both hosts.
    pub pairs: u16,
    /// The largest packet that the guest is told it may send, in bytes without the Ethernet header. `None`: it is
    /// told nothing and believes in 1500. The same on both hosts: a driver that has accepted it relies on it. The
    /// tap must carry as much.
    pub mtu: Option<u16>,
    /// How much output may be held.
    pub limits: OutputLimits,
}

/// Why a network device cannot be made.
#[derive(Debug, Error)]
pub enum NetError {
    /// The tap was opened for another number of them.
    #[error("the tap {tap} has {queues} queues, and the card has {pairs} pairs of them")]
    Queues {
        /// Its name.
        tap: String,
        /// What it has.
        queues: usize,
        /// What it should have.
        pairs: u16,
    },
    /// No queue pair, or too many.
    #[error("a network device has 1 to {MAX_PAIRS} queue pairs, not {0}")]
    Pairs(u16),
    /// The longest frame would never find room.
    #[error(
        "{0} bytes of held output are too few: allow at least {MAX_PACKET}, one frame of the largest size"
    )]
    Limits(usize),
    /// The kernel refuses an event, or the thread.
    #[error("cannot start the network device: {0}")]
    Start(#[from] io::Error),
}

/// What is special about a network card.
pub struct Net {
    pub(super) port: Arc<dyn FramePort>,
    pub(super) output: Arc<Output>,
    /// Copies of what the guest is given.
    pub(super) input: Arc<InputTail>,
    /// The largest packet that the driver is told of.
    pub(super) mtu: Option<u16>,
    pub(super) counters: Counters,
    /// Limits log lines about the tap's failures.
    pub(super) complaints: Complaints,
    /// The port's last settings. The thread sets them outside the gate, because these calls may take long.
    port_settings: Mutex<Option<PortSettings>>,
    announcing: Mutex<Option<(Schedule, [u8; announce::PACKET])>>,
}

/// What a network card works on.
pub struct Card {
    /// The address that a reset brings back.
    mac: MacAddr,
    pub(super) settings: Settings,
    /// The features in effect.
    pub(super) features: u64,
    /// The pairs that the driver has set up.
    pub(super) pairs: Vec<Pair>,
    /// Which queue is the control queue, if the driver has set one up.
    pub(super) control: Option<usize>,
    /// Pairs for whose frames the output was full, a bit for each.
    pub(super) stalled: u32,
    /// Buffers for frames and commands of the guest.
    pub(super) buffer: Bounce,
}

/// The settings that the port has to know.
#[derive(Clone, Copy, PartialEq, Eq)]
struct PortSettings {
    offloads: u64,
    pairs: u16,
}

/// A network card. It is passive until it goes live: the guest may set it up, but no frame moves before.
pub type NetDevice<M> = Slot<M, Net>;

impl<M: GuestMemory + Send + Sync + 'static> NetDevice<M> {
    /// Puts a network device in front of the tap, whose frames leave as `permit` says.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn new(config: &NetConfig, permit: Arc<Permit>, host: DeviceHost<M>) -> Result<Self, NetError> {
        if !(1..=MAX_PAIRS).contains(&config.pairs) {
            return Err(NetError::Pairs(config.pairs));
        }
        if config.limits.bytes < MAX_PACKET {
            return Err(NetError::Limits(config.limits.bytes));
        }
        match &config.tap {
            Some(tap) => Self::at_port(config, tap.clone(), permit, host),
            None => Self::at_port(config, Arc::new(Nowhere::with_pairs(config.pairs)?), permit, host),
        }
    }

    fn at_port<P: FramePort + 'static>(
        config: &NetConfig,
        port: Arc<P>,
        permit: Arc<Permit>,
        host: DeviceHost<M>,
    ) -> Result<Self, NetError> {
        let (queues, pairs) = (port.pairs(), config.pairs);
        if queues != usize::from(pairs) {
            let tap = config.tap.as_ref().map(|tap| tap.name().to_owned()).unwrap_or_default();
            return Err(NetError::Queues { tap, queues, pairs });
        }
        let output = Output::new(port.clone(), config.limits, permit)?;
        Ok(Self::with(config.mac, Net::new(port, Arc::new(output)).telling(config.mtu), host)?)
    }

    /// A network device that takes frames from `port`, which has at most [`MAX_PAIRS`] pairs, and gives
    /// frames to `output`.
    ///
    /// # Errors
    /// The operating system's, when it refuses the thread or its events.
    pub fn with_port(
        mac: MacAddr,
        port: Arc<dyn FramePort>,
        output: Arc<Output>,
        host: DeviceHost<M>,
    ) -> io::Result<Self> {
        Self::with(mac, Net::new(port, output), host)
    }

    pub(super) fn with(mac: MacAddr, net: Net, host: DeviceHost<M>) -> io::Result<Self> {
        let mut slot = Self::without_thread(net, Card::new(mac), host)?;
        slot.start_thread()?;
        // The thread knows all queues of the port now, and tells it that none but the first are in use.
        slot.shared().wake_thread();
        Ok(slot)
    }

    /// The guest's output.
    pub fn output(&self) -> &Arc<Output> {
        &self.model().output
    }

    /// Copies of what the guest is given, for a standby.
    pub fn input_tail(&self) -> &Arc<InputTail> {
        &self.model().input
    }

    /// Has the guest given a packet that another host had given it in an epoch that died with that host. It
    /// comes before everything from the port. After a restore and before the machine goes live. Returns whether
    /// there is a driver to give it to; a packet that its driver cannot take is dropped later, as one from the
    /// port.
    pub fn give(&self, pair: u16, packet: &[u8]) -> bool {
        let mut core = self.shared().core();
        let card = &mut core.model;
        // A pair that is not in use is not looked at.
        let used = usize::from(card.settings.pairs).min(card.pairs.len());
        let index = if usize::from(pair) < used { pair.into() } else { 0 };
        if packet.len() > MAX_PACKET || used == 0 {
            return false;
        }
        card.pairs[index].given.push_back(packet.into());
        true
    }

    /// Has the running guest given a stray: a packet that reached another host when the guest was gone from there. It
    /// comes before those that wait in the port, and may be lost as they may. Returns whether it was taken; only so many
    /// wait at the same time.
    pub fn give_stray(&self, pair: u16, packet: &[u8]) -> bool {
        let mut core = self.shared().core();
        let Core { queues, model: card, .. } = &mut *core;
        let used = usize::from(card.settings.pairs).min(card.pairs.len());
        let index = if usize::from(pair) < used { pair.into() } else { 0 };
        let Some(queues) = queues.as_mut().filter(|_| packet.len() <= MAX_PACKET && used > 0) else {
            return false;
        };
        let given = &mut card.pairs[index].given;
        if given.len() >= MAX_STRAYS {
            return false;
        }
        given.push_back(packet.into());
        queues.look_at(rx_bit(index));
        drop(core);
        self.shared().wake_thread();
        true
    }

    /// The tap, open once more, for somebody who has it when the guest does not run here any more.
    ///
    /// # Errors
    /// The operating system's, when there are no descriptors left.
    pub fn tap_again(&self) -> io::Result<Tap> {
        self.model().port.again()
    }

    /// Sends a packet again that the guest has sent in a committed epoch, on another host, and that may not have
    /// left there. After the output was opened and before the machine goes live, so that nothing of the guest
    /// comes before it; a [drain](Output::drain) must follow. Returns whether the packet was taken.
    pub fn repeat(&self, pair: u16, packet: &[u8]) -> bool {
        let mut core = self.shared().core();
        let card = &mut core.model;
        let features = card.features;
        let room = card.buffer.get_mut(..packet.len()).filter(|room| room.len() <= MAX_PACKET);
        let Some(room) = room else { return false };
        room.copy_from_slice(packet);
        self.model().send(pair.into(), room, features) == Some(Pushed::Taken)
    }

    /// Address of the guest's interface.
    pub fn mac(&self) -> MacAddr {
        self.shared().core().model.settings.mac
    }

    /// The counters.
    pub fn stats(&self) -> NetStats {
        self.model().counters.read()
    }

    /// The offloads and the number of pairs that the port was last told.
    #[cfg(test)]
    pub(super) fn port_settings(&self) -> Option<(u64, u16)> {
        let settings = self.model().port_settings.lock().unwrap_or_else(PoisonError::into_inner);
        settings.map(|it| (it.offloads, it.pairs))
    }
}

impl Card {
    pub(super) fn new(mac: MacAddr) -> Self {
        Self {
            mac,
            settings: Settings::new(mac),
            features: 0,
            pairs: Vec::new(),
            control: None,
            stalled: 0,
            buffer: bounce(),
        }
    }

    /// Forgets the frames that wait for buffers of the driver.
    fn forget_waiting(&mut self) -> u64 {
        self.pairs.iter_mut().filter_map(|pair| pair.waiting.take()).count() as u64
    }

    /// Forgets the frames that another host has given.
    fn forget_given(&mut self) -> u64 {
        self.pairs.iter_mut().map(|pair| pair.given.drain(..).count() as u64).sum()
    }
}

impl Net {
    pub(super) fn new(port: Arc<dyn FramePort>, output: Arc<Output>) -> Self {
        let (input, counters, complaints, port_settings, announcing) = Default::default();
        Self { port, output, input, mtu: None, counters, complaints, port_settings, announcing }
    }

    /// The same, but the driver is told of a largest packet or not.
    pub(super) fn telling(self, mtu: Option<u16>) -> Self {
        Self { mtu, ..self }
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

    /// Passes the settings that concern it to the port.
    fn tell_port(&self, settings: Settings) {
        let Settings { offloads, pairs, .. } = settings;
        let mut settings = self.port_settings.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *settings;
        if before.is_none_or(|before| before.offloads != offloads)
            && let Err(error) = self.port.set_offloads(offloads)
        {
            // Frames then come as before, and those that the guest cannot take are dropped.
            complain!(warn, self.complaints, %error, offloads, "cannot set the tap's offloads");
        }
        if before.is_none_or(|before| before.pairs != pairs)
            && let Err(error) = self.port.set_pairs(pairs.into())
        {
            complain!(warn, self.complaints, %error, pairs, "cannot change the tap's number of queues");
        }
        *settings = Some(PortSettings { offloads, pairs });
    }

    /// Throws away what the tap has queued for a machine that did not run here.
    fn drain_port(&self, buffer: &mut Bounce) -> u64 {
        let mut stale = 0;
        for pair in 0..self.port.pairs() {
            while stale < MAX_STALE && self.port.receive(pair, &mut buffer[..]).is_ok() {
                stale += 1;
            }
        }
        stale
    }

    fn announcing(&self) -> MutexGuard<'_, Option<(Schedule, [u8; announce::PACKET])>> {
        self.announcing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: GuestMemory + Send + Sync + 'static> Model<M> for Net {
    type Core = Card;
    type State = CardState;
    type Refusal = ImpossibleSetting;

    const NAME: &'static str = "network card";
    const THREAD: &'static str = "outlive-net";

    fn identity(&self) -> Identity {
        let pairs = self.port.pairs();
        let mut queue_sizes = vec![FRAMES; 2 * pairs];
        queue_sizes.push(COMMANDS);
        Identity { device_type: VIRTIO_ID_NET, features: offered(pairs, self.mtu), queue_sizes }
    }

    /// Address, link, number of queue pairs, largest packet (virtio 1.2, 5.1.4). The link is always up; a device
    /// with one pair does not say how many it has.
    fn config(&self, card: &Card) -> [u8; CONFIG_BYTES] {
        let asks = if card.settings.announce { VIRTIO_NET_S_ANNOUNCE } else { 0 };
        let status = (VIRTIO_NET_S_LINK_UP | asks) as u16;
        let pairs = self.port.pairs();
        let pairs = if pairs > 1 { pairs as u16 } else { 0 };
        let mut space = [0; CONFIG_BYTES];
        space[..6].copy_from_slice(&card.settings.mac.0);
        space[6..8].copy_from_slice(&status.to_le_bytes());
        space[8..10].copy_from_slice(&pairs.to_le_bytes());
        space[10..12].copy_from_slice(&self.mtu.unwrap_or(0).to_le_bytes());
        space
    }

    fn activate(&self, card: &mut Card, queues: &Queues<M>) -> Result<(), ActivateError> {
        queues.need(0)?;
        queues.need(1)?;
        let features = effective(queues.features);
        // A driver that does not know of several pairs finds the control queue behind the first (virtio 1.2,
        // 5.1.2). It may leave out the last pairs; they cannot come into use.
        let most = if features & MQ != 0 { self.port.pairs() } else { 1 };
        let pairs = (0..most).take_while(|pair| queues.has(2 * pair) && queues.has(2 * pair + 1));
        card.pairs = pairs.map(|_| Pair::new(FRAMES)).collect();
        card.control = Some(2 * most).filter(|&index| features & CTRL_VQ != 0 && queues.has(index));
        card.features = features;
        card.settings.offloads = features & GUEST_OFFLOADS;
        card.stalled = 0;
        Ok(())
    }

    fn reset(&self, card: &mut Card) {
        card.pairs.clear();
        card.control = None;
        card.settings = Settings::new(card.mac);
    }

    fn batch(&self, card: &mut Card, batch: Batch<'_, M>) -> Result<Outcome, Broken> {
        let Some(queues) = batch.queues else { return Ok(Outcome::default()) };
        let before = card.settings;
        let mut outcome = Outcome::default();
        let mut run = || {
            outcome.more |= self.obey(card, queues, batch.pass)?.more;
            for pair in 0..card.pairs.len().min(card.settings.pairs.into()) {
                let (sent, wake) = self.transmit(card, queues, pair, batch.pass)?;
                let received = self.receive(card, queues, pair, batch.pass)?;
                outcome.more |= sent.more || received.more;
                outcome.wake |= wake || received.done > 0;
            }
            Ok(())
        };
        let result = run();
        if card.settings != before {
            // Waiting frames were meant for the old settings.
            self.counters.rx_dropped.add(card.forget_waiting() + card.forget_given());
            // The port has to be told, and pairs that come into use to be looked at.
            queues.look_at(!0);
            outcome.more = true;
        }
        result.map(|()| outcome)
    }

    fn save(&self, card: &Card, out: &mut Vec<u8>) {
        CardState { mac: card.mac, settings: card.settings }.encode(out);
    }

    fn check(&self, state: &CardState, transport: &TransportState) -> Result<(), ImpossibleSetting> {
        state.check(transport, self.port.pairs())
    }

    fn restore(&self, card: &mut Card, state: CardState) {
        card.mac = state.mac;
        card.settings = state.settings;
    }

    /// The port, then the output (room again).
    fn sources(&self) -> Vec<RawFd> {
        let ports = (0..self.port.pairs()).map(|pair| self.port.fd(pair));
        ports.chain([self.output.space().as_raw_fd()]).collect()
    }

    fn ready(&self, _card: &mut Card, source: usize) -> u32 {
        if source < self.port.pairs() { rx_bit(source) } else { ALL_TX }
    }

    fn deadline(&self, _card: &Card) -> Option<Instant> {
        self.announcing().as_ref().and_then(|(schedule, _)| schedule.next_at())
    }

    fn awake(&self, shared: &Shared<M, Self>) {
        self.announce_if_due();
        let settings = shared.core().model.settings;
        self.tell_port(settings);
    }

    /// Frames that pass through leave here, so a pause does not wait for the tap.
    fn rest(&self, _shared: &Shared<M, Self>) {
        self.output.rest();
        self.input.tell();
    }

    /// Throws away the frames that have waited in the tap. With `announce`, asks the driver, if it knows how,
    /// to tell the network where the guest is, with the guest's own addresses.
    fn go_live(&self, card: &mut Card, queues: Option<&mut Queues<M>>, announce: bool) -> bool {
        let stale = self.drain_port(&mut card.buffer) + card.forget_waiting();
        self.counters.stale.add(stale);
        let knows = card.features & GUEST_ANNOUNCE != 0 && card.control.is_some();
        let asks = announce && queues.is_some() && knows;
        card.settings.announce |= asks;
        asks
    }

    /// Tells the network at once where the guest is, and four times more within 350 ms, not while the output
    /// discards.
    fn gone_live(&self, shared: &Shared<M, Self>, announce: bool) {
        if announce {
            let packet = announce::packet(shared.core().model.settings.mac);
            *self.announcing() = Some((Schedule::new(Instant::now()), packet));
            self.announce_if_due();
        }
    }
}
