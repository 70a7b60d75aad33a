//! What can be wrong with an arbiter's directory. Every text names the remedy.

use std::io;
use std::path::PathBuf;

use nix::errno::Errno;

use crate::arbiter::record::MARKER;

/// What is wrong with an arbiter's directory.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryFault {
    /// The file system refused.
    #[error("{source}; {}", remedy(.source))]
    System {
        /// The system's error.
        #[from]
        source: io::Error,
    },
    /// The file that says which arbiter this is cannot be read.
    #[error(
        "its file {MARKER} is damaged ({0}): restore it, or make a new arbiter in an empty directory while no VM uses this \
         one (`outlive arbiter init`)"
    )]
    DamagedMarker(String),
    /// Another arbiter is in its place.
    #[error(
        "it is now another arbiter (its id is {found} and was {opened} at the start): mount the right file \
         system there"
    )]
    OtherArbiter {
        /// The id that is there now.
        found: String,
        /// The id at the start.
        opened: String,
    },
    /// Another file system is in its place.
    #[error("another file system is mounted there now: mount the one that was there at the start")]
    OtherFileSystem,
    /// It was emptied or made anew, or a mount is missing.
    #[error("its file {MARKER} is gone; {LOST_CLAIMS}")]
    MarkerGone,
    /// It lacks a claim that it must have.
    #[error("{LOST_CLAIMS}")]
    LostClaims,
    /// A claim cannot be read.
    #[error(
        "its claim {name} is damaged ({problem}): restore it; or make sure that no host runs this VM in that \
         generation, and delete the file"
    )]
    DamagedClaim {
        /// Name of the file.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Only the winner knows that the VM has ended.
    #[error("{}", not_won(*.0))]
    NotWinner(u64),
    /// A claim vanished.
    #[error("the claim that was just written is missing: check the file server")]
    ClaimGone,
}

/// The message when a VM's claims are missing from the directory.
const LOST_CLAIMS: &str = "the arbiter directory has lost the claims of this VM: bring the right directory back; nobody \
                           goes on without it";

/// The message when an end is noted by another process than the generation's winner.
pub(in crate::arbiter) fn not_won(generation: u64) -> String {
    format!(
        "the process that says so has not won generation {generation}, so it cannot note the VM's end in it; if no host \
         runs the VM any more, run `outlive arbiter release` (where the arbiter is served: on its machine, with file:DIR)"
    )
}

/// What helps against an error of the file system.
fn remedy(error: &io::Error) -> &'static str {
    match Errno::from_raw(error.raw_os_error().unwrap_or(0)) {
        Errno::ENOENT | Errno::ENOTDIR => "it is not there; mount it or put it back",
        Errno::EACCES | Errno::EPERM => "let this user read and write it; it must also support hard links",
        Errno::ENOSPC | Errno::EDQUOT => "make room there",
        Errno::EROFS => "mount it writable",
        Errno::ESTALE => "mount it again",
        Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EXDEV | Errno::EMLINK => {
            "use a file system that supports hard links"
        }
        Errno::EMFILE | Errno::ENFILE => "raise the limit of open files (ulimit -n)",
        _ => "check the file server and the network to it",
    }
}

/// Why a directory cannot be used as an arbiter. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum FileSpecError {
    /// The directory does not exist.
    #[error(
        "arbiter directory {0} does not exist: create it, or mount it if it is shared (it is never created by \
         itself, because a missing mount must not look like an empty arbiter)"
    )]
    Missing(PathBuf),
    /// The path is not a directory.
    #[error("arbiter path {0} is not a directory: give a directory that both hosts see")]
    NotDirectory(PathBuf),
    /// Nobody has made an arbiter there.
    #[error(
        "directory {0} is not an arbiter: mount the file system that has it; or, if this is the right \
         place, make it one with \
         `outlive arbiter init file:{0}`, once and on one host"
    )]
    NotArbiter(PathBuf),
    /// An earlier release made it.
    #[error(
        "arbiter directory {0} was made by an earlier release: stop the VMs that use it, then bring it up \
         to date with \
         `outlive arbiter init file:{0}`"
    )]
    Old(PathBuf),
    /// It is used for something else.
    #[error(
        "directory {directory} cannot become an arbiter: it already has a file '{found}'; give an empty \
         directory"
    )]
    NotEmpty {
        /// The directory.
        directory: PathBuf,
        /// What is in it.
        found: String,
    },
    /// The directory cannot be used.
    #[error("cannot use arbiter directory {directory}: {fault}")]
    Unusable {
        /// The directory.
        directory: PathBuf,
        /// What is wrong.
        #[source]
        fault: DirectoryFault,
    },
}
