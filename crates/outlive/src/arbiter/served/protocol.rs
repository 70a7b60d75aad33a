//! What is said between a host and the arbiter that serves it: one question and one answer for each connection, each
//! a line of JSON.
//!
//! ```text
//! {"version":1,"arbiter":"5f…","ask":"claim","vm":"3f2a…","generation":7,"owner":"standby on host b","process":"a0…"}
//! {"answer":"won"}
//! ```
//!
//! A claim that is asked again by the same process is won again, so a question whose answer was lost is simply
//! repeated.

use std::io::{self, Read, Write};
use std::num::NonZeroU64;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use outlive_epoch::VmId;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::arbiter::{Ending, Win, Winner, fingerprint, record};

/// The version of the protocol. A server refuses others and names its own.
pub(super) const VERSION: u32 = 1;
/// A token is 16 bytes in hexadecimal.
const TOKEN: usize = 32;
/// The longest question, in bytes.
pub(super) const LONGEST_QUESTION: usize = 4096;
/// The longest answer: a list of some ten thousand VMs.
pub(super) const LONGEST_ANSWER: usize = 1 << 20;

/// A question, and to whom.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Question {
    pub(super) version: u32,
    /// The identity of the arbiter that was opened; missing while it is being opened.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) arbiter: Option<String>,
    #[serde(flatten)]
    pub(super) ask: Ask,
}

