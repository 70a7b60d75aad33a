//! What goes into and comes out of the primary's machine.

use std::fmt;
use std::time::Duration;

use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, RefuseCode};

use crate::{ClaimResult, Link, LossReason, Timing};

/// What a primary must know at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrimaryConfig {
    /// The generation that this host owns.
    pub generation: u64,
    /// The last checkpoint of the VM: 0 for a new VM, after a takeover the one it was resumed from.
    pub checkpoint: u64,
    /// How many standby addresses there are; they are tried in turn.
    pub standbys: usize,
    /// Most checkpoints captured and not yet acknowledged, at least 1.
    pub slots: u64,
    /// The configured times.
    pub timing: Timing,
}

/// What happens to a primary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrimaryEvent {
    /// Time has passed.
    Tick,
    /// A connection dialled is up.
    Connected {
        /// Which.
        link: Link,
    },
    /// A connection dialled could not be made. Every [`PrimaryAction::Dial`] must be answered with this or
    /// `Connected`.
    DialFailed {
        /// Which.
        link: Link,
        /// Why, in words.
        why: String,
    },
    /// The standby accepted.
    Accepted {
        /// On which connection.
        link: Link,
        /// The silence that it asks for.
        dead_after: Duration,
    },
    /// The standby refused.
    Refused {
        /// On which connection.
        link: Link,
        /// Why.
        code: Result<RefuseCode, u16>,
        /// Why, in its words.
        text: String,
    },
    /// Bytes have arrived that are no message yet.
    Heard {
        /// On which connection.
        link: Link,
    },
    /// A heartbeat with the newest stamp that the standby has heard.
    Heartbeat {
        /// On which connection.
        link: Link,
        /// Time of this host's clock.
        stamp: Duration,
    },
    /// A checkpoint is committed.
    Ack {
        /// On which connection.
        link: Link,
        /// Of which generation.
        generation: u64,
        /// Its number.
        checkpoint: u64,
        /// Time of this host's clock: the newest stamp that the standby has heard.
        stamp: Duration,
    },
    /// The standby leaves and will not take over.
    Leave {
        /// On which connection.
        link: Link,
        /// Why.
        reason: LeaveReason,
    },
    /// A connection ended, or cannot be used any more (damage; trouble of this side's own with tracking or
    /// sending).
    LinkLost {
        /// Which.
        link: Link,
        /// Why.
        why: LossReason,
    },
    /// The VM is paused and all of a checkpoint is in staging. Given inside the pause, and the answer is
    /// carried out inside it: output is held, or belongs to the next epoch, from the first instruction after
    /// it.
    Captured {
        /// The VM has ended and this is its last checkpoint ([`Wanted::Last`]).
        end: Option<EndReason>,
    },
    /// The arbiter's answer.
    Claimed {
        /// To the claim of which generation.
        generation: u64,
        /// The answer.
        result: ClaimResult,
    },
    /// The guest has ended the VM, or the operator wants it stopped. The first reason counts. After it the
    /// driver keeps the vCPUs stopped (for `Stopped`: from the last capture on) and carries on until
    /// [`PrimaryAction::Exit`].
    End {
        /// Why.
        reason: EndReason,
    },
}

