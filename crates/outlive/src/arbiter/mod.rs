//! The arbiter: the third place that says who may run the VM.
//!
//! When the two hosts of a VM lose each other, each must suppose that the other one lives. Before the standby
//! goes live, and before the primary goes on alone, it wins the next *generation* here, by one atomic
//! test-and-set. The loser stops its VM. While the arbiter cannot be reached, nobody goes on. No clock and no
//! lease takes part, so a host that was stopped for an hour and then continues can do no harm.
//!
//! ```text
//! registry.rs   the kinds of arbiters, by the words before the colon
//! file/         a directory that both hosts see
//! etcd/         an etcd cluster
//! fuzz.rs       what a stranger may say to a served arbiter, for fuzzers
//! served/       a directory of a third machine, served by `outlive arbiter serve`
//! manual/       an operator
//! record.rs     what is written down of a claim, whatever the kind
//! worker.rs     claims on a separate thread, because a dead server can block a claim for long
//! site.rs       on which host an arbiter is
//! watch.rs      probes the arbiter while all is well
//! command.rs    `outlive arbiter`
//! ```

mod command;
mod error;
mod etcd;
mod file;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzz;
#[cfg(test)]
mod golden;
mod manual;
mod record;
mod registry;
mod served;
mod site;
mod watch;
mod worker;

use std::io;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

pub use command::command;
pub use error::{ArbiterError, ArbiterSpecError};
pub use etcd::{EtcdFault, EtcdFormError, EtcdSpecError, SecretError};
pub use file::{DirectoryFault, FileArbiter, FileSpecError};
pub(crate) use manual::{NotTaken, Taken, Word, desk};
pub use outlive_epoch::VmId;
pub(crate) use registry::{Needs, is_manual, needs, read};
pub use registry::{init, parse};
pub use served::{ServeError, ServedFault, ServedSpecError, with_keys};
pub(crate) use site::Site;
pub(crate) use watch::{Here, Sight, Watch};
pub use worker::{Busy, ClaimResult, ClaimWorker, EndNotes};

use outlive_pair::Won;

use crate::link::LinkKind;
use crate::process;

/// Tries whether an arbiter could be claimed at; see [`Arbiter::prober`].
pub type Prober = Box<dyn FnMut() -> Result<(), ArbiterError> + Send>;

/// The answer to a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// The generation belongs to the claimant, now and forever.
    Won,
    /// It belongs to another claimant, now and forever: stop the VM.
    Lost {
        /// Who won it, or why it can never be won.
        owner: String,
    },
    /// Nobody knows: wait and claim again. The claim may even have been won; claiming again is safe.
    Unreachable {
        /// What is wrong and what helps.
        why: String,
    },
}

/// Who won a generation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Winner {
    /// Names the claimant to people.
    pub owner: String,
    /// The claimant's [`process_token`], or a fingerprint of it.
    pub process: String,
}

impl Winner {
    /// Whether it is the process that has this token.
    pub fn is(&self, token: &str) -> bool {
        self.process == token || self.process == fingerprint(token)
    }
}

/// A generation that was won.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Win {
    /// The generation.
    pub generation: u64,
    /// Who won it; `None` if the claim is damaged.
    pub winner: Option<Winner>,
    /// When, by the arbiter's clock.
    pub at: Option<SystemTime>,
}

impl From<Win> for Won<String> {
    fn from(win: Win) -> Self {
        let winner = win.winner.map(|winner| (winner.process, winner.owner));
        Self { generation: win.generation, winner }
    }
}

/// A VM's end in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// The generation in which it ran last.
    pub generation: u64,
    /// Why it ended, for people.
    pub why: String,
    /// When, by the arbiter's clock.
    pub at: Option<SystemTime>,
}

/// How many of a VM's newest claims stay. The decisions need only one; the others tell a host that comes back
/// late who took its place.
pub const KEPT: usize = 8;

/// Whether something is removed or only named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// It is removed.
    Remove,
    /// It would be removed.
    Name,
}

/// What [`init`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initialized {
    /// The place is now an arbiter.
    Made,
    /// It already was one; nothing was changed.
    Already,
    /// It was one of an earlier release, with the same identity and claims.
    Upgraded,
}

/// A place where each generation of a VM is won by exactly one claimant.
pub trait Arbiter: Send {
    /// Claims a generation. May block for long.
    ///
    /// `owner` names the claimant to people. A claimant is the pair of this process and `owner`. If it
    /// repeats a claim, the answer is `Won` again (the first answer may have been lost). A restarted process
    /// is a new claimant and loses.
    ///
    /// Generation 1 is that of a new VM. Any other can only be won where the generation before it was won: an
    /// arbiter that lost its memory counts as unreachable, not as new.
    fn claim(&mut self, vm: &VmId, generation: u64, owner: &str) -> Claim;

