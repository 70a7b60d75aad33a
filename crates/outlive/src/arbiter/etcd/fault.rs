//! What can be wrong with an etcd cluster as an arbiter. Every text names the remedy.

use std::io;
use std::path::PathBuf;

use super::spec::EtcdFormError;
use crate::arbiter::file::not_won;

/// What is wrong with a cluster.
#[derive(Debug, thiserror::Error)]
pub enum EtcdFault {
    /// No member has given a clear answer.
    #[error(
        "no member answers ({0}): check that a majority of the members runs and that this host reaches them"
    )]
    Unanswered(String),
    /// The user may not do this.
    #[error("etcd refuses: {message}; {}", remedy(*.code, .message))]
    Refused {
        /// etcd's words.
        message: String,
        /// Its number, of gRPC.
        code: u32,
    },
    /// Something else answers.
    #[error(
        "it does not answer as etcd does ({0}): give the client URLs of an etcd cluster, version 3.4 or newer"
    )]
    NotEtcd(String),
    /// Its identity is gone.
    #[error("its key {0} is gone: the cluster was emptied or made anew; {LOST}")]
    MarkerGone(String),
    /// Another arbiter is in its place.
    #[error("it is now another arbiter (its id is {found} and was {opened} at the start): {LOST}")]
    OtherArbiter {
        /// The id that is there now.
        found: String,
        /// The id at the start.
        opened: String,
    },
    /// Its identity cannot be read.
    #[error(
        "its key {0} is damaged: restore it; or delete it while no VM uses this arbiter and run `outlive arbiter init`"
    )]
    DamagedMarker(String),
    /// It lacks a claim that it must have.
    #[error("the cluster has lost the claims of this VM: {LOST}")]
    LostClaims,
    /// It has forgotten what it had confirmed.
    #[error(
        "the cluster has forgotten writes: it is at revision {now} and was at {seen}, so it was restored from a \
         snapshot; make a new arbiter of it, as docs/arbitration.md says, because a generation could be won twice in \
         this one"
    )]
    WentBack {
        /// The newest revision that this process has seen.
        seen: u64,
        /// The revision now.
        now: u64,
    },
    /// A claim cannot be read.
    #[error(
        "its claim {0} is damaged: make sure that no host runs this VM in that generation, and delete the key"
    )]
    DamagedClaim(String),
    /// Only the winner knows that the VM has ended.
    #[error("{}", not_won(*.0))]
    NotWinner(u64),
}

const LOST: &str = "bring the right cluster back; nobody goes on without it";

/// Codes of gRPC that say that nothing is known, or that another member may do better.
pub(super) fn is_unclear(code: u32) -> bool {
    // Cancelled, unknown, deadline exceeded, aborted, internal, unavailable.
    matches!(code, 0 | 1 | 2 | 4 | 10 | 13 | 14)
}

fn remedy(code: u32, message: &str) -> &'static str {
    match code {
        7 => "let this user read and write the keys below the prefix",
        8 => "make room: compact and defragment the cluster, then `etcdctl alarm disarm`",
        9 => "enable authentication in the cluster, or leave out user= and password-file=",
        3 if message.contains("user name is empty") => {
            "the cluster wants a user: give user= and password-file="
        }
        3 | 16 => "check user= and the password in password-file=",
        _ => "check the members' logs",
    }
}

/// A file with a secret cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// It cannot be read.
    #[error("cannot read {file}: {source}; let this user read it")]
    Read {
        /// The file.
        file: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Others can read it.
    #[error("{0} can be read by others than its owner: chmod 600 {0}")]
    Open(PathBuf),
    /// There is nothing of use in it.
    #[error("{file} has no {what}: {remedy}")]
    Content {
        /// The file.
        file: PathBuf,
        /// What should be there.
        what: &'static str,
        /// What helps.
        remedy: &'static str,
    },
}

/// Why a cluster cannot be used as an arbiter.
#[derive(Debug, thiserror::Error)]
pub enum EtcdSpecError {
    /// The text names none.
    #[error(transparent)]
    Form(#[from] EtcdFormError),
    /// A file cannot be used.
    #[error(transparent)]
    Secret(#[from] SecretError),
    /// Nobody has made an arbiter of it.
    #[error(
        "{place} is not an arbiter: give the right cluster and prefix; or, if they are right, make it one with \
         `outlive arbiter init '{place}'`, once and on one host"
    )]
    NotArbiter {
        /// As it was given.
        place: String,
    },
    /// The prefix is in use for something else.
    #[error("{place} cannot become an arbiter: it already has the key '{key}'; give a prefix without keys")]
    NotEmpty {
        /// As it was given.
        place: String,
        /// A key that is there.
        key: String,
    },
    /// It cannot be used.
    #[error("cannot use arbiter {place}: {fault}")]
    Unusable {
        /// As it was given.
        place: String,
        /// What is wrong.
        #[source]
        fault: EtcdFault,
    },
    /// The host has no random numbers.
    #[error("this host has no random numbers: {0}")]
    NoRandom(#[source] io::Error),
}
