//! Where the memory of a VM is written: the map that its process tells (`crates/outlive/src/heat.rs`), if it can be one.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The most cells and ranges, and the largest number of anything: a browser counts no further.
const CELLS: usize = 256;
const RANGES: usize = 16;
const LARGEST: u64 = 1 << 52;
/// The least size of a cell: a page.
const LEAST: u64 = 4096;

/// A map of a guest's memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Heat {
    /// Bytes of memory in a cell, a power of two.
    pub(crate) cell_bytes: u64,
    /// The guest's memory, in the order of addresses. Each range begins with a new cell.
    pub(crate) ranges: Vec<Range>,
    /// Of each cell, how many changed pages its checkpoints had in a second.
    pub(crate) pages_per_s: Vec<u64>,
}

/// Memory without a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Range {
    /// Its first address.
    pub(crate) first: u64,
    /// Its length.
    pub(crate) bytes: u64,
}

impl Range {
    /// Cells of this size.
    fn cells(&self, size: u64) -> usize {
        self.bytes.div_ceil(size) as usize
    }
}

impl Heat {
    /// What a process says. A standby, an unprotected VM and an older release say none, and nonsense is none.
    pub(crate) fn read(said: Value) -> Option<Self> {
        serde_json::from_value(said).ok().filter(Self::is_sound)
    }

    /// Whether it is a map that can be drawn, whoever has made it.
    pub(crate) fn is_sound(&self) -> bool {
        let size = self.cell_bytes;
        if !size.is_power_of_two() || !(LEAST..=LARGEST).contains(&size) || self.ranges.len() > RANGES {
            return false;
        }
        let mut end = 0;
        for Range { first, bytes } in self.ranges.iter().copied() {
            let follows = (end..=LARGEST).contains(&first) && (1..=LARGEST).contains(&bytes);
            if !follows || !first.is_multiple_of(LEAST) || !bytes.is_multiple_of(LEAST) {
                return false;
            }
            end = first + bytes;
        }
        let cells = self.ranges.iter().map(|it| it.cells(size)).fold(0, usize::saturating_add);
        (1..=CELLS).contains(&cells)
            && cells == self.pages_per_s.len()
            && self.pages_per_s.iter().all(|it| *it <= LARGEST / CELLS as u64)
    }

    /// Changed pages a second, in all of it.
    pub(crate) fn total(&self) -> u64 {
        self.pages_per_s.iter().sum()
    }

    /// The shortest piece of memory that has three quarters of the writes, if there are any and it is less than half of a
    /// range.
    pub(crate) fn spot(&self) -> Option<Range> {
        let wanted = (self.total() * 3).div_ceil(4);
        let mut best: Option<Range> = None;
        let mut before = 0;
        for range in &self.ranges {
            let cells = range.cells(self.cell_bytes);
            let rates = &self.pages_per_s[before..before + cells];
            before += cells;
            let (mut from, mut sum) = (0, 0);
            for (to, rate) in rates.iter().enumerate() {
                sum += rate;
                while sum - rates[from] >= wanted && from < to {
                    sum -= rates[from];
                    from += 1;
                }
                let first = from as u64 * self.cell_bytes;
                let bytes = range.bytes.min((to as u64 + 1) * self.cell_bytes) - first;
                if wanted > 0 && sum >= wanted && best.is_none_or(|it| bytes < it.bytes) {
                    best = Some(Range { first: range.first + first, bytes });
                }
            }
        }
        let all: u64 = self.ranges.iter().map(|it| it.bytes).sum();
        best.filter(|it| it.bytes <= all / 2)
    }

    /// The map in so many columns, first addresses first: each has the hottest cell of its part.
    pub(crate) fn columns(&self, columns: u16) -> Vec<u64> {
        let (cells, columns) = (self.pages_per_s.len(), usize::from(columns));
        let hottest = |column: usize| {
            let from = column * cells / columns;
            let to = ((column + 1) * cells / columns).max(from + 1);
            self.pages_per_s[from..to].iter().copied().max().unwrap_or_default()
        };
        (0..columns).map(hottest).collect()
    }
}

/// The map that a node finds in a process's status; `None`: it finds none. The program's tests ask this for what its processes
/// really say.
#[must_use]
pub fn heat_in(status: &[u8]) -> Option<Value> {
    let mut status: Value = serde_json::from_slice(status).ok()?;
    serde_json::to_value(taken_out(&mut status)?).ok()
}

