//! The output: a table redrawn in place, or a line a second if the output is not a terminal.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use outlive_dirty::{DirtyKind, TrackerStats};

use crate::guest::Guest;
use crate::options::Options;

/// The pages of an epoch.
pub(crate) struct Measured {
    /// Pages in the ring of each vCPU.
    pub(crate) vcpus: Vec<usize>,
    /// Pages of the epoch, each once.
    pub(crate) pages: usize,
    /// Those of them that are hot: reported unseen.
    pub(crate) hot: usize,
    /// To harvest and re-arm.
    pub(crate) took: Duration,
}

/// Sums since the last time something was printed.
struct Sums {
    since: Instant,
    vcpus: Vec<usize>,
    pages: usize,
    hot: usize,
    took: Vec<Duration>,
    stats: TrackerStats,
}

impl Sums {
    fn new(vcpus: usize, stats: TrackerStats) -> Sums {
        Sums { since: Instant::now(), vcpus: vec![0; vcpus], pages: 0, hot: 0, took: Vec::new(), stats }
    }
}

pub(crate) struct Table {
    title: Vec<String>,
    /// The name for pages that are neither in a vCPU's ring nor hot.
    others: &'static str,
    terminal: bool,
    begin: Instant,
    sums: Sums,
    /// Lines on the screen, to go back over.
    lines: usize,
}

const CLEAR_LINE: &str = "\x1b[K";
/// A line longer than the terminal is wide must not become two.
const NO_WRAP: &str = "\x1b[?7l";
const WRAP: &str = "\x1b[?7h";
/// Letters in the longest bar.
const BAR: f64 = 40.0;

impl Table {
    pub(crate) fn new(guest: &Guest, options: &Options) -> Table {
        let Guest { backend, tracker, .. } = guest;
        let hot = match (tracker.hot_rule(), backend.self_test()) {
            (Some(rule), Some(test)) => format!(
                "{} traps at most {} epochs apart (a trap costs {:.1} µs, a copy {:.1} µs)",
                rule.traps,
                rule.max_gap,
                f64::from(test.fault_ns) / 1e3,
                f64::from(test.copy_ns) / 1e3
            ),
            _ => "off".into(),
        };
        let title = vec![
            format!("guest:     vCPUs {}, memory {} MiB", options.vcpus, options.memory >> 20),
            format!("back end:  {} ({})", backend.kind(), backend.reason()),
            format!("hot pages: {hot}"),
        ];
        let others = if backend.kind() == DirtyKind::Ring { "  no vCPU" } else { "  log" };
        Table {
            title,
            others,
            terminal: io::stdout().is_terminal(),
            begin: Instant::now(),
            sums: Sums::new(options.vcpus, TrackerStats::default()),
            lines: 0,
        }
    }

