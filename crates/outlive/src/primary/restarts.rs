//! Restarts of the guest, and how often: a guest that does nothing else is slowed down.
//!
//! A restart copies the kernel within the VM's memory, which dirties a whole epoch's worth of pages, so a
//! guest that cannot boot would keep both hosts busy forever.

use std::time::{Duration, Instant};

use outlive_epoch::EndReason;
use outlive_machine::{ResetWay, RestartCount};
use outlive_pair::PrimaryEvent;

use super::coordinator::Coordinator;
use super::own_kernel::{self, Outcome};
use crate::events::Event;
use crate::vm::BootDiskError;

/// A guest that has run for this long between two restarts is well.
const LONG: Duration = Duration::from_secs(60);
/// How many restarts, each within [`LONG`] of the one before, are carried out at once.
const AT_ONCE: u32 = 2;
/// How long the first restart after them waits; the wait doubles with each.
const FIRST_WAIT: Duration = Duration::from_secs(1);
/// The longest wait.
const LONGEST_WAIT: Duration = Duration::from_secs(32);

/// How long the restart itself may take: what the guest boots from is read and written.
const RESTART: Duration = Duration::from_secs(10);

/// The restarts of one guest.
#[derive(Debug, Default)]
pub(super) struct Restarts {
    /// Those that were carried out.
    done: RestartCount,
    /// How many came soon after another, including the one that is asked for.
    in_a_row: u32,
    due: Option<(Instant, ResetWay)>,
}

/// What the log says about a restart that the guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RestartRequest {
    /// It ran for this long since the last one, which was too short.
    pub(super) soon: Option<Duration>,
    /// The restart waits for this long.
    pub(super) wait: Duration,
}

impl Restarts {
    /// The restarts of a guest that came from another host: there it was as slow.
    pub(super) fn of(done: RestartCount) -> Self {
        Self { done, in_a_row: done.in_a_row, due: None }
    }

    /// Those that were carried out. One that waits is asked for once more where the guest goes on.
    pub(super) fn done(&self) -> RestartCount {
        self.done
    }

    /// The guest asks for a restart by `way`.
    pub(super) fn request(&mut self, way: ResetWay, now: Instant) -> RestartRequest {
        let soon = self.done.last.map(|last| now.saturating_duration_since(last)).filter(|ran| *ran < LONG);
        self.in_a_row = if soon.is_some() { self.in_a_row.saturating_add(1) } else { 0 };
        let wait = match self.in_a_row.checked_sub(AT_ONCE) {
            None => Duration::ZERO,
            Some(doublings) => FIRST_WAIT.saturating_mul(1 << doublings.min(16)).min(LONGEST_WAIT),
        };
        self.due = Some((now + wait, way));
        RestartRequest { soon, wait }
    }

    /// When the next one is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.due.map(|(at, _)| at)
    }

    /// The way of a restart that is due now; it then counts as done.
    pub(super) fn take(&mut self, now: Instant) -> Option<ResetWay> {
        let (_, way) = self.due.take_if(|(at, _)| *at <= now)?;
        self.done = RestartCount { in_a_row: self.in_a_row, last: Some(now) };
        Some(way)
    }
}

impl Coordinator {
    /// The guest asks for a restart; a guest that cannot restart ends.
    pub(super) fn restart_asked(&mut self, way: ResetWay) {
        if !self.with.machine.can_reset() {
            return self.end(EndReason::Reset);
        }
        let asked = self.restarts.request(way, Instant::now());
        let wait = asked.wait.as_secs();
        match asked.soon.map(|ran| ran.as_secs()) {
            None => tracing::info!("the guest restarts, by {way}"),
            Some(ran) if wait == 0 => {
                tracing::warn!("the guest restarts, by {way}, {ran} s after its last restart");
            }
            Some(ran) => tracing::warn!(
                "the guest restarts, by {way}, {ran} s after its last restart, again and again: \
                 this one waits for {wait} s"
            ),
        }
    }

