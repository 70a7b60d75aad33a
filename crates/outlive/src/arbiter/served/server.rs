//! `outlive arbiter serve`: the test-and-set of a directory, for hosts that reach it over the network.
//!
//! Each connection has a thread for its one question, and there are never more than [`MOST`] of them, nor more than
//! [`MOST_OF_ONE`] of one address. A question must be whole within [`PATIENCE`]. So whoever connects and says
//! nothing, too much or nonsense holds up nothing for long.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::protocol::{Answer, Ask, LONGEST_QUESTION, Question, VERSION, Vm, hear, say};
use super::transport::{Wrap, is_private, plain, prepare};
use crate::arbiter::file::FileSpecError;
use crate::arbiter::{Arbiter, ArbiterError, Claim, FileArbiter, Mode, VmId};
use crate::serving::ServingThread;
use crate::{logs, notify, process};

/// How many questions are answered at once.
const MOST: usize = 64;
/// How many of one address.
const MOST_OF_ONE: usize = 16;
/// How long a question may take to arrive, and an answer to leave.
const PATIENCE: Duration = Duration::from_secs(5);
/// Time until the next try when a connection cannot be accepted, in milliseconds.
const TROUBLE: u8 = 100;

/// Why an arbiter is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The directory is no arbiter.
    #[error(transparent)]
    Directory(#[from] FileSpecError),
    /// Others could listen and speak.
    #[error(
        "{0} can be reached from other machines, and what is said there is not encrypted: listen on 127.0.0.1, or \
         add --insecure if nobody but your hosts can reach it"
    )]
    NotPrivate(SocketAddr),
    /// The address cannot be used.
    #[error("cannot listen on {address}: {source}; choose another address with --listen")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
    /// The system refuses something else.
    #[error("cannot serve: {0}")]
    System(#[source] io::Error),
}

/// Serves until it is told to stop.
///
/// # Errors
/// See [`ServeError`]. Nothing was changed then.
pub(in crate::arbiter) fn serve(
    directory: &Path,
    address: SocketAddr,
    insecure: bool,
    exit_with_stdin: bool,
) -> Result<(), ServeError> {
    if !insecure && !is_private(address.ip()) {
        return Err(ServeError::NotPrivate(address));
    }
    let arbiter = FileArbiter::open(directory)?;
    let listen = |source| ServeError::Listen { address, source };
    let listener = TcpListener::bind(address).map_err(listen)?;
    listener.set_nonblocking(true).map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let (told, stops) = channel();
    process::on_stop(exit_with_stdin, move |why| {
        // Nobody listens once this returns.
        let _ = told.send(why);
    })
    .map_err(ServeError::System)?;
    if !is_private(address.ip()) {
        tracing::warn!("--insecure: whoever reaches {address} can win every generation of every VM");
    }
    logs::say(&format!("arbiter {} listens on {address}", arbiter.identity()));
    let server = Server { arbiter: Arc::new(arbiter), wrap: plain(), guests: Arc::default() };
    let thread = ServingThread::start("arbiter-serve", move |quit| server.run(&listener, quit));
    let thread = thread.map_err(ServeError::System)?;
    notify::ready();
    let why = stops.recv().unwrap_or("told to stop");
    notify::stopping();
    tracing::info!("{why}");
    // A question that is being answered now is asked again elsewhere or later.
    drop(thread);
    Ok(())
}

#[derive(Clone)]
struct Server {
    arbiter: Arc<FileArbiter>,
    wrap: Wrap,
    guests: Arc<Guests>,
}

/// How many connections each address has.
#[derive(Default)]
struct Guests(Mutex<HashMap<IpAddr, usize>>);

/// A connection that counts.
struct Guest {
    guests: Arc<Guests>,
    address: IpAddr,
}

impl Guests {
    fn admit(self: &Arc<Self>, address: IpAddr) -> Option<Guest> {
        let mut guests = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = guests.values().sum();
        let of_one = guests.entry(address).or_default();
        if all >= MOST || *of_one >= MOST_OF_ONE {
            guests.retain(|_, count| *count > 0);
            return None;
        }
        *of_one += 1;
        Some(Guest { guests: self.clone(), address })
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut guests = self.guests.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = guests.get_mut(&self.address) {
            *count = count.saturating_sub(1);
        }
        guests.retain(|_, count| *count > 0);
    }
}

