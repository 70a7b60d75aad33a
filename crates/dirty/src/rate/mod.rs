//! How fast a VM dirties its memory: which vCPUs write, which pages, how many different ones in 1, 10 and 100
//! ms, and an estimate of what a migration or protection would cost.
//!
//! A VMM makes a [`Window`] of each stretch of time in which it has found the dirty pages: of an epoch, or of
//! the pages that a [`RateSampler`] fetches every millisecond. It gives them to a [`RateMeter`] of its own,
//! or writes them as lines to a socket, and another process has the meter: KVM answers ioctls only to the
//! process that made the VM, so another program cannot sample by itself. A window as a line of text
//! ([`std::fmt::Display`] and [`std::str::FromStr`]) is the whole protocol:
//!
//! ```text
//! window US vcpus N,N... devices N hot N pages FIRST+COUNT,FIRST...
//! window 1000 vcpus 12,3 devices 1 hot 0 pages 4a0+3,4b1,fffff+10
//! ```
//!
//! Frame numbers and counts of pages are hexadecimal and ascend; the other numbers are decimal. A field
//! without values is `-`. A [`VmLine`] comes first, and readers skip lines that begin with another word.
//!
//! ```
//! use std::time::Duration;
//! use outlive_dirty::Gfn;
//! use outlive_dirty::rate::{Costs, Link, RateMeter, Window};
//!
//! let mut meter = RateMeter::new(1 << 20); // a VM of 4 GiB
//! for millisecond in 0..500 {
//!     let pages = (0..20).map(|page| Gfn(4096 + (millisecond % 25) * 20 + page)).collect();
//!     meter.add(&Window { time: Duration::from_millis(1), vcpus: vec![20], devices: 0, hot: 0, pages });
//! }
//! let report = meter.report();
//! let in_10_ms = report.working_set.in_10_ms.unwrap();
//! assert_eq!((report.vcpus[0].round(), in_10_ms.round()), (20_000.0, 200.0));
//! let link = Link { bytes_per_second: 1e9, downtime: Duration::from_millis(20) };
//! let us = Duration::from_micros;
//! let costs = Costs { fault: us(6), copy: us(1), pause: us(50) };
//! let migration = report.migration(&link, 4 << 30, &costs);
//! assert!(migration.converges && migration.speed > 0.99);
//! ```

mod forecast;
mod sampler;
mod svg;
mod window;

use std::collections::HashSet;
use std::time::Duration;

pub use forecast::{Costs, Link, Migration, Protection};
pub use sampler::RateSampler;
pub use window::{VmLine, Window, WindowError};

use crate::layout::Gfn;

/// Parts of the map of memory: 32 rows of 64.
const CELLS: usize = 2048;
const COLUMNS: usize = 64;

/// Sums up windows. It allocates as it counts, so feed it while the guest runs.
#[derive(Debug)]
pub struct RateMeter {
    time: Duration,
    windows: u64,
    vcpus: Vec<u64>,
    devices: u64,
    hot: u64,
    pages: u64,
    sets: [Span; 3],
    /// Dirty pages of each part of memory.
    cells: Vec<u64>,
    pages_per_cell: u64,
}

/// Different pages in stretches of time of one length.
#[derive(Debug)]
struct Span {
    length: Duration,
    time: Duration,
    pages: HashSet<Gfn>,
    /// For the completed stretches.
    sum: f64,
    count: u64,
}

impl Span {
    fn of(milliseconds: u64) -> Span {
        let length = Duration::from_millis(milliseconds);
        Span { length, time: Duration::ZERO, pages: HashSet::new(), sum: 0.0, count: 0 }
    }

    fn add(&mut self, window: &Window) {
        self.pages.extend(&window.pages);
        self.time += window.time;
        // Windows do not divide a stretch exactly: it ends with the nearest window.
        if self.time + window.time / 2 < self.length {
            return;
        }
        // A much longer or shorter window tells nothing about this length.
        if (self.length * 2 / 3..=self.length * 3 / 2).contains(&self.time) {
            self.sum += self.pages.len() as f64;
            self.count += 1;
        }
        self.pages.clear();
        self.time = Duration::ZERO;
    }

