//! The arbiter that Outlive serves by itself: `outlive arbiter serve` on a third machine keeps the claims of
//! [`FileArbiter`](super::FileArbiter) in a directory of its own, and hosts reach it over the network.
//!
//! Nothing is kept in the server's memory. It answers a claim after the claim is on its disk, so it can be killed at
//! any time. The identity is that of the directory: a server with another one behind the same address is not the
//! same arbiter.
//!
//! ```text
//! protocol.rs   questions and answers
//! transport.rs  the way between the two: TLS, and who may be the arbiter
//! server.rs     `outlive arbiter serve`
//! visitors.rs   its connections, which are few
//! place.rs      where an arbiter is, and with which keys it is asked
//! backoff.rs    how soon a host that is refused asks again
//! ```

mod backoff;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
mod place;
mod protocol;
mod server;
mod transport;
mod visitors;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::num::NonZeroU64;
use std::time::Duration;

use self::backoff::BackOff;
use self::place::Way;
pub use self::place::with_keys;
pub(super) use self::place::{FORM, needs, servers};
use self::protocol::{Answer, Ask, Question, Token, VERSION, Vm};
pub use self::server::ServeError;
pub(super) use self::server::serve;
use super::{
    Arbiter, ArbiterError, ArbiterSpecError, Claim, Ending, Initialized, Mode, Prober, VmId, Win,
    process_token,
};
use crate::link::LinkKind;

/// What is wrong with a served arbiter.
#[derive(Debug, thiserror::Error)]
pub enum ServedFault {
    /// No clear answer has come.
    #[error(
        "it does not answer ({0}): check that `outlive arbiter serve` runs there and that this host reaches it"
    )]
    Unanswered(String),
    /// It says that it cannot.
    #[error("it cannot say: {0}")]
    Unable(String),
    /// It does not understand.
    #[error("it refuses the question ({0}): use the same release of Outlive there and here")]
    Refused(String),
    /// Another arbiter is in its place.
    #[error(
        "it is now another arbiter (its id is {found} and was {opened} at the start): serve the right directory \
         there; nobody goes on without it"
    )]
    OtherArbiter {
        /// The id that is there now.
        found: String,
        /// The id at the start.
        opened: String,
    },
    /// Others can be on the way.
    #[error(
        "{0} is not this machine, and ?insecure is for this machine alone: leave it out, and give this host and that \
         machine keys (`outlive keys`)"
    )]
    NotPrivate(SocketAddr),
    /// The keys of one of the two do not count, or there are none.
    #[error("{0}")]
    Keys(String),
    /// It does not speak as an arbiter without keys does.
    #[error("its answer is none without TLS: leave out ?insecure if it is served with keys")]
    NotPlain,
    /// This host has no right to the VM.
    #[error("it refuses this host: {0}")]
    Forbidden(String),
}

impl ServedFault {
    /// Whether the next attempt would most likely fail in the same way.
    fn lasts(&self) -> bool {
        matches!(self, Self::Keys(_) | Self::NotPlain | Self::Forbidden(_) | Self::NotPrivate(_))
    }
}

/// Why a served arbiter cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ServedSpecError {
    /// The text names none.
    #[error("'{0}' names no served arbiter: write {FORM}")]
    Form(String),
    /// It cannot be used now.
    #[error("cannot use arbiter {place}: {fault}")]
    Unusable {
        /// As it was given.
        place: String,
        /// What is wrong.
        #[source]
        fault: ServedFault,
    },
    /// The host has no random numbers.
    #[error("this host has no random numbers: {0}")]
    NoRandom(#[source] io::Error),
}

/// Opens the arbiter of an `--arbiter` option.
pub(super) fn open(place: &str) -> Result<Box<dyn Arbiter>, ArbiterSpecError> {
    Ok(Box::new(ServedArbiter::open(place)?))
}

/// Whether it is written as one.
pub(super) fn read(place: &str) -> Result<(), ArbiterSpecError> {
    Way::parse(place).map(drop).ok_or_else(|| ServedSpecError::Form(place.to_owned()).into())
}

