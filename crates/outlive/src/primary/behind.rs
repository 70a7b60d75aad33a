//! Says when the standby is far behind in time: checkpoints wait for it, and so do the guest's clients. The
//! protection goes on meanwhile.

use std::time::{Duration, Instant};

use crate::events::Event;
use crate::status::Progress;

/// Without a commit for so long, although one is due, the standby is slow. Clients notice a tenth of it.
const SLOW: Duration = Duration::from_secs(1);
/// So soon after a commit it is not slow any more.
const CAUGHT_UP: Duration = Duration::from_millis(200);
/// A standby that is slow again and again is told of so often.
const PACE: Duration = Duration::from_secs(10);

/// Looks at the progress from time to time.
#[derive(Debug, Default)]
pub(super) struct Behind {
    /// Since when it is slow, as the events say.
    since: Option<Instant>,
    /// When that was said last.
    told: Option<Instant>,
}

impl Behind {
    /// What is to be said now, if anything.
    pub(super) fn look(&mut self, protected: bool, progress: &Progress, now: Instant) -> Option<Event> {
        let waits = progress.since_commit.filter(|_| protected && progress.in_flight > 0).unwrap_or_default();
        match self.since {
            None if waits >= SLOW && self.told.is_none_or(|told| now - told >= PACE) => {
                self.since = now.checked_sub(waits);
                self.told = Some(now);
                Some(Event::StandbySlow { behind_ms: millis(waits), in_flight: progress.in_flight })
            }
            Some(_) if !protected => {
                // Other events say what has come of it.
                self.since = None;
                None
            }
            Some(since) if waits < CAUGHT_UP => {
                self.since = None;
                Some(Event::StandbyCaughtUp { slow_ms: millis(now.saturating_duration_since(since)) })
            }
            _ => None,
        }
    }
}

fn millis(time: Duration) -> u64 {
    time.as_millis() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_standby_that_is_slow_for_long_is_told_of_once() {
        let (mut behind, began) = (Behind::default(), Instant::now() + Duration::from_secs(60));
        let mut look = |at_ms: u64, protected, in_flight, since_ms| {
            let progress = Progress {
                since_commit: Some(Duration::from_millis(since_ms)),
                in_flight,
                ..Progress::default()
            };
            behind.look(protected, &progress, began + Duration::from_millis(at_ms))
        };
        assert_eq!(look(0, true, 3, 999), None);
        assert_eq!(look(0, true, 0, 5000), None, "a guest that does nothing has nothing to commit");
        assert_eq!(look(0, false, 3, 5000), None, "there is no protection");
        assert_eq!(look(200, true, 3, 1100), Some(Event::StandbySlow { behind_ms: 1100, in_flight: 3 }));
        assert_eq!(look(400, true, 3, 1300), None);
        assert_eq!(look(600, true, 3, 500), None);
        assert_eq!(look(800, true, 3, 10), Some(Event::StandbyCaughtUp { slow_ms: 1700 }));
        assert_eq!(look(5000, true, 3, 2000), None, "not again so soon");
        assert!(matches!(look(10_200, true, 3, 2000), Some(Event::StandbySlow { .. })));
        assert_eq!(look(10_400, false, 0, 2200), None);
        assert_eq!(look(10_600, true, 3, 10), None, "that was another standby");
    }
}
