//! What the benches of the whole product share: how much is measured, rows, and the command line.

use std::fs::File;
use std::io::Write;
use std::process::ExitCode;

use outlive::events::{Event, Stats};

use crate::support::Process;

/// How much is measured.
pub(crate) struct Scales<S> {
    /// Enough for a figure that somebody will read.
    pub(crate) full: S,
    /// A look.
    pub(crate) quick: S,
    /// So little that it only shows that the bench does not rot: under `cargo test`.
    pub(crate) smoke: S,
}

/// The newest counters of a primary. They come five times a second.
pub(crate) fn stats(primary: &mut Process) -> Stats {
    let newest = primary.events().filter_map(|event| match event {
        Event::Stats(stats) => Some(stats.clone()),
        _ => None,
    });
    newest.last().unwrap_or_default()
}

/// The value in the middle. Panics if there is none.
pub(crate) fn median(values: impl IntoIterator<Item = f64>) -> f64 {
    quantile(values, 0.5)
}

/// The value below which this share of the others is. Panics if there is none.
pub(crate) fn quantile(values: impl IntoIterator<Item = f64>, share: f64) -> f64 {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values[((values.len() as f64 * share) as usize).min(values.len() - 1)]
}

/// A row, as every bench of the project writes it. `case` is a JSON object.
pub(crate) fn row(
    bench: &str,
    case: &str,
    (value, unit): (f64, &str),
    (peer, peer_value): (&str, f64),
) -> String {
    format!(
        "{{\"bench\":\"{bench}\",\"case\":{case},\"value\":{value:.3},\"unit\":\"{unit}\",\"peer\":\"{peer}\",\"peer_value\":{peer_value:.3}}}\n"
    )
}

/// Runs a bench as its command line says, and writes the rows that `measure` adds. `None` from it: this machine cannot
/// run the bench, which it has said.
pub(crate) fn run<S>(scales: Scales<S>, measure: impl FnOnce(&S, &mut String) -> Option<()>) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |option: &str| arguments.iter().any(|it| it == option);
    if has("--list") {
        println!("the_bench_runs: test");
        return ExitCode::SUCCESS;
    }
    let scale = match (has("--bench"), has("--quick")) {
        (false, _) => scales.smoke,
        (true, true) => scales.quick,
        (true, false) => scales.full,
    };
    let mut rows = String::new();
    let Some(()) = measure(&scale, &mut rows) else {
        // Under `cargo test` that is no failure.
        return if has("--bench") { ExitCode::from(2) } else { ExitCode::SUCCESS };
    };
    let json = arguments.iter().position(|it| it == "--json").and_then(|at| arguments.get(at + 1));
    let written = json.map(|file| File::create(file).and_then(|mut file| file.write_all(rows.as_bytes())));
    match written.transpose() {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(2)
        }
    }
}
