//! What can be wrong with a checkpoint whose sections are valid.

use crate::image::{RecordError, StateKind};
use crate::wire::SectionKind;

/// Why a checkpoint is refused. The buffer must be [`reset`](super::Incoming::reset) before it is
/// used again.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IncomingError {
    /// The memory for these limits is not available.
    #[error("no memory for an incoming checkpoint of {bytes} bytes")]
    Memory {
        /// Bytes asked for.
        bytes: u64,
    },
    /// A section that has no place in a checkpoint, or not at this point.
    #[error("section {kind:?} came {place}")]
    Order {
        /// The section's kind.
        kind: SectionKind,
        /// Where in the checkpoint.
        place: &'static str,
    },
    /// A checkpoint of another generation.
    #[error("checkpoint of generation {found}; this connection is of generation {expected}")]
    Generation {
        /// The connection's.
        expected: u64,
        /// The checkpoint's.
        found: u64,
    },
    /// A checkpoint was left out or came twice.
    #[error("checkpoint {found} where checkpoint {expected} was due")]
    Number {
        /// The number that was due.
        expected: u64,
        /// The number found.
        found: u64,
    },
    /// The first checkpoint without the flag base_final, or a later one with it.
    #[error("checkpoint {number} has base_final = {found}; the opposite was due")]
    BaseFinal {
        /// The checkpoint's number.
        number: u64,
        /// The flag.
        found: bool,
    },
    /// More pages than the limit chosen at start.
    #[error("checkpoint {number} has {found} pages; the limit max_pages is {limit}")]
    TooManyPages {
        /// The checkpoint's number.
        number: u64,
        /// Pages announced or sent.
        found: u64,
        /// The limit.
        limit: u32,
    },
    /// More state than the limit chosen at start.
    #[error("checkpoint {number} has {found} bytes of state; the limit max_state_bytes is {limit}")]
    TooMuchState {
        /// The checkpoint's number.
        number: u64,
        /// Bytes announced or sent.
        found: u64,
        /// The limit.
        limit: u32,
    },
    /// More disk writes than the limit chosen at start.
    #[error("checkpoint {number} has {found} bytes of disk writes; the limit max_disk_bytes is {limit}")]
    TooManyDiskWrites {
        /// The checkpoint's number.
        number: u64,
        /// Bytes announced.
        found: u64,
        /// The limit.
        limit: u32,
    },
    /// Not the bytes of disk writes, or a write outside the VM's disks.
    #[error("checkpoint {number}: {source}")]
    Records {
        /// The checkpoint's number.
        number: u64,
        /// What is wrong with them.
        source: RecordError,
    },
    /// More state sections than the limit chosen at start.
    #[error("checkpoint {number} has more than {limit} state sections")]
    TooManySections {
        /// The checkpoint's number.
        number: u64,
        /// The limit.
        limit: u32,
    },
    /// A page that is not RAM.
    #[error("GFN {gfn:#x} is outside the layout of the VM")]
    OutsideLayout {
        /// The frame.
        gfn: u64,
    },
    /// Sums of chunks that no replicated disk has.
    #[error("chunk {chunk} of disk {disk}, to be compared, is outside the VM's replicated disks")]
    OutsideDisk {
        /// The disk.
        disk: u16,
        /// The first chunk.
        chunk: u64,
    },
    /// A page that came twice.
    #[error("GFN {gfn:#x} is twice in checkpoint {number}")]
    DuplicatePage {
        /// The frame.
        gfn: u64,
        /// The checkpoint's number.
        number: u64,
    },
    /// A state section that came twice.
    #[error("state section {kind:?} {index} is twice in checkpoint {number}")]
    DuplicateState {
        /// The section's kind.
        kind: StateKind,
        /// The section's index.
        index: u16,
        /// The checkpoint's number.
        number: u64,
    },
    /// Changes of the state that do not fit the state of the previous checkpoint.
    #[error("checkpoint {number} has changes of state section {kind:?} {index}, but {what}")]
    Changes {
        /// The checkpoint's number.
        number: u64,
        /// The section's kind.
        kind: StateKind,
        /// The section's index.
        index: u16,
        /// What is wrong.
        what: &'static str,
    },
    /// Beginning, content and end disagree.
    #[error("checkpoint {number} has {found} {what}; {expected} were due")]
    Totals {
        /// The checkpoint's number.
        number: u64,
        /// Pages, bytes of state, or bytes of disk writes.
        what: &'static str,
        /// The announced number.
        expected: u32,
        /// The number found.
        found: u32,
    },
    /// Not the sections that the primary sent.
    #[error(
        "checkpoint {number}: the chain over its sections is {computed:#010x}, the end says {stored:#010x}"
    )]
    Chain {
        /// The checkpoint's number.
        number: u64,
        /// In the end of the checkpoint.
        stored: u32,
        /// Over what was received.
        computed: u32,
    },
}
