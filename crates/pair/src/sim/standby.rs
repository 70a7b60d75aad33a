//! The standby in the simulation: reader, applier and main thread around the production driver.

use outlive_epoch::{Moment, RefuseCode};

use super::hosts::Process;
use super::images::Image;
use super::ports::{Buffer, Copy, Out, PortFault, StandbyEffect as Effect, StandbySide};
use super::truth::{Life, Node};
use super::world::{Happening, Msg, World};
use crate::planted::{Bug, Planted};
use crate::{
    After, Introduction, Link, LossReason, Standby, StandbyConfig, StandbyDriver, StandbyEvent, StandbyExit,
    StandbyNote, StandbyPorts, TailUse, TakeOver,
};

pub(super) struct StandbyProcess {
    pub(super) driver: StandbyDriver<StandbySide>,
    drains: u32,
    /// Whether its disks fail to reach the committed checkpoint.
    pub(super) bad_disk: bool,
    /// Whether it cannot resume the VM, and notices when it tries.
    pub(super) bad_host: bool,
    /// Whether a comparison at the next apply finds that its copy is not the VM.
    pub(super) differs: bool,
    /// Whether a third party reset the link.
    pub(super) excused: bool,
}

impl StandbyProcess {
    /// The state on which a claim of this process is based.
    pub(super) fn claims_from(&self) -> Node {
        let copy = self.driver.ports().copy.as_ref();
        copy.and_then(|copy| copy.acked).map_or(0, |buffer| buffer.node)
    }
}

impl World {
    pub(super) fn start_standby(&mut self, host: usize) {
        let now = self.clock(host);
        let mut machine = Standby::new(StandbyConfig { vm: None, timing: self.timing }, now);
        machine.bug = Planted(self.bug);
        self.hosts[host].life += 1;
        self.hosts[host].look = None;
        self.hosts[host].process = Process::Standby(Box::new(StandbyProcess {
            driver: StandbyDriver::new(machine, StandbySide::new(self.bug)),
            drains: 0,
            bad_disk: false,
            bad_host: false,
            differs: false,
            excused: false,
        }));
    }

    fn standby_of(&mut self, life: Life) -> Option<&mut StandbyProcess> {
        match &mut self.hosts[life.0].process {
            Process::Standby(s) => Some(s),
            _ => None,
        }
    }

    /// Any thread hands in an event.
    pub(super) fn standby(&mut self, life: Life, event: StandbyEvent) {
        let now = self.believed(life.0);
        if let Some(s) = self.standby_of(life) {
            let after = s.driver.handle(now, event);
            self.standby_after(life, after);
        }
    }

    fn standby_after(&mut self, life: Life, after: After) {
        let late = self.preempted();
        let Some(s) = self.standby_of(life) else { return };
        s.drains += u32::from(after.drain);
        let undrained = s.drains == 0 && !s.driver.ports().outbox.is_empty();
        let (effects, violation, failed) = s.driver.ports_mut().taken();
        self.stats.failed += failed;
        if let Some(what) = violation {
            self.truth.fail(format!("{life:?} {what}"));
        }
        if undrained {
            self.truth.fail(format!("{life:?} has bytes for a link and nobody writes them"));
        }
        if after.drain {
            self.after(late, Happening::Drain(life));
        }
        if after.wake {
            self.look_within(life, 100);
        }
        for effect in effects {
            self.standby_does(life, effect);
        }
    }

