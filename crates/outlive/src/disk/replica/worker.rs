//! The disks' thread.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use outlive_epoch::{AuditRange, DISK_CHUNK, DiskWant, RecordBuf, VmId};
use outlive_machine::DiskHash;

use super::claims::ClaimedJournal;
use super::compare::{Audits, Compared};
use super::error::ReplicaError;
use super::queue::{Answer, Job, Queue};
use super::reading::Read;
use super::{DiskEvent, ReplicaDisk, STUCK};
use crate::audit::Budget;
use crate::disk::apply::Applier;
use crate::disk::hash;
use crate::disk::image::{self, ChunkReader, ImageReader, Store, Sum, ZERO_SUM};
use crate::disk::journal::{Identity, Journal};
use crate::disk::sidecar::{CopyEnd, Role};
use crate::disk::sidecars::{Saying, Sidecars};

/// Committed writes are durable in the journal after this time at the latest.
const HARDEN: Duration = Duration::from_millis(50);
/// As soon as this many bytes wait, they are made durable.
const HARDEN_BYTES: usize = 8 << 20;
/// For so much longer a write waits for a read of the audit that it would overtake. Meanwhile it is durable in the
/// journal. Most disks answer earlier, so chunks that are written in every epoch are compared, too.
const OVERTAKE: Duration = Duration::from_millis(200);
/// The journal is emptied after this time without a write.
const IDLE: Duration = Duration::from_secs(1);
/// How long an orderly stop waits for the sidecars that spare the primary the arbiter.
const RELEASE_PATIENCE: Duration = Duration::from_secs(2);
/// How long a takeover waits for sidecars at most; the VM does not need them.
const SIDECAR_PATIENCE: Duration = Duration::from_millis(500);

pub(super) struct Worker<T> {
    queue: Arc<Queue>,
    disks: Vec<Option<ReplicaDisk>>,
    vm: VmId,
    generation: u64,
    sidecars: Arc<Sidecars>,
    /// Until the base's last checkpoint.
    claimed: Option<ClaimedJournal>,
    /// From the base's last checkpoint on.
    applier: Option<Applier<File>>,
    journal: Option<PathBuf>,
    /// The last checkpoint, once the applier is gone.
    left_at: u64,
    /// Whether the sidecars say, or soon say, that the copy was given up.
    released: bool,
    /// Whether the sidecars say that the images are not whole.
    tainted: bool,
    buffer: Vec<u8>,
    pending_since: Option<Instant>,
    /// When the last commit came, or something was done without a job.
    quiet_since: Instant,
    audits: Audits,
    /// The guest does not wait for this, but its flush should soon be durable here.
    flush: bool,
    tell: T,
}

impl<T: Fn(DiskEvent)> Worker<T> {
    pub(super) fn new(
        queue: Arc<Queue>,
        disks: Vec<Option<ReplicaDisk>>,
        (vm, generation): (VmId, u64),
        sidecars: Arc<Sidecars>,
        claimed: Option<ClaimedJournal>,
        audits: Audits,
        tell: T,
    ) -> Self {
        Self {
            queue,
            disks,
            vm,
            generation,
            sidecars,
            claimed,
            applier: None,
            journal: None,
            left_at: 0,
            released: false,
            tainted: false,
            buffer: vec![0; DISK_CHUNK],
            pending_since: None,
            quiet_since: Instant::now(),
            audits,
            flush: false,
            tell,
        }
    }

    pub(super) fn run(mut self) {
        loop {
            let (soft, hard) = self.deadlines();
            let Some(job) = self.queue.pop(soft, hard) else {
                let result = self.harden_or_empty();
                self.note(result);
                self.quiet_since = Instant::now();
                continue;
            };
            let failed = self.queue.lock().failed.clone();
            let last = matches!(job, Job::Close);
            match failed {
                Some(_) if matches!(job, Job::Release) => self.release_what_failed(),
                Some(why) => refuse(job, why),
                None => {
                    let result = self.carry_out(job);
                    self.note(result);
                }
            }
            if last {
                return self.close();
            }
        }
    }

