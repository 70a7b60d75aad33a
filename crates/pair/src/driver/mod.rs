//! Drivers: each owns one state machine and carries its actions out through *ports*.
//!
//! The program implements the ports with sockets and threads, the simulator (in this crate's tests) with its
//! world. So the code between a decision and its effect is simulated too, mistakes and all.
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
//! A driver has no lock, no thread and no clock. A program with several threads puts it into one mutex. Every
//! call goes like this, on any thread:
//!
//! 1. Lock. If the event needs something in the ports first (a new connection, a whole staged buffer), put it
//!    there with `ports_mut`: under the same lock, so no decision comes in between.
//! 2. Read the clock (`CLOCK_BOOTTIME`, after the event happened) and call the driver.
//! 3. Unlock.
//! 4. Do what the [`After`] says.
//!
//! One thread *waits*: it asks `wait` until when it may sleep, sleeps until then or until it is woken, and
//! hands in a `Tick`. [`After::wake`] says when another thread must wake it. The same thread takes
//! checkpoints, takes over and ends the process, and no other thread hands in a `Tick`. These ticks earn the
//! heartbeats, and the arbiter is asked only with them. So a host whose waiting thread hangs is given up by
//! the other host and never wins the VM.
//!
//! # How to implement ports
//!
//! * **Each method queues work and returns.** It runs under the driver's lock, and the pause of the VM waits
//!   for that lock. So a method makes no system call that can block, takes no lock that another thread holds
//!   over such a call, joins no thread, drops nothing large and writes no log line. Sending into a channel is
//!   fine.
//! * **Methods are called in the order of the decisions.** The queues behind them must keep that order for
//!   each link and for the output.
//! * **Work that takes time is reported by an event** when it is done, from any thread; never from inside a
//!   port.
//! * **A method that cannot do its work returns why.** The driver turns that into the matching event and
//!   hands it in at once, under the same lock. A method that fails has done nothing.
//! * **The link is the session.** A report of work for a link names this link; the state machine ignores
//!   reports about an earlier one.
//! * The primary's [`hold`](PrimaryPorts::hold), [`begin_epoch`](PrimaryPorts::begin_epoch),
//!   [`set_lease`](PrimaryPorts::set_lease) and [`set_beats`](PrimaryPorts::set_beats) are called in the
//!   pause: they allocate nothing.
//!
//! # After the lock
//!
//! [`After::drain`] is the part of an action that cannot be done under the lock, because it makes system
//! calls. At the primary the valve is drained: output whose epochs are committed goes out, and each piece
//! checks the lease first. At the standby the bytes that the ports have queued for a link are written. The
//! thread that handed in the event does it itself: waking another thread would delay the guest's answers to
//! its clients.

mod core;
mod primary;
mod standby;

pub use primary::{PrimaryDriver, PrimaryPorts};
pub use standby::{StandbyDriver, StandbyPorts, TakeOver};

/// What the caller of a driver must do after it has dropped the lock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use = "output stays held and the waiting thread asleep until this is done"]
pub struct After {
    /// Drain: let out what the ports were told to let out. See [the module](self).
    pub drain: bool,
    /// Wake the waiting thread: there may be an earlier deadline, or a checkpoint may be wanted.
    pub wake: bool,
}

impl After {
    /// What two calls require together.
    pub fn and(self, other: Self) -> Self {
        Self { drain: self.drain || other.drain, wake: self.wake || other.wake }
    }
}
