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

use super::seal::{AROUND, Sealer, Sender};

/// Later nobody waits for a frame: TCP has sent it again.
const LONGEST: Duration = Duration::from_millis(500);
/// How often it is looked whether forwarding is still wanted.
const LOOK: Duration = Duration::from_millis(10);
/// The most that fits into a datagram over IPv4.
const MOST: usize = 65_507 - AROUND;
/// Frames in one turn of a queue, so that the others have theirs.
const TURN: usize = 64;

/// From the queues of a tap to the standby.
pub(crate) struct Way<'a> {
    queues: &'a [BorrowedFd<'a>],
    to: BorrowedFd<'a>,
    sealer: Sealer,
    guest: MacAddr,
    packet: Vec<u8>,
    datagram: Vec<u8>,
    sent: u64,
    /// The guest was heard from elsewhere.
    heard: bool,
}

impl<'a> Way<'a> {
    /// `to` leads to the standby; the guest's own frames are told by its address.
    pub(crate) fn new(
        queues: &'a [BorrowedFd<'a>],
        to: BorrowedFd<'a>,
        key: &StrayKey,
        sender: Sender,
        guest: MacAddr,
    ) -> Self {
        let sealer = Sealer::new(key, sender);
        let (packet, datagram) = (vec![0; MAX_PACKET], Vec::with_capacity(MAX_PACKET + AROUND));
        Self { queues, to, sealer, guest, packet, datagram, sent: 0, heard: false }
    }

    /// Forwards while it is wanted, and the guest was not heard, and it is not too late. Returns the number of frames.
    pub(crate) fn forward(&mut self, wanted: impl Fn() -> bool) -> u64 {
        let until = Instant::now() + LONGEST;
        while wanted() && Instant::now() < until {
            let mut on: Vec<_> = self.queues.iter().map(|it| PollFd::new(*it, PollFlags::POLLIN)).collect();
            let patience = PollTimeout::try_from(LOOK).unwrap_or(PollTimeout::ZERO);
            let ready = match poll(&mut on, patience) {
                Err(Errno::EINTR) => continue,
                Err(_) => break,
                Ok(ready) => ready,
            };
            // Also what came before the guest's own words is forwarded.
            if ready == 0 && self.heard {
                break;
            }
            let readable = |it: &PollFd<'_>| it.revents().is_some_and(|on| on.contains(PollFlags::POLLIN));
            let some: Vec<_> = (0..).zip(&on).filter(|(_, it)| readable(it)).map(|(pair, _)| pair).collect();
            // A queue that is out of use, or whose interface was deleted, is an error only.
            if ready > 0 && some.is_empty() {
                break;
            }
            for pair in some {
                self.take_turn(pair);
            }
        }
        self.sent
    }

    fn take_turn(&mut self, pair: u16) {
        for _ in 0..TURN {
            match read(self.queues[usize::from(pair)], &mut self.packet) {
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
