//! Two hosts, round after round: a fault strikes, then the play checks which host has the VM and starts what
//! is missing.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{mkfifo, pipe};
use outlive::events::Event;

use super::auditor::Auditor;
use super::faults::{self, Kind};
use super::history::Fault;
use super::report::Report;
use super::sniffer::{MAC, Owned, Sniffer, strangers};
use crate::support::{Dice, Log, MEMORY, PATIENCE, Process, Readers, Side, Small, World, fill};

/// An image that nobody writes: the test is about its sidecar and journal.
const IMAGE: u64 = 4 << 20;
/// Room for image, sidecar and a journal of 64 MiB.
const ROOM_MIB: u64 = 76;
/// This long after a takeover a host fault is the host's again; the program says 10 s.
const HOST_FAULT_AGAIN: Duration = Duration::from_secs(11);
/// A standby that takes over from a dead primary continues well within this time.
const GONE: Duration = Duration::from_secs(3);
/// With shorter rests, a host that cannot start would only make a busy loop.
const START_AGAIN: Duration = Duration::from_millis(300);
/// How often the hosts' events are read.
const LISTEN: Duration = Duration::from_millis(20);
/// A quiet time after each fault, so that a side that waits for the other has found it dead.
const AFTER: Duration = Duration::from_millis(900);

/// A process and its readers.
struct Actor {
    process: Process,
    /// Was started to run the VM.
    first: bool,
    voice: Option<&'static str>,
    /// The pipes that nobody reads.
    _unread: Option<OwnedFd>,
}

/// What happened to the VM in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    GoesOn,
    Ended,
}

/// One VM on its two hosts.
pub(super) struct Play {
    actors: [Option<Actor>; 2],
    started: [Instant; 2],
    sniffers: [Sniffer; 2],
    auditor: Option<Auditor>,
    pub(super) disks: [Small; 2],
    pub(super) world: World,
    pub(super) dice: Dice,
    pub(super) owner: Side,
    owners: Vec<Owned>,
    took_over: Instant,
    number: u32,
    report: Report,
}

impl Play {
    /// A new VM in a new world, protected, with clients. `None` if no VM can run.
    pub(super) fn new(dice: Dice, report: Report) -> Option<Play> {
        let mut world = World::new()?;
        let disks = Side::BOTH.map(|side| {
            let small = Small::mount(world.dir().join(format!("disk-{}", side.letter())), ROOM_MIB);
            File::create(small.path().join("image")).unwrap().set_len(IMAGE).unwrap();
            small
        });
        let sniffers = Side::BOTH.map(|side| Sniffer::start(&world, side));
        let mut report = report;
        report.folder = Some(world.keep());
        let mut play = Play {
            actors: [None, None],
            started: [Instant::now(); 2],
            sniffers,
            auditor: None,
            disks,
            world,
            dice,
            owner: Side::A,
            owners: Vec::new(),
            took_over: Instant::now(),
            number: 0,
            report,
        };
        play.tell("a new VM");
        play.start(Side::B, false);
        play.start(Side::A, true);
        play.protected_again();
        play.auditor = Some(Auditor::start(&play.world, &mut play.dice));
        Some(play)
    }

    /// Plays until the time is over.
    pub(super) fn run(mut self, time: Duration) -> Option<Report> {
        while self.report.elapsed() < time {
            let kind = Kind::draw(&mut self);
            if self.round(kind) == Outcome::Ended {
                self.end();
                let (dice, report) = self.take();
                self = Play::new(dice, report)?;
            }
        }
        self.judge();
        self.end();
        Some(self.take().1)
    }

    fn round(&mut self, kind: Kind) -> Outcome {
        if let Some(missing) = kind.missing(&self.world) {
            self.tell(format!("no {missing}, so no '{}'", kind.name()));
            return Outcome::GoesOn;
        }
        self.report.rounds += 1;
        let rest = Duration::from_micros(self.dice.below(300_000));
        if kind.is_early() {
            let other = self.owner.other();
            self.kill(other);
            self.start_after_its_end(other);
            // The base takes some tens of milliseconds.
            self.wait(rest / 2);
        } else {
            self.wait(rest);
        }
        let protected = self.is_protected(self.owner);
        self.tell(format!("{} (the VM is on {:?}, protected: {protected})", kind.name(), self.owner));
        self.report.kind(kind.name()).injected += 1;
        faults::strike(self, kind);
        let outcome = self.settle(kind, protected);
        self.watch(kind);
        let count = self.report.kind(kind.name());
        match outcome {
            Outcome::Ended if kind != Kind::EndOwner => count.unprotected += 1,
            _ => count.survived += 1,
        }
        if outcome == Outcome::GoesOn {
            self.judge();
        }
        outcome
    }

