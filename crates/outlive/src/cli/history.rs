//! `outlive history`.

use std::path::PathBuf;

/// `outlive history`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct HistoryOptions {
    /// The directory of outlive standby --record
    #[arg(value_name = "RECORD")]
    pub record: PathBuf,

    /// Write it as JSON
    #[arg(long)]
    pub json: bool,
}

const EXAMPLES: &str = "\
A run is a part of the past without a gap: the VM can be had as of each of its checkpoints. The command changes nothing, and
the standby may go on recording meanwhile.

Examples:
  outlive history /var/lib/outlive/record/web           a line for each run, oldest first
  outlive history --json /var/lib/outlive/record/web    the same for programs";