/// Its directory is made an arbiter where it is.
pub(super) fn init(place: &str) -> Result<(Box<dyn Arbiter>, Initialized), ArbiterSpecError> {
    Err(ArbiterSpecError::NoInit {
        place: format!("outlive:{place}"),
        remedy: "run `outlive arbiter init file:DIR` on the machine that serves it, then `outlive arbiter serve`",
    })
}

/// An arbiter that Outlive serves.
#[derive(Clone)]
struct ServedArbiter {
    place: String,
    way: Way,
    /// Distinguishes this process from all others, past ones included.
    process: &'static str,
    /// What the server said when it was opened.
    identity: String,
    back_off: BackOff,
}

impl fmt::Debug for ServedArbiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServedArbiter").field("place", &self.place).finish_non_exhaustive()
    }
}

impl ServedArbiter {
    fn open(text: &str) -> Result<Self, ServedSpecError> {
        let way = Way::parse(text).ok_or_else(|| ServedSpecError::Form(text.to_owned()))?;
        let place = format!("outlive:{text}");
        let question = Question { version: VERSION, arbiter: None, ask: Ask::Open };
        let opened = way.check().and_then(|()| way.ask(&question));
        let identity = match opened.and_then(expect) {
            Ok(Answer::Arbiter { identity }) => identity,
            Ok(other) => return Err(ServedSpecError::Unusable { place, fault: nonsense(&other) }),
            Err(fault) => return Err(ServedSpecError::Unusable { place, fault }),
        };
        let process = process_token().map_err(ServedSpecError::NoRandom)?;
        Ok(Self { place, way, process, identity, back_off: BackOff::default() })
    }

    fn ask(&self, ask: Ask) -> Result<Answer, ServedFault> {
        let question = Question { version: VERSION, arbiter: Some(self.identity.clone()), ask };
        match self.way.ask(&question).and_then(expect)? {
            Answer::OtherArbiter { identity } => {
                Err(ServedFault::OtherArbiter { found: identity, opened: self.identity.clone() })
            }
            answer => Ok(answer),
        }
    }

    /// Asks, and takes what is wanted out of the answer.
    fn get<T>(&self, ask: Ask, take: impl FnOnce(Answer) -> Result<T, Answer>) -> Result<T, ArbiterError> {
        let answer = self.ask(ask).and_then(|answer| take(answer).map_err(|other| nonsense(&other)));
        answer.map_err(|fault| self.fails(fault))
    }

    fn fails(&self, fault: ServedFault) -> ArbiterError {
        ArbiterError::Served { place: self.place.clone(), fault }
    }
}

/// Everything but a refusal. Its reason is a line of the log, and of what a terminal shows.
fn expect(answer: Answer) -> Result<Answer, ServedFault> {
    let line = |why: String| outlive_node::shown_in_line(&why).into_owned();
    match answer {
        Answer::Unable { why } => Err(ServedFault::Unable(line(why))),
        Answer::Refused { why } => Err(ServedFault::Refused(line(why))),
        Answer::Forbidden { why } => Err(ServedFault::Forbidden(line(why))),
        answer => Ok(answer),
    }
}

/// An answer to another question.
fn nonsense(answer: &Answer) -> ServedFault {
    ServedFault::Unanswered(format!("its answer is none to the question: {answer:?}"))
}

impl Arbiter for ServedArbiter {
    fn claim(&mut self, vm: &VmId, generation: u64, owner: &str) -> Claim {
        // The server cuts it in the same way; a question has little room.
        let owner = super::record::printable(owner);
        let Some((generation, process)) =
            NonZeroU64::new(generation).zip(Token::try_from(self.process.to_owned()).ok())
        else {
            return Claim::Unreachable { why: "there is no generation 0".into() };
        };
        if let Some(why) = self.back_off.rests() {
            return Claim::Unreachable { why };
        }
        let fault = match self.ask(Ask::Claim { vm: Vm(*vm), generation, owner, process }) {
            Ok(Answer::Won) => return Claim::Won,
            Ok(Answer::Lost { owner }) => return Claim::Lost { owner },
            Ok(other) => nonsense(&other),
            Err(fault) => fault,
        };
        let lasts = fault.lasts();
        let why = self.fails(fault).to_string();
        self.back_off.note(&why, lasts);
        Claim::Unreachable { why }
    }

