//! `outlive console`: attaches a terminal, or a script's pipes, to a port of a VM on this host.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

use super::terminal::{ESCAPE, RawTerminal, TERMINAL_WRITE};
use crate::cli::ConsoleOptions;
use crate::process::Signals;
use crate::{exit, logs};

/// How many typed bytes may wait for the VM.
const PENDING: usize = 4096;

/// `outlive console`: returns the exit code.
pub fn command(options: &ConsoleOptions) -> u8 {
    match attach(options) {
        Ok(code) => code,
        Err(line) => exit::usage(line),
    }
}

/// What helps against a wrong path.
const HINT: &str = "give the directory that outlive run or standby has as --console";

/// Why nothing is attached.
#[derive(Debug, thiserror::Error)]
enum AttachError {
    /// There is no such socket.
    #[error("there is no console at {}: {HINT}", .0.display())]
    NoConsole(PathBuf),
    /// The VM has ended or moved.
    #[error("no VM has its console at {} now: {HINT}", .0.display())]
    NoVm(PathBuf),
    /// The socket is for its owner only.
    #[error("the console at {} belongs to another user: attach as the one who runs the VM", .0.display())]
    OfAnotherUser(PathBuf),
    /// The operating system refuses for another reason.
    #[error("cannot attach to {}: {source}; {HINT}", .path.display())]
    Refused { path: PathBuf, source: io::Error },
    /// The person's end.
    #[error("cannot use this terminal: {0}")]
    Terminal(#[from] io::Error),
}

fn attach(options: &ConsoleOptions) -> Result<u8, AttachError> {
    let (path, socket) = connect(&options.path)?;
    let keyboard = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let screen = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    let signals = Signals::take(&[SIGINT, SIGTERM, SIGHUP, SIGQUIT])?;
    // Last, so that no error finds the terminal raw.
    let terminal = RawTerminal::take(&keyboard)?;
    let is_terminal = terminal.is_some();
    if is_terminal {
        logs::say(&format!("[attached to {}; Ctrl-] detaches]", path.display()));
    }
    let mut session = Session {
        socket,
        keyboard: Some(keyboard),
        screen,
        signals: Box::new(signals),
        is_terminal,
        wait: options.wait,
        deadline: None,
        typed: Vec::with_capacity(PENDING),
        shown: Vec::with_capacity(PENDING),
        ended: false,
    };
    let end = session.run();
    drop(terminal);
    Ok(farewell(end, is_terminal))
}

fn farewell(end: io::Result<End>, is_terminal: bool) -> u8 {
    match end {
        Ok(End::Detached) => {
            if is_terminal {
                logs::say("\n[detached]");
            }
            exit::OK
        }
        Ok(End::Closed) => {
            if is_terminal {
                logs::say("\n[the console was closed: the VM no longer runs here]");
            }
            exit::OK
        }
        Err(error) if error.kind() == ErrorKind::BrokenPipe => exit::OK,
        Err(error) => {
            logs::say(&format!("outlive: the console was lost: {error}"));
            exit::FAILED
        }
    }
}

/// The socket that an argument names: itself, or the serial port's in a directory.
fn connect(path: &Path) -> Result<(PathBuf, UnixStream), AttachError> {
    let path = if path.is_dir() { path.join("serial") } else { path.to_owned() };
    match UnixStream::connect(&path) {
        Ok(socket) => Ok((path, socket)),
        Err(source) => Err(match source.kind() {
            ErrorKind::NotFound => AttachError::NoConsole(path),
            ErrorKind::ConnectionRefused => AttachError::NoVm(path),
            ErrorKind::PermissionDenied => AttachError::OfAnotherUser(path),
            _ => AttachError::Refused { path, source },
        }),
    }
}

/// How an attachment ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// By this side.
    Detached,
    /// By the VM's side, and everything has been shown.
    Closed,
}

/// One attachment.
pub(super) struct Session {
    pub(super) socket: UnixStream,
    pub(super) keyboard: Option<File>,
    pub(super) screen: File,
    /// Readable once the process was told to end.
    pub(super) signals: Box<dyn AsFd + Send>,
    pub(super) is_terminal: bool,
    /// How long to stay after the end of the input and of the output.
    pub(super) wait: Option<Duration>,
    pub(super) deadline: Option<Instant>,
    pub(super) typed: Vec<u8>,
    pub(super) shown: Vec<u8>,
    /// Whether the VM's side has closed.
    pub(super) ended: bool,
}

