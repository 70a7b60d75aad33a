//! `cargo xtask test`.

use std::ffi::OsString;
use std::process::Command;
use std::thread;
use std::time::Instant;

use crate::phases::{Phases, timed};
use crate::run::{Said, StepError, Workspace, describe, lines, step};
use crate::summary::Summary;
use crate::{fuzz, models, nested, packages, torture};

#[derive(clap::Args, Default)]
pub(crate) struct TestOptions {
    /// Run only tests whose name contains this
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Do not fetch missing Debian packages; tests that need them are skipped
    #[arg(long)]
    no_fetch: bool,
    /// Try everything on emulated hosts: dirty tracking and all proofs (an hour; see `cargo xtask nested`).
    /// Without this, only two proofs
    #[arg(long)]
    nested: bool,
    /// Leave emulated hosts out (saves about 8 minutes the first time, 4 later)
    #[arg(long, conflicts_with = "nested")]
    no_nested: bool,
    /// Fail also if a test fails beside the others and passes alone
    #[arg(long)]
    strict: bool,
    /// Do not fuzz; otherwise each target gets ten seconds, beside the tests
    #[arg(long)]
    no_fuzz: bool,
}

/// How often a test that failed runs alone. If it passes each time, it is unsteady: a defect, which the summary names, but one
/// that depends on what else this machine does.
const ALONE: usize = 3;

/// If more tests failed, none runs again: it is no accident.
const ACCIDENTS: usize = 5;

/// An environment for tests.
type Environment = Vec<(&'static str, OsString)>;

/// Runs everything, prints the summary, and fails if a test failed.
pub(crate) fn run(workspace: &Workspace, options: &TestOptions) -> Result<(), StepError> {
    let start = Instant::now();
    let mut phases = Phases::default();
    let mut summary = Summary::default();
    let mut environment = phases.time("Debian packages", || fetch_packages(workspace, options));
    // Longer than under plain `cargo test`; other tests run meanwhile.
    for (name, seconds) in [(torture::SECONDS, "180"), ("OUTLIVE_SIM_SECONDS", "60")] {
        environment.push((name, std::env::var_os(name).unwrap_or(seconds.into())));
    }
    build(workspace, options, &mut phases)?;
    let mut failed = Vec::new();
    thread::scope(|scope| -> Result<(), StepError> {
        // Both leave most of the processors to the tests: torture waits, fuzzing lets everything else go first.
        let all = options.filter.is_none();
        let torture = all.then(|| scope.spawn(|| timed(|| torture::in_tests(workspace, &environment))));
        let fuzzing = (all && !options.no_fuzz).then(|| scope.spawn(|| timed(|| fuzz::in_tests(workspace))));
        let mut tests = workspace.cargo(["test", "--release", "--workspace"]);
        phases.time("tests", || test(&mut tests, &environment, options, &mut summary))?;
        failed = summary.failed_tests();
        for command in &mut models::commands(workspace)? {
            phases.time("loom models", || test(command, &environment, options, &mut summary))?;
        }
        if let Some(Ok((ended, time))) = torture.map(thread::ScopedJoinHandle::join) {
            phases.beside("torture, beside the tests", time);
            let (output, status) = ended?;
            let before = summary.failures();
            for line in output {
                println!("{line}");
                // It has passed once, in the tests that left it out.
                if !line.starts_with("test result: ok") {
                    summary.line(&line);
                }
            }
            if !status.success() && summary.failures() == before {
                summary.ended_badly(&format!("torture ({status})"));
            }
        }
        if let Some(Ok((ended, time))) = fuzzing.map(thread::ScopedJoinHandle::join) {
            phases.beside("fuzzing, beside the tests", time);
            if let Err(error) = ended {
                summary.ended_badly(&error.to_string());
            }
        }
        Ok(())
    })?;
    if (1..=ACCIDENTS).contains(&failed.len()) {
        phases.time("failed tests alone", || again(workspace, &environment, &failed, &mut summary));
    }
    if !options.no_nested && options.filter.is_none() {
        let proofs = || nested::in_tests(workspace, !options.no_fetch, options.nested, &mut summary);
        phases.time("emulated hosts", proofs)?;
    }
    let seconds = start.elapsed().as_secs();
    println!("\n{phases}\ntests took {} min {} s, build included", seconds / 60, seconds % 60);
    println!("{summary}");
    let steady = summary.unsteady() == 0 || !options.strict;
    if summary.is_good() && steady { Ok(()) } else { Err(StepError::TestsFailed) }
}

fn fetch_packages(workspace: &Workspace, options: &TestOptions) -> Environment {
    if options.filter.is_none() && !options.no_fuzz {
        packages::provide(workspace, &[packages::COMPILER], !options.no_fetch);
    }
    packages::prepare(workspace, !options.no_fetch)
}

/// Builds the tests, and meanwhile fetches what emulated hosts need: one waits for the processors, the other
/// for the network. A build error is not a failed test.
fn build(workspace: &Workspace, options: &TestOptions, phases: &mut Phases) -> Result<(), StepError> {
    let images = options.filter.is_none();
    thread::scope(|scope| {
        let fetching = (!options.no_nested)
            .then(|| scope.spawn(|| timed(|| nested::prepare(workspace, !options.no_fetch, images))));
        let mut build = workspace.cargo(["test", "--release", "--workspace", "--no-run"]);
        phases.time("build", || step(&mut build))?;
        if let Some(fetching) = fetching {
            let waited = phases.time("waiting for the guest images", || fetching.join());
            if let Ok(((), time)) = waited {
                phases.beside("guest images, beside the build", time);
            }
        }
        Ok(())
    })
}

/// Runs each failed test alone.
fn again(
    workspace: &Workspace,
    environment: &[(&'static str, OsString)],
    failed: &[String],
    summary: &mut Summary,
) {
    for test in failed {
        let alone = (0..ALONE).all(|_| {
            let mut command = workspace.cargo(["test", "--release", "--workspace"]);
            command.envs(environment.iter().cloned()).env(torture::SECONDS, "0");
            command.args(["--", "--show-output", test]);
            let (ok, mut passed) = (format!("test {test} ... ok"), false);
            let status = lines(&mut command, |said| passed |= matches!(said, Said::Line(line) if line == ok));
            // A test that does not run at all has not passed.
            passed && status.is_ok_and(|it| it.success())
        });
        if alone {
            summary.passes_alone(test);
        }
    }
}

fn test(
    command: &mut Command,
    environment: &[(&'static str, OsString)],
    options: &TestOptions,
    summary: &mut Summary,
) -> Result<(), StepError> {
    // All programs run even if one fails; the output of passed tests is shown, see the crate's documentation.
    command.arg("--no-fail-fast").envs(environment.iter().cloned()).arg("--").arg("--show-output");
    match &options.filter {
        Some(filter) => command.arg(filter),
        // It runs beside the others.
        None => command.env(torture::SECONDS, "0"),
    };
    let before = summary.failures();
    let status = lines(command, |said| match said {
        Said::Line(line) => summary.line(line),
        Said::Nothing(silence) => summary.hung(silence),
    })?;
    if !status.success() && summary.failures() == before {
        summary.ended_badly(&format!("{} ({status})", describe(command)));
    }
    Ok(())
}