    fn close(&mut self) {
        if !self.queue.is_promised() && self.take_back(None) {
            self.sidecars.written_within(RELEASE_PATIENCE).ok();
        }
        if self.queue.lock().failed.is_none() {
            self.claimed.take().into_iter().for_each(ClaimedJournal::give_up);
        }
    }

    fn carry_out(&mut self, job: Job) -> Result<(), Arc<ReplicaError>> {
        match job {
            Job::Sums { disk, first, count, sums } => self.compare(disk, first, count, sums.as_deref())?,
            Job::Blocks(records) => self.write_blocks(records)?,
            Job::Commit { number, base, records } => self.commit(number, base, records)?,
            Job::Check { number, hashes } => self.check(number, &hashes)?,
            Job::Audit { number, ranges, budget } => self.audit(number, ranges, budget)?,
            Job::Read(read) => self.compare_read(read)?,
            Job::Images { done } => {
                self.harden()?;
                // Without them nothing is recorded, and the copy is what it was.
                match self.images() {
                    Ok(images) => drop(done.send(images)),
                    Err(error) => tracing::warn!(%error, "the images cannot be shown to the recorder"),
                }
            }
            // Do now what a takeover needs from the disks: a won generation cannot be given back.
            Job::Settle { checkpoint } => {
                self.leave(None)?;
                self.take_back(None);
                (self.tell)(DiskEvent::Settled { checkpoint });
            }
            Job::Release => self.release()?,
            Job::Leave { end, done } => self.answered(&done, |worker| worker.leave_for_good(end))?,
            Job::BecomePrimary { generation, done } => {
                self.answered(&done, |worker| worker.become_primary(generation))?;
            }
            Job::Close => self.leave(None)?,
        }
        Ok(())
    }

    /// When there is something to do without a job.
    fn deadlines(&self) -> (Option<Instant>, Option<Instant>) {
        let Some(applier) = self.applier.as_ref().filter(|applier| !applier.is_settled()) else {
            return (None, None);
        };
        let now = Instant::now();
        if applier.pending_work() == 0 {
            // Not from now on: comparisons come all the time.
            return (Some(self.quiet_since + IDLE), None);
        }
        let overtakes = applier.waits_since().unwrap_or(now) + HARDEN + OVERTAKE;
        if applier.is_durable() {
            // Some of it waits for a read.
            return (Some(if self.audits.count() == 0 { now } else { overtakes }), Some(overtakes));
        }
        let hard = overtakes.min(self.pending_since.unwrap_or(now) + HARDEN);
        (Some(if self.flush { now } else { hard }), Some(hard))
    }

    fn note(&self, result: Result<(), impl Into<Arc<ReplicaError>>>) {
        if let Err(why) = result.map_err(Into::<Arc<ReplicaError>>::into) {
            match *why {
                // The others are what they were.
                ReplicaError::Audit { chunks, .. } => {
                    self.disk(chunks.disk).iter().for_each(|disk| disk.book.forget_everything());
                }
                // What the images contain now is anybody's guess.
                _ => self.disks.iter().flatten().for_each(|disk| disk.book.forget_everything()),
            }
            self.queue.lock().failed.get_or_insert_with(|| why.clone());
            self.queue.room.notify_all();
            (self.tell)(match *why {
                ReplicaError::Audit { checkpoint, chunks, .. } => {
                    DiskEvent::Differs { checkpoint, chunks, why }
                }
                _ => DiskEvent::Failed(why),
            });
        }
    }

    fn answered(
        &mut self,
        done: &Sender<Answer>,
        work: impl FnOnce(&mut Self) -> Result<(), ReplicaError>,
    ) -> Answer {
        let result = work(self).map_err(Arc::new);
        done.send(result.clone()).ok();
        result
    }

