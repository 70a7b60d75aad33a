//! Options of whichever host runs the VM.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};

use super::epochs::EpochOptions;
use super::values::{ConsoleSpec, parse_dead_after, parse_host_port, parse_stop_within};

/// Options that a primary and a standby share: what the VM does once it runs here.
#[derive(Clone, Debug, Args)]
pub struct ActiveOptions {
    /// Standby to protect the VM with (repeat for alternatives; asked in turn until one accepts)
    #[arg(long = "standby", value_name = "HOST:PORT", requires = "arbiter", value_parser = parse_host_port)]
    pub standbys: Vec<String>,

    /// When a checkpoint is taken
    #[command(flatten)]
    pub epochs: EpochOptions,

    /// Number of dirty pages that triggers an early checkpoint; staging has room for twice as many
    #[arg(long, default_value_t = 2048, value_name = "PAGES", value_parser = RangedU64ValueParser::<usize>::new().range(16..=262_144))]
    pub max_dirty: usize,

    /// Silence after which the peer counts as dead; the longer value of the two hosts applies. A process that
    /// dies is noticed at once
    #[arg(long, default_value = "500ms", value_name = "TIME", value_parser = parse_dead_after)]
    pub dead_after: Duration,

    /// How long the guest may take to shut down after a first SIGTERM or SIGINT; then the VM is stopped as by a
    /// second one
    #[arg(long, default_value = "120s", value_name = "TIME", value_parser = parse_stop_within)]
    pub stop_within: Duration,

    /// How dirty pages are found
    #[arg(long, default_value = "auto", value_name = "NAME")]
    pub tracker: TrackerChoice,

    /// Keep all memory of this process in RAM: the guest's memory is never swapped, neither here nor on the side
    /// that waits. Needs CAP_IPC_LOCK, which root usually has, or an unlimited RLIMIT_MEMLOCK
    #[arg(long)]
    pub lock_memory: bool,

    /// Append events as JSON lines to this file (- for standard output). It grows by about a megabyte in the
    /// first minute and some tens of kilobytes a minute later: up to a gigabyte or more a month. To rotate it,
    /// copy and truncate: it stays open
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,

    /// Socket on which outlive status asks this process [default: named after the VM, in /run/outlive or
    /// $XDG_RUNTIME_DIR/outlive]
    #[arg(long, value_name = "PATH")]
    pub status: Option<PathBuf>,

    /// Where the guest's serial port and console go: a directory for their sockets, which is made if it is
    /// missing (see outlive console), or stdio
    #[arg(long, value_name = "DIR|stdio", value_parser = ConsoleSpec::from_str)]
    pub console: Option<ConsoleSpec>,

    /// Every so many checkpoints, compare all memory and disks of both hosts; the VM is stopped while its
    /// memory is hashed, and its disks rest while they are hashed. For tests
    #[arg(long, value_name = "N", value_parser = RangedU64ValueParser::<u64>::new().range(1..))]
    pub self_check: Option<u64>,

    /// End when standard input is closed (for programs that start Outlive and may be killed themselves)
    #[arg(long, hide = true)]
    pub exit_with_stdin: bool,
}

/// Which dirty-page tracker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TrackerChoice {
    /// The best one that this kernel has
    Auto,
    /// KVM's dirty ring (Linux 5.11 and newer)
    Ring,
    /// KVM's dirty bitmap, cleared page by page (Linux 5.2 and newer)
    ClearLog,
    /// KVM's dirty bitmap
    Bitmap,
}

impl From<TrackerChoice> for outlive_dirty::BackendChoice {
    fn from(choice: TrackerChoice) -> Self {
        match choice {
            TrackerChoice::Auto => Self::Auto,
            TrackerChoice::Ring => Self::Ring,
            TrackerChoice::ClearLog => Self::ClearLog,
            TrackerChoice::Bitmap => Self::Bitmap,
        }
    }
}
