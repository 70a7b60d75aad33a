//! Two hosts, round after round: a fault strikes, then the play checks which host has the VM and starts what
//! is missing.

use std::os::unix::process::ExitStatusExt;
use std::thread;
use std::time::{Duration, Instant};

use outlive::events::Event;

use super::auditor::Auditor;
use super::disk::Place;
use super::faults::{self, Kind};
use super::history::Fault;
use super::operator::{Actor, Part};
use super::report::Trace;
use super::sniffer::{Owned, Sniffer, strangers};
use super::third::{Arbiter, Third};
use crate::support::{Dice, PATIENCE, Side, World};

/// A standby that takes over from a dead primary continues well within this time.
const GONE: Duration = Duration::from_secs(3);
/// The standby's image follows the commits within two seconds.
const COMPARE_ONE_IN: u64 = 10;

/// What happened to the VM in a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    GoesOn,
    Ended,
}

/// One VM on its two hosts.
pub(super) struct Play {
    pub(super) actors: [Option<Actor>; 2],
    pub(super) started: [Instant; 2],
    sniffers: [Sniffer; 2],
    auditor: Option<Auditor>,
    /// May end by a signal: its memory was taken away.
    pub(super) doomed: Option<Side>,
    /// The host with the VM was killed when it had no standby: then the VM may be lost.
    pub(super) died_alone: bool,
    pub(super) disks: [Place; 2],
    pub(super) third: Third,
    pub(super) world: World,
    pub(super) dice: Dice,
    pub(super) owner: Side,
    owners: Vec<Owned>,
    pub(super) took_over: Instant,
    pub(super) number: u32,
    trace: Trace,
}

impl Play {
    /// A new VM in a new world, protected, with clients. `None` if no VM can run.
    pub(super) fn new(mut dice: Dice, mut trace: Trace) -> Option<Play> {
        let mut world = World::new()?;
        let disks = Side::BOTH.map(|side| Place::of_host(&world, side.letter()));
        let third = Third::start(&mut world, Arbiter::wanted(&mut dice));
        let sniffers = Side::BOTH.map(|side| Sniffer::start(&world, side));
        trace.folder = Some(world.keep());
        let mut play = Play {
            actors: [None, None],
            started: [Instant::now(); 2],
            sniffers,
            auditor: None,
            doomed: None,
            died_alone: false,
            disks,
            third,
            world,
            dice,
            owner: Side::A,
            owners: Vec::new(),
            took_over: Instant::now(),
            number: 0,
            trace,
        };
        play.tell(format!("a new VM; its arbiter: {:?}", play.third.arbiter));
        play.start(Side::B, Part::Standby);
        play.start(Side::A, Part::Primary);
        play.protected_again();
        play.auditor = Some(Auditor::start(&play.world, &mut play.dice));
        Some(play)
    }

    /// Plays until the time is over.
    pub(super) fn run(mut self, time: Duration) -> Option<()> {
        while self.trace.report.elapsed() < time && self.trace.report.totals().failure.is_none() {
            let kind = Kind::draw(&mut self);
            if self.round(kind) == Outcome::Ended {
                self.end();
                self = Play::new(self.dice, self.trace)?;
            }
            self.trace.report.write_sometimes();
        }
        self.judge();
        self.end();
        Some(())
    }

    fn round(&mut self, kind: Kind) -> Outcome {
        if let Some(missing) = kind.missing(self) {
            self.tell(format!("no {missing}, so no '{}'", kind.name()));
            return Outcome::GoesOn;
        }
        self.trace.report.totals().rounds += 1;
        let rest = Duration::from_micros(self.dice.below(200_000));
        if kind.is_early() {
            let other = self.owner.other();
            self.kill(other);
            self.unprotected();
            self.start(other, Part::Standby);
            // The base takes some tens of milliseconds.
            self.wait(rest / 2);
        } else {
            self.wait(rest);
        }
        let protected = self.is_protected(self.owner);
        self.tell(format!("{} (the VM is on {:?}, protected: {protected})", kind.name(), self.owner));
        self.trace.report.count(kind.name(), |count| count.injected += 1);
        faults::strike(self, kind);
        if kind.ends_both() {
            self.start_again(kind);
        }
        self.wait(kind.rest());
        let outcome = self.settle(kind, protected);
        (self.doomed, self.died_alone) = (None, false);
        self.watch(kind);
        self.trace.report.count(kind.name(), |count| match outcome {
            Outcome::Ended if kind != Kind::EndOwner => count.unprotected += 1,
            _ => count.survived += 1,
        });
        if outcome == Outcome::GoesOn {
            self.judge();
            self.compare(kind);
        }
        outcome
    }

