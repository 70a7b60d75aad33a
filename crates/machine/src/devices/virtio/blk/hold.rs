//! Writes to a shared disk: they are output.
//!
//! A disk that both hosts use does not go back to a checkpoint when the VM does. So a write to it must not
//! happen before the checkpoint of its epoch is committed: until then it stays in flight, with its data in
//! its bounce buffer, and a read that overlaps it waits with it. A VM that is resumed elsewhere issues it
//! again.
//!
//! A write that was let out may wait in the engine's queue for as long as the storage is slow or this process
//! is stopped. Meanwhile the standby may have won the VM, carried out the same write, and overwritten it. So
//! the engine asks for permission once more, right before each system call that changes the storage. A write
//! that it may not carry out is held again.

use vm_memory::GuestMemory;

use super::disk::Disk;
use super::table::{Entry, Stage};
use crate::devices::valve::{Fate, Order, OutputMode};
use crate::devices::virtio::slot::Shared;

/// What a drain let out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReleasedWrites {
    /// Writes, discards and write-zeroes that went to the disk.
    pub writes: u64,
    /// Whether everything that may leave has left, except for writes that wait for an earlier one that they
    /// overlap; they leave in a later drain. If not, the permission was withdrawn or output is discarded.
    pub complete: bool,
}

impl Disk {
    /// Whether this is a write that was neither given to the engine nor discarded.
    fn is_held(&self, order: Order, entry: &Entry) -> bool {
        matches!(entry.stage, Stage::Waiting | Stage::Filling(_))
            && entry.job.kind.changes()
            && self.permit.fate(order, entry.tag) != Fate::Dropped
    }

    /// Whether a held write may leave.
    fn leaves(&self, order: Order, entry: &Entry) -> bool {
        entry.stage == Stage::Waiting
            && entry.job.kind.changes()
            && entry.waits == 0
            && self.permit.fate(order, entry.tag) == Fate::Leaves
    }
}

impl<M: GuestMemory> Shared<M, Disk> {
    /// See [`super::BlockDevice::let_out`].
    pub(super) fn let_out(&self) -> ReleasedWrites {
        let mut released = ReleasedWrites { writes: 0, complete: true };
        if !self.model.shared {
            return released;
        }
        let disk = &self.model;
        let mut sending = disk.sending();
        loop {
            let order = disk.permit.order();
            if order.mode() == OutputMode::Discard || order.is_refused() {
                released.complete = false;
                return released;
            }
            let next = {
                let core = self.core();
                core.model.table.iter().find(|(_, entry)| disk.leaves(order, entry)).map(|(token, _)| token)
            };
            let Some(token) = next else { return released };
            if !disk.permit.confirms(order) {
                continue;
            }
            let mut core = self.core();
            // The device may have been reset in the meantime.
            if disk.leaves(order, core.model.table.get(token)) {
                core.model.start(disk, token);
                std::mem::swap(&mut *sending, &mut core.model.outbox);
                drop(core);
                disk.engine.submit(&mut sending);
                disk.counters.released.add(1);
                released.writes += 1;
            }
        }
    }

    /// The newest epoch that has a held write.
    pub(super) fn newest_held(&self) -> Option<u64> {
        let (disk, order) = (&self.model, self.model.permit.order());
        let core = self.core();
        core.model
            .table
            .iter()
            .filter(|(_, entry)| disk.is_held(order, entry))
            .map(|(_, entry)| entry.tag.epoch)
            .max()
    }

    /// Number of writes that wait for their commit.
    pub(super) fn held(&self) -> u64 {
        let (disk, order) = (&self.model, self.model.permit.order());
        if !disk.shared || order.mode() != OutputMode::Hold {
            return 0;
        }
        self.core().model.table.iter().filter(|(_, entry)| disk.is_held(order, entry)).count() as u64
    }
}