    /// Restarts the guest, protected as before, if it is time.
    pub(super) fn restart_if_due(&mut self) {
        if self.with.driver.stands_still() {
            return;
        }
        if let Some((way, outcome)) = self.with.own_kernel.take() {
            self.restart(way, Some(outcome));
        }
        if let Some(way) = self.with.own_kernel.too_late(Instant::now()) {
            let why = "its disk did not answer within --disk-timeout".to_owned();
            self.restart(way, Some(Err(BootDiskError::NoThread(why))));
        }
        let Some(way) = self.restarts.take(Instant::now()) else { return };
        match self.with.own_kernel.begin(&self.with.machine, way, self.with.disk_timeout) {
            None => {}
            Some(why) => self.restart(way, why.map(Err)),
        }
    }

    /// Restarts the guest with what its disk boots, if it boots from one.
    fn restart(&mut self, way: ResetWay, outcome: Option<Outcome>) {
        self.with.machine.set_restarts(self.restarts.done());
        if !self.with.driver.guest_may_run() {
            return;
        }
        self.with.driver.handle(PrimaryEvent::LongWork { within: RESTART });
        let restarted = match outcome {
            None => self.with.machine.reset(),
            Some(outcome) => own_kernel::restart(&mut self.with.machine, outcome, &self.with.events),
        };
        match restarted {
            Ok(()) => {
                self.with.events.emit(Event::GuestRestarted { how: way.to_string() });
            }
            Err(error) => {
                tracing::error!("the guest cannot restart: {error}");
                self.end(EndReason::Crash);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_restarts_now_and_then_does_so_at_once() {
        let (mut restarts, mut now) = (Restarts::default(), Instant::now());
        for _ in 0..10 {
            assert_eq!(
                restarts.request(ResetWay::Acpi, now),
                RestartRequest { soon: None, wait: Duration::ZERO }
            );
            assert_eq!(
                (restarts.take(now), restarts.take(now), restarts.due()),
                (Some(ResetWay::Acpi), None, None)
            );
            now += LONG;
        }
    }

    #[test]
    fn two_within_a_minute_are_told_and_a_loop_is_slowed_down() {
        let (mut restarts, mut now) = (Restarts::default(), Instant::now());
        let ran = Duration::from_secs(20);
        let mut waits = Vec::new();
        for number in 0..9 {
            let asked = restarts.request(ResetWay::Acpi, now);
            assert_eq!(asked.soon, (number > 0).then_some(ran));
            assert_eq!(restarts.take(now).is_some(), asked.wait.is_zero());
            waits.push(asked.wait.as_secs());
            now += asked.wait;
            if !asked.wait.is_zero() {
                assert_eq!(restarts.due(), Some(now));
                assert!(restarts.take(now).is_some());
            }
            now += ran;
        }
        assert_eq!(waits, [0, 0, 1, 2, 4, 8, 16, 32, 32]);
        now += LONG;
        assert_eq!(
            restarts.request(ResetWay::Acpi, now),
            RestartRequest { soon: None, wait: Duration::ZERO }
        );
    }

    #[test]
    fn a_loop_stays_as_slow_on_another_host() {
        let (mut restarts, mut now) = (Restarts::default(), Instant::now());
        for wait in [0, 0, 1, 2, 4] {
            assert_eq!(restarts.request(ResetWay::Acpi, now).wait.as_secs(), wait);
            now += Duration::from_secs(wait);
            assert!(restarts.take(now).is_some());
        }
        // The next one waits when its host dies, and is asked for once more on the other one.
        assert_eq!(restarts.request(ResetWay::Acpi, now).wait.as_secs(), 8);
        let mut there = Restarts::of(restarts.done());
        assert_eq!(there.due(), None);
        let asked = there.request(ResetWay::Acpi, now + Duration::from_secs(3));
        assert_eq!((asked.soon, asked.wait.as_secs()), (Some(Duration::from_secs(3)), 8));
        now += Duration::from_secs(11);
        assert!(there.take(now).is_some());
        assert_eq!(there.request(ResetWay::Acpi, now).wait.as_secs(), 16);
    }
}
