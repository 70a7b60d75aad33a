//! Why a standby accepts no primary now.

use outlive_epoch::{RefuseCode, VmId};

/// Why a primary is not accepted. Its words go to the primary, with the [code](Self::code).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unwelcome {
    /// It has another VM.
    #[error("this standby is kept for VM {served}, not for {introduced}")]
    WrongVm {
        /// The VM that this standby serves.
        served: VmId,
        /// The primary's.
        introduced: VmId,
    },
    /// The thread that waits has given no sign for long: it could not take over.
    #[error("the thread of this standby that takes over stands still")]
    StandsStill,
    /// The last copy is still being thrown away.
    #[error("this standby still frees the memory of its last copy")]
    Discarding,
    /// There is one primary at a time.
    #[error("another primary is attached")]
    Attached,
    /// The copy of a lost primary may run soon.
    #[error("this standby has lost its primary and is about to take over")]
    TakingOver,
    /// The VM runs here.
    #[error("this standby has taken a VM over and protects no other")]
    TakenOver,
    /// The process ends.
    #[error("this standby takes no primary now: it ends, or gives its last copy up")]
    Ending,
    /// The VM has run in a later generation since.
    #[error("generation {introduced} is out of date: this VM was seen in generation {seen}")]
    Stale {
        /// The primary's generation.
        introduced: u64,
        /// The newest one that was seen here.
        seen: u64,
    },
}

impl Unwelcome {
    /// The code for the primary's program.
    pub fn code(&self) -> RefuseCode {
        match self {
            Self::WrongVm { .. } => RefuseCode::WrongVm,
            Self::StandsStill | Self::Discarding | Self::Attached | Self::TakingOver | Self::TakenOver => {
                RefuseCode::Busy
            }
            Self::Ending => RefuseCode::Leaving,
            Self::Stale { .. } => RefuseCode::StaleGeneration,
        }
    }
}
