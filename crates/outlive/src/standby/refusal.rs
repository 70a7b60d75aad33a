//! Why a standby refuses a primary that introduces itself.

use std::io;

use outlive_epoch::{IncomingError, RefuseCode, VmId};
use outlive_pair::Unwelcome;

use super::audit::TooOften;
use super::copy::CopyError;
use super::decisions::ClaimsError;
use super::listen::{MAX_SLOTS, Overreach};
use crate::arbiter::{ArbiterError, ArbiterSpecError};
use crate::link::MayNot;
use crate::vm::Runs;

/// See the module. The words go to the primary, with the [code](Self::code).
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// The releases have no version of the stream in common. The text has both ranges and the remedy.
    #[error("{0}")]
    Version(String),
    /// The primary's host has no right to it.
    #[error(transparent)]
    MayNot(#[from] MayNot),
    /// The decisions are against it.
    #[error(transparent)]
    Unwelcome(#[from] Unwelcome),
    /// A VM runs here. The words are read by the primary's program, too.
    #[error("{0}")]
    Runs(Runs),
    /// This standby is for another VM, which is named only to whom it concerns.
    #[error("this standby is kept for {}, not for {name} ({vm})", said(.served.as_deref()))]
    WrongVm { served: Option<String>, name: String, vm: VmId },
    /// It has another VM, to which the primary's host has no right.
    #[error("this standby is kept for another VM")]
    OtherVm,
    /// Whoever asks has no VM to ask for.
    #[error(
        "host {0} may neither send nor hold a VM: `outlive keys issue` makes a certificate that allows it"
    )]
    NoVms(String),
    /// No primary has come: it was the question of `primary/ask.rs`.
    #[error("it only asked whether this standby is taking a VM over, which it is not")]
    OnlyAsked,
    /// It wants more buffers than there are for anybody.
    #[error("{0} checkpoints in flight is not between 1 and {MAX_SLOTS}")]
    Slots(u32),
    /// The arbiter of this standby cannot be used.
    #[error(transparent)]
    Place(#[from] ArbiterSpecError),
    /// The hosts have two arbiters.
    #[error(
        "the standby's arbiter {spec} (id {here}) is not the primary's (id {there}): give both hosts the same --arbiter"
    )]
    OtherArbiter { spec: String, here: String, there: String },
    /// Somebody has won the VM since.
    #[error("generation {introduced} is out of date: the arbiter knows generation {highest}")]
    Stale { introduced: u64, highest: u64 },
    /// The arbiter has not seen the primary's claim.
    #[error("the standby's arbiter {0} does not know this VM: give both hosts the same --arbiter")]
    UnknownVm(String),
    /// The arbiter does not answer.
    #[error("the standby's arbiter {spec} cannot be read: {source}")]
    Arbiter { spec: String, source: ArbiterError },
    /// The primary's host has no right to what it asks for.
    #[error(transparent)]
    Overreach(#[from] Overreach),
    /// This host cannot have a copy of the VM.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// There is no memory for checkpoints.
    #[error(transparent)]
    Buffers(#[from] IncomingError),
    /// Nobody could claim the VM.
    #[error(transparent)]
    Claims(#[from] ClaimsError),
    /// Nobody would apply checkpoints.
    #[error("cannot start a thread: {0}")]
    NoThread(#[source] io::Error),
    /// Copies on this host differ from the VM again and again.
    #[error(transparent)]
    Differed(#[from] TooOften),
    /// Another primary was faster.
    #[error("another primary is attached")]
    Attached,
}

fn said(served: Option<&str>) -> String {
    served.map_or_else(|| "another VM".to_owned(), |vm| format!("VM {vm}"))
}

impl Refusal {
    /// The code for the primary's program.
    pub(super) fn code(&self) -> RefuseCode {
        match self {
            Self::Version(_) => RefuseCode::Version,
            Self::Unwelcome(why) => why.code(),
            Self::WrongVm { .. } | Self::OtherVm | Self::MayNot(_) | Self::Overreach(_) => {
                RefuseCode::WrongVm
            }
            Self::Stale { .. } => RefuseCode::StaleGeneration,
            Self::Copy(why) => why.code(),
            // Nothing is wrong with the primary: it may try again.
            Self::Place(_) | Self::Arbiter { .. } | Self::Attached | Self::Runs(_) => RefuseCode::Busy,
            // By no other code a host that asks learns that nothing was looked at.
            Self::NoVms(_) => RefuseCode::Malformed,
            Self::OnlyAsked
            | Self::Slots(_)
            | Self::OtherArbiter { .. }
            | Self::UnknownVm(_)
            | Self::Buffers(_)
            | Self::Claims(_)
            | Self::Differed(_)
            | Self::NoThread(_) => RefuseCode::Resources,
        }
    }
}
