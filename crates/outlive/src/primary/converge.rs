//! Whether the base synchronisation of memory comes to its end, and what is done if it does not.
//!
//! Each round sends the pages that the guest has written during the last one. The guest writes less in a shorter
//! round, so the rounds shrink, unless the guest writes faster than the link carries. Then it is held: it may
//! write only a part of what the link carries, a smaller part after each round that has not helped. The last
//! stop comes when the link carries the rest within the longest pause. If even a guest that hardly runs writes
//! too much, the synchronisation says so, leaves the guest alone for a while, and tries again.
//!
//! Nothing here reads a clock or a counter.

use std::time::Duration;

use outlive_machine::PAGE_SIZE;

/// A round helps if it leaves no more than this part of its own pages to be sent again.
const HELPS: f64 = 0.7;
/// The smallest part of what the link carries that a guest may write: one 32nd.
const HARDEST: u32 = 5;
/// After this many rounds at that part that did not help there is no hope.
const HOPELESS: u32 = 3;
/// Nor is there after this many rounds in which the guest was held.
const MOST_HELD: u32 = 24;
/// The part of the longest pause in which the rest must be carried. The standby applies it, and answers, in what
/// is left.
const MARGIN: f64 = 0.7;
/// The rest that may always be sent: a link that takes too long for that takes too long for the state as well.
const LEAST: usize = 16;
/// How long the guest is left alone after the first attempt without hope, and at most.
const REST: Duration = Duration::from_secs(10);
const LONGEST_REST: Duration = Duration::from_secs(160);

/// Bytes of a page on the link, with its entry.
const PAGE_ON_LINK: f64 = PAGE_SIZE as f64 + 16.0;

/// What follows when a round has been sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Then {
    /// The last stop: the rest is small.
    Stop,
    /// Another round.
    Round,
    /// No round would help.
    Rest(Hopeless),
}

/// Why no round would help.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Hopeless {
    /// Pages that are left.
    pub(super) pages: usize,
    /// How long the link needs for them.
    pub(super) stop: Duration,
    /// Bytes that the link carries in a second.
    pub(super) link_bytes_per_s: u64,
    /// The next attempt begins after this time.
    pub(super) again: Duration,
}

/// Decides; see the module.
#[derive(Debug)]
pub(super) struct Converge {
    longest_pause: Duration,
    /// Most pages of the last checkpoint.
    most: usize,
    link: LinkSpeed,
    /// Pages of the round that is being sent.
    sending: usize,
    /// 0 while the guest runs freely; n: it may write 1/2^n of what the link carries.
    level: u32,
    /// Rounds at the hardest level that did not help.
    fruitless: u32,
    /// Rounds in which the guest was held.
    held: u32,
    /// Attempts without hope.
    rests: u32,
}

impl Converge {
    /// Of a synchronisation whose last stop may take `longest_pause` and carry `most` pages.
    pub(super) fn new(longest_pause: Duration, most: usize) -> Self {
        let link = LinkSpeed::default();
        Self { longest_pause, most, link, sending: 0, level: 0, fruitless: 0, held: 0, rests: 0 }
    }

    /// A round of so many pages is about to be sent.
    pub(super) fn begin_round(&mut self, pages: usize) {
        self.sending = pages;
        self.held += u32::from(self.level > 0);
    }

    /// A round was sent, in this time.
    pub(super) fn sent(&mut self, bytes: u64, took: Duration) {
        self.link.sent(bytes, took);
    }

    /// How long the guest may stand still at a time.
    pub(super) fn longest_pause(&self) -> Duration {
        self.longest_pause
    }

    /// Whether so many pages may be left for the last stop.
    pub(super) fn is_small(&self, rest: usize) -> bool {
        rest <= self.goal()
    }

    fn goal(&self) -> usize {
        let time = self.longest_pause.as_secs_f64() * MARGIN;
        let carried = self.link.pages_per_s().map_or(f64::INFINITY, |pages| pages * time);
        // A saturating conversion.
        (carried as usize).clamp(LEAST.min(self.most), self.most)
    }

    /// A round has been sent, and so many pages are left.
    pub(super) fn next(&mut self, rest: usize) -> Then {
        if self.is_small(rest) {
            return Then::Stop;
        }
        if rest as f64 > self.sending as f64 * HELPS {
            if self.level == HARDEST {
                self.fruitless += 1;
            }
            self.level = (self.level + 1).min(HARDEST);
        }
        if self.fruitless < HOPELESS && self.held < MOST_HELD {
            return Then::Round;
        }
        let again = LONGEST_REST.min(REST * (1 << self.rests.min(4)));
        self.rests += 1;
        (self.level, self.fruitless, self.held) = (0, 0, 0);
        let bytes_per_s = self.link.bytes_per_s().unwrap_or(f64::INFINITY);
        Then::Rest(Hopeless {
            pages: rest,
            stop: Duration::try_from_secs_f64(rest as f64 * PAGE_ON_LINK / bytes_per_s).unwrap_or_default(),
            link_bytes_per_s: bytes_per_s as u64,
            again,
        })
    }

    /// How many pages the guest may write in a second; `None`: as many as it likes.
    pub(super) fn allowed(&self) -> Option<f64> {
        let carried = self.link.pages_per_s().filter(|_| self.level > 0)?;
        Some((carried / f64::from(1 << self.level)).max(1.0))
    }
}