/// A name that is none.
#[derive(Debug, thiserror::Error)]
#[error("that is no {0}")]
pub(super) struct NoName(&'static str);

/// A VM's id. It becomes a path, so nothing else passes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Vm(pub(super) VmId);

impl TryFrom<String> for Vm {
    type Error = NoName;

    fn try_from(text: String) -> Result<Self, NoName> {
        record::parse_vm_name(&text).map(Self).ok_or(NoName("VM"))
    }
}

impl From<Vm> for String {
    fn from(Vm(vm): Vm) -> Self {
        record::vm_name(&vm)
    }
}

/// The token of a claimant's process. It becomes a line of a file, so nothing else passes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(super) struct Token(String);

impl Token {
    pub(super) fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for Token {
    type Error = NoName;

    fn try_from(text: String) -> Result<Self, NoName> {
        let is_token = text.len() == TOKEN && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        is_token.then_some(Self(text)).ok_or(NoName("process"))
    }
}

impl From<Token> for String {
    fn from(Token(token): Token) -> Self {
        token
    }
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub(super) enum Ask {
    /// Which arbiter this is, and whether it could be written to.
    Open,
    /// For a generation, for a process with this token.
    Claim { vm: Vm, generation: NonZeroU64, owner: String, process: Token },
    /// For the newest generation.
    Highest { vm: Vm },
    /// For all that is known of a VM.
    History { vm: Vm },
    /// How it ended.
    Ending { vm: Vm },
    /// It has ended, says the process with this token. It must be that of the winner, so one without is refused;
    /// hosts of 0.2.0 send none.
    NoteEnd {
        vm: Vm,
        generation: u64,
        why: String,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        process: Option<Token>,
    },
    /// For all VMs.
    Vms,
    /// That old claims are removed, or only named.
    Prune { vm: Vm, remove: bool },
    /// That a VM is removed which ended so many seconds ago, or only named.
    Forget { vm: Vm, age_s: u64, remove: bool },
}

impl Ask {
    /// The VM of which a generation is claimed.
    pub(super) fn claims(&self) -> Option<&VmId> {
        match self {
            Self::Claim { vm: Vm(vm), .. } => Some(vm),
            _ => None,
        }
    }

    /// The VM that it is about.
    pub(super) fn vm(&self) -> Option<&VmId> {
        match self {
            Self::Open | Self::Vms => None,
            Self::Claim { vm: Vm(vm), .. }
            | Self::Highest { vm: Vm(vm) }
            | Self::History { vm: Vm(vm) }
            | Self::Ending { vm: Vm(vm) }
            | Self::NoteEnd { vm: Vm(vm), .. }
            | Self::Prune { vm: Vm(vm), .. }
            | Self::Forget { vm: Vm(vm), .. } => Some(vm),
        }
    }
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub(super) enum Answer {
    /// It is this arbiter and can be written to.
    Arbiter {
        identity: String,
    },
    Won,
    Lost {
        owner: String,
    },
    Highest {
        generation: Option<u64>,
    },
    History {
        wins: Vec<SentWin>,
    },
    Ending {
        ending: Option<SentEnding>,
    },
    Noted,
    Vms {
        vms: Vec<Vm>,
    },
    Pruned {
        generations: Vec<u64>,
    },
    Forgotten {
        forgotten: bool,
    },
    /// It serves another arbiter than the one that was opened.
    OtherArbiter {
        identity: String,
    },
    /// It cannot say. The text is for people and has the remedy.
    Unable {
        why: String,
    },
    /// The question is not understood.
    Refused {
        why: String,
    },
    /// Whoever asks has no right to the VM. The text is for people and has the remedy.
    Forbidden {
        why: String,
    },
}

/// A [`Win`] on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SentWin {
    generation: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    winner: Option<(String, String)>,
    /// Seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    at: Option<u64>,
}

/// An [`Ending`] on its way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SentEnding {
    generation: u64,
    why: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    at: Option<u64>,
}

impl From<Win> for SentWin {
    fn from(win: Win) -> Self {
        let winner = win.winner.map(|winner| (winner.owner, winner.process));
        Self { generation: win.generation, winner, at: win.at.and_then(seconds) }
    }
}

impl SentWin {
    /// Without the winner's token: whoever has it counts as the winner.
    pub(super) fn without_token(mut self) -> Self {
        if let Some((_, process)) = &mut self.winner {
            *process = fingerprint(process);
        }
        self
    }
}

impl From<SentWin> for Win {
    fn from(sent: SentWin) -> Self {
        let winner = sent.winner.map(|(owner, process)| Winner { owner, process });
        Self { generation: sent.generation, winner, at: sent.at.and_then(time) }
    }
}

impl From<Ending> for SentEnding {
    fn from(ending: Ending) -> Self {
        Self { generation: ending.generation, why: ending.why, at: ending.at.and_then(seconds) }
    }
}

impl From<SentEnding> for Ending {
    fn from(sent: SentEnding) -> Self {
        Self { generation: sent.generation, why: sent.why, at: sent.at.and_then(time) }
    }
}

fn seconds(at: SystemTime) -> Option<u64> {
    Some(at.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

fn time(seconds: u64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// Writes a line.
///
/// # Errors
/// The connection's.
pub(super) fn say(stream: &mut dyn Write, words: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(words)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    stream.flush()
}

/// What is wrong with words of another protocol.
const NOT_JSON: &str = "that is no line of JSON; does one side use TLS, and the other --insecure?";

/// Reads a line of at most so many bytes.
///
/// # Errors
/// The connection's; [`io::ErrorKind::InvalidData`] if it is too long or not understood,
/// [`io::ErrorKind::UnexpectedEof`] if it ends too soon, [`io::ErrorKind::TimedOut`] if it is not whole by then.
pub(super) fn hear<T: DeserializeOwned>(
    stream: &mut dyn Read,
    longest: usize,
    until: Instant,
) -> io::Result<T> {
    let mut line = Vec::new();
    let mut piece = [0; 4096];
    loop {
        let length = stream.read(&mut piece)?;
        let piece = &piece[..length];
        // Nobody waits for the end of what cannot be a line: TLS, or another protocol.
        if line.is_empty() && piece.first().is_some_and(|&first| first != b'{') {
            return Err(io::Error::new(io::ErrorKind::InvalidData, NOT_JSON));
        }
        let end = piece.iter().position(|&byte| byte == b'\n');
        line.extend_from_slice(&piece[..end.unwrap_or(length)]);
        if line.len() > longest {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "too long"));
        }
        match (end, length) {
            // What follows the line is nobody's business.
            (Some(_), _) => return Ok(serde_json::from_slice(&line)?),
            (None, 0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            // Whoever sends a byte now and then does not hold this up for ever.
            (None, _) if Instant::now() >= until => return Err(io::ErrorKind::TimedOut.into()),
            (None, _) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard<T: DeserializeOwned>(mut bytes: &[u8]) -> io::Result<T> {
        hear(&mut bytes, LONGEST_QUESTION, Instant::now() + Duration::from_secs(60))
    }

    #[test]
    fn the_documented_lines_are_understood() {
        let (vm, token) = (VmId([0x3f; 16]), "a0".repeat(16));
        let line = format!(
            r#"{{"version":1,"arbiter":"5f","ask":"claim","vm":"{vm}","generation":7,"owner":"b","process":"{token}"}}"#
        ) + "\n";
        let question: Question = heard(line.as_bytes()).unwrap();
        assert!(matches!(&question.ask, Ask::Claim { vm: Vm(it), .. } if *it == vm));
        let mut out = Vec::new();
        say(&mut out, &question).unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), line);
        // A path, a line of its own, no generation.
        for (good, bad) in [(vm.to_string(), "../x"), (token, "a\\nb"), ("n\":7".into(), "n\":0")] {
            heard::<Question>(line.replace(&good, bad).as_bytes()).unwrap_err();
        }
        assert_eq!(heard::<Answer>(b"{\"answer\":\"won\"}\n").unwrap(), Answer::Won);
    }

    /// Every question and every answer, one a line.
    #[test]
    fn all_lines_are_those_that_the_release_before_understands() {
        let vm = || Vm(VmId(*b"0123456789abcdef"));
        let process = Token("51d0".repeat(8));
        let winner = Some(process.clone());
        let seventh = NonZeroU64::new(7).unwrap();
        let asks = [
            Ask::Open,
            Ask::Claim { vm: vm(), generation: seventh, owner: "standby on host b".into(), process },
            Ask::Highest { vm: vm() },
            Ask::History { vm: vm() },
            Ask::Ending { vm: vm() },
            Ask::NoteEnd { vm: vm(), generation: 7, why: "the guest has switched off".into(), process: None },
            Ask::Vms,
            Ask::Prune { vm: vm(), remove: true },
            Ask::Forget { vm: vm(), age_s: 86_400, remove: false },
        ];
        let win = |winner: Option<(String, String)>, at| SentWin { generation: 7, winner, at };
        let ending = SentEnding { generation: 7, why: "stopped".into(), at: Some(1_769_860_800) };
        let answers = [
            Answer::Arbiter { identity: "5f".repeat(16) },
            Answer::Won,
            Answer::Lost { owner: "primary on host a".into() },
            Answer::Highest { generation: Some(7) },
            Answer::Highest { generation: None },
            Answer::History {
                wins: vec![win(Some(("b".into(), "51d0".repeat(8))), Some(1_769_860_800)), win(None, None)],
            },
            Answer::Ending { ending: Some(ending) },
            Answer::Ending { ending: None },
            Answer::Noted,
            Answer::Vms { vms: vec![vm()] },
            Answer::Pruned { generations: vec![1, 2] },
            Answer::Forgotten { forgotten: true },
            Answer::OtherArbiter { identity: "9c".repeat(16) },
            Answer::Unable { why: "the directory is full: make room".into() },
            Answer::Refused { why: "not understood".into() },
        ];
        // Since the release after 0.2.0: an end with its winner. Earlier servers ignore that.
        let end = Ask::NoteEnd { vm: vm(), generation: 7, why: "stopped".into(), process: winner };
        let mut line = Vec::new();
        let question = Question { version: VERSION, arbiter: Some("5f".repeat(16)), ask: end.clone() };
        say(&mut line, &question).unwrap();
        let golden = crate::golden::keeps("arbiter-served-end-v1.jsonl", &String::from_utf8(line).unwrap());
        assert_eq!(heard::<Question>(golden.as_bytes()).unwrap().ask, end);
        let mut out = Vec::new();
        for ask in &asks {
            let arbiter = (*ask != Ask::Open).then(|| "5f".repeat(16));
            say(&mut out, &Question { version: VERSION, arbiter, ask: ask.clone() }).unwrap();
        }
        answers.iter().for_each(|answer| say(&mut out, answer).unwrap());
        let golden = crate::golden::keeps("arbiter-served-v1.jsonl", &String::from_utf8(out).unwrap());
        let lines: Vec<String> = golden.lines().map(|line| format!("{line}\n")).collect();
        let (questions, replies) = lines.split_at(asks.len());
        for (ask, line) in asks.iter().zip(questions) {
            assert_eq!(heard::<Question>(line.as_bytes()).unwrap().ask, *ask);
        }
        for (answer, line) in answers.iter().zip(replies) {
            assert_eq!(heard::<Answer>(line.as_bytes()).unwrap(), *answer);
        }
    }

    #[test]
    fn garbage_is_refused_and_never_panics() {
        let long = [vec![b'x'; LONGEST_QUESTION + 1], vec![b'\n']].concat();
        for bytes in [&b""[..], b"\n", b"{}\n", b"{\"version\":1}", &[0xff; 300], b"null\n", &long] {
            heard::<Question>(bytes).unwrap_err();
        }
        proptest::proptest!(|(bytes: Vec<u8>)| {
            let line = [&bytes[..], b"\n"].concat();
            let _ = heard::<Question>(&line);
            let _ = heard::<Answer>(&line);
        });
    }
}
