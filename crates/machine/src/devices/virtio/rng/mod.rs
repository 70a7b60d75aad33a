//! The entropy device: virtio-rng, fed by this host's kernel.
//!
//! - [`device`]: the machine's handle. `worker`: the thread and how fast it may give; `queues`: filling
//!   buffers.
//! - [`source`]: where the bytes come from. [`persist`]: what a resumed guest finds again. [`stats`]: the
//!   counters.
//!
//! What is given becomes part of the guest's memory, so a guest that is resumed elsewhere has the same bytes;
//! only what it asks for afterwards comes from the other host.

pub mod device;
pub mod persist;
mod queues;
pub mod source;
pub mod stats;
mod worker;

#[cfg(test)]
mod tests;

pub use device::{Rng, RngDevice};
pub use persist::{RestoreError, RngState};
pub use source::{EntropySource, HostEntropy};
pub use stats::RngStats;