    fn standby_does(&mut self, life: Life, effect: Effect) {
        self.tell(life, &effect);
        if self.hosts[life.0].wedged && matches!(effect, Effect::TakeOver(_) | Effect::Exit(_)) {
            // The waiting thread would do it.
            return;
        }
        match effect {
            Effect::HungUp { link, broken } => {
                let broken = broken || self.conns[link.0 as usize].broken;
                if let Some(s) = self.standby_of(life) {
                    s.excused |= broken;
                }
            }
            Effect::Try { link, checkpoint } => {
                let slow = if self.rng.one_in(10) && !self.healed { 200_000 } else { 5_000 };
                let delay = self.rng.range(10, slow);
                self.slow_for(delay);
                self.after(delay, Happening::Tried { life, link, number: checkpoint });
            }
            Effect::Apply { link, checkpoint } => {
                let delay = self.time_to_apply() + self.slowness_of_disk(life.0);
                self.after(delay, Happening::Applied { life, link, number: checkpoint });
            }
            Effect::Settle { link, checkpoint } => {
                let delay = self.rng.range(10, 50_000) + self.slowness_of_disk(life.0);
                self.after(delay, Happening::Settled { life, link, number: checkpoint });
            }
            Effect::Release { link } => {
                let delay = self.rng.range(10, 50_000) + self.slowness_of_disk(life.0);
                // Where the primary's end comes with its last word, the disk is slower than the news of it.
                let delay = delay + if self.trouble_was_death { 1_000 } else { 0 };
                self.after(delay, Happening::Released { life, link });
            }
            Effect::Discard { link } => {
                if let Some(s) = self.standby_of(life) {
                    s.excused = false;
                }
                let delay = self.rng.range(10, 30_000);
                self.after(delay, Happening::Discarded { life, link });
            }
            Effect::Claim { generation } => {
                self.stats.standby_asked += 1;
                if let Some(image) = &mut self.hosts[life.0].image {
                    image.released = false;
                }
                self.ask_arbiter(life, generation);
            }
            Effect::TakeOver(order) => self.take_over(life, order),
            Effect::Exit(reason) => self.standby_exits(life, &reason),
            Effect::Note(StandbyNote::ArbiterUnreachable { .. }) => self.stats.unreachable += 1,
            Effect::Note(_) => {}
        }
    }

    /// Some checkpoints are large, and some disks slow: they take longer than any patience.
    fn time_to_apply(&mut self) -> u64 {
        match self.rng.range(0, 400) {
            _ if self.healed => self.rng.range(10, 4000),
            0 => {
                self.stats.slow_applies += 1;
                let time = self.rng.range(100_000, 400_000);
                self.slow_for(time);
                time
            }
            1..20 => 40_000,
            _ => self.rng.range(10, 4000),
        }
    }

    fn standby_exits(&mut self, life: Life, reason: &StandbyExit) {
        let failed = matches!(reason, StandbyExit::Failed(_));
        let Some(s) = self.standby_of(life) else { return };
        let ports = s.driver.ports();
        let applying = ports.copy.as_ref().is_some_and(|copy| copy.applying.is_some());
        let claimed = ports.claimed;
        if applying && !failed {
            self.truth.fail(format!("invariant 2: {life:?} ends in the middle of a commit"));
        }
        if claimed && failed {
            self.truth.fail(format!("{life:?} has claimed the VM and cannot run it"));
        }
        match reason {
            StandbyExit::Lost { .. } => self.stats.standby_lost += 1,
            StandbyExit::Followed(_) => self.stats.followed += 1,
            StandbyExit::Stopped | StandbyExit::Failed(_) => {}
        }
        self.stop_process(life.0, true);
    }

    /// The main thread checks the deadlines.
    pub(super) fn wait_for_deadline(&mut self, life: Life) {
        self.standby(life, StandbyEvent::Tick);
        let Some(s) = self.standby_of(life) else { return };
        let until = s.driver.wait();
        self.look_when(life, until);
    }

    /// The thread that handed in an event writes the bytes queued for links.
    pub(super) fn write_out(&mut self, life: Life) {
        let Some(s) = self.standby_of(life) else { return };
        s.drains -= 1;
        let out = std::mem::take(&mut s.driver.ports_mut().outbox);
        for out in out {
            match out {
                Out::Send(link, msg) => {
                    if let (Msg::Leave(reason), Some(image)) = (&msg, &mut self.hosts[life.0].image) {
                        image.released &= reason.hands_over();
                    }
                    self.stats.left += u64::from(matches!(msg, Msg::Leave(_)));
                    self.stats.handed_over +=
                        u64::from(matches!(&msg, Msg::Leave(reason) if reason.hands_over()));
                    if matches!(msg, Msg::Leave(_)) && self.rng.one_in(8) {
                        // The peer's thread that writes meets the end of the connection before its thread that
                        // reads has got to the leave.
                        self.after(10, Happening::Reset { conn: link.0 as usize, side: 1 });
                    }
                    let accepted = matches!(msg, Msg::Accept { .. });
                    self.send(link.0 as usize, 1, msg);
                    if accepted {
                        let reaches = self.hosts[life.0].cut_off_until <= self.now;
                        self.send(link.0 as usize, 1, Msg::Reaches(reaches));
                    }
                }
                Out::Close(link) => self.close(link.0 as usize, 0),
            }
        }
    }

