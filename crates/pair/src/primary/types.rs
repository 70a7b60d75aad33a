//! The input and output of the primary's machine.

use std::fmt;
use std::time::Duration;

use outlive_epoch::{CheckpointFlags, EndReason, LeaveReason, RefuseCode};

use super::broken::{Broken, Kept};
use crate::{ClaimResult, Link, LossReason, Timing};

/// What a primary must know at its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PrimaryConfig {
    /// The generation that this host owns.
    pub generation: u64,
    /// The last checkpoint of the VM: 0 for a new VM; after a takeover, the one from which it was resumed.
    pub checkpoint: u64,
    /// Whether it was handed over by the host from which it came: that one comes back as its standby, within moments.
    pub handed: bool,
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
    /// Time has passed. Only the thread that waits, takes checkpoints and follows may hand this in: it is the
    /// sign that this thread makes progress.
    Tick,
    /// That thread begins something during which it gives no sign. In a pause whoever ends it for that thread may
    /// hand this in as well.
    LongWork {
        /// How long it may take.
        within: Duration,
    },
    /// A dialled connection is up.
    Connected {
        /// Which.
        link: Link,
    },
    /// A connection could not be made. Every [`PrimaryAction::Dial`] must be answered with this or
    /// `Connected`.
    DialFailed {
        /// Which.
        link: Link,
        /// Why, in words.
        why: String,
        /// Whether it would fail the same way at once: then the next attempt comes later and later.
        lasts: bool,
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
    /// Bytes have arrived that are not a whole message yet.
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
    /// The standby leaves and will not take over. With [`LeaveReason::Released`] the arbiter is not needed.
    Leave {
        /// On which connection.
        link: Link,
        /// Why.
        reason: LeaveReason,
    },
    /// A connection ended, or cannot be used any more (damage; a failure of tracking or sending on this
    /// side).
    LinkLost {
        /// Which.
        link: Link,
        /// Why.
        why: LossReason,
    },
    /// The VM is paused and all of a checkpoint is in staging. Handed in inside the pause, and the answer is
    /// carried out inside it: output is held, or belongs to the next epoch, from the first instruction after
    /// it. After an [`End`](Self::End) or a [`Stop`](Self::Stop) it is the last one. A pause takes time, and
    /// meanwhile the standby may leave and another one may accept: what was captured for one is no base for
    /// the other.
    Captured {
        /// For which connection the pause began.
        link: Link,
        /// Whether it began as [`Wanted::Base`].
        base: bool,
        /// Whether the vCPUs stay stopped after it ([`Wanted::HandOver`]).
        stays: bool,
    },
    /// Output cannot be held. Must follow the [`PrimaryAction::HoldOutput`] before anybody is given the
    /// ticket of that capture: the machine relies on no standby having the base.
    HoldFailed {
        /// For which connection.
        link: Link,
        /// Why, in words.
        why: String,
    },
    /// Another process has won a newer generation, and no question of this one was open: somebody has started an
    /// image of the VM elsewhere. Whoever has the newest generation runs the VM, and nobody else.
    Superseded {
        /// The newest generation.
        generation: u64,
        /// Who won it.
        owner: String,
    },
    /// The arbiter's answer.
    Claimed {
        /// The claimed generation.
        generation: u64,
        /// The answer.
        result: ClaimResult,
    },
    /// The guest has ended the VM. The first reason counts. No vCPU runs any more, and the coordinator
    /// continues until [`PrimaryAction::Exit`].
    End {
        /// Why.
        reason: EndReason,
    },
    /// Something is broken at this host, and the guest will suffer from it. The answer is
    /// [`PrimaryAction::GiveAway`] or [`PrimaryAction::Endure`], now or later.
    Broken {
        /// What.
        what: Broken,
        /// Whether it has met the VM on its last host, too, as far as that can be told.
        again: bool,
    },
    /// It is broken no longer.
    Mended {
        /// What.
        what: Broken,
    },
    /// The standby says whether its host reaches the network of the guest's clients.
    StandbyReaches {
        /// On which connection.
        link: Link,
        /// `None`: it does not know.
        reaches: Option<bool>,
    },
    /// The operator wants the VM at its standby. The answer is [`PrimaryAction::HandOver`] or
    /// [`PrimaryAction::Keep`], at once.
    HandOver,
    /// All output of the VM that is being handed over, and that is committed, has left. To be handed in once the
    /// checkpoint of [`Wanted::HandOver`] is committed: then the VM is the standby's.
    OutputLeft,
    /// The opposite: a write to storage that both hosts use is still at the disk, which does not answer.
    OutputStays,
    /// A disk that both hosts use has not answered a request for some time, or answers again. If the VM went now, the
    /// write could land after those of the new host.
    SharedDisks {
        /// Whether one hangs.
        hang: bool,
    },
    /// The operator wants the VM stopped.
    Stop {
        /// Whether the guest can be asked to shut itself down; it is asked the first time.
        ask_guest: bool,
    },
}

