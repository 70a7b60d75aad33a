//! The time line of a VM: its last five minutes, and what of them falls into each column of a terminal.

use super::text::{bytes, count, micros, moment};
use crate::figures::{Mark, Point, Role, Spread};

/// How much is shown, in milliseconds.
const WINDOW_MS: i64 = 300_000;
/// The least that a column stands for: points come about once a second, and each column should have one.
const LEAST_MS: i64 = 2_000;
/// The most points of a VM that are kept.
const MOST: usize = 600;
/// For how long the last figures are those of now: a busy host may be late.
const NOW_MS: i64 = 6_000;
/// Steps of a character: `▁` is one, `█` are all.
pub(super) const STEPS: u16 = 8;

/// What is kept of a VM.
#[derive(Clone, Debug, Default)]
pub(crate) struct Lanes {
    points: Vec<(i64, Point)>,
    /// What its process could not say itself.
    marks: Vec<(i64, Sign)>,
}

/// Something that happened, as a sign.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sign {
    pub(super) sign: char,
    pub(super) bad: bool,
    pub(super) what: &'static str,
}

/// What happened to a VM, with its sign. A column has the first of its time.
pub(super) const SIGNS: [(Mark, Sign); 8] = [
    (Mark::Takeover, Sign { sign: '▲', bad: false, what: "the VM was taken over here" }),
    (
        Mark::HostFault,
        Sign { sign: '✕', bad: true, what: "KVM, a disk or the network of this host has failed" },
    ),
    (Mark::GuestPanic, Sign { sign: '!', bad: true, what: "the guest's kernel has panicked" }),
    (Mark::ProtectionLost, Sign { sign: '▼', bad: true, what: "the protection was lost" }),
    (Mark::LinkLost, Sign { sign: '▽', bad: true, what: "the other host was lost" }),
    (Mark::ArbiterLost, Sign { sign: '?', bad: true, what: "the arbiter was lost" }),
    (Mark::HandOver, Sign { sign: '→', bad: false, what: "the VM was handed over to the other host" }),
    (Mark::GuestRestart, Sign { sign: '↻', bad: false, what: "the guest has restarted" }),
];
/// Of a process that has begun, and of one that has ended.
pub(super) const BEGUN: Sign = Sign { sign: '•', bad: false, what: "the VM's process has begun" };
pub(super) const ENDED: Sign = Sign { sign: '✕', bad: true, what: "the VM's process has ended" };

/// One kind of figure.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane {
    pub(super) title: &'static str,
    of: fn(&Point) -> Option<Spread>,
    /// The lowest value of the scale, and the highest at least; it grows by factors of `step`.
    low: u64,
    high: u64,
    step: f64,
    pub(super) write: fn(u64) -> String,
    pub(super) legend: &'static str,
}

pub(super) const PAUSE: Lane = Lane {
    title: "Pause",
    of: |it| it.pause_us,
    low: 10,
    high: 10_000,
    step: 10.0,
    write: micros,
    legend: "for how long a checkpoint stopped the guest",
};
pub(super) const DIRTY: Lane = Lane {
    title: "Dirty pages",
    of: |it| it.dirty_pages,
    low: 1,
    high: 1_000,
    step: 10.0,
    write: count,
    legend: "what the guest changed between two checkpoints",
};
pub(super) const COMMIT: Lane = Lane {
    title: "Commit",
    of: |it| it.commit_us,
    low: 100,
    high: 100_000,
    step: 10.0,
    write: micros,
    legend: "until the standby had the whole checkpoint",
};
pub(super) const HELD: Lane = Lane {
    title: "Held output",
    of: |it| it.held_bytes,
    low: 64,
    high: 1 << 18,
    step: 16.0,
    write: bytes,
    legend: "what the guest had sent and waited for that",
};
pub(super) const APPLY: Lane = Lane {
    title: "Apply",
    of: |it| it.apply_us,
    low: 10,
    high: 100_000,
    step: 10.0,
    write: micros,
    legend: "how long this host, as the standby, took to apply one",
};
/// All of them, for those who look up what they mean.
pub(super) const ALL: [Lane; 5] = [PAUSE, DIRTY, COMMIT, HELD, APPLY];

/// A column of a lane, in steps from below: the mean, and what no value was above.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bar {
    pub(super) mean: u16,
    pub(super) most: u16,
}

/// A column of what became of the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Guard {
    /// Nothing is known.
    #[default]
    Unknown,
    /// It was protected all the time.
    Protected,
    /// It was not, at some time.
    Bare,
    /// It ran at the other host.
    Away,
}

