//! The standby in the model: carries out what the production state machine decides.

use crate::planted::Bug;
use crate::{Link, LossReason, PrimaryEvent, StandbyAction as Action, StandbyEvent as Event, StandbyExit};

use super::world::{Copy, Image, Msg, NOW, Work, World};

impl World {
    /// Hands an event in and carries out what follows. A thread that is due to look does so at once, unless
    /// its host is slow.
    pub(super) fn tell_standby(&mut self, host: usize, event: Event, bug: Option<Bug>) {
        self.standby_event(host, event, bug);
        let prompt = self.hosts[host].slow == 0 && !self.hosts[host].paused;
        let due = |world: &mut Self| {
            world.standby(host).is_some_and(|s| s.machine.next_deadline().is_some_and(|due| due <= NOW))
        };
        if prompt && due(self) {
            self.standby_event(host, Event::Tick, bug);
        }
    }

    pub(super) fn standby_event(&mut self, host: usize, event: Event, bug: Option<Bug>) {
        let mut actions = Vec::new();
        let Some(standby) = self.standby(host) else { return };
        standby.machine.handle(NOW, event, &mut actions);
        for action in actions {
            self.standby_does(host, action, bug);
        }
    }

    fn standby_does(&mut self, host: usize, action: Action, bug: Option<Bug>) -> Option<()> {
        let life = self.life(host);
        match action {
            Action::Accept { link, generation, .. } => {
                self.standby(host)?.copy = Some(Copy {
                    link,
                    generation,
                    staged: Default::default(),
                    acked: None,
                    memory: None,
                    settled: false,
                });
                let (replica, whole, released) = (true, false, false);
                let process = self.hosts[host].life;
                self.hosts[host].image =
                    Some(Image { generation, replica, process, history: Vec::new(), whole, released });
                self.send_as_standby(link, Msg::Accept);
            }
            Action::Refuse { link, .. } => {
                self.send_as_standby(link, Msg::Refuse);
                self.hang_up_as_standby(link);
            }
            Action::Ack { link, generation, checkpoint, stamp } => {
                self.send_as_standby(link, Msg::Ack { generation, checkpoint, stamp });
                let copy = self.standby(host)?.copy.as_mut()?;
                let staged = copy.staged.pop_front().filter(|staged| staged.number == checkpoint);
                if staged.is_none() || copy.memory.is_none() && copy.acked.is_some() {
                    self.fail(format!("2 whole: {life:?} acknowledges {checkpoint}, which is not due"));
                } else {
                    (copy.acked, copy.memory) = (staged, None);
                }
            }
            Action::Try { link, checkpoint } => {
                self.standby(host)?.work.push_back(Work::Try(link, checkpoint))
            }
            Action::Apply { link, checkpoint } => {
                self.standby(host)?.work.push_back(Work::Apply(link, checkpoint));
            }
            Action::Settle { link, checkpoint } => {
                self.standby(host)?.work.push_back(Work::Settle(link, checkpoint));
            }
            Action::Release { link } => self.standby(host)?.work.push_back(Work::Release(link)),
            Action::Discard { link } => {
                let standby = self.standby(host)?;
                standby.copy = None;
                standby.work.clear();
                standby.work.push_back(Work::Discard(link));
            }
            Action::SendHeartbeat { link, stamp } => self.send_as_standby(link, Msg::Beat(stamp)),
            Action::SendLeave { link, reason } => {
                if reason.hands_over()
                    && self.standby(host)?.copy.as_ref().is_some_and(|copy| copy.acked.is_some())
                    && self.hosts[host].image.as_ref().is_some_and(|image| !image.released)
                {
                    self.fail(format!("{life:?} hands its right over before it has written that down"));
                }
                self.send_as_standby(link, Msg::Leave(reason));
                if let Some(image) = &mut self.hosts[host].image {
                    image.released &= reason.hands_over();
                }
            }
            Action::Hangup { link } => {
                self.hang_up_as_standby(link);
                if let Some(copy) = self.standby(host)?.copy.as_mut().filter(|copy| copy.link == link) {
                    copy.staged.clear();
                }
            }
            Action::Claim { generation } => {
                let acked = self.standby(host)?.copy.as_ref()?.acked.clone()?;
                if let Some(image) = &mut self.hosts[host].image {
                    image.released = false;
                }
                self.ask(life, generation, acked.history);
            }
            Action::TakeOver { checkpoint, generation, stop, .. } => {
                self.take_over(host, checkpoint, generation, stop, bug);
            }
            Action::Exit { reason } => self.standby_exits(host, &reason),
            Action::ApplyBase { .. } | Action::Note(_) => {}
        }
        Some(())
    }

    fn send_as_standby(&mut self, link: Link, msg: Msg) {
        let conn = self.conn(link.0);
        conn.into_iter().for_each(|conn| self.send(conn, 1, msg.clone()));
    }

