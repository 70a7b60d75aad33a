//! The serial port: a 16550A (COM1), a console for which every kernel has a driver.
//!
//! ```text
//!  guest ── registers ──► uart ──► PortSink          on the vCPU's thread, byte by byte
//!        ◄── registers ── uart ◄── worker ◄── PortInput     64-byte FIFO, filled when it is empty
//! ```
//!
//! - [`device`]: the registers and the machine's handle. `worker`: the thread that delivers input.
//! - [`persist`]: the saved state.
//!
//! The line has no speed: a byte is sent when it is written, so the transmitter is always empty and a driver
//! never waits. FIFO resets and the modem lines do nothing.

pub mod device;
pub mod persist;
mod uart;
mod worker;

#[cfg(test)]
mod tests;

pub use device::{SerialHost, SerialPort};
pub use persist::{RestoreError, SerialState};
