//! Which host sends with the VM's address: every frame that leaves a host, with the kernel's time.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::cmsg_space;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, bind, recvmsg,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_gettime};

use crate::support::{Side, World};

/// The VM's address on the wire.
pub(super) const MAC: [u8; 6] = [0x02, 0x00, 0x0a, 0x4d, 0x00, 0x02];
/// The port of each host's bridge towards the clients.
const PORT: &str = "up";
/// `PACKET_OUTGOING`
const OUTGOING: u8 = 4;

/// Listens on one host until it is dropped.
pub(super) struct Sniffer {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    /// Times of frames on `CLOCK_MONOTONIC`, in microseconds.
    frames: Mutex<Vec<u64>>,
    seen: AtomicU64,
}

impl Sniffer {
    pub(super) fn start(world: &World, side: Side) -> Sniffer {
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        world.on(side, || {
            let mut ports = getifaddrs().unwrap().filter(|it| it.interface_name == PORT);
            let port = ports.find_map(|it| it.address?.as_link_addr().copied()).expect("the port is there");
            let socket =
                socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
                    .unwrap();
            bind(socket.as_raw_fd(), &port).unwrap();
            setsockopt(&socket, sockopt::ReceiveTimestampns, &true).unwrap();
            // As large as allowed. Frames that are lost even so are not seen, which proves nobody innocent.
            setsockopt(&socket, sockopt::RcvBuf, &(8 << 20)).unwrap();
            thread::spawn(move || listen(&theirs, &socket));
        });
        Sniffer { shared }
    }

    /// The times of all frames since the last call.
    pub(super) fn take(&self) -> Vec<u64> {
        std::mem::take(&mut self.shared.frames.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// How many frames there were in all.
    pub(super) fn seen(&self) -> u64 {
        self.shared.seen.load(Ordering::Relaxed)
    }
}

impl Drop for Sniffer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }
}

fn listen(shared: &Shared, socket: &OwnedFd) {
    while !shared.stop.load(Ordering::Relaxed) {
        let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        if poll(&mut ready, 100u16).is_ok_and(|count| count > 0) {
            while let Some(found) = frame(socket) {
                let Some(time) = found else { continue };
                shared.frames.lock().unwrap_or_else(PoisonError::into_inner).push(time);
                shared.seen.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}

/// The next frame, if there is one: when it left, or nothing if the VM did not send it.
fn frame(socket: &OwnedFd) -> Option<Option<u64>> {
    let mut addresses = [0; 12];
    let mut space = cmsg_space!(TimeSpec);
    let mut parts = [IoSliceMut::new(&mut addresses)];
    let message =
        recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::MSG_DONTWAIT).ok()?;
    let leaves = message.address.is_some_and(|from| from.pkttype() == OUTGOING);
    let time = message.cmsgs().ok().and_then(|mut messages| {
        messages.find_map(|message| match message {
            ControlMessageOwned::ScmTimestampns(time) => Some(time),
            _ => None,
        })
    });
    let length = message.bytes;
    let time = time.filter(|_| leaves && length == addresses.len() && addresses[6..] == MAC);
    Some(time.map(monotonic))
}

/// The kernel's time is wall-clock time.
fn monotonic(time: TimeSpec) -> u64 {
    let wall = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME).unwrap());
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap());
    (now - wall.saturating_sub(Duration::from(time))).as_micros() as u64
}

/// A change of the VM's host: when the host had won a generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owned {
    pub(super) since: u64,
    pub(super) generation: u64,
    pub(super) side: Side,
}

/// The times of frames from a host that did not have the VM.
pub(super) fn strangers(owners: &[Owned], side: Side, frames: &[u64]) -> Vec<u64> {
    let has = |time: u64| {
        let last = owners.iter().filter(|owner| owner.since <= time).max_by_key(|owner| owner.generation);
        last.is_some_and(|owner| owner.side == side)
    };
    frames.iter().copied().filter(|&time| !has(time)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_owner_of_the_newest_generation_may_send() {
        let owner = |since, generation, side| Owned { since, generation, side };
        let owners =
            [owner(10, 1, Side::A), owner(20, 2, Side::B), owner(30, 3, Side::B), owner(40, 4, Side::A)];
        assert_eq!(strangers(&owners, Side::A, &[11, 19, 21, 35, 41]), [21, 35]);
        assert_eq!(strangers(&owners, Side::B, &[9, 11, 20, 39, 41]), [9, 11, 41]);
    }
}
