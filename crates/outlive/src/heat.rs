//! Where the guest's memory is written: a map of a few cells, each with the pages in it that change in a second.
//!
//! The thread that sends checkpoints knows every page of them, and whether it has changed: a hot page is in every checkpoint
//! because it may have been written. It counts into a table of its own ([`Counter`]), and about once a second it adds that to
//! what others read ([`Heat`]). It allocates nothing and waits for nobody: while somebody reads, it goes on counting.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use outlive_dirty::MemorySlot;
use outlive_machine::PAGE_SIZE;
use serde::{Deserialize, Serialize};

/// The most cells.
const CELLS: usize = 256;
/// Time between two additions to what others read.
const EVERY: Duration = Duration::from_secs(1);
/// After so many seconds, half of what a cell shows is older, and half is newer.
const HALF_LIFE: f32 = 2.0;
/// A slower cell shows nothing; any other one at least 1.
const SLOWEST: f32 = 0.1;
/// Something older is not shown: nothing is sent.
const STALE: Duration = Duration::from_secs(10);

/// Where the guest's memory is written: the newest few seconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeatMap {
    /// Bytes of memory in a cell, a power of two.
    pub cell_bytes: u64,
    /// The guest's memory, in the order of addresses. Each range begins with a new cell.
    pub ranges: Vec<HeatRange>,
    /// Of each cell, how many changed pages a second the checkpoints had. A page counts once for each checkpoint in which
    /// it changed.
    pub pages_per_s: Vec<u64>,
}

/// Memory without a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeatRange {
    /// Its first address.
    pub first: u64,
    /// Its length.
    pub bytes: u64,
}

/// How memory is divided into cells.
#[derive(Clone, Debug, Default)]
struct Cells {
    /// A cell has two to the power of this pages.
    shift: u32,
    parts: Vec<Part>,
}

/// A range of memory, in pages.
#[derive(Clone, Copy, Debug)]
struct Part {
    base: u64,
    pages: u64,
    /// The number of its first cell.
    first: usize,
}

impl Cells {
    /// As small as they can be, for ranges of a first page and a number of pages. Memory in more ranges than there are cells
    /// has none.
    fn new(ranges: &[(u64, u64)]) -> Self {
        if ranges.len() > CELLS {
            return Self::default();
        }
        let cells = |shift: u32| ranges.iter().map(move |(_, pages)| pages.div_ceil(1 << shift));
        let fits = |shift: &u32| cells(*shift).sum::<u64>() <= CELLS as u64;
        // Pages are counted in 52 bits of an address.
        let shift = (0..52).find(fits).unwrap_or(52);
        let mut first = 0;
        let mut part = |((base, pages), cells): (&(u64, u64), u64)| {
            let part = Part { base: *base, pages: *pages, first };
            first += cells as usize;
            part
        };
        Self { shift, parts: ranges.iter().zip(cells(shift)).map(&mut part).collect() }
    }

    /// The cell of a page; `None`: it is no memory of the guest.
    fn of(&self, gfn: u64) -> Option<usize> {
        // A guest has three ranges at most.
        self.parts.iter().find_map(|part| {
            let place = gfn.checked_sub(part.base).filter(|it| *it < part.pages)?;
            Some(part.first + (place >> self.shift) as usize)
        })
    }

    fn count(&self) -> usize {
        let cells = |part: &Part| part.first + part.pages.div_ceil(1 << self.shift) as usize;
        self.parts.last().map_or(0, cells)
    }
}

/// The map, for all threads.
pub(crate) struct Heat {
    cells: Cells,
    /// The number of the newest counter. An earlier one tells nothing any more.
    newest: AtomicU64,
    shown: Mutex<Shown>,
}

struct Shown {
    /// Whose counts these are.
    counter: u64,
    /// When the last ones came.
    at: Instant,
    /// Pages a second.
    rates: [f32; CELLS],
}

