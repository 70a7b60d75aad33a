//! What the node refuses, or cannot do: each with a code for programs, one line for people, and a remedy.

use std::borrow::Cow;
use std::io;

use crate::definition::DefinitionError;
use crate::remote::Access;

/// The code of a definition that cannot be used.
pub(crate) const BAD_DEFINITION: &str = "bad_definition";
/// The code of a name that cannot be a VM's.
pub(crate) const BAD_NAME: &str = "bad_name";
/// What such a name should be.
pub(crate) const NAMES: &str =
    "a name has 1 to 48 letters, digits, '-', '_' and '.', and begins with a letter or a digit";

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
    /// The host ends.
    #[error("this host is about to stop: no VM is started here")]
    Stopping,
    /// It runs on the other host.
    #[error("VM {0} does not run on this host, which is its standby")]
    IsStandby(String),
    /// Only a standby was to be ended.
    #[error("VM {0} runs here, so nothing was stopped")]
    RunsHere(String),
    /// Only a standby was to be ended, and it may be the last host that has the VM.
    #[error("the other host is lost, and this one may be taking VM {0} over, so nothing was stopped")]
    TakesOver(String),
    /// Only a standby was to be ended, and nobody knows whether it is one.
    #[error("the process of VM {0} does not say whether the VM runs here, so nothing was stopped")]
    SaysNothing(String),
    /// Nobody knows yet where it will run.
    #[error("it is not decided yet which host starts VM {0}, so nothing was stopped")]
    Undecided(String),
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
    /// Enough are connected.
    #[error("{0} connections with these keys are open, which is the most at a time")]
    TooManyClients(usize),
    /// One check at a time.
    #[error("this host is being checked already")]
    BeingChecked,
    /// A certificate does not let somebody do this.
    #[error("{who} may not do this ({what}): its certificate allows {}", .allowed.allows())]
    Forbidden {
        /// Whose it is.
        who: String,
        /// What was asked for.
        what: String,
        /// What it allows.
        allowed: Access,
    },
    /// Nothing can be taken back.
    #[error("the job {0} has ended, or cannot be cancelled")]
    CannotCancel(String),
    /// It was cancelled.
    #[error("the job was cancelled")]
    Cancelled,
    /// The process of a VM has ended instead of beginning.
    #[error("{why}")]
    NotStarted {
        /// The VM.
        vm: String,
        /// The process's own words.
        why: String,
    },
    /// Something about a VM has failed.
    #[error("{why}")]
    Failed {
        /// The VM.
        vm: String,
        /// What, and why.
        why: String,
    },
    /// Something has failed, and the words say what helps.
    #[error("{0}")]
    Said(String),
    /// It takes too long.
    #[error("VM {vm}: {what} has not come within {secs} s")]
    TooLong {
        /// The VM.
        vm: String,
        /// What was waited for.
        what: String,
        /// How long.
        secs: u64,
    },
    /// Its thread waits for something.
    #[error("the node's thread for VM {vm} has not answered within {secs} s")]
    NoAnswer {
        /// The VM.
        vm: String,
        /// How long.
        secs: u64,
    },
    /// The request is not understood.
    #[error("{0}")]
    BadRequest(String),
    /// A browser asks for a page that is somebody else's.
    #[error("a web page of another origin gives no orders to this node")]
    ForeignPage,
    /// A browser asks at the socket of this host, under a name that may be somebody else's.
    #[error("a web page asks at this node's socket under a name that may be another host's")]
    ForeignName,
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
    /// HTTP status, code for programs, and what helps; nothing where the message says it.
    pub(crate) fn parts(&self) -> (u16, &'static str, Cow<'static, str>) {
        let (status, code) = self.kind();
        (status, code, self.remedy())
    }

    fn kind(&self) -> (u16, &'static str) {
        match self {
            Self::NoSuchVm(_) => (404, "no_such_vm"),
            Self::NoSuchJob(_) => (404, "no_such_job"),
            Self::BadName(_) => (400, BAD_NAME),
            Self::BadDefinition(_) | Self::NoDefinition(..) => (422, BAD_DEFINITION),
            Self::HasProcess(_) => (409, "has_process"),
            Self::Busy { .. } => (409, "busy"),
            Self::Drained => (409, "drained"),
            Self::Stopping => (409, "stopping"),
            Self::IsStandby(_) => (409, "is_standby"),
            Self::RunsHere(_) => (409, "runs_here"),
            Self::TakesOver(_) => (409, "takes_over"),
            Self::SaysNothing(_) => (409, "says_nothing"),
            Self::Undecided(_) => (409, "undecided"),
            Self::NotRunning(_) => (409, "not_running"),
            Self::Foreign { .. } => (409, "foreign_process"),
            Self::TooManyJobs(_)
            | Self::TooManyFollowers(_)
            | Self::TooManyClients(_)
            | Self::BeingChecked => (429, "too_many"),
            Self::Forbidden { .. } => (403, "forbidden"),
            Self::CannotCancel(_) => (409, "cannot_cancel"),
            Self::Cancelled => (409, "cancelled"),
            Self::NotStarted { .. } | Self::Failed { .. } | Self::Said(_) => (409, "failed"),
            Self::TooLong { .. } | Self::NoAnswer { .. } => (504, "too_long"),
            Self::BadRequest(_) => (400, "bad_request"),
            Self::ForeignPage | Self::ForeignName => (403, "foreign_page"),
            Self::NoRoute(_) => (404, "no_route"),
            Self::NoMethod(_) => (405, "no_method"),
            Self::System(..) => (500, "system"),
        }
    }

    fn remedy(&self) -> Cow<'static, str> {
        let said = match self {
            Self::NoSuchVm(_) => "`outlive vm list` shows the VMs of this host",
            Self::NoSuchJob(_) => "the node keeps its last jobs until it ends: ask for the VM's state",
            Self::BadName(_) => NAMES,
            Self::HasProcess(vm) => return format!("stop the VM first: `outlive vm stop {vm}`").into(),
            Self::Busy { .. } => "wait for the job, or cancel it",
            Self::Drained => "`outlive node undrain` ends the maintenance",
            Self::Stopping => "`outlive node undrain` takes it back, if the host stays",
            Self::IsStandby(vm) => {
                return format!(
                    "say it on the host where the VM runs; `outlive vm stop {vm} --only-standby` ends its protection here"
                )
                .into();
            }
            Self::RunsHere(_) => "leave --only-standby out to shut it down",
            Self::TakesOver(vm) => {
                return format!("say it again when `outlive vm show {vm}` says which host has the VM").into();
            }
            Self::SaysNothing(vm) => {
                return format!("say it again in a moment; `outlive vm logs {vm}` says what it does").into();
            }
            Self::Undecided(vm) => {
                return format!(
                    "say it again when it is; `outlive vm stop {vm} --only-standby` leaves the VM to the other host"
                )
                .into();
            }
            Self::NotRunning(vm) => return format!("`outlive vm show {vm}` says why").into(),
            Self::Foreign { .. } => "stop it where it was started, for example with systemctl",
            Self::TooManyJobs(_)
            | Self::TooManyFollowers(_)
            | Self::TooManyClients(_)
            | Self::BeingChecked => "try again when one has ended",
            Self::Forbidden { .. } => {
                "say it with the keys of an operator (`outlive keys operator NAME`, on the machine with the CA), or on \
                 that host itself"
            }
            Self::CannotCancel(_) => "wait for its end",
            Self::Cancelled => "say it again if it is wanted after all",
            Self::NotStarted { vm, .. } => {
                return format!("the node tries it again, until `outlive vm stop {vm}`").into();
            }
            Self::Failed { vm, .. } => {
                return format!("`outlive vm show {vm}` and `outlive vm logs {vm}` say more").into();
            }
            Self::TooLong { vm, .. } => {
                return format!("`outlive vm show {vm}` says what it waits for").into();
            }
            Self::NoAnswer { .. } => {
                "look after the mounts of its images, logs and events; the order may still be carried out"
            }
            Self::BadRequest(_) => "docs/api/openapi.json has every request",
            Self::ForeignPage => "give them on the node's own page, or with `outlive vm`",
            Self::ForeignName => "ask with the name localhost, 127.0.0.1 or [::1]",
            Self::NoRoute(_) | Self::NoMethod(_) => "docs/api/openapi.json has every route",
            Self::System(..) => "look at the node's log",
            // Each of these says it itself.
            Self::BadDefinition(_) | Self::NoDefinition(..) | Self::Said(_) => "",
        };
        said.into()
    }
}
