//! The new host's part: opens the datagrams that come, and gives their frames to whoever has the guest.

use std::io::{self, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use outlive_epoch::StrayKey;

use super::AFTER;
use super::seal::Opener;
use crate::process;

/// The largest datagram.
const DATAGRAM: usize = 64 << 10;
/// How long the thread rests after an error that it does not know.
const REST: Duration = Duration::from_millis(100);

/// Who takes the frames of a link: a queue pair, and a packet with its header.
pub(crate) trait Sink: Send + Sync {
    /// Takes a frame, or not: then it is lost.
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
#[derive(Clone, Default)]
pub(crate) struct Door(Arc<Mutex<Option<Taking>>>);

impl Door {
    /// Takes strays at this socket from now on, on a thread of its own.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn open(&self, socket: UdpSocket) -> io::Result<()> {
        let door = self.clone();
        outlive_machine::spawn("strays", move || door.serve(&socket)).map(drop)
    }

    /// Draws the key of a new link, whose frames `sink` takes. The link before has none any more.
    ///
    /// # Errors
    /// The operating system's, when it has no random bytes.
    pub(crate) fn expect(&self, sink: Weak<dyn Sink>) -> io::Result<StrayKey> {
        let key = StrayKey(process::random()?);
        *self.taking() = Some(Taking { opener: Opener::new(&key), sink, running: None });
        Ok(key)
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
            match socket.recv_from(&mut buffer) {
                Ok((len, _)) => self.take(&mut buffer[..len]),
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

    fn taking(&self) -> MutexGuard<'_, Option<Taking>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Claims the port for strays beside that of the links.
///
/// # Errors
/// The operating system's: somebody else may have it.
pub(crate) fn claim(beside: SocketAddr) -> io::Result<UdpSocket> {
    UdpSocket::bind(beside)
}