/// Takes the map out of a process's status: the API tells it with the figures.
pub(crate) fn taken_out(status: &mut Value) -> Option<Heat> {
    Heat::read(status.as_object_mut()?.remove("heat")?)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Two ranges of 4 and of 2 1/2 cells.
    fn said() -> Value {
        json!({ "cell_bytes": MIB, "pages_per_s": [0, 7, 1, 0, 0, 80, 2],
            "ranges": [{ "first": 0, "bytes": 4 * MIB }, { "first": 16 * MIB, "bytes": 5 * MIB / 2 }], "new": 1 })
    }

    #[test]
    fn what_cannot_be_a_map_is_none() {
        let sound = Heat::read(said()).unwrap();
        assert_eq!((sound.total(), sound.pages_per_s.len()), (90, 7));
        for (pointer, wrong) in [
            ("/cell_bytes", json!(0)),
            ("/cell_bytes", json!(2048)),
            ("/cell_bytes", json!(MIB + 1)),
            ("/cell_bytes", json!(2 * MIB)),
            ("/cell_bytes", json!(u64::MAX)),
            ("/cell_bytes", json!(-1)),
            ("/cell_bytes", json!("1M")),
            ("/ranges", json!([])),
            ("/ranges", json!(null)),
            ("/ranges", json!(vec![json!({ "first": 0, "bytes": MIB }); 7])),
            (
                "/ranges",
                json!([{ "first": 0, "bytes": u64::MAX }, { "first": 1_u64 << 40, "bytes": u64::MAX }]),
            ),
            ("/ranges/0/bytes", json!(0)),
            ("/ranges/0/bytes", json!(u64::MAX)),
            ("/ranges/0/bytes", json!(17 * MIB)),
            ("/ranges/1/first", json!(3 * MIB)),
            ("/ranges/1/first", json!(u64::MAX)),
            ("/ranges/1/first", json!(16 * MIB + 1)),
            ("/ranges/1/bytes", json!(5 * MIB / 2 + 1)),
            ("/pages_per_s", json!([])),
            ("/pages_per_s", json!(vec![1; 8])),
            ("/pages_per_s", json!(vec![1.5; 7])),
            ("/pages_per_s/3", json!(u64::MAX)),
            ("/pages_per_s/3", json!(-7)),
            ("/pages_per_s/3", json!("<b>")),
        ] {
            let mut bad = said();
            *bad.pointer_mut(pointer).unwrap() = wrong.clone();
            assert_eq!(Heat::read(bad), None, "{pointer} {wrong}");
        }
        let many = |cells: usize| {
            json!({ "cell_bytes": 4096, "ranges": [{ "first": 0, "bytes": 4096 * cells }],
                "pages_per_s": vec![LARGEST / 256; cells] })
        };
        assert!(Heat::read(many(257)).is_none());
        assert_eq!(Heat::read(many(256)).unwrap().total(), LARGEST);
        for none in [json!(null), json!(7), json!([]), json!({})] {
            assert_eq!(Heat::read(none), None);
        }
    }

    #[test]
    fn it_is_told_with_the_figures_only() {
        let mut status = json!({ "role": "primary", "heat": said() });
        assert_eq!(taken_out(&mut status).unwrap().total(), 90);
        assert_eq!(status, json!({ "role": "primary" }));
        let mut hostile = json!({ "role": "primary", "heat": "x".repeat(9999) });
        assert_eq!(taken_out(&mut hostile), None);
        assert_eq!(hostile, json!({ "role": "primary" }), "nobody passes it on");
        assert_eq!((taken_out(&mut json!([])), heat_in(b"{")), (None, None));
    }

    fn of(cells: &[u64]) -> Heat {
        let bytes = MIB * cells.len() as u64;
        Heat { cell_bytes: MIB, ranges: vec![Range { first: 0, bytes }], pages_per_s: cells.to_vec() }
    }

    #[test]
    fn the_hottest_piece_is_the_shortest_that_has_most_of_it() {
        let spot = |heat: &Heat| heat.spot().map(|it| (it.first / MIB, it.bytes / MIB));
        // The last cell is half of one.
        let heat = Heat::read(said()).unwrap();
        assert_eq!(spot(&heat), Some((17, 1)));
        assert_eq!(heat.spot().map(|it| it.first), Some(17 * MIB));
        let tail = Heat { pages_per_s: vec![0, 0, 0, 0, 0, 0, 9], ..heat };
        assert_eq!(tail.spot(), Some(Range { first: 18 * MIB, bytes: MIB / 2 }));
        assert_eq!(spot(&of(&[0, 0, 4, 4, 4, 0, 0, 0])), Some((2, 3)));
        assert_eq!(spot(&of(&[9, 0, 0, 0, 0, 0, 0, 1])), Some((0, 1)));
        assert_eq!(spot(&of(&[9, 0, 0, 0, 0, 0, 0, 9])), None, "it is everywhere");
        assert_eq!(spot(&of(&[1; 8])), None);
        assert_eq!(spot(&of(&[0; 8])), None, "it is nowhere");
    }

    #[test]
    fn columns_lose_no_hot_cell() {
        let heat = of(&[1, 0, 0, 9, 0, 0, 0, 5]);
        assert_eq!(heat.columns(4), [1, 9, 0, 5]);
        assert_eq!(heat.columns(3), [1, 9, 5]);
        assert_eq!(heat.columns(16)[5..9], [0, 9, 9, 0]);
        assert_eq!(heat.columns(0), [0; 0]);
    }
}
