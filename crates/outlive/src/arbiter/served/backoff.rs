//! How soon a host that is refused asks again. What is wrong with keys stays wrong for long, and a claim is repeated five
//! times a second: so the arbiter is asked more and more seldom, and the claimant hears the last answer meanwhile.

use std::time::{Duration, Instant};

/// The first rest.
const SHORTEST: Duration = Duration::from_millis(200);
/// The longest.
const LONGEST: Duration = Duration::from_secs(5);

/// When the next question is worth while.
#[derive(Clone, Debug, Default)]
pub(super) struct BackOff {
    rest: Option<Rest>,
}

#[derive(Clone, Debug)]
struct Rest {
    until: Instant,
    length: Duration,
    why: String,
}

impl BackOff {
    /// The last answer, while it is too soon for another question.
    pub(super) fn rests(&self) -> Option<String> {
        self.rest.as_ref().filter(|rest| Instant::now() < rest.until).map(|rest| rest.why.clone())
    }

    /// Notes a question that came to nothing, and whether the next one would, too.
    pub(super) fn note(&mut self, why: &str, lasts: bool) {
        let before = self.rest.take().map(|rest| rest.length);
        if lasts {
            let length = before.map_or(SHORTEST, |before| (before * 2).min(LONGEST));
            self.rest = Some(Rest { until: Instant::now() + length, length, why: why.to_owned() });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_lasts_is_asked_more_and_more_seldom() {
        let mut back_off = BackOff::default();
        assert_eq!(back_off.rests(), None);
        back_off.note("out of reach", false);
        assert_eq!(back_off.rests(), None);
        for _ in 0..10 {
            back_off.note("no right", true);
            assert_eq!(back_off.rests().as_deref(), Some("no right"));
        }
        let rest = back_off.rest.as_ref().unwrap();
        assert_eq!(rest.length, LONGEST);
        back_off.note("out of reach", false);
        assert_eq!(back_off.rests(), None);
        back_off.note("no right", true);
        assert_eq!(back_off.rest.unwrap().length, SHORTEST);
    }
}
