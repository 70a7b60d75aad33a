//! Which guest frames are RAM.

use super::limits::MAX_RANGES;

/// GFNs have at most 40 bits: physical addresses of x86-64 have 52, and 12 of them are the place in the page.
const MAX_GFN: u64 = 1 << 40;

/// A run of guest frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GfnRange {
    /// First GFN.
    pub start: u64,
    /// Number of pages, at least 1.
    pub pages: u64,
}

/// Why a list of ranges is not a layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// None at all, or more than [`MAX_RANGES`].
    #[error("a layout has 1 to {MAX_RANGES} ranges, not {0}")]
    Count(usize),
    /// An empty range.
    #[error("the range at GFN {0:#x} is empty")]
    Empty(u64),
    /// A range that reaches beyond the last possible frame.
    #[error("the range at GFN {0:#x} reaches beyond the last guest frame")]
    Beyond(u64),
    /// Ranges that are out of order or overlap.
    #[error("the range at GFN {0:#x} begins before the one in front of it ends")]
    Order(u64),
}

/// The guest frames that are RAM: ascending ranges that do not overlap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    ranges: Vec<GfnRange>,
}

impl Layout {
    /// Checks the ranges.
    ///
    /// # Errors
    /// See [`LayoutError`].
    pub fn new(ranges: Vec<GfnRange>) -> Result<Self, LayoutError> {
        if ranges.is_empty() || ranges.len() > MAX_RANGES {
            return Err(LayoutError::Count(ranges.len()));
        }
        let mut free_from = 0;
        for range in &ranges {
            if range.pages == 0 {
                return Err(LayoutError::Empty(range.start));
            }
            if range.start < free_from {
                return Err(LayoutError::Order(range.start));
            }
            free_from = match range.start.checked_add(range.pages) {
                Some(end) if end <= MAX_GFN => end,
                _ => return Err(LayoutError::Beyond(range.start)),
            };
        }
        Ok(Self { ranges })
    }

    /// The ranges, ascending.
    pub fn ranges(&self) -> &[GfnRange] {
        &self.ranges
    }

    /// Pages in all ranges together.
    pub fn pages(&self) -> u64 {
        self.ranges.iter().map(|range| range.pages).sum()
    }

    /// The position of a frame among all RAM frames, counted from 0 without the holes; `None` if it is not
    /// RAM.
    pub fn index(&self, gfn: u64) -> Option<u64> {
        let mut before = 0;
        for range in &self.ranges {
            if gfn >= range.start && gfn - range.start < range.pages {
                return Some(before + (gfn - range.start));
            }
            before += range.pages;
        }
        None
    }

    /// Whether a frame is RAM.
    pub fn contains(&self, gfn: u64) -> bool {
        self.index(gfn).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, pages: u64) -> GfnRange {
        GfnRange { start, pages }
    }

    #[test]
    fn an_index_counts_ram_without_the_holes() {
        let layout = Layout::new(vec![range(0, 10), range(100, 5)]).unwrap();
        assert_eq!(layout.pages(), 15);
        assert_eq!(layout.index(9), Some(9));
        assert_eq!(layout.index(10), None);
        assert_eq!(layout.index(99), None);
        assert_eq!(layout.index(100), Some(10));
        assert_eq!(layout.index(104), Some(14));
        assert_eq!(layout.index(105), None);
        assert!(!layout.contains(u64::MAX));
    }

    #[test]
    fn senseless_ranges_are_refused() {
        assert_eq!(Layout::new(vec![]), Err(LayoutError::Count(0)));
        assert_eq!(Layout::new(vec![range(0, 1); 9]), Err(LayoutError::Count(9)));
        assert_eq!(Layout::new(vec![range(5, 0)]), Err(LayoutError::Empty(5)));
        assert_eq!(Layout::new(vec![range(5, 5), range(9, 1)]), Err(LayoutError::Order(9)));
        assert_eq!(Layout::new(vec![range(u64::MAX, 2)]), Err(LayoutError::Beyond(u64::MAX)));
        assert_eq!(Layout::new(vec![range(0, MAX_GFN + 1)]), Err(LayoutError::Beyond(0)));
    }
}
