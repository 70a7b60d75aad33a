//! Options of whichever host runs the VM.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};

use super::epochs::EpochOptions;
use super::values::{
    ConsoleSpec, DiskTimeout, RecordSpec, parse_dead_after, parse_events_max, parse_fence,
    parse_fence_timeout, parse_host_port, parse_max_pause, parse_stop_within, parse_uplink_timeout,
};
use crate::audit::AuditShare;
use crate::events::EventsTo;
use crate::link::Security;
use crate::network::UplinkSpec;
use crate::sandbox::Mode;
use crate::standby::Fence;

/// Options that a primary and a standby share: what the VM does once it runs here.
#[derive(Clone, Debug, Args)]
pub struct ActiveOptions {
    /// Standby to protect the VM with (repeat for alternatives; asked in turn until one accepts)
    #[arg(long = "standby", value_name = "HOST:PORT", requires = "arbiter", value_parser = parse_host_port)]
    pub standbys: Vec<String>,

    /// Directory with this host's keys, which protect the link and say which VMs each host may send or hold; see
    /// outlive keys [default: /etc/outlive/keys]
    #[arg(long, value_name = "DIR")]
    pub keys: Option<PathBuf>,

    /// Do without keys: whoever reaches the link can read the VM and run it elsewhere. Only for addresses of this
    /// host, unless the variable OUTLIVE_INSECURE_NETWORK is 1, which is for tests
    #[arg(long, conflicts_with = "keys")]
    pub insecure: bool,

    /// When a checkpoint is taken
    #[command(flatten)]
    pub epochs: EpochOptions,

    /// Number of dirty pages that triggers an early checkpoint; staging has room for twice as many
    /// (16 to 262144)
    #[arg(long, default_value_t = 4096, value_name = "PAGES", value_parser = RangedU64ValueParser::<usize>::new().range(16..=262_144))]
    pub max_dirty: usize,

    /// Silence after which the peer counts as dead; the longer value of the two hosts applies, 20ms to
    /// 60s. A process that dies is noticed at once
    #[arg(long, default_value = "500ms", value_name = "TIME", value_parser = parse_dead_after)]
    pub dead_after: Duration,

    /// How long the guest may take to shut down after a first SIGTERM or SIGINT; then the VM is stopped as by a
    /// second one (100ms to 1h)
    #[arg(long, default_value = "120s", value_name = "TIME", value_parser = parse_stop_within)]
    pub stop_within: Duration,

    /// Time after which a disk of this host, unless it is shared, that does not answer a request counts as
    /// broken: a protected VM is then left to its standby, as when the disk reports an error (1s to 1h; off:
    /// wait for ever)
    #[arg(long, default_value = "30s", value_name = "TIME|off")]
    pub disk_timeout: DiskTimeout,

    /// The host's interface to the guest's clients. While it is lost, a protected VM is left to a standby that
    /// reaches them (auto: the ports of the tap's bridge that are no taps; none: do not look)
    #[arg(long, default_value = "auto", value_name = "NAME|auto|none", value_parser = UplinkSpec::from_str)]
    pub uplink: UplinkSpec,

    /// How long the way to the clients must be lost before it counts, 100ms to 60s [default: 2s]
    #[arg(long, value_name = "TIME", value_parser = parse_uplink_timeout)]
    pub uplink_timeout: Option<Duration>,

    /// Shell command that cuts the lost primary off, for example from a shared disk, before a VM that this host has
    /// won runs here. It is repeated until it succeeds; the VM waits. It is told OUTLIVE_VM, OUTLIVE_VM_ID,
    /// OUTLIVE_GENERATION, OUTLIVE_PEER (HOST:PORT) and OUTLIVE_ATTEMPT. What can be checked is checked at the start:
    /// the shell's syntax, and that the program is there
    #[arg(long, value_name = "COMMAND", value_parser = parse_fence)]
    pub fence: Option<String>,

    /// How long the fence command may take before it is killed and repeated, 100ms to 1h
    #[arg(long, default_value = "30s", value_name = "TIME", value_parser = parse_fence_timeout)]
    pub fence_timeout: Duration,

