//! Which frames of the tail a takeover uses.
//!
//! The primary sends copies of frames that no checkpoint has: of *input*, which the guest was given, and of
//! *output*, which it has sent. Each has the epoch to which it belongs. A takeover from checkpoint N decides by
//! that alone:
//!
//! ```text
//!   epoch   ...  R  | R+1 ... N | N+1 ...
//!   input    the guest has it   | given to the guest: it died with the primary
//!   output   left   | repeated  | thrown away: no checkpoint knows of it (invariant 1)
//! ```
//!
//! R is the epoch through which the primary has said that its output has left. What it has let out since is
//! sent twice, which a network may do; what it could not let out any more would otherwise be lost.

/// The epochs whose frames a takeover uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TailUse {
    /// Input of epochs after this one is given to the guest.
    pub(crate) given_after: u64,
    /// Output of epochs after this one is sent again,
    pub(crate) repeated_after: u64,
    /// and through this one.
    pub(crate) repeated_through: u64,
}

impl TailUse {
    /// The frames that a takeover from this committed checkpoint uses, when output is known to have left through
    /// epoch `released`.
    pub fn at(committed: u64, released: u64) -> Self {
        Self { given_after: committed, repeated_after: released, repeated_through: committed }
    }

    /// Whether the guest is given a frame that it was given in this epoch.
    pub fn gives(self, epoch: u64) -> bool {
        epoch > self.given_after
    }

    /// Whether a frame is sent again that the guest has sent in this epoch.
    pub fn repeats(self, epoch: u64) -> bool {
        self.repeated_after < epoch && epoch <= self.repeated_through
    }
}