    /// Both hosts are down. Whoever has the newest image starts the VM, and the other one is its standby.
    fn start_again(&mut self, kind: Kind) {
        let mut auditor = self.auditor.take().expect("clients");
        let (estate, judged) = auditor.end_for_now();
        self.trace.report.totals().operations += auditor.judged;
        self.told(judged);
        let newest =
            self.owners.iter().max_by_key(|owner| owner.generation).map_or(Side::A, |owner| owner.side);
        let starts = match kind.has_one_command() {
            true => self.either_starts(newest),
            false => self.starts_from_its_image(newest) || self.starts_from_its_image(newest.other()),
        };
        if !starts {
            self.fail(kind, true, "no host starts the VM from its image");
        }
        self.protected_again();
        let (auditor, judged) = Auditor::start_after(&self.world, &mut self.dice, estate);
        self.auditor = Some(auditor);
        self.told(judged);
    }

    /// Starts the VM on this host, as an operator would: a host that refuses names the other one.
    fn starts_from_its_image(&mut self, side: Side) -> bool {
        self.start(side.other(), Part::Standby);
        self.start(side, Part::Primary);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let runs = self.look();
            if self.actors[side as usize].as_ref().is_some_and(|actor| actor.born.is_some()) {
                self.owner = side;
                return runs.is_some();
            }
            if self.actors[side as usize].is_none() || Instant::now() > deadline {
                self.tell(format!("{side:?} does not start the VM"));
                self.kill(side);
                self.kill(side.other());
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Starts both hosts with one command, as service managers do after a power cut. They decide.
    fn either_starts(&mut self, first: Side) -> bool {
        self.start(first, Part::Either);
        let rest = Duration::from_micros(self.dice.below(1_500_000));
        self.wait(rest);
        self.start(first.other(), Part::Either);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(owner) = self.look() {
                self.owner = owner;
                return true;
            }
            if Instant::now() > deadline || !self.all_live() {
                self.tell("neither host starts the VM");
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits until one host has the VM and serves it, and the other one protects it.
    fn settle(&mut self, kind: Kind, protected: bool) -> Outcome {
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
            } else if since.elapsed() > GONE && (!protected || self.died_alone) {
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
    pub(super) fn look(&mut self) -> Option<Side> {
        let mut owners = Vec::new();
        for side in Side::BOTH {
            self.note_owner(side);
            self.bury(side);
            let Some(actor) = &mut self.actors[side as usize] else { continue };
            let mut generation = actor.born.unwrap_or(0);
            let mut has = actor.born.is_some();
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
    pub(super) fn note_owner(&mut self, side: Side) {
        let disk = &self.disks[side as usize];
        let Some(actor) = &mut self.actors[side as usize] else { return };
        let mut won = Vec::new();
        let mut takeovers = Vec::new();
        for record in actor.process.records() {
            match record.event {
                Event::Started { vm: Some(_), .. } => {
                    // A VM that starts has this generation; its sidecar was written before.
                    let generation = *actor.born.get_or_insert_with(|| disk.generation().unwrap_or(1));
                    won.push((record.t_us, generation));
                }
                Event::Won { generation } => won.push((record.t_us, generation)),
                Event::Takeover { generation, .. } => takeovers.push(generation),
                _ => {}
            }
        }
        let started = actor.born.is_some();
        for (since, generation) in won {
            let new = Owned { since, generation, side };
            if self.owners.contains(&new) {
                continue;
            }
            if let Some(twice) = self.owners.iter().find(|owned| owned.generation == generation) {
                let twice = format!("generation {generation} was won twice: {twice:?}, {new:?}");
                self.trace.tell(&twice);
                panic!("{twice}");
            }
            self.trace.tell(format_args!("{side:?} has generation {generation}"));
            if takeovers.contains(&generation) || generation > 1 && !started {
                self.took_over = Instant::now();
                self.trace.report.totals().takeovers += u64::from(takeovers.contains(&generation));
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
        let decent = status.code().map_or(self.doomed == Some(side), |code| code != 101);
        assert!(decent, "the process of {side:?} broke down: {status}, signal {:?}", status.signal());
    }

    /// Which host sent what.
    fn watch(&mut self, kind: Kind) {
        self.look();
        for side in Side::BOTH {
            let frames = self.sniffers[side as usize].take();
            let wrong = strangers(&self.owners, side, &frames);
            if wrong.len() == 1 && kind.may_send_late() {
                self.trace.report.totals().late_frames += 1;
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
            self.trace.report.count("answers", |count| match fault {
                Fault::Lost(_) => count.lost += 1,
                Fault::Doubled(_) => count.doubled += 1,
            });
            self.tell(&fault);
            panic!("{fault}");
        }
        let Some(auditor) = &self.auditor else { return };
        let longest = auditor.longest_wait().as_millis() as u64;
        let mut totals = self.trace.report.totals();
        totals.longest_wait_ms = totals.longest_wait_ms.max(longest);
    }

    /// Compares the last chapter's blocks with the images: at once with the primary's, now and then with the
    /// standby's, which follows.
    fn compare(&mut self, kind: Kind) {
        let mut found = self.blocks_on(self.owner);
        if found.is_ok() && self.dice.below(COMPARE_ONE_IN) == 0 {
            let deadline = Instant::now() + PATIENCE;
            loop {
                found = self.blocks_on(self.owner.other()).map(|blocks| 2 * blocks);
                if found.is_ok() || Instant::now() > deadline {
                    break;
                }
                thread::sleep(Duration::from_millis(20));
                // On a busy machine the hosts may lose each other meanwhile, and whoever ends comes back.
                self.owner = self.look().unwrap_or(self.owner);
                self.start_missing();
            }
        }
        match found {
            Ok(blocks) => self.trace.report.totals().blocks += blocks,
            Err(why) => self.fail(kind, true, &why),
        }
    }

    /// Compares the last chapter's blocks with a host's image.
    fn blocks_on(&self, side: Side) -> Result<u64, String> {
        let auditor = self.auditor.as_ref().expect("clients");
        auditor.compare(&self.disks[side as usize].image_behind())
    }

    fn fail(&mut self, kind: Kind, lost: bool, what: &str) -> ! {
        self.trace.report.count(kind.name(), |count| match lost {
            true => count.lost += 1,
            false => count.doubled += 1,
        });
        self.tell(what);
        panic!("{}: {what}", kind.name());
    }

    /// Ends everything of this VM.
    fn end(&mut self) {
        self.actors = [None, None];
        self.tell("the VM is at its end");
        if let Some(mut auditor) = self.auditor.take() {
            let judged = auditor.end();
            self.trace.report.totals().operations += auditor.judged;
            self.auditor = Some(auditor);
            self.told(judged);
        }
        self.trace.report.totals().frames += self.sniffers.iter().map(Sniffer::seen).sum::<u64>();
        self.trace.folder = None;
        self.world.keep_no_more();
    }

    pub(super) fn tell(&mut self, what: impl std::fmt::Display) {
        self.trace.tell(what);
    }

    /// Notes a fault of the start of a process, which costs nothing.
    pub(super) fn harmless(&self, kind: &'static str) {
        self.trace.report.count(kind, |count| {
            (count.injected, count.survived) = (count.injected + 1, count.survived + 1);
        });
    }
}
