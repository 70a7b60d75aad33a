//! The goals, and whether they were met. A missed goal is only reported: time is no reason to fail.

use crate::report::{Case, Row, short, size};

/// Prints a line for each goal whose case was measured.
pub(crate) fn print(rows: &[Row]) {
    let mut lines: Vec<String> =
        [(0, 4.0), (90, 20.0)].iter().filter_map(|&(hot, goal)| harvest(rows, hot, goal)).collect();
    lines.extend(largest(rows));
    lines
        .extend([(50, 1.9), (90, 5.5), (100, 12.0)].iter().filter_map(|&(hot, goal)| epoch(rows, hot, goal)));
    if !lines.is_empty() {
        println!("\nGoals");
        lines.iter().for_each(|line| println!("{line}"));
    }
}

fn line(what: &str, goal: String, reached: f64, met: bool) -> String {
    let verdict = if met { "met" } else { "MISSED" };
    format!("  {what:<76} {goal:>9}  {:>7}  {verdict}", format!("{}x", short(reached)))
}

fn find<'r>(rows: &'r [Row], bench: &str, hot: u64) -> Option<&'r Row> {
    let case = Case { backend: "ring", vm_gib: 8, dirty: 300, pattern: "scattered", hot, fetch: None };
    rows.iter().find(|row| row.bench == bench && row.peer == "bitmap" && row.case == case)
}

fn harvest(rows: &[Row], hot: u64, goal: f64) -> Option<String> {
    let row = find(rows, "dirty.harvest", hot)?;
    let what = format!("harvest + rearm, 8 GiB, 300 scattered pages, {hot} % hot: less than bitmap");
    Some(line(&what, format!(">= {goal}x"), row.ratio(), row.ratio() >= goal))
}

fn epoch(rows: &[Row], hot: u64, goal: f64) -> Option<String> {
    let row = find(rows, "dirty.epoch", hot)?;
    let what = format!("whole epoch, 8 GiB, 300 scattered pages, {hot} % hot: faster than bitmap");
    Some(line(&what, format!(">= {goal}x"), row.ratio(), row.ratio() >= goal))
}

/// Cost by the size of the VM: with pages equally far apart, which is the goal, and over all of memory.
fn largest(rows: &[Row]) -> Vec<String> {
    let by_size = |pattern| {
        let of_pattern = rows.iter().filter(move |row| {
            row.peer.starts_with("ring,") && row.case.pattern == pattern && row.case.dirty == 300
        });
        of_pattern.max_by_key(|row| row.case.vm_gib)
    };
    let mut lines = Vec::new();
    if let Some(row) = by_size("in 1 GiB") {
        let (more, large) = (1.0 / row.ratio(), size(row.case.vm_gib));
        let what = format!("ring, 300 pages, {large} against 1 GiB, pages equally far apart: cost");
        lines.push(line(&what, "<= 1.2x".into(), more, more <= 1.2));
    }
    if let Some(row) = by_size("scattered") {
        let (more, large) = (1.0 / row.ratio(), size(row.case.vm_gib));
        let what = "  the same, pages over all of memory: more caches and page tables miss";
        lines.push(format!("  {what:<76} {:>9}  {:>7}  {large}", "", format!("{}x", short(more))));
    }
    lines
}