/// How fast the link was in the last rounds.
#[derive(Clone, Copy, Debug, Default)]
struct LinkSpeed {
    bytes: f64,
    seconds: f64,
}

impl LinkSpeed {
    /// Of a shorter time than this the speed is that of a buffer and not of the link.
    const SHORTEST: f64 = 0.02;

    fn sent(&mut self, bytes: u64, took: Duration) {
        // Older rounds count less.
        self.bytes = self.bytes / 2.0 + bytes as f64;
        self.seconds = self.seconds / 2.0 + took.as_secs_f64();
    }

    fn bytes_per_s(&self) -> Option<f64> {
        (self.seconds >= Self::SHORTEST).then(|| self.bytes / self.seconds)
    }

    fn pages_per_s(&self) -> Option<f64> {
        self.bytes_per_s().map(|bytes| bytes / PAGE_ON_LINK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX_PAUSE: Duration = Duration::from_millis(300);
    const STAGING: usize = 2048;

    /// A guest that writes so many pages a second of a set of this size, over a link.
    struct Play {
        converge: Converge,
        link_pages_per_s: f64,
        set: f64,
        writes_per_s: f64,
        /// The guest cannot be held below this rate: it writes as soon as it runs at all.
        at_least: f64,
        rounds: u32,
        rest: f64,
    }

    impl Play {
        fn new(link_mbit: f64, set: f64, writes_per_s: f64) -> Self {
            let link_pages_per_s = link_mbit * 1e6 / 8.0 / PAGE_ON_LINK;
            let converge = Converge::new(MAX_PAUSE, STAGING);
            Self { converge, link_pages_per_s, set, writes_per_s, at_least: 0.0, rounds: 0, rest: 60_000.0 }
        }

        /// Sends a round. Returns what follows.
        fn round(&mut self) -> Then {
            let pages = self.rest;
            self.converge.begin_round(pages as usize);
            let seconds = pages / self.link_pages_per_s;
            let rate = self
                .converge
                .allowed()
                .map_or(self.writes_per_s, |rate| rate.max(self.at_least).min(self.writes_per_s));
            self.rest = self.set.min(rate * seconds);
            self.converge.sent((pages * PAGE_ON_LINK) as u64, Duration::from_secs_f64(seconds));
            self.rounds += 1;
            self.converge.next(self.rest as usize)
        }

        fn until_it_ends(&mut self) -> Then {
            loop {
                let then = self.round();
                if then != Then::Round {
                    return then;
                }
                assert!(self.rounds < 200, "it goes round for ever: {:?}", self.converge);
            }
        }

        fn stop_takes(&self) -> Duration {
            Duration::from_secs_f64(self.rest / self.link_pages_per_s)
        }
    }

    #[test]
    fn every_guest_ends_within_the_longest_pause_on_every_link() {
        for link_mbit in [20.0, 50.0, 200.0, 1000.0, 10_000.0] {
            for set in [100.0, 2000.0, 30_000.0, 200_000.0] {
                for writes_per_s in [100.0, 5000.0, 200_000.0] {
                    let mut play = Play::new(link_mbit, set, writes_per_s);
                    let case = format!("{link_mbit} Mbit/s, {set} pages, {writes_per_s}/s");
                    assert_eq!(play.until_it_ends(), Then::Stop, "{case}");
                    assert!(play.stop_takes() <= MAX_PAUSE, "{case}: {:?}", play.stop_takes());
                    assert!(play.rest <= STAGING as f64, "{case}");
                    assert!(play.rounds <= 24, "{case}: {} rounds", play.rounds);
                }
            }
        }
    }

    #[test]
    fn a_guest_that_writes_little_is_never_held() {
        let mut play = Play::new(1000.0, 30_000.0, 2000.0);
        loop {
            assert_eq!(play.converge.allowed(), None);
            if play.round() == Then::Stop {
                break;
            }
        }
    }

    #[test]
    fn a_guest_that_cannot_be_held_is_left_alone_for_longer_and_longer() {
        let mut play = Play::new(5.0, 30_000.0, 200_000.0);
        play.at_least = 2000.0;
        let mut rests = Vec::new();
        for _ in 0..7 {
            let Then::Rest(Hopeless { pages, stop, link_bytes_per_s, again }) = play.until_it_ends() else {
                panic!("nothing of this can be sent within the longest pause")
            };
            assert!(pages > 1000 && stop > MAX_PAUSE, "{pages} pages in {stop:?}");
            assert!((600_000..650_000).contains(&link_bytes_per_s), "{link_bytes_per_s}");
            assert_eq!(play.converge.allowed(), None, "the guest runs freely meanwhile");
            rests.push(again.as_secs());
        }
        assert_eq!(rests, [10, 20, 40, 80, 160, 160, 160]);
        // It calms down.
        play.at_least = 0.0;
        assert_eq!(play.until_it_ends(), Then::Stop);
    }

    #[test]
    fn a_link_that_was_not_measured_is_no_reason_to_wait() {
        let mut converge = Converge::new(MAX_PAUSE, STAGING);
        converge.begin_round(3);
        converge.sent(12_000, Duration::from_micros(40));
        assert_eq!(converge.next(STAGING), Then::Stop);
        assert_eq!(converge.next(STAGING + 1), Then::Round);
        assert_eq!(converge.allowed(), None, "and nobody is held at a speed that nobody knows");
    }
}