    fn take_over(&mut self, life: Life, order: TakeOver) {
        let TakeOver { link, checkpoint, generation, handed, tail, stop } = order;
        let Some(s) = self.standby_of(life) else { return };
        let Some(copy) = s.driver.ports_mut().copy.take().filter(|copy| copy.link == link) else {
            return self.truth.fail(format!("{life:?} takes over without a copy"));
        };
        let Some(acked) = copy.acked else {
            return self.truth.fail(format!("{life:?} takes over without a committed checkpoint"));
        };
        let at_commit = copy.memory == Some(acked.node) && acked.number == checkpoint;
        if copy.applying.is_some() || !copy.settled || copy.spoiled || !at_commit {
            self.truth.fail(format!(
                "invariant 2: {life:?} takes over from memory that is not checkpoint {checkpoint}"
            ));
        }
        if acked.flags.end.is_some() || self.truth.ended {
            self.truth.fail(format!("invariant 8: {life:?} takes over a VM that has ended in order"));
        }
        if stop && handed {
            self.truth
                .fail(format!("{life:?} stops a VM that was handed over to it, by an order to a standby"));
        }
        self.truth.goes_on(generation, life);
        self.stats.takeovers += 1;
        self.write_out_all(life);
        self.use_tail(life, generation, tail, &copy, acked.node);
        self.start_primary(life.0, generation, checkpoint, acked.node, handed);
        if stop {
            self.primary(life, crate::PrimaryEvent::Stop { ask_guest: false });
        }
    }

    /// The guest is given what died with the primary, and what may not have left is sent again.
    fn use_tail(&mut self, life: Life, generation: u64, tail: TailUse, copy: &Copy, from: Node) {
        let mut before = from;
        for &(_, node) in copy.input.iter().filter(|it| tail.gives(it.0)) {
            if !self.truth.is_past_of(before, node) || node == before {
                self.truth.fail(format!("{life:?} gives the guest what it has had, or in another order"));
            }
            before = node;
            self.stats.given += 1;
        }
        for &(epoch, node) in copy.output.iter().filter(|it| tail.repeats(it.0)) {
            if epoch <= copy.left {
                self.truth
                    .fail(format!("{life:?} repeats output of epoch {epoch}, which it knows to have left"));
            }
            self.lets_out(node, generation, life);
            self.stats.repeated += 1;
        }
    }

    /// Bytes queued for links go out even if their thread comes too late.
    pub(super) fn write_out_all(&mut self, life: Life) {
        if let Some(s) = self.standby_of(life) {
            s.drains += 1;
            self.write_out(life);
        }
    }

    pub(super) fn tried(&mut self, life: Life, link: Link, number: u64) {
        let Some(s) = self.standby_of(life) else { return };
        let result = if s.bad_host { Err("no such CPUID leaf".to_owned()) } else { Ok(()) };
        if let Some(copy) = s.driver.ports_mut().copy.as_mut().filter(|copy| copy.link == link) {
            copy.tried = result.is_ok();
        }
        self.stats.tried += 1;
        self.standby(life, StandbyEvent::Tried { link, checkpoint: number, result });
    }

    pub(super) fn applied(&mut self, life: Life, link: Link, number: u64) {
        let mut lacks = None;
        let Some(s) = self.standby_of(life) else { return };
        if let Some(copy) = s.driver.ports_mut().copy.as_mut().filter(|copy| copy.link == link) {
            let buffer = copy.staging.iter().find(|buffer| buffer.number == number).copied();
            let kept = copy.kept;
            copy.staging.retain(|buffer| buffer.number != number);
            copy.applying.take_if(|applying| *applying == number);
            copy.memory = buffer.filter(|buffer| buffer.whole).map(|buffer| buffer.node);
            let over = buffer.filter(|buffer| buffer.flags.base_final).and_then(|buffer| buffer.over);
            lacks = over.filter(|_| over != kept).map(|over| (over, kept));
            if let (Some(node), Some(image)) = (copy.memory, &mut self.hosts[life.0].image) {
                (image.node, image.whole) = (node, true);
            }
        }
        if let Some((over, kept)) = lacks {
            self.truth.fail(format!(
                "invariant 4: the base of {life:?} is what was written since {over}, and its memory was {kept:?}"
            ));
        }
        let Some(s) = self.standby_of(life) else { return };
        if s.bad_disk && self.rng.one_in(4) {
            self.mark_failed(life);
            let why = "no space left on device".into();
            return self.standby(life, StandbyEvent::Failed { link, why });
        }
        let Some(s) = self.standby_of(life) else { return };
        if std::mem::take(&mut s.differs)
            && let Some(copy) = s.driver.ports_mut().copy.as_mut().filter(|copy| copy.link == link)
        {
            // From here on it is known.
            copy.spoiled = true;
            self.stats.differed += 1;
            let why = "a page differs".into();
            return self.standby(life, StandbyEvent::Differs { link, why });
        }
        self.standby(life, StandbyEvent::Applied { link, checkpoint: number });
    }

