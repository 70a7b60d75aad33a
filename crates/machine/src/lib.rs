//! The virtual machine: KVM, vCPUs, memory, boot, devices, pause and capture, restore.
//!
//! ```text
//! Machine ─┬─ VcpuSet ── a thread per vCPU: runs, stops, saves, harvests, copies     (vcpu/)
//!          ├─ Ram ────── guest memory, its writes by devices logged                  (memory/)
//!          ├─ Device ─── a row of slots; of the network card output is held          (board.rs, devices/)
//!          └─ Tracker ── which pages changed                                         (outlive-dirty)
//! ```
//!
//! The way of a checkpoint is [`Machine::checkpoint`] in `capture.rs`; the way back is
//! [`Machine::restore`] in `restore.rs`. Saved state is plain data in versioned sections
//! ([`state`]), apart from the run-time types.
//!
//! The crate knows nothing of hosts, links and protocols: it stops, captures, resumes and restores
//! one VM on one machine.

pub mod bus;
pub mod devices;

mod acpi;
mod board;
mod boot;
mod capture;
mod check;
mod event;
mod futex;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzz;
mod irq;
mod kvm;
mod machine;
mod map;
mod memory;
mod outgoing;
mod restart;
mod restore;
mod shape;
pub mod state;
mod thread;
mod tsc;
mod vcpu;
mod vm_state;

pub use acpi::AcpiError;
pub use board::BoardError;
pub use boot::{BootError, DiskBoot, FirmwareError, KernelError, LinuxBoot, LinuxBootError, PayloadOptions};
pub use capture::{After, CaptureError, CaptureReport, InPause, Returned, SpillError, Stuck};
pub use check::{CheckError, DiskHash, Hashes};
pub use devices::port::{INPUT_BYTES, NoSink, PortEnd, PortInput, PortSink};
pub use devices::valve::{EpochError, HeldOutput, Lease, OutputMode, Permit, Valve};
pub use devices::virtio::blk::{
    BlockDevice, BlockError, CHUNK, ChunkSet, DiskOptions, Image, ImageError, LockedImage, LogMode, PartLog,
    SectorSize, WriteLog,
};
pub use devices::virtio::net::{
    Frame, FrameRing, InputTail, MAX_PACKET, MacAddr, NetConfig, NetDevice, NetError, Output, OutputLimits,
    OutputStats, PACKET_HEADER, PER_EPOCH, Started, Tap,
};
pub use event::{EventSink, MachineEvent, PowerRequest, ResetWay};
pub use irq::IrqLineError;
pub use kvm::{Host, HostError, MAX_VCPUS};
pub use machine::{CreateError, Machine, Options, Progress, StartError};
pub use map::{Range, SLOTS, SlotAddress, slot_address};
pub use memory::{
    GuestMemory, LockError, MIN_MEMORY, MemoryError, PAGE_SIZE, Ram, TouchedPages, is_zero_page, lock_memory,
    page_sum, ranges,
};
pub use outgoing::{Outgoing, OutgoingError};
pub use restart::{RESET_ORDER, ResetError, ResetStep, Restarted, StartLinuxError};
pub use restore::RestoreError;
pub use shape::{StateShape, StateTooLarge};
pub use thread::{at_thread_start, keep_alone, precise_timers, spawn, urgent};
pub use vcpu::VcpuError;
pub use vcpu::state::{Item as VcpuItem, RESTORE_ORDER, SAVE_ORDER, VcpuStateError};
pub use vm_state::{
    Item as VmItem, RESTORE_ORDER as VM_RESTORE_ORDER, RestartCount, SAVE_ORDER as VM_SAVE_ORDER,
    VmStateError,
};
