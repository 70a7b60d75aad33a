//! Why a disk does not say what it boots.

use std::borrow::Cow;
use std::io;

/// Most letters of a text of the disk that people are shown.
const SHOWN: usize = 256;

/// A text of the disk, of a length for a line.
pub(crate) fn short(text: &str) -> Cow<'_, str> {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", &text[..end]).into(),
        None => text.into(),
    }
}

/// Why a disk does not say what it boots. Each message is one line; the caller adds the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The disk itself.
    #[error("it cannot be read: {0}")]
    Disk(#[source] io::Error),
    /// Nobody waits for it any more.
    #[error("nobody waits for it any more")]
    Unwanted,
    /// It took too long.
    #[error("reading it took too long")]
    Time,
    /// More was to be read than any boot needs.
    #[error("more of it would have to be read than any boot needs, so its file system is damaged")]
    Budget,
    /// A configuration would be made into more than any needs.
    #[error(
        "its boot loader's configuration would need more memory or work than any, so it is damaged or made to harm"
    )]
    Memory,
    /// What was read once reads otherwise now.
    #[error("it changes while it is read")]
    Changed,
    /// No kernel anywhere.
    #[error("no kernel was found on it: {0}")]
    Nothing(String),
    /// `/boot` is in a file system that cannot be read.
    #[error("its /boot is in {partition}, which is {kind}: only ext2, ext3 and ext4 can be read")]
    BootKind {
        /// The partition.
        partition: String,
        /// What it is.
        kind: String,
    },
    /// An ext file system that is damaged, or has a feature that cannot be read.
    #[error("the file system of {partition} cannot be read: {why}")]
    FileSystem {
        /// The partition.
        partition: String,
        /// Why.
        why: String,
    },
    /// A file that an entry names.
    #[error("{} of {partition} cannot be read: {why}", short(.path))]
    File {
        /// The file.
        path: String,
        /// Its partition.
        partition: String,
        /// Why.
        why: String,
    },
    /// A file is larger than anything that is booted.
    #[error("{} has {bytes} bytes, and {limit} are the limit", short(.path))]
    TooLarge {
        /// The file.
        path: String,
        /// Its length.
        bytes: u64,
        /// The most that is read.
        limit: u64,
    },
    /// A configuration that is no such thing.
    #[error("{} cannot be understood: {why}", short(.path))]
    Configuration {
        /// The file.
        path: String,
        /// Why.
        why: String,
    },
    /// The entry that is the default starts no Linux kernel.
    #[error("its default entry '{}' starts no Linux kernel", short(.entry))]
    NoLinux {
        /// The entry's title.
        entry: String,
    },
    /// The entry's kernel is on a device that is not there.
    #[error(
        "its default entry '{}' needs {} on the device '{}', which this disk does not have",
        short(.entry),
        short(.what),
        short(.device)
    )]
    NoDevice {
        /// The entry's title.
        entry: String,
        /// The file.
        what: String,
        /// GRUB's name of the device.
        device: String,
    },
}