    fn disk(&self, disk: u16) -> Result<&ReplicaDisk, ReplicaError> {
        let known = self.disks.get(usize::from(disk)).and_then(Option::as_ref);
        known.ok_or(ReplicaError::NotReplicated(disk))
    }

    /// Compares a window. Zeroes at once what must be zero, and asks for everything else that differs.
    fn compare(
        &mut self,
        disk: u16,
        first: u64,
        count: u32,
        sums: Option<&[Sum]>,
    ) -> Result<(), ReplicaError> {
        let mut wanted = Vec::new();
        if count == 0 {
            let ReplicaDisk { file, path, .. } = self.disk(disk)?;
            file.sync().map_err(unwritten(path))?;
        }
        for at in 0..count {
            let theirs = sums.map_or(ZERO_SUM, |sums| sums[at as usize]);
            let chunk = first + u64::from(at);
            let mut buffer = std::mem::take(&mut self.buffer);
            let may_note = self.applier.is_none();
            let ReplicaDisk { file, path, bytes, read_only, book, .. } = self.disk(disk)?;
            let mut reader = ChunkReader::new(file, *bytes);
            let range = reader.range(chunk);
            let ours = match book.sum(chunk) {
                Some(sum) => sum,
                None => reader.sum(chunk, &mut buffer).map_err(unread(path))?,
            };
            // Commits reach the image later than they are forgotten.
            if may_note {
                book.note(chunk, ours);
            }
            let read_only = *read_only;
            if ours != theirs && read_only {
                return Err(ReplicaError::ReadOnlyDiffers { disk, image: path.clone() });
            }
            self.buffer = buffer;
            if ours == theirs {
                continue;
            }
            if theirs == ZERO_SUM {
                self.taint()?;
                let ReplicaDisk { file, path, book, .. } = self.disk(disk)?;
                book.forget(chunk);
                file.zero(range.0, range.1 as u64).map_err(unwritten(path))?;
                if may_note {
                    book.note(chunk, ZERO_SUM);
                }
            } else {
                wanted.push(at as u16);
                self.queue.wanted.fetch_add(range.1 as u64, Ordering::Relaxed);
            }
        }
        (self.tell)(DiskEvent::Want(DiskWant { disk, first, count, wanted }));
        Ok(())
    }

    fn write_blocks(&mut self, records: RecordBuf) -> Result<(), ReplicaError> {
        self.taint()?;
        for record in records.iter() {
            let ReplicaDisk { file, path, bytes, book, .. } = self.disk(record.disk)?;
            book.forget_range(record.offset, record.len());
            image::apply(file, &record).map_err(unwritten(path))?;
            if self.applier.is_none()
                && let Some((chunk, sum)) = image::whole_chunk(&record, *bytes)
            {
                book.note(chunk, sum);
            }
        }
        self.queue.give_back(records);
        Ok(())
    }

    /// Called before an image is written outside the journal: it is between two checkpoints from now on.
    fn taint(&mut self) -> Result<(), ReplicaError> {
        self.audits.overtake_all();
        if !std::mem::replace(&mut self.tainted, true) {
            self.say_first(self.replica(false, 0, None))?;
        }
        Ok(())
    }

    /// What the sidecars of a replica of this generation must say.
    fn replica(&self, whole: bool, checkpoint: u64, journal: Option<PathBuf>) -> Saying {
        Saying {
            generation: self.generation,
            role: Role::Replica,
            whole,
            end: None,
            checkpoint,
            journal,
            obsolete: None,
            over: false,
        }
    }

    /// Writes into the sidecars what they must say before anything else happens to the images.
    fn say_first(&self, saying: Saying) -> Result<(), ReplicaError> {
        self.sidecars.say(saying);
        Ok(self.sidecars.written_within(STUCK)?)
    }

