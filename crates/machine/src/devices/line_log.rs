//! A character port as log lines.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::port::PortSink;

/// Longest line; a longer one is logged in parts.
const LINE: usize = 1024;
/// What a Linux kernel prints when it panics.
const PANIC: &[u8] = b"Kernel panic - not syncing";
/// What it prints afterwards, with the same words.
const PANIC_END: &[u8] = b"end Kernel panic";
/// Panic lines that are closer together count as one.
const PANIC_APART: Duration = Duration::from_secs(10);

/// Writes each complete line of a port to the log (target `guest`, level debug) and warns when a line says
/// that the guest's kernel has panicked. That is only a hint for people, because any program may print these
/// words.
///
/// Writing a log can block. If it can, do not give this to a device; feed it from another thread.
#[derive(Debug)]
pub struct LineLog {
    port: &'static str,
    line: Mutex<Line>,
}

#[derive(Debug)]
struct Line {
    bytes: Vec<u8>,
    last_panic: Option<Instant>,
}

impl LineLog {
    /// A log of the port of this name.
    pub fn new(port: &'static str) -> Self {
        Self { port, line: Mutex::new(Line { bytes: Vec::with_capacity(LINE), last_panic: None }) }
    }

    fn log(&self, line: &mut Line) {
        let text = String::from_utf8_lossy(&line.bytes);
        let text = text.trim_end_matches('\r').escape_debug();
        tracing::debug!(target: "guest", port = self.port, "{text}");
        if contains(&line.bytes, PANIC) && !contains(&line.bytes, PANIC_END) {
            let now = Instant::now();
            let again = line.last_panic.is_some_and(|last| now.duration_since(last) < PANIC_APART);
            if !again {
                tracing::warn!(target: "guest", port = self.port, "the guest reports that its kernel has \
                panicked: {text}");
            }
            line.last_panic = Some(now);
        }
        line.bytes.clear();
    }
}

impl PortSink for LineLog {
    fn write(&self, bytes: &[u8]) {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        for &byte in bytes {
            if byte != b'\n' {
                line.bytes.push(byte);
            }
            if byte == b'\n' || line.bytes.len() == LINE {
                self.log(&mut line);
            }
        }
    }
}

fn contains(line: &[u8], words: &[u8]) -> bool {
    line.windows(words.len()).any(|window| window == words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_seen_once_and_a_line_never_grows() {
        let log = LineLog::new("serial");
        let panicked = || log.line.lock().unwrap().last_panic.is_some();
        log.write(b"Kernel panic - not ");
        assert!(!panicked());
        log.write(b"syncing: oops");
        assert!(!panicked(), "only complete lines count");
        log.write(b"\r\n");
        assert!(panicked());
        log.line.lock().unwrap().last_panic = None;
        log.write(b"---[ end Kernel panic - not syncing: oops ]---\r\n");
        assert!(!panicked());
        log.write(&[b'x'; 10 * LINE + 3]);
        let line = log.line.lock().unwrap();
        assert_eq!((line.bytes.len(), line.bytes.capacity()), (3, LINE));
    }
}
