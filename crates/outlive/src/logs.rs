//! What goes to standard error: log lines, and a process's last words.
//!
//! A command that runs a VM, or may have to, calls `never_wait` first: from then on no thread writes to
//! standard error itself. The others write directly, and start no thread for it: `outlive demo` must be
//! alone in its process when it enters its network namespace.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::panic::PanicHookInfo;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::console::restore_terminal;
use crate::lines::LineFile;
use crate::lossy::{LossyWriter, Sink};

/// How many log lines may wait: many times more than the busiest second of a start or a takeover has.
const WAITING: usize = 2048;
/// How long an ending process waits for its last lines to be written.
const LAST_WORDS: Duration = Duration::from_millis(500);
/// How long a process that has panicked waits: the standby takes over only when it is gone.
const PANIC_WORDS: Duration = Duration::from_millis(50);

static WRITER: OnceLock<LossyWriter<Box<[u8]>>> = OnceLock::new();

/// From now on a panic of any thread ends the process, after the present hook has told of it. For others the host is
/// then gone, and the standby takes over; otherwise a VM would stand still while its heartbeats go on.
///
/// A hook does this and not `panic = "abort"`: tests unwind, so cargo would build everything twice, once for the
/// program and once for its tests.
pub fn end_with_a_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
}

/// Starts logging; `RUST_LOG` says what.
pub fn init() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(StandardError)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal())
        .init();
}

/// Why nothing can be logged.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogError {
    /// Standard error is closed, or there is no thread for it.
    #[error("cannot write a log: {0}")]
    Start(#[from] io::Error),
    /// There is a writer already.
    #[error("logging was started twice")]
    Twice,
}

/// From now on nothing in this process waits for the reader of standard error.
///
/// # Errors
/// See [`LogError`].
pub(crate) fn never_wait() -> Result<(), LogError> {
    // Not std's handle: it has a lock, and a write that does not end would hold it.
    let file = File::from(io::stderr().as_fd().try_clone_to_owned()?);
    let writer = LossyWriter::start("log", WAITING, StandardErrorSink(LineFile::new(file)))?;
    WRITER.set(writer).map_err(|_| LogError::Twice)?;
    std::panic::set_hook(Box::new(tell_of_panic));
    end_with_a_panic();
    Ok(())
}

/// Prints a line for people, not for the log. If standard error is closed, nobody wants it.
pub(crate) fn say(line: &str) {
    // In one write, so that it does not mix with other lines.
    StandardError.write_all(format!("{}\n", outlive_node::shown(line)).as_bytes()).ok();
}

/// Waits for the last lines to be written, but not for long.
pub fn finish() {
    if let Some(writer) = WRITER.get() {
        writer.flush(LAST_WORDS);
    }
}

/// One line, which must not wait for a reader either.
fn tell_of_panic(panic: &PanicHookInfo<'_>) {
    restore_terminal();
    let name = std::thread::current().name().unwrap_or("without a name").to_owned();
    let text = format!("outlive: thread {name}: {panic}");
    say(&text);
    // After the line: it reads files, which not every thread may.
    let backtrace = Backtrace::capture();
    if backtrace.status() == BacktraceStatus::Captured {
        say(&backtrace.to_string());
    }
    if let Some(writer) = WRITER.get() {
        writer.flush(PANIC_WORDS);
    }
}

/// Lets a line into the log once a second, so that connections cannot fill the disk.
#[derive(Default)]
pub(crate) struct RateLimit(Mutex<Option<Instant>>);

impl RateLimit {
    /// Whether a line may be written now.
    pub(crate) fn allows(&self) -> bool {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let allows = last.is_none_or(|last| last.elapsed() >= Duration::from_secs(1));
        if allows {
            *last = Some(Instant::now());
        }
        allows
    }
}

/// Standard error, through the queue once there is one.
struct StandardError;

impl<'a> MakeWriter<'a> for StandardError {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        Self
    }
}

impl Write for StandardError {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match WRITER.get() {
            Some(writer) => writer.push(line.into()),
            None => io::stderr().write_all(line)?,
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

struct StandardErrorSink(LineFile);

impl Sink for StandardErrorSink {
    type Line = Box<[u8]>;

    fn write(&mut self, line: Box<[u8]>) -> io::Result<()> {
        self.0.write(&line)
    }

    fn write_lost(&mut self, lost: u64) -> io::Result<()> {
        let plural = if lost == 1 { "" } else { "s" };
        let line =
            format!("outlive: {lost} line{plural} of this log lost here: standard error was not read\n");
        self.0.write(line.as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    /// Names this test to itself: its own program, started again, is the process that ends.
    const PLAYS: &str = "OUTLIVE_TEST_PANICS";

    #[test]
    fn a_panic_of_any_thread_ends_the_process_and_is_told() {
        if let Some(never_waits) = std::env::var_os(PLAYS) {
            end_with_a_panic();
            if never_waits == "true" {
                never_wait().unwrap();
            }
            let _ = std::thread::spawn(|| panic!("as planned")).join();
            return;
        }
        for never_waits in ["false", "true"] {
            let mut again = Command::new(std::env::current_exe().unwrap());
            again.args(["--exact", "logs::tests::a_panic_of_any_thread_ends_the_process_and_is_told"]);
            let output = again.arg("--nocapture").env(PLAYS, never_waits).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.signal(), Some(6), "SIGABRT, not {:?}: {said}", output.status);
            assert!(said.contains("as planned"), "{said}");
        }
    }
}