    /// Writes into the sidecars what may be written late without harm.
    fn say(&self, saying: Saying) {
        self.sidecars.say(saying);
        // Wait, so that it is usually written early. The keeper has logged any failure.
        self.sidecars.written_within(SIDECAR_PATIENCE).ok();
    }

    fn commit(&mut self, number: u64, base: bool, records: RecordBuf) -> Result<(), ReplicaError> {
        if base {
            self.begin_journal(number)?;
        }
        for record in records.iter() {
            self.disk(record.disk)?.book.forget_range(record.offset, record.len());
        }
        let journal_failed = journal_failed(&self.journal);
        let applier = self.applier.as_mut().ok_or(ReplicaError::NoBase)?;
        let committed = applier.commit(Instant::now(), number, records, &mut self.audits);
        let flush = committed.map_err(journal_failed)?;
        self.flush |= flush;
        self.quiet_since = Instant::now();
        self.pending_since.get_or_insert_with(Instant::now);
        if base {
            self.harden()?;
            // The checkpoint is acknowledged, and this host can run the VM without the sidecars.
            self.say(self.replica(true, number, self.journal.clone()));
            return Ok(());
        }
        if applier.pending_work() >= HARDEN_BYTES { self.harden() } else { Ok(()) }
    }

    /// The base is complete but for its last checkpoint: from here on every write goes through the journal.
    fn begin_journal(&mut self, number: u64) -> Result<(), ReplicaError> {
        // The base's last writes go to the images before a sidecar names this journal. Images that needed no
        // block so far still have the sidecar of an earlier checkpoint, which would say that half of those
        // writes are a whole image.
        self.taint()?;
        let mut images = Vec::new();
        let mut sizes = Vec::new();
        for disk in &self.disks {
            let Some(disk) = disk.as_ref().filter(|disk| !disk.read_only) else {
                images.push(None);
                sizes.push(0);
                continue;
            };
            disk.file.sync().map_err(unwritten(&disk.path))?;
            images.push(Some(disk.file.try_clone().map_err(unwritten(&disk.path))?));
            sizes.push(disk.bytes);
        }
        let ClaimedJournal { path, file, .. } = self.claimed.take().ok_or(ReplicaError::NoJournal)?;
        let identity = Identity { vm: self.vm, generation: self.generation, sizes };
        let before = number.saturating_sub(1);
        let journal = Journal::create(file, identity, before)
            .map_err(|source| ReplicaError::Journal { journal: path.clone(), source })?;
        self.applier = Some(Applier::new(journal, images, before));
        self.journal = Some(path);
        Ok(())
    }

    fn harden(&mut self) -> Result<(), ReplicaError> {
        self.flush = false;
        self.pending_since = None;
        let failed = journal_failed(&self.journal);
        let hardened = self.applier.as_mut().map_or(Ok(()), |applier| applier.harden(&mut self.audits));
        self.give_back();
        hardened.map_err(failed)
    }

    /// Makes durable what is committed, and leaves the images as they are.
    fn make_durable(&mut self) -> Result<(), ReplicaError> {
        self.flush = false;
        self.pending_since = None;
        let failed = journal_failed(&self.journal);
        self.applier.as_mut().map_or(Ok(()), Applier::make_durable).map_err(failed)
    }

    /// Takes back the buffers of records that are in the images.
    fn give_back(&mut self) {
        let spent = self.applier.iter_mut().flat_map(Applier::spent);
        spent.for_each(|buffer| self.queue.give_back(buffer));
    }

    /// Does what is due when no job comes.
    fn harden_or_empty(&mut self) -> Result<(), ReplicaError> {
        match &self.applier {
            Some(applier) if applier.pending_work() > 0 => {
                let waits = applier.waits_since().map_or(Duration::ZERO, |since| since.elapsed());
                let overtakes =
                    waits < HARDEN + OVERTAKE && self.audits.would_be_overtaken(applier.waiting());
                if overtakes { self.make_durable() } else { self.harden() }
            }
            _ => self.settle(),
        }
    }

