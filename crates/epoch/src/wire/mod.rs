//! How a checkpoint crosses the link: the stream's versions, its sections, and one file for each message.

mod accept;
mod ack;
mod checkpoint;
mod disk_sums;
mod disk_want;
mod disk_writes;
mod encoder;
mod end;
mod error;
mod fields;
mod heartbeat;
mod hello;
mod kind;
mod message;
mod pages;
mod reader;
mod refuse;
mod section;
mod state;
mod version;

pub use accept::Accept;
pub use ack::Ack;
pub use checkpoint::{CheckpointBegin, CheckpointEnd, CheckpointFlags};
pub use disk_sums::{DISK_SUM_LEN, DiskSums};
pub use disk_want::DiskWant;
pub use encoder::{EncodeError, Encoder};
pub use end::{EndReason, LeaveReason};
pub use error::{ReadError, WireError};
pub use hello::{Hello, Limits};
pub use kind::{Peer, SectionKind};
pub use message::Message;
pub use pages::Pages;
pub use reader::SectionReader;
pub use refuse::{Refuse, RefuseCode};
pub use section::{HEADER_LEN, Section, SectionHeader};
pub use version::{PREFACE_LEN, Preface, ProtocolVersion, VersionRange};
