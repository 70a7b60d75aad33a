//! Whether this host may still say that it lives, for the threads that say so and for the one that watches.
//!
//! Heartbeats are earned: the decisions say until when they may be written, and put that off as long as the
//! thread that takes checkpoints gives signs of itself ([`outlive_pair::Primary::may_beat_until`]). So a host
//! on which that thread stands still falls silent, however well its sockets do.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::clock::Clock;

/// No end.
const FOREVER: u64 = u64::MAX;

/// See the module.
pub(crate) struct Pulse {
    clock: Clock,
    /// On the clock, in microseconds.
    until: AtomicU64,
}

impl Pulse {
    /// One that lasts until something else is said.
    pub(crate) fn new(clock: Clock) -> Self {
        Self { clock, until: AtomicU64::new(FOREVER) }
    }

    /// Heartbeats may be written until then; `None`: forever.
    pub(crate) fn set(&self, until: Option<Duration>) {
        let until = until.map_or(FOREVER, |until| u64::try_from(until.as_micros()).unwrap_or(FOREVER));
        self.until.store(until, Ordering::Relaxed);
    }

    /// Whether a heartbeat may be written now.
    pub(crate) fn lasts(&self) -> bool {
        let until = self.until.load(Ordering::Relaxed);
        until == FOREVER || self.clock.now().as_micros() < u128::from(until)
    }
}

/// How often in a row the watcher must find a pulse gone. It counts its own looks and not the time: a process
/// that was stopped as a whole has been watched by nobody meanwhile.
pub(crate) const LOOKS: u32 = 4;

/// Watches a pulse, on a thread of its own: when it has been gone for [`LOOKS`] looks in a row, one in each
/// `period`, `gone` is called, and says whether this process has nothing more to watch.
///
/// # Errors
/// The operating system's.
pub(crate) fn watch(
    period: Duration,
    lasts: impl Fn() -> Option<bool> + Send + 'static,
    gone: impl Fn() + Send + 'static,
) -> std::io::Result<()> {
    outlive_machine::spawn("watchdog", move || {
        let mut missed = 0;
        while let Some(lasts) = lasts() {
            missed = if lasts { 0 } else { missed + 1 };
            if missed >= LOOKS {
                gone();
                missed = 0;
            }
            std::thread::sleep(period);
        }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn a_pulse_lasts_until_it_ends() {
        let pulse = Pulse::new(Clock::start());
        assert!(pulse.lasts());
        pulse.set(Some(Duration::ZERO));
        assert!(!pulse.lasts());
        pulse.set(Some(Duration::from_secs(3600)));
        assert!(pulse.lasts());
        pulse.set(None);
        assert!(pulse.lasts());
    }

    #[test]
    fn only_a_pulse_that_stays_away_is_gone() {
        let (looks, script) = channel();
        // Almost gone, back again, gone.
        let almost = std::iter::repeat_n(false, LOOKS as usize - 1);
        for lasts in almost.clone().chain([true]).chain(almost).chain([false]) {
            looks.send(lasts).unwrap();
        }
        drop(looks);
        let (told, gone) = channel();
        let lasts = move || script.recv().ok();
        watch(Duration::from_micros(1), lasts, move || told.send(()).unwrap()).unwrap();
        assert_eq!(gone.iter().count(), 1);
    }
}
