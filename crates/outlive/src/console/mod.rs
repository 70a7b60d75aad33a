//! The guest's serial port and console, for people and scripts.
//!
//! ```text
//!  guest ── port ──► Hub (64 KiB) ──► log lines (target guest)
//!                        │ ├────────► sockets DIR/serial, DIR/hvc0 ◄──► outlive console DIR
//!                        │ └────────► standard output
//!        ◄── port ◄── PortInput ◄──── sockets, standard input
//! ```
//!
//! - `hub`: what was printed lately. `server`: the thread that serves everyone. `client`, `stdio`: those it
//!   serves.
//! - `attach`: the other end, `outlive console`. `terminal`: what both do with a person's terminal.
//!
//! The guest waits for none of this. A reader that is too slow loses the oldest bytes and is told how many.
//! Outlive reads typed input only as fast as the guest takes it. Output is shown as it is printed, before its
//! checkpoint is committed: after a takeover the new host may show the last lines once more.

mod attach;
mod client;
mod hub;
mod server;
mod stdio;
mod terminal;

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use nix::sys::signal::Signal;
use outlive_machine::devices::line_log::LineLog;
use outlive_machine::devices::port::PortEnd;

use self::hub::Hub;
use self::server::{Served, Server};
use self::stdio::Stdio;
use crate::cli::ConsoleSpec;
use crate::process::{self, Signals};
use crate::socket::{BindError, Listener};

pub use attach::command;
pub(crate) use terminal::restore_terminal;

/// A port of the guest that a person can look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Port {
    /// COM1, `ttyS0` in Linux.
    Serial,
    /// The virtio console, `hvc0` in Linux.
    Hvc0,
}

/// What a person is shown instead of the ports of the built-in guest.
const SILENT: &str = "[this host is the VM's standby: its ports are silent here until a takeover]\r\n";
const NO_PORTS: &str = "the built-in guest prints its messages in the log of `outlive run`\r\n";

impl Port {
    /// Every port, in the order of [`Console::ends`].
    const ALL: [Self; 2] = [Self::Serial, Self::Hvc0];

    /// Its name in the directory of sockets.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Serial => "serial",
            Self::Hvc0 => "hvc0",
        }
    }
}

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConsoleError {
    /// The operating system refuses something.
    #[error("cannot start the console: {0}")]
    Start(#[from] io::Error),
    /// Another VM is shown in that directory.
    #[error("another VM has its console at {}: give --console another directory", .0.display())]
    Taken(PathBuf),
    /// The path is no name for a socket.
    #[error("{0}: give --console a shorter path")]
    TooLong(#[source] BindError),
    /// There can be no socket in that directory.
    #[error("{0}: give --console another directory")]
    NoSocket(#[source] BindError),
}

impl From<BindError> for ConsoleError {
    fn from(error: BindError) -> Self {
        match error {
            BindError::Taken(path) => Self::Taken(path),
            BindError::TooLong(_) => Self::TooLong(error),
            _ => Self::NoSocket(error),
        }
    }
}

/// The host's ends of the guest's ports, and their clients. It is made before the machine and closed after
/// it; then the sockets are gone and the terminal is as it was.
#[derive(Debug)]
pub(crate) struct Console {
    ends: [PortEnd; 2],
    /// Somebody may look.
    shown: bool,
    server: Mutex<Option<Server>>,
}

impl Console {
    /// Makes sockets or takes the terminal, as asked. `stop` is called when a person ends the VM at the
    /// terminal.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub(crate) fn open(
        spec: Option<&ConsoleSpec>,
        stop: impl Fn(&'static str) + Send + Clone + 'static,
    ) -> Result<Self, ConsoleError> {
        let mut ports = Vec::new();
        let mut make = |port: Port| -> Result<PortEnd, ConsoleError> {
            let hub = Arc::new(Hub::new()?);
            let end = PortEnd::new(hub.clone())?;
            let listener = match spec {
                Some(ConsoleSpec::Directory(directory)) => {
                    Some(Listener::bind(&directory.join(port.name()))?)
                }
                _ => None,
            };
            let stdio = match (spec, port) {
                (Some(ConsoleSpec::Stdio), Port::Serial) => {
                    on_hangup(stop.clone())?;
                    Some(Stdio::take(&hub, Box::new(stop.clone()))?)
                }
                _ => None,
            };
            let (input, log) = (end.input.clone(), LineLog::new(port.name()));
            ports.push(Served { hub, input, log, listener, stdio, clients: Vec::new(), logged: 0 });
            Ok(end)
        };
        let [serial, hvc0] = Port::ALL;
        let ends = [make(serial)?, make(hvc0)?];
        // At a person's terminal, its end is the VM's.
        if !matches!(spec, Some(ConsoleSpec::Stdio)) {
            process::outlive_the_terminal()?;
        }
        let server = Server::start(ports)?;
        Ok(Self { ends, shown: spec.is_some(), server: Mutex::new(Some(server)) })
    }

    /// The host's end of a port, for a machine. Several machines may have it, one after the other.
    pub(crate) fn end(&self, port: Port) -> PortEnd {
        self.ends[port as usize].clone()
    }

    /// Tells everyone who looks that the guest does not run here yet.
    pub(crate) fn waits(&self) {
        for end in self.ends.iter().filter(|_| self.shown) {
            end.sink.write(SILENT.as_bytes());
        }
    }

    /// Tells everyone who looks that the guest has none of these ports: the built-in one.
    pub(crate) fn prints_nothing(&self) {
        for end in self.ends.iter().filter(|_| self.shown) {
            end.sink.write(NO_PORTS.as_bytes());
        }
    }

    /// Does what dropping the console does: shows the remaining output, removes the sockets and gives the
    /// terminal back. For a process that ends while other threads still hold the console.
    pub(crate) fn close(&self) {
        drop(self.server.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

/// Makes signals end the process in order that would otherwise end it at once and leave the terminal raw.
fn on_hangup(stop: impl Fn(&'static str) + Send + 'static) -> io::Result<()> {
    let signals = Signals::take(&[Signal::SIGHUP, Signal::SIGQUIT])?;
    signals.each("hangup", move |_| stop("the terminal was closed"))
}
