//! An operator's word: about a generation, for a VM whose arbiter is `manual`, or that the VM shall go to its standby. It
//! goes from the command to the process through the socket of `outlive status`.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::time::Duration;

use outlive_pair::Unwelcome;
use serde::{Deserialize, Serialize};

use super::command::ask as ask_status;
use super::standing::Facts;
use super::{Standing, place};
use crate::arbiter::{NotTaken, Taken, Word, desk};
use crate::cli::{HandOverOptions, WordOptions};
use crate::events::{Event, Role};
use crate::primary::{Answer, HandOverError, Waiting, ask, ask_to_hand_over};
use crate::vm::Runs;
use crate::{exit, socket};

/// How long a client may take to say something. One that only wants the status says at once that it does not. Clients
/// that do neither are many, and must not hold up the others.
const HEARS: Duration = Duration::from_millis(5);
/// How often a word is said to a process that has not heard it in that time, and has told its status instead.
const TRIES: usize = 20;
/// The longest word, in bytes.
const LONGEST: usize = 256;
/// How long a hand-over may take before it is said that nobody knows.
const HANDS_OVER: Duration = Duration::from_secs(15);
/// How long the answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// What an operator says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "word", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Order {
    /// The standby shall have this generation.
    TakeOver { generation: u64 },
    /// The host where the VM ran shall have it.
    GoOnAlone { generation: u64 },
    /// The other host shall have it.
    GiveUp { generation: u64 },
    /// The VM shall go on at its standby. No word about a generation: the arbiter is asked as always.
    HandOver,
}

impl Order {
    /// The word, and about which generation, if it is one.
    fn parts(self) -> Option<(Word, u64)> {
        match self {
            Self::TakeOver { generation } | Self::GoOnAlone { generation } => Some((Word::Here, generation)),
            Self::GiveUp { generation } => Some((Word::There, generation)),
            Self::HandOver => None,
        }
    }
}

/// What became of it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Done(String),
    Refused(String),
}

/// Why it is not taken.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error("the other host is seen, or was not lost: there is nothing to decide ({0})")]
    Seen(String),
    #[error(
        "the other host is seen at {address} ({why}): if it still waits for a word, say \
         `outlive give-up --generation {generation}` there first, or switch that host off; if the VM runs there already, \
         say it here"
    )]
    Answers { address: String, why: String, generation: u64 },
    #[error(
        "the VM runs at {address} already ({why}): say `outlive give-up --generation {generation}` on THIS host, which \
         then drops what it has, or switch that host off and say this again"
    )]
    RunsThere { address: String, why: String, generation: u64 },
    #[error("the VM ran here: say `outlive go-on-alone`, or take it over at its standby")]
    RanHere,
    #[error("this is the standby: say `outlive take-over`, or let the VM go on where it ran")]
    IsStandby,
    #[error(transparent)]
    NotTaken(#[from] NotTaken),
    #[error(
        "the VM does not run here: say `outlive hand-over` on the host where it runs, which `outlive status` shows"
    )]
    NotHere,
    #[error(
        "with --arbiter manual the VM would stand still until it has your word: stop the guest, or have it taken over by \
         hand (docs/arbitration.md)"
    )]
    ByHand,
    #[error(
        "the arbiter does not answer, so nobody could take the VM over ({0}): say it again when it is back"
    )]
    NoArbiter(String),
    #[error(
        "the standby has not reached the arbiter since {0}, so it could not take the VM over: `outlive status` there says \
         why; say it again when it can"
    )]
    StandbyWithoutArbiter(String),
    #[error(transparent)]
    HandOver(#[from] HandOverError),
}

/// What was done, in words.
struct Done {
    text: String,
    /// A process that ends next waits until the words are written.
    _process: Option<Waiting>,
}

impl From<String> for Done {
    fn from(text: String) -> Self {
        Self { text, _process: None }
    }
}

/// What a client of the status socket says, if it says anything.
pub(super) fn heard(client: &mut UnixStream) -> Option<Order> {
    client.set_read_timeout(Some(HEARS)).ok()?;
    let mut bytes = [0; LONGEST];
    let length = client.read(&mut bytes).ok()?;
    serde_json::from_slice(bytes.get(..length)?).ok()
}

/// Carries an order out, and hands the answer to `write`, as a line of JSON.
pub(super) fn obey(order: Order, standing: &Standing, write: impl FnOnce(Vec<u8>)) {
    let done = carry_out(order, standing);
    let outcome = match &done {
        Ok(Done { text, .. }) => Outcome::Done(text.clone()),
        Err(why) => {
            tracing::warn!("an operator's word was refused: {why}");
            Outcome::Refused(why.to_string())
        }
    };
    // Plain data: this cannot fail.
    write(serde_json::to_vec(&outcome).expect("an outcome is plain data"));
}

