//! The thread that owns a session's copy: it tries the base, applies acknowledged checkpoints, and throws the
//! copy away or hands it over at the end. It does one thing after the other, in the order of the decisions.
//!
//! The acknowledgement is sent before the apply, because the guest's clients wait for it, and the commit does
//! not depend on where in this host's memory the checkpoint is. An acknowledged checkpoint is applied
//! completely, whatever happens to the link meanwhile, so the copy only ever moves from one committed
//! checkpoint to the next (invariant 2). However long that takes, the reader keeps hearing the primary; only
//! the next acknowledgement waits.

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use outlive_epoch::{Checkpoint, Incoming, StateKind};
use outlive_machine::state::StateError;
use outlive_machine::{CheckError, Hashes};
use outlive_pair::{Link, StandbyEvent as Event};

use super::audit::{Comparing, Difference};
use super::copy::VmCopy;
use super::decisions::{Decisions, Equipment};
use super::handover::{Doing, Ending, Handover};
use super::notes;
use super::sinks::SinkError;
use crate::events::{self, Place};

/// Why a copy is worthless.
#[derive(Debug, thiserror::Error)]
enum ApplyError {
    /// A committed checkpoint cannot be kept.
    #[error(transparent)]
    Sink(#[from] SinkError),
    /// The VM's hashes cannot be read.
    #[error(transparent)]
    Hashes(#[from] StateError),
    /// The copy is not the VM.
    #[error(transparent)]
    Differs(#[from] CheckError),
    /// A page of the copy is not the VM's.
    #[error(transparent)]
    Audit(#[from] Difference),
}

/// What the thread works with; see the module.
pub(super) struct Applier {
    pub(super) decisions: Arc<Decisions>,
    pub(super) link: Link,
    pub(super) handover: Arc<Handover>,
    pub(super) copy: VmCopy,
    pub(super) audit: Comparing,
    /// How the copy was found not to be the VM.
    pub(super) difference: Option<String>,
}

impl Applier {
    /// Starts the thread. It returns the copy, unless the copy was thrown away.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn start(self) -> io::Result<JoinHandle<Option<VmCopy>>> {
        outlive_machine::spawn("applier", move || self.run())
    }

    fn run(mut self) -> Option<VmCopy> {
        loop {
            let (mut held, doing) = match self.handover.next() {
                Ok(work) => work,
                Err(Ending::Return) => return Some(self.copy),
                Err(Ending::Discard) => {
                    self.discard();
                    return None;
                }
            };
            let event = self.carry_out(&mut held.buffer, doing);
            // Before the event: the tried checkpoint is applied next, and after an acknowledgement comes a
            // checkpoint that needs this buffer.
            match doing {
                Doing::Try => self.handover.tried(held),
                Doing::Apply => {
                    held.buffer.clear();
                    self.handover.applied(held);
                }
            }
            if let Some(event) = event {
                self.decisions.handle(event);
            }
        }
    }

    /// Does the work and returns the event to report.
    fn carry_out(&mut self, staged: &mut Incoming, doing: Doing) -> Option<Event> {
        let link = self.link;
        // The reader hands over only whole checkpoints.
        let whole = staged.checkpoint()?;
        let checkpoint = whole.number();
        Some(match doing {
            Doing::Try => {
                let result = self.copy.try_restore(&whole).map_err(|error| error.to_string());
                Event::Tried { link, checkpoint, result }
            }
            Doing::Apply => match self.timed(staged) {
                Ok(()) => Event::Applied { link, checkpoint },
                Err(error @ ApplyError::Audit(_)) => {
                    self.decisions.equipment.differences.note();
                    self.difference = Some(error.to_string());
                    Event::Differs { link, why: error.to_string() }
                }
                Err(error) => {
                    self.difference = matches!(error, ApplyError::Differs(_)).then(|| error.to_string());
                    Event::Failed { link, why: error.to_string() }
                }
            },
        })
    }

    /// Applies it, and counts how long that took.
    fn timed(&mut self, staged: &mut Incoming) -> Result<(), ApplyError> {
        let began = Instant::now();
        self.apply(staged)?;
        self.decisions.equipment.standing.applied(began.elapsed());
        Ok(())
    }

    fn apply(&mut self, staged: &mut Incoming) -> Result<(), ApplyError> {
        self.copy.sinks().try_for_each(|sink| sink.commit(staged))?;
        let Some(checkpoint) = staged.checkpoint() else { return Ok(()) };
        self.copy.disks().audit(checkpoint.number(), checkpoint.disk_audit(), self.audit.budget());
        self.compare_pages(&checkpoint)?;
        match hashes(&checkpoint).transpose()? {
            Some(hashes) => Ok(self.compare(checkpoint.number(), hashes)?),
            None => Ok(()),
        }
    }

    /// Compares some pages with the VM's, and tells the primary of it now and then.
    fn compare_pages(&mut self, checkpoint: &Checkpoint<'_>) -> Result<(), Difference> {
        let result = self.audit.compare(checkpoint.number(), checkpoint.audit());
        let Equipment { events, standing, .. } = &self.decisions.equipment;
        if let Err(Difference { checkpoint, first, mask }) = result {
            events.emit(events::Event::AuditDiffers {
                checkpoint,
                place: Place::Memory { first_page: first, mask },
            });
        }
        if let Some((audited, more)) = self.audit.due(result.is_err()) {
            standing.audited(more, result.is_err());
            self.decisions.audited(self.link, &audited);
        }
        result
    }

    /// Compares the copy with the VM, if the checkpoint has the hashes of the VM. A copy that differs must
    /// never run. Nobody writes to the copy's memory until the checkpoint is reported as applied. The disks'
    /// thread compares the disks.
    fn compare(&self, checkpoint: u64, hashes: Hashes) -> Result<(), CheckError> {
        let events = &self.decisions.equipment.events;
        hashes
            .compare_memory(&self.copy.ram())
            .inspect_err(|differs| notes::compared(events, checkpoint, Some(&differs.to_string())))?;
        if hashes.disks.is_empty() {
            notes::compared(events, checkpoint, None);
        } else {
            self.copy.disks().check(checkpoint, hashes.disks);
        }
        Ok(())
    }

    fn discard(self) {
        let Self { decisions, link, handover, mut copy, audit, difference } = self;
        if let Some(record) = copy.end_record() {
            record.end(difference.as_deref());
        }
        drop(audit);
        // Nobody else holds memory or disks by then, so this frees them.
        handover.wait_for_reader();
        drop(copy);
        // Its disks are at their last commit, and nobody writes to them.
        decisions.equipment.books.close();
        decisions.handle(Event::Discarded { link });
    }
}

/// The hashes of the VM in the checkpoint, to compare a copy with; `None` if it has none.
pub(super) fn hashes(checkpoint: &Checkpoint<'_>) -> Option<Result<Hashes, StateError>> {
    let section = checkpoint.state().find(StateKind::Check, 0)?;
    Some(Hashes::decode(section.bytes))
}
