//! The command line.

mod active;
mod arbiter;
mod check;
mod completions;
mod console;
mod definition;
mod demo;
mod doctor;
mod epochs;
mod execute;
pub mod exits;
mod history;
mod image;
mod keys;
mod man;
mod metrics;
mod node;
mod page;
mod part;
mod rewind;
mod run;
mod sense;
mod standby;
mod status;
mod tree;
mod values;
mod word;

#[cfg(test)]
mod tests;

use clap::{Parser, Subcommand};

pub use active::{ActiveOptions, Switch, TrackerChoice};
pub use arbiter::{ArbiterCommand, ArbiterOptions};
pub use check::CheckOptions;
pub use completions::{CompletionsOptions, Shell, complete};
pub use console::ConsoleOptions;
pub use demo::{DemoArbiter, DemoOptions};
pub use doctor::DoctorOptions;
pub use epochs::{Ending, EpochOptions, PolicyChoice};
pub use history::HistoryOptions;
pub use image::{ImageCommand, ImageOptions, ImportOptions, SeedOptions};
pub(crate) use keys::AnyAndOne;
pub use keys::{DaysOption, GrantOptions, KeysCommand, KeysOptions};
pub use man::ManOptions;
pub use metrics::MetricsOptions;
pub(crate) use node::definitions;
pub use outlive_node::cli::{NodeOptions, TopOptions, VmOptions};
pub use rewind::{Moment, RewindOptions};
pub use run::{AcceptOptions, RunOptions};
pub use standby::StandbyOptions;
pub use status::StatusOptions;
pub use tree::tree;
pub use values::{
    BootFrom, ConsoleSpec, DiskSpec, DiskUse, IpSpec, NetSpec, RecordSpec, StandbyDisk, parse_size,
    parse_time,
};
pub use word::{HandOverOptions, WordOptions};

/// A virtual machine that outlives its host.
///
/// Outlive checkpoints a running VM many hundred times a second to a standby host. When the primary host
/// dies, the VM goes on elsewhere from its last checkpoint: no reboot, no lost transaction, no broken
/// connection.
#[derive(Debug, Parser)]
#[command(name = "outlive", version, propagate_version = true, after_help = EXAMPLES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXAMPLES: &str = "\
Examples:
  outlive check                      what this machine has and what it lacks
  outlive doctor --peer hostb        the same for this host and another one, side by side
  outlive demo                       see a VM survive three kills, on this machine alone
  outlive keys init                  keys that the hosts know each other by; outlive keys issue makes the other host's
  outlive standby --listen 0.0.0.0:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0
  outlive run --kernel vmlinuz --initrd initrd.img --append 'console=ttyS0 root=/dev/vda1' --disk path=server.img
  outlive run --standby hostb:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0 --ip 10.0.0.5/24

Log level: RUST_LOG=debug (error, warn, info, debug, trace). Logs go to standard error.";

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a VM on this host, protected when it has a standby
    Run(RunOptions),
    /// Wait for a VM to protect and take over when its host dies
    Standby(StandbyOptions),
    /// Say whether the VMs on this host are protected, and what the loss of a host would mean now
    Status(StatusOptions),
    /// Print or serve the metrics of the VMs on this host, for Prometheus
    Metrics(MetricsOptions),
    /// Attach a terminal to the serial port or the console of a VM on this host
    Console(ConsoleOptions),
    /// Move the VM that runs here to its standby, for example to empty this host
    HandOver(HandOverOptions),
    /// Give a VM with --arbiter manual to this host, its standby, after its primary was lost
    TakeOver(WordOptions),
    /// Let a VM with --arbiter manual go on at this host, where it ran, after its standby was lost
    GoOnAlone(WordOptions),
    /// Leave a VM with --arbiter manual to the other host, which has been given it
    GiveUp(WordOptions),
    /// Keep all VMs of this host as they are desired, and empty the host for its maintenance
    Node(NodeOptions),
    /// List, define, start, stop and move the VMs of this host, which a node keeps
    Vm(VmOptions),
    /// Show the VMs of a host in this terminal as they live: protection, how far behind, pauses, commits
    Top(TopOptions),
    /// Make, serve, list and prune arbiters: the third places that say who may run a VM
    Arbiter(ArbiterOptions),
    /// Make, show, renew and revoke the keys that hosts know each other by
    Keys(KeysOptions),
    /// Make disk images of other formats and seeds for cloud-init; show whose an image is, and take it as it is
    Image(ImageOptions),
    /// Show which moments of a VM its standby has recorded
    History(HistoryOptions),
    /// Start a VM as it was at a recorded moment, as a new one beside the old one
    Rewind(RewindOptions),
    /// Kill a protected VM again and again on this machine and count what was lost
    Demo(DemoOptions),
    /// Say whether this machine can run VMs, and what to do about each thing that is missing
    Check(CheckOptions),
    /// Say whether this host and another one can keep VMs together, and what to do about each thing that is in the way
    Doctor(DoctorOptions),
    /// Print what makes a shell complete the words of this program's command lines
    Completions(CompletionsOptions),
    /// Print the manual page, or write the pages of all commands to a directory
    Man(ManOptions),
    /// End the links of a parent process that was killed
    #[command(hide = true)]
    Sentinel {
        /// Without rights, and with the system calls that it needs
        #[arg(long)]
        confined: bool,
    },
    /// Do for a parent process what takes rights that it has given up
    #[command(hide = true)]
    Steward,
}
