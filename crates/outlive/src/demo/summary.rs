//! The result of a demo, for people and as JSON.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use hdrhistogram::Histogram;
use serde::Serialize;

use super::events::Totals;
use super::status::{grouped, time, time_ns};
use super::verify::Verdict;
use crate::events::{PageCounts, ThreadTime};
use crate::exit;
use crate::link::LinkKind;
use crate::phases::Phase;

/// Exit code after Ctrl-C, as in a shell.
const INTERRUPTED: u8 = 130;

/// One takeover, as the side that took over measured it. Microseconds.
#[derive(Clone, Debug, Default)]
pub(super) struct TakeoverTimes {
    /// From the last byte heard of the old primary until the link was declared dead.
    pub(super) detect_us: u64,
    /// From there until memory and disks were at the last committed checkpoint.
    pub(super) settle_us: u64,
    /// From there until the generation was won.
    pub(super) arbitrate_us: u64,
    /// From there until the vCPUs ran.
    pub(super) restore_us: u64,
    /// From the declaration until the VM's first frame.
    pub(super) first_packet_us: Option<u64>,
    /// From detection to restore.
    pub(super) total_us: u64,
    /// Frames that the guest was given, and that were sent again.
    pub(super) input_given: u64,
    pub(super) output_repeated: u64,
}

/// One of the times, where it is known.
type Part = fn(&TakeoverTimes) -> Option<u64>;

/// Everything that the demo reports at its end.
#[derive(Clone, Debug)]
pub(super) struct Summary {
    /// Why the run stopped early, if it did.
    pub(super) failure: Option<String>,
    /// Ctrl-C or SIGTERM ended it early.
    pub(super) interrupted: bool,
    /// Kills asked for, carried out, and survived.
    pub(super) kills_planned: u32,
    pub(super) kills: u32,
    pub(super) survived: u32,
    /// The judgement on the data.
    pub(super) verdict: Verdict,
    /// What broke connections, one entry for each.
    pub(super) broken: Vec<String>,
    /// Takeovers in their order; more than kills if a live primary was taken for dead.
    pub(super) takeovers: Vec<TakeoverTimes>,
    /// For each kill the longest wait of any client, in microseconds.
    pub(super) gaps_us: Vec<u64>,
    /// The longest wait for a reply in the whole run.
    pub(super) longest_gap_us: u64,
    /// The longest wait for a new connection.
    pub(super) longest_connect_us: u64,
    /// Lasting clients, and connections made by the other kind.
    pub(super) clients: u32,
    pub(super) connections: u64,
    /// The checkpoints.
    pub(super) totals: Totals,
    /// Kind of the arbiter.
    pub(super) arbiter: &'static str,
    /// Name of the dirty tracker.
    pub(super) tracker: String,
    /// What protected the connections between the hosts, as their ends have said; `None` if one has not.
    pub(super) link: Option<LinkKind>,
    /// Bytes of its memory that the guest was made to write before the clients came.
    pub(super) filled_bytes: u64,
    /// Whether the hosts' processes were confined, all of them.
    pub(super) sandbox: bool,
}

#[derive(Serialize)]
struct Json<'a> {
    result: &'a str,
    arbiter: &'a str,
    kills: u32,
    acked: u64,
    lost: u64,
    duplicated: u64,
    broken_connections: usize,
    takeover_ms: Spread,
    client_gap_ms: Spread,
    frame_tail: Tail,
    checkpoints: u64,
    rate_hz: f64,
    pause_us: Pauses,
    dirty_pages: DirtyPages,
    sent_bytes: u64,
    pages: PageCounts,
    tracker: &'a str,
    link: Option<LinkKind>,
    sandbox: bool,
    filled_bytes: u64,
    phases_us: BTreeMap<&'a str, Times>,
    threads: BTreeMap<&'a str, Scheduled>,
}

/// Frames of all takeovers.
#[derive(Serialize)]
struct Tail {
    input_given: u64,
    output_repeated: u64,
}

/// `null` where nothing was measured.
#[derive(Serialize)]
struct Spread {
    p50: Option<f64>,
    p99: Option<f64>,
    max: Option<f64>,
}