/// A lane, drawn.
#[derive(Debug)]
pub(super) struct Drawn {
    /// The columns, oldest first.
    pub(super) bars: Vec<Option<Bar>>,
    /// What the highest step is worth.
    pub(super) top: u64,
    /// The last value, if there is one now.
    pub(super) last: Option<Spread>,
}

impl Lanes {
    /// Takes new points; `anew`: they are all there are.
    pub(super) fn take(&mut self, points: &[Point], anew: bool) {
        if anew {
            self.points.clear();
        }
        let timed = |it: &Point| Some((moment(&it.time)?, it.clone()));
        self.points.extend(points.iter().rev().take(MOST).rev().filter_map(timed));
        let surplus = self.points.len().saturating_sub(MOST);
        self.points.drain(..surplus);
    }

    /// Takes what its process cannot say.
    pub(super) fn mark(&mut self, at: i64, sign: Sign) {
        if !self.marks.contains(&(at, sign)) {
            self.marks.push((at, sign));
            let surplus = self.marks.len().saturating_sub(MOST);
            self.marks.drain(..surplus);
        }
    }

    /// The lanes that tell of the VM, the most important ones first.
    pub(super) fn lanes(&self) -> Vec<Lane> {
        let first: &[Lane] = match self.points.last() {
            None => return Vec::new(),
            Some((_, point)) if point.role == Role::Standby => &[APPLY],
            Some(_) => &[PAUSE, DIRTY, COMMIT, HELD],
        };
        let has = |lane: &Lane| self.points.iter().any(|(_, point)| (lane.of)(point).is_some());
        let is_new = |lane: &Lane| first.iter().all(|it| it.title != lane.title);
        let more = ALL.into_iter().filter(|lane| is_new(lane) && has(lane));
        first.iter().copied().chain(more).collect()
    }

    /// A lane in so many columns, each so many steps high, as of `now`.
    pub(super) fn draw(&self, lane: &Lane, columns: u16, steps: u16, now: i64) -> Drawn {
        let line = Line::new(columns, now);
        let mut found: Vec<Option<Spread>> = vec![None; columns.into()];
        let mut largest = lane.high;
        for (at, point) in &self.points {
            let (Some(column), Some(spread)) = (line.column(*at), (lane.of)(point)) else { continue };
            largest = largest.max(spread.most.unwrap_or(spread.mean)).max(spread.mean);
            found[column] = Some(found[column].map_or(spread, |it| worse(it, spread)));
        }
        let factor = |value: u64| (value as f64 / lane.low as f64).ln() / lane.step.ln();
        let lines = (factor(largest) - 1e-9).ceil();
        let level = |value: u64| {
            let part = (factor(value.max(lane.low)) / lines).clamp(0.0, 1.0);
            // Whatever was counted can be seen.
            ((part * f64::from(steps)).round() as u16).max(1)
        };
        let bar = |it: Spread| {
            let mean = level(it.mean);
            Bar { mean, most: it.most.map_or(steps, level).max(mean) }
        };
        let last = self.points.last().filter(|(at, _)| now - at < NOW_MS).and_then(|(_, it)| (lane.of)(it));
        let top = (lane.low as f64 * lane.step.powf(lines)).round() as u64;
        Drawn { bars: found.into_iter().map(|it| it.map(bar)).collect(), top, last }
    }

    /// What became of the VM, and what happened, in so many columns.
    pub(super) fn guard(&self, columns: u16, now: i64) -> Vec<(Guard, Option<Sign>)> {
        let line = Line::new(columns, now);
        let mut found = vec![(Guard::Unknown, None); columns.into()];
        for (at, point) in &self.points {
            let Some(column) = line.column(*at) else { continue };
            let (guard, sign) = &mut found[column];
            *guard = match *guard {
                _ if !point.protected => Guard::Bare,
                Guard::Bare => Guard::Bare,
                _ if point.role == Role::Standby => Guard::Away,
                _ => Guard::Protected,
            };
            let of = |mark: &Mark| SIGNS.iter().find(|(it, _)| it == mark).map(|(_, sign)| *sign);
            *sign = sign.or_else(|| point.marks.iter().find_map(of));
        }
        for (at, mark) in &self.marks {
            if let Some(column) = line.column(*at) {
                found[column].1.get_or_insert(*mark);
            }
        }
        found
    }
}

/// Of two times in one column.
fn worse(one: Spread, other: Spread) -> Spread {
    let most = one.most.zip(other.most).map(|(one, other)| one.max(other));
    Spread { mean: one.mean.max(other.mean), most }
}

