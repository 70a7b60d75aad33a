//! What the sender of a link is told, and what it reports.

use std::sync::Arc;
use std::time::Duration;

use outlive_dirty::Gfn;
use outlive_epoch::{ArbiterSight, CodecCounts, EndReason, Hello, ProtocolVersion};
use outlive_machine::{Outgoing, Ram};
use outlive_pair::Ticket;

use super::FrameTail;
use crate::audit::Audit;
use crate::disk::DiskSection;
use crate::heat::Counter;

/// One checkpoint, or a part of one that is larger than staging.
pub(crate) struct CheckpointPart {
    /// The decision about it.
    pub(crate) ticket: Ticket,
    /// Present on the first part: pages and state bytes of all parts together.
    pub(crate) totals: Option<(usize, usize)>,
    /// Whether this is the last part.
    pub(crate) last: bool,
    /// Pages and state.
    pub(crate) staging: Outgoing,
}

/// Work for the thread.
pub(crate) enum Job {
    /// The introduction.
    Hello(Box<Hello>),
    /// Continue in this version of the stream, on which both sides have agreed, and with copies of these frames
    /// and sums of pages if that version has them. Changed pages are counted there.
    Speak(ProtocolVersion, Option<FrameTail>, Arc<Audit>, Option<Counter>),
    /// Send the copies of what the guest was given.
    Tail,
    /// Pages of the running guest, read when they are sent.
    BaseRound {
        /// The round, from 1.
        round: u32,
        /// Which pages.
        gfns: Vec<Gfn>,
        /// Where they are.
        ram: Arc<Ram>,
    },
    /// A part of the base synchronisation of disks.
    Disk(DiskSection),
    /// A checkpoint.
    Checkpoint(Box<CheckpointPart>),
    /// Whether this host sees the arbiter. From version 8 of the stream on.
    Sight(ArbiterSight),
    /// A heartbeat with the time at which it is written.
    Heartbeat,
    /// The orderly end of the VM.
    End(EndReason),
    /// The VM goes on without this standby. From version 8 of the stream on.
    Dismiss,
    /// Close the link after everything before this.
    Close,
}

/// A base round that was sent.
pub(crate) struct SentRound {
    /// The list, which can be used again.
    pub(crate) gfns: Vec<Gfn>,
    /// Bytes that were written to the link.
    pub(crate) bytes: u64,
    /// In this time.
    pub(crate) took: Duration,
}

/// A report of the thread.
pub(crate) enum SenderReport {
    /// The buffer can be used again.
    Free(Outgoing),
    /// Some base pages are sent.
    BaseProgress {
        /// How many in this step.
        pages: u64,
    },
    /// A base round is sent.
    BaseRoundDone(SentRound),
    /// Bytes written since the last report.
    Sent(u64),
    /// A checkpoint is sent to its end.
    Shipped(Shipped),
    /// How the pages of a checkpoint, or of a part of one, were written down.
    Written(CodecCounts),
    /// The link is gone. Jobs that come after this are dropped.
    Failed(String),
}

/// How long sending a checkpoint took, all its parts together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shipped {
    /// Its number.
    pub(crate) number: u64,
    /// From the order to send until the thread began.
    pub(crate) queue: Duration,
    /// Putting it together.
    pub(crate) encode: Duration,
    /// Writing it to the link.
    pub(crate) send: Duration,
}