#[derive(Serialize)]
struct Pauses {
    p50: u64,
    p99: u64,
    max: u64,
}

/// Microseconds.
#[derive(Serialize)]
struct Times {
    p50: f64,
    p99: f64,
    max: f64,
}

/// How a thread was treated by the scheduler.
#[derive(Serialize)]
struct Scheduled {
    run_ms: f64,
    wait_ms: f64,
    switches: u64,
    /// Waiting for a core, each time it wanted to run.
    wait_us: f64,
}

#[derive(Serialize)]
struct DirtyPages {
    p50: u64,
    p99: u64,
}

impl Summary {
    /// Whether the demo succeeded, as far as it ran.
    pub(super) fn ok(&self) -> bool {
        let Verdict { damage, unreadable, .. } = &self.verdict;
        let complete = self.interrupted || self.survived == self.kills_planned;
        let faithful = damage.lost == 0 && damage.duplicated == 0 && unreadable.is_none();
        self.failure.is_none() && complete && faithful && self.broken.is_empty()
    }

    /// 0, 1 or 130.
    pub(super) fn exit_code(&self) -> u8 {
        match (self.interrupted, self.ok()) {
            (true, _) => INTERRUPTED,
            (false, true) => exit::OK,
            (false, false) => exit::FAILED,
        }
    }

    fn tail(&self) -> Tail {
        Tail {
            input_given: self.takeovers.iter().map(|it| it.input_given).sum(),
            output_repeated: self.takeovers.iter().map(|it| it.output_repeated).sum(),
        }
    }

    /// The result as one line of JSON.
    pub(super) fn to_json(&self) -> String {
        let measured = &self.totals.measured;
        let pause = measured.phase(Phase::Pause);
        let pages = |q: f64| measured.dirty_pages.value_at_quantile(q);
        let json = Json {
            result: if self.ok() { "ok" } else { "failed" },
            arbiter: self.arbiter,
            kills: self.kills,
            acked: self.verdict.acked,
            lost: self.verdict.damage.lost,
            duplicated: self.verdict.damage.duplicated,
            broken_connections: self.broken.len(),
            takeover_ms: spread(self.takeovers.iter().map(|t| t.total_us).collect()),
            client_gap_ms: spread(self.gaps_us.clone()),
            frame_tail: self.tail(),
            checkpoints: self.totals.checkpoints,
            rate_hz: rounded(self.totals.rate_hz),
            pause_us: Pauses {
                p50: pause.value_at_quantile(0.5) / 1_000,
                p99: pause.value_at_quantile(0.99) / 1_000,
                max: pause.max() / 1_000,
            },
            dirty_pages: DirtyPages { p50: pages(0.5), p99: pages(0.99) },
            sent_bytes: self.totals.bytes,
            pages: self.totals.pages,
            tracker: &self.tracker,
            link: self.link,
            sandbox: self.sandbox,
            filled_bytes: self.filled_bytes,
            phases_us: self.phases().map(|(phase, times)| (phase.name(), microseconds(times))).collect(),
            threads: measured.threads.iter().map(|(name, time)| (name.as_str(), scheduled(time))).collect(),
        };
        serde_json::to_string(&json).expect("numbers and strings only")
    }
}

fn microseconds(times: &Histogram<u64>) -> Times {
    let us = |ns: u64| rounded(ns as f64 / 1e3);
    Times {
        p50: us(times.value_at_quantile(0.5)),
        p99: us(times.value_at_quantile(0.99)),
        max: us(times.max()),
    }
}

fn scheduled(time: &ThreadTime) -> Scheduled {
    let ms = |us: u64| rounded(us as f64 / 1e3);
    Scheduled {
        run_ms: ms(time.run_us),
        wait_ms: ms(time.wait_us),
        switches: time.switches,
        wait_us: rounded(time.wait_us as f64 / time.switches.max(1) as f64),
    }
}

