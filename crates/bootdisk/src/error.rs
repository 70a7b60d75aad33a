//! Why a disk does not say what it boots.

use std::io;

/// Why a disk does not say what it boots. Each message is one line; the caller adds the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The disk itself.
    #[error("it cannot be read: {0}")]
    Disk(#[source] io::Error),
    /// It took too long.
    #[error("reading it took too long")]
    Time,
    /// More was to be read than any boot needs.
    #[error("more of it would have to be read than any boot needs, so its file system is damaged")]
    Budget,
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
    #[error("{path} of {partition} cannot be read: {why}")]
    File {
        /// The file.
        path: String,
        /// Its partition.
        partition: String,
        /// Why.
        why: String,
    },
    /// A file is larger than anything that is booted.
    #[error("{path} has {bytes} bytes, and {limit} are the limit")]
    TooLarge {
        /// The file.
        path: String,
        /// Its length.
        bytes: u64,
        /// The most that is read.
        limit: u64,
    },
    /// A configuration that is no such thing.
    #[error("{path} cannot be understood: {why}")]
    Configuration {
        /// The file.
        path: String,
        /// Why.
        why: String,
    },
    /// The entry that is the default starts no Linux kernel.
    #[error("its default entry '{entry}' starts no Linux kernel")]
    NoLinux {
        /// The entry's title.
        entry: String,
    },
    /// The entry's kernel is on a device that is not there.
    #[error(
        "its default entry '{entry}' needs {what} on the device '{device}', which this disk does not have"
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