/// Which time falls into which column. Columns begin at whole numbers of their length, so that nothing flickers as time
/// goes on.
struct Line {
    columns: i64,
    long: i64,
    last: i64,
}

impl Line {
    fn new(columns: u16, now: i64) -> Self {
        let columns = i64::from(columns);
        let long = (WINDOW_MS / columns.max(1)).max(LEAST_MS);
        Self { columns, long, last: now.div_euclid(long) }
    }

    fn column(&self, at: i64) -> Option<usize> {
        let before = self.last.checked_sub(at.div_euclid(self.long))?;
        let column = (self.columns - 1).checked_sub(before)?;
        usize::try_from(column).ok().filter(|it| *it < self.columns as usize)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::Point;

    fn point(second: i64, pause: u64, most: Option<u64>) -> Point {
        let at = std::time::UNIX_EPOCH + std::time::Duration::from_secs(second as u64);
        Point {
            time: humantime::format_rfc3339_millis(at).to_string(),
            span_ms: 1000,
            role: Role::Primary,
            protected: second != 1_000,
            active: true,
            checkpoints: 1,
            pause_us: Some(Spread { mean: pause, most }),
            commit_us: None,
            dirty_pages: None,
            held_bytes: None,
            apply_us: None,
            sent_bytes: 0,
            guest_held_ms: 0,
            marks: if second == 1_000 { vec![Mark::LinkLost, Mark::Takeover] } else { Vec::new() },
        }
    }

    #[test]
    fn figures_fall_into_the_columns_of_their_time() {
        let mut lanes = Lanes::default();
        let points: Vec<_> = (701..=1_000).map(|it| point(it, 100, Some(1_000))).collect();
        lanes.take(&points, true);
        let drawn = lanes.draw(&PAUSE, 60, 24, 1_000_000);
        assert_eq!((drawn.bars.len(), drawn.top), (60, 10_000));
        assert!(drawn.bars.iter().all(|it| *it == Some(Bar { mean: 8, most: 16 })), "{drawn:?}");
        assert_eq!(drawn.last, Some(Spread { mean: 100, most: Some(1_000) }));
        // Some seconds later they have moved, and are no more those of now.
        let later = lanes.draw(&PAUSE, 60, 24, 1_020_000);
        assert_eq!((later.last, &later.bars[56..]), (None, &[None; 4][..]));
        assert!(later.bars[..56].iter().all(Option::is_some));
        // A value beyond all bounds, and one beyond the scale.
        lanes.take(&[point(1_001, 2_000_000, None)], false);
        let high = lanes.draw(&PAUSE, 60, 24, 1_001_000);
        assert_eq!((high.top, high.bars[59].unwrap().most), (10_000_000, 24));
        lanes.take(&[point(1_002, 1, Some(1))], true);
        assert_eq!(lanes.draw(&PAUSE, 60, 8, 1_002_000).bars[59], Some(Bar { mean: 1, most: 1 }));
    }

    #[test]
    fn what_happened_is_where_it_happened() {
        let mut lanes = Lanes::default();
        lanes.take(&(990..=1_010).map(|it| point(it, 1, None)).collect::<Vec<_>>(), true);
        lanes.mark(1_006_000, BEGUN);
        lanes.mark(1_006_000, BEGUN);
        let guard = lanes.guard(60, 1_010_000);
        let told: Vec<_> = guard[55..].iter().map(|(guard, sign)| (*guard, sign.map(|it| it.sign))).collect();
        let good = Guard::Protected;
        assert_eq!(
            told,
            [(good, None), (good, None), (Guard::Bare, Some('▽')), (good, Some('•')), (good, None)]
        );
        assert_eq!(lanes.guard(0, 0), []);
    }

    #[test]
    fn a_node_that_tells_without_end_is_not_kept() {
        let mut lanes = Lanes::default();
        let many: Vec<_> = (0..2 * MOST as i64).map(|it| point(it, 1, None)).collect();
        lanes.take(&many, true);
        lanes.take(&many, false);
        (0..2_000).for_each(|it| lanes.mark(it, ENDED));
        assert_eq!((lanes.points.len(), lanes.marks.len()), (MOST, MOST));
        // Times that cannot be are nowhere.
        lanes.mark(i64::MAX, BEGUN);
        lanes.mark(i64::MIN, BEGUN);
        assert!(lanes.guard(60, 0).iter().filter(|(_, sign)| *sign == Some(BEGUN)).count() == 0);
        lanes.draw(&PAUSE, 60, 8, i64::MAX);
    }
}
