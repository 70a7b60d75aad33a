//! The console device: virtio-console with one port (`hvc0` in Linux).
//!
//! ```text
//!  guest ── transmit queue ──► worker ──► PortSink
//!        ◄── receive queue ─── worker ◄── PortInput
//! ```
//!
//! - [`device`]: the machine's handle. [`config`]: the size of the screen. `worker`: the thread; `queues`:
//!   moving bytes.
//! - [`persist`]: what a resumed guest finds again. [`stats`]: the counters.
//!
//! It moves bytes in bulk, where the serial port takes a trap for each; but a kernel has it only after it has
//! found its devices, so early messages and panics are on the serial port.

pub mod config;
pub mod device;
pub mod persist;
mod queues;
pub mod stats;
mod worker;

#[cfg(test)]
mod tests;

pub use config::ScreenSize;
pub use device::{Console, ConsoleDevice};
pub use persist::{ConsoleState, RestoreError};
pub use stats::ConsoleStats;