impl Session {
    pub(super) fn run(&mut self) -> io::Result<End> {
        self.socket.set_nonblocking(true)?;
        loop {
            if self.ended && self.shown.is_empty() {
                return Ok(End::Closed);
            }
            let left = self.deadline.map(|at| at.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) && self.typed.is_empty() && self.shown.is_empty() {
                return Ok(End::Detached);
            }
            let [signals, keyboard, socket, screen] = self.poll(left)?;
            if !signals.is_empty() {
                return Ok(End::Detached);
            }
            if socket.contains(PollFlags::POLLOUT) {
                self.send()?;
            }
            if socket.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR)
                && self.shown.is_empty()
            {
                self.receive()?;
            }
            if !screen.is_empty() {
                self.show()?;
            }
            if !keyboard.is_empty() && self.read_keys()? {
                return Ok(End::Detached);
            }
        }
    }

    fn poll(&self, left: Option<Duration>) -> io::Result<[PollFlags; 4]> {
        let read_socket = self.shown.is_empty() && !self.ended;
        let mut socket = PollFlags::empty();
        socket.set(PollFlags::POLLIN, read_socket);
        socket.set(PollFlags::POLLOUT, !self.typed.is_empty() && !self.ended);
        // Keys are always read, because one may detach; a script waits until what it sent is gone.
        let keyboard = self.keyboard.as_ref().filter(|_| self.is_terminal || self.typed.is_empty());
        let nothing = PollFlags::empty();
        let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
        let mut at = [0, usize::MAX, usize::MAX, usize::MAX];
        if let Some(keyboard) = keyboard {
            at[1] = fds.len();
            fds.push(PollFd::new(keyboard.as_fd(), PollFlags::POLLIN));
        }
        if !socket.is_empty() {
            at[2] = fds.len();
            fds.push(PollFd::new(self.socket.as_fd(), socket));
        }
        if !self.shown.is_empty() {
            at[3] = fds.len();
            fds.push(PollFd::new(self.screen.as_fd(), PollFlags::POLLOUT));
        }
        let timeout = left.map_or(PollTimeout::NONE, |left| {
            // Rounded up, so that the time has come when the wait is over.
            PollTimeout::try_from(left + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) => {}
            Err(nix::errno::Errno::EINTR) => return Ok([nothing; 4]),
            Err(error) => return Err(error.into()),
        }
        Ok(at.map(|index| fds.get(index).map_or(nothing, |fd| fd.revents().unwrap_or(PollFlags::POLLERR))))
    }

    /// Sends what was typed to the VM.
    fn send(&mut self) -> io::Result<()> {
        match self.socket.write(&self.typed) {
            Ok(count) => drop(self.typed.drain(..count)),
            Err(error) if is_later(&error) => {}
            // The rest of the VM's output is still worth showing.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => self.typed.clear(),
            Err(error) => return Err(error),
        }
        if self.keyboard.is_none() && self.typed.is_empty() {
            self.socket.shutdown(Shutdown::Write).or(Ok(()))
        } else {
            Ok(())
        }
    }

    fn receive(&mut self) -> io::Result<()> {
        let mut part = [0; PENDING];
        match self.socket.read(&mut part) {
            Ok(0) => self.ended = true,
            Ok(count) => {
                self.shown.extend_from_slice(&part[..count]);
                if self.deadline.is_some() {
                    self.stay();
                }
            }
            Err(error) if is_later(&error) => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => self.ended = true,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn show(&mut self) -> io::Result<()> {
        let most = self.shown.len().min(TERMINAL_WRITE);
        match self.screen.write(&self.shown[..most]) {
            Ok(0) => return Err(ErrorKind::BrokenPipe.into()),
            Ok(count) => drop(self.shown.drain(..count)),
            Err(error) if is_later(&error) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Reads what was typed. Returns whether it detaches.
    fn read_keys(&mut self) -> io::Result<bool> {
        let Some(keyboard) = &mut self.keyboard else { return Ok(false) };
        let mut keys = [0; PENDING];
        let most = if self.is_terminal { 64 } else { PENDING };
        let count = match keyboard.read(&mut keys[..most]) {
            Ok(count) => count,
            Err(error) if is_later(&error) => return Ok(false),
            Err(_) => 0,
        };
        if count == 0 {
            self.no_more_keys()?;
            return Ok(false);
        }
        let keys = &keys[..count];
        let order = keys.iter().position(|&key| self.is_terminal && key == ESCAPE);
        let keys = &keys[..order.unwrap_or(count)];
        let room = PENDING - self.typed.len();
        self.typed.extend_from_slice(&keys[..keys.len().min(room)]);
        if keys.len() > room {
            // The VM does not take what is typed.
            let _ = self.screen.write(b"\x07");
        }
        Ok(order.is_some())
    }

    fn stay(&mut self) {
        self.deadline = self.wait.and_then(|wait| Instant::now().checked_add(wait));
    }

    fn no_more_keys(&mut self) -> io::Result<()> {
        self.keyboard = None;
        if self.is_terminal {
            // The terminal is gone.
            self.wait = Some(Duration::ZERO);
        }
        self.stay();
        if self.typed.is_empty() {
            // Fails when the other side is gone; the next read notices that.
            self.socket.shutdown(Shutdown::Write).or(Ok(()))
        } else {
            Ok(())
        }
    }
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
