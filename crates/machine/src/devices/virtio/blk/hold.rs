//! Writes to a shared disk: they are output.
//!
//! A disk that both hosts use does not go back to a checkpoint when the VM does, so a write to it must not
//! happen before the checkpoint of its epoch is committed: until then it stays in flight, with its data in
//! its bounce buffer, and a read that overlaps it waits with it. A VM that goes on elsewhere issues it again.
//!
//! The engine asks for permission once more, right before the system call: see [`super::permit`]. A write
//! that it may not carry out is held again.

use thiserror::Error;
use vm_memory::GuestMemory;

use super::stats::add;
use super::table::{Slot, Stage};
use super::worker::Shared;
use crate::devices::virtio::net::OutputMode;

/// Why an epoch cannot begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("epoch {asked} cannot follow: writes of epoch {held} are held")]
pub struct EpochError {
    /// The epoch asked for.
    pub asked: u64,
    /// The newest epoch that has writes held.
    pub held: u64,
}

/// What a release let out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReleasedWrites {
    /// Writes, discards and write-zeroes that went to the disk.
    pub writes: u64,
    /// Everything asked for has left, but for what waits for an earlier one it overlaps and goes with a later
    /// release. Otherwise the permission was withdrawn or the device discards.
    pub complete: bool,
}

fn is_held(slot: &Slot) -> bool {
    matches!(slot.stage, Stage::Waiting | Stage::Filling(_)) && slot.job.kind.changes() && !slot.dropped
}

impl<M: GuestMemory> Shared<M> {
    pub(super) fn hold(&self, epoch: u64) -> Result<(), EpochError> {
        self.set_epoch(epoch)?;
        let mut core = self.core();
        core.mode = OutputMode::Hold;
        core.forbidden = false;
        self.ask(true);
        Ok(())
    }

    pub(super) fn set_epoch(&self, epoch: u64) -> Result<(), EpochError> {
        let mut core = self.core();
        let newest = core.table.iter().filter(|(_, slot)| is_held(slot)).map(|(_, slot)| slot.epoch).max();
        match newest {
            Some(held) if held > epoch && self.parts.shared => Err(EpochError { asked: epoch, held }),
            _ => {
                core.epoch = epoch;
                Ok(())
            }
        }
    }

    pub(super) fn release(&self, through: u64, mut may: impl FnMut() -> bool) -> ReleasedWrites {
        let mut released = ReleasedWrites { writes: 0, complete: true };
        if !self.parts.shared {
            return released;
        }
        let mut sending = self.sending();
        loop {
            let next = {
                let core = self.core();
                if core.mode != OutputMode::Hold || core.forbidden {
                    released.complete = core.mode == OutputMode::PassThrough;
                    return released;
                }
                core.table.iter().find(|(_, slot)| leaves(slot, through, core.epoch)).map(|(token, _)| token)
            };
            let Some(token) = next else { return released };
            let allowed = may();
            let mut core = self.core();
            if !allowed {
                core.forbidden = true;
                released.complete = false;
                return released;
            }
            // The device may have been reset, or told to discard, since it was looked at.
            let epoch = core.epoch;
            if core.mode == OutputMode::Hold && leaves(core.table.get(token), through, epoch) {
                core.start(&self.parts, token);
                std::mem::swap(&mut *sending, &mut core.outbox);
                drop(core);
                self.parts.engine.submit(&mut sending);
                add(&self.parts.counters.released, 1);
                released.writes += 1;
            }
        }
    }

    pub(super) fn pass_through(&self) -> ReleasedWrites {
        let mut released = ReleasedWrites { writes: 0, complete: true };
        let mut core = self.core();
        core.mode = OutputMode::PassThrough;
        core.forbidden = false;
        self.ask(false);
        let mut position = 0;
        while let Some(token) = core.table.token_at(position) {
            if is_held(core.table.get(token)) && core.table.get(token).waits == 0 {
                core.start_if_possible(&self.parts, token);
                released.writes += u64::from(core.table.get(token).stage == Stage::Running);
            }
            position += 1;
        }
        drop(core);
        if self.parts.shared {
            add(&self.parts.counters.released, released.writes);
            self.send();
        }
        released
    }

    pub(super) fn discard(&self) {
        let mut core = self.core();
        core.mode = OutputMode::Discard;
        let mut position = 0;
        while let Some(token) = core.table.token_at(position) {
            let slot = core.table.get_mut(token);
            let on_its_way = self.parts.shared && slot.stage == Stage::Running && slot.job.kind.changes();
            if is_held(slot) || on_its_way {
                slot.dropped = true;
            }
            position += 1;
        }
        if !self.parts.shared {
            return;
        }
        core.recall(&self.parts);
        drop(core);
        // A release in progress ends at its next look: wait for the write it may be handing over.
        let sending = self.sending();
        self.parts.engine.recall();
        drop(sending);
    }

    /// Whether the engine asks for permission before each change.
    fn ask(&self, asked: bool) {
        if let Some(permit) = self.parts.engine.permit() {
            permit.ask(asked);
        }
    }

    /// Writes that wait for their commit.
    pub(super) fn held(&self) -> u64 {
        let core = self.core();
        if !self.parts.shared || core.mode != OutputMode::Hold {
            return 0;
        }
        core.table.iter().filter(|(_, slot)| is_held(slot)).count() as u64
    }
}

/// Whether a held write may leave with the commit of `through`, while the guest runs in `epoch`: an epoch
/// that still runs cannot be committed.
fn leaves(slot: &Slot, through: u64, epoch: u64) -> bool {
    is_held(slot)
        && slot.stage == Stage::Waiting
        && slot.waits == 0
        && slot.epoch <= through
        && slot.epoch < epoch
}
