//! What a checkpoint is, wherever it is: in the machine that captured it, on the wire, at the standby.
//!
//! Nothing here knows KVM, the link or when a codec is used. The machine, the link and the standby share
//! these types, so a page, a state section or a disk record has one form from beginning to end.

mod device;
mod disk;
pub(crate) mod granules;
mod layout;
pub mod limits;
mod lineage;
mod moment;
mod page;
mod state;
mod vm;

pub use device::{DeviceFlags, DeviceInfo, DeviceKind, Wiring};
pub use disk::{DISK_RECORD_LEN, DiskOp, DiskRecord, DiskRecords, RecordBuf, RecordError, UncheckedRecords};
pub use granules::{GRANULE, Granules};
pub use layout::{GfnRange, Layout, LayoutError};
pub use lineage::{Ancestor, Lineage};
pub use moment::Moment;
pub use page::{PAGE_SIZE, PageData, is_zero};
pub use state::{StateBuf, StateKind, StateSection, StateVersions, VcpuConstant};
pub use vm::{VmId, VmIdError};
