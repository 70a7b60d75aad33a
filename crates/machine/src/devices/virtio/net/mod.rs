//! The network device: virtio-net in front of a tap, with the held output of a protected VM between the two.
//!
//! ```text
//!  guest ── transmit queue ──► worker ──► Output ──► tap
//!        ◄── receive queue ─── worker ◄───────────── tap
//! ```
//!
//! - [`output`]: when a frame of the guest may leave. The reason for this device to exist in this form.
//! - [`tap`]: the host's end of the wire.
//! - [`device`]: the machine's handle, the configuration space.
//! - `worker`: the thread, its events and its batches inside the gate; `queues`: moving frames.
//! - [`persist`]: what a resumed guest finds again. [`announce`]: telling the network where the guest went.
//!
//! Input is never held and never saved: a frame reaches the guest in some epoch or is lost, as on any
//! network.
//!
//! The device offers no offloads and no merged buffers: every frame is at most 1514 bytes (1518 with a VLAN
//! tag), has a 12-byte header in guest memory that says nothing, and the guest checks its own sums.

pub mod announce;
pub mod device;
pub mod mac;
pub mod output;
pub mod persist;
mod queues;
pub mod stats;
pub mod tap;
mod worker;

#[cfg(test)]
mod tests;

pub use device::{Net, NetConfig, NetDevice, NetError};
pub use mac::MacAddr;
pub use output::{
    EpochError, FrameSink, MAX_FRAME, Output, OutputLimits, OutputMode, OutputStats, Pushed, Released,
};
pub use persist::{NetState, RestoreError};
pub use stats::NetStats;
pub use tap::{FramePort, Tap, TapError};