    fn mean(&self) -> Option<f64> {
        (self.count > 0).then(|| self.sum / self.count as f64)
    }
}

impl RateMeter {
    /// For a VM whose frame numbers are below `gfn_space`: [`crate::GlobalLog::gfn_space`].
    pub fn new(gfn_space: u64) -> RateMeter {
        RateMeter {
            time: Duration::ZERO,
            windows: 0,
            vcpus: Vec::new(),
            devices: 0,
            hot: 0,
            pages: 0,
            sets: [1, 10, 100].map(Span::of),
            cells: vec![0; CELLS],
            pages_per_cell: gfn_space.div_ceil(CELLS as u64).max(1),
        }
    }

    /// Counts a window. Pages beyond the frame numbers of the VM count for its last part.
    pub fn add(&mut self, window: &Window) {
        self.time += window.time;
        self.windows += 1;
        if self.vcpus.len() < window.vcpus.len() {
            self.vcpus.resize(window.vcpus.len(), 0);
        }
        self.vcpus.iter_mut().zip(&window.vcpus).for_each(|(sum, pages)| *sum += pages);
        self.devices += window.devices;
        self.hot += window.hot;
        self.pages += window.pages.len() as u64;
        self.sets.iter_mut().for_each(|span| span.add(window));
        for gfn in &window.pages {
            let cell = usize::try_from(gfn.0 / self.pages_per_cell).unwrap_or(CELLS);
            self.cells[cell.min(CELLS - 1)] += 1;
        }
    }

    /// The results of all windows so far.
    pub fn report(&self) -> RateReport {
        let seconds = self.time.as_secs_f64().max(1e-9);
        let [in_1_ms, in_10_ms, in_100_ms] = self.sets.each_ref().map(Span::mean);
        RateReport {
            time: self.time,
            windows: self.windows,
            vcpus: self.vcpus.iter().map(|&pages| pages as f64 / seconds).collect(),
            devices: self.devices as f64 / seconds,
            hot: self.hot as f64 / self.windows.max(1) as f64,
            pages: self.pages as f64 / seconds,
            working_set: WorkingSet { in_1_ms, in_10_ms, in_100_ms },
            map: HeatMap {
                pages_per_cell: self.pages_per_cell,
                cells: self.cells.iter().map(|&pages| pages as f64 / seconds).collect(),
            },
        }
    }
}

/// Different pages written in a stretch of time, as a mean over many. None if the windows were too long to
/// tell.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct WorkingSet {
    /// In a millisecond.
    pub in_1_ms: Option<f64>,
    /// In ten.
    pub in_10_ms: Option<f64>,
    /// In a hundred.
    pub in_100_ms: Option<f64>,
}

/// Rates of a VM: [`RateMeter::report`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct RateReport {
    /// The total time of the windows.
    pub time: Duration,
    /// The number of windows.
    pub windows: u64,
    /// Dirty pages a second by vCPU, each page once a window and vCPU. Empty if their vCPUs were not known.
    pub vcpus: Vec<f64>,
    /// Dirty pages a second that the VMM has marked.
    pub devices: f64,
    /// Hot pages in a window: each window lists them without a trap, and they may not have been written.
    pub hot: f64,
    /// Dirty pages a second of the whole VM, each page once a window.
    pub pages: f64,
    /// The number of different pages.
    pub working_set: WorkingSet,
    /// The places of the dirty pages.
    pub map: HeatMap,
}

/// Dirty pages a second by part of memory: 2048 parts of the same size, by guest address.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct HeatMap {
    /// Size of a part in pages.
    pub pages_per_cell: u64,
    /// Dirty pages a second in each.
    pub cells: Vec<f64>,
}

impl HeatMap {
    /// A picture: a row for every 64 parts, from address 0 at the top; darker parts are written more.
    pub fn to_svg(&self, title: &str) -> String {
        svg::draw(self, title)
    }
}

#[cfg(test)]
mod tests;
