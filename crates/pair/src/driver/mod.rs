//! Decisions carried out: a driver owns one state machine and carries its actions out through *ports*.
//!
//! The program implements the ports with sockets and threads, the simulator (in this crate's tests) with its
//! world. So the code between a decision and its effect is the code that is simulated, mistakes and all.
//!
//! ```text
//!   threads ──event──► PrimaryDriver / StandbyDriver ──action──► ports ──queues──► threads
//!      ▲                       │ failure of an action                                 │
//!      │                       └──────────► event                                     │
//!      └──────────────────────────── events of what came of it ◄─────────────────────┘
//! ```
//!
//! # How to own a driver
//!
//! A driver has no lock, no thread, no clock. A program with several threads puts it into one mutex. Every
//! call goes like this, on any thread:
//!
//! 1. Lock. If the event needs something in the ports first (a new connection, a buffer that is staged
//!    whole), put it there with `ports_mut`: under the same lock, so no decision comes in between.
//! 2. Read the clock (`CLOCK_BOOTTIME`, after the event happened), call the driver.
//! 3. Unlock.
//! 4. Do what the [`After`] says.
//!
//! One thread *waits*: it asks `wait` until when it may sleep, sleeps until then or until it is woken,
//! and hands in a `Tick`. [`After::wake`] says when another thread must wake it. It is also the thread that
//! takes checkpoints, takes over and ends the process, and no other hands in a `Tick`: by these ticks it earns
//! the heartbeats, and only with them is the arbiter asked, so that a host on which this thread stands still
//! is given up by the other one and never wins the VM.
//!
//! # How to implement ports
//!
//! * **Each method queues work, and returns.** It runs under the driver's lock, and the pause of the VM waits
//!   for that lock. So a method makes no system call that can block, takes no lock that another thread holds
//!   over one, joins no thread, drops nothing large and writes no log line. Sending into a channel is fine.
//! * **Methods are called in the order of the decisions.** What the queues behind them do must keep that
//!   order for each link and for the output.
//! * **What takes time is reported by an event** when it is done, from any thread; never from inside a port.
//! * **A method that cannot do its work returns why.** The driver turns that into the event that fits and
//!   hands it in at once, under the same lock. A method that fails has done nothing.
//! * **The link is the session.** What is reported of work for a link names this link; the state machine
//!   ignores what belongs to an earlier one.
//! * The primary's [`hold`](PrimaryPorts::hold), [`begin_epoch`](PrimaryPorts::begin_epoch),
//!   [`set_lease`](PrimaryPorts::set_lease) and [`set_beats`](PrimaryPorts::set_beats) are called in the
//!   pause: they allocate nothing.
//!
//! # After the lock
//!
//! [`After::drain`] is the part of an action that cannot be done under the lock, because it makes system
//! calls: at the primary the valve is drained (output whose epochs are committed goes out, each piece after a
//! look at the lease), at the standby the bytes that the ports have queued for a link are written. The thread
//! that handed in the event does it itself: a wake-up of another thread would be on the guest's way to its
//! clients.

mod core;
mod primary;
mod standby;

pub use primary::{PrimaryDriver, PrimaryPorts};
pub use standby::{StandbyDriver, StandbyPorts, TakeOver};

/// What the caller of a driver must do once it has dropped the lock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use = "output stays held and the waiting thread asleep until this is done"]
pub struct After {
    /// Drain: let out what the ports have been told to let out. See [the module](self).
    pub drain: bool,
    /// Wake the thread that waits: an earlier deadline, or a checkpoint that is wanted, may have come.
    pub wake: bool,
}

impl After {
    /// What two calls ask for together.
    pub fn and(self, other: Self) -> Self {
        Self { drain: self.drain || other.drain, wake: self.wake || other.wake }
    }
}
