//! Restarts of a guest that boots the kernel of its own disk (`--boot disk`).
//!
//! When a restart is due, a thread reads the disk as the guest has left it; meanwhile the VM is as it was when the
//! guest asked, its checkpoints go on, and a takeover asks for the restart once more. Then the guest restarts with what
//! was read. A disk that says nothing useful, or does not answer within `--disk-timeout`, costs the guest its new
//! kernel and not its life: it gets the one from before, which is in the VM's memory.

use std::time::{Duration, Instant};

use outlive_machine::{Machine, ResetError, ResetWay, Restarted};

use super::inbox::{Inbox, Queue};
use crate::events::{Event, EventWriter};
use crate::vm::{BootDiskError, BootReader, FromDisk};

/// What a restart has from the disk, or why it has nothing.
pub(super) type Outcome = Result<Box<FromDisk>, BootDiskError>;

/// A restart that waits for the disk.
struct Pending {
    number: u64,
    way: ResetWay,
    /// When the disk counts as one that does not answer.
    until: Option<Instant>,
    /// What was read, until the guest may restart: it may stand still for its hand-over just then.
    outcome: Option<Outcome>,
}

/// Reads the guest's disk for its restarts.
pub(super) struct OwnKernel {
    reader: BootReader,
    inbox: Queue,
    numbers: u64,
    pending: Option<Pending>,
}

impl OwnKernel {
    pub(super) fn new(inbox: Queue) -> Self {
        Self { reader: BootReader::default(), inbox, numbers: 0, pending: None }
    }

    /// A restart is due. Returns why it need not wait for the disk: the guest boots from none, or nobody can read it.
    pub(super) fn begin(
        &mut self,
        machine: &Machine,
        way: ResetWay,
        timeout: Option<Duration>,
    ) -> Option<Option<BootDiskError>> {
        let Some(from) = machine.disk_boot() else { return Some(None) };
        if self.pending.is_some() {
            // Another vCPU has asked as well.
            return None;
        }
        self.numbers += 1;
        let (number, inbox) = (self.numbers, self.inbox.clone());
        let until = timeout.map(|timeout| Instant::now() + timeout);
        let tell = move |read: Result<FromDisk, BootDiskError>| {
            inbox.send(Inbox::BootRead(number, read.map(Box::new))).ok();
        };
        if let Err(error) = self.reader.begin(machine, from, until, tell) {
            return Some(Some(error));
        }
        self.pending = Some(Pending { number, way, until, outcome: None });
        None
    }

    /// When a disk that has not answered is waited for no longer.
    pub(super) fn due(&self) -> Option<Instant> {
        self.pending.as_ref().filter(|pending| pending.outcome.is_none()).and_then(|pending| pending.until)
    }

    /// The disk was read for a restart, which may wait for it no longer.
    pub(super) fn heard(&mut self, number: u64, outcome: Outcome) {
        if let Some(pending) = self.pending.as_mut().filter(|pending| pending.number == number) {
            pending.outcome = Some(outcome);
        }
    }

    /// The restart whose disk was read. To be asked when the guest may restart.
    pub(super) fn take(&mut self) -> Option<(ResetWay, Outcome)> {
        let pending = self.pending.take_if(|pending| pending.outcome.is_some())?;
        Some((pending.way, pending.outcome?))
    }

    /// The restart that has waited for too long.
    pub(super) fn too_late(&mut self, now: Instant) -> Option<ResetWay> {
        let is_late = |pending: &mut Pending| {
            pending.outcome.is_none() && pending.until.is_some_and(|until| until <= now)
        };
        let late = self.pending.take_if(is_late)?;
        self.reader.give_up();
        Some(late.way)
    }
}

/// Restarts the guest with what was read, or with its last kernel.
///
/// # Errors
/// [`ResetError`]; the guest stays stopped then.
pub(super) fn restart(
    machine: &mut Machine,
    outcome: Outcome,
    events: &EventWriter,
) -> Result<(), ResetError> {
    let last = |why: String| {
        tracing::warn!(
            "THE GUEST RESTARTS WITH ITS LAST KERNEL, because its disk has none that can be booted: {why}"
        );
        events.emit(Event::BootsLastKernel { why });
    };
    let read = match outcome {
        Ok(read) => read,
        Err(error) => {
            machine.reset()?;
            last(error.to_string());
            return Ok(());
        }
    };
    match machine.reset_with(&read.boot)? {
        Restarted::Given => say(&read, events),
        Restarted::NotKept(why) => {
            say(&read, events);
            tracing::warn!(
                "the new kernel is not kept for a restart at which the disk cannot be read, the one from before is: {why}"
            );
        }
        Restarted::Before(why) => last(why.to_string()),
    }
    Ok(())
}

/// Says what the guest boots.
pub(super) fn say(read: &FromDisk, events: &EventWriter) {
    let (found, boot) = (&read.found, &read.boot);
    let disk = boot.disk().map_or(0, |disk| disk.disk);
    for note in &found.notes {
        tracing::warn!("disk {disk}: {note}");
    }
    let (entry, kernel) = (&found.entry, &found.kernel);
    let partition = found.partition;
    tracing::info!(disk, partition, kernel, "the guest boots '{entry}' of its disk: {}", boot.command_line());
    events.emit(Event::BootsFromDisk {
        disk,
        entry: entry.clone(),
        kernel: kernel.clone(),
        command_line: boot.command_line().to_owned(),
    });
}
