//! The text, read back by a reader of its own; the names in documents, alerts and dashboard; and promtool, where it is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use super::ask::{Asker, Places, Process, Scrape};
use super::families::{FAMILIES, Kind, Unit};
use super::histogram::{Buckets, Histogram, PAUSES, SIZES, TIMES};
use super::report::{ArbiterReport, AuditedDisk, Frames, Loss, Report, Running};
use super::tally::Takeovers;
use super::text::{Format, text};
use crate::events::{PageCounts, Role};
use crate::status::Standing;

fn of(bounds: &'static [u64], values: &[u64]) -> Buckets {
    let histogram = Histogram::new(bounds);
    values.iter().for_each(|&value| histogram.record(value));
    histogram.read()
}

/// A primary of which everything is known.
fn primary() -> Report {
    let base = Standing::new(Role::Primary, Some("web"), "why")
        .report(Some(UNIX_EPOCH + Duration::from_secs(1_000_600)));
    let mut report = Report {
        release: "1.2".into(),
        vm: Some("we\"b\\".into()),
        id: Some("00ff".into()),
        protected: true,
        active: true,
        fencing: Some(7.5),
        waits: true,
        generation: Some(3),
        checkpoint: Some(812),
        since_commit: Some(0.003),
        in_flight: Some(2),
        bytes_in_flight: Some(12_000),
        loss_of_this_host: Loss { survived: true, lost: Some(0.003) },
        loss_of_other_host: Loss { survived: false, lost: Some(0.0) },
        arbiter: Some(ArbiterReport { answered: Some(61.0), lost: Some(51.0) }),
        standby_without_arbiter: Some(9.0),
        tls: Some(true),
        takeovers: Takeovers {
            total: of(TIMES, &[12_000_000]),
            settle: of(TIMES, &[400_000]),
            ..Takeovers::default()
        },
        running: Some(Running {
            checkpoints: 812,
            bytes: 5_000,
            guest_held_ns: 1_500_000_000,
            pages: PageCounts { raw: 3, zero: 4, granules: 5, granule_bytes: 600, unchanged: 7 },
            frames: Some(Frames {
                held: 1,
                held_bytes: 60,
                released: 2,
                passed: 3,
                discarded: 4,
                refused: 5,
                full: 6,
            }),
            pause: of(PAUSES, &[171_000, 448_000, 30_000_000]),
            vcpu_pause: of(PAUSES, &[1]),
            commit: of(TIMES, &[900_000]),
            dirty_pages: of(super::COUNTS, &[22, 44]),
            checkpoint_bytes: of(SIZES, &[5_000]),
            backlog: of(super::COUNTS, &[1]),
            backlog_bytes: of(SIZES, &[5_000]),
            held_frames: of(super::COUNTS, &[0]),
            held_bytes: of(SIZES, &[0]),
            phases: vec![("copy".into(), of(TIMES, &[7_000])), ("stop".into(), of(TIMES, &[]))],
            disks: vec![
                AuditedDisk { disk: 0, size: 1 << 30, compared: 5 << 16, left_out: 1 << 16, age: Some(2.5) },
                AuditedDisk { disk: 3, size: 1 << 20, age: None, ..AuditedDisk::default() },
            ],
        }),
        ..base
    };
    report.counted.guest_restarts = 5;
    report.counted.disk_faults = 1;
    report
}

fn scrape() -> Scrape {
    let process = |name: &str, report| Process {
        socket: format!("/run/outlive/{name}.sock").into(),
        vm: Result::as_ref(&report).map_or(name.to_owned(), |it: &Report| it.vm.clone().unwrap_or_default()),
        took: Duration::from_millis(2),
        report,
    };
    let standby = Standing::new(Role::Standby, Some("db"), "why").report(None);
    let dead = Report { format: 9, ..standby.clone() }.check().unwrap_err();
    Scrape {
        processes: vec![
            process("web", Ok(primary())),
            process("db", Ok(standby)),
            process("dead", Err(dead.into())),
        ],
        folders: vec![("/run/outlive".into(), true)],
        ignored: 0,
        at: UNIX_EPOCH + Duration::from_secs(1_000_000),
    }
}

