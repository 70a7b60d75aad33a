//! Where a committed checkpoint goes: memory, state, disks. Anything else that follows the VM commit by
//! commit is one more sink.

use std::sync::Arc;
use std::time::Instant;

use outlive_epoch::{Checkpoint, Incoming, StateKind};
use outlive_machine::{Machine, Ram, RestoreError};

use crate::disk::Replica;
use crate::vm::{LastState, write_pages};

/// Why a committed checkpoint cannot be kept: this host has failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum SinkError {
    /// A page has no place. Every GFN was checked against the layout, so this is an error in this program.
    #[error("GFN {0:#x} of an acknowledged checkpoint cannot be written")]
    Page(u64),
}

/// Takes every committed checkpoint, in order, on the applier's thread. The acknowledgement has been sent:
/// anything wrong with a checkpoint was found before.
pub(super) trait CommitSink {
    /// Takes one whole checkpoint. It may be slow: that slows the guest down and does nothing worse.
    ///
    /// # Errors
    /// This host has failed, and the copy is worthless.
    fn commit(&mut self, staged: &mut Incoming) -> Result<(), SinkError>;
}

/// The VM's memory.
pub(super) struct MemorySink(pub(super) Arc<Ram>);

impl CommitSink for MemorySink {
    fn commit(&mut self, staged: &mut Incoming) -> Result<(), SinkError> {
        let Some(checkpoint) = staged.checkpoint() else { return Ok(()) };
        write_pages(&self.0, checkpoint.pages()).map_err(SinkError::Page)
    }
}

/// The images of the VM's disks. It takes the writes away, so other sinks that need them come before it.
pub(super) struct DiskSink(pub(super) Arc<Replica>);

impl CommitSink for DiskSink {
    fn commit(&mut self, staged: &mut Incoming) -> Result<(), SinkError> {
        let Some(checkpoint) = staged.checkpoint() else { return Ok(()) };
        let (number, base) = (checkpoint.number(), checkpoint.flags().base_final);
        let mut writes = self.0.buffer();
        staged.swap_disk_writes(&mut writes);
        self.0.commit(number, base, writes);
        Ok(())
    }
}

/// The state of vCPUs and devices as of the last checkpoint.
pub(super) struct StateSink {
    last: LastState,
    /// When the checkpoint came, by this host's clock.
    kept_at: Instant,
}

impl StateSink {
    /// An empty state with room for this many bytes.
    pub(super) fn new(bytes: usize) -> Self {
        Self { last: LastState::new(bytes), kept_at: Instant::now() }
    }

    /// Restores the kept state into a machine. The guest's time continues from the moment when that state
    /// came.
    ///
    /// # Errors
    /// What failed.
    pub(super) fn restore(&self, machine: &mut Machine) -> Result<(), RestoreError> {
        let (constants, sections) = self.last.parts();
        machine.restore(constants, &sections, self.kept_at.elapsed())
    }

    /// Restores the state of an uncommitted checkpoint into a machine, as a trial.
    ///
    /// # Errors
    /// What failed.
    pub(super) fn try_restore(machine: &mut Machine, base: &Checkpoint<'_>) -> Result<(), RestoreError> {
        let (constants, sections) =
            base.state().sections().partition::<Vec<_>, _>(|it| it.kind == StateKind::VcpuConstant);
        let constants: Vec<_> = constants.into_iter().map(|it| it.bytes.to_vec()).collect();
        machine.try_restore(&constants, &sections)
    }
}

impl CommitSink for StateSink {
    fn commit(&mut self, staged: &mut Incoming) -> Result<(), SinkError> {
        let Some(checkpoint) = staged.checkpoint() else { return Ok(()) };
        self.kept_at = Instant::now();
        self.last.follow(&checkpoint);
        Ok(())
    }
}
