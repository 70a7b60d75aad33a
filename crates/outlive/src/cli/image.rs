//! `outlive image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::values::parse_name;

/// `outlive image`.
#[derive(Clone, Debug, Args)]
#[command(after_help = IMAGE_EXAMPLES)]
pub struct ImageOptions {
    /// What to do.
    #[command(subcommand)]
    pub command: ImageCommand,
}

/// The commands of `outlive image`.
#[derive(Clone, Debug, Subcommand)]
pub enum ImageCommand {
    /// Show whose an image is, and whether a VM would start from it
    Show {
        /// Disk images: files or block devices
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<PathBuf>,
        /// The arbiter that knows whether the VM went on elsewhere
        #[arg(long, value_name = "ARBITER")]
        arbiter: Option<String>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Make a new VM of these images as they are: after a backup was restored, or when a sidecar is damaged.
    /// No other image counts as an older one of the new VM, so no standby overwrites one unasked
    Accept {
        /// All disk images of the VM, in their order
        #[arg(value_name = "IMAGE", required = true)]
        images: Vec<PathBuf>,
        /// The arbiter of the VM that the images belonged to: its standby can then no longer take over
        #[arg(long, value_name = "ARBITER")]
        arbiter: Option<String>,
        /// Name of the new VM [default: the old one's]
        #[arg(long, value_name = "NAME", value_parser = parse_name)]
        name: Option<String>,
        /// Do it: without this option only say what would be given up
        #[arg(long)]
        yes: bool,
    },
}

const IMAGE_EXAMPLES: &str = "\
Examples:
  outlive image show --arbiter file:/srv/arbiter /srv/vm/server.img
  outlive image accept --arbiter file:/srv/arbiter /srv/vm/server.img          what would be given up
  outlive image accept --arbiter file:/srv/arbiter --yes /srv/vm/server.img    a new VM begins with what is in it

To start from an image that is only out of date, or a standby's copy, outlive run has words of its own.";
