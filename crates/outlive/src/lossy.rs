//! A writer of lines that never waits for their reader.
//!
//! Log and events may go anywhere: to a terminal that was stopped, a pager, a collector that hangs, a full
//! disk. A thread that runs the guest or decides about it must never wait for one of them (a VM whose host
//! waits for a pager is a VM without a host), so it only puts a line into a queue of fixed length: no
//! allocation, no system call. A separate thread writes. A line that finds the queue full, or cannot be
//! written, is lost and counted, and the number is written where the lines are missing, as soon as something
//! can be written again.
//!
//! The crate tracing-appender has a similar writer. But it does not say how much was lost, cannot be asked to
//! finish within a time, and wakes its thread with a system call for each line.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How often the thread checks for lines, so that nobody has to wake it.
const LOOK: Duration = Duration::from_millis(10);
/// How often a failed writer is tried again while no new lines come.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Where the writer's thread writes lines.
pub(crate) trait Sink: Send + 'static {
    /// A line, or what a line is made of.
    type Line: Send + 'static;

    /// Writes a line. May be slow.
    ///
    /// # Errors
    /// The line is lost.
    fn write(&mut self, line: Self::Line) -> io::Result<()>;

    /// Writes that this many lines are missing here.
    ///
    /// # Errors
    /// It could not be written.
    fn write_lost(&mut self, lost: u64) -> io::Result<()>;
}

/// The handle for all threads. Cheap to clone.
pub(crate) struct LossyWriter<L> {
    shared: Arc<Shared<L>>,
    thread: Thread,
}

struct Shared<L> {
    queue: Mutex<Queue<L>>,
    idle: Condvar,
}

struct Queue<L> {
    /// Never grows.
    waiting: Vec<L>,
    /// How many lines came when it was full.
    lost: u64,
    /// Whether the thread is writing lines.
    writing: bool,
}

impl<L: Send + 'static> LossyWriter<L> {
    /// Starts the thread. `capacity` lines may wait, and as many more may be being written.
    ///
    /// # Errors
    /// The operating system's, when it refuses the thread.
    pub(crate) fn start(name: &'static str, capacity: usize, sink: impl Sink<Line = L>) -> io::Result<Self> {
        let queue = Queue { waiting: Vec::with_capacity(capacity), lost: 0, writing: false };
        let shared = Arc::new(Shared { queue: Mutex::new(queue), idle: Condvar::new() });
        let (theirs, batch) = (shared.clone(), Vec::with_capacity(capacity));
        let thread =
            outlive_machine::spawn(name, move || Work { shared: theirs, sink, unsaid: 0 }.run(batch))?;
        Ok(Self { shared, thread: thread.thread().clone() })
    }

    /// Puts a line into the queue, or counts it as lost. Never waits: every thread holds the lock for a few
    /// instructions only.
    pub(crate) fn push(&self, line: L) {
        let mut queue = self.shared.lock();
        if queue.waiting.len() < queue.waiting.capacity() {
            queue.waiting.push(line);
        } else {
            queue.lost += 1;
        }
    }

    /// Waits until everything is written or lost, but not for longer than `patience`. Returns whether it is.
    pub(crate) fn flush(&self, patience: Duration) -> bool {
        let deadline = Instant::now() + patience;
        self.thread.unpark();
        let mut queue = self.shared.lock();
        while queue.writing || !queue.waiting.is_empty() || queue.lost > 0 {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.shared.idle.wait_timeout(queue, left.min(LOOK));
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
            self.thread.unpark();
        }
        true
    }
}

impl<L> Clone for LossyWriter<L> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone(), thread: self.thread.clone() }
    }
}

impl<L> Shared<L> {
    fn lock(&self) -> MutexGuard<'_, Queue<L>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread's part.
struct Work<S: Sink> {
    shared: Arc<Shared<S::Line>>,
    sink: S,
    /// How many lines are missing at this point.
    unsaid: u64,
}

impl<S: Sink> Work<S> {
    fn run(mut self, mut batch: Vec<S::Line>) {
        let mut tried = Instant::now();
        loop {
            std::thread::park_timeout(LOOK);
            let lost = self.take(&mut batch);
            if batch.is_empty() && lost == 0 && (self.unsaid == 0 || tried.elapsed() < TRY_AGAIN) {
                continue;
            }
            tried = Instant::now();
            batch.drain(..).for_each(|line| self.write(line));
            // The lost lines came after everything that is being written now.
            self.unsaid += lost;
            self.say();
            self.shared.lock().writing = false;
            self.shared.idle.notify_all();
        }
    }

