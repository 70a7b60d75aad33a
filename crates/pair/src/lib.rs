//! Two pure state machines, [`Primary`] and [`Standby`], which make every decision of the two hosts that keep
//! one VM alive; the drivers that carry their decisions out; and the policy that ends epochs.
//!
//! Nothing here does I/O, has a clock or starts a thread. The machines take events and the time, and answer
//! with actions; a driver carries the actions out through ports. The program implements the ports with
//! sockets and threads. A seeded simulator (in this crate's tests) implements them with its world, and drives
//! thousands of schedules of delay, partition, freeze, crash and failing actions through the very code that
//! runs in production.
//!
//! | module | what it answers |
//! |---|---|
//! | [`Primary`], [`Standby`] | what is to be done |
//! | [`driver`] | how it is carried out, and how a program owns a driver and implements its ports |
//! | [`policy`] | when an epoch ends |
//!
//! # What the drivers and the machines are given
//!
//! * `now` is the time since any fixed start, from a clock that does not stop while the process is stopped
//!   (`CLOCK_BOOTTIME`). Read it *after* the event happened: after the read from the socket, not before.
//! * The actions of one event are carried out in order, before the next event is handed in.
//! * A `Tick` comes when [`next_deadline`](Primary::next_deadline) has come; extra ones do no harm.
//! * Every event that comes over a connection, or is about work for one, names the connection ([`Link`]);
//!   events of a connection that the machine has given up are ignored.
//!
//! # The course of events
//!
//! ```mermaid
//! sequenceDiagram
//!     participant G as guest output
//!     participant P as primary
//!     participant S as standby
//!     participant A as arbiter
//!     P->>S: Hello, Accept, base pages (the guest runs, output passes through)
//!     Note over P: pause: capture base-final N, hold output from here on
//!     P->>S: checkpoint N (base_final)
//!     Note over S: staged whole, restored for trial
//!     S->>P: Ack(N): protected
//!     loop every epoch
//!         Note over P: pause: capture N+1
//!         P->>S: checkpoint N+1
//!         Note over S: staged whole, and N is applied
//!         S->>P: Ack(N+1)
//!         Note over S: apply N+1
//!         P->>G: release output up to N+1
//!     end
//!     Note over P: dies
//!     Note over S: link dead
//!     Note over S: drop what is partial, finish applying, make the disks durable
//!     S->>A: claim generation g+1
//!     A->>S: won
//!     Note over S: run as primary of g+1
//! ```
//!
//! ```mermaid
//! stateDiagram-v2
//!     state Primary {
//!         [*] --> Alone
//!         Alone --> Dialling: redial time
//!         Dialling --> Greeting: connected
//!         Greeting --> BaseSync: accepted
//!         Dialling --> Alone: failed
//!         Greeting --> Alone: refused, lost
//!         BaseSync --> Alone: link lost (nobody else can run the VM)
//!         BaseSync --> Guarding: base-final captured, output held
//!         Guarding --> Arbitrating: link lost, standby left, handed over (the last checkpoint is committed and its output has left)
//!         Guarding --> Alone: standby left and has handed its right over (also when it was dismissed)
//!         Arbitrating --> Alone: won g+1, output released
//!         Arbitrating --> Alone: standby has handed its right over before the arbiter was asked
//!         Arbitrating --> Unrivalled: standby has handed its right over, output released
//!         Unrivalled --> Alone: won g+1
//!         Arbitrating --> Fenced: lost
//!         Guarding --> Over: last checkpoint acknowledged
//!     }
//!     state Standby {
//!         [*] --> Listening
//!         Listening --> Base: Hello accepted
//!         Base --> Discarding: link lost (nothing committed), bad stream, trial failed
//!         Base --> Committed: base-final staged, tried, acknowledged
//!         Committed --> GivingUp: bad stream, failed, differs from the VM, dismissed
//!         GivingUp --> Discarding: what is left of the copy says so, or cannot; leave
//!         GivingUp --> Ended: the same after a failure
//!         Discarding --> Listening: the copy's memory is free
//!         Committed --> Settling: link lost
//!         Settling --> Claiming: memory and disks are at the committed checkpoint
//!         Settling --> Ended: failed (nothing was claimed)
//!         Claiming --> TakenOver: won g+1
//!         Claiming --> Ended: lost
//!         Committed --> Ended: orderly end (after the last commit is applied)
//!         Committed --> Releasing: stop
//!         Releasing --> Ended: what is left of the copy says so, leave
//!         Releasing --> Settling: link lost
//!     }
//! ```
//!
//! # Where each invariant lives
//!
//! | invariant (ARCHITECTURE.md) | here |
//! |---|---|
//! | 1 output commit | [`PrimaryAction::Release`] follows only an Ack that came in time; [`PrimaryAction::HoldOutput`] is part of the base-final capture, and without it no standby gets the base; [`PrimaryAction::ReleaseAll`] only follows a won claim, or the word of the only rival that it has given its right up |
//! | 2 whole checkpoints | [`StandbyAction::Apply`] only for a checkpoint staged whole, in sequence, acknowledged, and after the one before it was applied; base pages are refused once a checkpoint is committed |
//! | 3 one active side | a side that may have a rival claims `generation + 1` and waits for the answer; no time-out ends that wait |
//! | 6 bounded | at most `slots` checkpoints unacknowledged; [`Primary::wanted_capture`] says so before the pause, and a standby refuses more |
//! | 7 protection fails, the VM goes on | every loss before the base-final capture leads to Alone at once, every later one after a won claim; a standby that could not run the VM never claims; a stream that a standby refuses makes it *leave*, not take over |
//! | 8 orderly is not dead | the end of the VM is a flag of its last checkpoint; a standby that has committed it never claims |
//!
//! # Time
//!
//! No clock decides *who* runs the VM; the arbiter does. Clocks decide only *when to ask*, and two rules
//! about time silence even a process that was stopped and continued (SIGSTOP, a host whose clock went on). A
//! host whose hypervisor stops it and continues it with a clock that stood still, as some do in a live
//! migration, does not notice that: for some milliseconds it still lets committed output out. Storage that
//! both hosts write to needs a fence command against it.
//!
//! * **The clock comes before the event.** `handle` first looks at the deadlines with the new `now` and only
//!   then at the event. An old Ack that waited in the socket while the process was stopped meets a link that
//!   is already declared lost.
//! * **The primary's lease.** The primary does not measure silence from the last byte heard, but from the
//!   newest *stamp* (the primary's own clock, sent with heartbeats and checkpoints) that the standby has
//!   returned. The standby heard that stamp after it was sent, and restarted its own patience then. The
//!   primary's patience is 70 % of the agreed silence, the standby's 100 %. So as long as the two clocks run
//!   at rates within 30 % of each other, the primary has stopped releasing output before a silent link lets
//!   the standby ask the arbiter - however long anything was under way.
//!
//! An end of the connection (EOF, reset) counts at once on both sides, without waiting. After a SIGKILL the
//! kernel closes the socket when all threads of the process are gone, so nobody is left who could let a frame
//! out, and every millisecond of waiting would be a millisecond of outage. If a third party resets a
//! connection whose two ends live, both ask the arbiter and one of them stops. Until the reset reaches it,
//! the loser can still release output that the winner's VM has produced too - never output that the winner's
//! VM does not know (invariant 1). If both hosts write to the same storage
//! ([`Introduction::shared_storage`]), the standby waits until the primary's lease has ended, whatever ends the
//! connection.

