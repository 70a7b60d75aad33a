//! The network device: virtio-net in front of a tap, with the held output of a protected VM between the two.
//!
//! ```text
//!  guest ── transmit queue ──► worker ──► Output ──► tap
//!        ◄── receive queue ─── worker ◄───────────── tap
//! ```
//!
//! - [`output`]: when a frame of the guest may leave. It is the reason why this device exists in this form.
//! - [`tap`]: the host's end of the wire. [`nowhere`]: that of a card that must reach nobody.
//! - [`device`]: the card as driver, network and machine see it.
//! - `frames`: moving frames between the queues and the outside.
//! - [`offload`]: the header in front of each frame. [`control`]: what the driver sets.
//! - [`tail`]: copies of what the guest was given since the last commit, for the standby.
//! - [`ring`]: frames in a fixed piece of memory.
//! - [`persist`]: the saved state. [`announce`]: tells the network where the guest went.
//!
//! Input is never held and never saved: a frame reaches the guest in some epoch or is lost, as on any
//! network. Copies of it go to the standby, best effort, which gives them to the guest at a takeover.
//!
//! For a driver that accepts no offloads, the host's kernel cuts and sums every frame, so no frame is longer
//! than its buffers. A driver that accepts them receives and sends frames of up to 64 KiB, which are held
//! with their headers like any other.

pub mod announce;
pub mod control;
pub mod device;
mod frames;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
pub mod mac;
pub mod nowhere;
pub mod offload;
pub mod output;
pub mod persist;
pub mod ring;
pub mod stats;
pub mod tail;
pub mod tap;

#[cfg(test)]
pub(crate) mod tests;

pub use control::Settings;
pub use device::{MAX_PAIRS, Net, NetConfig, NetDevice, NetError};
pub use mac::MacAddr;
pub use offload::HEADER as PACKET_HEADER;
pub use output::{FrameSink, MAX_FRAME, MAX_PACKET, Output, OutputLimits, OutputStats, Pushed, Released};
pub use persist::{CardState, ImpossibleSetting, NetState};
pub use ring::{Frame, FrameRing};
pub use stats::NetStats;
pub use tail::{InputTail, PER_EPOCH, Started, Tell};
pub use tap::{FramePort, Tap, TapError};
