//! The coordinator's long work: a checkpoint, its parts, and the rounds of a base.

use std::time::Duration;

use super::super::ports::SimPart;
use super::super::truth::{Life, Node};
use super::super::world::{Happening, Msg, World};
use crate::policy::{Next, Pause};
use crate::{Link, PrimaryEvent, Ticket, Wanted};

impl World {
    /// The coordinator is busy for longer than any patience, and has announced it.
    pub(super) fn work_long(&mut self, life: Life) {
        let time = self.rng.range(1_000, 500_000);
        self.stats.long_works += 1;
        self.slow_for(time);
        self.primary(life, PrimaryEvent::LongWork { within: Duration::from_micros(time * 2) });
        self.hosts[life.0].busy_until = self.now + time;
        self.look_within(life, 10);
    }

    pub(super) fn capture_if_due(&mut self, life: Life) {
        let now = self.clock(life.0);
        let Some(p) = self.primary_of(life) else { return };
        let machine = p.driver.machine();
        let Some(link) = machine.link() else { return };
        let (due, base) = match machine.wanted_capture() {
            _ if p.paused => (false, false),
            Wanted::Nothing => (false, false),
            Wanted::Base { link } => (p.base_ready == Some(link), true),
            Wanted::Epoch => (matches!(p.policy.next(&p.facts(now)), Next::Now(_)), false),
            Wanted::Last(_) | Wanted::HandOver => (true, false),
        };
        let stays = matches!(machine.wanted_capture(), Wanted::HandOver | Wanted::Last(_));
        if due {
            p.stays = stays;
            self.capture(life, link, base);
        }
    }

    /// One checkpoint. Some pauses are long, and the coordinator has said so; what else happens meanwhile is
    /// decided without it.
    fn capture(&mut self, life: Life, link: Link, base: bool) {
        let time = match self.rng.range(0, 600) {
            _ if self.healed => 0,
            0 => self.rng.range(100_000, 400_000),
            1..30 => self.rng.range(500, 5_000),
            _ => 0,
        };
        if time == 0 {
            return self.counted(life, link, base);
        }
        if time >= 100_000 {
            self.stats.long_pauses += 1;
            self.slow_for(time);
            self.primary(life, PrimaryEvent::LongWork { within: Duration::from_micros(time * 2) });
        }
        let Some(p) = self.primary_of(life) else { return };
        p.paused = true;
        self.hosts[life.0].busy_until = self.now + time;
        self.after(time, Happening::Counted { life, link, base });
    }

    /// All of it is in staging. Some checkpoints are larger than that: they go out in parts while the VM stands
    /// still.
    pub(in crate::sim) fn counted(&mut self, life: Life, link: Link, base: bool) {
        let now = self.believed(life.0);
        let Some(p) = self.primary_of(life) else { return };
        let node = p.node;
        p.paused = false;
        let (ticket, after) = p.driver.captured(now, link, base, p.stays);
        p.held_since = None;
        self.primary_after(life, after);
        let parts = if self.rng.one_in(25) { self.rng.range(1, 4) as u32 } else { 0 };
        if let Some(ticket) = ticket {
            self.ship_part(life, link, (ticket, node), true, parts);
        }
        if let Some(p) = self.primary_of(life) {
            p.policy.ended(&Pause { began: now, ended: now + Duration::from_micros(200), pages: 1 });
        }
        self.look_within(life, 100);
    }

    /// Sends the next part of a checkpoint, with so many left after it.
    pub(in crate::sim) fn ship_part(
        &mut self,
        life: Life,
        captured_for: Link,
        (ticket, node): (Ticket, Node),
        first: bool,
        left: u32,
    ) {
        let now = self.clock(life.0);
        let sections = self.rng.range(0, 3) as u32;
        let part = SimPart { captured_for, node, first, last: left == 0, sections };
        let Some(p) = self.primary_of(life) else { return };
        p.paused = left > 0;
        match p.driver.ship(now, ticket, part) {
            Ok(after) => self.primary_after(life, after),
            // The link is lost: the VM does not wait for the rest.
            Err(_) => {
                p.paused = false;
                return;
            }
        }
        if left > 0 {
            let delay = self.rng.range(100, 30_000);
            self.after(delay, Happening::ShipPart { life, captured_for, ticket, node, left: left - 1 });
        } else {
            self.look_within(life, 100);
        }
    }

    pub(in crate::sim) fn base_round(&mut self, life: Life, link: Link, left: u32) {
        let Some(p) = self.primary_of(life) else { return };
        let Some(conn) = p.driver.ports().conn(link) else { return };
        if left == 0 {
            p.base_ready = Some(link);
            return self.look_within(life, 10);
        }
        self.send(conn, 0, Msg::Base);
        self.after(1000, Happening::BaseRound { life, link, left: left - 1 });
    }
}
