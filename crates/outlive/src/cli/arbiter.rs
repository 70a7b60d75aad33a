//! `outlive arbiter`.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::values::parse_age;

/// `outlive arbiter`.
#[derive(Clone, Debug, Args)]
#[command(after_help = ARBITER_EXAMPLES)]
pub struct ArbiterOptions {
    /// What to do.
    #[command(subcommand)]
    pub command: ArbiterCommand,
}

/// The commands of `outlive arbiter`.
#[derive(Clone, Debug, Subcommand)]
pub enum ArbiterCommand {
    /// Make an empty directory an arbiter: once, on one host, with the shared file system mounted
    Init {
        /// The directory, as in --arbiter
        #[arg(value_name = "file:DIR")]
        place: String,
    },
    /// List the VMs that an arbiter knows: who won the newest generation of each, and how long ago
    List {
        /// The directory, as in --arbiter
        #[arg(value_name = "file:DIR")]
        place: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show all that an arbiter knows of one VM
    Show {
        /// The directory, as in --arbiter
        #[arg(value_name = "file:DIR")]
        place: String,
        /// The VM's id, or its first characters
        #[arg(value_name = "VM")]
        vm: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Remove claims that were superseded long ago, and keep the newest of each VM
    Prune {
        /// The directory, as in --arbiter
        #[arg(value_name = "file:DIR")]
        place: String,
        /// Also forget VMs that ended in order at least this long ago, for example 30days. The arbiter then
        /// no longer knows their images, and they start only with --accept-lost-claims
        #[arg(long, value_name = "AGE", value_parser = parse_age)]
        forget_ended: Option<Duration>,
        /// Only say what would be removed
        #[arg(long)]
        dry_run: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

const ARBITER_EXAMPLES: &str = "\
Examples:
  outlive arbiter init file:/srv/arbiter                  once, on one host; then check that the other host sees the same:
  outlive arbiter list file:/srv/arbiter                  its first line has the arbiter's id
  outlive arbiter show file:/srv/arbiter 3f2a             the generations of one VM, with their owners
  outlive arbiter prune file:/srv/arbiter --dry-run --forget-ended 90days";