/// To one decimal.
fn rounded(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn spread(values_us: Vec<u64>) -> Spread {
    let ms = |us: u64| us as f64 / 1e3;
    let [p50, p99, max] = [50, 99, 100].map(|percent| percentile(&values_us, percent).map(ms));
    Spread { p50, p99, max }
}

/// The value that so many percent of all are below; of two middle values the larger.
fn percentile(values: &[u64], percent: usize) -> Option<u64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable();
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied()
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.headline())?;
        if self.verdict.acked == 0 && self.failure.is_some() {
            // It stopped before there were numbers.
            return Ok(());
        }
        writeln!(f)?;
        let damage = &self.verdict.damage;
        writeln!(f, "  acknowledged writes  {}", grouped(self.verdict.acked))?;
        writeln!(
            f,
            "  lost {}, duplicated {}, broken connections {}",
            grouped(damage.lost),
            grouped(damage.duplicated),
            self.broken.len()
        )?;
        writeln!(
            f,
            "  connections          {} that lasted all the time, {} short ones",
            self.clients,
            grouped(self.connections)
        )?;
        self.write_kills(f)?;
        self.write_checkpoints(f)?;
        self.write_phases(f)?;
        self.write_threads(f)?;
        for finding in damage.findings.iter().chain(&self.broken) {
            writeln!(f, "  ! {finding}")?;
        }
        Ok(())
    }
}

impl Summary {
    fn headline(&self) -> String {
        let kills = format!("{} of {} kills survived", self.survived, self.kills_planned);
        let verdict = &self.verdict;
        let mut line = match (&self.failure, self.ok()) {
            (Some(failure), _) => format!("FAILED: {failure} ({kills})"),
            (None, true) if self.interrupted => format!("Ended early: {kills}; nothing was lost so far."),
            (None, true) => format!("{kills}. Nothing was lost, duplicated or broken."),
            (None, false) => format!("FAILED ({kills})"),
        };
        if let Some(why) = &verdict.unreadable {
            let _ = write!(line, "\nThe data could not be read back, so all of it counts as lost: {why}");
        }
        line
    }

    fn write_kills(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [p50, p99, max] = [50, 99, 100].map(|percent| percentile(&self.gaps_us, percent));
        if let (Some(p50), Some(p99), Some(max)) = (p50, p99, max) {
            writeln!(
                f,
                "  gap at a kill        p50 {}, p99 {}, max {} (longest wait for a reply)",
                time(p50),
                time(p99),
                time(max)
            )?;
        }
        writeln!(
            f,
            "  longest wait         {} for a reply, {} for a new connection",
            time(self.longest_gap_us),
            time(self.longest_connect_us)
        )?;
        let of = |part: Part| {
            let values: Vec<u64> = self.takeovers.iter().filter_map(part).collect();
            (
                percentile(&values, 50).map_or("-".into(), time),
                values.iter().max().copied().map_or("-".into(), time),
            )
        };
        if self.takeovers.is_empty() {
            return Ok(());
        }
        let (p50, max) = of(|t| Some(t.total_us));
        writeln!(f, "  takeover             p50 {p50}, max {max}")?;
        if self.takeovers.len() > self.kills as usize {
            writeln!(
                f,
                "    {} of them without a kill: a live host was taken for dead",
                self.takeovers.len() - self.kills as usize
            )?;
        }
        let parts: [(&str, Part); 5] = [
            ("detection", |t| Some(t.detect_us)),
            ("settling", |t| Some(t.settle_us)),
            ("arbitration", |t| Some(t.arbitrate_us)),
            ("restore", |t| Some(t.restore_us)),
            ("first packet", |t| t.first_packet_us),
        ];
        for (name, part) in parts {
            let (p50, max) = of(part);
            writeln!(f, "    {name:<18} p50 {p50}, max {max}")?;
        }
        let Tail { input_given, output_repeated } = self.tail();
        writeln!(
            f,
            "    frame tail         {} frames given to the guest, {} sent again, in all takeovers",
            grouped(input_given),
            grouped(output_repeated)
        )?;
        Ok(())
    }