    fn hang_up_as_standby(&mut self, link: Link) {
        let conn = self.conn(link.0);
        conn.into_iter().for_each(|conn| self.close(conn, 0));
    }

    fn take_over(&mut self, host: usize, checkpoint: u64, generation: u64, stop: bool, bug: Option<Bug>) {
        let life = self.life(host);
        let copy = self.standby(host).and_then(|standby| standby.copy.take());
        let Some((copy, acked)) = copy.and_then(|copy| copy.acked.clone().map(|acked| (copy, acked))) else {
            return self.fail(format!("2 whole: {life:?} takes over without a copy"));
        };
        if copy.memory != Some(checkpoint) || acked.number != checkpoint || !copy.settled {
            self.fail(format!(
                "2 whole: {life:?} takes over from memory that is not checkpoint {checkpoint}"
            ));
        }
        if acked.flags.end.is_some() {
            self.fail(format!("8 orderly: {life:?} takes over a VM that has ended"));
        }
        self.goes_on(generation, life);
        self.start_primary(host, (generation, checkpoint), acked.history, bug);
        let event = if stop { PrimaryEvent::Stop { ask_guest: false } } else { PrimaryEvent::Tick };
        self.tell_primary(host, event, bug);
    }

    fn standby_exits(&mut self, host: usize, reason: &StandbyExit) {
        if let StandbyExit::Followed(_) = reason {
            // The VM's last checkpoint is here, and the primary may be gone.
            self.ended = true;
        }
        self.stop_process(host, true);
    }

    /// A message has arrived.
    pub(super) fn standby_hears(&mut self, host: usize, conn: usize, msg: Msg, bug: Option<Bug>) {
        let link = Link(self.conns[conn].id);
        let newest = self.newest().0;
        let event = match msg {
            // It looks for the generation at the arbiter, and reads again only when a primary connects again.
            Msg::Hello(hello) if hello.generation != newest => {
                self.send_as_standby(link, Msg::Refuse);
                return self.hang_up_as_standby(link);
            }
            Msg::Hello(hello) => {
                if self.standby(host).is_some_and(|s| s.machine.would_accept(NOW, &hello).is_err()) {
                    self.standby_event(host, Event::TurnedAway { hello }, bug);
                }
                Event::Hello { link, hello }
            }
            Msg::Checkpoint(checkpoint, stamp) => {
                let (number, flags) = (checkpoint.number, checkpoint.flags);
                let copy = self.standby(host).and_then(|standby| standby.copy.as_mut());
                if let Some(copy) = copy.filter(|copy| copy.link == link) {
                    copy.staged.push_back(checkpoint);
                }
                Event::Staged { link, checkpoint: number, flags, stamp }
            }
            Msg::Beat(stamp) => Event::Heartbeat { link, stamp },
            Msg::End(reason) => Event::End { link, reason },
            Msg::Dismiss => Event::Dismissed { link },
            Msg::Closed => Event::LinkLost { link, why: LossReason::Closed },
            other => Event::BadStream { link, why: format!("{other:?}") },
        };
        self.tell_standby(host, event, bug);
    }

    /// The applier has done the oldest of its work, or cannot.
    pub(super) fn work_done(&mut self, host: usize, fails: bool, bug: Option<Bug>) {
        let Some(standby) = self.standby(host) else { return };
        let Some(work) = standby.work.pop_front() else { return };
        let failed = |link| Event::Failed { link, why: "input/output error".into() };
        let event = match work {
            Work::Try(link, checkpoint) => {
                let result = if fails { Err("no such CPUID leaf".into()) } else { Ok(()) };
                Event::Tried { link, checkpoint, result }
            }
            Work::Apply(link, _) | Work::Settle(link, _) if fails => failed(link),
            Work::Apply(link, checkpoint) => {
                if let Some(copy) = &mut standby.copy {
                    copy.memory = Some(checkpoint);
                    let acked = copy.acked.as_ref().map(|acked| acked.history.clone());
                    if let (Some(image), Some(history)) = (&mut self.hosts[host].image, acked) {
                        (image.history, image.whole) = (history, true);
                    }
                }
                Event::Applied { link, checkpoint }
            }
            Work::Settle(link, checkpoint) => {
                if let Some(copy) = &mut standby.copy {
                    copy.settled = true;
                }
                Event::Settled { link, checkpoint }
            }
            Work::Release(link) => {
                if let Some(image) = &mut self.hosts[host].image {
                    image.released = !fails;
                }
                let result = if fails { Err("no room".into()) } else { Ok(()) };
                Event::Released { link, result }
            }
            Work::Discard(link) => Event::Discarded { link },
        };
        self.tell_standby(host, event, bug);
    }
}