    fn mark_failed(&mut self, life: Life) {
        let copy = self.standby_of(life).and_then(|s| s.driver.ports_mut().copy.as_mut());
        if let Some(copy) = copy {
            copy.failed = true;
        }
    }

    pub(super) fn settled(&mut self, life: Life, link: Link, number: u64) {
        let fails = self.hosts[life.0].disk_fails_until > self.now && self.rng.one_in(2);
        let Some(s) = self.standby_of(life) else { return };
        // At times a disk that fails has room in its cache, so that what remains is on it all the same.
        let bad = s.bad_disk || fails;
        let event = if bad {
            StandbyEvent::Failed { link, why: "input/output error".into() }
        } else {
            if let Some(copy) = s.driver.ports_mut().copy.as_mut().filter(|copy| copy.link == link) {
                copy.settled = copy.applying.is_none();
            }
            StandbyEvent::Settled { link, checkpoint: number }
        };
        self.stats.unsettled += u64::from(bad);
        self.standby(life, event);
    }

    pub(super) fn released(&mut self, life: Life, link: Link) {
        let fails = self.rng.one_in(8) && self.company;
        if self.stands_still_at_leave {
            let (until, (_, owner)) = (self.now + self.rng.range(1_000, 300_000), self.truth.newest());
            self.freeze(owner.0, until);
        }
        let Some(s) = self.standby_of(life) else { return };
        let result = if fails { Err("no room".to_owned()) } else { Ok(()) };
        // Where the copy is gone it is too late: nothing was promised, and what the image says is taken back.
        if let Some(copy) = s.driver.ports_mut().copy.as_mut().filter(|copy| copy.link == link) {
            copy.released = result.is_ok();
            if let Some(image) = &mut self.hosts[life.0].image {
                image.released = result.is_ok();
            }
        }
        self.standby(life, StandbyEvent::Released { link, result });
    }

    /// A part of the copy fails while nobody has asked for it.
    pub(super) fn copy_fails(&mut self, life: Life) {
        let differs = self.rng.one_in(2);
        let Some(s) = self.standby_of(life) else { return };
        if differs {
            s.differs = true;
            return;
        }
        let ports = s.driver.ports_mut();
        match &mut ports.copy {
            Some(copy) if !ports.claimed => {
                let link = copy.link;
                copy.failed = true;
                self.standby(life, StandbyEvent::Failed { link, why: "input/output error".into() });
            }
            _ => ports.faults.next = Some(PortFault::Apply),
        }
    }

    /// The stream is damaged, a part of the copy fails, or it turns out not to be the VM.
    pub(super) fn copy_is_worthless(&mut self, life: Life) {
        let kind = self.rng.range(0, 3);
        let Some(s) = self.standby_of(life) else { return };
        let Some(copy) = &mut s.driver.ports_mut().copy else { return };
        let (link, why) = (copy.link, String::from("of no use"));
        let event = match kind {
            0 => {
                self.conns[link.0 as usize].refused = true;
                StandbyEvent::BadStream { link, why }
            }
            1 => {
                copy.failed = true;
                StandbyEvent::Failed { link, why }
            }
            _ => {
                (copy.failed, copy.spoiled) = (true, true);
                StandbyEvent::Differs { link, why }
            }
        };
        self.standby(life, event);
    }