    /// How long the guest may stand still when it is first copied to a standby. A guest that writes faster than the
    /// link carries is held for shorter times, so that little is left for the last stop (5ms to 10s)
    #[arg(long, default_value = "300ms", value_name = "TIME", value_parser = parse_max_pause)]
    pub max_pause: Duration,

    /// How dirty pages are found
    #[arg(long, default_value = "auto", value_name = "NAME")]
    pub tracker: TrackerChoice,

    /// Save frames that a takeover would lose, so that clients need not wait until TCP repeats them: the primary
    /// sends its standby copies of the frames that no checkpoint has yet, and of output that may not have left. At
    /// a takeover the guest gets the former, and the latter is sent again (off: nothing is copied or used)
    #[arg(long, default_value = "on", value_name = "on|off")]
    pub frame_tail: Switch,

    /// Keep all memory of this process in RAM: the guest's memory is never swapped, neither here nor on the side
    /// that waits. Needs CAP_IPC_LOCK, which root usually has, or an unlimited RLIMIT_MEMLOCK
    #[arg(long)]
    pub lock_memory: bool,

    /// Append events as JSON lines to this file (- for standard output). It grows by about a megabyte in the
    /// first minute and some tens of kilobytes a minute later: up to a gigabyte or more a month
    #[arg(long, value_name = "FILE")]
    pub events: Option<PathBuf>,

    /// Rename the file of events to FILE.1 and begin a new one before it becomes larger than this (64K or more). The file
    /// must be this process' own
    #[arg(long, value_name = "SIZE", requires = "events", value_parser = parse_events_max)]
    pub events_max: Option<u64>,

    /// How many old files of events are kept with --events-max, 0 to 1000
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = RangedU64ValueParser::<u32>::new().range(0..=1000))]
    pub events_keep: u32,

    /// While this host is the VM's standby, record the VM in this directory of its own: its memory and disks, and every
    /// checkpoint since. keep=TIME (10s to 30d) or keep=SIZE says how much of the past is kept. See outlive history and
    /// docs/time-machine.md [default of keep: 10m]
    #[arg(long, value_name = "DIR[,keep=TIME|SIZE]", value_parser = RecordSpec::from_str)]
    pub record: Option<RecordSpec>,

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

    /// Share of a core, in percent, that each host may take to compare pages of both hosts all the time; a copy that
    /// differs is made anew (0.01 to 100; off: never)
    #[arg(long, default_value = "0.5", value_name = "PERCENT|off", value_parser = AuditShare::from_str)]
    pub audit: AuditShare,

    /// Confine this process: no rights but those of its user, no files but those that the options name, no system calls
    /// but those that each thread needs; a thread that tries anything else ends the process, and the VM goes on at the
    /// other host (log: such calls are made, and the kernel logs them; off: nothing is confined). See docs/sandbox.md
    #[arg(long, default_value = "on", value_name = "on|log|off")]
    pub sandbox: Mode,

    /// Become this user once the tap can be made, if root starts this process. Images and their directories, keys and a
    /// file: arbiter must be this user's, and it needs /dev/kvm [default: the user that starts it]
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,

    /// End when standard input is closed (for programs that start Outlive and may be killed themselves)
    #[arg(long, hide = true)]
    pub exit_with_stdin: bool,
}

impl ActiveOptions {
    /// What protects the links.
    pub(crate) fn security(&self) -> Security {
        Security::of(self.keys.as_deref(), self.insecure)
    }

    /// What cuts a lost primary off, if anything does.
    pub(crate) fn fence(&self) -> Option<Fence> {
        self.fence.clone().map(|command| Fence { command, limit: self.fence_timeout })
    }

    /// How long the way to the clients must be lost before it counts.
    pub(crate) fn uplink_lost_after(&self) -> Duration {
        self.uplink_timeout.unwrap_or(Duration::from_secs(2))
    }

    /// Where events go.
    pub(crate) fn events_to(&self) -> EventsTo {
        EventsTo { path: self.events.clone(), max: self.events_max, keep: self.events_keep }
    }
}

/// Something that is done or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Done
    On,
    /// Not done
    Off,
}

impl Switch {
    /// As an argument.
    pub(crate) fn name(self) -> &'static str {
        if self.is_on() { "on" } else { "off" }
    }

    /// Whether it is done.
    pub fn is_on(self) -> bool {
        self == Self::On
    }
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