type Labels = BTreeMap<String, String>;

/// What a reader finds in a text: types by name, and numbers by name and labels.
#[derive(Default)]
pub(super) struct Read {
    types: BTreeMap<String, String>,
    units: BTreeMap<String, String>,
    helps: BTreeSet<String>,
    samples: Vec<(String, Labels, f64)>,
    ended: bool,
}

impl Read {
    /// Reads by the grammar of the formats, and by nothing of ours.
    pub(super) fn new(text: &str) -> Self {
        let mut read = Self::default();
        assert!(text.ends_with('\n'));
        for line in text.lines() {
            assert!(!read.ended, "nothing follows the end");
            if let Some(about) = line.strip_prefix("# ") {
                let words: Vec<_> = about.splitn(3, ' ').collect();
                match words[..] {
                    ["EOF"] => read.ended = true,
                    ["TYPE", name, kind] => {
                        assert!(
                            read.types.insert(name.into(), kind.into()).is_none(),
                            "{name} has two types"
                        );
                    }
                    ["UNIT", name, unit] => drop(read.units.insert(name.into(), unit.into())),
                    ["HELP", name, _] => assert!(read.helps.insert(name.into()), "{name} is explained twice"),
                    _ => panic!("{line}"),
                }
            } else {
                read.samples.push(sample(line));
            }
        }
        read
    }

    pub(super) fn value(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        let is =
            |has: &Labels| labels.iter().all(|(name, value)| has.get(*name).is_some_and(|it| it == value));
        let found: Vec<_> = self.samples.iter().filter(|(it, has, _)| it == name && is(has)).collect();
        assert_eq!(found.len(), 1, "{name} {labels:?}: {found:?}");
        found[0].2
    }
}

fn sample(line: &str) -> (String, Labels, f64) {
    let end = line.find(['{', ' ']).unwrap();
    let (name, mut rest) = line.split_at(end);
    let mut labels = Labels::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (label, value) = rest.split_once("=\"").unwrap();
            let (mut text, mut chars) = (String::new(), value.char_indices());
            let after = loop {
                match chars.next().unwrap() {
                    (at, '"') => break at + 1,
                    (_, '\\') => text.push(match chars.next().unwrap().1 {
                        'n' => '\n',
                        other => other,
                    }),
                    (_, other) => text.push(other),
                }
            };
            assert!(labels.insert(label.into(), text).is_none(), "{label} twice: {line}");
            rest = value[after..].trim_start_matches(',');
        }
        rest = &rest[1..];
    }
    let value = rest.trim();
    let value =
        if value == "+Inf" { f64::INFINITY } else { value.parse().unwrap_or_else(|_| panic!("{line}")) };
    (name.into(), labels, value)
}

