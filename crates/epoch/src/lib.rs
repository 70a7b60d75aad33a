//! What one checkpoint consists of, and how it crosses the link.
//!
//! A *checkpoint* is the set of pages that an epoch dirtied, the state of vCPUs, VM and devices, and a number
//! that orders it. This crate defines its wire format, checks everything that comes from the wire, and
//! collects one whole checkpoint ([`Incoming`]) before anybody may look at it. It knows nothing of KVM: pages
//! are bytes with a guest frame number, state sections are bytes with a kind and a version.
//!
//! # The stream
//!
//! Each side of a connection first sends one [`Preface`] and then *sections*. A section is a header of fixed
//! size ([`SectionHeader`]) and a payload. All numbers are little-endian.
//!
//! ```mermaid
//! sequenceDiagram
//!     participant P as primary
//!     participant S as standby
//!     P->>S: preface, Hello {vm, generation, machine, devices, limits, timing, versions}
//!     alt refused
//!         S->>P: preface, Refuse {code, text}
//!     else accepted
//!         S->>P: preface, Accept {dead-after, host, version}
//!     end
//!     loop base synchronisation of disks, a part of a disk at a time, the guest runs
//!         P->>S: DiskSums {sums of a part}
//!         S->>P: DiskWant {which chunks differ}
//!         P->>S: DiskBlocks {those chunks}
//!     end
//!     loop base synchronisation of memory, the guest runs and its output passes through
//!         P->>S: BasePages {round, pages}
//!     end
//!     loop checkpoints; the first one has the flag base_final
//!         P->>S: CheckpointBegin {generation, number, totals, flags}
//!         P->>S: Pages, State, StateChanges, DiskWrites ...
//!         P->>S: Output {frames that the guest has sent in this epoch}
//!         P->>S: Audit {sums of some pages}, DiskAudit {sums of some chunks of disks}
//!         P->>S: CheckpointEnd {number, stamp, totals, chain}
//!         S->>P: Ack {generation, number, stamp}
//!     end
//!     par at any time, also inside a checkpoint
//!         P->>S: Heartbeat {stamp}
//!         P->>S: Input {frames that the guest was given}, Released {through which epoch output has left}
//!         S->>P: Heartbeat {newest stamp heard}
//!         S->>P: Audited {pages compared, what differs}, DiskAudited {chunks compared, what differs}
//!         S->>P: ArbiterSight {whether it sees the arbiter}
//!         P->>S: ArbiterSight {the same}
//!         P->>S: Dismiss: the VM goes on without this standby, which is to leave with its right
//!     end
//!     opt orderly end
//!         P->>S: End {reason}
//!         S->>P: Leave {reason}
//!     end
//! ```
//!
//! # What is checked, and in which order
//!
//! 1. The header's marker and its own checksum. Only then are its fields believed, the length first.
//! 2. The kind, the version, and the length against the limit of the kind ([`SectionKind::limit`]). A number
//!    from the wire never sizes a buffer; [`SectionReader`] allocates once, when it is made.
//! 3. The direction (a standby never sends pages) and the sequence number (so a section that is lost, doubled
//!    or out of order is noticed even if it is whole).
//! 4. The payload's checksum, then its fields.
//! 5. For checkpoints, in [`Incoming`]: generation, number, limits chosen at start, GFNs that are inside the
//!    layout and appear once, disk writes inside their disks, totals, and the *chain*: a checksum over the
//!    headers of every section of the checkpoint. A header contains its payload's checksum, so the chain
//!    covers every byte, yet no byte is read twice.
//!
//! Any mistake gives a precise error and leaves the committed state of the receiver untouched (invariants 2
//! and 7 of ARCHITECTURE.md). The checksums guard against accidents and our own errors, not against an
//! attacker on the link; the link's encryption must do that.
//!
//! # Pages
//!
//! | codec | data of the page | |
//! |---|---|---|
//! | raw | 4096 bytes | |
//! | zero | none | |
//! | granules | a mask (`u64`) and the changed granules of 64 bytes | overwrites the standby's copy |
//! | (unchanged) | the page is left out | not in the stream at all |
//!
//! [`codec::PageWriter`] chooses; [`codec`] has the rule by which it may do so. So, from version 4 of the
//! stream on, the beginning of a checkpoint says how many pages follow at most, and the end how many
//! followed.
//!
//! # State
//!
//! The standby keeps the state of the last checkpoint. `StateChanges` (from version 4 of the stream on) has
//! the changes since then: for each section that differs, the runs of bytes, or the whole section when its
//! length or version changed. Sections that did not change are not mentioned. The totals of a checkpoint
//! count its whole state, so they also show whether the changes were applied to the right one.
//!
//! # The frame tail
//!
//! From version 6 of the stream on. `Input` has copies of frames that the guest was given, each with the number of
//! the checkpoint that will have it; `Output` has copies of frames that the guest has sent in the epoch of the
//! open checkpoint. They belong to no checkpoint, and its chain does not cover them. `Released` says through
//! which epoch all output has left. A takeover from checkpoint N gives the guest the input of later epochs, and
//! sends the output of epochs up to N again that is not known to have left.
//!
//! # The audit
//!
//! From version 7 of the stream on. `Audit`, in front of a checkpoint's end, has sums of some pages as they are at
//! that checkpoint. The standby compares them with its copy when it has applied that checkpoint, and before the
//! next. `Audited` says how far it is and what differs; a standby whose copy differs leaves. `DiskAudit` and
//! `DiskAudited` are the same for chunks of the disks that each host has an image of.
//!
//! # Stamps
//!
//! The primary puts the time of its own clock, in microseconds, into heartbeats and into the end of each
//! checkpoint; the standby returns the newest one that it has heard with every acknowledgement and heartbeat.
//! So the primary knows, by one clock alone, how old the standby's knowledge of it is. `outlive-pair` says
//! what follows from it.
//!
//! # Versions
//!
//! Hello says which versions of the stream the primary writes, Accept which of them both sides use.
//! [`ProtocolVersion`] has the history and the policy.

#![forbid(unsafe_code)]

pub mod codec;
pub mod image;
pub mod wire;

mod incoming;

pub use codec::{CodecCounts, PageCodec, PageEntry, PageWriter, squeeze_zero_pages};
pub use image::limits::*;
pub use image::{
    Ancestor, DISK_RECORD_LEN, DeviceFlags, DeviceInfo, DeviceKind, DiskOp, DiskRecord, DiskRecords, GRANULE,
    GfnRange, Granules, Layout, LayoutError, Lineage, Moment, PAGE_SIZE, PageData, RecordBuf, RecordError,
    StateBuf, StateKind, StateSection, StateVersions, UncheckedRecords, VcpuConstant, VmId, VmIdError,
    Wiring, is_zero,
};
pub use incoming::{Checkpoint, Expect, Incoming, IncomingError, IncomingLimits};
pub use wire::{
    Accept, Ack, ArbiterSight, Audit, AuditRange, AuditSpan, Audited, CheckpointBegin, CheckpointEnd,
    CheckpointFlags, ChunkRange, DISK_SUM_LEN, DiskAudit, DiskAudited, DiskSums, DiskWant, EncodeError,
    Encoder, EndReason, HEADER_LEN, Hello, LeaveReason, Limits, Message, PREFACE_LEN, Pages, Peer, Preface,
    ProtocolVersion, ReadError, Refuse, RefuseCode, Section, SectionHeader, SectionKind, SectionReader,
    StrayKey, TailBuf, TailFrame, TailFrames, VersionRange, WireError,
};
