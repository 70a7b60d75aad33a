//! What the commands are given.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Args, Subcommand};
use clap_complete::ArgValueCompleter;

use super::names;

use crate::host::{Host, parse_listen};

/// Where a node is asked, and with what.
#[derive(Clone, Debug, Args)]
pub struct Whom {
    /// The node's socket on this host [default: /run/outlive-node/api]
    #[arg(long, value_name = "PATH", conflicts_with = "host")]
    pub socket: Option<PathBuf>,

    /// Ask the node of another host, over TLS [default: the variable OUTLIVE_HOST, or this host's; its port: 7020]
    #[arg(long, value_name = "HOST[:PORT]")]
    pub host: Option<Host>,

    /// Directory with the keys for --host [default: the variable OUTLIVE_KEYS, or /etc/outlive/keys]
    #[arg(long, value_name = "DIR")]
    pub keys: Option<PathBuf>,
}

/// Where the node is asked, and how answers are shown.
#[derive(Clone, Debug, Args)]
pub struct Api {
    /// The node.
    #[command(flatten)]
    pub whom: Whom,

    /// For programs: the API's answer, as JSON
    #[arg(long)]
    pub json: bool,
}

/// `outlive top`.
#[derive(Clone, Debug, Args)]
#[command(after_help = TOP_HELP)]
pub struct TopOptions {
    /// Name of the VM that is looked at first
    #[arg(add = ArgValueCompleter::new(names::complete))]
    pub name: Option<String>,

    /// Print one picture as text, with all VMs, and end
    #[arg(long)]
    pub once: bool,

    /// The node.
    #[command(flatten)]
    pub whom: Whom,
}

/// `outlive node`.
#[derive(Clone, Debug, Args)]
#[command(after_help = NODE_HELP)]
pub struct NodeOptions {
    /// What to do.
    #[command(subcommand)]
    pub command: NodeCommand,
}

/// What can be done with a node.
#[derive(Clone, Debug, Subcommand)]
pub enum NodeCommand {
    /// Keep the VMs of this host as they are desired, until this process is told to stop; the VMs run on
    Run(Serve),
    /// Look at all definitions without starting anything
    #[command(after_help = CHECK_HELP)]
    Check {
        /// Directory with the definitions
        #[arg(long, value_name = "DIR", default_value = VMS)]
        vms: PathBuf,
        /// Name of the host, for the definitions' [host.NAME] [default: the host's own]
        #[arg(long, value_name = "NAME")]
        host: Option<String>,
        /// For programs: a JSON array with an object for each VM
        #[arg(long)]
        json: bool,
    },
    /// Say what this host does
    Status(Api),
    /// Move all VMs that run here to their standbys, one after another, and start none from then on
    #[command(after_help = DRAIN_HELP)]
    Drain {
        /// The host is about to stop: shut down what cannot be moved, and end all standbys. What is desired stays
        #[arg(long)]
        stop: bool,
        /// How long each VM may take to be protected first, in seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        wait: u16,
        /// The node.
        #[command(flatten)]
        api: Api,
    },
    /// Show the VMs of this host in a browser, and give orders there, until this command is interrupted
    #[command(after_help = PAGE_HELP)]
    Page {
        /// Where the browser asks: an address of this host alone. Port 0 is a free one
        #[arg(long, value_name = "ADDRESS:PORT", default_value = "127.0.0.1:7080")]
        listen: SocketAddr,
        /// The node's socket
        #[arg(long, value_name = "PATH", default_value = API)]
        socket: PathBuf,
        /// End when standard input is closed
        #[arg(long, hide = true)]
        exit_with_stdin: bool,
    },
    /// End the maintenance; VMs stay where they are
    Undrain(Api),
    /// Show what happens with the VMs of this host, as it happens, until this command is interrupted
    #[command(after_help = EVENTS_HELP)]
    Events {
        /// Begin after this event instead of now, so that none is missed
        #[arg(long, value_name = "ID")]
        after: Option<String>,
        /// The node.
        #[command(flatten)]
        api: Api,
    },
}