    /// Compares the images with the VM's disks at the checkpoint that was committed last. Commits wait
    /// meanwhile, in memory. Images that differ no longer belong to any VM, and are marked so.
    fn check(&mut self, number: u64, hashes: &[DiskHash]) -> Result<(), ReplicaError> {
        self.harden()?;
        for &DiskHash { disk, hash: wanted } in hashes {
            let ReplicaDisk { file, path, bytes, .. } = self.disk(disk)?;
            let here = hash::contents(file, *bytes, || !self.queue.is_urgent()).map_err(unread(path))?;
            let Some(here) = here else {
                tracing::info!(checkpoint = number, "self-check: given up, because more urgent work waits");
                return Ok(());
            };
            if here != wanted {
                let why = ReplicaError::Differs { disk, image: path.clone(), here, wanted };
                self.give_up_images()?;
                (self.tell)(DiskEvent::Checked { checkpoint: number, difference: Some(why.to_string()) });
                return Err(why);
            }
        }
        (self.tell)(DiskEvent::Checked { checkpoint: number, difference: None });
        Ok(())
    }

    /// The images belong to no VM any more, and are marked so.
    fn give_up_images(&mut self) -> Result<(), ReplicaError> {
        self.give_up_audits();
        self.applier = None;
        let obsolete = self.journal.take();
        self.say_first(Saying { obsolete, ..self.replica(false, 0, None) })
    }

    /// Begins to compare parts of the images with the VM's disks at the checkpoint that was committed last. Another thread
    /// reads them, and this one waits for none of it.
    fn audit(
        &mut self,
        number: u64,
        ranges: Vec<AuditRange>,
        budget: Arc<Budget>,
    ) -> Result<(), ReplicaError> {
        for range in &ranges {
            self.disk(range.chunks.disk)?;
        }
        if self.applier.is_some() {
            self.audits.ask(number, ranges, budget);
            self.go_on_auditing();
        }
        Ok(())
    }

    fn go_on_auditing(&mut self) {
        while let Some((audited, more)) = self.audits.go_on() {
            (self.tell)(DiskEvent::Audited(audited, more));
        }
        self.queue.audits(self.audits.count(), self.audits.is_reading());
    }

    /// A part of an image was read.
    fn compare_read(&mut self, read: Read) -> Result<(), ReplicaError> {
        let waiting = self.applier.iter().flat_map(Applier::waiting);
        let Some(Compared { checkpoint, disk, differs }) = self.audits.compare(read, waiting) else {
            return Ok(());
        };
        let path = &self.disk(disk)?.path;
        if let Some(chunks) = differs.map_err(unread(path))? {
            let why = ReplicaError::Audit { checkpoint, chunks, image: path.clone() };
            if let Some((audited, more)) = self.audits.due() {
                (self.tell)(DiskEvent::Audited(audited, more));
            }
            // If the primary's image is lost too, this one is better with all writes than without the last.
            // Whether that succeeds changes nothing.
            self.settle().ok();
            self.give_up_images()?;
            return Err(why);
        }
        self.go_on_auditing();
        Ok(())
    }

    /// Nobody waits for a read, and what comes of it counts no more.
    fn give_up_audits(&mut self) {
        self.audits.give_up();
        self.queue.audits(0, false);
    }

    /// Readers of the images.
    fn images(&self) -> Result<Vec<Option<ImageReader>>, ReplicaError> {
        let reader = |disk: &ReplicaDisk| {
            let file = disk.file.try_clone().map_err(unread(&disk.path))?;
            Ok(ImageReader { file, bytes: disk.bytes })
        };
        self.disks.iter().map(|disk| disk.as_ref().map(reader).transpose()).collect()
    }

