//! How long a client waited for replies: the pauses that clients see at a takeover.

/// Shorter waits are not recorded one by one.
const NOTABLE_US: u64 = 5_000;
/// How many waits are recorded; beyond that only the longest one is kept up to date.
const REMEMBERED: usize = 1 << 16;

/// The waits of one client. Times are those of [`crate::events::now_us`].
#[derive(Clone, Debug, Default)]
pub(super) struct Gaps {
    notable: Vec<(u64, u64)>,
    longest_us: u64,
}

impl Gaps {
    /// A request sent at `from` was answered at `to`.
    pub(super) fn waited(&mut self, from: u64, to: u64) {
        let wait = to.saturating_sub(from);
        self.longest_us = self.longest_us.max(wait);
        if wait >= NOTABLE_US && self.notable.len() < REMEMBERED {
            self.notable.push((from, to));
        }
    }

    /// The longest wait of all.
    pub(super) fn longest_us(&self) -> u64 {
        self.longest_us
    }

    /// The longest recorded wait that overlaps `from..to`; 0 if there is none.
    pub(super) fn longest_within(&self, from: u64, to: u64) -> u64 {
        let touches = |&&(start, end): &&(u64, u64)| start < to && end > from;
        self.notable.iter().filter(touches).map(|(start, end)| end - start).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_wait_that_touches_a_window() {
        let mut gaps = Gaps::default();
        gaps.waited(0, 1_000);
        gaps.waited(90_000, 150_000);
        gaps.waited(200_000, 290_000);
        gaps.waited(500_000, 1_000_000);
        assert_eq!(gaps.longest_within(100_000, 190_000), 60_000);
        assert_eq!(gaps.longest_within(100_000, 201_000), 90_000);
        assert_eq!(gaps.longest_within(300_000, 400_000), 0);
        assert_eq!(gaps.longest_within(0, 500), 0, "shorter than notable");
        assert_eq!(gaps.longest_us(), 500_000);
    }

    #[test]
    fn memory_is_bounded_and_the_longest_is_still_right() {
        let mut gaps = Gaps::default();
        for n in 0..2 * REMEMBERED as u64 {
            gaps.waited(n, n + NOTABLE_US + n);
        }
        assert_eq!(gaps.notable.len(), REMEMBERED);
        assert_eq!(gaps.longest_us(), NOTABLE_US + 2 * REMEMBERED as u64 - 1);
    }
}
