//! What goes into and comes out of the standby's machine.

use std::fmt;
use std::time::Duration;

use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, RefuseCode, VmId};

use crate::{ClaimResult, Link, LossReason, Timing};

/// What a standby must know at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StandbyConfig {
    /// The only VM that it accepts; `None` for any.
    pub vm: Option<VmId>,
    /// The configured times.
    pub timing: Timing,
}

/// What matters of a primary's Hello.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Introduction {
    /// Its VM.
    pub vm: VmId,
    /// The generation in which it runs.
    pub generation: u64,
    /// Most checkpoints that it has on their way without an acknowledgement, at least 1.
    pub slots: u64,
    /// The silence configured at the primary.
    pub dead_after: Duration,
}

/// What happens to a standby.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StandbyEvent {
    /// Time has passed. Given by the thread that waits and takes over, and by no other: it is the sign that
    /// this thread gets on.
    Tick,
    /// A connection brought a Hello that makes sense. The driver has asked [`Standby::would_accept`] before
    /// it set memory aside for this VM; if there is not enough, it refuses by itself and this event is not
    /// given.
    ///
    /// [`Standby::would_accept`]: crate::Standby::would_accept
    Hello {
        /// Which connection; its number has not been used before.
        link: Link,
        /// The Hello.
        hello: Introduction,
    },
    /// Bytes have arrived.
    Heard {
        /// On which connection.
        link: Link,
    },
    /// The primary's heartbeat.
    Heartbeat {
        /// On which connection.
        link: Link,
        /// Time of the primary's clock.
        stamp: Duration,
    },
    /// A section of base pages has arrived. It may be written to memory only if the answer is
    /// [`StandbyAction::ApplyBase`].
    BasePages {
        /// On which connection.
        link: Link,
    },
    /// A checkpoint is complete in its staging buffer and has passed every check that needs no trial. Nothing
    /// of it is applied yet. It may come while an earlier one is applied or tried.
    Staged {
        /// On which connection.
        link: Link,
        /// Its number.
        checkpoint: u64,
        /// Its flags.
        flags: CheckpointFlags,
        /// The primary's clock in its end.
        stamp: Duration,
    },
    /// [`StandbyAction::Try`] is done.
    Tried {
        /// From which connection the checkpoint came.
        link: Link,
        /// The checkpoint's number.
        checkpoint: u64,
        /// Whether this host could resume the VM from it; if not, why, in words.
        result: Result<(), String>,
    },
    /// [`StandbyAction::Apply`] is done, all of it.
    Applied {
        /// From which connection the checkpoint came.
        link: Link,
        /// The checkpoint's number.
        checkpoint: u64,
    },
    /// [`StandbyAction::Settle`] is done.
    Settled {
        /// From which connection the checkpoint came.
        link: Link,
        /// The checkpoint's number.
        checkpoint: u64,
    },
    /// [`StandbyAction::Discard`] is done: no work for that copy is under way any more, and its memory is
    /// free.
    Discarded {
        /// From which connection the copy came.
        link: Link,
    },
    /// [`StandbyAction::Release`] is done, or could not be.
    Released {
        /// From which connection the copy came.
        link: Link,
        /// Whether it is durable; if not, why, in words.
        result: Result<(), String>,
    },
    /// The VM has ended in order.
    End {
        /// On which connection.
        link: Link,
        /// Why.
        reason: EndReason,
    },
    /// A connection ended (also in the middle of a section: that is how a primary dies).
    LinkLost {
        /// Which.
        link: Link,
        /// Why.
        why: LossReason,
    },
    /// Something came that this side refuses: damage, wrong order, over a limit. The primary may well be
    /// alive.
    BadStream {
        /// On which connection.
        link: Link,
        /// What, in words.
        why: String,
    },
    /// The arbiter's answer.
    Claimed {
        /// To the claim of which generation.
        generation: u64,
        /// The answer.
        result: ClaimResult,
    },
    /// The operator wants this standby stopped.
    Stop,
    /// Something failed here that makes this copy worthless (memory, the device set, a disk).
    Failed {
        /// From which connection the copy came.
        link: Link,
        /// What, in words.
        why: String,
    },
}