    fn write_checkpoints(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Totals { checkpoints, rate_hz, bytes, pages, measured } = &self.totals;
        let dirty_pages = &measured.dirty_pages;
        writeln!(
            f,
            "  checkpoints          {}, {:.0} a second while protected",
            grouped(*checkpoints),
            rate_hz
        )?;
        writeln!(
            f,
            "  dirty pages          p50 {}, p99 {} a checkpoint (tracker: {})",
            dirty_pages.value_at_quantile(0.5),
            dirty_pages.value_at_quantile(0.99),
            self.tracker
        )?;
        let PageCounts { raw, zero, granules, unchanged, .. } = *pages;
        let captured = (raw + zero + granules + unchanged).max(1) as f64;
        let [raw, zero, granules, unchanged] =
            [raw, zero, granules, unchanged].map(|of| of as f64 * 100.0 / captured);
        writeln!(
            f,
            "  sent                 {:.1} MB; pages: {unchanged:.0} % unchanged, {granules:.0} % in parts, \
             {zero:.0} % zero, {raw:.0} % whole",
            *bytes as f64 / 1e6
        )
    }

    /// What was measured of the phases that were.
    fn phases(&self) -> impl Iterator<Item = (Phase, &Histogram<u64>)> {
        let all = Phase::ALL.into_iter().map(|phase| (phase, self.totals.measured.phase(phase)));
        all.filter(|(_, times)| !times.is_empty())
    }

    fn write_phases(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (phase, times) in self.phases() {
            let indent = match phase {
                Phase::Pause | Phase::VcpuPause => "",
                _ => "  ",
            };
            let name = format!("{indent}{}", label(phase));
            let [p50, p99] = [0.5, 0.99].map(|q| time_ns(times.value_at_quantile(q)));
            writeln!(f, "  {name:<20} p50 {p50}, p99 {p99}, max {}", time_ns(times.max()))?;
        }
        Ok(())
    }

    /// The threads that waited longest for a core.
    fn write_threads(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 8;
        let mut threads: Vec<_> = self.totals.measured.threads.iter().collect();
        threads.sort_by_key(|(_, time)| std::cmp::Reverse(time.wait_us));
        for (position, (name, it)) in threads.into_iter().take(SHOWN).enumerate() {
            let title = if position == 0 { "waiting for a core" } else { "" };
            let share = it.wait_us * 100 / (it.run_us + it.wait_us).max(1);
            let each = time_ns(it.wait_us * 1_000 / it.switches.max(1));
            writeln!(f, "  {title:<20} {name:<15} {share} % of the time it wanted to run, {each} each time")?;
        }
        Ok(())
    }
}