impl Heat {
    /// The map of a guest with this memory.
    pub(crate) fn new(slots: &[MemorySlot]) -> Arc<Self> {
        let ranges: Vec<_> = slots.iter().map(|slot| (slot.base.0, slot.pages)).collect();
        Self::of(&ranges)
    }

    fn of(ranges: &[(u64, u64)]) -> Arc<Self> {
        Arc::new(Self {
            cells: Cells::new(ranges),
            newest: AtomicU64::new(0),
            shown: Mutex::new(Shown { counter: 0, at: Instant::now(), rates: [0.0; CELLS] }),
        })
    }

    /// A table for the thread of a new connection. What an earlier one has counted is forgotten.
    pub(crate) fn counter(self: &Arc<Self>) -> Counter {
        let number = self.newest.fetch_add(1, Ordering::Relaxed) + 1;
        Counter { heat: self.clone(), number, since: None, counts: Box::new([0; CELLS]) }
    }

    /// The map as it is; `None` until a protected VM has run for a second, and while nothing is sent.
    pub(crate) fn map(&self) -> Option<HeatMap> {
        self.map_at(Instant::now())
    }

    fn map_at(&self, now: Instant) -> Option<HeatMap> {
        let count = self.cells.count();
        let rates = {
            let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
            let counts = shown.counter > 0 && shown.counter == self.newest.load(Ordering::Relaxed);
            (counts && now.saturating_duration_since(shown.at) < STALE).then_some(shown.rates)?
        };
        let page = PAGE_SIZE as u64;
        let range = |part: &Part| HeatRange { first: part.base * page, bytes: part.pages * page };
        Some(HeatMap {
            cell_bytes: page << self.cells.shift,
            ranges: self.cells.parts.iter().map(range).collect(),
            pages_per_s: rates[..count].iter().map(|rate| rounded(*rate)).collect(),
        })
        .filter(|_| count > 0)
    }
}

/// Whatever is written can be seen.
fn rounded(rate: f32) -> u64 {
    if rate < SLOWEST { 0 } else { (rate.round() as u64).max(1) }
}

/// What the sender of one connection has counted. Counting a page is a comparison, a shift and an addition.
pub(crate) struct Counter {
    heat: Arc<Heat>,
    number: u64,
    /// Since when it counts; `None` before the first checkpoint.
    since: Option<Instant>,
    counts: Box<[u32; CELLS]>,
}

impl Counter {
    /// A page has changed.
    pub(crate) fn count(&mut self, gfn: u64) {
        if let Some(count) = self.heat.cells.of(gfn).and_then(|cell| self.counts.get_mut(cell)) {
            *count = count.saturating_add(1);
        }
    }

    /// A checkpoint is counted. About once a second this tells what came of it.
    pub(crate) fn tell(&mut self) {
        self.tell_at(Instant::now());
    }

