//! The writer of the stream, with its thread.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::{Event, Record, now_us};
use crate::lines::LineFile;
use crate::lossy::{LossyWriter, Sink};
use crate::metrics::Tally;

/// How many events may wait for the stream's reader. The largest, [`Event::Stats`], come five times a second.
const WAITING: usize = 256;
/// How long an ending process waits for its last events to be written.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Writes the event stream; cheap to clone, may be used by any thread, and never waits.
///
/// A separate thread makes the lines and hands each to the kernel in one `write`, so the lines of several
/// processes that append to one file do not mix. A reader that does not read, a full disk and a closed pipe
/// cost events, and [`Event::EventsLost`] says how many as soon as something can be written again; they never
/// cost the VM anything.
#[derive(Clone, Default)]
pub struct EventWriter {
    shared: Arc<Shared>,
}

/// Sees every event on the thread that emits it.
type Observer = Box<dyn Fn(&Event) + Send + Sync>;

/// Name and identity of the VM that lines are about.
type Vm = Mutex<Option<(String, String)>>;

#[derive(Default)]
struct Shared {
    stream: Option<LossyWriter<(u64, Event)>>,
    vm: Arc<Vm>,
    observer: OnceLock<Observer>,
    tally: Tally,
}

/// Where events go.
#[derive(Clone, Debug)]
pub(crate) struct EventsTo {
    pub(crate) path: Option<PathBuf>,
    /// A file that would become larger than so many bytes is renamed, and a new one begun.
    pub(crate) max: Option<u64>,
    /// How many old files are kept.
    pub(crate) keep: u32,
}

/// The event stream cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot write events to {}: {source}; give --events another file", .path.display())]
pub(crate) struct EventsError {
    path: PathBuf,
    source: io::Error,
}

/// Opens the event stream of an option.
///
/// # Errors
/// See [`EventsError`].
pub(crate) fn open(to: &EventsTo) -> Result<EventWriter, EventsError> {
    let Some(path) = &to.path else { return Ok(EventWriter::disabled()) };
    EventWriter::open_with(path, to.max, to.keep).map_err(|source| EventsError { path: path.clone(), source })
}

impl EventWriter {
    /// A writer that throws everything away.
    pub fn disabled() -> Self {
        Self::default()
    }

    /// Opens what `--events` names: `-` is standard output, everything else a file to append to.
    ///
    /// # Errors
    ///
    /// The file cannot be created or opened, or standard output is closed.
    pub fn open(target: &Path) -> io::Result<Self> {
        Self::open_with(target, None, 0)
    }

    fn open_with(target: &Path, max: Option<u64>, keep: u32) -> io::Result<Self> {
        let (file, rotation) = if target.as_os_str() == "-" {
            (File::from(io::stdout().as_fd().try_clone_to_owned()?), None)
        } else {
            let file = append_to(target)?;
            let about = file.metadata()?;
            // A pipe or a terminal has no length.
            let max = max.filter(|_| about.is_file());
            (file, max.map(|max| Rotation { path: target.to_owned(), max, keep, len: about.len() }))
        };
        let vm = Arc::<Vm>::default();
        let stream = Stream { file: LineFile::new(file), rotation, vm: vm.clone(), failed: false };
        let stream = LossyWriter::start("events", WAITING, stream)?;
        Ok(Self { shared: Arc::new(Shared { stream: Some(stream), vm, ..Shared::default() }) })
    }

    /// From now on lines say that they are about this VM.
    pub(crate) fn of_vm(&self, name: &str, id: &str) {
        *self.shared.vm.lock().unwrap_or_else(PoisonError::into_inner) = Some((name.into(), id.into()));
    }

    /// Also passes every event from now on to an observer in this process, on the thread that emits it, so
    /// the observer must not wait. The first observer stays.
    pub(crate) fn observe(&self, observer: impl Fn(&Event) + Send + Sync + 'static) {
        self.shared.observer.set(Box::new(observer)).ok();
    }

    /// Writes one event, stamped with this moment and this process.
    pub fn emit(&self, event: Event) {
        self.emit_at(now_us(), event);
    }

