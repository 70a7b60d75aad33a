//! The old host's part: what waits in the tap's queues follows the guest.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, send};
use nix::unistd::read;
use outlive_epoch::StrayKey;
use outlive_machine::{MAX_PACKET, MacAddr, PACKET_HEADER};

use super::seal::{AROUND, By, Sealer};

/// Later nobody waits for a frame: TCP has sent it again.
const LONGEST: Duration = Duration::from_millis(500);
/// How often it is looked whether forwarding is still wanted.
const LOOK: Duration = Duration::from_millis(10);
/// The most that fits into a datagram over IPv4.
const MOST: usize = 65_507 - AROUND;
/// Frames in one turn of a queue, so that the others have theirs.
const TURN: usize = 64;

/// From the queues of a tap to the standby.
pub(crate) struct Forwarder<'a> {
    /// `None`: there is nothing to be had from it any more.
    queues: Vec<Option<BorrowedFd<'a>>>,
    to: BorrowedFd<'a>,
    sealer: Sealer,
    guest: MacAddr,
    packet: Vec<u8>,
    datagram: Vec<u8>,
    sent: u64,
    /// The guest was heard from elsewhere.
    heard: bool,
}

impl<'a> Forwarder<'a> {
    /// `to` leads to the standby; the guest's own frames are told by its address.
    pub(crate) fn new(
        queues: impl IntoIterator<Item = BorrowedFd<'a>>,
        to: BorrowedFd<'a>,
        key: &StrayKey,
        by: By,
        guest: MacAddr,
    ) -> Self {
        let (queues, sealer) = (queues.into_iter().map(Some).collect(), Sealer::new(key, by));
        let (packet, datagram) = (vec![0; MAX_PACKET], Vec::with_capacity(MAX_PACKET + AROUND));
        Self { queues, to, sealer, guest, packet, datagram, sent: 0, heard: false }
    }

    /// Forwards while it is wanted, and the guest was not heard, and it is not too late. Returns the number of frames.
    pub(crate) fn forward(&mut self, wanted: impl Fn() -> bool) -> u64 {
        let until = Instant::now() + LONGEST;
        while wanted() && Instant::now() < until && self.queues.iter().any(Option::is_some) {
            let ready = self.wait();
            // What has come before the guest's own words is forwarded, too.
            if ready.is_empty() && self.heard {
                break;
            }
            ready.into_iter().for_each(|pair| self.take_turn(pair));
        }
        self.sent
    }

    /// Waits a moment until frames wait. Returns in which queues, and drops those that are broken: the interface was
    /// deleted, for example.
    fn wait(&mut self) -> Vec<u16> {
        let open: Vec<_> = (0..).zip(&self.queues).filter_map(|(pair, it)| Some((pair, (*it)?))).collect();
        let mut on: Vec<_> = open.iter().map(|(_, it)| PollFd::new(*it, PollFlags::POLLIN)).collect();
        let patience = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
        if poll(&mut on, patience).is_err() {
            return Vec::new();
        }
        let mut ready = Vec::new();
        for ((pair, _), it) in open.iter().zip(&on) {
            match it.revents().unwrap_or(PollFlags::empty()) {
                some if some.contains(PollFlags::POLLIN) => ready.push(*pair),
                none if none.is_empty() => {}
                _ => self.queues[usize::from(*pair)] = None,
            }
        }
        ready
    }

    fn take_turn(&mut self, pair: u16) {
        let Some(queue) = self.queues[usize::from(pair)] else { return };
        for _ in 0..TURN {
            match read(queue, &mut self.packet) {
                Ok(len) => self.pass_on(pair, len),
                Err(Errno::EINTR) => {}
                Err(_) => return,
            }
        }
    }

    fn pass_on(&mut self, pair: u16, len: usize) {
        let packet = &self.packet[..len.min(self.packet.len())];
        // Destination and source come first in a frame.
        let Some(from) = packet.get(PACKET_HEADER + 6..PACKET_HEADER + 12) else { return };
        if from == self.guest.0 {
            self.heard = true;
            return;
        }
        if packet.len() > MOST || !self.sealer.seal(pair, packet, &mut self.datagram) {
            return;
        }
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        // A connected socket tells of what became of the datagram before. That one is lost, and this one need not be.
        for _ in 0..2 {
            match send(self.to.as_raw_fd(), &self.datagram, flags).map_err(io::Error::from) {
                Ok(_) => {
                    self.sent += 1;
                    break;
                }
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
                Err(_) => break,
            }
        }
    }
}
