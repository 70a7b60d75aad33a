//! Messages to the coordinator. Every other thread has the sending end, and nothing else of the coordinator.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use outlive_epoch::{DiskWant, ProtocolVersion};
use outlive_machine::MachineEvent;
use outlive_pair::{ExitReason, Link, PrimaryNote};

use super::pool::Pool;
use super::self_check::Hashed;
use crate::disk::SyncReport;
use crate::link::SenderReport;

/// The sending end. Sending never blocks; messages after the coordinator's end are lost, and nobody needs
/// them.
pub(crate) type Queue = Sender<Inbox>;

/// One message.
pub(crate) enum Inbox {
    /// The guest did something.
    Machine(MachineEvent),
    /// The sender thread of a link did something.
    Sender(Link, SenderReport),
    /// The standby wants chunks of a disk.
    DiskWant(Link, DiskWant),
    /// The thread that hashes disks for the self-check is done.
    DisksHashed(Hashed),
    /// How far the disks are in the base synchronisation.
    DiskSync(Link, SyncReport),
    /// Begin base synchronisation for this link, with these buffers for its checkpoints, in this version of the
    /// stream.
    StartBase(Link, Arc<Pool>, ProtocolVersion),
    /// The link is no longer useful: end the protection that used it.
    Detached(Link),
    /// Log this.
    Note(PrimaryNote),
    /// Check again: something that the coordinator waits for may have come.
    Wake,
    /// Ask the guest to shut itself down.
    AskGuest,
    /// Stop the vCPUs for good.
    StopGuest,
    /// End the process.
    Exit(ExitReason),
    /// The operator wants the VM stopped.
    Stop(&'static str),
}
