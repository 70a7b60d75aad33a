//! `cargo xtask test`.

use std::ffi::OsString;
use std::process::Command;
use std::time::Instant;

use crate::run::{StepError, Workspace, describe, lines, step};
use crate::summary::Summary;
use crate::{fuzz, models, nested, packages};

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
    /// Also fuzz each target for ten seconds (about 4 minutes, including the build of the targets)
    #[arg(long)]
    fuzz: bool,
}

/// Runs everything, prints the summary, and fails if a test failed.
pub(crate) fn run(workspace: &Workspace, options: &TestOptions) -> Result<(), StepError> {
    let start = Instant::now();
    let mut environment = packages::prepare(workspace, !options.no_fetch);
    // Longer than under plain `cargo test`; other tests run meanwhile.
    for (name, seconds) in [("OUTLIVE_TORTURE_SECONDS", "120"), ("OUTLIVE_SIM_SECONDS", "60")] {
        environment.push((name, std::env::var_os(name).unwrap_or(seconds.into())));
    }
    if !options.no_nested {
        nested::prepare(workspace, !options.no_fetch);
    }
    // First only the build: a build error is not a failed test.
    step(&mut workspace.cargo(["test", "--release", "--workspace", "--no-run"]))?;
    let mut commands = vec![workspace.cargo(["test", "--release", "--workspace"])];
    commands.extend(models::commands(workspace)?);
    let mut summary = Summary::default();
    for command in &mut commands {
        test(command, &environment, options, &mut summary)?;
    }
    if options.fuzz
        && let Err(error) = fuzz::run(workspace, &fuzz::FuzzOptions::default())
    {
        summary.ended_badly(&error.to_string());
    }
    if !options.no_nested && options.filter.is_none() {
        nested::in_tests(workspace, !options.no_fetch, options.nested, &mut summary)?;
    }
    let seconds = start.elapsed().as_secs();
    println!("\ntests took {} min {} s, build included", seconds / 60, seconds % 60);
    println!("{summary}");
    if summary.is_good() { Ok(()) } else { Err(StepError::TestsFailed) }
}

fn test(
    command: &mut Command,
    environment: &[(&'static str, OsString)],
    options: &TestOptions,
    summary: &mut Summary,
) -> Result<(), StepError> {
    // All programs run even if one fails; the output of passed tests is shown, see the crate's documentation.
    command.arg("--no-fail-fast").envs(environment.iter().cloned()).arg("--").arg("--show-output");
    command.args(&options.filter);
    let before = summary.failures();
    let status = lines(command, |line| summary.line(line))?;
    if !status.success() && summary.failures() == before {
        summary.ended_badly(&format!("{} ({status})", describe(command)));
    }
    Ok(())
}