#[test]
fn a_reader_finds_what_was_told_in_base_units() {
    for format in [Format::Prometheus, Format::OpenMetrics] {
        let read = Read::new(&text(scrape(), format));
        assert_eq!(read.ended, format == Format::OpenMetrics);
        let web = ("vm", "we\"b\\");
        let of_web = |name: &str, more: &[(&str, &str)]| {
            read.value(name, &[&[web, ("role", "primary")], more].concat())
        };
        assert_eq!(of_web("outlive_protected", &[]), 1.0);
        assert_eq!(read.value("outlive_protected", &[("vm", "db"), ("role", "standby")]), 0.0);
        assert_eq!(of_web("outlive_loss_survived", &[("host", "this")]), 1.0);
        assert_eq!(of_web("outlive_loss_survived", &[("host", "other")]), 0.0);
        assert_eq!(of_web("outlive_loss_lost_seconds", &[("host", "this")]), 0.003);
        assert_eq!(of_web("outlive_commit_age_seconds", &[]), 0.003);
        assert_eq!(of_web("outlive_checkpoints_in_flight", &[]), 2.0);
        assert_eq!(of_web("outlive_in_flight_bytes", &[]), 12_000.0);
        assert_eq!(of_web("outlive_certificate_expiry_seconds", &[]), 600.0);
        assert_eq!(of_web("outlive_checkpoints_total", &[]), 812.0);
        assert_eq!(of_web("outlive_guest_held_seconds_total", &[]), 1.5);
        assert_eq!(of_web("outlive_pages_total", &[("codec", "unchanged")]), 7.0);
        assert_eq!(of_web("outlive_page_bytes_total", &[("codec", "raw")]), 3.0 * 4096.0);
        assert_eq!(of_web("outlive_page_bytes_total", &[("codec", "granules")]), 600.0);
        assert_eq!(of_web("outlive_output_frames_total", &[("fate", "refused")]), 5.0);
        assert_eq!(of_web("outlive_arbiter_answer_age_seconds", &[]), 61.0);
        assert_eq!(of_web("outlive_arbiter_lost", &[]), 1.0);
        assert_eq!(of_web("outlive_standby_arbiter_lost_duration_seconds", &[]), 9.0);
        assert_eq!(of_web("outlive_fencing_duration_seconds", &[]), 7.5);
        assert_eq!(of_web("outlive_guest_restarts_total", &[]), 5.0);
        assert_eq!(of_web("outlive_host_faults_total", &[("part", "disk")]), 1.0);
        assert_eq!(of_web("outlive_host_faults_total", &[("part", "network")]), 0.0);
        assert_eq!(of_web("outlive_pause_seconds_count", &[]), 3.0);
        assert!((of_web("outlive_pause_seconds_sum", &[]) - 0.030_619).abs() < 1e-12);
        let up_to = |le: f64| {
            let is = |(name, labels, _): &&(String, Labels, f64)| {
                name == "outlive_pause_seconds_bucket"
                    && labels["le"].parse::<f64>().is_ok_and(|it| (it - le).abs() < 1e-12)
            };
            read.samples.iter().find(is).unwrap_or_else(|| panic!("no bucket up to {le}")).2
        };
        assert_eq!(
            [up_to(15e-5), up_to(2e-4), up_to(5e-4), up_to(0.02), up_to(0.03)],
            [0.0, 1.0, 2.0, 2.0, 3.0]
        );
        assert_eq!(of_web("outlive_takeover_step_seconds_sum", &[("step", "settle")]), 0.000_4);
        assert_eq!(of_web("outlive_checkpoint_phase_seconds_count", &[("phase", "copy")]), 1.0);
        assert_eq!(of_web("outlive_audit_disk_bytes_total", &[("disk", "0")]), 327_680.0);
        assert_eq!(of_web("outlive_audit_disk_left_out_bytes_total", &[("disk", "0")]), 65_536.0);
        assert_eq!(of_web("outlive_audit_disk_size_bytes", &[("disk", "3")]), 1_048_576.0);
        // The other one has no standby that could compare it.
        assert_eq!(read.value("outlive_audit_disk_compared_age_seconds", &[web]), 2.5);
        // Who does not answer has one number for that, and no other that could be taken for its own.
        assert_eq!(read.value("outlive_up", &[("vm", "dead")]), 0.0);
        let of_dead: Vec<_> = read
            .samples
            .iter()
            .filter(|(_, labels, _)| labels.get("vm").is_some_and(|it| it == "dead"))
            .collect();
        assert_eq!(of_dead.len(), 2, "{of_dead:?}");
    }
}

