//! The thread that keeps the sidecars of a VM's images up to date.
//!
//! A sidecar says whose an image is; the image does not need it to be good. So a takeover and the coordinator
//! do not wait for it. They only say what the sidecars must say, and what cannot be written now, because a
//! file system is full or does not answer, is written later. Only a thread that is about to spoil an image
//! waits until the sidecar says so.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::provenance::{Accepted, Provenance};
use super::shared::Note;
use super::sidecar::{CopyEnd, Role, Sidecar, beside};
use super::stamp::Stamp;
use crate::arbiter::process_token;

/// Time between two attempts.
const RETRY: Duration = Duration::from_secs(2);
/// One writer at a time in this process. An image may soon belong to another copy, whose sidecar must come
/// after one that is still on its way to a slow file system.
static WRITING: Mutex<()> = Mutex::new(());

/// Keeps every thread that writes sidecars waiting while it lives. `None` if one of them works for longer
/// than `patience`: it may belong to an earlier copy on a slow file system, and still rename files and remove
/// a journal.
pub(super) fn nobody_writes(patience: Duration) -> Option<MutexGuard<'static, ()>> {
    let deadline = Instant::now() + patience;
    loop {
        match WRITING.try_lock() {
            Ok(guard) => return Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if Instant::now() >= deadline => return None,
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

/// Why the sidecars do not say what they must.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum SidecarsError {
    /// The last attempt failed.
    #[error(transparent)]
    Failed(#[from] Arc<WriteError>),
    /// An attempt takes long.
    #[error("the file system of the disk images' .outlive files does not answer")]
    NoAnswer,
}

/// A sidecar could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {}: {source}", .file.display())]
pub(crate) struct WriteError {
    file: PathBuf,
    source: io::Error,
}

/// What the sidecars of all images of a VM must say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Saying {
    /// The generation in which the images were written last.
    pub(crate) generation: u64,
    /// What they are.
    pub(crate) role: Role,
    /// Whether they are whole disks of the VM.
    pub(crate) whole: bool,
    /// How a standby's copy ended.
    pub(crate) end: Option<CopyEnd>,
    /// The checkpoint that they are at without the journal.
    pub(crate) checkpoint: u64,
    /// The journal that may have writes for them.
    pub(crate) journal: Option<PathBuf>,
    /// An empty journal, to be removed once no sidecar names it.
    pub(crate) obsolete: Option<PathBuf>,
    /// The VM has ended in order.
    pub(crate) over: bool,
}

impl Saying {
    /// The VM runs on the images in this generation.
    pub(crate) fn primary(generation: u64) -> Self {
        let (role, whole, end, over) = (Role::Primary, true, None, false);
        Self { generation, role, whole, end, checkpoint: 0, journal: None, obsolete: None, over }
    }
}

/// An image of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    /// Its position among the VM's disks.
    pub(crate) disk: u16,
    /// Where it is.
    pub(crate) path: PathBuf,
    /// What an operator has accepted so that it could become the VM's.
    pub(crate) accepted: Option<Accepted>,
}

/// The thread; see the module. Once this is dropped, no new attempt begins.
pub(crate) struct Sidecars {
    shared: Arc<Shared>,
    /// Whether the VM has shared disks.
    has_notes: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// The newest statement, until it is written.
    due: Option<Saying>,
    /// How many statements there were, and how many of them are written or superseded.
    said: u64,
    done: u64,
    /// The generation in which the VM runs here, once that was said.
    generation: Option<u64>,
    /// Why the last attempt failed, if it did.
    failed: Option<Arc<WriteError>>,
    closed: bool,
}

impl Sidecars {
    /// Starts the thread for these images of a VM.
    #[cfg(test)]
    pub(crate) fn start(images: Vec<Image>, provenance: Provenance) -> io::Result<Self> {
        Self::with_shared(images, Vec::new(), provenance)
    }

