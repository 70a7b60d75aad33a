//! One worker: writes pages at a rate, verifies them on request, always in slices.

use super::control::{Control, Setting, Stat};
use super::pattern::{Flaw, Page, check, fill};

/// Memory of a worker: its pages and, for each, the number of writes it has seen.
pub trait Arena {
    /// Pages there are.
    fn pages(&self) -> u64;
    /// Page `index`.
    fn page(&mut self, index: u64) -> &mut Page;
    /// The write counter of page `index`.
    fn counter(&mut self, index: u64) -> &mut u32;
}

/// Writes that were due but not made for longer than this are forgotten: after a pause the load does not try
/// to make up for lost time.
const MAX_BACKLOG_US: u64 = 50_000;
/// Pages cleared or compared count as this many writes of a slice.
const PAGES_PER_WRITE: u64 = 8;
/// One of this many pages is hot.
const HOT_SHARE: u64 = 10;

/// The worker's next request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing until the board changes.
    Idle,
    /// More at this time (microseconds of the caller's clock).
    Until(u64),
    /// More at once.
    Busy,
}

/// The state of a worker.
#[derive(Debug)]
pub struct Worker {
    index: usize,
    workers: usize,
    sequence: u32,
    setting: Setting,
    pages: u64,
    rate: u64,
    stat: Stat,
    random: u64,
    /// Writes are due from here on.
    since_us: u64,
    /// Writes made since `since_us`.
    made: u64,
    /// Next counter to clear after a new setting; `pages` when done.
    cleared: u64,
    verified: u32,
    /// Verification under way: its number and the next page.
    verifying: Option<(u32, u64)>,
}

impl Worker {
    /// Worker `index` of `workers`.
    pub fn new(index: usize, workers: usize, seed: u64) -> Self {
        Self {
            index,
            workers,
            sequence: 0,
            setting: Setting::default(),
            pages: 0,
            rate: 0,
            stat: Stat::default(),
            random: (seed ^ (index as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)) | 1,
            since_us: 0,
            made: 0,
            cleared: 0,
            verified: 0,
            verifying: None,
        }
    }

    /// Works for at most `budget` writes or as much else, then reports.
    pub fn step(&mut self, control: &Control, arena: &mut impl Arena, now_us: u64, budget: u64) -> Step {
        if control.sequence() != self.sequence {
            let Some((sequence, setting)) = control.setting() else { return Step::Busy };
            self.take_over(sequence, setting, arena.pages());
        }
        let step = if self.cleared < self.pages {
            self.clear(arena, now_us, budget);
            Step::Busy
        } else {
            let verifying = self.verify(control, arena, budget);
            let wanted = self.write(arena, now_us, budget);
            if verifying { Step::Busy } else { wanted }
        };
        control.report(self.index, self.stat, self.sequence, self.verified);
        step
    }

    /// The share of worker `index` in `total` things.
    fn share(&self, total: u64) -> u64 {
        let (workers, index) = (self.workers as u64, self.index as u64);
        total / workers + u64::from(index < total % workers)
    }

    fn take_over(&mut self, sequence: u32, setting: Setting, arena_pages: u64) {
        self.sequence = sequence;
        self.setting = setting;
        self.pages = self.share(setting.pages).min(arena_pages);
        self.rate = self.share(setting.rate);
        self.stat = Stat::default();
        self.cleared = 0;
        self.verifying = None;
    }

    fn clear(&mut self, arena: &mut impl Arena, now_us: u64, budget: u64) {
        let end = self.pages.min(self.cleared + budget * PAGES_PER_WRITE * 64);
        (self.cleared..end).for_each(|page| *arena.counter(page) = 0);
        self.cleared = end;
        (self.since_us, self.made) = (now_us, 0);
    }

    /// Continues the requested verification, if there is one. True while it is under way.
    fn verify(&mut self, control: &Control, arena: &mut impl Arena, budget: u64) -> bool {
        if self.verifying.is_none() && control.verification() != self.verified {
            self.verifying = Some((control.verification(), 0));
        }
        let Some((number, from)) = self.verifying else { return false };
        let end = self.pages.min(from + budget * PAGES_PER_WRITE);
        for index in from..end {
            let count = *arena.counter(index);
            let number = self.number(index);
            match check(arena.page(index), number, count) {
                Ok(()) => {}
                Err(Flaw::Stale) => self.stat.stale += 1,
                Err(Flaw::Torn) => self.stat.torn += 1,
            }
        }
        self.stat.checked += end - from;
        if end < self.pages {
            self.verifying = Some((number, end));
            return true;
        }
        (self.verified, self.verifying) = (number, None);
        false
    }

    fn write(&mut self, arena: &mut impl Arena, now_us: u64, budget: u64) -> Step {
        // A worker without a share of a limited rate has nothing to do.
        if self.pages == 0 || (self.setting.rate > 0 && self.rate == 0) {
            return Step::Idle;
        }
        if self.rate == 0 {
            (0..budget).for_each(|_| self.write_one(arena));
            return Step::Busy;
        }
        if now_us.saturating_sub(self.due_us(self.made + 1)) > MAX_BACKLOG_US {
            (self.since_us, self.made) = (now_us, 0);
        }
        let due =
            (u128::from(now_us.saturating_sub(self.since_us)) * u128::from(self.rate) / 1_000_000) as u64;
        let count = due.saturating_sub(self.made).min(budget);
        (0..count).for_each(|_| self.write_one(arena));
        self.made += count;
        if self.made < due { Step::Busy } else { Step::Until(self.due_us(self.made + 1)) }
    }