    /// Takes all waiting lines, and the number of lines that were lost after them.
    fn take(&self, batch: &mut Vec<S::Line>) -> u64 {
        let mut queue = self.shared.lock();
        std::mem::swap(&mut queue.waiting, batch);
        let lost = std::mem::take(&mut queue.lost);
        queue.writing = !batch.is_empty() || lost > 0;
        lost
    }

    fn write(&mut self, line: S::Line) {
        if !self.say() || self.sink.write(line).is_err() {
            self.unsaid += 1;
        }
    }

    /// Writes how many lines are missing, if any. Returns false if that could not be written.
    fn say(&mut self) -> bool {
        if self.unsaid > 0 && self.sink.write_lost(self.unsaid).is_ok() {
            self.unsaid = 0;
        }
        self.unsaid == 0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[derive(Debug, PartialEq, Eq)]
    enum Seen {
        Line(u64),
        Lost(u64),
    }

    /// Writes when the test lets it.
    struct Gate {
        may: Receiver<io::Result<()>>,
        seen: Sender<Seen>,
    }

    impl Gate {
        fn pass(&self, seen: Seen) -> io::Result<()> {
            self.may.recv().unwrap_or(Ok(()))?;
            self.seen.send(seen).unwrap();
            Ok(())
        }
    }

    impl Sink for Gate {
        type Line = u64;

        fn write(&mut self, line: u64) -> io::Result<()> {
            self.pass(Seen::Line(line))
        }

        fn write_lost(&mut self, lost: u64) -> io::Result<()> {
            self.pass(Seen::Lost(lost))
        }
    }

    fn gate(capacity: usize) -> (LossyWriter<u64>, Sender<io::Result<()>>, Receiver<Seen>) {
        let ((open, may), (to, seen)) = (channel(), channel());
        (LossyWriter::start("lines", capacity, Gate { may, seen: to }).unwrap(), open, seen)
    }

    fn wait_until_in_hand(writer: &LossyWriter<u64>) {
        while !writer.shared.lock().waiting.is_empty() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn nobody_waits_for_a_reader_and_what_is_missing_is_said_in_its_place() {
        let (writer, open, seen) = gate(4);
        writer.push(0);
        wait_until_in_hand(&writer);
        // The reader takes nothing: four wait, and the other ten thousand are lost, at once.
        let began = Instant::now();
        (1..=10_004).for_each(|line| writer.push(line));
        assert!(began.elapsed() < Duration::from_secs(2));
        assert!(!writer.flush(Duration::from_millis(50)), "a reader that does not read is not waited for");
        assert_eq!(writer.shared.lock().waiting.capacity(), 4);
        drop(open);
        assert!(writer.flush(PATIENCE));
        writer.push(7);
        assert!(writer.flush(PATIENCE));
        use Seen::{Line, Lost};
        let expected = [Line(0), Line(1), Line(2), Line(3), Line(4), Lost(10_000), Line(7)];
        assert_eq!(seen.try_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn what_cannot_be_written_is_counted_too() {
        let (writer, open, seen) = gate(64);
        let full = || Err(io::ErrorKind::StorageFull.into());
        // The first line is written. The second is not, and neither is the number of missing lines, twice;
        // then there is room.
        for may in [Ok(()), full(), full(), full()] {
            open.send(may).unwrap();
        }
        drop(open);
        (1..=4).for_each(|line| writer.push(line));
        assert!(writer.flush(PATIENCE));
        use Seen::{Line, Lost};
        let found: Vec<Seen> = seen.try_iter().collect();
        // In one batch or in several: with the last line, or before it.
        let batches = [
            vec![Line(1), Lost(3)],
            vec![Line(1), Lost(2), Line(4)],
            vec![Line(1), Lost(1), Line(3), Line(4)],
        ];
        assert!(batches.contains(&found), "{found:?}");
    }

    #[test]
    fn what_was_lost_last_is_said_without_another_line() {
        let (writer, open, seen) = gate(64);
        open.send(Err(io::ErrorKind::BrokenPipe.into())).unwrap();
        open.send(Err(io::ErrorKind::BrokenPipe.into())).unwrap();
        drop(open);
        writer.push(1);
        assert_eq!(seen.recv_timeout(PATIENCE).unwrap(), Seen::Lost(1));
    }
}
