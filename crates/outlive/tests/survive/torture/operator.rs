//! What an operator does with the hosts' processes, and what a crash does to them.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{mkfifo, pipe};
use outlive::events::Event;

use super::play::Play;
use super::sniffer::MAC;
use crate::support::{Log, MEMORY, PATIENCE, Process, Readers, Side, fill};

/// With shorter rests, a host that cannot start would only make a busy loop.
const START_AGAIN: Duration = Duration::from_millis(300);
/// How often the hosts' events are read.
const LISTEN: Duration = Duration::from_millis(20);
/// This long after a takeover a host fault is the host's again; the program says 10 s.
const HOST_FAULT_AGAIN: Duration = Duration::from_secs(11);

/// What a process is started as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Primary,
    Standby,
    /// The hosts decide.
    Either,
}

/// A process and its readers.
pub(super) struct Actor {
    pub(super) process: Process,
    /// The generation in which it started the VM, if it has.
    pub(super) born: Option<u64>,
    voice: Option<&'static str>,
    /// The pipes that nobody reads.
    _unread: Option<OwnedFd>,
}

/// The hosts' processes.
impl Play {
    /// Lets time pass, and reads the hosts' events meanwhile.
    pub(super) fn wait(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            thread::sleep(left.min(LISTEN));
            self.actors.iter_mut().flatten().for_each(|actor| _ = actor.process.events().count());
        }
    }

    /// Soon after a takeover a host fault counts as the guest's own doing.
    pub(super) fn wait_until_a_host_fault_is_the_hosts(&mut self) {
        self.wait(HOST_FAULT_AGAIN.saturating_sub(self.took_over.elapsed()));
    }

    /// The living process of a host.
    pub(super) fn process(&self, side: Side) -> &Process {
        &self.actors[side as usize].as_ref().expect("a process on this host").process
    }

    pub(super) fn signal(&mut self, side: Side, signal: Signal) {
        if let Some(actor) = &mut self.actors[side as usize]
            && actor.process.status().is_none()
        {
            actor.process.signal(signal);
        }
    }

    /// SIGKILL. Its earlier events are recorded first, and those of its last moment as well.
    pub(super) fn kill(&mut self, side: Side) {
        self.signal(side, Signal::SIGKILL);
        if let Some(mut actor) = self.actors[side as usize].take() {
            actor.process.wait_end();
            self.actors[side as usize] = Some(actor);
            self.note_owner(side);
            if side == self.owner && !self.is_protected(side) {
                // It had lost its standby a moment before, to the same fault or to a machine without time.
                self.died_alone = true;
            }
            self.actors[side as usize] = None;
        }
    }

    /// SIGKILL of both, as close together as a power cut of both.
    pub(super) fn kill_both(&mut self, first: Side) {
        self.signal(first, Signal::SIGKILL);
        self.kill(first.other());
        self.kill(first);
    }

    /// SIGTERM of the standby. When this returns it has ended and its primary knows: a copy that was given up
    /// does not take over any more.
    pub(super) fn leave(&mut self, side: Side) {
        self.signal(side, Signal::SIGTERM);
        let deadline = Instant::now() + PATIENCE;
        while self.actors[side as usize].is_some() {
            assert!(Instant::now() < deadline, "the standby on {side:?} does not end");
            thread::sleep(Duration::from_millis(2));
            self.look();
        }
        self.unprotected();
    }

    /// Stops reading everybody's events, or reads them again.
    pub(super) fn deafen(&mut self, deaf: bool) {
        self.actors.iter_mut().flatten().for_each(|actor| actor.process.deafen(deaf));
    }

    pub(super) fn all_live(&mut self) -> bool {
        self.actors.iter_mut().all(|actor| actor.as_mut().is_some_and(|it| it.process.status().is_none()))
    }

    pub(super) fn is_protected(&mut self, side: Side) -> bool {
        let Some(actor) = &mut self.actors[side as usize] else { return false };
        let mut protected = false;
        for event in actor.process.events() {
            match event {
                Event::Protected { .. } => protected = true,
                Event::LinkLost { .. }
                | Event::Unprotected { .. }
                | Event::Takeover { .. }
                | Event::Lost { .. } => protected = false,
                _ => {}
            }
        }
        protected
    }

    pub(super) fn protected_again(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !(self.look().is_some() && self.is_protected(self.owner)) {
            assert!(Instant::now() < deadline, "a new VM is not protected");
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub(super) fn start_missing(&mut self) {
        for side in Side::BOTH {
            let waited = self.started[side as usize].elapsed() > START_AGAIN;
            if self.actors[side as usize].is_none() && waited {
                self.start(side, Part::Standby);
            }
        }
    }

    /// Waits until the owner has noticed that its standby is gone.
    pub(super) fn unprotected(&mut self) {
        let owner = self.owner;
        let deadline = Instant::now() + PATIENCE;
        while self.is_protected(owner) {
            assert!(Instant::now() < deadline, "{owner:?} does not notice that its standby is gone");
            thread::sleep(Duration::from_millis(2));
        }
        self.look();
    }

    /// Starts the process of a host. Its readers are drawn at random.
    pub(super) fn start(&mut self, side: Side, part: Part) {
        self.number += 1;
        let fifo = self.world.dir().join(format!("events-{}", self.number));
        mkfifo(&fifo, Mode::from_bits_truncate(0o600)).unwrap();
        // Opened in both directions, so that no side waits for the other.
        let events = OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
        fcntl(&events, FcntlArg::F_SETPIPE_SZ(4096)).unwrap();
        let mut readers = Readers { events: Some(fifo), ..Readers::default() };
        let mut unread = None;
        let voice = match self.dice.below(6) {
            0 => {
                let (read, write) = pipe().unwrap();
                fill(&write);
                (readers.log, unread) = (Log::Pipe(write), Some(read));
                Some("standard error that nobody reads")
            }
            1 => {
                readers.log = Log::Pipe(pipe().unwrap().1);
                Some("standard error closed by its reader")
            }
            2 => {
                readers.log = Log::Closed;
                Some("no standard error")
            }
            _ => None,
        };
        let (listen, there) = (side.addr().to_string(), side.other().addr().to_string());
        let disk = format!("path={}", self.disks[side as usize].image().display());
        let (memory, mac) = (MEMORY.to_string(), MAC.map(|byte| format!("{byte:02x}")).join(":"));
        let net = format!("tap=vm0,bridge=br0,mac={mac}");
        let usual = ["--standby", &there, "--disk", &disk];
        let run = [&usual[..], &["--memory", &memory, "--ip", "10.77.0.2/24", "--net", &net]].concat();
        let process = match part {
            Part::Primary => self.world.start_for(side, &["run"], &run, &[], readers),
            Part::Standby => {
                self.world.start_for(side, &["standby", "--once", "--listen", &listen], &usual, &[], readers)
            }
            Part::Either => {
                self.world.start_for(side, &["run", "--or-standby", "--listen", &listen], &run, &[], readers)
            }
        };
        let mut actor = Actor { process, born: None, voice, _unread: unread };
        actor.process.read_from(events);
        if let Some(voice) = actor.voice {
            self.harmless(voice);
        }
        self.started[side as usize] = Instant::now();
        self.actors[side as usize] = Some(actor);
    }
}
