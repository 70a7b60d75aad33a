//! One accepted primary: its pages and checkpoints are staged, acknowledged and applied on this thread, in
//! this order.
//!
//! Order, and why: a checkpoint is acknowledged when it is whole and could be resumed, *before* it is
//! applied, because the acknowledgement is on the guest's way to its clients and the commit does not depend
//! on where in this host's memory the checkpoint stands. It is applied completely before the next section is
//! read, whatever happens to the link meanwhile, so memory only ever moves from one committed checkpoint to
//! the next (invariant 2).

use std::sync::Arc;
use std::time::Duration;

use outlive_epoch::{Expect, Incoming, Message, ReadError, SectionReader};
use outlive_machine::{Hashes, Ram};
use outlive_pair::{Link, LossReason, StandbyEvent as Event};

use super::control::Control;
use super::copy;
use crate::disk::Replica;
use crate::link;

/// What a session works on.
pub(super) struct Admitted {
    pub(super) staging: Incoming,
    pub(super) ram: Arc<Ram>,
    pub(super) disks: Arc<Replica>,
}

pub(super) struct Session {
    control: Arc<Control>,
    link: Link,
    from: link::Reader,
    reader: SectionReader,
    staging: Incoming,
    ram: Arc<Ram>,
    disks: Arc<Replica>,
}

/// Why a session ends.
enum End {
    /// The state machine has been told or knows.
    Known,
    /// The link is gone.
    Lost(LossReason),
    /// Something came that this side refuses.
    Bad(String),
}

impl Session {
    pub(super) fn new(
        control: Arc<Control>,
        link: Link,
        from: link::Reader,
        reader: SectionReader,
        admitted: Admitted,
    ) -> Self {
        let Admitted { staging, ram, disks } = admitted;
        Self { control, link, from, reader, staging, ram, disks }
    }

    /// Serves the link until it ends.
    pub(super) fn run(mut self) {
        let end = loop {
            if let Err(end) = self.next() {
                break end;
            }
        };
        let link = self.link;
        match end {
            End::Known => {}
            End::Lost(why) => drop(self.control.handle(Event::LinkLost { link, why })),
            End::Bad(why) => drop(self.control.handle(Event::BadStream { link, why })),
        }
    }

    fn next(&mut self) -> Result<(), End> {
        let link = self.link;
        let section = self.reader.read_section(&mut self.from).map_err(|error| match error {
            ReadError::Closed | ReadError::Truncated { .. } => End::Lost(LossReason::Closed),
            ReadError::Io(error) => End::Lost(LossReason::Error(error.to_string())),
            ReadError::Wire(error) => End::Bad(error.to_string()),
        })?;
        let message = Message::parse(&section).map_err(|error| End::Bad(error.to_string()))?;
        match &message {
            Message::BasePages(pages) => {
                if !self.control.handle(Event::BasePages { link }).apply_base {
                    return Err(End::Known);
                }
                copy::apply_base(&self.ram, pages)
                    .map_err(|gfn| End::Bad(format!("GFN {gfn:#x} is outside the VM's memory")))
            }
            Message::DiskSums(_) | Message::DiskBlocks { .. } => {
                if !self.control.handle(Event::BasePages { link }).apply_base {
                    return Err(End::Known);
                }
                match &message {
                    Message::DiskSums(window) => self.disks.sums(window),
                    Message::DiskBlocks { blocks, .. } => self.disks.blocks(*blocks),
                    _ => Ok(()),
                }
                .map_err(End::Bad)
            }
            Message::Heartbeat { stamp_us } => {
                let stamp = Duration::from_micros(*stamp_us);
                self.control.handle(Event::Heartbeat { link, stamp });
                Ok(())
            }
            Message::End(reason) => {
                self.control.handle(Event::End { link, reason: *reason });
                Err(End::Known)
            }
            Message::CheckpointBegin(_)
            | Message::Pages(_)
            | Message::State { .. }
            | Message::DiskWrites { .. }
            | Message::CheckpointEnd(_) => match self.staging.push(&section, &message) {
                Ok(false) => {
                    self.control.handle(Event::Heard { link });
                    Ok(())
                }
                Ok(true) => self.commit(),
                Err(error) => Err(End::Bad(error.to_string())),
            },
            other => Err(End::Bad(format!("a {:?} section inside a session", other.kind()))),
        }
    }

    fn commit(&mut self) -> Result<(), End> {
        let link = self.link;
        // `push` said that it is whole.
        let Some(checkpoint) = self.staging.checkpoint() else { return Err(End::Known) };
        let number = checkpoint.number();
        // All that may be wrong with it is found before it is acknowledged: afterwards this side answers for
        // it.
        let hashes = copy::hashes(&checkpoint).transpose().map_err(End::Bad)?;
        self.disks.check_hashes(hashes.as_ref().map_or(&[], |it| &it.disks)).map_err(End::Bad)?;
        self.control.with_copy(|copy| copy.check_state(&checkpoint)).ok_or(End::Known)?.map_err(End::Bad)?;
        let mut left = self.control.handle(Event::Staged {
            link,
            checkpoint: number,
            flags: checkpoint.flags(),
            stamp: Duration::from_micros(checkpoint.stamp_us()),
        });
        if left.try_base == Some(number) {
            let result = self.control.with_copy(|copy| copy.try_restore(&checkpoint)).ok_or(End::Known)?;
            left = self.control.handle(Event::Tried { link, checkpoint: number, result });
        }
        if left.apply != Some(number) {
            return Err(End::Known);
        }
        if let Err(gfn) = copy::apply_pages(&self.ram, checkpoint.pages()) {
            // `Incoming` has checked every GFN against the layout, so this is an error of this program's own.
            let why = format!("GFN {gfn:#x} of an acknowledged checkpoint cannot be written");
            self.control.handle(Event::Failed { link, why });
            return Err(End::Known);
        }
        self.control.with_copy(|copy| copy.keep_state(&checkpoint));
        let base = checkpoint.flags().base_final;
        let mut writes = self.disks.buffer();
        self.staging.swap_disk_writes(&mut writes);
        self.disks.commit(number, base, writes);
        if let Some(hashes) = hashes {
            self.compare(number, hashes)?;
        }
        self.control.handle(Event::Applied { link, checkpoint: number });
        self.staging.reset(Expect::Number(number.saturating_add(1)));
        Ok(())
    }

    /// Compares the copy with the VM, where the checkpoint says what that was. A copy that differs must never
    /// run. Nobody writes to its memory until the checkpoint is said to be applied, so this needs no lock,
    /// under which the heartbeats would have to wait. The disks are compared by their own thread.
    fn compare(&self, number: u64, hashes: Hashes) -> Result<(), End> {
        let difference = hashes.compare_memory(&self.ram).err();
        if let Some(why) = difference.map(|it| it.to_string()) {
            self.control.compared(number, Some(&why));
            self.control.handle(Event::Failed { link: self.link, why });
            return Err(End::Known);
        }
        if hashes.disks.is_empty() {
            self.control.compared(number, None);
        } else {
            self.disks.check(number, hashes.disks);
        }
        Ok(())
    }
}