/// Whatever is told, the text keeps the rules of the formats.
#[test]
fn the_text_keeps_the_rules() {
    for format in [Format::Prometheus, Format::OpenMetrics] {
        let read = Read::new(&text(scrape(), format));
        let mut series = BTreeSet::new();
        let mut histograms: BTreeMap<(String, Labels), Vec<(f64, f64)>> = BTreeMap::new();
        for (name, labels, value) in &read.samples {
            assert!(series.insert((name, labels)), "{name} {labels:?} is there twice");
            let (family, kind) = family(&read, name);
            assert!(read.helps.contains(&family), "{family} is not explained");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{name}");
            assert!(kind != "counter" || *value >= 0.0);
            if let Some(histogram) = name.strip_suffix("_bucket") {
                let mut labels = labels.clone();
                let le = labels.remove("le").unwrap();
                let le = if le == "+Inf" { f64::INFINITY } else { le.parse().unwrap() };
                histograms.entry((histogram.into(), labels)).or_default().push((le, *value));
            }
        }
        assert!(histograms.len() > 10);
        for ((name, labels), buckets) in histograms {
            assert!(buckets.is_sorted_by(|a, b| a.0 < b.0 && a.1 <= b.1), "{name} {labels:?}: {buckets:?}");
            let (le, all) = *buckets.last().unwrap();
            let is = |it: &&(String, Labels, f64)| it.0 == format!("{name}_count") && it.1 == labels;
            assert_eq!(
                (le, Some(all)),
                (f64::INFINITY, read.samples.iter().find(is).map(|it| it.2)),
                "{name}"
            );
        }
        for (name, unit) in &read.units {
            assert!(name.ends_with(&format!("_{unit}")), "{name} is in {unit}");
        }
    }
}

/// The name and the type of a sample's family.
fn family(read: &Read, name: &str) -> (String, String) {
    let endings = ["", "_total", "_bucket", "_sum", "_count"];
    let families = endings.iter().filter_map(|ending| name.strip_suffix(ending));
    let found = families.filter_map(|family| Some((family.to_owned(), read.types.get(family)?.clone())));
    found.max_by_key(|(family, _)| family.len()).unwrap_or_else(|| panic!("{name} has no type"))
}

