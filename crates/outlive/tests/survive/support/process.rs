//! One process of the program under test.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use outlive::events::{Event, Record};
use rustix::process::{Resource, Rlimit, prlimit};

use super::PATIENCE;

/// Killed and reaped when dropped. When a test fails, its log and events are shown.
pub(crate) struct Process {
    child: Child,
    events: PathBuf,
    log: PathBuf,
    socket: PathBuf,
    read: Option<File>,
    /// The start of a line that is not whole yet.
    rest: Vec<u8>,
    records: Vec<Record>,
    /// Tests have already waited for the events before this one.
    next: usize,
    /// Nobody reads its events at the moment.
    deaf: bool,
    /// It is the program under test. Another release may have events that are not known here.
    is_under_test: bool,
}

impl Process {
    pub(super) fn new(child: Child, [events, log, socket]: [PathBuf; 3], is_under_test: bool) -> Process {
        Process {
            child,
            events,
            log,
            socket,
            read: None,
            rest: Vec::new(),
            records: Vec::new(),
            next: 0,
            deaf: false,
            is_under_test,
        }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it answers `outlive status`, unless its options say something else.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The processes of this name that its threads have started and that are still there.
    pub(crate) fn children(&self, name: &str) -> Vec<Pid> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.pid())).into_iter().flatten().flatten();
        let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
        let all = lists.flat_map(|list| {
            list.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<i32>>()
        });
        let is =
            |pid: &i32| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == name);
        all.filter(is).map(Pid::from_raw).collect()
    }

    /// Sends it a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid() as i32), signal).unwrap();
    }

    /// How many bytes of addresses it has.
    pub(crate) fn address_space(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let size = status.lines().find_map(|line| line.strip_prefix("VmSize:")).unwrap();
        size.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
    }

    /// From now on it gets no memory beyond so many bytes of addresses.
    pub(crate) fn limit_address_space(&self, most: Option<u64>) {
        let limit = Rlimit { current: most, maximum: None };
        let pid = rustix::process::Pid::from_raw(self.pid() as i32);
        prlimit(pid, Resource::As, limit).unwrap();
    }

    /// SIGKILL, like a power cut; the process is gone when this returns.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    /// What it wrote to standard error so far.
    pub(crate) fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until its log has these words this many times. Two threads write log and events, so the log may
    /// not yet have the line for an event that was seen.
    pub(crate) fn wait_says(&self, words: &str, times: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.log().matches(words).count() < times {
            assert!(Instant::now() < deadline, "process {} does not say: {words}", self.pid());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// All events so far.
    pub(crate) fn events(&mut self) -> impl Iterator<Item = &Event> {
        if self.read.is_none() {
            // A named pipe that others keep open has no end.
            let mut how = OpenOptions::new();
            self.read = how.read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&self.events).ok();
        }
        if let Some(file) = self.read.as_mut().filter(|_| !self.deaf) {
            match file.read_to_end(&mut self.rest) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => panic!("{error}"),
                _ => {}
            }
        }
        if let Some(end) = self.rest.iter().rposition(|&byte| byte == b'\n') {
            let lines: Vec<u8> = self.rest.drain(..=end).collect();
            for line in lines.split(|&byte| byte == b'\n').filter(|line| !line.is_empty()) {
                match serde_json::from_slice(line) {
                    Ok(record) => self.records.push(record),
                    Err(error) => assert!(!self.is_under_test, "no event: {error}"),
                }
            }
        }
        self.records.iter().map(|r| &r.event)
    }

    /// Its events come through this pipe, which never shows an end.
    pub(crate) fn read_from(&mut self, pipe: File) {
        fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        self.read = Some(pipe);
    }

    /// Fills the pipe of its events and stops reading, or reads again.
    pub(crate) fn deafen(&mut self, deaf: bool) {
        if let Some(pipe) = self.read.as_ref().filter(|_| deaf) {
            super::fill(pipe);
            fcntl(pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        }
        self.deaf = deaf;
    }

    /// All events so far, with their times.
    pub(crate) fn records(&mut self) -> &[Record] {
        self.events().count();
        &self.records
    }

    /// Waits for its end, of any kind.
    pub(crate) fn wait_end(&mut self) {
        self.child.wait().unwrap();
    }

    /// How it ended, if it has.
    pub(crate) fn status(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Whether an event of this kind has happened.
    pub(crate) fn has(&mut self, wanted: impl Fn(&Event) -> bool) -> bool {
        self.events().any(wanted)
    }

    /// Waits for an event after those that earlier calls waited for.
    pub(crate) fn wait_for(&mut self, what: &str, wanted: impl Fn(&Event) -> bool) -> Event {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let next = self.next;
            let found = self.events().enumerate().skip(next).find(|(_, e)| wanted(e));
            if let Some((at, event)) = found.map(|(at, event)| (at, event.clone())) {
                self.next = at + 1;
                return event;
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                panic!("process {} ended ({status}) before it was {what}", self.pid());
            }
            assert!(Instant::now() < deadline, "process {} is not {what}", self.pid());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until its VM is protected (again).
    pub(crate) fn wait_protected(&mut self) {
        self.wait_for("protected", |e| matches!(e, Event::Protected { .. }));
    }

    /// Waits until it has taken the VM over; returns the generation.
    pub(crate) fn wait_takeover(&mut self) -> u64 {
        match self.wait_for("the new primary", |e| matches!(e, Event::Takeover { .. })) {
            Event::Takeover { generation, .. } => generation,
            _ => unreachable!("the filter above"),
        }
    }

    /// Whether it has taken the VM over.
    pub(crate) fn took_over(&mut self) -> bool {
        self.has(|e| matches!(e, Event::Takeover { .. }))
    }

    /// Whether it has ended.
    pub(crate) fn ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Waits for its end and returns the exit code.
    pub(crate) fn wait_exit(&mut self) -> i32 {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code().unwrap_or_else(|| panic!("process {} ended by {status}", self.pid()));
            }
            assert!(Instant::now() < deadline, "process {} does not end", self.pid());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn end(&mut self) {
        // Both fail only for a child that was already reaped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            let events: Vec<String> = self
                .events()
                .filter(|e| !matches!(e, Event::Stats(_) | Event::Measured(_) | Event::BaseProgress { .. }))
                .map(|e| format!("    {e:?}\n"))
                .collect();
            eprintln!("process {} said:\n{}{}", self.pid(), self.log(), events.concat());
        }
    }
}