#![forbid(unsafe_code)]

mod claim;
pub mod driver;
mod image;
#[cfg(test)]
mod model;
mod planted;
pub mod policy;
mod primary;
mod redial;
#[cfg(test)]
mod sim;
mod since;
mod standby;
mod tail;

use std::fmt;
use std::time::Duration;

use outlive_epoch::LeaveReason;

pub use driver::{After, PrimaryDriver, PrimaryPorts, StandbyDriver, StandbyPorts, TakeOver};
pub use image::{
    Danger, Differs, ImageArbiter, ImageEnd, ImageFacts, ImageRole, ImageStanding, SharedFacts, Won, rival,
};
pub use primary::{
    Broken, ExitReason, Kept, OutputMode, Primary, PrimaryAction, PrimaryConfig, PrimaryEvent, PrimaryNote,
    PrimaryStatus, Ticket, Wanted,
};
pub use since::{Forgotten, KeptMemory, Needs, Since};
pub use standby::{
    Introduction, Standby, StandbyAction, StandbyConfig, StandbyEvent, StandbyExit, StandbyNote,
    StandbyStatus, Unwelcome,
};
pub use tail::TailUse;

/// One connection. The primary's machine numbers those it dials; the standby's driver numbers those it
/// accepts, and never uses a number twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Link(pub u64);

