//! The writer of the stream, with its thread.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::{Event, Record, now_us};
use crate::lines::LineFile;
use crate::lossy::{LossyWriter, Sink};

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

#[derive(Default)]
struct Shared {
    stream: Option<LossyWriter<(u64, Event)>>,
    observer: OnceLock<Observer>,
}

/// Opens the event stream of an option.
///
/// # Errors
/// One line with the remedy.
pub(crate) fn open(path: Option<&Path>) -> Result<EventWriter, String> {
    let Some(path) = path else { return Ok(EventWriter::disabled()) };
    EventWriter::open(path)
        .map_err(|e| format!("cannot write events to {}: {e}; give --events another file", path.display()))
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
        let file = if target.as_os_str() == "-" {
            File::from(io::stdout().as_fd().try_clone_to_owned()?)
        } else {
            OpenOptions::new().create(true).append(true).open(target)?
        };
        let stream =
            LossyWriter::start("events", WAITING, Stream { file: LineFile::new(file), failed: false })?;
        Ok(Self { shared: Arc::new(Shared { stream: Some(stream), observer: OnceLock::new() }) })
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
        if let Some(observer) = self.shared.observer.get() {
            observer(&event);
        }
        if let Some(stream) = &self.shared.stream {
            stream.push((t_us, event));
        }
    }

    /// Waits for the last events to be written, but not for long. Returns whether they are.
    pub fn finish(&self) -> bool {
        self.shared.stream.as_ref().is_none_or(|stream| stream.flush(LAST_WORDS))
    }
}

/// The stream as its thread writes it.
struct Stream {
    file: LineFile,
    /// Whether the last line could not be written, and the log has said so.
    failed: bool,
}

impl Stream {
    fn put(&mut self, t_us: u64, event: Event) -> io::Result<()> {
        let record = Record { event, t_us, pid: std::process::id() };
        // Numbers, strings and lists only: this cannot fail.
        let mut line = serde_json::to_vec(&record).expect("an event is plain data");
        line.push(b'\n');
        let result = self.file.write(&line);
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

impl Sink for Stream {
    type Line = (u64, Event);

    fn write(&mut self, (t_us, event): Self::Line) -> io::Result<()> {
        self.put(t_us, event)
    }

    fn write_lost(&mut self, count: u64) -> io::Result<()> {
        self.put(now_us(), Event::EventsLost { count })
    }
}
