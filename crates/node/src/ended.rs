//! How a process ended: by its exit code, or by the last line of its events if it was not this node's child.

use std::io::{Read, Seek, SeekFrom};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;

use serde::{Deserialize, Serialize};

use crate::terminal::shown_in_line;
use crate::{bounded, files, log};

/// How much of a file of events is read to find its last line.
const TAIL: i64 = 16 << 10;

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct End {
    /// Its exit code, if it has ended by itself.
    pub(crate) code: Option<i32>,
    /// The signal that has killed it.
    pub(crate) signal: Option<i32>,
    /// What that means.
    pub(crate) what: String,
    /// When the node noticed.
    pub(crate) at: String,
}

impl End {
    /// Of a child; `events` is the file that says more. `log`: its log, and where in it this process began. A process that
    /// ends before it has events says there why.
    pub(crate) fn of_child(status: ExitStatus, pid: u32, events: &Path, log: (&Path, u64)) -> Self {
        let said = last_word(events, pid).filter(|word| Some(word.code) == status.code());
        let last = || status.code().filter(|code| *code != 0).and_then(|_| log::last_line(log.0, log.1));
        Self::new(status.code(), status.signal(), said.map(|it| it.reason).or_else(last))
    }

    /// Of a process that was adopted. Without a last word nobody knows, and that counts as a fault.
    pub(crate) fn of_adopted(pid: u32, events: &Path) -> Self {
        let said = last_word(events, pid);
        Self::new(said.as_ref().map(|it| it.code), None, said.map(|it| it.reason))
    }

    /// It could not even start.
    pub(crate) fn not_started(why: String) -> Self {
        Self::new(None, None, Some(why))
    }

    fn new(code: Option<i32>, signal: Option<i32>, reason: Option<String>) -> Self {
        let what = match (code, signal) {
            (Some(0), _) => "ended in order",
            (Some(2), _) => "wrong options, or something is missing on this host; the log says what to do",
            (Some(3), _) => "the other host won the VM",
            (Some(_), _) => "failed",
            (None, Some(_)) => "was killed",
            (None, None) => "ended, and left no word how",
        };
        // The process's own words: they go to the node's log, too.
        let what = reason.map_or_else(|| what.to_owned(), |said| shown_in_line(&said).into_owned());
        Self { code, signal, what, at: crate::view::now() }
    }

    /// The guest was shut down, or somebody asked for the end.
    pub(crate) fn is_orderly(&self) -> bool {
        self.code == Some(0)
    }
}

#[derive(Deserialize)]
struct LastWord {
    event: String,
    pid: u32,
    reason: String,
    code: i32,
}

/// The last line of the events, if it is this process's and says how it ended.
fn last_word(events: &Path, pid: u32) -> Option<LastWord> {
    let file = events.to_owned();
    // An operator has named the file: it may be anything, anywhere.
    let line = bounded::look(&format!("events {}", events.display()), move || last_line(&file)).flatten()?;
    let word: LastWord = serde_json::from_slice(&line).ok()?;
    (word.event == "ended" && word.pid == pid).then_some(word)
}

fn last_line(events: &Path) -> Option<Vec<u8>> {
    let mut file = files::open(events).ok()?;
    let end = file.seek(SeekFrom::End(0)).ok()? as i64;
    file.seek(SeekFrom::End(-end.min(TAIL))).ok()?;
    let mut tail = Vec::new();
    file.take(TAIL as u64).read_to_end(&mut tail).ok()?;
    tail.trim_ascii_end().rsplit(|byte| *byte == b'\n').next().map(<[u8]>::to_vec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_this_very_process_counts() {
        let folder = tempfile::tempdir().unwrap();
        let events = folder.path().join("events");
        let gone = End::of_adopted(7, &events);
        assert!(!gone.is_orderly() && gone.what.contains("left no word"));
        let ended = r#"{"event":"ended","reason":"the guest powered off","code":0,"t_us":5,"pid":7}"#;
        let other = r#"{"event":"stats","t_us":5,"pid":8}"#;
        std::fs::write(&events, format!("{}\n{ended}\n", "x".repeat(40_000))).unwrap();
        let end = End::of_adopted(7, &events);
        assert!(end.is_orderly() && end.what == "the guest powered off");
        assert!(!End::of_adopted(8, &events).is_orderly(), "another process's word");
        std::fs::write(&events, format!("{ended}\n{other}\n")).unwrap();
        assert!(!End::of_adopted(8, &events).is_orderly() && !End::of_adopted(7, &events).is_orderly());
        std::fs::write(&events, format!("{ended}\n")).unwrap();
        let log = folder.path().join("log");
        std::fs::write(&log, "outlive: of an earlier process\n").unwrap();
        let log = (&*log, 31);
        let killed = End::of_child(ExitStatus::from_raw(9), 7, &events, log);
        assert_eq!((killed.code, killed.signal, killed.what.as_str()), (None, Some(9), "was killed"));
        let failed = End::of_child(ExitStatus::from_raw(3 << 8), 9, &events, log);
        assert_eq!((failed.code, failed.what.as_str()), (Some(3), "the other host won the VM"));
        std::fs::write(log.0, "outlive: of an earlier process\noutlive: no image; give another\n").unwrap();
        let refused = End::of_child(ExitStatus::from_raw(2 << 8), 9, &events, log);
        assert_eq!(refused.what, "no image; give another");
        let evil = r#"{"event":"ended","reason":"\u001b[2J\nall is well\u009b","code":1,"pid":7}"#;
        std::fs::write(&events, format!("{evil}\n")).unwrap();
        assert_eq!(End::of_adopted(7, &events).what, "?[2J all is well?");
    }
}
