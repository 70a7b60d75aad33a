//! The thread that answers `outlive status`.
//!
//! A client gets what is known at that moment, in one write that does not wait, and is let go. So a client
//! that does not read holds nothing, and there is never more than one.

use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::Standing;
use super::place::{self, BadPlace, NoPlace};
use super::word;
use crate::metrics;
use crate::serving::ServingThread;
use crate::socket::Listener;

/// Time between two answers, in milliseconds: clients that ask all the time cost no core.
const PACE: u8 = 5;
/// Time until the next try when a client cannot be accepted, in milliseconds.
const TROUBLE: u8 = 100;

/// Why `outlive status` gets no answer at the place that the user names.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServerError {
    /// There can be no socket.
    #[error(transparent)]
    Place(#[from] BadPlace),
    /// Nobody would answer there.
    #[error("cannot start a thread: {0}")]
    NoThread(#[source] io::Error),
}

/// Why it gets none at the usual place.
#[derive(Debug, thiserror::Error)]
enum UsualError {
    #[error(transparent)]
    Place(#[from] NoPlace),
    #[error("no thread: {0}")]
    NoThread(#[source] io::Error),
}

/// The running threads. Dropping it ends them and removes their sockets.
#[derive(Debug)]
pub(crate) struct Server {
    /// For metrics; a process is asked for its status without them. Its socket goes first: a directory that was made for
    /// both goes with the last.
    _metrics: Option<ServingThread>,
    _thread: ServingThread,
}

impl Server {
    /// Answers at the place that the user names, if any.
    ///
    /// # Errors
    /// See [`ServerError`].
    pub(crate) fn open(path: Option<&Path>, standing: &Arc<Standing>) -> Result<Option<Self>, ServerError> {
        let Some(path) = path else { return Ok(None) };
        let started = Self::start(place::listen(path)?, standing.clone());
        started.map(Some).map_err(ServerError::NoThread)
    }

    /// Answers at the usual place under this name. Without any there is no answer, and the log says so.
    pub(crate) fn open_usual(name: &str, standing: Arc<Standing>) -> Option<Self> {
        Self::start_in(&place::folders(), name, standing)
            .inspect_err(|why| {
                tracing::warn!("`outlive status` cannot see this process: {why}; give --status PATH");
            })
            .ok()
    }

    fn start_in(folders: &[PathBuf], name: &str, standing: Arc<Standing>) -> Result<Self, UsualError> {
        let listener = place::listen_in(folders, name)?;
        Self::start(listener, standing).map_err(UsualError::NoThread)
    }

    pub(crate) fn start(listener: Listener, standing: Arc<Standing>) -> io::Result<Self> {
        let metrics = metrics::tell(listener.path(), standing.clone())
            .inspect_err(|why| tracing::warn!("`outlive metrics` cannot see this process: {why}"))
            .ok();
        let thread = ServingThread::start("status", move |quit| serve(&listener, &standing, quit))?;
        Ok(Self { _metrics: metrics, _thread: thread })
    }
}

fn serve(listener: &Listener, standing: &Arc<Standing>, quit: &EventFd) {
    let wait = |with_clients: bool, timeout: PollTimeout| {
        let quits = PollFd::new(quit.as_fd(), PollFlags::POLLIN);
        let comes = PollFd::new(listener.socket.as_fd(), PollFlags::POLLIN);
        let mut fds = [quits, comes];
        let fds = &mut fds[..if with_clients { 2 } else { 1 }];
        match poll(fds, timeout) {
            Ok(_) => !fds[0].any().unwrap_or(true),
            Err(Errno::EINTR) => true,
            Err(error) => {
                tracing::error!(%error, "`outlive status` sees this process no more");
                false
            }
        }
    };
    while wait(true, PollTimeout::NONE) {
        let pause = match listener.socket.accept() {
            Ok((client, _)) => {
                answer(client, standing);
                PACE
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => PACE,
            Err(_) => TROUBLE,
        };
        if !wait(false, PollTimeout::from(pause)) {
            return;
        }
    }
}

fn answer(mut client: UnixStream, standing: &Arc<Standing>) {
    let Some(order) = word::heard(&mut client) else {
        // Plain data: this cannot fail.
        return say(&client, serde_json::to_vec(&standing.status()).expect("a status is plain data"));
    };
    // The other host is looked for, which may take seconds. Whoever wants the status need not wait for it.
    let standing = standing.clone();
    let started =
        outlive_machine::spawn("word", move || word::obey(order, &standing, |line| say(&client, line)));
    if let Err(error) = started {
        tracing::warn!(%error, "an operator's word was not heard: no thread");
    }
}

/// The answer fits into a socket's buffer; a client with less room has itself to blame.
fn say(mut client: &UnixStream, mut line: Vec<u8>) {
    line.push(b'\n');
    if client.set_nonblocking(true).is_ok() {
        // The client may be gone.
        let _ = client.write(&line);
    }
}
