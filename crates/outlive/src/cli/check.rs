//! `outlive check`.

use std::path::PathBuf;

/// `outlive check`.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct CheckOptions {
    /// Also ask the arbiters that definitions in this directory name
    #[arg(long, value_name = "DIR")]
    pub vms: Option<PathBuf>,

    /// Name of this host, for the definitions' [host.NAME] [default: the host's own]
    #[arg(long, value_name = "NAME")]
    pub host: Option<String>,

    /// Write the findings as JSON
    #[arg(long)]
    pub json: bool,
}

const EXAMPLES: &str = "\
Examples:
  outlive check                            a table for people
  outlive check --json                     the same for programs
  outlive check --vms /etc/outlive/vms     the arbiters of the VMs that are defined here, too

outlive doctor --peer HOST puts this host and another one side by side.";