impl Server {
    fn run(&self, listener: &TcpListener, quit: &EventFd) {
        loop {
            let mut fds = [
                PollFd::new(quit.as_fd(), PollFlags::POLLIN),
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) if fds[0].any().unwrap_or(true) => return,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return tracing::error!(%error, "no connection can be waited for any more"),
            }
            match listener.accept() {
                Ok((socket, from)) => self.receive(socket, from.ip()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    let mut quits = [PollFd::new(quit.as_fd(), PollFlags::POLLIN)];
                    let _ = poll(&mut quits, PollTimeout::from(TROUBLE));
                }
            }
        }
    }

    fn receive(&self, socket: TcpStream, from: IpAddr) {
        let Some(guest) = self.guests.admit(from) else {
            return tracing::debug!(%from, "too many connections");
        };
        let server = self.clone();
        let started = outlive_machine::spawn("arbiter-client", move || {
            if let Err(error) = server.answer(socket) {
                tracing::debug!(%from, %error, "a connection came to nothing");
            }
            drop(guest);
        });
        if let Err(error) = started {
            tracing::warn!(%error, "a connection is not answered: no thread");
        }
    }

    fn answer(&self, socket: TcpStream) -> io::Result<()> {
        socket.set_nonblocking(false)?;
        prepare(&socket, PATIENCE)?;
        let mut stream = (self.wrap)(socket)?;
        let answer = match hear::<Question>(&mut stream, LONGEST_QUESTION, Instant::now() + PATIENCE) {
            Ok(question) => self.reply(question),
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                Answer::Refused { why: error.to_string() }
            }
            // Also what JSON finds wrong at the end of its input.
            Err(error) if error.get_ref().is_some() => Answer::Refused { why: error.to_string() },
            Err(error) => return Err(error),
        };
        say(&mut stream, &answer)
    }

    fn reply(&self, question: Question) -> Answer {
        if question.version != VERSION {
            let why = format!("its version is {VERSION}, not {}", question.version);
            return Answer::Refused { why };
        }
        let identity = self.arbiter.identity();
        match &question.arbiter {
            Some(opened) if opened != identity => {
                return Answer::OtherArbiter { identity: identity.to_owned() };
            }
            None if question.ask != Ask::Open => {
                return Answer::Refused { why: "no arbiter is named".into() };
            }
            _ => {}
        }
        self.carry_out(question.ask).unwrap_or_else(|error| Answer::Unable { why: error.to_string() })
    }

    fn carry_out(&self, ask: Ask) -> Result<Answer, ArbiterError> {
        let mode = |remove| if remove { Mode::Remove } else { Mode::Name };
        let mut arbiter = self.arbiter.on_behalf_of("");
        Ok(match ask {
            Ask::Open => {
                arbiter.prober()()?;
                Answer::Arbiter { identity: arbiter.identity().to_owned() }
            }
            Ask::Claim { vm: Vm(vm), generation, owner, process } => {
                let claimant = self.arbiter.on_behalf_of(process.as_str());
                claim(claimant, &vm, generation.get(), &owner)
            }
            Ask::Highest { vm: Vm(vm) } => Answer::Highest { generation: arbiter.highest(&vm)? },
            Ask::History { vm: Vm(vm) } => {
                Answer::History { wins: arbiter.history(&vm)?.into_iter().map(Into::into).collect() }
            }
            Ask::Ending { vm: Vm(vm) } => Answer::Ending { ending: arbiter.ending(&vm)?.map(Into::into) },
            Ask::NoteEnd { vm: Vm(vm), generation, why } => {
                arbiter.note_end(&vm, generation, &why)?;
                Answer::Noted
            }
            Ask::Vms => Answer::Vms { vms: arbiter.vms()?.into_iter().map(Vm).collect() },
            Ask::Prune { vm: Vm(vm), remove } => {
                Answer::Pruned { generations: arbiter.prune(&vm, mode(remove))? }
            }
            Ask::Forget { vm: Vm(vm), age_s, remove } => {
                let forgotten = arbiter.forget(&vm, Duration::from_secs(age_s), mode(remove))?;
                Answer::Forgotten { forgotten }
            }
        })
    }
}

/// The claim is on the disk before it is answered.
fn claim(mut claimant: FileArbiter, vm: &VmId, generation: u64, owner: &str) -> Answer {
    match claimant.claim(vm, generation, owner) {
        Claim::Won => {
            tracing::info!(%vm, generation, owner, "won");
            Answer::Won
        }
        Claim::Lost { owner } => {
            tracing::info!(%vm, generation, owner, "lost to");
            Answer::Lost { owner }
        }
        Claim::Unreachable { why } => {
            tracing::warn!(%vm, generation, "{why}");
            Answer::Unable { why }
        }
    }
}
