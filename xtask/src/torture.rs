//! `cargo xtask torture`: two hosts, real processes, and all kinds of faults, for minutes or hours. The play
//! itself is a test of the program (`crates/outlive/tests/survive/torture`); this command sets its duration.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::{Command, ExitStatus};

use crate::packages;
use crate::run::{StepError, Workspace, collect, step};

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask torture                       three minutes with a new seed
  cargo xtask torture --minutes 60 --json torture.json
  cargo xtask torture --seed 17             the choices of seed 17 once more
  cargo xtask torture --kind disk           only faults with 'disk' in their name
  cargo xtask torture --arbiter own         with the arbiter that Outlive serves, which suffers as well
  cargo xtask torture --arbiter any         with a kind that the seed chooses for each VM, as in cargo xtask test
  cargo xtask torture --pairs 4             four pairs of hosts at once, with seeds one after the other

At the end a table says by kind of fault how often it was injected and what became of the VM. The first answer
that cannot be true, the first frame of a host that does not have the VM, and a VM that nobody runs although a
standby had it end the run with exit code 1; the seed, the last that was done and the folder with trace, logs
and events are printed. Needs root and /dev/kvm.";

#[derive(clap::Args)]
pub(crate) struct TortureOptions {
    /// How long
    #[arg(long, value_name = "M", default_value_t = 3.0, value_parser = minutes)]
    minutes: f64,
    /// Seed for all choices; without it a new one is drawn and printed
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Pairs of hosts at a time, each with a VM of its own
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=64))]
    pairs: u64,
    /// Who says which host has the VM; any: the seed chooses for each VM
    #[arg(long, value_name = "KIND", value_parser = ["file", "own", "etcd", "any"], default_value = "file")]
    arbiter: String,
    /// Only faults whose name in the table contains this
    #[arg(long, value_name = "TEXT")]
    kind: Option<String>,
    /// Also write the table to this file, as one JSON object
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Minutes as people write them: more than none, and at most a month.
pub(crate) fn minutes(text: &str) -> Result<f64, String> {
    let minutes = text.parse::<f64>().ok().filter(|it| (0.01..=43_200.0).contains(it));
    minutes.ok_or_else(|| format!("'{text}' is no time; give minutes, for example 3 or 0.5"))
}

pub(crate) fn run(workspace: &Workspace, options: &TortureOptions) -> Result<(), StepError> {
    let etcd = matches!(options.arbiter.as_str(), "etcd" | "any").then_some(packages::ETCD);
    let needed: Vec<_> = [packages::IPROUTE].into_iter().chain(etcd).collect();
    let environment = packages::provide(workspace, &needed, true);
    let mut command =
        workspace.cargo(["test", "--release", "--package", "outlive", "--test", "survive", "--"]);
    command.args(["--exact", PLAY, "--nocapture"]);
    command.env("OUTLIVE_TORTURE_PAIRS", options.pairs.to_string());
    command.env("OUTLIVE_TORTURE_ARBITER", &options.arbiter);
    command.envs(environment).env(SECONDS, seconds(options.minutes).to_string());
    if let Some(seed) = options.seed {
        command.env("OUTLIVE_SEED", seed.to_string());
    }
    if let Some(kind) = &options.kind {
        command.env("OUTLIVE_TORTURE_KIND", kind);
    }
    if let Some(json) = &options.json {
        // The test runs in the directory of its crate.
        let path =
            std::path::absolute(json).map_err(|source| StepError::File { path: json.clone(), source })?;
        command.env("OUTLIVE_TORTURE_JSON", path);
    }
    step(&mut command)
}

/// How long the test takes, for the environment; 0 leaves it out.
pub(crate) const SECONDS: &str = "OUTLIVE_TORTURE_SECONDS";
/// The name of the test.
const PLAY: &str = "torture::the_vm_survives_everything_once_and_again";

/// The part that `cargo xtask test` runs beside other tests: most of the time it waits. Returns its output.
pub(crate) fn in_tests(
    workspace: &Workspace,
    environment: &[(&'static str, OsString)],
) -> Result<(Vec<String>, ExitStatus), StepError> {
    let mut output = Vec::new();
    let status = collect(&mut test_command(workspace, environment), |line| output.push(line.to_string()))?;
    Ok((output, status))
}

fn test_command(workspace: &Workspace, environment: &[(&'static str, OsString)]) -> Command {
    // The whole workspace, so that cargo takes what it has built for the other tests.
    let mut command = workspace.cargo(["test", "--release", "--workspace", "--test", "survive", "--"]);
    command.args(["--exact", PLAY, "--show-output"]).envs(environment.iter().cloned());
    command
}

pub(crate) fn seconds(minutes: f64) -> u64 {
    (minutes * 60.0).ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_minutes() {
        assert_eq!(seconds(minutes("0.5").unwrap()), 30);
        assert!(["", "0", "-1", "NaN", "inf", "1h", "1e9"].iter().all(|text| minutes(text).is_err()));
    }
}