    fn settle(&mut self) -> Result<(), ReplicaError> {
        self.flush = false;
        self.pending_since = None;
        let failed = journal_failed(&self.journal);
        let audits = &mut self.audits;
        let settled = self.applier.as_mut().map_or(Ok(()), |applier| applier.settle(audits).map(drop));
        self.give_back();
        settled.map_err(failed)
    }

    fn become_primary(&mut self, generation: u64) -> Result<(), ReplicaError> {
        self.leave(None)?;
        self.generation = generation;
        self.say(Saying { checkpoint: self.left_at, ..Saying::primary(generation) });
        Ok(())
    }

    /// Ends the copy as one that the VM goes on without, and says whether whoever finds it will know that.
    fn release(&mut self) -> Result<(), ReplicaError> {
        self.released |= self.applier.is_some();
        self.leave(Some(CopyEnd::Released))?;
        (self.tell)(DiskEvent::Released(self.sidecars.written_within(RELEASE_PATIENCE)));
        Ok(())
    }

    /// The same for a copy that has failed. Its images are no checkpoint of any moment, and their journal stays: whoever
    /// finds them is told that the VM went on without them.
    fn release_what_failed(&mut self) {
        if let Some(applier) = &self.applier {
            (self.released, self.left_at) = (true, applier.applied());
            let journal = self.journal.clone();
            let end = Some(CopyEnd::Released);
            self.sidecars.say(Saying { end, ..self.replica(true, self.left_at, journal) });
        }
        (self.tell)(DiskEvent::Released(self.sidecars.written_within(RELEASE_PATIENCE)));
    }

    /// The process ends. The copy stays given up only if the primary may have heard so.
    fn leave_for_good(&mut self, end: Option<CopyEnd>) -> Result<(), ReplicaError> {
        self.leave(end)?;
        if end == Some(CopyEnd::Released) {
            self.queue.promise();
        } else if self.take_back(end) {
            self.sidecars.written_within(RELEASE_PATIENCE).ok();
        }
        Ok(())
    }

    /// The right was not handed over after all: the copy may be the newest one, and must not be refused as one
    /// without which the VM continued. Returns whether the sidecars are written again.
    fn take_back(&mut self, end: Option<CopyEnd>) -> bool {
        let released = std::mem::take(&mut self.released);
        if released {
            let journal = self.journal.clone();
            self.sidecars.say(Saying { end, ..self.replica(true, self.left_at, journal) });
        }
        released
    }

    /// Ends this standby's copy: brings the images to the last commit, durably, and says so in the sidecars,
    /// without a journal. If the sidecars cannot be written now, the empty journal stays, because they name
    /// it; replaying it changes nothing.
    fn leave(&mut self, end: Option<CopyEnd>) -> Result<(), ReplicaError> {
        // From here on the images are the guest's, or nobody's.
        self.give_up_audits();
        self.settle()?;
        if let Some(applier) = self.applier.take() {
            self.left_at = applier.applied();
            let obsolete = self.journal.take();
            self.say(Saying { obsolete, end, ..self.replica(true, self.left_at, None) });
        }
        Ok(())
    }
}

/// A job that comes after a failure.
fn refuse(job: Job, why: Arc<ReplicaError>) {
    if let Job::Leave { done, .. } | Job::BecomePrimary { done, .. } = &job {
        done.send(Err(why)).ok();
    }
}

fn unread(image: &Path) -> impl FnOnce(io::Error) -> ReplicaError + '_ {
    move |source| ReplicaError::Read { image: image.to_owned(), source }
}

fn unwritten(image: &Path) -> impl FnOnce(io::Error) -> ReplicaError + '_ {
    move |source| ReplicaError::Write { image: image.to_owned(), source }
}

fn journal_failed(path: &Option<PathBuf>) -> impl FnOnce(io::Error) -> ReplicaError + use<> {
    let journal = path.clone().unwrap_or_default();
    move |source| ReplicaError::Apply { journal, source }
}