    /// Adds an epoch, and prints if it is time. False if nobody reads the output any more.
    pub(crate) fn epoch(&mut self, measured: &Measured, stats: &TrackerStats) -> io::Result<bool> {
        for (sum, pages) in self.sums.vcpus.iter_mut().zip(&measured.vcpus) {
            *sum += pages;
        }
        self.sums.pages += measured.pages;
        self.sums.hot += measured.hot;
        self.sums.took.push(measured.took);
        let period = Duration::from_millis(if self.terminal { 250 } else { 1000 });
        if self.sums.since.elapsed() < period {
            return Ok(true);
        }
        match self.print(stats) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
            printed => printed.map(|()| true),
        }
    }

    /// Prints everything since the last time.
    pub(crate) fn end(&mut self, stats: &TrackerStats) -> io::Result<()> {
        if self.sums.took.is_empty() {
            return Ok(());
        }
        match self.print(stats) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            printed => printed,
        }
    }

    fn print(&mut self, stats: &TrackerStats) -> io::Result<()> {
        let vcpus = self.sums.vcpus.len();
        let sums = std::mem::replace(&mut self.sums, Sums::new(vcpus, *stats));
        let shown = Shown::of(sums, stats);
        if self.terminal { self.draw(&shown) } else { self.line(&shown) }
    }

    fn draw(&mut self, shown: &Shown) -> io::Result<()> {
        let mut lines = self.title.clone();
        lines.extend([
            String::new(),
            format!(
                "{:9.1} epochs/s     harvest + rearm: p50 {:.1} µs, p99 {:.1} µs",
                shown.rate, shown.p50, shown.p99
            ),
            String::new(),
            "           pages/epoch".into(),
        ]);
        let most = shown.vcpus.iter().copied().chain([shown.others, shown.hot]).fold(1.0, f64::max);
        let bar = |pages: f64| "█".repeat((pages / most * BAR).round() as usize);
        let row = |name: String, pages: f64| format!("{name:10} {pages:11.1}  {}", bar(pages));
        lines.extend(
            shown.vcpus.iter().enumerate().map(|(index, &pages)| row(format!("  vCPU {index}"), pages)),
        );
        lines.push(row(self.others.into(), shown.others));
        lines.push(row("  hot".into(), shown.hot));
        lines.push(format!("  {:8} {:11.1}  each page once", "in all", shown.pages));
        lines.push(String::new());
        lines.push(format!("{:9.0} traps avoided a second", shown.avoided));

        let mut out = io::stdout().lock();
        if self.lines > 0 {
            write!(out, "\x1b[{}A", self.lines)?;
        }
        write!(out, "{NO_WRAP}")?;
        for line in &lines {
            writeln!(out, "{line}{CLEAR_LINE}")?;
        }
        write!(out, "{WRAP}")?;
        self.lines = lines.len();
        out.flush()
    }

    fn line(&mut self, shown: &Shown) -> io::Result<()> {
        let mut out = io::stdout().lock();
        if self.lines == 0 {
            writeln!(out, "{}", self.title.join("\n"))?;
            self.lines = self.title.len();
        }
        let vcpus: Vec<_> = shown.vcpus.iter().map(|pages| format!("{pages:.0}")).collect();
        writeln!(
            out,
            "{:4.0} s: {:.1} epochs/s; pages/epoch {:.1} (vCPUs {}, hot {:.1}); harvest + rearm p50 {:.1} µs, \
             p99 {:.1} µs; {:.0} traps/s avoided",
            self.begin.elapsed().as_secs_f64(),
            shown.rate,
            shown.pages,
            vcpus.join(" "),
            shown.hot,
            shown.p50,
            shown.p99,
            shown.avoided,
        )?;
        out.flush()
    }
}

/// Means and percentiles, ready to be printed.
struct Shown {
    /// Epochs a second.
    rate: f64,
    vcpus: Vec<f64>,
    /// Pages that are neither in a vCPU's ring nor hot.
    others: f64,
    hot: f64,
    pages: f64,
    /// A second.
    avoided: f64,
    /// µs.
    p50: f64,
    p99: f64,
}

impl Shown {
    fn of(mut sums: Sums, stats: &TrackerStats) -> Shown {
        let epochs = sums.took.len() as f64;
        sums.took.sort_unstable();
        let percentile = |percent: usize| sums.took[sums.took.len() * percent / 100].as_secs_f64() * 1e6;
        let vcpus: Vec<f64> = sums.vcpus.iter().map(|&pages| pages as f64 / epochs).collect();
        let (pages, hot) = (sums.pages as f64 / epochs, sums.hot as f64 / epochs);
        let seconds = sums.since.elapsed().as_secs_f64();
        Shown {
            rate: epochs / seconds,
            others: (pages - hot - vcpus.iter().sum::<f64>()).max(0.0),
            avoided: stats.traps_avoided.saturating_sub(sums.stats.traps_avoided) as f64 / seconds,
            vcpus,
            hot,
            pages,
            p50: percentile(50),
            p99: percentile(99),
        }
    }
}