/// What a standby must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StandbyAction {
    /// Send preface and Accept; base pages follow.
    Accept {
        /// On which connection.
        link: Link,
        /// The generation, as the primary said it.
        generation: u64,
        /// The silence that both sides use.
        dead_after: Duration,
    },
    /// Send preface and Refuse, then close. The attached primary is not disturbed.
    Refuse {
        /// Which connection.
        link: Link,
        /// Why.
        code: RefuseCode,
        /// Why, in words.
        text: String,
    },
    /// Write the base pages just received to memory.
    ApplyBase {
        /// From which connection.
        link: Link,
    },
    /// Find out whether this host could resume the VM from the staged checkpoint, without a change to memory;
    /// then report [`StandbyEvent::Tried`]. The base is tried before it is acknowledged, so that what this
    /// host cannot do is found while the primary lives.
    Try {
        /// From which connection the checkpoint came.
        link: Link,
        /// Its number.
        checkpoint: u64,
    },
    /// Acknowledge: from this moment on this side answers for the checkpoint. Queue it before the `Apply`
    /// that follows.
    Ack {
        /// On which connection.
        link: Link,
        /// Of which generation.
        generation: u64,
        /// The checkpoint's number.
        checkpoint: u64,
        /// The newest stamp heard.
        stamp: Duration,
    },
    /// Write the staged checkpoint to memory, all of it, whatever happens to the link meanwhile; then report
    /// [`StandbyEvent::Applied`]. Further checkpoints are staged in other buffers meanwhile.
    Apply {
        /// From which connection the checkpoint came.
        link: Link,
        /// Its number.
        checkpoint: u64,
    },
    /// Bring the disks to the committed checkpoint, durably, then report [`StandbyEvent::Settled`], or
    /// [`StandbyEvent::Failed`] if this side could not run the VM. Nothing is claimed before.
    Settle {
        /// From which connection the checkpoint came.
        link: Link,
        /// Its number.
        checkpoint: u64,
    },
    /// Make what this process will leave of the copy say, durably, that it is given up in order, so that
    /// nobody starts from it; then report [`StandbyEvent::Released`]. It is at the committed checkpoint then,
    /// and this side can still take over.
    Release {
        /// From which connection the copy came.
        link: Link,
    },
    /// Send a heartbeat.
    SendHeartbeat {
        /// On which connection.
        link: Link,
        /// The newest stamp heard.
        stamp: Duration,
    },
    /// Send the orderly leave. After it this side does not take over.
    SendLeave {
        /// On which connection.
        link: Link,
        /// Why.
        reason: LeaveReason,
    },
    /// Close a connection (what is queued for it may still go out) and take nothing more from it. What came
    /// over it and is neither acknowledged nor being tried is thrown away, whole or partial; memory keeps
    /// the committed checkpoint.
    Hangup {
        /// Which.
        link: Link,
    },
    /// Throw everything away: staging, memory, state. If a `Try` or an `Apply` is still running, its end
    /// comes first (the memory may soon belong to another VM); it need not be reported any more. Then report
    /// [`StandbyEvent::Discarded`].
    Discard {
        /// From which connection the copy came.
        link: Link,
    },
    /// Ask the arbiter for a generation; the answer comes back as [`StandbyEvent::Claimed`].
    Claim {
        /// Which.
        generation: u64,
    },
    /// Run the VM, from what is applied. A [`Primary`](crate::Primary) with these numbers is its machine from
    /// now on; this one is over.
    TakeOver {
        /// From which connection the copy came.
        link: Link,
        /// The checkpoint that memory and state are at.
        checkpoint: u64,
        /// The generation won.
        generation: u64,
        /// The operator asked for a stop while this side was the only one that had the VM: end it in order
        /// now.
        stop: bool,
    },
    /// End the process, after what is queued before this has been carried out.
    Exit {
        /// Why.
        reason: StandbyExit,
    },
    /// Something to log.
    Note(StandbyNote),
}

/// What the log and the event stream should say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StandbyNote {
    /// A primary was accepted.
    Attached {
        /// Its connection.
        link: Link,
    },
    /// The base is committed: this side can take over.
    Protected {
        /// The VM's generation.
        generation: u64,
        /// The base's checkpoint.
        checkpoint: u64,
    },
    /// The link is lost.
    LinkLost {
        /// Why.
        why: LossReason,
        /// How long ago the last byte was heard.
        silent: Duration,
        /// Whether this side can take over.
        committed: bool,
    },
    /// The arbiter is asked.
    Arbitrating {
        /// For which generation.
        generation: u64,
    },
    /// The arbiter does not answer; said once per reason.
    ArbiterUnreachable {
        /// Why.
        why: String,
    },
    /// The generation is won; the VM resumes when the last commit is applied.
    Won {
        /// Which.
        generation: u64,
    },
    /// The operator's stop waits: this may be the only host that has the VM, so the arbiter must answer
    /// first.
    StopWaits,
    /// The operator's stop goes on, but what is left of the copy could not be made to say so.
    NotReleased {
        /// Why.
        why: String,
    },
    /// What came over the link was refused; this side left and listens again.
    StreamRefused {
        /// What was wrong.
        why: String,
    },
}

/// Why a standby's process ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StandbyExit {
    /// The VM ended in order.
    Followed(EndReason),
    /// The operator stopped the standby.
    Stopped,
    /// The VM runs elsewhere.
    Lost {
        /// The generation that was lost.
        generation: u64,
        /// Who has it.
        owner: String,
    },
    /// Something failed here.
    Failed(String),
}

impl fmt::Display for StandbyExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Followed(reason) => write!(f, "{reason}; the standby followed"),
            Self::Stopped => f.write_str("the standby was stopped"),
            Self::Lost { generation, owner } => {
                write!(
                    f,
                    "generation {generation} of this VM belongs to {owner}: the VM runs there, this copy is dropped"
                )
            }
            Self::Failed(why) => write!(f, "the standby failed: {why}"),
        }
    }
}

/// What the standby is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StandbyStatus {
    /// Waits for a primary.
    Listening,
    /// Gives the memory of an earlier copy back.
    Discarding,
    /// Receives base pages; cannot take over.
    BaseSync,
    /// Holds a committed checkpoint: can take over.
    Protected,
    /// The link is gone; memory and disks are brought to the committed checkpoint.
    Settling,
    /// Waits for the arbiter.
    Arbitrating,
    /// Took over, or ended.
    Over,
}