/// Has the VM go on at its standby.
fn leave_to_standby(facts: &Facts) -> Result<Done, Refused> {
    let coordinator =
        facts.coordinator.as_ref().filter(|_| facts.role == Role::Primary).ok_or(Refused::NotHere)?;
    let sight = facts.watch.as_ref().and_then(Weak::upgrade).map(|watch| watch.sight());
    if sight.as_ref().is_some_and(|sight| sight.is_a_person) {
        return Err(Refused::ByHand);
    }
    if let Some(why) = sight.and_then(|sight| sight.lost) {
        return Err(Refused::NoArbiter(why));
    }
    if let Some(since) = facts.other.arbiter.lost() {
        return Err(Refused::StandbyWithoutArbiter(humantime::format_rfc3339_seconds(since).to_string()));
    }
    let process = ask_to_hand_over(coordinator)?;
    let text = process.answer(HANDS_OVER)?;
    Ok(Done { text, _process: Some(process) })
}

fn carry_out(order: Order, standing: &Standing) -> Result<Done, Refused> {
    let facts = standing.facts();
    let Some((word, generation)) = order.parts() else { return leave_to_standby(&facts) };
    // An operator who is not sure whether it was heard says it again.
    if desk().decided(generation).is_some()
        && let Taken::Before(vm) = desk().decide(generation, word)?
    {
        return Ok(
            format!("generation {generation} of VM {vm} is {word} already: nothing was changed").into()
        );
    }
    // Before a claim is open, the other host lives as far as this one knows.
    if !facts.asking {
        let why = if facts.protected { "the VM is protected".to_owned() } else { facts.reason() };
        return Err(Refused::Seen(why));
    }
    match (order, facts.role) {
        (Order::TakeOver { .. }, Role::Primary) => return Err(Refused::RanHere),
        (Order::GoOnAlone { .. }, Role::Standby) => return Err(Refused::IsStandby),
        _ => {}
    }
    if word == Word::Here {
        unless_seen(&facts, generation)?;
    }
    let (Taken::Now(vm) | Taken::Before(vm)) = desk().decide(generation, word)?;
    let here = word == Word::Here;
    let whose = if here { "THIS HOST'S".to_owned() } else { word.to_string() };
    tracing::warn!(%vm, generation, "AN OPERATOR HAS DECIDED: the generation is {whose}");
    if let Some(events) = &facts.events {
        events.emit(Event::OperatorDecided { generation, here });
    }
    Ok(format!("generation {generation} of VM {vm} is {}", whose.to_lowercase()).into())
}

/// Refuses while the other host can be reached and may have the VM, or a copy that it waits with. It takes some
/// seconds at most.
fn unless_seen(facts: &Facts, generation: u64) -> Result<(), Refused> {
    let Some((addresses, security)) = &facts.others else { return Ok(()) };
    let peer = facts.peer.as_deref().unwrap_or_default();
    // The host of this VM, and none that could be its standby as well: that one may have another VM.
    for address in addresses.iter().filter(|address| *address == peer || same_host(address, peer)) {
        let why = match ask(address, security) {
            Answer::Idle | Answer::Unreachable(_) => continue,
            Answer::Busy(why) | Answer::Unknown(why) => why,
        };
        let address = address.clone();
        let runs = Runs::parse(&why).is_some() || why == Unwelcome::TakenOver.to_string();
        return Err(if runs {
            Refused::RunsThere { address, why, generation }
        } else {
            Refused::Answers { address, why, generation }
        });
    }
    Ok(())
}

/// Whether two addresses (HOST:PORT) are of one host.
fn same_host(one: &str, other: &str) -> bool {
    let hosts = |address: &str| -> Vec<IpAddr> {
        address
            .to_socket_addrs()
            .map(|all| all.map(|it| it.ip().to_canonical()).collect())
            .unwrap_or_default()
    };
    let others = hosts(other);
    hosts(one).iter().any(|host| others.contains(host))
}

/// Why a command has come to nothing.
#[derive(Debug, thiserror::Error)]
enum WordError {
    /// Nobody is there.
    #[error(
        "no VM or standby that you may ask runs on this host: give the path of its --status with --socket; after \
         `give-up` a process has ended, unless it waits as the standby"
    )]
    Nobody,
    /// Several are there.
    #[error("several processes answer on this host: say which with --socket ({0})")]
    Several(String),
    /// It cannot be asked.
    #[error("cannot speak with the process at {}: {source}; `outlive status` shows those that run", .path.display())]
    Silent { path: PathBuf, source: io::Error },
    /// It says no.
    #[error("refused: {0}")]
    Refused(String),
    /// Nobody would read it.
    #[error("cannot print: {0}")]
    Print(#[source] io::Error),
}

/// `outlive take-over`: returns the exit code.
pub(crate) fn take_over(options: &WordOptions) -> u8 {
    command(options.socket.as_deref(), Order::TakeOver { generation: options.generation })
}

