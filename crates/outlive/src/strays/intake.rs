//! The new host's part: opens the datagrams that come, and gives their frames to whoever has the guest.

use std::io::{self, ErrorKind};
use std::net::{Shutdown, SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use outlive_epoch::StrayKey;
use socket2::SockRef;

use super::seal::Opener;
use crate::process;

/// How long a host that has taken the VM over still gives it strays.
const AFTER: Duration = Duration::from_secs(2);
/// The largest datagram.
const DATAGRAM: usize = 64 << 10;
/// How long the thread rests after an error that it does not know.
const REST: Duration = Duration::from_millis(100);

/// Who takes the frames of a link.
pub(crate) trait Sink: Send + Sync {
    /// Takes a frame of a queue pair, with its header, or not: then it is lost.
    fn stray(&self, pair: u16, packet: &[u8]);
}

/// The link whose strays are taken.
struct Taking {
    opener: Opener,
    sink: Weak<dyn Sink>,
    /// The VM runs here: until then it is given what still comes, and this keeps the sink.
    running: Option<(Instant, Arc<dyn Sink>)>,
}

/// The standby's port for strays. Clones share it.
#[derive(Clone)]
pub(crate) struct Intake(Arc<Shared>);

struct Shared {
    /// Until the thread has it.
    socket: Mutex<Option<UdpSocket>>,
    taking: Mutex<Option<Taking>>,
}

impl Intake {
    /// Claims the port of the same number as that of the links. Nothing is taken yet.
    ///
    /// # Errors
    /// The operating system's: somebody else may have it.
    pub(crate) fn claim(beside: SocketAddr) -> io::Result<Self> {
        let socket = UdpSocket::bind(beside)?;
        // Nothing is ever sent there, so nobody shall be able to, wherever it leads. Linux says that it leads nowhere, and
        // does it all the same (`inet_shutdown` in net/ipv4/af_inet.c).
        let _ = SockRef::from(&socket).shutdown(Shutdown::Write);
        Ok(Self(Arc::new(Shared { socket: Mutex::new(Some(socket)), taking: Mutex::default() })))
    }

    /// Takes strays from now on, on a thread of its own. Does nothing if there is one.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn open(&self) -> io::Result<()> {
        let socket = self.0.socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(socket) = socket else { return Ok(()) };
        let intake = self.clone();
        outlive_machine::spawn("strays", move || intake.serve(&socket)).map(drop)
    }

    /// A link is accepted: what is sealed with this key goes to `sink`. The link before has no key any more.
    pub(crate) fn expect(&self, key: &StrayKey, sink: Weak<dyn Sink>) {
        *self.taking() = Some(Taking { opener: Opener::new(key), sink, running: None });
    }

    /// The VM runs here, and `sink` gives it what still comes for a while.
    pub(crate) fn runs_here(&self, sink: Arc<dyn Sink>) {
        if let Some(taking) = &mut *self.taking() {
            taking.running = Some((Instant::now() + AFTER, sink));
        }
    }

    fn serve(&self, socket: &UdpSocket) {
        let mut buffer = vec![0; DATAGRAM];
        loop {
            match socket.recv(&mut buffer) {
                Ok(len) => self.take(&mut buffer[..len]),
                Err(error)
                    if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionRefused) => {}
                Err(error) => {
                    tracing::debug!(%error, "cannot read strays");
                    std::thread::sleep(REST);
                }
            }
        }
    }

    pub(super) fn take(&self, datagram: &mut [u8]) {
        let mut taking = self.taking();
        let Some(link) = &mut *taking else { return };
        if link.running.as_ref().is_some_and(|(until, _)| *until <= Instant::now()) {
            *taking = None;
            return;
        }
        let Some((pair, packet)) = link.opener.open(datagram) else { return };
        if let Some(sink) = link.sink.upgrade() {
            sink.stray(pair, packet);
        }
    }

    /// The socket that nobody serves yet.
    #[cfg(test)]
    pub(super) fn socket(&self) -> UdpSocket {
        self.0.socket.lock().unwrap().as_ref().unwrap().try_clone().unwrap()
    }

    fn taking(&self) -> MutexGuard<'_, Option<Taking>> {
        self.0.taking.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Draws the key of a new link.
///
/// # Errors
/// The operating system's, when it has no random bytes.
pub(crate) fn draw_key() -> io::Result<StrayKey> {
    process::random().map(StrayKey)
}
