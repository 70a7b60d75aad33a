//! How a guest comes to its first instruction.

mod payload;

pub use payload::{BootError, PayloadOptions};
pub(crate) use payload::{load, start_registers};
