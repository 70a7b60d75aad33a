//! Rows: a table for people, JSON lines for programs.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use crate::measure::Summary;

/// A measured value and that of its peer, from the same rounds.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    pub(crate) bench: &'static str,
    pub(crate) case: Case,
    /// Microseconds.
    pub(crate) value: Summary,
    pub(crate) peer: String,
    pub(crate) peer_value: Summary,
    /// The steps that take the time, for the table.
    pub(crate) steps: String,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Case {
    pub(crate) backend: &'static str,
    pub(crate) vm_gib: u64,
    pub(crate) dirty: u64,
    pub(crate) pattern: &'static str,
    pub(crate) hot: u64,
    /// For `dirty.fetch`: threads, and whether the fetch re-arms.
    pub(crate) fetch: Option<(usize, bool)>,
}

impl Row {
    /// How many times smaller it is than the peer.
    pub(crate) fn ratio(&self) -> f64 {
        self.peer_value.median / self.value.median
    }

    /// The format of every bench of the project.
    pub(crate) fn json(&self) -> String {
        let Case { backend, vm_gib, dirty, pattern, hot, fetch } = &self.case;
        let mut case = format!(
            r#""backend":"{backend}","vm_gib":{vm_gib},"dirty":{dirty},"pattern":"{pattern}","hot":{hot}"#
        );
        if let Some((threads, rearm)) = fetch {
            write!(case, r#","threads":{threads},"rearm":{rearm}"#).expect("a string");
        }
        let Row { bench, value, peer, peer_value, .. } = self;
        format!(
            r#"{{"bench":"{bench}","case":{{{case}}},"value":{},"unit":"us","peer":"{peer}","peer_value":{}}}"#,
            number(value.median),
            number(peer_value.median)
        )
    }

    fn line(&self) -> String {
        let Case { backend, vm_gib, dirty, pattern, hot, fetch } = &self.case;
        let mode = match fetch {
            None => format!("{hot} % hot"),
            Some((threads, rearm)) => format!("{threads} threads{}", if *rearm { ", rearm" } else { "" }),
        };
        format!(
            "{:>8}  {:<16} {backend:<9} {mode:<16} {:<26} {:<36} {:>6}  {}",
            size(*vm_gib),
            format!("{dirty} {pattern}"),
            spread(&self.value),
            format!("{}: {}", self.peer, spread(&self.peer_value)),
            format!("{}x", short(self.ratio())),
            self.steps
        )
    }
}

pub(crate) fn size(gib: u64) -> String {
    if gib >= 1024 { format!("{} TiB", gib / 1024) } else { format!("{gib} GiB") }
}

/// A number in JSON, with one to three digits after the point.
fn number(value: f64) -> String {
    format!("{:?}", (value * 1e3).round() / 1e3)
}

/// About three digits.
pub(crate) fn short(value: f64) -> String {
    match value {
        value if value < 10.0 => format!("{value:.2}"),
        value if value < 100.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

fn spread(value: &Summary) -> String {
    format!("{} µs ({}-{})", short(value.median), short(value.p10), short(value.p90))
}

/// Takes rows as they come, and prints them.
pub(crate) struct Report {
    rows: Vec<Row>,
    json: Option<BufWriter<File>>,
}

impl Report {
    /// Opens the file before anything is measured.
    pub(crate) fn new(json: Option<&Path>) -> io::Result<Report> {
        let json = json.map(File::create).transpose()?.map(BufWriter::new);
        Ok(Report { rows: Vec::new(), json })
    }

    pub(crate) fn section(&self, title: &str) {
        println!("\n{title}");
    }

    pub(crate) fn add(&mut self, row: Row) -> io::Result<()> {
        println!("{}", row.line());
        if let Some(json) = &mut self.json {
            writeln!(json, "{}", row.json())?;
            // So that a run that is cut short keeps its rows.
            json.flush()?;
        }
        self.rows.push(row);
        Ok(())
    }

    pub(crate) fn rows(&self) -> &[Row] {
        &self.rows
    }
}

/// Part of the test: the format is as agreed, to the letter.
pub(crate) fn check_format() {
    let case = Case { backend: "ring", vm_gib: 8, dirty: 300, pattern: "scattered", hot: 0, fetch: None };
    let of = |median| Summary { median, p10: median, p90: median };
    let (value, peer_value) = (of(43.1), of(165.0));
    let mut row =
        Row { bench: "dirty.harvest", case, value, peer: "bitmap".into(), peer_value, steps: String::new() };
    assert_eq!(
        row.json(),
        r#"{"bench":"dirty.harvest","case":{"backend":"ring","vm_gib":8,"dirty":300,"pattern":"scattered","hot":0},"value":43.1,"unit":"us","peer":"bitmap","peer_value":165.0}"#
    );
    row.case.fetch = Some((2, true));
    assert!(row.json().contains(r#""hot":0,"threads":2,"rearm":true},"value""#));
}