    /// Writes one event that happened at `t_us` (see [`now_us`]).
    pub fn emit_at(&self, t_us: u64, event: Event) {
        self.shared.tally.count(&event);
        if let Some(observer) = self.shared.observer.get() {
            observer(&event);
        }
        if let Some(stream) = &self.shared.stream {
            stream.push((t_us, event));
        }
    }

    /// How often what has happened, whether or not the stream has a reader.
    pub(crate) fn tally(&self) -> &Tally {
        &self.shared.tally
    }

    /// Waits for the last events to be written, but not for long. Returns whether they are.
    pub fn finish(&self) -> bool {
        self.shared.stream.as_ref().is_none_or(|stream| stream.flush(LAST_WORDS))
    }
}

/// The stream as its thread writes it.
struct Stream {
    file: LineFile,
    rotation: Option<Rotation>,
    vm: Arc<Vm>,
    /// Whether the last line could not be written, and the log has said so.
    failed: bool,
}

impl Stream {
    fn put(&mut self, t_us: u64, event: Event) -> io::Result<()> {
        let mut record = Record::of(event, t_us, std::process::id());
        let age = Duration::from_micros(now_us().saturating_sub(t_us));
        record.time = humantime::format_rfc3339_millis(SystemTime::now() - age).to_string();
        let vm = self.vm.lock().unwrap_or_else(PoisonError::into_inner).clone();
        (record.vm_name, record.vm_id) = vm.unzip();
        // Numbers, strings and lists only: this cannot fail.
        let mut line = serde_json::to_vec(&record).expect("an event is plain data");
        line.push(b'\n');
        let result = self.make_room(line.len()).and_then(|()| self.file.write(&line));
        if let Err(error) = &result
            && !self.failed
        {
            tracing::warn!(%error, "cannot write the event stream; events are lost until it can be written \
            again");
        }
        self.failed = result.is_err();
        result
    }
}

impl Stream {
    /// Begins a new file if the line does not fit into this one.
    fn make_room(&mut self, bytes: usize) -> io::Result<()> {
        let Some(rotation) = &mut self.rotation else { return Ok(()) };
        let bytes = bytes as u64;
        if rotation.len > 0 && rotation.len + bytes > rotation.max {
            self.file = LineFile::new(rotation.rotate()?);
        }
        rotation.len += bytes;
        Ok(())
    }
}

/// Files that are renamed when they are full: `events`, `events.1`, `events.2`; the largest number is the oldest.
struct Rotation {
    path: PathBuf,
    max: u64,
    keep: u32,
    /// Length of the present file.
    len: u64,
}

impl Rotation {
    fn old(&self, number: u32) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(format!(".{number}"));
        name.into()
    }

    fn rotate(&mut self) -> io::Result<File> {
        for number in (1..self.keep).rev() {
            match fs::rename(self.old(number), self.old(number + 1)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        if self.keep > 0 {
            fs::rename(&self.path, self.old(1))?;
        } else {
            fs::remove_file(&self.path)?;
        }
        self.len = 0;
        append_to(&self.path)
    }
}

/// Opens without waiting: a VM must not wait for whoever reads its events. A named pipe that has no reader yet is
/// opened in both directions. So the reader may come, go and come back at any time, and a collector that is down
/// keeps no VM from starting.
fn append_to(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).append(true).custom_flags(OFlag::O_NONBLOCK.bits());
    match options.open(path) {
        Err(error) if error.raw_os_error() == Some(Errno::ENXIO as i32) && is_fifo(path) => {
            let file = options.read(true).create(false).open(path)?;
            tracing::warn!(
                path = %path.display(),
                "nobody reads this named pipe yet: events wait there for a reader, and are lost when it is full"
            );
            Ok(file)
        }
        opened => opened,
    }
}

fn is_fifo(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|about| about.file_type().is_fifo())
}

impl Sink for Stream {
    type Line = (u64, Event);

    fn write(&mut self, (t_us, event): Self::Line) -> io::Result<()> {
        self.put(t_us, event)
    }

    fn write_lost(&mut self, count: u64) -> io::Result<()> {
        self.put(now_us(), Event::EventsLost { count })
    }
}