    fn highest(&mut self, vm: &VmId) -> Result<Option<u64>, ArbiterError> {
        self.get(Ask::Highest { vm: Vm(*vm) }, |answer| match answer {
            Answer::Highest { generation } => Ok(generation),
            other => Err(other),
        })
    }

    fn history(&mut self, vm: &VmId) -> Result<Vec<Win>, ArbiterError> {
        self.get(Ask::History { vm: Vm(*vm) }, |answer| match answer {
            Answer::History { wins } => Ok(wins.into_iter().map(Win::from).collect()),
            other => Err(other),
        })
    }

    fn ending(&mut self, vm: &VmId) -> Result<Option<Ending>, ArbiterError> {
        self.get(Ask::Ending { vm: Vm(*vm) }, |answer| match answer {
            Answer::Ending { ending } => Ok(ending.map(Ending::from)),
            other => Err(other),
        })
    }

    fn note_end(&mut self, vm: &VmId, generation: u64, why: &str) -> Result<(), ArbiterError> {
        let why = super::record::printable(why);
        let process = Token::try_from(self.process.to_owned()).ok();
        self.get(Ask::NoteEnd { vm: Vm(*vm), generation, why, process }, |answer| match answer {
            Answer::Noted => Ok(()),
            other => Err(other),
        })
    }

    fn vms(&mut self) -> Result<Vec<VmId>, ArbiterError> {
        self.get(Ask::Vms, |answer| match answer {
            Answer::Vms { vms } => Ok(vms.into_iter().map(|Vm(vm)| vm).collect()),
            other => Err(other),
        })
    }

    fn prune(&mut self, vm: &VmId, mode: Mode) -> Result<Vec<u64>, ArbiterError> {
        self.get(Ask::Prune { vm: Vm(*vm), remove: mode == Mode::Remove }, |answer| match answer {
            Answer::Pruned { generations } => Ok(generations),
            other => Err(other),
        })
    }

    fn forget(&mut self, vm: &VmId, age: Duration, mode: Mode) -> Result<bool, ArbiterError> {
        let ask = Ask::Forget { vm: Vm(*vm), age_s: age.as_secs(), remove: mode == Mode::Remove };
        self.get(ask, |answer| match answer {
            Answer::Forgotten { forgotten } => Ok(forgotten),
            other => Err(other),
        })
    }

    fn identity(&self) -> &str {
        &self.identity
    }

    fn link(&self) -> Option<LinkKind> {
        Some(self.way.link())
    }

    fn prober(&self) -> Prober {
        let twin = self.clone();
        Box::new(move || {
            twin.get(Ask::Open, |answer| match answer {
                Answer::Arbiter { .. } => Ok(()),
                other => Err(other),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_arbiters_reason_is_a_line_without_control_characters() {
        let why = || "no\x1b[2J\nall is well\u{9b}".to_owned();
        for answer in
            [Answer::Unable { why: why() }, Answer::Refused { why: why() }, Answer::Forbidden { why: why() }]
        {
            let said = expect(answer).unwrap_err().to_string();
            assert!(said.contains("no?[2J all is well?") && !said.contains(char::is_control), "{said}");
        }
    }

    #[test]
    fn a_wrong_place_gets_a_line_with_the_remedy() {
        for text in ["", "host", "host:", ":7010", "host:0", "host:99999", "host:1?secure", "127.0.0.1:x"] {
            let error = ServedArbiter::open(text).unwrap_err().to_string();
            assert!(error.contains("outlive:HOST:PORT"), "{text}: {error}");
        }
        // An address for documentation: nobody is asked there.
        let error = ServedArbiter::open("192.0.2.1:7010?insecure").unwrap_err().to_string();
        assert!(error.contains("?insecure is for this machine alone"), "{error}");
        let error = ServedArbiter::open("127.0.0.1:1?keys=/no/such/directory").unwrap_err().to_string();
        assert!(error.contains("outlive keys init") && error.contains("?insecure"), "{error}");
        let error = init("host:1").map(drop).unwrap_err().to_string();
        assert!(error.contains("outlive arbiter init file:DIR"), "{error}");
    }
}