/// What a phase is called in the text.
fn label(phase: Phase) -> &'static str {
    match phase {
        Phase::VcpuPause => "seen by a vCPU",
        other => other.name(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::ledger::Damage;
    use super::*;
    use crate::events::Measured;

    fn good() -> Summary {
        let mut totals = Totals::of([]);
        totals.checkpoints = 16_000;
        totals.rate_hz = 812.34;
        totals.bytes = 7_000_000;
        totals.pages = PageCounts { raw: 1, zero: 2, granules: 3, granule_bytes: 4, unchanged: 5 };
        let micros = |from: u64, to: u64| (from..=to).map(|us| (us * 1_000, 1)).collect();
        totals.measured.add(&Measured {
            span_us: 1,
            phases: [("pause".to_owned(), micros(1, 100)), ("rearm".to_owned(), vec![(400, 3)])].into(),
            dirty_pages: (1..=100).map(|value| (value / 2, 1)).collect(),
            threads: [("vcpu0".to_owned(), ThreadTime { run_us: 3_000, wait_us: 1_000, switches: 40 })]
                .into(),
        });
        let (first_packet_us, input_given, output_repeated) = (Some(7), 2, 1);
        let takeover = |total_us| TakeoverTimes {
            total_us,
            first_packet_us,
            input_given,
            output_repeated,
            ..Default::default()
        };
        Summary {
            failure: None,
            interrupted: false,
            kills_planned: 3,
            kills: 3,
            survived: 3,
            verdict: Verdict { acked: 12_345, ..Verdict::default() },
            broken: Vec::new(),
            takeovers: [5_000, 9_000, 7_000].map(takeover).to_vec(),
            gaps_us: vec![300_000, 250_500, 400_000],
            longest_gap_us: 400_000,
            longest_connect_us: 1_020_000,
            clients: 4,
            connections: 700,
            totals,
            arbiter: "file",
            tracker: "ring".into(),
            link: Some(LinkKind::Tls13),
            filled_bytes: 1 << 20,
            sandbox: true,
        }
    }

    #[test]
    fn the_json_has_exactly_the_documented_fields() {
        let json: Value = serde_json::from_str(&good().to_json()).unwrap();
        assert_eq!(
            json,
            json!({
                "result": "ok", "arbiter": "file", "kills": 3, "acked": 12345, "lost": 0, "duplicated": 0, "broken_connections": 0,
                "takeover_ms": {"p50": 7.0, "p99": 9.0, "max": 9.0},
                "client_gap_ms": {"p50": 300.0, "p99": 400.0, "max": 400.0},
                "frame_tail": {"input_given": 6, "output_repeated": 3},
                "checkpoints": 16000, "rate_hz": 812.3, "pause_us": {"p50": 50, "p99": 99, "max": 100},
                "dirty_pages": {"p50": 25, "p99": 49}, "sent_bytes": 7_000_000,
                "pages": {"raw": 1, "zero": 2, "granules": 3, "granule_bytes": 4, "unchanged": 5}, "tracker": "ring",
                "link": "tls1.3", "sandbox": true, "filled_bytes": 1_048_576,
                "phases_us": {
                    "pause": {"p50": 50.2, "p99": 99.3, "max": 100.4},
                    "rearm": {"p50": 0.4, "p99": 0.4, "max": 0.4},
                },
                "threads": {"vcpu0": {"run_ms": 3.0, "wait_ms": 1.0, "switches": 40, "wait_us": 25.0}},
            })
        );
    }

    #[test]
    fn nothing_measured_is_null() {
        let summary = Summary {
            takeovers: Vec::new(),
            gaps_us: Vec::new(),
            kills_planned: 0,
            kills: 0,
            survived: 0,
            ..good()
        };
        let json: Value = serde_json::from_str(&summary.to_json()).unwrap();
        assert_eq!(
            (&json["takeover_ms"]["p50"], &json["client_gap_ms"]["max"]),
            (&Value::Null, &Value::Null)
        );
        assert!(summary.ok());
    }

    #[test]
    fn any_damage_makes_it_fail() {
        let damaged = |damage| Summary { verdict: Verdict { damage, ..Verdict::default() }, ..good() };
        let bad = [
            damaged(Damage { lost: 1, ..Damage::default() }),
            damaged(Damage { duplicated: 1, ..Damage::default() }),
            Summary { broken: vec!["client 1: reset".into()], ..good() },
            Summary { survived: 2, ..good() },
            Summary { failure: Some("no takeover".into()), ..good() },
            Summary {
                verdict: Verdict { unreadable: Some("refused".into()), ..Verdict::default() },
                ..good()
            },
        ];
        assert_eq!((good().ok(), good().exit_code()), (true, 0));
        for summary in bad {
            assert_eq!((summary.ok(), summary.exit_code()), (false, 1), "{summary:?}");
            assert!(summary.to_string().starts_with("FAILED"), "{summary}");
            assert!(summary.to_json().contains(r#""result":"failed""#));
        }
    }

    #[test]
    fn an_interrupted_run_is_judged_by_what_was_done() {
        let summary = Summary { interrupted: true, survived: 1, kills: 1, ..good() };
        assert_eq!((summary.ok(), summary.exit_code()), (true, 130));
        assert!(summary.to_string().starts_with("Ended early: 1 of 3 kills survived"));
    }

    #[test]
    fn the_text_names_every_number() {
        let text = good().to_string();
        for part in [
            "3 of 3 kills",
            "12 345",
            "p50 300 ms, p99 400 ms, max 400 ms",
            "p50 7.0 ms, max 9.0 ms",
            "812 a second",
            "6 frames given to the guest, 3 sent again",
            "pause                p50 50 µs, p99 99 µs, max 100 µs",
            "rearm              p50 0.4 µs",
            "vcpu0           25 % of the time it wanted to run, 25 µs each time",
            "ring",
        ] {
            assert!(text.contains(part), "{part} is missing in:\n{text}");
        }
    }
}
