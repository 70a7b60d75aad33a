//! How the writes of a committed checkpoint get into the images: into the journal, which is made durable,
//! then into the images.

use std::io;
use std::time::{Duration, Instant};

use outlive_epoch::{DiskRecord, RecordBuf};

use super::image::{self, Store};
use super::journal::{Journal, JournalError};

/// A journal that has grown to this size is emptied, after the images were made durable.
pub(crate) const JOURNAL_BYTES: u64 = 64 << 20;
/// The same for what its records may cost. Whoever opens the images after a loss of power carries all of it out
/// again, and a small record can make a gigabyte zero.
pub(crate) const JOURNAL_WORK: usize = 4 << 30;

/// The same for the age of its oldest record, as soon as the next one comes. What is in the journal may still have to be
/// made durable in the images, and a takeover waits for that: on a slow disk 64 MiB of small writes take minutes, and
/// what a guest has written in a few seconds takes about as long.
pub(crate) const JOURNAL_TIME: Duration = Duration::from_secs(5);

/// Hears of records before they are written into the images. Everything that changes an image while its VM is protected
/// goes through an [`Applier`], so who hears this hears of every change.
pub(crate) trait Watch {
    /// The records of this checkpoint are written from now on.
    fn about_to_write(&mut self, checkpoint: u64, records: &RecordBuf);
}

/// Nobody reads the images meanwhile.
#[cfg(test)]
impl Watch for () {
    fn about_to_write(&mut self, _: u64, _: &RecordBuf) {}
}

/// The journal and the images of one VM. The module `disk` explains the order.
pub(crate) struct Applier<S> {
    journal: Journal<S>,
    /// One entry for each disk; `None` for one that is not replicated.
    images: Vec<Option<S>>,
    /// Records in the journal that are not yet in the images.
    pending: Vec<(u64, RecordBuf)>,
    /// How many of them, the first ones, are durable in the journal.
    durable: usize,
    /// When the first of them came.
    pending_since: Option<Instant>,
    /// [`RecordBuf::work`] of the pending records.
    pending_work: usize,
    /// The same of all that is in the journal.
    journal_work: usize,
    /// When its oldest record came.
    oldest: Option<Instant>,
    /// Records that are in the images.
    spent: Vec<RecordBuf>,
    /// The newest checkpoint whose writes are in the images.
    applied: u64,
}

impl<S: Store> Applier<S> {
    /// The images are at `checkpoint` and durable, the journal is empty.
    pub(crate) fn new(journal: Journal<S>, images: Vec<Option<S>>, checkpoint: u64) -> Self {
        let (pending, spent) = (Vec::new(), Vec::new());
        let (durable, pending_work, journal_work) = (0, 0, 0);
        let (pending_since, oldest, applied) = (None, None, checkpoint);
        Self {
            journal,
            images,
            pending,
            durable,
            pending_since,
            pending_work,
            journal_work,
            oldest,
            spent,
            applied,
        }
    }

    /// Takes the writes of the next committed checkpoint. Returns whether the guest asked for a flush in it.
    pub(crate) fn commit(
        &mut self,
        now: Instant,
        number: u64,
        records: RecordBuf,
        watch: &mut impl Watch,
    ) -> io::Result<bool> {
        let work = records.work();
        let is_long = self.journal.len() + records.len() as u64 > JOURNAL_BYTES;
        let is_old = self.oldest.is_some_and(|oldest| now.saturating_duration_since(oldest) >= JOURNAL_TIME);
        let is_much = self.journal_work.saturating_add(work) > JOURNAL_WORK;
        if !self.journal.is_empty() && (is_long || is_old || is_much) {
            self.settle(watch)?;
        }
        self.journal.append(number, records.records().bytes())?;
        self.oldest.get_or_insert(now);
        self.pending_since.get_or_insert(now);
        let flush = records.has_flush();
        self.pending_work = self.pending_work.saturating_add(work);
        self.journal_work = self.journal_work.saturating_add(work);
        self.pending.push((number, records));
        Ok(flush)
    }

    /// How many bytes, zeroes too, wait for [`harden`](Self::harden).
    pub(crate) fn pending_work(&self) -> usize {
        self.pending_work
    }

    /// What waits for [`harden`](Self::harden), in the order of the checkpoints, with their numbers.
    pub(crate) fn waiting(&self) -> impl Iterator<Item = (u64, &RecordBuf)> + Clone {
        self.pending.iter().map(|(number, records)| (*number, records))
    }

    /// Since when the oldest of it waits.
    pub(crate) fn waits_since(&self) -> Option<Instant> {
        self.pending_since
    }

    /// Whether all that was committed is durable, if only in the journal.
    pub(crate) fn is_durable(&self) -> bool {
        self.durable == self.pending.len()
    }

    /// Makes the journal durable. The images stay as they are.
    pub(crate) fn make_durable(&mut self) -> io::Result<()> {
        if !self.is_durable() {
            self.journal.sync()?;
            self.durable = self.pending.len();
        }
        Ok(())
    }

    /// Makes the journal durable, then writes the waiting records into the images.
    pub(crate) fn harden(&mut self, watch: &mut impl Watch) -> io::Result<()> {
        self.make_durable()?;
        for (number, records) in self.pending.drain(..) {
            watch.about_to_write(number, &records);
            apply_all(&self.images, records.iter())?;
            self.applied = number;
            self.spent.push(records);
        }
        (self.durable, self.pending_work, self.pending_since) = (0, 0, None);
        Ok(())
    }

    /// Brings the images to the newest checkpoint, makes them durable and empties the journal. Returns that
    /// checkpoint.
    pub(crate) fn settle(&mut self, watch: &mut impl Watch) -> io::Result<u64> {
        self.harden(watch)?;
        if !self.journal.is_empty() {
            sync_all(&self.images)?;
            self.journal.reset(self.applied)?;
            (self.journal_work, self.oldest) = (0, None);
        }
        Ok(self.applied)
    }

    /// The buffers of records that are in the images, for reuse.
    pub(crate) fn spent(&mut self) -> impl Iterator<Item = RecordBuf> + '_ {
        self.spent.drain(..)
    }

    /// Whether [`settle`](Self::settle) would have something to do.
    pub(crate) fn is_settled(&self) -> bool {
        self.journal.is_empty() && self.pending.is_empty()
    }

    /// The newest checkpoint whose writes are in the images.
    pub(crate) fn applied(&self) -> u64 {
        self.applied
    }
}

/// Replays a journal into its images, makes them durable and empties it. Returns the checkpoint that they are
/// at.
pub(crate) fn recover<S: Store>(
    mut journal: Journal<S>,
    durable: u64,
    images: &[Option<S>],
) -> Result<u64, JournalError> {
    // After a kill without a loss of power, what is read here may be in memory only. As always it must be
    // durable before the images are written.
    journal.sync()?;
    let last = journal.replay(|records| apply_all(images, records.iter()))?;
    let Some(last) = last else { return Ok(durable) };
    sync_all(images)?;
    journal.reset(last)?;
    Ok(last)
}

fn apply_all<'a, S: Store>(
    images: &[Option<S>],
    records: impl Iterator<Item = DiskRecord<'a>>,
) -> io::Result<()> {
    for record in records {
        // The receiver of the records checked that the disk is replicated and long enough.
        if let Some(Some(store)) = images.get(usize::from(record.disk)) {
            image::apply(store, &record)?;
        }
    }
    Ok(())
}

fn sync_all<S: Store>(images: &[Option<S>]) -> io::Result<()> {
    images.iter().flatten().try_for_each(Store::sync)
}