/// Where the node answers. It is in no directory that a VM's process may use: whoever connects here can have any
/// command started.
pub(super) const API: &str = "/run/outlive-node/api";
/// Where definitions are.
pub(super) const VMS: &str = "/etc/outlive/vms";

/// `outlive node run`.
#[derive(Clone, Debug, Args)]
#[command(after_help = RUN_HELP)]
pub struct Serve {
    /// Directory with the definitions: NAME.toml for each VM
    #[arg(long, value_name = "DIR", default_value = VMS)]
    pub vms: PathBuf,

    /// Directory for what is desired of each VM. It must survive a restart of the host
    #[arg(long, value_name = "DIR", default_value = crate::STATE)]
    pub state: PathBuf,

    /// Directory for sockets and locks of the VMs
    #[arg(long, value_name = "DIR", default_value = "/run/outlive")]
    pub run: PathBuf,

    /// Directory for logs of the VMs
    #[arg(long, value_name = "DIR", default_value = "/var/log/outlive")]
    pub logs: PathBuf,

    /// Socket of the API. Whoever may connect may do everything with the VMs
    #[arg(long, value_name = "PATH", default_value = API)]
    pub socket: PathBuf,

    /// Group that may connect, too [default: only the user of this process]
    #[arg(long, value_name = "GROUP")]
    pub socket_group: Option<String>,

    /// Address at which other hosts and operators may use the API, over TLS with certificates of both ends
    /// [default: only the socket]
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_listen)]
    pub listen: Option<String>,

    /// Directory with this host's keys, for --listen [default: /etc/outlive/keys]
    #[arg(long, value_name = "DIR", requires = "listen")]
    pub keys: Option<PathBuf>,

    /// Name of this host, for the definitions' [host.NAME] [default: the host's own]
    #[arg(long, value_name = "NAME")]
    pub host: Option<String>,

    /// End when standard input is closed
    #[arg(long, hide = true)]
    pub exit_with_stdin: bool,
}

/// `outlive vm`.
#[derive(Clone, Debug, Args)]
#[command(after_help = VM_HELP)]
pub struct VmOptions {
    /// What to do.
    #[command(subcommand)]
    pub command: VmCommand,
}

/// What can be done with VMs.
#[derive(Clone, Debug, Subcommand)]
pub enum VmCommand {
    /// Show all VMs of this host
    List(Api),
    /// Show one VM
    Show(One),
    /// Define a VM, or change its definition from its next start on
    Define {
        /// Name of the VM
        #[arg(add = ArgValueCompleter::new(names::complete))]
        name: String,
        /// Its definition; - reads standard input
        file: PathBuf,
        /// The node.
        #[command(flatten)]
        api: Api,
    },
    /// Remove the definition of a VM that is stopped. Its disks stay
    Undefine(One),
    /// Start a VM: here, or on the other host if that has its newest image; then this host waits as its standby
    Start(One),
    /// Shut a VM down, on the host where it runs. It stays stopped until it is started
    Stop {
        /// Name of the VM
        #[arg(add = ArgValueCompleter::new(names::complete))]
        name: String,
        /// Do not wait for the guest
        #[arg(long)]
        now: bool,
        /// This host is the VM's standby, and shall not be any more: the VM goes on at the other host, unprotected
        #[arg(long)]
        only_standby: bool,
        /// The node.
        #[command(flatten)]
        api: Api,
    },
    /// Move a VM that runs here to its standby
    HandOver(One),
    /// Show the end of the log of a VM's process
    Logs {
        /// Name of the VM
        #[arg(add = ArgValueCompleter::new(names::complete))]
        name: String,
        /// Only the last lines
        #[arg(short = 'n', long, value_name = "N")]
        lines: Option<usize>,
        /// Go on with what the process writes from now on, until this command is interrupted
        #[arg(long, short)]
        follow: bool,
        /// The node.
        #[command(flatten)]
        api: Api,
    },
}

