//! Log lines about the guest's mistakes, limited so that a guest cannot fill the host's log.

use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const WINDOW: Duration = Duration::from_secs(1);
/// Lines in a window: a broken driver's first mistake is often not the one that matters.
const LINES: u32 = 4;

/// What one device may still log about its driver.
#[derive(Debug, Default)]
pub(crate) struct Complaints(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    begun: Option<Instant>,
    said: u32,
    unsaid: u64,
}

impl Complaints {
    /// Whether a line may be logged now. If so, returns how many were suppressed since the last one.
    pub(crate) fn next(&self) -> Option<Option<NonZeroU64>> {
        self.next_at(Instant::now())
    }

    fn next_at(&self, now: Instant) -> Option<Option<NonZeroU64>> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.begun.is_none_or(|begun| now.duration_since(begun) >= WINDOW) {
            (state.begun, state.said) = (Some(now), 0);
        }
        if state.said == LINES {
            state.unsaid += 1;
            return None;
        }
        state.said += 1;
        Some(NonZeroU64::new(std::mem::take(&mut state.unsaid)))
    }
}

/// Logs at a level, as `tracing`'s macros do, unless too many lines were logged already.
macro_rules! complain {
    ($level:ident, $complaints:expr, $($line:tt)+) => {
        if let Some(unsaid) = $complaints.next() {
            tracing::$level!(unsaid, $($line)+);
        }
    };
}
pub(crate) use complain;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_lines_a_second_and_the_next_says_how_many_were_left_out() {
        let (complaints, start) = (Complaints::default(), Instant::now());
        let said = |ms: u64| complaints.next_at(start + Duration::from_millis(ms));
        assert_eq!([said(0), said(0), said(900), said(999)], [Some(None); 4]);
        assert!((0..101).all(|_| said(999).is_none()));
        assert_eq!(said(1000), Some(NonZeroU64::new(101)));
        assert_eq!(said(1000), Some(None));
    }
}
