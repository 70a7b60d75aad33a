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
Each line says whether the VM is protected, or why not, since when, how far behind its standby is, when the arbiter was
last seen, and whether the loss of either host would be survived now.

Exit codes: 0 all are protected; 1 one is not, or does not answer; 2 there is nobody to ask.";