    /// Starts the thread for these images of a VM, and for disks that both hosts write to, which only have notes.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn with_shared(
        images: Vec<Image>,
        notes: Vec<PathBuf>,
        provenance: Provenance,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let process = process_token()?;
        // The files that this process has open, whatever comes into their places later.
        let stamps = images.iter().map(|image| Stamp::of(&image.path).ok()).collect();
        let has_notes = !notes.is_empty();
        let keeper = Keeper { shared: shared.clone(), images, stamps, notes, provenance, process };
        outlive_machine::spawn("sidecars", move || {
            keeper.run();
        })?;
        Ok(Self { shared, has_notes })
    }

    /// Sets what the sidecars must say from now on. Returns at once.
    pub(crate) fn say(&self, saying: Saying) {
        let mut state = self.shared.lock();
        // A journal that an earlier statement would have removed is still useless.
        let obsolete = state.due.take().and_then(|earlier| earlier.obsolete);
        let obsolete = obsolete.filter(|path| saying.journal.as_ref() != Some(path));
        state.generation =
            Some(saying.generation).filter(|_| saying.role == Role::Primary).or(state.generation);
        state.due = Some(Saying { obsolete: saying.obsolete.clone().or(obsolete), ..saying });
        state.said += 1;
        state.failed = None;
        self.shared.changed.notify_all();
    }

    /// The VM has ended in order, in this generation if none was said. Shared disks may be used by another host from now
    /// on; other images know without a word. Waits until it is durable, but not for longer than `patience`.
    pub(crate) fn over(&self, generation: u64, patience: Duration) {
        if self.has_notes {
            let generation = self.shared.lock().generation.unwrap_or(generation);
            self.say(Saying { over: true, ..Saying::primary(generation) });
            self.written_within(patience).ok();
        }
    }

    /// Waits until the last statement is durable, but not for longer than `patience`.
    ///
    /// # Errors
    /// Why it is not durable; the thread tries again.
    pub(crate) fn written_within(&self, patience: Duration) -> Result<(), SidecarsError> {
        let deadline = Instant::now() + patience;
        let mut state = self.shared.lock();
        let said = state.said;
        while state.done < said {
            if let Some(why) = &state.failed {
                return Err(why.clone().into());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(SidecarsError::NoAnswer);
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for Sidecars {
    fn drop(&mut self) {
        // Do not wait for the thread: it may hang in a file system.
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Keeper {
    shared: Arc<Shared>,
    images: Vec<Image>,
    /// One for each image.
    stamps: Vec<Option<Stamp>>,
    /// Disks that both hosts write to.
    notes: Vec<PathBuf>,
    provenance: Provenance,
    process: &'static str,
}

impl Keeper {
    fn run(self) {
        let mut warned: Option<String> = None;
        while let Some((number, saying)) = self.next() {
            let one = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
            // It may have been superseded or useless before its turn came.
            let stale = {
                let state = self.shared.lock();
                state.closed || state.said != number
            };
            if stale {
                continue;
            }
            let result = self.write(&saying);
            drop(one);
            let mut state = self.shared.lock();
            match result {
                Ok(()) => {
                    state.done = number;
                    if state.said == number {
                        state.due = None;
                    }
                    if warned.take().is_some() {
                        tracing::info!("the .outlive files are up to date again");
                    }
                }
                Err(why) => {
                    let text = why.to_string();
                    if warned.as_ref() != Some(&text) {
                        tracing::warn!("{text}; Outlive tries again, and the VM does not wait for it");
                        warned = Some(text);
                    }
                    // A newer statement came meanwhile: try that one at once.
                    if state.said == number {
                        state.failed = Some(Arc::new(why));
                    }
                }
            }
            self.shared.changed.notify_all();
        }
    }

    /// Waits for the next statement and returns it with its number. `None` when there will be no more.
    fn next(&self) -> Option<(u64, Saying)> {
        let mut state = self.shared.lock();
        loop {
            state = match &state.due {
                _ if state.closed => return None,
                Some(due) if state.failed.is_none() => return Some((state.said, due.clone())),
                None => self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(_) => {
                    let waited = self.shared.changed.wait_timeout(state, RETRY);
                    let (mut state, waited) = waited.unwrap_or_else(PoisonError::into_inner);
                    if waited.timed_out() {
                        state.failed = None;
                    }
                    state
                }
            };
        }
    }

    fn write(&self, saying: &Saying) -> Result<(), WriteError> {
        let Saying { generation, role, whole, end, checkpoint, journal, obsolete, over } = saying.clone();
        for (Image { disk, path: image, accepted }, stamp) in self.images.iter().zip(&self.stamps) {
            let sidecar = Sidecar {
                provenance: self.provenance.clone(),
                generation,
                role,
                whole,
                end,
                checkpoint,
                disk: *disk,
                disks: u16::try_from(self.images.len()).ok(),
                journal: journal.clone(),
                process: Some(self.process.to_owned()),
                earlier: Vec::new(),
                accepted: accepted.iter().cloned().collect(),
            };
            sidecar
                .write_for(image, stamp.clone())
                .map_err(|source| WriteError { file: beside(image, "outlive"), source })?;
        }
        // The note of a shared disk is the word of the host where the VM runs.
        for disk in self.notes.iter().filter(|_| role == Role::Primary) {
            Note::here(&self.provenance, generation)
                .and_then(|note| Note { over, ..note }.write(disk))
                .map_err(|source| WriteError { file: beside(disk, "outlive-shared"), source })?;
        }
        if let Some(path) = obsolete
            && let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            // The journal is empty, and no sidecar names it.
            tracing::warn!(path = %path.display(), %error, "cannot remove the journal");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use outlive_epoch::VmId;

    use super::*;
    use crate::disk::tests::provenance;

    const SOON: Duration = Duration::from_secs(20);

    fn image(directory: &Path) -> PathBuf {
        let image = directory.join("root.img");
        fs::write(&image, [0; 512]).unwrap();
        image
    }

    fn images(image: &Path) -> Vec<Image> {
        vec![Image { disk: 0, path: image.to_path_buf(), accepted: None }]
    }

    fn generation(image: &Path) -> Option<u64> {
        Sidecar::read(image).unwrap().map(|sidecar| sidecar.generation)
    }

    #[test]
    fn what_cannot_be_written_is_written_later_and_only_the_newest() {
        let directory = tempfile::tempdir().unwrap();
        let (image, journal) = (image(directory.path()), directory.path().join("root.img.journal"));
        fs::write(&journal, "empty").unwrap();
        let sidecars = Sidecars::start(images(&image), provenance(VmId([3; 16]))).unwrap();
        // A directory in the place of the new sidecar: no user can write it.
        let blocked = beside(&image, "outlive.new");
        fs::create_dir(&blocked).unwrap();
        sidecars.say(Saying { obsolete: Some(journal.clone()), ..Saying::primary(4) });
        let why = sidecars.written_within(SOON).unwrap_err().to_string();
        assert!(why.contains("cannot write") && why.contains("root.img.outlive"), "{why}");
        sidecars.say(Saying::primary(5));
        assert!(sidecars.written_within(SOON).is_err());
        assert!(generation(&image).is_none() && journal.exists());

        fs::remove_dir(&blocked).unwrap();
        let began = Instant::now();
        while sidecars.written_within(SOON).is_err() {
            assert!(began.elapsed() < SOON);
            std::thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(generation(&image), Some(5));
        assert!(!journal.exists(), "nothing names it any more");
    }

    /// A writer of the previous copy must not rename or remove what the next copy has claimed.
    #[test]
    fn who_claims_waits_for_a_writer_that_is_at_work() {
        let writing = WRITING.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(nobody_writes(Duration::from_millis(20)).is_none());
        drop(writing);
        let claiming = nobody_writes(SOON).expect("nobody writes for long");
        let directory = tempfile::tempdir().unwrap();
        let image = image(directory.path());
        let sidecars = Sidecars::start(images(&image), provenance(VmId([3; 16]))).unwrap();
        sidecars.say(Saying::primary(1));
        assert!(sidecars.written_within(Duration::from_millis(50)).is_err());
        assert!(generation(&image).is_none());
        drop(claiming);
        sidecars.written_within(SOON).unwrap();
    }

    #[test]
    fn nothing_is_written_once_it_is_dropped() {
        let directory = tempfile::tempdir().unwrap();
        let image = image(directory.path());
        let sidecars = Sidecars::start(images(&image), provenance(VmId([3; 16]))).unwrap();
        sidecars.say(Saying::primary(1));
        sidecars.written_within(SOON).unwrap();
        let blocked = beside(&image, "outlive.new");
        fs::create_dir(&blocked).unwrap();
        sidecars.say(Saying::primary(2));
        sidecars.written_within(SOON).unwrap_err();
        let thread = Arc::downgrade(&sidecars.shared);
        drop(sidecars);
        fs::remove_dir(&blocked).unwrap();
        let began = Instant::now();
        while thread.strong_count() > 0 {
            assert!(began.elapsed() < SOON, "the thread does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(generation(&image), Some(1));
    }
}