    /// A message has arrived at the standby. The reader takes every message, whatever the applier does.
    pub(super) fn standby_hears(&mut self, life: Life, conn: usize, msg: Msg) {
        let link = Link(conn as u64);
        // The reader has ended with what it refused. What still comes is dropped until the connection ends.
        if self.conns[conn].refused && !matches!(msg, Msg::Closed) {
            return;
        }
        let early = self.bug == Some(Bug::AckWhilePartial);
        let now = self.believed(life.0);
        let Some(s) = self.standby_of(life) else { return };
        let event = match msg {
            Msg::Hello(hello, since) => {
                // Only if it is out of reach from the beginning on, this is not asked.
                let asks = self.hosts[life.0].arbiter_cut_until != u64::MAX;
                let stale = hello.generation < self.truth.newest().0;
                if asks && (stale || self.cannot_reach_arbiter(life.0)) {
                    return self.refuse_stale(life, link);
                }
                self.hello(life, link, hello, since);
                StandbyEvent::Hello { link, hello }
            }
            Msg::Base => {
                let (may, after) = s.driver.base_pages(now, link);
                if let Some(copy) = s.driver.ports_mut().copy.as_mut().filter(|_| may) {
                    copy.spoiled |= copy.acked.is_some();
                }
                return self.standby_after(life, after);
            }
            Msg::Begin { number, node, flags, over } => {
                s.driver.ports_mut().begins(link, Buffer { number, node, flags, whole: false, over });
                match early {
                    true => {
                        StandbyEvent::Staged { link, checkpoint: number, flags, stamp: Default::default() }
                    }
                    false => StandbyEvent::Heard { link },
                }
            }
            Msg::Part => StandbyEvent::Heard { link },
            Msg::End { stamp } => {
                match s.driver.ports_mut().fed_by(link).and_then(|it| it.staging.last_mut()) {
                    Some(buffer) => {
                        buffer.whole = true;
                        let (checkpoint, flags) = (buffer.number, buffer.flags);
                        match early {
                            true => StandbyEvent::Heartbeat { link, stamp },
                            false => StandbyEvent::Staged { link, checkpoint, flags, stamp },
                        }
                    }
                    // It was applied before it was whole.
                    None if early => StandbyEvent::Heartbeat { link, stamp },
                    None => StandbyEvent::BadStream { link, why: "the end of nothing".into() },
                }
            }
            Msg::Beat { stamp } => StandbyEvent::Heartbeat { link, stamp },
            Msg::Input { epoch, node } => {
                // Not heard: it comes from a device's thread, which may go on where no checkpoint is taken.
                if let Some(copy) = s.driver.ports_mut().fed_by(link) {
                    copy.input.push((epoch, node));
                }
                return;
            }
            Msg::Output { epoch, node } => {
                if let Some(copy) = s.driver.ports_mut().fed_by(link) {
                    copy.output.push((epoch, node));
                }
                return;
            }
            Msg::Released { through } => {
                self.standby(life, StandbyEvent::OutputReleased { link, through });
                // With this the link may have been found to be lost.
                let copy = self.standby_of(life).and_then(|s| s.driver.ports_mut().fed_by(link));
                if let Some(copy) = copy {
                    copy.left = copy.left.max(through);
                }
                return;
            }
            Msg::VmEnd(reason) => StandbyEvent::End { link, reason },
            Msg::Dismiss => StandbyEvent::Dismissed { link },
            Msg::Closed => StandbyEvent::LinkLost { link, why: LossReason::Closed },
            Msg::Garbled => StandbyEvent::LinkLost { link, why: LossReason::Protocol("a bad record".into()) },
            other => StandbyEvent::BadStream { link, why: format!("{other:?}") },
        };
        self.conns[conn].refused |= matches!(event, StandbyEvent::BadStream { .. });
        self.standby(life, event);
    }

    /// The arbiter knows a newer generation, so the standby refuses by itself.
    fn refuse_stale(&mut self, life: Life, link: Link) {
        let Some(s) = self.standby_of(life) else { return };
        let ports = s.driver.ports_mut();
        ports.introduced(link, 0, false);
        ports.refuse(link, RefuseCode::StaleGeneration, "the arbiter knows a newer generation".into());
        self.standby_after(life, After { drain: true, wake: false });
    }

    /// Memory is set aside for a VM that would be accepted.
    fn hello(&mut self, life: Life, link: Link, hello: Introduction, since: Option<Moment>) {
        let (now, bug) = (self.clock(life.0), Planted(self.bug));
        let mut kept = self.hosts[life.0].kept;
        if let Some(s) = self.standby_of(life)
            && s.driver.would_accept(now, &hello).is_err()
        {
            let waited = s.driver.machine().next_deadline();
            let after = s.driver.handle(now, StandbyEvent::TurnedAway { hello });
            let hurries = s.driver.machine().next_deadline() < waited;
            self.stats.hurried += u64::from(hurries);
            self.standby_after(life, after);
        }
        if let Some(s) = self.standby_of(life) {
            let accepted = s.driver.would_accept(now, &hello).is_ok();
            s.driver.ports_mut().introduced(link, hello.slots, accepted);
            if accepted {
                kept = kept.filter(|(kept, _)| kept.serves_with(&hello, since, bug));
                if let Some(copy) = &mut s.driver.ports_mut().copy {
                    copy.kept = kept.map(|(_, node)| node);
                }
                self.hosts[life.0].kept = None;
                // Its blocks are overwritten from now on.
                self.hosts[life.0].image = Some(Image::copy(hello.generation, life));
            }
        }
    }
}
