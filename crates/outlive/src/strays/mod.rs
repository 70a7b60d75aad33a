//! Strays: frames that reach a host when the guest is gone from there.
//!
//! Between the death of a host and the first words of the VM at the next one, the network still sends frames for the guest
//! to the old host. Nobody has them then but the queue of the tap there. TCP sends them again, but only after a timer of
//! 200 ms and more, which is many times what the takeover takes. So the old host sends them after the guest.
//!
//! ```text
//! old host   tap's queue ──► forward.rs ──► seal.rs ──► UDP
//! new host                                              UDP ──► door.rs: opened ──► kept until the guest runs, then given
//! ```
//!
//! - Who forwards: the sentinel (`sentinel/`) when its process dies, which has duplicates of the tap's queues; or the
//!   process itself when it hands its VM over. Either ends when it hears the guest speak from elsewhere, because then the
//!   network knows where the guest is, or after half a second.
//! - With what: the standby draws a key for each link and tells it inside the link
//!   ([`Accept::strays`](outlive_epoch::Accept::strays)). A datagram that was not sealed with it is dropped, and so is one
//!   that has come before.
//! - Nobody depends on it: it is as good as a network that delays frames, or repeats them, or loses them. The guest is given
//!   input that was meant for it; nothing of it is output. A firewall that drops the datagrams costs the clients TCP's timer.

mod door;
mod forward;
mod seal;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use outlive_epoch::StrayKey;
use outlive_machine::MacAddr;

pub(crate) use door::{Door, Sink, claim};
pub(crate) use forward::Way;
pub(crate) use seal::Sender;

/// How long a host that has taken the VM over still gives it strays.
const AFTER: Duration = Duration::from_secs(2);

/// The part of a link by which strays follow the guest.
#[derive(Debug)]
pub(crate) struct Strays {
    queues: Vec<OwnedFd>,
    to: UdpSocket,
    key: StrayKey,
    guest: MacAddr,
    used: AtomicBool,
}

impl Strays {
    /// Of a card whose tap has these queues. `to` leads to the standby, which has named the key.
    pub(crate) fn new(queues: Vec<OwnedFd>, to: UdpSocket, key: StrayKey, guest: MacAddr) -> Arc<Self> {
        Arc::new(Self { queues, to, key, guest, used: AtomicBool::new(false) })
    }

    /// What somebody needs who forwards when this process is gone: the socket first, then the queues.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        [self.to.as_fd()].into_iter().chain(self.queues.iter().map(AsFd::as_fd))
    }

    /// The key, and who the guest is.
    pub(crate) fn secret(&self) -> (&StrayKey, MacAddr) {
        (&self.key, self.guest)
    }

    /// Forwards on a thread of its own, until the guest is heard from elsewhere, or the answer is told to stop. The guest
    /// does not run here any more. `None` if that was done before: a key seals nothing twice.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn follow(self: &Arc<Self>) -> io::Result<Option<Following>> {
        if self.used.swap(true, Ordering::AcqRel) {
            return Ok(None);
        }
        let (strays, stopped) = (self.clone(), Arc::new(AtomicBool::new(false)));
        let following = Following(stopped.clone());
        outlive_machine::spawn("strays", move || {
            let queues: Vec<_> = strays.queues.iter().map(AsFd::as_fd).collect();
            let mut way = Way::new(&queues, strays.to.as_fd(), &strays.key, Sender::Process, strays.guest);
            let sent = way.forward(|| !stopped.load(Ordering::Acquire));
            tracing::debug!(sent, "frames that came too late for this host have followed the guest");
        })?;
        Ok(Some(following))
    }
}

/// Strays follow the guest.
#[derive(Debug)]
pub(crate) struct Following(Arc<AtomicBool>);

impl Following {
    /// No more of them: the guest runs here again.
    pub(crate) fn stop(&self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A socket that leads to the standby at this address, where the link leads, too.
///
/// # Errors
/// The operating system's.
pub(crate) fn towards(standby: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match standby {
        SocketAddr::V4(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(standby)?;
    Ok(socket)
}
