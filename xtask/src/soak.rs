//! `cargo xtask soak`: two nodes, some VMs, and orders and faults through the API, for minutes or hours. The play itself is a
//! test of the program (`crates/outlive/tests/survive/soak.rs`); this command sets its duration.

use crate::run::{StepError, Workspace, step};
use crate::torture::{minutes, seconds};

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask soak                          ten minutes with eight VMs and a new seed
  cargo xtask soak --minutes 120
  cargo xtask soak --minutes 1 --vms 2 --seed 17

Every few seconds a VM is handed over, or stopped and started; a host is drained; a process of a VM or a node is
killed, or stopped for a while; a client of the API leaves midway. In the end everything is undrained. Then every VM
runs once and is protected, every write that it has acknowledged is there, and every job is in a final state; or the
exit code is 1, and the logs are printed. Needs root and /dev/kvm.";

#[derive(clap::Args)]
pub(crate) struct SoakOptions {
    /// How long
    #[arg(long, value_name = "M", default_value_t = 10.0, value_parser = minutes)]
    minutes: f64,
    /// VMs, each with 64 MiB on either host
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=100))]
    vms: u64,
    /// Seed for all choices; without it a new one is drawn and printed
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
}

/// The name of the test.
const PLAY: &str = "soak::vms_outlast_all_that_operators_and_hosts_do";

pub(crate) fn run(workspace: &Workspace, options: &SoakOptions) -> Result<(), StepError> {
    let mut command =
        workspace.cargo(["test", "--release", "--package", "outlive", "--test", "survive", "--"]);
    command.args(["--exact", PLAY, "--ignored", "--nocapture"]);
    command.env("OUTLIVE_SOAK_SECONDS", seconds(options.minutes).to_string());
    command.env("OUTLIVE_SOAK_VMS", options.vms.to_string());
    if let Some(seed) = options.seed {
        command.env("OUTLIVE_SEED", seed.to_string());
    }
    step(&mut command)
}