/// The decision about a checkpoint. It goes with the pages to the thread that sends them, so that nobody
/// looks up again what may have changed since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ticket {
    /// The only connection over which the checkpoint may be sent.
    pub link: Link,
    /// The generation in which it was captured.
    pub generation: u64,
    /// Its number.
    pub number: u64,
    /// Its flags.
    pub flags: CheckpointFlags,
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
    /// From now on no output leaves; it is kept, with the number of its epoch. If that is impossible, report
    /// [`PrimaryEvent::HoldFailed`].
    HoldOutput {
        /// The connection that requires it.
        link: Link,
        /// The epoch that begins.
        epoch: u64,
    },
    /// Output that is held from now on belongs to this epoch. If that is impossible, report
    /// [`PrimaryEvent::LinkLost`].
    BeginEpoch {
        /// The connection that requires it.
        link: Link,
        /// The epoch that begins.
        epoch: u64,
    },
    /// Send the checkpoint just captured. All output produced before this pause belongs to it.
    Ship(Ticket),
    /// The checkpoint just captured is useless (the link was lost meanwhile): free its staging.
    DropCapture,
    /// Let the output of all epochs up to this one out, but ask
    /// [`Primary::may_release`](crate::Primary::may_release) before each piece.
    Release {
        /// Number of the newest committed checkpoint.
        through: u64,
    },
    /// Send a heartbeat with the time of this clock when it is written, even between the sections of a long
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
    /// Tell the standby that the VM goes on without it, for a trouble of this side's own. If that is impossible, or the
    /// stream is older than version 8, report [`PrimaryEvent::LinkLost`].
    Dismiss {
        /// On which connection.
        link: Link,
    },
    /// Close a connection (bytes queued for it may still go out) and end the protection that used it. Held
    /// output stays held.
    Hangup {
        /// Which.
        link: Link,
    },
    /// Ask the arbiter for a generation; the answer comes back as [`PrimaryEvent::Claimed`].
    Claim {
        /// Which.
        generation: u64,
    },
    /// Let all held output out, in order; from now on output passes through.
    ReleaseAll {
        /// The generation in which the VM goes on.
        generation: u64,
    },
    /// Ask the guest to shut itself down, as by its power button.
    AskGuest,
    /// Stop the vCPUs for good.
    StopGuest,
    /// Another side owns the VM: throw away all held output, and all that follows.
    Fence {
        /// The generation that was lost.
        generation: u64,
        /// The owner.
        owner: String,
    },
    /// The VM is left to its standby: its link closes next, and what is held stays held. Whether the standby
    /// takes it over is known when the arbiter has answered. [`Fence`](Self::Fence): it has. Otherwise the VM
    /// goes on here.
    GiveAway {
        /// What is broken here.
        what: Broken,
    },
    /// The VM stays although this is broken. The guest hears of a disk's failure now.
    Endure {
        /// What is broken.
        what: Broken,
        /// Why the VM stays.
        why: Kept,
    },
    /// The VM is handed over to its standby, because its operator wants that. It runs on here until the checkpoint
    /// of [`Wanted::HandOver`], and stands still from then on. Once that is committed and its output has left
    /// ([`PrimaryEvent::OutputLeft`]), the link closes, and who has the VM is known when the arbiter has answered.
    HandOver,
    /// All of the VM that is being handed over is committed: let its output out, and hand in
    /// [`PrimaryEvent::OutputLeft`].
    LetGo,
    /// The VM is not handed over.
    Keep {
        /// Why it stays.
        why: Kept,
    },
    /// End the process, after everything queued before has been carried out.
    Exit {
        /// Why.
        reason: ExitReason,
    },
    /// Something to log.
    Note(PrimaryNote),
}

/// A note for the log and the event stream.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum PrimaryNote {
    /// A standby could not be reached; given once per reason.
    DialFailed {
        /// Why.
        why: String,
    },
    /// A standby refused; given once per reason.
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
        /// Whether output is held until the arbiter has answered.
        held: bool,
    },
    /// The VM goes on without this standby, which is told so. Output is held until it has answered.
    Dismissing {
        /// What has failed here.
        why: String,
    },
    /// The arbiter is asked.
    Arbitrating {
        /// For which generation.
        generation: u64,
    },
    /// It is heard only now that the lost standby has handed its right over: output is held no longer.
    RightHandedOver,
    /// The arbiter does not answer; given once per reason.
    ArbiterUnreachable {
        /// Why.
        why: String,
        /// Output is held until it answers. If not, only the next standby waits for it.
        held: bool,
    },
    /// The VM was left to its standby.
    GivenAway {
        /// What is broken here.
        what: Broken,
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
        /// The owner.
        owner: String,
    },
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

/// The checkpoint that is wanted next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// None: there is no standby for it, or no free slot.
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
    /// The last one before the VM goes on at its standby, at once: the vCPUs stay stopped after it. They run on here if
    /// [`Primary::guest_may_run`](crate::Primary::guest_may_run) says so again.
    HandOver,
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
