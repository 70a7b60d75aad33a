//! Strays: frames that reach a host when the guest is gone from there.
//!
//! Between the death of a host and the first words of the VM at the next one, the network still sends frames for the guest
//! to the old host. Nobody has them then but the queue of the tap there. TCP sends them again, but only after a timer of
//! 200 ms and more, which is many times what the takeover takes. So the old host sends them after the guest.
//!
//! ```text
//! old host   tap's queue ──► forward.rs ──► seal.rs ──► UDP
//! new host                                              UDP ──► intake.rs: opened ──► kept until the guest runs, then given
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

mod forward;
mod intake;
mod seal;
#[cfg(test)]
mod tests;

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use outlive_epoch::StrayKey;
use outlive_machine::{MacAddr, Tap};

pub(crate) use forward::Forwarder;
pub(crate) use intake::{Intake, Sink, draw_key};
pub(crate) use seal::By;

/// The part of a link by which strays follow the guest.
///
/// It has no socket until one is needed. A socket for datagrams leads wherever whoever has it pleases, and every thread of
/// this process would have it; see `sandbox/`.
#[derive(Debug)]
pub(crate) struct Strays {
    tap: Tap,
    guest: MacAddr,
    standby: SocketAddr,
    key: StrayKey,
    used: AtomicBool,
}

impl Strays {
    /// Of the guest with this tap, which is open once more for this, to the standby at this address, where the link leads,
    /// too. The standby has named the key.
    pub(crate) fn new(tap: Tap, guest: MacAddr, standby: SocketAddr, key: StrayKey) -> Arc<Self> {
        Arc::new(Self { tap, guest, standby, key, used: AtomicBool::new(false) })
    }

    /// The tap's queues.
    pub(crate) fn queues(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.tap.queues()
    }

    /// The key, and who the guest is.
    pub(crate) fn secret(&self) -> (&StrayKey, MacAddr) {
        (&self.key, self.guest)
    }

    /// A socket that leads to the standby. For a thread that may make connections.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn socket(&self) -> io::Result<UdpSocket> {
        let any = match self.standby {
            SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
        socket.connect(self.standby)?;
        Ok(socket)
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
        let (to, strays, stopped) = (self.socket()?, self.clone(), Arc::new(AtomicBool::new(false)));
        let following = Following(stopped.clone());
        outlive_machine::spawn("strays", move || {
            let Self { key, guest, .. } = &*strays;
            let mut forwarder = Forwarder::new(strays.queues(), to.as_fd(), key, By::Process, *guest);
            let sent = forwarder.forward(|| !stopped.load(Ordering::Acquire));
            tracing::debug!(sent, "strays have followed the guest");
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
