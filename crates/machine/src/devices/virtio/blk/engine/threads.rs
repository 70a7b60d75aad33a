//! A few threads carry out requests with plain system calls.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::fallocate::{FallocateMode, fallocate};

use super::super::image::Image;
use super::{Completion, Engine, Operation, Submission, ZERO};
use crate::devices::valve::Permit;
use crate::devices::virtio::worker::event;
use crate::thread;

/// How many operations run at the same time.
const THREADS: usize = 4;

/// The engine: a queue, the threads that empty it, and the finished operations.
pub(in super::super) struct Threads {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    image: Arc<Image>,
    /// Asked before each change of a shared disk.
    permit: Option<Arc<Permit>>,
    /// Whether the shared disk must not be changed any more.
    over: AtomicBool,
    queue: Mutex<Queue>,
    filled: Condvar,
    done: Mutex<Vec<Completion>>,
    event: EventFd,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Submission>,
    quit: bool,
}

impl Threads {
    pub(in super::super) fn start(image: Arc<Image>, permit: Option<Arc<Permit>>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            image,
            permit,
            over: AtomicBool::new(false),
            queue: Mutex::default(),
            filled: Condvar::new(),
            done: Mutex::default(),
            event: event()?,
        });
        let mut engine = Self { shared, threads: Vec::new() };
        for _ in 0..THREADS {
            let shared = engine.shared.clone();
            // If one cannot be started, dropping the engine ends the others.
            engine.threads.push(thread::spawn("outlive-blk-io", move || shared.run())?);
        }
        Ok(engine)
    }
}

impl Engine for Threads {
    fn submit(&self, submissions: &mut Vec<Submission>) {
        if submissions.is_empty() {
            return;
        }
        lock(&self.shared.queue).waiting.extend(submissions.drain(..));
        self.shared.filled.notify_all();
    }

    fn reap(&self, completions: &mut Vec<Completion>) {
        completions.append(&mut lock(&self.shared.done));
    }

    /// Nobody holds this lock over a system call.
    fn try_reap(&self, completions: &mut Vec<Completion>) {
        self.reap(completions);
    }

    fn event(&self) -> &EventFd {
        &self.shared.event
    }

    fn name(&self) -> &'static str {
        "threads"
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        lock(&self.shared.queue).quit = true;
        self.shared.filled.notify_all();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a thread that carries requests to the disk had panicked");
            }
        }
    }
}

impl Shared {
    /// Carries operations out until the engine ends, then the remaining ones, except for changes of a shared
    /// disk.
    fn run(&self) {
        while let Some(Submission { token, operation, mut buffer, tag }) = self.next() {
            let may = || match &self.permit {
                Some(permit) if operation.changes() => {
                    !self.over.load(Ordering::Acquire) && permit.allows(tag)
                }
                _ => true,
            };
            let result = carry_out(&self.image, operation, &mut buffer, may);
            lock(&self.done).push(Completion { token, buffer, result });
            // Fails only if the counter is full, and then it is readable anyway.
            let _ = self.event.write(1);
        }
    }

    fn next(&self) -> Option<Submission> {
        let mut queue = lock(&self.queue);
        loop {
            if let Some(submission) = queue.waiting.pop_front() {
                return Some(submission);
            }
            if queue.quit {
                return None;
            }
            queue = self.filled.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Carries out one operation, waiting for the disk; before each system call it asks whether it may. Returns
/// bytes transferred or the error number; `None` if it may not.
pub(super) fn carry_out(
    image: &Image,
    operation: Operation,
    buffer: &mut [u8],
    may: impl Fn() -> bool,
) -> Option<Result<usize, i32>> {
    let file = image.file();
    while may() {
        let result = match operation {
            Operation::Read { offset, from, len } => file.read_at(&mut buffer[from..from + len], offset),
            Operation::Write { offset, from, len } => file.write_at(&buffer[from..from + len], offset),
            Operation::Zeroes { offset, len } => file.write_at(&ZERO[..len], offset),
            Operation::Sync => file.sync_data().map(|()| 0),
            Operation::PunchHole { offset, len } => change(image, FallocateMode::PunchHole, offset, len),
            Operation::ZeroRange { offset, len } => change(image, FallocateMode::ZeroRange, offset, len),
        };
        match result {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            result => return Some(result.map_err(|error| error.raw_os_error().unwrap_or(libc::EIO))),
        }
    }
    None
}

fn change(image: &Image, mode: FallocateMode, offset: u64, len: u64) -> io::Result<usize> {
    match fallocate(image.file(), mode, true, offset, len) {
        Ok(()) => Ok(0),
        Err(error) => Err(io::Error::from_raw_os_error(error.errno())),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
