//! `cargo xtask sim`: the simulator of the two hosts' protocol with new seeds on every run. The simulator is
//! in `crates/pair/src/sim`, among that crate's tests; this command chooses the seeds.

use crate::run::{StepError, Workspace, step};
use crate::torture::{minutes, seconds};

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask sim                      new seeds for a minute, on all cores
  cargo xtask sim --seeds 1000000      so many new seeds
  cargo xtask sim --seed 17            one seed with its trace

A schedule that breaks an invariant ends the run with exit code 1. Its faults are left out one by one while it
still fails; the rest is printed with its trace.";

#[derive(clap::Args)]
pub(crate) struct SimOptions {
    /// How long
    #[arg(long, value_name = "M", default_value_t = 1.0, value_parser = minutes, conflicts_with_all = ["seeds", "seed"])]
    minutes: f64,
    /// How many new seeds
    #[arg(long, value_name = "N", conflicts_with = "seed", value_parser = clap::value_parser!(u64).range(1..))]
    seeds: Option<u64>,
    /// Only this seed, with a trace
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
}

pub(crate) fn run(workspace: &Workspace, options: &SimOptions) -> Result<(), StepError> {
    let mut command = workspace.cargo(["test", "--release", "--package", "outlive-pair", "--lib", "--"]);
    command.args(["--exact", "sim::explore::new_seeds_hold_the_invariants_too", "--nocapture"]);
    command.env("OUTLIVE_SIM_SECONDS", seconds(options.minutes).to_string());
    for (name, number) in [("OUTLIVE_SIM_COUNT", options.seeds), ("OUTLIVE_SIM_ONE", options.seed)] {
        match number {
            Some(number) => command.env(name, number.to_string()),
            None => command.env_remove(name),
        };
    }
    step(&mut command)
}
