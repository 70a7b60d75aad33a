//! An unprotected VM says so again and again, so that nobody finds out only when its host dies.

use std::time::{Duration, Instant};

/// After how long it says so first.
const FIRST: Duration = Duration::from_secs(60);
/// And then each time after so long.
const AGAIN: Duration = Duration::from_secs(600);

/// When it is time; see the module.
#[derive(Debug, Default)]
pub(super) struct Reminder {
    since: Option<Instant>,
    /// How often it was said.
    said: u32,
}

impl Reminder {
    /// Call it now and then. Returns for how long the VM has been unprotected if that is to be said now.
    pub(super) fn due(&mut self, protected: bool, now: Instant) -> Option<Duration> {
        if protected {
            *self = Self::default();
            return None;
        }
        let lasts = now.saturating_duration_since(*self.since.get_or_insert(now));
        let due = lasts >= FIRST + AGAIN * self.said;
        self.said += u32::from(due);
        due.then_some(lasts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_said_after_a_minute_and_then_every_ten() {
        let start = Instant::now();
        let mut reminder = Reminder::default();
        let mut said = Vec::new();
        for secs in 0..1900 {
            if let Some(lasts) = reminder.due(false, start + Duration::from_secs(secs)) {
                assert_eq!(lasts.as_secs(), secs);
                said.push(secs);
            }
        }
        assert_eq!(said, [60, 660, 1260, 1860]);
        // Protected for a moment: it begins anew.
        assert_eq!(reminder.due(true, start + Duration::from_secs(1900)), None);
        assert_eq!(reminder.due(false, start + Duration::from_secs(1901)), None);
        assert_eq!(reminder.due(false, start + Duration::from_secs(1960)), None);
        assert!(reminder.due(false, start + Duration::from_secs(1961)).is_some());
    }
}
