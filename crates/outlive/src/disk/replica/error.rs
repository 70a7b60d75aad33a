//! What can go wrong with a standby's disks.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use outlive_epoch::{ChunkRange, RecordError};

use super::claims::ClaimError;
use crate::audit::Place;
use crate::disk::sidecars::SidecarsError;

/// Why a standby's disks cannot begin.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplicaStartError {
    /// The file systems refuse what the disks will need.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// A disk that was shared cannot become an image.
    #[error("the standby cannot remove the note of the shared disk {}: {source}", .image.display())]
    Note { image: PathBuf, source: io::Error },
    /// The operating system gives no thread.
    #[error("the standby cannot start a thread: {0}")]
    NoThread(#[source] io::Error),
}

/// What is wrong with something that the primary has sent about the disks.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UnfitError {
    /// Sums of a disk that this standby does not compare.
    #[error("sums of disk {0}, which is not replicated")]
    SumsOfNone(u16),
    /// Sums of chunks behind the end of a disk.
    #[error("sums of chunks {first}+{count} of disk {disk}, which has {has}")]
    SumsBeyond { disk: u16, first: u64, count: u32, has: u64 },
    /// There is no memory for chunks.
    #[error("no memory for the blocks of a disk")]
    NoMemory,
    /// The records of chunks are damaged, or of another disk.
    #[error(transparent)]
    Records(#[from] RecordError),
    /// A base synchronisation has no flush.
    #[error("a flush among the blocks of a disk")]
    Flush,
    /// Chunks for which nobody has asked.
    #[error("blocks that were not asked for")]
    NotWanted,
    /// The primary does not wait for answers.
    #[error("more bytes of the disks than may be under way")]
    TooMuch,
    /// A hash of a disk that this standby does not write.
    #[error("a hash of disk {0}, which is not replicated")]
    HashOfNone(u16),
}

/// Why the disks are of no further use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplicaError {
    /// A disk that has no image here.
    #[error("disk {0} is not replicated")]
    NotReplicated(u16),
    /// An image cannot be read.
    #[error("cannot read {}: {source}", .image.display())]
    Read { image: PathBuf, source: io::Error },
    /// An image cannot be written.
    #[error("cannot write {}: {source}", .image.display())]
    Write { image: PathBuf, source: io::Error },
    /// An image that this standby may not write has other contents than the primary's.
    #[error(
        "disk {disk} is read-only, so it is not synchronised, and {} differs from the primary's: copy the primary's \
         file there",
        .image.display()
    )]
    ReadOnlyDiffers { disk: u16, image: PathBuf },
    /// A sidecar does not say what it must say before the images change.
    #[error(transparent)]
    Sidecars(#[from] SidecarsError),
    /// The last checkpoint of a base has not come.
    #[error("a commit before the base")]
    NoBase,
    /// There is no journal, because no disk needs one.
    #[error("no disk is replicated")]
    NoJournal,
    /// The journal cannot be begun.
    #[error("cannot write the journal {}: {source}", .journal.display())]
    Journal { journal: PathBuf, source: io::Error },
    /// The journal, or an image behind it, cannot be written.
    #[error("cannot write the disks or their journal {}: {source}", .journal.display())]
    Apply { journal: PathBuf, source: io::Error },
    /// The audit has found a chunk that is not the VM's.
    #[error(
        "at checkpoint {checkpoint} the copy differs from the VM in {}: the image is {}; test the storage and the \
         memory of both hosts",
        Place(*.chunks),
        .image.display()
    )]
    Audit { checkpoint: u64, chunks: ChunkRange, image: PathBuf },
    /// A comparison has found an image that is not the VM's disk.
    #[error(
        "disk {disk}: the image {} is not the VM's disk: hash {here:#018x}, should be {wanted:#018x}",
        .image.display()
    )]
    Differs { disk: u16, image: PathBuf, here: u64, wanted: u64 },
}

/// Why the disks could not be brought to their last commit for whoever asked for it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReplicaEndError {
    /// They failed, now or before.
    #[error(transparent)]
    Failed(#[from] Arc<ReplicaError>),
    /// A disk finishes nothing at all.
    #[error("they do not answer; the journal has what is committed and not in the images")]
    NoAnswer,
    /// Nobody works on them.
    #[error("the thread of the disks is gone")]
    NoThread,
}
