//! `outlive status`.

use std::path::PathBuf;

use clap::Args;

/// `outlive status`.
#[derive(Clone, Debug, Args)]
#[command(after_help = STATUS_HELP)]
pub struct StatusOptions {
    /// Ask the process with this --status [default: all that answer in the usual folders]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,

    /// For programs: a JSON array with an object for each process
    #[arg(long)]
    pub json: bool,
}

const STATUS_HELP: &str = "\
The first line of each process says whether its VM is protected, and whether the loss of either host would be survived
now. The lines below say why not, since when, how far behind the standby is, and when the arbiter was last seen.

Examples:
  outlive status                                   all VMs and standbys of this host
  outlive status --socket /run/outlive/web.sock    one of them
  outlive status --json                            for programs";
