//! `outlive arbiter serve`: the test-and-set of a directory, for hosts that reach it over the network.
//!
//! Each connection has a thread for its one question, and there is room for few of them (`visitors.rs`). A question must
//! be whole within [`PATIENCE`], and until it is, a connection goes for the next one. So whoever connects and says
//! nothing, too much or nonsense holds up nothing for long.
//! With keys nothing that a connection sends is read as a question before its host has shown a certificate, and a
//! question about a VM is answered only if the certificate names the VM.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use super::protocol::{Answer, Ask, LONGEST_QUESTION, Question, SentWin, Token, VERSION, Vm, hear, say};
use super::transport::{NoArbiter, prepare, to_host};
use super::visitors::{Entrance, Visitor, Visitors};
use crate::arbiter::file::FileSpecError;
use crate::arbiter::{Arbiter, ArbiterError, Claim, DirectoryFault, FileArbiter, Mode, VmId};
use crate::keys::Certificate;
use crate::link::{Security, SecurityError, may_be_open, usable};
use crate::logs::RateLimit;
use crate::serving::ServingThread;
use crate::{logs, notify, sandbox, serving};

/// How long a question may take to arrive, and an answer to leave.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often connections that have had their time are looked for, in milliseconds.
const LOOK: u16 = 500;
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
        "--insecure would let everybody who reaches {0} win every generation of every VM: it is for addresses of this \
         machine alone; leave it out, and give this machine keys (`outlive keys issue --arbiter`)"
    )]
    NotPrivate(String),
    /// The keys cannot be used.
    #[error("{0}; --insecure does without keys, for addresses of this machine alone")]
    Keys(String),
    /// The keys are those of a host of VMs.
    #[error("the certificate in {keys} does not let this machine be an arbiter: {why}")]
    NoRight {
        /// Where the keys are.
        keys: String,
        /// What it lacks, and the remedy.
        why: String,
    },
    /// The address cannot be used.
    #[error(
        "cannot listen on {address}: {source}; give --listen an address of this machine, for example 0.0.0.0:7010"
    )]
    Listen {
        /// Where, as it was given.
        address: String,
        /// The system's error.
        source: io::Error,
    },
    /// It cannot be confined to what it needs.
    #[error("{0}")]
    Sandbox(String),
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
    address: &str,
    security: Security,
    exit_with_stdin: bool,
) -> Result<(), ServeError> {
    sandbox::close_inherited();
    check(&security, address)?;
    let arbiter = FileArbiter::open(directory)?;
    let (listener, address) = serving::listen(address)
        .map_err(|source| ServeError::Listen { address: address.to_owned(), source })?;
    let keys = match &security {
        Security::Keys(directory) => Some(directory.as_path()),
        Security::Open => None,
    };
    // Before there is a second thread; the port may have taken a right.
    sandbox::enter_arbiter(directory, keys).map_err(|why| ServeError::Sandbox(why.to_string()))?;
    let stops = serving::stops(exit_with_stdin).map_err(ServeError::System)?;
    if security == Security::Open {
        tracing::warn!("INSECURE: whoever reaches {address} can win every generation of every VM");
    }
    logs::say(&format!("arbiter {} listens on {address}", arbiter.identity()));
    let (visitors, limit) = (Arc::default(), Arc::default());
    let server = Server { arbiter: Arc::new(arbiter), security, visitors, limit };
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

/// Finds out at the start what the first host would: that the keys can be used and are an arbiter's, or that an
/// arbiter without keys is for this machine alone.
fn check(security: &Security, address: &str) -> Result<(), ServeError> {
    match security {
        Security::Open if may_be_open(address) => Ok(()),
        Security::Open => Err(ServeError::NotPrivate(address.to_owned())),
        Security::Keys(directory) => {
            let keys = usable(directory).map_err(|why: SecurityError| ServeError::Keys(why.to_string()))?;
            NoArbiter::check(&keys.host).map_err(|why| ServeError::NoRight {
                keys: directory.display().to_string(),
                why: why.to_string(),
            })
        }
    }
}

#[derive(Clone)]
struct Server {
    arbiter: Arc<FileArbiter>,
    security: Security,
    visitors: Arc<Visitors>,
    /// Of the lines about strangers.
    limit: Arc<RateLimit>,
}

impl Server {
    fn run(&self, listener: &TcpListener, quit: &EventFd) {
        loop {
            let mut fds = [
                PollFd::new(quit.as_fd(), PollFlags::POLLIN),
                PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            ];
            let look = if self.visitors.is_empty() { PollTimeout::NONE } else { PollTimeout::from(LOOK) };
            match poll(&mut fds, look) {
                Ok(_) if fds[0].any().unwrap_or(true) => return,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return tracing::error!(%error, "no connection can be waited for any more"),
            }
            self.visitors.end_after(PATIENCE);
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
        let visitor = match self.visitors.admit(&socket, from) {
            Ok(Entrance::Free(visitor)) => visitor,
            Ok(Entrance::Instead(visitor)) => {
                self.complain(|| "too many connections that say nothing; the oldest are dropped".into());
                visitor
            }
            Ok(Entrance::Full) => {
                return self.complain(|| format!("too many connections; one of {from} is dropped"));
            }
            Err(error) => {
                return self.complain(|| format!("a connection of {from} cannot be answered: {error}"));
            }
        };
        let server = self.clone();
        let started = outlive_machine::spawn("arbiter-client", move || {
            if let Err(error) = server.answer(socket, &visitor) {
                server.complain(|| format!("refused a connection of {from}: {error}"));
            }
        });
        if let Err(error) = started {
            tracing::warn!(%error, "a connection is not answered: no thread");
        }
    }

    /// Strangers cannot fill the log.
    fn complain(&self, line: impl FnOnce() -> String) {
        if self.limit.allows() {
            tracing::warn!("{}", line());
        }
    }

    fn answer(&self, socket: TcpStream, visitor: &Visitor) -> io::Result<()> {
        socket.set_nonblocking(false)?;
        prepare(&socket, PATIENCE)?;
        let (mut stream, host) = to_host(socket, &self.security, PATIENCE)?;
        if let Err(forbidden) = host.as_ref().map_or(Ok(()), may_come) {
            self.complain(|| forbidden.to_string());
            return say(&mut stream, &Answer::Forbidden { why: forbidden.to_string() });
        }
        let name = host.as_ref().map(|host| &*host.name);
        let mut claims = None;
        let answer = match hear::<Question>(&mut stream, LONGEST_QUESTION, Instant::now() + PATIENCE) {
            Ok(_) if !visitor.asks(name) => {
                let why = format!("too many questions of host {} at a time", name.unwrap_or_default());
                self.complain(|| why.clone());
                Answer::Unable { why }
            }
            Ok(question) => {
                claims = question.ask.claims().copied();
                self.reply(question, host.as_ref())
            }
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                Answer::Refused { why: error.to_string() }
            }
            // Also what JSON finds wrong at the end of its input.
            Err(error) if error.get_ref().is_some() => Answer::Refused { why: error.to_string() },
            Err(error) => return Err(error),
        };
        let said = say(&mut stream, &answer);
        // After the answer, because a VM waits for that.
        if let (Answer::Won, Some(vm)) = (&answer, claims)
            && let Err(error) = self.arbiter.keep_small(&vm)
        {
            tracing::warn!(%vm, "old claims stay: {error}");
        }
        said
    }

    fn reply(&self, question: Question, host: Option<&Certificate>) -> Answer {
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
        if let Err(forbidden) = may_ask(&question.ask, host) {
            self.complain(|| forbidden.to_string());
            return Answer::Forbidden { why: forbidden.to_string() };
        }
        let answer = self.carry_out(question.ask, host);
        answer.unwrap_or_else(|error| Answer::Unable { why: error.to_string() })
    }

    fn carry_out(&self, ask: Ask, host: Option<&Certificate>) -> Result<Answer, ArbiterError> {
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
                let wins = arbiter.history(&vm)?.into_iter().map(SentWin::from);
                // Where nobody shows a certificate there is nothing to protect, and 0.2.0 looks for its token.
                let hide = |win: SentWin| if host.is_some() { win.without_token() } else { win };
                Answer::History { wins: wins.map(hide).collect() }
            }
            Ask::Ending { vm: Vm(vm) } => Answer::Ending { ending: arbiter.ending(&vm)?.map(Into::into) },
            Ask::NoteEnd { vm: Vm(vm), generation, why, process } => {
                let process = process.as_ref().map_or("", Token::as_str);
                match self.arbiter.on_behalf_of(process).note_end(&vm, generation, &why) {
                    Ok(()) => Answer::Noted,
                    Err(ArbiterError::Directory { fault: fault @ DirectoryFault::NotWinner(_), .. }) => {
                        Answer::Forbidden { why: fault.to_string() }
                    }
                    Err(error) => return Err(error),
                }
            }
            Ask::Vms => {
                let mut vms = arbiter.vms()?;
                vms.retain(|vm| host.is_none_or(|host| host.grant.arbiter || host.grant.concerns(vm)));
                Answer::Vms { vms: vms.into_iter().map(Vm).collect() }
            }
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

/// A question that this host may not ask.
#[derive(Debug, thiserror::Error)]
enum Forbidden {
    /// Somebody who has no business here.
    #[error(
        "the certificate of {0} allows no VM, and does not let it be the arbiter: ask with a host's keys (`outlive keys \
         issue --host NAME`)"
    )]
    Anything(String),
    /// A host that has nothing to do with the VM.
    #[error(
        "host {host} may neither send nor hold VM {vm}: give it a certificate that allows it beside what it has \
         (`outlive keys issue --host {host} {options}`)"
    )]
    Vm { host: String, vm: VmId, options: String },
    /// A generation of a VM that was forgotten can be won once more, so no host of VMs decides on that.
    #[error(
        "no host may have VM {0} forgotten: run `outlive arbiter prune file:DIR --forget-ended AGE` on the arbiter's \
         machine, where DIR is what it serves (and before it, if no host runs the VM any more and it has no end, \
         `outlive arbiter release`)"
    )]
    Forget(VmId),
}

/// Whether whoever shows this certificate could ask anything: an operator of nodes could not.
fn may_come(host: &Certificate) -> Result<(), Forbidden> {
    let may = host.grant.has_vms() || host.grant.arbiter;
    if may { Ok(()) } else { Err(Forbidden::Anything(host.name.clone())) }
}

/// Whoever may send or hold a VM may ask for its generations, and nobody else. Whoever may be the arbiter may look after
/// it, but not win.
fn may_ask(ask: &Ask, host: Option<&Certificate>) -> Result<(), Forbidden> {
    let Some(vm) = ask.vm() else { return Ok(()) };
    let is_arbiter = host.is_some_and(|host| host.grant.arbiter);
    let of_hosts = matches!(ask, Ask::Claim { .. } | Ask::NoteEnd { .. });
    match host {
        Some(host) if !host.grant.concerns(vm) && (of_hosts || !is_arbiter) => Err(Forbidden::Vm {
            host: host.name.clone(),
            vm: *vm,
            options: host.grant.options_with(None, vm),
        }),
        _ if matches!(ask, Ask::Forget { .. }) && !is_arbiter => Err(Forbidden::Forget(*vm)),
        _ => Ok(()),
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

#[cfg(test)]
#[path = "hostile.rs"]
mod tests;