    /// Waits until one host has the VM and serves it, and the other one protects it.
    fn settle(&mut self, kind: Kind, protected: bool) -> Outcome {
        self.wait(AFTER);
        let before = self.auditor.as_ref().expect("clients").answers();
        let deadline = Instant::now() + PATIENCE;
        let mut homeless = None;
        loop {
            let runs = self.look();
            if kind == Kind::EndOwner && runs.is_none() && self.actors.iter().all(Option::is_none) {
                return Outcome::Ended;
            }
            if let Some(owner) = runs {
                homeless = None;
                self.owner = owner;
            }
            let served = self.auditor.as_ref().expect("clients").heard_since(&before);
            if runs.is_some() && served && self.is_protected(self.owner) && self.all_live() {
                return Outcome::GoesOn;
            }
            let since = *homeless.get_or_insert_with(Instant::now);
            if runs.is_some() {
                homeless = None;
            } else if since.elapsed() > GONE && !protected {
                return Outcome::Ended;
            }
            if let Some(why) = self.auditor.as_ref().and_then(Auditor::broken) {
                self.fail(kind, true, &why);
            }
            if Instant::now() > deadline {
                self.fail(kind, true, &format!("the VM runs on {runs:?}; served: {served}"));
            }
            if kind != Kind::EndOwner {
                self.start_missing();
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Reaps ended processes, records the winners, and says which host has the VM.
    fn look(&mut self) -> Option<Side> {
        let mut owners = Vec::new();
        for side in Side::BOTH {
            self.note_owner(side);
            self.bury(side);
            let Some(actor) = &mut self.actors[side as usize] else { continue };
            let mut generation = u64::from(actor.first);
            let mut has = actor.first;
            for event in actor.process.events() {
                match event {
                    Event::Takeover { generation: won, .. } => (has, generation) = (true, *won),
                    Event::Won { generation: won } if has => generation = *won,
                    Event::Lost { .. } => has = false,
                    _ => {}
                }
            }
            owners.extend(has.then_some((generation, side)));
        }
        owners.into_iter().max_by_key(|owner| owner.0).map(|owner| owner.1)
    }

    /// Records every generation that a host has won.
    fn note_owner(&mut self, side: Side) {
        let Some(actor) = &mut self.actors[side as usize] else { return };
        let first = actor.first;
        let mut won = Vec::new();
        let mut takeovers = Vec::new();
        for record in actor.process.records() {
            match record.event {
                Event::Started { .. } if first => won.push((record.t_us, 1)),
                Event::Won { generation } => won.push((record.t_us, generation)),
                Event::Takeover { generation, .. } => takeovers.push(generation),
                _ => {}
            }
        }
        for (since, generation) in won {
            let new = Owned { since, generation, side };
            if self.owners.contains(&new) {
                continue;
            }
            if let Some(twice) = self.owners.iter().find(|owned| owned.generation == generation) {
                let twice = format!("generation {generation} was won twice: {twice:?}, {new:?}");
                self.report.tell(&twice);
                panic!("{twice}");
            }
            self.report.tell(format_args!("{side:?} has generation {generation}"));
            if takeovers.contains(&generation) || generation > 1 && !first {
                self.took_over = Instant::now();
                self.report.takeovers += u64::from(takeovers.contains(&generation));
            }
            self.owners.push(new);
        }
    }

    fn bury(&mut self, side: Side) {
        let slot = &mut self.actors[side as usize];
        let Some(status) = slot.as_mut().and_then(|actor| actor.process.status()) else { return };
        // By now it has said everything.
        self.note_owner(side);
        self.actors[side as usize] = None;
        self.tell(format!("{side:?} ended: {status}"));
        let decent = status.code().is_some_and(|code| code != 101);
        assert!(decent, "the process of {side:?} broke down: {status}, signal {:?}", status.signal());
    }

    /// Which host sent what.
    fn watch(&mut self, kind: Kind) {
        self.look();
        for side in Side::BOTH {
            let frames = self.sniffers[side as usize].take();
            let wrong = strangers(&self.owners, side, &frames);
            if wrong.len() == 1 && kind.may_send_late() {
                self.report.late_frames += 1;
            } else if !wrong.is_empty() {
                let what = format!("{side:?} sent {} frames without having the VM: {wrong:?}", wrong.len());
                self.tell(format!("owners: {:?}", self.owners));
                self.fail(kind, false, &what);
            }
        }
    }

    /// Judges the clients' answers.
    fn judge(&mut self) {
        let auditor = self.auditor.as_mut().expect("clients");
        let judged = auditor.judge(&self.world);
        self.told(judged);
    }

    fn told(&mut self, judged: Result<(), Fault>) {
        if let Err(fault) = judged {
            self.report.kind("answers").lost += u64::from(matches!(fault, Fault::Lost(_)));
            self.report.kind("answers").doubled += u64::from(matches!(fault, Fault::Doubled(_)));
            self.tell(&fault);
            panic!("{fault}");
        }
        let auditor = self.auditor.as_ref().expect("clients");
        let longest = auditor.longest_wait().as_millis() as u64;
        self.report.longest_wait_ms = self.report.longest_wait_ms.max(longest);
    }

    fn fail(&mut self, kind: Kind, lost: bool, what: &str) -> ! {
        let count = self.report.kind(kind.name());
        if lost {
            count.lost += 1
        } else {
            count.doubled += 1
        }
        self.tell(what);
        panic!("{}: {what}", kind.name());
    }

    /// Ends everything of this VM.
    fn end(&mut self) {
        self.actors = [None, None];
        self.tell("the VM is at its end");
        if let Some(mut auditor) = self.auditor.take() {
            let judged = auditor.end();
            self.report.operations += auditor.judged;
            self.auditor = Some(auditor);
            self.told(judged);
        }
        self.report.frames += self.sniffers.iter().map(Sniffer::seen).sum::<u64>();
        self.report.folder = None;
        self.world.keep_no_more();
    }

    fn take(self) -> (Dice, Report) {
        (self.dice, self.report)
    }
}

/// The hosts' processes.
impl Play {
    pub(super) fn tell(&mut self, what: impl std::fmt::Display) {
        self.report.tell(what);
    }

    /// Lets time pass, and reads the hosts' events meanwhile.
    pub(super) fn wait(&mut self, time: Duration) {
        let until = Instant::now() + time;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            thread::sleep(left.min(LISTEN));
            self.actors.iter_mut().flatten().for_each(|actor| _ = actor.process.events().count());
        }
    }

    pub(super) fn may_take_memory(&self) -> bool {
        self.took_over.elapsed() > HOST_FAULT_AGAIN
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
            self.actors[side as usize] = None;
        }
    }

    /// Stops reading everybody's events, or reads them again.
    pub(super) fn deafen(&mut self, deaf: bool) {
        self.actors.iter_mut().flatten().for_each(|actor| actor.process.deafen(deaf));
    }

    fn all_live(&mut self) -> bool {
        self.actors.iter_mut().all(|actor| actor.as_mut().is_some_and(|it| it.process.status().is_none()))
    }

    fn is_protected(&mut self, side: Side) -> bool {
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

    fn protected_again(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !(self.look().is_some() && self.is_protected(self.owner)) {
            assert!(Instant::now() < deadline, "a new VM is not protected");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn start_missing(&mut self) {
        for side in Side::BOTH {
            let waited = self.started[side as usize].elapsed() > START_AGAIN;
            if self.actors[side as usize].is_none() && waited {
                self.start(side, false);
            }
        }
    }

    /// Meanwhile its owner goes on alone.
    fn start_after_its_end(&mut self, side: Side) {
        let owner = self.owner;
        let deadline = Instant::now() + PATIENCE;
        while self.is_protected(owner) {
            assert!(Instant::now() < deadline, "{owner:?} does not notice that its standby is gone");
            thread::sleep(Duration::from_millis(2));
        }
        self.look();
        self.start(side, false);
    }

    /// Starts the process of a host: `run` for a new VM, otherwise a standby. Its readers are drawn at
    /// random.
    fn start(&mut self, side: Side, first: bool) {
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
        let disk = format!("path={}", self.disks[side as usize].path().join("image").display());
        let (memory, mac) = (MEMORY.to_string(), MAC.map(|byte| format!("{byte:02x}")).join(":"));
        let net = format!("tap=vm0,bridge=br0,mac={mac}");
        let usual = ["--standby", &there, "--disk", &disk];
        let run = [&usual[..], &["--memory", &memory, "--ip", "10.77.0.2/24", "--net", &net]].concat();
        let process = if first {
            self.world.start_for(side, &["run"], &run, &[], readers)
        } else {
            self.world.start_for(side, &["standby", "--listen", &listen], &usual, &[], readers)
        };
        let mut actor = Actor { process, first, voice, _unread: unread };
        actor.process.read_from(events);
        if let Some(voice) = actor.voice {
            let count = self.report.kind(voice);
            (count.injected, count.survived) = (count.injected + 1, count.survived + 1);
        }
        self.started[side as usize] = Instant::now();
        self.actors[side as usize] = Some(actor);
    }
}
