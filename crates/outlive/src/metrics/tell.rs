//! The thread that tells what a process has counted, at a socket of its own.
//!
//! The socket of `outlive status` takes an operator's word, so only the owner of the process may use it. This one hears
//! nothing: whoever connects gets a line, in one write that does not wait, and is let go. So whoever makes metrics needs no
//! right over a VM, and many who ask keep no operator's word from being heard.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use crate::keys;
use crate::serving::ServingThread;
use crate::socket::{BindError, Listener};
use crate::status::Standing;

/// Time between two answers, in milliseconds: clients that ask all the time cost no core.
const PACE: u8 = 5;
/// Time between two looks at this host's certificate, which others may renew.
const LOOKS: Duration = Duration::from_secs(60);
/// What is added to the path of the status socket.
pub(super) const SUFFIX: &str = ".metrics";

/// Why nobody is told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TellError {
    /// There can be no socket.
    #[error(transparent)]
    Place(#[from] BindError),
    /// Nobody would answer there.
    #[error("no thread: {0}")]
    NoThread(#[source] io::Error),
}

/// The socket beside that of `outlive status`.
pub(super) fn beside(status: &Path) -> PathBuf {
    let mut path = status.to_owned().into_os_string();
    path.push(SUFFIX);
    path.into()
}

/// Tells, beside the status socket, until the thread is dropped.
///
/// # Errors
/// See [`TellError`].
pub(crate) fn tell(status: &Path, standing: Arc<Standing>) -> Result<ServingThread, TellError> {
    let listener = Listener::bind_for_all(&beside(status))?;
    let serve = move |quit: &EventFd| serve(&listener, &standing, quit);
    ServingThread::start("metrics", serve).map_err(TellError::NoThread)
}

fn serve(listener: &Listener, standing: &Standing, quit: &EventFd) {
    let mut certificate = Certificate::default();
    loop {
        let quits = PollFd::new(quit.as_fd(), PollFlags::POLLIN);
        let comes = PollFd::new(listener.socket.as_fd(), PollFlags::POLLIN);
        match poll(&mut [quits, comes], PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return tracing::error!(%error, "`outlive metrics` sees this process no more"),
        }
        if let Ok((client, _)) = listener.socket.accept() {
            say(client, &line(standing, certificate.until(standing)));
        }
        // Also if it cannot be accepted: it would be tried again at once.
        let mut quits = [PollFd::new(quit.as_fd(), PollFlags::POLLIN)];
        if poll(&mut quits, PollTimeout::from(PACE)).is_ok_and(|count| count > 0) {
            return;
        }
    }
}

fn line(standing: &Standing, until: Option<SystemTime>) -> Vec<u8> {
    // Numbers and names: this cannot fail.
    let mut line = serde_json::to_vec(&standing.report(until)).expect("a report is plain data");
    line.push(b'\n');
    line
}

/// The line fits into a socket's buffer; a client with less room has itself to blame.
fn say(mut client: UnixStream, line: &[u8]) {
    if client.set_nonblocking(true).is_ok() {
        // The client may be gone.
        let _ = client.write(line);
    }
}

/// Until when this host's certificate counts, read from time to time.
#[derive(Default)]
struct Certificate {
    read: Option<(Instant, Option<SystemTime>)>,
}

impl Certificate {
    fn until(&mut self, standing: &Standing) -> Option<SystemTime> {
        match self.read {
            Some((at, until)) if at.elapsed() < LOOKS => until,
            _ => {
                let until = standing.keys().and_then(|it| keys::load(&it).ok()).map(|it| it.host.until);
                // A process that has no links yet may have some soon.
                self.read = until.map(|until| (Instant::now(), Some(until)));
                until
            }
        }
    }
}