/// `outlive hand-over`: returns the exit code.
pub(crate) fn hand_over(options: &HandOverOptions) -> u8 {
    command(options.socket.as_deref(), Order::HandOver)
}

/// `outlive go-on-alone`: returns the exit code.
pub(crate) fn go_on_alone(options: &WordOptions) -> u8 {
    command(options.socket.as_deref(), Order::GoOnAlone { generation: options.generation })
}

/// `outlive give-up`: returns the exit code.
pub(crate) fn give_up(options: &WordOptions) -> u8 {
    command(options.socket.as_deref(), Order::GiveUp { generation: options.generation })
}

fn command(socket: Option<&Path>, order: Order) -> u8 {
    let path = socket.map_or_else(|| only(&place::folders(), order), |path| Ok(path.to_owned()));
    let said = path.and_then(|path| say(&path, order));
    let printed = said.and_then(|done| {
        writeln!(outlive_node::printed(), "{}", outlive_node::shown(&done.to_string()))
            .map_err(WordError::Print)
    });
    printed.map_or_else(exit::usage, |()| exit::OK)
}

/// The only process that answers; of several, the only one that the order can be for.
fn only(folders: &[PathBuf], order: Order) -> Result<PathBuf, WordError> {
    let files = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten();
    let mut sockets: Vec<PathBuf> = files.map(|file| file.path()).collect();
    sockets.retain(|path| {
        path.extension().is_some_and(|it| it == place::ENDING) && socket::connect(path).is_ok()
    });
    if sockets.len() > 1 && order == Order::HandOver {
        let is_for = |path: &PathBuf| ask_status(path).is_ok_and(|said| said.runs());
        let running: Vec<PathBuf> = sockets.iter().filter(|path| is_for(path)).cloned().collect();
        // Without any, all of them are named.
        sockets = if running.is_empty() { sockets } else { running };
    }
    match &sockets[..] {
        [] => Err(WordError::Nobody),
        [one] => Ok(one.clone()),
        _ => {
            let names: Vec<String> = sockets.iter().map(|path| path.display().to_string()).collect();
            Err(WordError::Several(names.join(", ")))
        }
    }
}

fn say(path: &Path, order: Order) -> Result<String, WordError> {
    let answer = || -> io::Result<Outcome> {
        let mut socket = socket::connect(path)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.write_all(&serde_json::to_vec(&order)?)?;
        socket.shutdown(Shutdown::Write)?;
        let mut bytes = Vec::new();
        socket.take(64 << 10).read_to_end(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    };
    let not_heard = |said: &io::Result<Outcome>| {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, InvalidData};
        // It has told its status, or told it and hung up before the word was there.
        said.as_ref().is_err_and(|error| matches!(error.kind(), InvalidData | BrokenPipe | ConnectionReset))
    };
    let last = answer();
    let said = if not_heard(&last) {
        (1..TRIES).map(|_| answer()).find(|it| !not_heard(it)).unwrap_or(last)
    } else {
        last
    };
    match said {
        Ok(Outcome::Done(done)) => Ok(done),
        Ok(Outcome::Refused(why)) => Err(WordError::Refused(why)),
        Err(source) => Err(WordError::Silent { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::Listener;
    use crate::status::Server;

    #[test]
    fn a_word_is_refused_while_the_other_host_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.sock");
        let standing = Standing::new(Role::Primary, Some("a"), "why");
        let server = Server::start(Listener::bind(&path).unwrap(), standing.clone()).unwrap();
        let refused = |order| say(&path, order).unwrap_err().to_string();
        standing.protected(1);
        assert!(refused(Order::GoOnAlone { generation: 2 }).contains("the other host is seen"));
        standing.unprotected("the standby was lost");
        assert!(refused(Order::GoOnAlone { generation: 2 }).contains("the standby was lost"));
        standing.asking("asking the arbiter");
        assert!(refused(Order::TakeOver { generation: 2 }).contains("outlive go-on-alone"));
        assert!(refused(Order::HandOver).contains("does not run here"));
        // Another arbiter than a person is asked.
        assert!(refused(Order::GoOnAlone { generation: 2 }).contains("nobody waits for a word"));
        assert_eq!(only(&[directory.path().to_owned()], Order::HandOver).unwrap(), path);
        drop(server);
        assert!(matches!(only(&[directory.path().to_owned()], Order::HandOver), Err(WordError::Nobody)));
        assert!(matches!(say(&path, Order::GiveUp { generation: 1 }), Err(WordError::Silent { .. })));
    }

    #[test]
    fn nonsense_is_no_word() {
        for text in ["", "x", "{}", r#"{"word":"take_over"}"#, r#"{"word":"take_over","generation":-1}"#] {
            let (mut one, mut other) = UnixStream::pair().unwrap();
            one.write_all(text.as_bytes()).unwrap();
            drop(one);
            assert_eq!(heard(&mut other), None, "{text}");
        }
    }
}