/// What a primary must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrimaryAction {
    /// Connect to a standby.
    Dial {
        /// The number of the new connection.
        link: Link,
        /// Index of its address.
        address: usize,
    },
    /// Send preface and Hello.
    SendHello {
        /// On which connection.
        link: Link,
        /// The VM's generation now.
        generation: u64,
    },
    /// Start tracking dirty pages and send base pages, in rounds, while the guest runs. When few enough are
    /// left, capture ([`Wanted::Base`]).
    StartBase {
        /// On which connection.
        link: Link,
    },
    /// From now on no frame leaves; frames are kept, each with the number of its epoch.
    HoldOutput,
    /// Send the checkpoint just captured. All frames produced before this pause belong to it, those after it
    /// to the next.
    Ship {
        /// On which connection.
        link: Link,
        /// Its number.
        checkpoint: u64,
        /// Its flags.
        flags: CheckpointFlags,
    },
    /// The checkpoint just captured is of no use (the link was lost meanwhile): free its staging.
    DropCapture,
    /// Let the frames of all epochs up to this one out, asking
    /// [`Primary::may_release`](crate::Primary::may_release) before each; and free the staging of the
    /// checkpoints up to this one.
    Release {
        /// Number of the newest committed checkpoint.
        through: u64,
    },
    /// Send a heartbeat with the time of this clock when it is written. Also between the sections of a long
    /// checkpoint.
    SendHeartbeat {
        /// On which connection.
        link: Link,
    },
    /// Send the orderly end of the VM.
    SendEnd {
        /// On which connection.
        link: Link,
        /// Why.
        reason: EndReason,
    },
    /// Close a connection (what is queued for it may still go out), stop tracking, free the staging. Output
    /// that is held stays held.
    Hangup {
        /// Which.
        link: Link,
    },
    /// Ask the arbiter for a generation; the answer comes back as [`PrimaryEvent::Claimed`].
    Claim {
        /// Which.
        generation: u64,
    },
    /// Let everything held out, in its order; from now on output passes through.
    ReleaseAll,
    /// Another side owns the VM: stop the vCPUs for good and throw held output away.
    Fence {
        /// The generation that was lost.
        generation: u64,
        /// Who has it.
        owner: String,
    },
    /// End the process, after what is queued before this has been carried out.
    Exit {
        /// Exit code.
        code: i32,
        /// Why.
        reason: ExitReason,
    },
    /// Something to log.
    Note(PrimaryNote),
}

/// What the log and the event stream should say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PrimaryNote {
    /// A standby could not be reached; said once per reason.
    DialFailed {
        /// Why.
        why: String,
    },
    /// A standby refused; said once per reason.
    Refused {
        /// Why.
        code: Result<RefuseCode, u16>,
        /// Why, in its words.
        text: String,
    },
    /// A standby accepted; the base synchronisation begins.
    Attached {
        /// The connection.
        link: Link,
    },
    /// The base is committed: from now on the VM survives this host.
    Protected {
        /// The generation.
        generation: u64,
        /// The base's checkpoint.
        checkpoint: u64,
    },
    /// The link is lost and with it the protection.
    LinkLost {
        /// Why.
        why: LossReason,
        /// Output is held until the arbiter has answered.
        held: bool,
    },
    /// The arbiter is asked.
    Arbitrating {
        /// For which generation.
        generation: u64,
    },
    /// The arbiter does not answer; said once per reason. Output stays held.
    ArbiterUnreachable {
        /// Why.
        why: String,
    },
    /// The VM goes on alone.
    Won {
        /// In this generation.
        generation: u64,
    },
}

/// Why the process ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The VM ended in order.
    Ended(EndReason),
    /// The VM runs elsewhere.
    Fenced {
        /// The generation that was lost.
        generation: u64,
        /// Who has it.
        owner: String,
    },
}

impl ExitReason {
    /// 0 after an orderly end, 1 after a crash of the guest, 3 for the loser of an arbitration.
    pub fn code(&self) -> i32 {
        match self {
            Self::Ended(EndReason::Crash) => 1,
            Self::Ended(_) => 0,
            Self::Fenced { .. } => 3,
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ended(reason) => reason.fmt(f),
            Self::Fenced { generation, owner } => {
                write!(
                    f,
                    "generation {generation} of this VM belongs to {owner}: the VM runs there, this copy is stopped"
                )
            }
        }
    }
}

/// What checkpoint is wanted next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// None: nobody to send it to, or no free slot.
    Nothing,
    /// The first one, as soon as the base synchronisation has left few enough dirty pages.
    Base {
        /// The connection that it is for.
        link: Link,
    },
    /// The next one, when the epoch is over.
    Epoch,
    /// The last one, at once.
    Last(EndReason),
}

/// What happens to a frame that the guest sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputMode {
    /// It leaves at once.
    PassThrough,
    /// It waits for its checkpoint.
    Hold,
    /// It is thrown away: this side lost.
    Discard,
}

/// What the primary is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrimaryStatus {
    /// No standby.
    Alone,
    /// A standby is being asked.
    Dialling,
    /// Base pages are sent; not protected.
    BaseSync,
    /// The base is captured and not yet committed; not protected, output is held.
    BaseCommit,
    /// Protected.
    Protected,
    /// The last checkpoint is on its way.
    Ending,
    /// Waits for the arbiter, output is held.
    Arbitrating,
    /// Over.
    Over,
}
