//! Exit codes, and the one line that goes with them.

use std::fmt::Display;

/// Ended in order.
pub const OK: u8 = 0;
/// Failed while running.
pub const FAILED: u8 = 1;
/// Wrong options, or something missing on this machine.
pub const USAGE: u8 = 2;
/// The other side won the VM; this one has stopped.
pub const FENCED: u8 = 3;

/// Prints the one line for exit code 2 and returns the code. `error` says what is wrong and what to do.
pub fn usage(error: impl Display) -> u8 {
    eprintln!("outlive: {error}");
    USAGE
}