    /// When write number `count` since `since_us` is due.
    fn due_us(&self, count: u64) -> u64 {
        self.since_us + (u128::from(count) * 1_000_000).div_ceil(u128::from(self.rate)) as u64
    }

    fn write_one(&mut self, arena: &mut impl Arena) {
        let hot = self.pages.div_ceil(HOT_SHARE);
        let range =
            if self.next_random() % 100 < u64::from(self.setting.hot_percent) { hot } else { self.pages };
        let index = self.next_random() % range;
        let number = self.number(index);
        let counter = arena.counter(index);
        *counter = (*counter).wrapping_add(1).max(1);
        let count = *counter;
        fill(arena.page(index), number, count);
        self.stat.writes += 1;
    }

    /// The number of a page over all workers.
    fn number(&self, index: u64) -> u64 {
        index << 8 | self.index as u64
    }

    /// xorshift64*.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }
}

#[cfg(test)]
mod tests {
    use super::super::pattern::PAGE_WORDS;
    use super::*;

    struct Memory {
        pages: Vec<Page>,
        counters: Vec<u32>,
    }

    impl Memory {
        fn new(pages: usize) -> Self {
            Self { pages: vec![[0xdead; PAGE_WORDS]; pages], counters: vec![99; pages] }
        }
    }

    impl Arena for Memory {
        fn pages(&self) -> u64 {
            self.pages.len() as u64
        }

        fn page(&mut self, index: u64) -> &mut Page {
            &mut self.pages[index as usize]
        }

        fn counter(&mut self, index: u64) -> &mut u32 {
            &mut self.counters[index as usize]
        }
    }

    fn run(worker: &mut Worker, control: &Control, memory: &mut Memory, from_us: u64, to_us: u64) -> u64 {
        let mut now = from_us;
        while now < to_us {
            now = match worker.step(control, memory, now, 64) {
                Step::Busy => now + 10,
                Step::Until(then) => then.max(now + 1),
                Step::Idle => to_us,
            };
        }
        now
    }

    #[test]
    fn keeps_the_rate_and_heats_a_tenth() {
        let control = Control::new();
        let mut memory = Memory::new(1000);
        let mut worker = Worker::new(0, 1, 42);
        control.set(Setting { pages: 1000, hot_percent: 90, rate: 20_000 });
        run(&mut worker, &control, &mut memory, 0, 1_000_000);
        let writes = control.stat(0).writes;
        assert!((19_900..=20_100).contains(&writes), "{writes} writes in a second");
        let hot: u32 = memory.counters[..100].iter().sum();
        let share = f64::from(hot) / writes as f64;
        assert!((0.89..0.93).contains(&share), "hot share {share}");
        assert!(control.is_settled(1));
    }

    #[test]
    fn a_pause_is_not_made_up_for() {
        let control = Control::new();
        let mut memory = Memory::new(10);
        let mut worker = Worker::new(0, 1, 1);
        control.set(Setting { pages: 10, hot_percent: 0, rate: 1000 });
        let now = run(&mut worker, &control, &mut memory, 0, 100_000);
        run(&mut worker, &control, &mut memory, now + 60_000_000, now + 60_010_000);
        assert!(control.stat(0).writes < 130, "{} writes", control.stat(0).writes);
    }

    #[test]
    fn shares_add_up_and_spare_workers_idle() {
        let control = Control::new();
        control.set(Setting { pages: 5, hot_percent: 0, rate: 2 });
        let mut pages = 0;
        for index in 0..3 {
            let mut memory = Memory::new(100);
            let mut worker = Worker::new(index, 3, 9);
            run(&mut worker, &control, &mut memory, 0, 10_000_000);
            pages += memory.counters.iter().filter(|count| **count != 99).count();
            assert_eq!(control.stat(index).writes > 0, index < 2);
        }
        assert_eq!(pages, 5);
    }

    #[test]
    fn verification_finds_what_was_damaged() {
        let control = Control::new();
        let mut memory = Memory::new(5000);
        let mut worker = Worker::new(0, 1, 7);
        control.set(Setting { pages: 5000, hot_percent: 50, rate: 0 });
        (0..1000).for_each(|_| assert_eq!(worker.step(&control, &mut memory, 0, 64), Step::Busy));
        control.set(Setting { pages: 5000, hot_percent: 50, rate: 1_000_000 });
        let now = run(&mut worker, &control, &mut memory, 0, 50_000);

        let number = control.request_verification();
        assert!(!control.is_verified(1, number));
        let now = run(&mut worker, &control, &mut memory, now, now + 100_000);
        assert!(control.is_verified(1, number));
        assert_eq!(control.stat(0).checked, 5000);
        assert_eq!((control.stat(0).stale, control.stat(0).torn), (0, 0));

        let victims: Vec<usize> = (0..5000).filter(|page| memory.counters[*page] > 1).take(2).collect();
        control.set(Setting { pages: 5000, hot_percent: 50, rate: 1 });
        // A new setting forgets the old content, so write first, then damage.
        let now = run(&mut worker, &control, &mut memory, now, now + 2_000_000);
        for victim in &victims {
            memory.counters[*victim] = 2;
            fill(&mut memory.pages[*victim], (*victim as u64) << 8, 2);
        }
        fill(&mut memory.pages[victims[0]], (victims[0] as u64) << 8, 1);
        memory.pages[victims[1]][PAGE_WORDS - 32] ^= 1;
        let number = control.request_verification();
        run(&mut worker, &control, &mut memory, now, now + 100_000);
        assert!(control.is_verified(1, number));
        assert_eq!((control.stat(0).stale, control.stat(0).torn), (1, 1));
    }
}
