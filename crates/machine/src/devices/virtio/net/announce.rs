//! Announces where the guest is: after a takeover the network's switches still send its frames to the old
//! host.
//!
//! A RARP request (RFC 903) from the guest's address makes every switch on the way learn the new port. It
//! says nothing about the guest's IP address and no host answers it, so it may leave although the VM's output
//! is held.

use std::time::{Duration, Instant};

use super::mac::MacAddr;
use super::offload::HEADER;

/// Length of an announcement: the shortest Ethernet frame without its checksum.
pub const FRAME: usize = 60;

/// Length of an announcement as the output takes it.
pub const PACKET: usize = HEADER + FRAME;

/// When announcements go out after a machine has gone live. More than one because a switch port may come up
/// late.
const SCHEDULE_MS: [u64; 5] = [0, 50, 150, 250, 350];

/// The frame that announces `mac`.
pub fn rarp(mac: MacAddr) -> [u8; FRAME] {
    const BROADCAST: [u8; 6] = [0xff; 6];
    /// EtherType of RARP; then hardware Ethernet, protocol IPv4, their address lengths, operation "request
    /// reverse".
    const HEADER: [u8; 10] = [0x80, 0x35, 0, 1, 0x08, 0x00, 6, 4, 0, 3];
    let mut frame = [0; FRAME];
    frame[..6].copy_from_slice(&BROADCAST);
    frame[6..12].copy_from_slice(&mac.0);
    frame[12..22].copy_from_slice(&HEADER);
    frame[22..28].copy_from_slice(&mac.0); // sender; its IP address stays 0
    frame[32..38].copy_from_slice(&mac.0); // target; its IP address stays 0
    frame
}

/// The same behind a header that leaves nothing to do.
pub fn packet(mac: MacAddr) -> [u8; PACKET] {
    let mut packet = [0; PACKET];
    packet[HEADER..].copy_from_slice(&rarp(mac));
    packet
}

/// Which announcements of a machine are still due.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    start: Instant,
    done: usize,
}

impl Schedule {
    /// A schedule whose first announcement is due at `start`.
    pub fn new(start: Instant) -> Self {
        Self { start, done: 0 }
    }

    /// Whether an announcement is due at `now`; counts it as made. If several are overdue they count as one.
    pub fn take_due(&mut self, now: Instant) -> bool {
        let before = self.done;
        while self.next_at().is_some_and(|at| at <= now) {
            self.done += 1;
        }
        self.done > before
    }

    /// When the next announcement is due; `None` after the last.
    pub fn next_at(&self) -> Option<Instant> {
        SCHEDULE_MS.get(self.done).map(|&ms| self.start + Duration::from_millis(ms))
    }
}