    /// Another host has shown that it runs this VM in this generation. Only an arbiter that is a person needs to
    /// hear so: it has no memory of its own.
    fn introduced(&mut self, _vm: &VmId, _generation: u64) {}

    /// Whether claims wait for a person.
    fn is_a_person(&self) -> bool {
        false
    }

    /// The highest generation of this VM that was ever won, `None` before the first. The error says what is
    /// wrong and names the remedy.
    fn highest(&mut self, vm: &VmId) -> Result<Option<u64>, ArbiterError>;

    /// The newest generations of this VM in their order: all, or as many as are still known. The error says
    /// what is wrong and names the remedy.
    fn history(&mut self, vm: &VmId) -> Result<Vec<Win>, ArbiterError>;

    /// How the VM ended, if it ended in order and has not been started again since. The error says what is
    /// wrong and names the remedy.
    fn ending(&mut self, vm: &VmId) -> Result<Option<Ending>, ArbiterError>;

    /// Notes that the VM has ended in order in a generation that this process has won; no other's end is noted. Only
    /// for people and for [`prune`](crate::cli::ArbiterCommand::Prune): no decision depends on it. The error says
    /// what is wrong and names the remedy.
    fn note_end(&mut self, vm: &VmId, generation: u64, why: &str) -> Result<(), ArbiterError>;

    /// The VMs that the arbiter knows, in the order of their ids. The error says what is wrong and names the
    /// remedy.
    fn vms(&mut self) -> Result<Vec<VmId>, ArbiterError>;

    /// Removes all claims of a VM but the newest [`KEPT`], so that none of their generations can be won again.
    /// Returns their generations. The error says what is wrong and names the remedy.
    fn prune(&mut self, vm: &VmId, mode: Mode) -> Result<Vec<u64>, ArbiterError>;

    /// Removes everything about a VM that ended in order at least `age` ago and has not been started again
    /// since. The arbiter then does not know the VM of its images, and they start only with an explicit option.
    /// Returns whether the VM was old enough. The error says what is wrong and names the remedy.
    fn forget(&mut self, vm: &VmId, age: Duration, mode: Mode) -> Result<bool, ArbiterError>;

    /// Removes what is no longer useful. Call it when nobody waits.
    fn tidy(&mut self, vm: &VmId) {
        if let Err(why) = self.prune(vm, Mode::Remove) {
            tracing::debug!("cannot remove old claims: {why}");
        }
    }

    /// The arbiter's own name, which never changes. Two hosts compare it to make sure that they were given
    /// the same arbiter before they rely on it, and images remember it.
    fn identity(&self) -> &str;

    /// What protects the way to it; `None` where there is no such way.
    fn link(&self) -> Option<LinkKind> {
        None
    }

    /// What tries, by writing, whether a claim could be made now. For another thread: it may block for long. The
    /// error says what is wrong and what helps.
    fn prober(&self) -> Prober;
}

/// A name for this process as an owner, for people: role, host and process number.
pub fn owner(role: &str) -> String {
    format!("{role} on host {} (process {})", process::host_name(), std::process::id())
}

/// 16 random bytes, in hexadecimal, that are the same for the whole life of this process and no other.
///
/// # Errors
/// The operating system's, when it has no random numbers.
pub fn process_token() -> io::Result<&'static str> {
    static TOKEN: OnceLock<String> = OnceLock::new();
    if let Some(token) = TOKEN.get() {
        return Ok(token);
    }
    let fresh = random_hex()?;
    Ok(TOKEN.get_or_init(|| fresh))
}

/// What others may learn of a [`process_token`]: whoever has the token itself counts as that process.
fn fingerprint(token: &str) -> String {
    format!("blake3:{}", blake3::hash(token.as_bytes()))
}

fn random_hex() -> io::Result<String> {
    Ok(process::random::<16>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn refusal(text: &str) -> String {
        match parse(text) {
            Ok(_) => panic!("'{text}' was accepted"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_wrong_option_gets_one_line_with_the_remedy() {
        for text in ["", "file", "file:", "zookeeper:127.0.0.1", "/srv/outlive"] {
            assert!(refusal(text).contains("write file:DIR"), "{text}");
        }
        assert!(refusal("file:/no/such/directory").contains("create it, or mount it"));
        assert!(refusal("file:/proc/self/status").contains("is not a directory"));
        for text in ["", "file:/no/such/directory", "file:/proc"] {
            assert!(!refusal(text).contains('\n'), "{text}");
        }
    }

    #[test]
    fn a_directory_that_cannot_hold_claims_is_refused_at_the_start() {
        assert!(refusal("file:/proc").contains("`outlive arbiter init file:/proc`"));
        let error = FileArbiter::init(Path::new("/proc")).map(drop).unwrap_err().to_string();
        assert!(error.contains("/proc cannot become an arbiter: it already has a file"), "{error}");
    }
}
