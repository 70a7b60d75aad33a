//! A program in the background of a host. Its output goes to files of the share, which outlive the host.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// How often files are checked.
const STEP: Duration = Duration::from_millis(20);
/// For things that come at once.
const SOON: Duration = Duration::from_secs(20);
/// Lines of the log in an error.
const TAIL: usize = 30;

/// A program did not do its task.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BackgroundError {
    /// It took too long.
    #[error("{name} on host {host}: no {what} in {} s; its log ends with\n{log}", limit.as_secs())]
    TimeOut {
        /// Which program.
        name: String,
        /// On which host.
        host: usize,
        /// What did not come.
        what: String,
        /// How long it may take.
        limit: Duration,
        /// Its output.
        log: String,
    },
    /// It ended before.
    #[error("{name} on host {host} ended with {status} before {what}; its log ends with\n{log}")]
    Ended {
        /// Which program.
        name: String,
        /// On which host.
        host: usize,
        /// What did not come.
        what: String,
        /// Its exit status.
        status: i32,
        /// Its output.
        log: String,
    },
}

/// A program that runs in a host.
pub(crate) struct Background {
    pub(crate) host: usize,
    pub(crate) name: String,
    /// The files' name without their extensions.
    base: PathBuf,
}

impl Background {
    pub(crate) fn new(host: usize, name: &str, directory: &Path) -> Background {
        Background { host, name: name.to_string(), base: directory.join(name) }
    }

    fn read(&self, end: &str) -> String {
        let mut path = self.base.clone().into_os_string();
        path.push(end);
        String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
    }

    /// All its output.
    pub(crate) fn log(&self) -> String {
        self.read(".log")
    }

    /// Its exit status, once it has ended in a host that still had power.
    pub(crate) fn status(&self) -> Option<i32> {
        self.read(".status").trim().parse().ok()
    }

    /// Its number in the host.
    pub(crate) fn pid(&self) -> Result<u32, BackgroundError> {
        self.wait("start", SOON, || self.read(".pid").strip_suffix('\n').and_then(|it| it.parse().ok()))
    }

    /// Waits until its log contains a text.
    pub(crate) fn wait_for(&self, text: &str, limit: Duration) -> Result<(), BackgroundError> {
        self.wait(&format!("'{text}' in its log"), limit, || self.log().contains(text).then_some(()))
    }

    /// Waits until it ends, and returns its exit status.
    pub(crate) fn wait_for_end(&self, limit: Duration) -> Result<i32, BackgroundError> {
        self.wait("end", limit, || self.status())
    }

    /// Waits until something is found.
    pub(crate) fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut look: impl FnMut() -> Option<T>,
    ) -> Result<T, BackgroundError> {
        let start = Instant::now();
        let (name, host, what) = (self.name.clone(), self.host, what.to_string());
        loop {
            // In this order: its output just before its end counts.
            let status = self.status();
            if let Some(found) = look() {
                return Ok(found);
            }
            if let Some(status) = status {
                return Err(BackgroundError::Ended { name, host, what, status, log: self.tail() });
            }
            if start.elapsed() > limit {
                return Err(BackgroundError::TimeOut { name, host, what, limit, log: self.tail() });
            }
            thread::sleep(STEP);
        }
    }

    fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(TAIL)..].iter().map(|line| format!("  {line}\n")).collect()
    }
}

/// What `outlive --events FILE` writes: an object a line.
pub(crate) struct Events {
    path: PathBuf,
}

impl Events {
    pub(crate) fn new(path: PathBuf) -> Events {
        Events { path }
    }

    /// All events so far. A line that is not whole yet is left for the next time.
    pub(crate) fn all(&self) -> Vec<Value> {
        events(&String::from_utf8_lossy(&fs::read(&self.path).unwrap_or_default()))
    }

    /// The events of a name, in their order.
    pub(crate) fn named(&self, name: &str) -> Vec<Value> {
        self.all().into_iter().filter(|event| event["event"] == name).collect()
    }
}

fn events(text: &str) -> Vec<Value> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_known_by_its_files() {
        let directory = std::env::temp_dir().join(format!("outlive-background-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let program = Background::new(2, "outlive-1", &directory);
        let write =
            |end: &str, text: &str| fs::write(directory.join(format!("outlive-1{end}")), text).unwrap();
        assert_eq!((program.status(), program.log()), (None, String::new()));
        write(".pid", "71\n");
        write(".log", "up\nprotected\n");
        assert_eq!(program.pid().unwrap(), 71);
        program.wait_for("protected", Duration::ZERO).unwrap();
        let error = program.wait_for("lost", Duration::ZERO).unwrap_err().to_string();
        assert!(
            error.contains("'lost'") && error.contains("host 2") && error.ends_with("  protected\n"),
            "{error}"
        );
        write(".status", "3\n");
        assert_eq!(program.wait_for_end(Duration::ZERO).unwrap(), 3);
        program.wait_for("up", Duration::ZERO).unwrap();
        let error = program.wait_for("lost", SOON).unwrap_err().to_string();
        assert!(error.contains("ended with 3 before"), "{error}");
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn an_event_that_is_being_written_is_none_yet() {
        let text = "{\"event\":\"started\",\"pid\":1}\nnot json\n{\"event\":\"protected\"}\n{\"event\":\"sta";
        let names: Vec<_> = events(text).into_iter().map(|it| it["event"].clone()).collect();
        assert_eq!(names, ["started", "protected"]);
        assert!(events("").is_empty());
    }
}
