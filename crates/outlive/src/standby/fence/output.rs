//! What the fence command says: into the log, and its last line into the reason of a failure.
//!
//! The command must not inherit Outlive's own standard error. Nobody may read that, or it may be closed, and then a
//! command that says a word would wait for ever or die, and the VM with it. So it writes into a pipe that is
//! emptied while the command is waited for.

use std::fs::File;
use std::io::{self, PipeWriter, Read};
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// How many lines of one run are logged.
const LINES: u32 = 100;
/// How many bytes of a line are kept.
const WIDTH: usize = 300;
/// How much is read at a time, so that a command which never stops talking cannot keep its waiter.
const AT_ONCE: usize = 64 << 10;

/// The reading end. Dropping it forgets whatever comes later, for example from a child that the command left behind.
pub(super) struct Output {
    from: File,
    attempt: u32,
    line: Vec<u8>,
    lines: u32,
    last: Option<String>,
}

impl Output {
    /// A new pipe: the reading end, and the command's.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn open(attempt: u32) -> io::Result<(Self, PipeWriter)> {
        let (from, to) = io::pipe()?;
        let from = File::from(OwnedFd::from(from));
        fcntl(&from, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok((Self { from, attempt, line: Vec::new(), lines: 0, last: None }, to))
    }

    /// Logs what has come. Never waits.
    pub(super) fn drain(&mut self) {
        let mut bytes = [0; 4096];
        let mut left = AT_ONCE;
        while let Ok(count @ 1..) = self.from.read(&mut bytes[..left.min(4096)]) {
            bytes[..count].iter().for_each(|byte| self.take(*byte));
            left -= count;
        }
    }

    /// The last line, once the command has ended.
    pub(super) fn finish(mut self) -> Option<String> {
        self.drain();
        self.end_line();
        self.last
    }

    fn take(&mut self, byte: u8) {
        match byte {
            b'\n' | b'\r' => self.end_line(),
            _ if self.line.len() < WIDTH => self.line.push(byte),
            _ => {}
        }
    }

    fn end_line(&mut self) {
        let text = String::from_utf8_lossy(&self.line);
        // Control characters would change the terminal of whoever reads the log.
        let text: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        self.line.clear();
        if text.is_empty() {
            return;
        }
        self.lines += 1;
        match self.lines {
            ..=LINES => tracing::info!(attempt = self.attempt, "the fence command says: {text}"),
            line if line == LINES + 1 => tracing::info!("the fence command says more, which is not logged"),
            _ => {}
        }
        self.last = Some(text);
    }
}