/// What the arbiter answered to a claim.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ClaimResult {
    /// The generation belongs to the claimer. A repeated claim of one's own generation is won again.
    Won,
    /// The generation belongs to somebody else, forever.
    Lost {
        /// The owner.
        owner: String,
    },
    /// Nobody knows. The claim may or may not have taken effect; it is repeated.
    Unreachable {
        /// Why, in words.
        why: String,
    },
}

/// Why a link is of no further use.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum LossReason {
    /// The other side closed it.
    Closed,
    /// The network reported an error.
    Error(String),
    /// Nothing was heard in time.
    Silent(Duration),
    /// The standby left in order.
    Left(LeaveReason),
    /// The other side broke the protocol.
    Protocol(String),
    /// Something failed at this side (tracking of dirty pages, encoding): protection must start anew.
    Local(String),
}

impl fmt::Display for LossReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the other side closed the link"),
            Self::Error(why) => write!(f, "the link failed: {why}"),
            Self::Silent(time) => write!(f, "nothing heard for {} ms", time.as_millis()),
            Self::Left(reason) => reason.fmt(f),
            Self::Protocol(why) => write!(f, "the other side broke the protocol: {why}"),
            Self::Local(why) => write!(f, "protection failed at this side: {why}"),
        }
    }
}

/// The times of both machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Timing {
    /// Silence after which the other side is taken for dead. The two sides use the larger of their two
    /// values.
    pub dead_after: Duration,
    /// Pause between two attempts to reach a standby, and between two claims while the arbiter is out of
    /// reach.
    pub retry: Duration,
    /// How long a primary waits for the answer to its Hello: the standby first finds memory for the whole VM.
    pub greeting: Duration,
    /// How long a VM that was taken over stays, whatever is broken at its new host: otherwise two hosts with
    /// the same fault would hand it to each other for ever.
    pub handback: Duration,
}

impl Timing {
    /// The usual pause between attempts.
    pub const RETRY: Duration = Duration::from_millis(200);

    /// The longest pause between two attempts to reach a standby that gives the same answer again and again,
    /// in pauses of [`retry`](Self::retry): 5 s with the usual one.
    pub const LONGEST_RETRY: u32 = 25;

    /// The pause between attempts to reach the host that has handed the VM over, which comes back as its standby, and for
    /// how long it is waited for like this.
    pub const RETURN: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(2));

    /// The usual wait for the answer to Hello.
    pub const GREETING: Duration = Duration::from_secs(5);

    /// The usual stay.
    pub const HANDBACK: Duration = Duration::from_secs(10);

    /// How many times longer the VM stays when the network is broken, which comes and goes.
    pub const NETWORK_RESTS: u32 = 6;

    /// For how many times [`dead_after`](Self::dead_after) a primary at whose host something is broken lets its
    /// standby ask the arbiter first.
    pub const GIVES_WAY: u32 = 4;

    /// Timing with the usual pauses between attempts.
    pub fn new(dead_after: Duration) -> Self {
        Self {
            dead_after,
            retry: Self::RETRY,
            greeting: Self::GREETING.max(dead_after),
            handback: Self::HANDBACK,
        }
    }

    /// The primary's patience: shorter than the standby's, so that it falls silent first.
    pub fn primary_patience(&self) -> Duration {
        self.dead_after * 7 / 10
    }

    /// The time between two heartbeats.
    pub fn heartbeat(&self) -> Duration {
        self.dead_after / 8
    }
}
