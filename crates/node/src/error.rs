//! What the node refuses, or cannot do: each with a code for programs, one line for people, and a remedy.

use std::io;

use crate::definition::DefinitionError;

/// Why the node does not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// No definition and no process.
    #[error("there is no VM {0} on this host")]
    NoSuchVm(String),
    /// Never begun, or forgotten.
    #[error("there is no job {0}")]
    NoSuchJob(String),
    /// Cannot be a file's name.
    #[error("'{0}' cannot be a VM's name")]
    BadName(String),
    /// A definition that cannot be used.
    #[error(transparent)]
    BadDefinition(#[from] DefinitionError),
    /// There is none.
    #[error("VM {0} has no definition that can be used: {1}")]
    NoDefinition(String, String),
    /// Its process would lose what it is known by.
    #[error("VM {0} has a process on this host")]
    HasProcess(String),
    /// One after the other.
    #[error("the job {job} works on {what} already")]
    Busy {
        /// What is worked on.
        what: String,
        /// The job.
        job: String,
    },
    /// Maintenance.
    #[error("this host is drained: no VM is started here")]
    Drained,
    /// It runs on the other host.
    #[error("VM {0} does not run on this host, which is its standby")]
    IsStandby(String),
    /// Only a standby was to be ended.
    #[error("VM {0} runs here, so nothing was stopped")]
    RunsHere(String),
    /// Only a standby was to be ended, and nobody knows whether it is one.
    #[error("the process of VM {0} does not say whether the VM runs here, so nothing was stopped")]
    SaysNothing(String),
    /// There is no process.
    #[error("VM {0} does not run on this host")]
    NotRunning(String),
    /// A process that is not the node's.
    #[error("VM {vm} has the process {pid} already, which this node has not started")]
    Foreign {
        /// The VM.
        vm: String,
        /// The process.
        pid: u32,
    },
    /// Enough is under way.
    #[error("{0} jobs are under way, which is the most at a time")]
    TooManyJobs(usize),
    /// Enough listen.
    #[error("{0} clients follow the events, which is the most at a time")]
    TooManyFollowers(usize),
    /// Nothing can be taken back.
    #[error("the job {0} has ended, or cannot be cancelled")]
    CannotCancel(String),
    /// It was cancelled.
    #[error("the job was cancelled")]
    Cancelled,
    /// The process ended, or said no.
    #[error("{0}")]
    Failed(String),
    /// It takes too long.
    #[error("{0} has not happened within {1} s")]
    TooLong(String, u64),
    /// The request is not understood.
    #[error("{0}")]
    BadRequest(String),
    /// No such route.
    #[error("there is nothing at {0}")]
    NoRoute(String),
    /// The route has other methods.
    #[error("{0} cannot be used here")]
    NoMethod(String),
    /// The operating system refuses.
    #[error("{0}: {1}")]
    System(String, io::Error),
}

impl NodeError {
    /// HTTP status, code for programs, and what helps.
    pub(crate) fn parts(&self) -> (u16, &'static str, &'static str) {
        match self {
            Self::NoSuchVm(_) => (404, "no_such_vm", "`outlive vm list` shows the VMs of this host"),
            Self::NoSuchJob(_) => {
                (404, "no_such_job", "the node keeps its last jobs until it ends: ask for the VM's state")
            }
            Self::BadName(_) => (
                400,
                "bad_name",
                "a name has 1 to 48 letters, digits, '-', '_' and '.', and begins with a letter or a digit",
            ),
            Self::BadDefinition(_) | Self::NoDefinition(..) => {
                (422, "bad_definition", "correct the definition; `outlive node check` looks at all of them")
            }
            Self::HasProcess(_) => (409, "has_process", "stop the VM first"),
            Self::Busy { .. } => (409, "busy", "wait for the job, or cancel it"),
            Self::Drained => (409, "drained", "`outlive node undrain` ends the maintenance"),
            Self::IsStandby(_) => (
                409,
                "is_standby",
                "say it on the host where the VM runs; `outlive vm stop --only-standby` ends its protection here",
            ),
            Self::RunsHere(_) => (409, "runs_here", "leave --only-standby out to shut it down"),
            Self::SaysNothing(_) => {
                (409, "says_nothing", "say it again in a moment; `outlive vm logs NAME` says what it does")
            }
            Self::NotRunning(_) => (409, "not_running", "`outlive vm show NAME` says why"),
            Self::Foreign { .. } => (
                409,
                "foreign_process",
                "stop it where it was started, for example with systemctl, and start the VM here",
            ),
            Self::TooManyJobs(_) | Self::TooManyFollowers(_) => {
                (429, "too_many", "try again when one has ended")
            }
            Self::CannotCancel(_) => (409, "cannot_cancel", "wait for its end"),
            Self::Cancelled => (409, "cancelled", "say it again if it is wanted after all"),
            Self::Failed(_) => (409, "failed", "`outlive vm show NAME` and `outlive vm logs NAME` say more"),
            Self::TooLong(..) => (504, "too_long", "`outlive vm show NAME` says what it waits for"),
            Self::BadRequest(_) => (400, "bad_request", "docs/api/openapi.json has every request"),
            Self::NoRoute(_) => (404, "no_route", "docs/api/openapi.json has every route"),
            Self::NoMethod(_) => (405, "no_method", "docs/api/openapi.json has every route"),
            Self::System(..) => (500, "system", "look at the node's log"),
        }
    }
}
