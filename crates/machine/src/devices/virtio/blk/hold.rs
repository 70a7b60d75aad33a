//! Writes to a shared disk: they are output.
//!
//! A disk that both hosts use does not go back to a checkpoint when the VM does, so a write to it must not
//! happen before the checkpoint of its epoch is committed: until then it stays in flight, with its data in
//! its bounce buffer, and a read that overlaps it waits with it. A VM that goes on elsewhere issues it again.
//!
//! A write that was let out may wait in the engine's queue for as long as slow storage pleases, or as long as
//! this process is stopped. Meanwhile the standby may have won the VM and carried the same write out, and
//! others over it: so the engine asks the permission once more, right before each system call that changes the
//! storage. A write that it may not carry out is held again.

use vm_memory::GuestMemory;

use super::stats::add;
use super::table::{Slot, Stage};
use super::worker::{Parts, Shared};
use crate::devices::valve::{Fate, Order, OutputMode};

/// What a drain let out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReleasedWrites {
    /// Writes, discards and write-zeroes that went to the disk.
    pub writes: u64,
    /// Everything that may leave has left, but for what waits for an earlier one it overlaps and goes with a
    /// later drain. Otherwise the permission was withdrawn or output is discarded.
    pub complete: bool,
}

impl Parts {
    /// Whether this is a write that has not been given to the engine, and not discarded.
    fn is_held(&self, order: Order, slot: &Slot) -> bool {
        matches!(slot.stage, Stage::Waiting | Stage::Filling(_))
            && slot.job.kind.changes()
            && self.permit.fate(order, slot.tag) != Fate::Dropped
    }

    /// Whether a held write may leave.
    fn leaves(&self, order: Order, slot: &Slot) -> bool {
        slot.stage == Stage::Waiting
            && slot.job.kind.changes()
            && slot.waits == 0
            && self.permit.fate(order, slot.tag) == Fate::Leaves
    }
}

impl<M: GuestMemory> Shared<M> {
    /// See [`super::BlockDevice::let_out`].
    pub(super) fn let_out(&self) -> ReleasedWrites {
        let mut released = ReleasedWrites { writes: 0, complete: true };
        if !self.parts.shared {
            return released;
        }
        let parts = &self.parts;
        let mut sending = self.sending();
        loop {
            let order = parts.permit.order();
            if order.mode() == OutputMode::Discard || order.is_refused() {
                released.complete = false;
                return released;
            }
            let next = {
                let core = self.core();
                core.table.iter().find(|(_, slot)| parts.leaves(order, slot)).map(|(token, _)| token)
            };
            let Some(token) = next else { return released };
            if !parts.permit.confirms(order) {
                continue;
            }
            let mut core = self.core();
            // The device may have been reset since it was looked at.
            if parts.leaves(order, core.table.get(token)) {
                core.start(parts, token);
                std::mem::swap(&mut *sending, &mut core.outbox);
                drop(core);
                parts.engine.submit(&mut sending);
                add(&parts.counters.released, 1);
                released.writes += 1;
            }
        }
    }

    /// The newest epoch of which a write is held.
    pub(super) fn newest_held(&self) -> Option<u64> {
        let (parts, order) = (&self.parts, self.parts.permit.order());
        let core = self.core();
        core.table.iter().filter(|(_, slot)| parts.is_held(order, slot)).map(|(_, slot)| slot.tag.epoch).max()
    }

    /// Writes that wait for their commit.
    pub(super) fn held(&self) -> u64 {
        let (parts, order) = (&self.parts, self.parts.permit.order());
        if !parts.shared || order.mode() != OutputMode::Hold {
            return 0;
        }
        self.core().table.iter().filter(|(_, slot)| parts.is_held(order, slot)).count() as u64
    }
}