impl VmCommand {
    /// Which node it is for.
    pub(super) fn api(&self) -> &Api {
        match self {
            Self::List(api) => api,
            Self::Define { api, .. } | Self::Stop { api, .. } | Self::Logs { api, .. } => api,
            Self::Show(one) | Self::Undefine(one) | Self::Start(one) | Self::HandOver(one) => &one.api,
        }
    }

    /// Which VM it is about.
    pub(super) fn name(&self) -> Option<&str> {
        match self {
            Self::List(_) => None,
            Self::Define { name, .. } | Self::Stop { name, .. } | Self::Logs { name, .. } => Some(name),
            Self::Show(one) | Self::Undefine(one) | Self::Start(one) | Self::HandOver(one) => Some(&one.name),
        }
    }
}

/// One VM.
#[derive(Clone, Debug, Args)]
pub struct One {
    /// Name of the VM
    #[arg(add = ArgValueCompleter::new(names::complete))]
    pub name: String,
    /// The node.
    #[command(flatten)]
    pub api: Api,
}

const NODE_HELP: &str = "\
Examples:
  outlive node run                   as systemd/outlive-node.service does
  outlive node check                 look at /etc/outlive/vms before anything is started
  outlive node status
  outlive node events                what happens with its VMs, as it happens
  outlive node drain                 empty this host before its maintenance
  outlive node undrain
  outlive node page                  the same in a browser: live figures of each VM, and buttons
  outlive node drain --host hostb --keys ~/alice.keys
                                     another host's node, with the keys of an operator (outlive keys operator alice)

docs/node.md begins with a quick start.";

const RUN_HELP: &str = "\
Each VM is a process of its own, outlive run. It goes on when this process is stopped or killed, and the next one finds
it again. So this process may be upgraded at any time.

Examples:
  outlive node run
  outlive node run --socket-group operators --host hosta
  outlive node run --listen 0.0.0.0:7020       other hosts, and operators with keys of outlive keys operator, too";

const CHECK_HELP: &str = "\
Examples:
  outlive node check
  outlive node check --vms . --host hostb      what host b would say to the definitions in this directory

A warning is about something that this host lacks now: a file, a user, a bridge.";

const DRAIN_HELP: &str = "\
Each VM moves as with outlive hand-over: no reboot, no lost connection. If one does not go, the others stay where they
are, and the host is active again. Afterwards this host is the standby of its VMs until it is switched off.

Examples:
  outlive node drain
  outlive node drain --wait 600      VMs may first be protected
  outlive node drain --stop          before the host stops, as systemd/outlive-node.service does";

const PAGE_HELP: &str = "\
It prints a link that opens the page in one browser, once. The page can do what this command's user can, but defines no
VMs. From another machine: ssh -L 7080:127.0.0.1:7080 HOST, and the link as it is.

Examples:
  outlive node page
  outlive node page --listen 127.0.0.1:0      at a free port";

const EVENTS_HELP: &str = "\
With --json each event is a line with its id, which --after takes. It goes on when the node is started anew. If events are
lost, the line says so (reset): ask for the VMs again.

Examples:
  outlive node events
  outlive node events --json --after 19ad2c1f3a0-17";

const TOP_HELP: &str = "\
It shows what the page of outlive node page shows: whether a failure of this host now would be survived, every VM, and
the last five minutes of the one that is looked at. Keys: arrows choose a VM, h hands it over and asks first, ? explains
the signs, q ends. NO_COLOR is obeyed.

Examples:
  outlive top
  outlive top web                    begin with this VM
  outlive top --once                 one picture as text
  outlive top --host hostb --keys ~/alice.keys";

const VM_HELP: &str = "\
Examples:
  outlive vm define web web.toml     web.toml: keys are the options of outlive run, see docs/node.md
  outlive vm start web
  outlive vm list
  outlive vm show web --json
  outlive vm logs web -n 20 --follow
  outlive vm hand-over web
  outlive vm stop web
  outlive vm list --host hostb       what another host's node says; its --listen must be given
  export OUTLIVE_HOST=hostb OUTLIVE_KEYS=$HOME/alice.keys; outlive vm start web";
