//! Why a VM is not rewound, with the remedy.

use std::io;
use std::path::PathBuf;

use outlive_machine::{HostError, MemoryError};
use outlive_record::{FindError, OpenError, PlayError};

use super::folder::FolderError;
use super::play::PlayingError;
use crate::console::ConsoleError;
use crate::disk::NewbornError;
use crate::events::EventsError;
use crate::vm::{CannotResume, CardError, NotHereError, UnknownDevices, UplinkError, VmMemoryError};

/// See the module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RewindError {
    /// There is no record.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It has no such moment.
    #[error("{source}; `outlive history {}` shows what can be had", .record.display())]
    Find { source: FindError, record: PathBuf },
    /// It cannot be played.
    #[error(transparent)]
    Play(#[from] PlayError),
    /// It could not be played to its end.
    #[error(transparent)]
    Playing(PlayingError),
    /// There is no place for the disks.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// This host is no host of VMs.
    #[error(transparent)]
    Host(#[from] HostError),
    /// The VM is too large for this host.
    #[error(
        "the VM has {} MiB of memory, and this host has {} MiB available: free some, or copy the record to another host \
         and rewind it there",
        .bytes >> 20, .available >> 20
    )]
    Memory { bytes: u64, available: u64 },
    /// This host cannot run the VM.
    #[error("{0}; rewind it on a host like the one where it ran")]
    NotHere(NotHereError),
    /// Another release lays it out otherwise.
    #[error("this release lays guest memory out differently: use the release that ran the VM")]
    Layout,
    /// This release has no such machine.
    #[error("{0}: use the release that ran the VM")]
    Devices(#[from] UnknownDevices),
    /// There is nothing to connect.
    #[error("the VM has no network card: leave --net out")]
    NoCard,
    /// The record has not all of the VM.
    #[error(
        "the record has no copy of the VM's disk {0}, so the VM cannot be had again: choose a moment of another run"
    )]
    NoDisk(u16),
    /// It has no card here.
    #[error(transparent)]
    Card(#[from] CardError),
    /// Nobody could watch the way to the clients.
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    /// There is no console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// There is no event stream.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// A disk cannot be copied.
    #[error("cannot copy disk {disk}: {source}; what was written is removed")]
    Copy { disk: u16, source: Box<dyn std::error::Error + Send + Sync> },
    /// The memory cannot be had.
    #[error(transparent)]
    Ram(#[from] MemoryError),
    /// An image does not say whose it is.
    #[error(transparent)]
    Newborn(#[from] NewbornError),
    /// The new VM would have no id.
    #[error("this host has no random numbers: {0}")]
    NoRandom(#[source] io::Error),
    /// The result cannot be shown.
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
    /// An operator wants it so.
    #[error("told to stop before the VM was started: nothing was made")]
    Stopped,
}

impl From<NotHereError> for RewindError {
    fn from(error: NotHereError) -> Self {
        match error {
            NotHereError::Memory(VmMemoryError::TooLittle { bytes, available }) => {
                Self::Memory { bytes, available }
            }
            NotHereError::Layout => Self::Layout,
            error => Self::NotHere(error),
        }
    }
}

impl From<CannotResume> for RewindError {
    fn from(error: CannotResume) -> Self {
        NotHereError::from(error).into()
    }
}

impl From<PlayingError> for RewindError {
    fn from(error: PlayingError) -> Self {
        match error {
            PlayingError::Stopped => Self::Stopped,
            PlayingError::Play(error) => Self::Play(error),
            error => Self::Playing(error),
        }
    }
}
