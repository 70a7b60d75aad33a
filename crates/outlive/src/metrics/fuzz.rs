//! The line of a process, with any content: whoever may make a socket in a folder of processes may say what he likes.

use std::time::{Duration, UNIX_EPOCH};

use super::ask::{Process, Scrape, parse};
use super::text::{Format, text};

/// What a process says. A line that is believed makes text that keeps the rules of both formats.
///
/// # Panics
/// If the text breaks the rules.
pub fn metrics(bytes: &[u8]) {
    let Ok(report) = parse(bytes) else { return };
    for format in [Format::Prometheus, Format::OpenMetrics] {
        let process = Process {
            socket: "/run/outlive/web.sock".into(),
            vm: report.vm.clone().unwrap_or_default(),
            took: Duration::from_millis(2),
            report: Ok(report.clone()),
        };
        let at = UNIX_EPOCH + Duration::from_secs(1_000_000);
        let scrape = Scrape { processes: vec![process], folders: Vec::new(), ignored: 0, at };
        check(&text(scrape, format));
    }
}

/// Each line is a remark, or a name, labels in quotes and a number; no two samples have one name and the same labels.
fn check(text: &str) {
    let mut series = Vec::new();
    assert!(text.ends_with('\n'), "the last line has its end");
    for line in text.lines().filter(|line| !line.starts_with("# ")) {
        let (series_of, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no number: {line:?}"));
        assert!(value == "+Inf" || value.parse::<f64>().is_ok(), "no number: {line:?}");
        let name = series_of.split('{').next().unwrap_or_default();
        let is_name = |c: char| c.is_ascii_lowercase() || c == '_';
        assert!(name.starts_with("outlive_") && name.chars().all(is_name), "no name: {line:?}");
        let labels = &series_of[name.len()..];
        assert!(labels.is_empty() || labels.starts_with('{') && closes(labels), "no labels: {line:?}");
        series.push(series_of);
    }
    let count = series.len();
    series.sort_unstable();
    series.dedup();
    assert_eq!(series.len(), count, "a series is there twice");
}

/// Whether the labels end where the text does, and nowhere before.
fn closes(labels: &str) -> bool {
    let (mut quoted, mut escaped) = (false, false);
    for (at, c) in labels.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' if quoted => escaped = true,
            '"' => quoted = !quoted,
            '}' if !quoted => return at + 1 == labels.len(),
            _ => {}
        }
    }
    false
}
