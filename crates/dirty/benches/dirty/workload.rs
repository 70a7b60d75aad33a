//! The pages that a guest writes in an epoch.

use outlive_dirty::{Gfn, PAGE_SIZE};

/// A cold page returns after this many epochs: far later than a hot one.
pub(crate) const POSITIONS: u64 = 72;
const GIB: u64 = 1 << 30;
/// Everything below is the guest's own: tables, code, parameters. None of it is written while the guest runs.
pub(crate) const LOW: u64 = 16 << 20;

/// How the pages of an epoch are spread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Evenly over all of memory.
    Scattered,
    /// Next to each other.
    Contiguous,
    /// Evenly over one GiB in the middle of memory, so that VMs of all sizes write pages equally far apart.
    InOneGib,
}

impl Pattern {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Pattern::Scattered => "scattered",
            Pattern::Contiguous => "contiguous",
            Pattern::InOneGib => "in 1 GiB",
        }
    }
}

/// This many pages from an address on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Run {
    pub(crate) count: u64,
    pub(crate) start: u64,
    pub(crate) stride: u64,
}

impl Run {
    pub(crate) fn contains(self, gfn: Gfn) -> bool {
        let distance = gfn.gpa().wrapping_sub(self.start);
        gfn.gpa() >= self.start && distance % self.stride == 0 && distance / self.stride < self.count
    }

    pub(crate) fn pages(self) -> impl Iterator<Item = Gfn> {
        (0..self.count).map(move |page| Gfn::of(self.start + page * self.stride))
    }
}

/// The writes of a vCPU in an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) hot: Run,
    pub(crate) cold: Run,
}

impl Job {
    pub(crate) fn runs(&self) -> [Run; 2] {
        [self.hot, self.cold]
    }

    pub(crate) fn count(&self) -> u64 {
        self.hot.count + self.cold.count
    }

    pub(crate) fn pages(&self) -> impl Iterator<Item = Gfn> {
        self.runs().into_iter().flat_map(Run::pages)
    }
}

/// Some pages are the same in every epoch (hot), the others move on (cold). At 0 % hot they are all the same
/// too: then nobody treats hot pages differently, and the pages are those of the usual benchmark.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workload {
    pub(crate) dirty: u64,
    pub(crate) hot_percent: u64,
    pub(crate) pattern: Pattern,
    base: u64,
    span: u64,
}

impl Workload {
    pub(crate) fn new(vm_gib: u64, dirty: u64, hot_percent: u64, pattern: Pattern) -> Workload {
        let (base, end) = match pattern {
            Pattern::InOneGib if vm_gib > 1 => (vm_gib / 2 * GIB + LOW, (vm_gib / 2 + 1) * GIB),
            _ => (LOW, vm_gib * GIB),
        };
        // Away from the end of the range that a large page maps.
        Workload { dirty, hot_percent, pattern, base, span: end - (2 << 20) - base }
    }

    fn moves(&self) -> bool {
        self.hot_percent > 0
    }

    fn hot(&self) -> u64 {
        if self.moves() { self.dirty * self.hot_percent / 100 } else { self.dirty }
    }

    /// The number of epochs until every page has been written.
    pub(crate) fn lap(&self) -> u64 {
        if self.moves() && self.hot() < self.dirty { POSITIONS } else { 1 }
    }

    pub(crate) fn job(&self, epoch: u64) -> Job {
        let (hot, cold, position) = (self.hot(), self.dirty - self.hot(), epoch % POSITIONS);
        match self.pattern {
            Pattern::Contiguous => {
                let run =
                    |count, first| Run { count, start: self.base + first * PAGE_SIZE, stride: PAGE_SIZE };
                // With some pages in between, so that it is never one run.
                Job { hot: run(hot, 0), cold: run(cold, hot + 64 + position * cold) }
            }
            // Hot pages have even numbers, cold ones odd.
            Pattern::Scattered | Pattern::InOneGib => {
                let run = |count: u64, offset| {
                    let stride = self.span / count.max(1) / (2 * PAGE_SIZE) * 2 * PAGE_SIZE;
                    Run { count, start: self.base + offset, stride }
                };
                let cold = run(cold, PAGE_SIZE + position * 2 * PAGE_SIZE);
                assert!(cold.count == 0 || cold.stride >= POSITIONS * 2 * PAGE_SIZE, "{self:?} is too dense");
                Job { hot: run(hot, 0), cold }
            }
        }
    }
}