    fn tell_at(&mut self, now: Instant) {
        let Some(since) = self.since else {
            // The pages of the base are those of another time.
            self.counts.fill(0);
            self.since = Some(now);
            return;
        };
        let span = now.saturating_duration_since(since);
        if span < EVERY || self.heat.newest.load(Ordering::Relaxed) != self.number {
            return;
        }
        // Somebody reads: the next checkpoint comes soon.
        let Ok(mut shown) = self.heat.shown.try_lock() else { return };
        let span = span.as_secs_f32();
        let is_first = std::mem::replace(&mut shown.counter, self.number) != self.number;
        let kept = if is_first { 0.0 } else { (-span / HALF_LIFE).exp2() };
        for (rate, count) in shown.rates.iter_mut().zip(self.counts.iter_mut()) {
            let newer = std::mem::take(count) as f32 / span;
            let mean = *rate * kept + newer * (1.0 - kept);
            *rate = if mean < SLOWEST / 100.0 { 0.0 } else { mean };
        }
        shown.at = now;
        self.since = Some(now);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const PAGE: u64 = PAGE_SIZE as u64;
    const MIB: u64 = (1 << 20) / PAGE;

    /// First and last address of each cell, as a reader of the map finds them.
    fn cells(map: &HeatMap) -> Vec<(u64, u64)> {
        let of = |range: &HeatRange| {
            let (first, end, step) = (range.first, range.first + range.bytes, map.cell_bytes);
            (0..range.bytes.div_ceil(step))
                .map(move |it| (first + it * step, (first + (it + 1) * step).min(end) - 1))
                .collect::<Vec<_>>()
        };
        map.ranges.iter().flat_map(of).collect()
    }

    /// Counts these pages in one second.
    fn counted(heat: &Arc<Heat>, pages: &[u64]) -> HeatMap {
        let (mut counter, began) = (heat.counter(), Instant::now());
        counter.tell_at(began);
        pages.iter().for_each(|page| counter.count(*page));
        counter.tell_at(began + SECOND);
        heat.map_at(began + SECOND).unwrap()
    }

    proptest! {
        /// Whatever memory a guest has, with holes and of odd sizes: each page is in the cell of its address, and none is lost.
        #[test]
        fn every_page_is_counted_where_it_is(
            ranges in prop::collection::vec((0..1_u64 << 22, 1..1_u64 << 21), 1..6),
            places in prop::collection::vec((any::<prop::sample::Index>(), any::<u64>()), 1..200),
        ) {
            let mut end = 0;
            let ranges: Vec<_> = ranges.iter().map(|(gap, pages)| {
                let base = end + gap;
                end = base + pages;
                (base, *pages)
            }).collect();
            let page = |(range, place): &(prop::sample::Index, u64)| {
                let (base, pages) = ranges[range.index(ranges.len())];
                base + place % pages
            };
            let pages: Vec<_> = places.iter().map(page).collect();
            let map = counted(&Heat::of(&ranges), &pages);
            let cells = cells(&map);
            prop_assert!(map.cell_bytes.is_power_of_two() && map.cell_bytes >= PAGE);
            prop_assert!(cells.len() <= CELLS && cells.len() == map.pages_per_s.len());
            // They are as small as they can be.
            let smaller = |(_, pages): &(u64, u64)| (pages * PAGE).div_ceil(map.cell_bytes / 2);
            prop_assert!(map.cell_bytes == PAGE || ranges.iter().map(smaller).sum::<u64>() > CELLS as u64);
            let within = |(first, last): &(u64, u64)| {
                pages.iter().filter(|it| (*first..=*last).contains(&(**it * PAGE))).count() as u64
            };
            prop_assert_eq!(cells.iter().map(within).collect::<Vec<_>>(), map.pages_per_s.clone());
            prop_assert_eq!(map.pages_per_s.iter().sum::<u64>(), pages.len() as u64);
        }
    }

    #[test]
    fn memory_with_a_hole_has_no_cell_there() {
        let (low, high) = ((0, 3 << 18), (1 << 20, 1 << 18));
        let heat = Heat::of(&[low, high]);
        let map =
            counted(&heat, &[0, low.1 - 1, low.1, high.0 - 1, high.0, high.0 + high.1 - 1, high.0 + high.1]);
        assert_eq!((map.cell_bytes, map.pages_per_s.len()), (16 << 20, 256));
        let hot: Vec<_> = (0..256).filter(|cell| map.pages_per_s[*cell] > 0).collect();
        assert_eq!((hot, map.pages_per_s.iter().sum::<u64>()), (vec![0, 191, 192, 255], 4));
        assert_eq!(map.ranges[1], HeatRange { first: 4 << 30, bytes: 1 << 30 });
        // Such a guest there is not, and it does no harm.
        let many: Vec<_> = (0..300).map(|it| (it * 2, 1)).collect();
        let heat = Heat::of(&many);
        heat.counter().count(0);
        assert_eq!(heat.map(), None);
    }

    /// The first answer has the rate of a second, and later ones follow it, but not at once.
    #[test]
    fn a_cell_shows_the_newest_seconds() {
        let heat = Heat::of(&[(0, 32 * MIB)]);
        let (mut counter, began) = (heat.counter(), Instant::now());
        (0..90_000).for_each(|_| counter.count(0));
        counter.tell_at(began);
        counter.tell_at(began + SECOND / 2);
        assert_eq!(heat.map_at(began + SECOND / 2), None, "no second has passed");
        let mut second = |number: u32, pages: u64| {
            // A hundred checkpoints.
            for part in 1..=100 {
                (0..pages / 100).for_each(|_| counter.count(0));
                counter.tell_at(began + SECOND * number + SECOND / 100 * part);
            }
            heat.map_at(began + SECOND * (number + 1)).map(|map| map.pages_per_s[0])
        };
        assert_eq!(second(0, 1_000), Some(1_000), "the base does not count");
        assert_eq!(second(1, 1_000), Some(1_000));
        assert_eq!(second(2, 1_000), Some(1_000));
        let two = [second(3, 0), second(4, 0)].map(Option::unwrap);
        assert!((650..750).contains(&two[0]) && (450..550).contains(&two[1]), "{two:?}");
        let later: Vec<_> = (5..40).map(|it| second(it, 0).unwrap()).collect();
        assert!(later.contains(&1) && later.last() == Some(&0), "{later:?}");
        assert_eq!(heat.map_at(began + SECOND * 40 + STALE), None, "nothing was sent since then");
    }

    #[test]
    fn another_connection_begins_anew() {
        let heat = Heat::of(&[(0, 32 * MIB)]);
        let (mut old, began) = (heat.counter(), Instant::now());
        old.tell_at(began);
        old.count(1);
        old.tell_at(began + SECOND);
        assert_eq!(heat.map_at(began + SECOND).unwrap().pages_per_s[0], 1);
        let mut new = heat.counter();
        assert_eq!(heat.map_at(began + SECOND), None);
        // A thread that stood still has counted much.
        (0..1000).for_each(|_| old.count(2));
        old.tell_at(began + SECOND * 3);
        assert_eq!(heat.map_at(began + SECOND * 3), None);
        new.tell_at(began + SECOND * 3);
        (0..7).for_each(|_| new.count(3));
        new.tell_at(began + SECOND * 4);
        assert_eq!(heat.map_at(began + SECOND * 4).unwrap().pages_per_s[0], 7);
    }

    /// All cells have one rate whenever anybody looks, though it changes all the time.
    #[test]
    fn nobody_sees_half_a_change() {
        let heat = Heat::of(&[(0, 256)]);
        let (mut counter, began) = (heat.counter(), Instant::now());
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let (mut seen, mut last) = (0, 0);
                while seen < 500 {
                    let Some(map) = heat.map_at(began) else { continue };
                    let first = map.pages_per_s[0];
                    assert_eq!(map.pages_per_s, [first; 256]);
                    seen += usize::from(std::mem::replace(&mut last, first) != first);
                }
            });
            counter.tell_at(began);
            for turn in (1..).take_while(|_| !reader.is_finished()) {
                (0..=255).for_each(|page| (0..turn % 50).for_each(|_| counter.count(page)));
                counter.tell_at(began + SECOND * turn);
            }
        });
    }

    /// A reader does not hold up the thread that sends: it tells later, and has lost nothing.
    #[test]
    fn who_reads_holds_nobody_up() {
        let heat = Heat::of(&[(0, 256)]);
        let (mut counter, began) = (heat.counter(), Instant::now());
        counter.tell_at(began);
        counter.count(5);
        let reads = heat.shown.lock().unwrap();
        counter.tell_at(began + SECOND);
        counter.count(5);
        drop(reads);
        counter.tell_at(began + SECOND * 2);
        assert_eq!(heat.map_at(began + SECOND * 2).unwrap().pages_per_s[5], 1, "two in two seconds");
    }
}
