//! `cargo xtask model`: the model of the arbitration with other bounds than in the tests. The model is in
//! `crates/pair/src/model`, among that crate's tests.

use crate::run::{StepError, Workspace, step};
use crate::torture::{minutes, seconds};

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask model                            two hosts, two faults
  cargo xtask model --hosts 3 --faults 1 --minutes 30

It explores everything within the bounds, or as much as the time allows: then all of it up to the depth that it
prints. The states that are known stay in memory, some hundred bytes each.";

#[derive(clap::Args)]
pub(crate) struct ModelOptions {
    /// How many hosts
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(2..=3))]
    hosts: u8,
    /// How many faults
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(0..=4))]
    faults: u8,
    /// At most how long
    #[arg(long, value_name = "M", default_value_t = 10.0, value_parser = minutes)]
    minutes: f64,
}

pub(crate) fn run(workspace: &Workspace, options: &ModelOptions) -> Result<(), StepError> {
    let mut command = workspace.cargo(["test", "--release", "--package", "outlive-pair", "--lib", "--"]);
    command.args(["--exact", "model::no_order_of_events_breaks_the_arbitration", "--nocapture"]);
    command.env("OUTLIVE_MODEL_HOSTS", options.hosts.to_string());
    command.env("OUTLIVE_MODEL_FAULTS", options.faults.to_string());
    command.env("OUTLIVE_MODEL_SECONDS", seconds(options.minutes).to_string());
    step(&mut command)
}
