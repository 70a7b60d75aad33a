//! The thread that reads an accepted primary's connection all the time. Stamps and the base go straight to
//! their places, checkpoints into staging. The thread never waits for the applier or for a disk, so the
//! primary is heard and answered whatever those do.

use std::io::ErrorKind;
use std::sync::Arc;
use std::time::Duration;

use outlive_epoch::{
    Checkpoint, CheckpointBegin, Expect, Message, PAGE_SIZE, ReadError, SectionReader, StateBuf, StateKind,
    StateSection,
};
use outlive_machine::{Ram, StateShape};
use outlive_pair::{Link, LossReason, StandbyEvent as Event};

use super::applier::hashes;
use super::decisions::Decisions;
use super::handover::{Handover, Held, NoBuffer};
use super::tail::Tail;
use crate::disk::Replica;
use crate::link;
use crate::vm::write_pages;

/// The parts of the copy that the reader uses.
pub(super) struct Admitted {
    pub(super) ram: Arc<Ram>,
    pub(super) disks: Arc<Replica>,
    pub(super) shape: StateShape,
    pub(super) tail: Arc<Tail>,
    /// The last field, so that nothing of the copy is held when the applier learns of the reader's end.
    pub(super) handover: ReaderEnd,
}

/// The reader's end of the handover. Dropping it tells the applier that the reader has ended.
pub(super) struct ReaderEnd(pub(super) Arc<Handover>);

impl Drop for ReaderEnd {
    fn drop(&mut self) {
        self.0.reader_ends();
    }
}

/// The reader; see the module.
pub(super) struct SessionReader {
    decisions: Arc<Decisions>,
    link: Link,
    from: link::Reader,
    sections: SectionReader,
    filling: Option<Held>,
    expect: Expect,
    /// The state of the last whole checkpoint: the next one may tell only what has changed.
    state: StateBuf,
    admitted: Admitted,
}

/// Why a session ends.
enum End {
    /// The state machine already knows.
    Known,
    /// The link is gone.
    Lost(LossReason),
    /// This side refuses what came.
    Bad(String),
}

impl SessionReader {
    pub(super) fn new(
        decisions: Arc<Decisions>,
        link: Link,
        from: link::Reader,
        sections: SectionReader,
        admitted: Admitted,
    ) -> Self {
        Self {
            decisions,
            link,
            from,
            sections,
            filling: None,
            expect: Expect::Base,
            state: StateBuf::default(),
            admitted,
        }
    }

    /// Serves the link until it ends.
    pub(super) fn run(mut self) -> link::Reader {
        let end = loop {
            if let Err(end) = self.next() {
                break end;
            }
        };
        let link = self.link;
        match end {
            End::Known => {}
            End::Lost(why) => self.decisions.handle(Event::LinkLost { link, why }),
            End::Bad(why) => self.decisions.handle(Event::BadStream { link, why }),
        }
        self.from
    }

