//! What the log has said a moment ago: who tries again and again is not told of each time.

use std::time::{Duration, Instant};

/// The same is said again after this time, while it lasts.
const AGAIN: Duration = Duration::from_secs(60);
/// Different things within that time. Whoever has more to say, as by a number in each, is not heard for a while.
const MOST: usize = 16;

/// The sayings of the last minute; see the module.
#[derive(Debug, Default)]
pub(crate) struct Told(Vec<(String, Instant)>);

impl Told {
    /// Whether this was not said within the last minute. It counts as said now then.
    pub(crate) fn is_news(&mut self, text: &str, now: Instant) -> bool {
        self.0.retain(|(_, at)| now.saturating_duration_since(*at) < AGAIN);
        let is_news = self.0.len() < MOST && self.0.iter().all(|(said, _)| said != text);
        if is_news {
            self.0.push((text.to_owned(), now));
            if self.0.len() == MOST {
                tracing::warn!(
                    "{MOST} different lines of this kind within a minute: others are left out until it is over"
                );
            }
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_thing_is_said_once_a_minute() {
        let (mut told, start) = (Told::default(), Instant::now());
        let mut said = Vec::new();
        for second in 0..130 {
            for text in ["a", "b"] {
                if told.is_news(text, start + Duration::from_secs(second)) {
                    said.push((text, second));
                }
            }
        }
        assert_eq!(said, [("a", 0), ("b", 0), ("a", 60), ("b", 60), ("a", 120), ("b", 120)]);
    }

    #[test]
    fn whoever_says_another_thing_each_time_is_not_heard_for_ever() {
        let (mut told, start) = (Told::default(), Instant::now());
        let heard = |told: &mut Told, at: u64| {
            (0..1000).filter(|n| told.is_news(&format!("{at} {n}"), start + Duration::from_secs(at))).count()
        };
        assert_eq!((heard(&mut told, 0), heard(&mut told, 59), heard(&mut told, 60)), (MOST, 0, MOST));
    }
}
