//! The arbiter: the third place that says who may run the VM.
//!
//! When the two hosts of a VM lose each other, each must suppose that the other one lives. Before the standby
//! goes live, and before the primary goes on alone, it wins the next *generation* here, by one atomic
//! test-and-set. Who loses stops its VM. As long as the arbiter cannot be reached nobody goes on. No clock
//! and no lease takes part, so a host that was stopped for an hour and continues cannot do harm.
//!
//! [`FileArbiter`] is the built-in kind: a directory that both hosts see. [`ClaimWorker`] makes claims on a
//! thread of its own, because a claim can block for as long as a dead file server pleases.

mod file;
mod worker;

use std::path::{Path, PathBuf};

pub use file::FileArbiter;
pub use outlive_epoch::VmId;
pub use worker::{Busy, ClaimResult, ClaimWorker};

use crate::process;

/// The answer to a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Claim {
    /// The generation belongs to the claimant, now and for ever.
    Won,
    /// It belongs to another, now and for ever: stop the VM.
    Lost {
        /// Who has it, or why it can never be won.
        owner: String,
    },
    /// Nobody knows: wait and claim again. The claim may even have been won; claiming again is safe.
    Unreachable {
        /// What is wrong and what helps.
        why: String,
    },
}

/// A place where each generation of a VM is won by exactly one claimant.
pub trait Arbiter: Send {
    /// Claims a generation. May block for long.
    ///
    /// `owner` names the claimant to people. A claimant is the pair of this process and `owner`: a claim
    /// repeated by it is answered with `Won` again (the first answer may have been lost), while a restarted
    /// process is a stranger to its earlier life and loses.
    ///
    /// Generation 1 is that of a new VM. Any other can only be won where the generation before it was won: an
    /// arbiter that lost its memory is unreachable, not new.
    fn claim(&mut self, vm: &VmId, generation: u64, owner: &str) -> Claim;

    /// The highest generation of this VM that was ever won, `None` before the first. The error says what is
    /// wrong and what helps.
    fn highest(&mut self, vm: &VmId) -> Result<Option<u64>, String>;

    /// Who won this generation, for people; `None` if nobody did or it cannot be told. Nothing may depend on
    /// it.
    fn owner(&mut self, vm: &VmId, generation: u64) -> Option<String>;

    /// A name for the arbiter itself that two hosts compare, before they rely on it, to know that they were
    /// given the same one.
    fn identity(&self) -> &str;
}

/// Why an `--arbiter` option cannot be used. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ArbiterSpecError {
    /// The text is not of a known form.
    #[error(
        "unknown arbiter '{0}': write file:DIR, DIR being a directory that both hosts see, for example \
         file:/srv/outlive"
    )]
    Form(String),
    /// The directory does not exist.
    #[error(
        "arbiter directory {0} does not exist: create it, or mount it if it is shared (it is never created by \
         itself, because a missing mount must not look like an empty arbiter)"
    )]
    Missing(PathBuf),
    /// The path leads to something else.
    #[error("arbiter path {0} is not a directory: give a directory that both hosts see")]
    NotDirectory(PathBuf),
    /// The directory cannot be used.
    #[error("cannot use arbiter directory {directory}: {why}")]
    Unusable {
        /// The directory.
        directory: PathBuf,
        /// What is wrong and what helps.
        why: String,
    },
}

/// Opens the arbiter of an `--arbiter` option: `file:DIR`.
pub fn parse(text: &str) -> Result<Box<dyn Arbiter>, ArbiterSpecError> {
    match text.strip_prefix("file:") {
        Some(directory) if !directory.is_empty() => Ok(Box::new(FileArbiter::open(Path::new(directory))?)),
        _ => Err(ArbiterSpecError::Form(text.to_string())),
    }
}

/// A name for this process as an owner, for people: role, host and process number.
pub fn owner(role: &str) -> String {
    format!("{role} on {} (process {})", process::host_name(), std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        match parse(text) {
            Ok(_) => panic!("'{text}' was accepted"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_wrong_option_gets_one_line_with_the_remedy() {
        for text in ["", "file", "file:", "etcd:127.0.0.1", "/srv/outlive"] {
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
        assert!(refusal("file:/proc").contains("cannot use arbiter directory /proc"));
    }
}