    fn next(&mut self) -> Result<(), End> {
        let link = self.link;
        let section = self.sections.read_section(&mut self.from).map_err(|error| match error {
            ReadError::Closed | ReadError::Truncated { .. } => End::Lost(LossReason::Closed),
            // A record that was changed on its way: TLS says so before a message is looked at, and ends both
            // directions, so that no leave would be heard. The copy is whole.
            ReadError::Io(error) if error.kind() == ErrorKind::InvalidData => {
                End::Lost(LossReason::Protocol(error.to_string()))
            }
            ReadError::Io(error) => End::Lost(LossReason::Error(error.to_string())),
            ReadError::Wire(error) => End::Bad(error.to_string()),
        })?;
        let message = Message::parse(&section).map_err(|error| End::Bad(error.to_string()))?;
        let Admitted { ram, disks, tail, handover, .. } = &self.admitted;
        match &message {
            Message::BasePages(_) | Message::DiskSums(_) | Message::DiskBlocks { .. } => {
                if !self.decisions.base_pages(link) {
                    return Err(End::Known);
                }
                match &message {
                    Message::BasePages(pages) => write_pages(ram, pages.iter())
                        .map_err(|gfn| format!("GFN {gfn:#x} is outside the VM's memory")),
                    Message::DiskSums(window) => disks.sums(window).map_err(|e| e.to_string()),
                    Message::DiskBlocks { blocks, .. } => disks.blocks(*blocks).map_err(|e| e.to_string()),
                    _ => Ok(()),
                }
                .map_err(End::Bad)
            }
            Message::Heartbeat { stamp_us } => {
                let stamp = Duration::from_micros(*stamp_us);
                self.decisions.handle(Event::Heartbeat { link, stamp });
                Ok(())
            }
            // For whoever asks. A heartbeat follows it.
            &Message::ArbiterSight(sight) => {
                self.decisions.equipment.standing.other_sees(sight.into());
                Ok(())
            }
            // No sign of life: it comes from a device's thread, which may go on where no checkpoint is taken.
            Message::Input(frames) => {
                tail.input(frames);
                Ok(())
            }
            Message::Output(frames) => {
                tail.output(frames);
                Ok(())
            }
            &Message::Released { through } => {
                tail.released(through);
                self.decisions.handle(Event::OutputReleased { link, through });
                Ok(())
            }
            Message::Dismiss => {
                self.decisions.handle(Event::Dismissed { link });
                Ok(())
            }
            Message::End(reason) => {
                self.decisions.handle(Event::End { link, reason: *reason });
                Err(End::Known)
            }
            Message::CheckpointBegin(_)
            | Message::Pages(_)
            | Message::State { .. }
            | Message::StateChanges(_)
            | Message::DiskWrites { .. }
            | Message::Audit(_)
            | Message::DiskAudit(_)
            | Message::CheckpointEnd(_) => {
                if let Message::CheckpointBegin(begin) = &message
                    && self.filling.is_none()
                {
                    self.filling = Some(begin_filling(&handover.0, begin, self.expect, &self.state)?);
                }
                let Some(held) = &mut self.filling else {
                    return Err(End::Bad(format!("a {:?} section outside a checkpoint", message.kind())));
                };
                match held.buffer.push(&section, &message) {
                    Ok(false) => {
                        self.decisions.handle(Event::Heard { link });
                        Ok(())
                    }
                    Ok(true) => self.staged(),
                    Err(error) => Err(End::Bad(error.to_string())),
                }
            }
            other => Err(End::Bad(format!("a {:?} section inside a session", other.kind()))),
        }
    }

    /// Takes a whole checkpoint. Everything that may be wrong with it is found here, before it is
    /// acknowledged: afterwards this side is responsible for it.
    fn staged(&mut self) -> Result<(), End> {
        let Some(held) = self.filling.take() else { return Ok(()) };
        // `push` said that it is whole.
        let Some(checkpoint) = held.buffer.checkpoint() else { return Ok(()) };
        self.check(&checkpoint).map_err(End::Bad)?;
        if self.state.try_copy_from(checkpoint.state()).is_err() {
            return Err(End::Bad("no memory for the state of a checkpoint".into()));
        }
        let event = Event::Staged {
            link: self.link,
            checkpoint: checkpoint.number(),
            flags: checkpoint.flags(),
            stamp: Duration::from_micros(checkpoint.stamp_us()),
        };
        self.expect = Expect::Number(checkpoint.number() + 1);
        let number = checkpoint.number();
        self.admitted.handover.0.stage(held);
        self.decisions.handle(event);
        self.decisions.equipment.standing.staged(number);
        Ok(())
    }

    fn check(&self, checkpoint: &Checkpoint<'_>) -> Result<(), String> {
        let Admitted { disks, shape, .. } = &self.admitted;
        let is_constant = |section: &StateSection<'_>| section.kind == StateKind::VcpuConstant;
        let constants = checkpoint.state().sections().filter(is_constant).count();
        // After the base, CPUID and TSC frequency of the base apply unless there are new ones.
        let known = if constants == 0 && self.expect != Expect::Base { shape.constants() } else { constants };
        shape.check(known, checkpoint.state().sections()).map_err(|e| e.to_string())?;
        let hashes = hashes(checkpoint).transpose().map_err(|e| e.to_string())?;
        disks.check_hashes(hashes.as_ref().map_or(&[], |it| &it.disks)).map_err(|e| e.to_string())
    }
}

/// Gets a buffer for a new checkpoint.
fn begin_filling(
    handover: &Handover,
    begin: &CheckpointBegin,
    expect: Expect,
    before: &StateBuf,
) -> Result<Held, End> {
    let CheckpointBegin { pages, state_bytes, disk_bytes, .. } = *begin;
    let bytes = u64::from(pages) * PAGE_SIZE as u64 + u64::from(state_bytes) + u64::from(disk_bytes);
    let mut held = handover.take(bytes).map_err(|why| match why {
        NoBuffer::HungUp => End::Known,
        NoBuffer::Overrun => End::Bad("more checkpoints in flight than were agreed on".into()),
    })?;
    held.buffer.reset(expect);
    held.buffer.follow(before).map_err(|error| End::Bad(error.to_string()))?;
    Ok(held)
}