#[test]
fn names_are_in_base_units() {
    let names: BTreeSet<_> = FAMILIES.iter().map(|it| it.full_name()).collect();
    assert_eq!(names.len(), FAMILIES.len(), "two metrics have one name");
    for family in FAMILIES {
        let name = family.full_name();
        assert!(
            name.starts_with("outlive_") && !family.help.ends_with('.') && family.help.len() > 10,
            "{name}"
        );
        for wrong in
            ["_ms", "_us", "_ns", "_kib", "_milliseconds", "_total_total", "_bytes_bytes", "_seconds_seconds"]
        {
            assert!(!name.ends_with(wrong), "{name}");
        }
        for unit in [Unit::Seconds, Unit::Bytes] {
            assert!(!family.name.contains(unit.name()), "{name}: the unit is added by the format");
        }
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn file(path: &str) -> String {
    fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The names of metrics in a query or a document, without what histograms add.
fn used(text: &str) -> BTreeSet<String> {
    let words = text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
    words.filter(|word| word.starts_with("outlive_")).map(str::to_owned).collect()
}

/// All names that a query may use.
fn known() -> BTreeSet<String> {
    let endings = |kind| match kind {
        Kind::Histogram => &["_bucket", "_sum", "_count"][..],
        Kind::Gauge | Kind::Counter => &[""],
    };
    let names = FAMILIES.iter().flat_map(|it| endings(it.kind).iter().map(|end| it.full_name() + end));
    names.collect()
}

#[test]
fn alerts_and_dashboard_use_metrics_that_there_are() {
    let dashboard = file("monitoring/dashboard.json");
    let parsed: serde_json::Value = serde_json::from_str(&dashboard).unwrap();
    let panels = parsed["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let queries: Vec<_> = targets.map(|it| it["expr"].as_str().unwrap().to_owned()).collect();
    assert!(queries.len() > 20);
    let variables = parsed["templating"]["list"].as_array().unwrap().iter();
    let variables = variables.map(|it| it["definition"].as_str().unwrap_or_default().to_owned());
    let known = known();
    for query in queries.into_iter().chain(variables) {
        let missing: Vec<_> = used(&query).into_iter().filter(|name| !known.contains(name)).collect();
        assert!(missing.is_empty(), "the dashboard uses {missing:?}: {query}");
    }
    for path in ["monitoring/outlive.rules.yml", "monitoring/outlive.rules.test.yml"] {
        let missing: Vec<_> = used(&file(path)).into_iter().filter(|name| !known.contains(name)).collect();
        assert!(missing.is_empty(), "{path} uses {missing:?}");
    }
}

/// The table of the document is made of the code; if they differ, this shows the one that is right.
#[test]
fn the_document_lists_every_metric() {
    let row = |family: &super::families::Family| {
        let kind = format!("{:?}", family.kind).to_lowercase();
        format!("| `{}` | {kind} | {} |\n", family.full_name(), family.help)
    };
    let document = file("docs/metrics.md");
    let table: String = FAMILIES.iter().map(row).collect();
    let rows: String = document
        .lines()
        .filter(|line| line.starts_with("| `outlive_"))
        .map(|line| format!("{line}\n"))
        .collect();
    assert_eq!(rows, table, "docs/metrics.md has another table than this:\n{table}");
}

/// Whoever is woken by an alert finds what to do.
#[test]
fn every_alert_has_its_section() {
    let (rules, document) = (file("monitoring/outlive.rules.yml"), file("docs/metrics.md"));
    let alerts: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let urls: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("runbook_url: ")).collect();
    assert_eq!(alerts.len(), urls.len());
    for (alert, url) in alerts.iter().zip(urls) {
        assert!(url.ends_with(&format!("/docs/metrics.md#{}", alert.to_lowercase())), "{url}");
        assert!(
            document.contains(&format!("\n### {alert}\n")),
            "docs/metrics.md has no section about {alert}"
        );
    }
    for section in document.lines().filter_map(|line| line.strip_prefix("### Outlive")) {
        assert!(alerts.contains(&format!("Outlive{section}").as_str()), "there is no alert Outlive{section}");
    }
}

/// What promtool has to say; nothing if all is well. `None` where it is not installed.
fn promtool(words: &[&str], input: &str) -> Option<String> {
    let mut command = Command::new("promtool");
    command
        .args(words)
        .current_dir(root())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            println!("skipped: no promtool (apt-get install prometheus): {error}");
            return None;
        }
    };
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said).into_owned();
    Some(if output.status.success() { String::new() } else { format!("{words:?}: {said}") })
}

#[test]
fn promtool_finds_nothing_wrong() {
    let Some(said) = promtool(&["check", "metrics"], &text(scrape(), Format::Prometheus)) else { return };
    assert_eq!(said, "");
    for words in [
        &["check", "rules", "monitoring/outlive.rules.yml"][..],
        &["test", "rules", "monitoring/outlive.rules.test.yml"],
        &["check", "config", "monitoring/prometheus.yml"],
    ] {
        assert_eq!(promtool(words, "").unwrap(), "");
    }
    let wrong = "# TYPE outlive_pause_milliseconds gauge\noutlive_pause_milliseconds 1\n";
    assert_ne!(promtool(&["check", "metrics"], wrong).unwrap(), "", "the check checks nothing");
}

#[test]
fn what_nobody_answers_is_still_a_text() {
    let folder = tempfile::tempdir().unwrap();
    let scrape = Asker::new(Places::Folders(vec![folder.path().to_owned()])).ask_all();
    let read = Read::new(&text(scrape, Format::OpenMetrics));
    assert_eq!(read.value("outlive_processes_ignored", &[]), 0.0);
    assert_eq!(read.value("outlive_folder_readable", &[]), 1.0);
    assert!(read.ended);
}
