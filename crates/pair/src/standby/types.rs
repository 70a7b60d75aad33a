//! The input and output of the standby's machine.

use std::fmt;
use std::time::Duration;

use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, RefuseCode, VmId};

use crate::{ClaimResult, Link, LossReason, TailUse, Timing};

/// What a standby must know at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StandbyConfig {
    /// The only VM that it accepts; `None` for any.
    pub vm: Option<VmId>,
    /// The configured times.
    pub timing: Timing,
}

/// The parts of a primary's Hello that matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Introduction {
    /// Its VM.
    pub vm: VmId,
    /// The generation in which it runs.
    pub generation: u64,
    /// The most checkpoints that it sends without an acknowledgement, at least 1.
    pub slots: u64,
    /// The silence configured at the primary.
    pub dead_after: Duration,
    /// Whether both hosts write to the same storage. A write that the primary has let out may wait in its
    /// kernel or in a queue, and the end of a connection does not stop it. So this side lets the primary's
    /// lease run out before it asks for the VM, even when the connection ends.
    pub shared_storage: bool,
}

/// What happens to a standby.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StandbyEvent {
    /// Time has passed. Only the thread that waits and takes over may hand this in: it is the sign that this
    /// thread makes progress.
    Tick,
    /// A connection brought a valid Hello. The driver has asked [`Standby::would_accept`] before it set
    /// memory aside for this VM; if there is not enough, it refuses by itself and this event is not handed
    /// in.
    ///
    /// [`Standby::would_accept`]: crate::Standby::would_accept
    Hello {
        /// Which connection; its number has not been used before.
        link: Link,
        /// The Hello.
        hello: Introduction,
    },
    /// A primary that says it has its generation from this side's arbiter was refused, because this side is about to take
    /// over ([`Standby::would_accept`]). Nobody has checked that generation.
    ///
    /// [`Standby::would_accept`]: crate::Standby::would_accept
    TurnedAway {
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
    /// The primary says that all output of the guest has left that belongs to the epochs up to this one.
    OutputReleased {
        /// On which connection.
        link: Link,
        /// The epoch.
        through: u64,
    },
    /// A section of base pages has arrived. It may be written to memory only if the answer is
    /// [`StandbyAction::ApplyBase`].
    BasePages {
        /// On which connection.
        link: Link,
    },
    /// A checkpoint is complete in its staging buffer and has passed every check that needs no trial. Nothing
    /// of it is applied yet. It may come while an earlier one is being applied or tried.
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
        /// The connection over which the checkpoint came.
        link: Link,
        /// The checkpoint's number.
        checkpoint: u64,
        /// Whether this host could resume the VM from it; if not, why, in words.
        result: Result<(), String>,
    },
    /// [`StandbyAction::Apply`] is done, all of it.
    Applied {
        /// The connection over which the checkpoint came.
        link: Link,
        /// The checkpoint's number.
        checkpoint: u64,
    },
    /// [`StandbyAction::Settle`] is done.
    Settled {
        /// The connection over which the checkpoint came.
        link: Link,
        /// The checkpoint's number.
        checkpoint: u64,
    },
    /// [`StandbyAction::Discard`] is done: no work for that copy is under way any more, and its memory is
    /// free.
    Discarded {
        /// The connection over which the copy came.
        link: Link,
    },
    /// [`StandbyAction::Release`] is done, or could not be.
    Released {
        /// The connection over which the copy came.
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
    /// The primary goes on without this standby.
    Dismissed {
        /// On which connection.
        link: Link,
    },
    /// A connection ended, perhaps in the middle of a section: that is how a primary dies.
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
        /// The claimed generation.
        generation: u64,
        /// The answer.
        result: ClaimResult,
    },
    /// The operator wants this standby stopped.
    Stop,
    /// A comparison with the VM has shown that this copy is not the VM. Nothing else is wrong with this side.
    Differs {
        /// The connection over which the copy came.
        link: Link,
        /// What differs, in words.
        why: String,
    },
    /// Something failed here that makes this copy worthless (memory, the device set, a disk).
    Failed {
        /// The connection over which the copy came.
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
        /// The generation, as the primary stated it.
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
        /// The connection over which they came.
        link: Link,
    },
    /// Find out whether this host could resume the VM from the staged checkpoint, without a change to memory;
    /// then report [`StandbyEvent::Tried`]. The base is tried before it is acknowledged, so that a failure of
    /// this host is found while the primary lives.
    Try {
        /// The connection over which the checkpoint came.
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
    /// Write all of the staged checkpoint to memory, whatever happens to the link meanwhile; then report
    /// [`StandbyEvent::Applied`]. Meanwhile further checkpoints are staged in other buffers.
    Apply {
        /// The connection over which the checkpoint came.
        link: Link,
        /// Its number.
        checkpoint: u64,
    },
    /// Bring the disks to the committed checkpoint, durably, then report [`StandbyEvent::Settled`], or
    /// [`StandbyEvent::Failed`] if this side could not run the VM. Nothing is claimed before.
    Settle {
        /// The connection over which the checkpoint came.
        link: Link,
        /// Its number.
        checkpoint: u64,
    },
    /// Make whatever this process leaves of the copy say, durably, that it is given up in order, so that
    /// nobody starts from it; then report [`StandbyEvent::Released`]. The copy is at the committed checkpoint
    /// then, and this side can still take over.
    Release {
        /// The connection over which the copy came.
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
    /// Close a connection (bytes queued for it may still go out) and take nothing more from it. Everything
    /// that came over it and is neither acknowledged nor being tried is thrown away, whole or partial; memory
    /// keeps the committed checkpoint.
    Hangup {
        /// Which.
        link: Link,
    },
    /// Throw everything away: staging, memory, state. If a `Try` or an `Apply` is still running, wait for its
    /// end (the memory may soon belong to another VM); it need not be reported any more. Then report
    /// [`StandbyEvent::Discarded`].
    Discard {
        /// The connection over which the copy came.
        link: Link,
    },
    /// Ask the arbiter for a generation; the answer comes back as [`StandbyEvent::Claimed`].
    Claim {
        /// Which.
        generation: u64,
    },
    /// Run the VM from the applied checkpoint. From now on a [`Primary`](crate::Primary) with these numbers
    /// is its machine; this one is over.
    TakeOver {
        /// The connection over which the copy came.
        link: Link,
        /// The checkpoint of memory and state.
        checkpoint: u64,
        /// The generation won.
        generation: u64,
        /// Whether the VM stood still at the primary after this checkpoint, to be handed over.
        handed: bool,
        /// Which frames of the tail are used.
        tail: TailUse,
        /// Whether the operator asked for a stop while this side was the only one that had the VM: then end
        /// it in order now.
        stop: bool,
    },
    /// End the process, after everything queued before has been carried out.
    Exit {
        /// Why.
        reason: StandbyExit,
    },
    /// Something to log.
    Note(StandbyNote),
}

/// A note for the log and the event stream.
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
    /// The arbiter does not answer; given once per reason.
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
    /// The operator's stop is not carried out: the VM was handed over to this host, and runs on here.
    StopForgotten,
    /// The operator's stop continues, but the rest of the copy could not be marked as given up.
    NotReleased {
        /// Why.
        why: String,
    },
    /// Something that came over the link was refused; this side left and listens again.
    StreamRefused {
        /// What was wrong.
        why: String,
    },
    /// The primary goes on without this standby, which left and listens again.
    Dismissed,
    /// The copy was found not to be the VM, and is thrown away; this side left and listens again.
    Differs {
        /// What differs.
        why: String,
    },
}

/// Why a standby's process ends.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum StandbyExit {
    /// The VM ended in order.
    Followed(EndReason),
    /// The operator stopped the standby.
    Stopped,
    /// The VM runs elsewhere.
    Lost {
        /// The generation that was lost.
        generation: u64,
        /// The owner.
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
    /// Frees the memory of an earlier copy.
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
