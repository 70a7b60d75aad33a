//! `outlive doctor`.

use std::path::PathBuf;

use outlive_node::Host;

/// `outlive doctor`.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct DoctorOptions {
    /// The other host of a pair, whose node is asked. Give the address at which the link reaches it: NAME@ADDRESS
    /// [default: this host alone]
    #[arg(long, value_name = "HOST[:PORT]")]
    pub peer: Option<Host>,

    /// Directory with the keys for --peer [default: the variable OUTLIVE_KEYS, or /etc/outlive/keys]
    #[arg(long, value_name = "DIR", requires = "peer")]
    pub keys: Option<PathBuf>,

    /// Directory with this host's definitions
    #[arg(long, value_name = "DIR", default_value = "/etc/outlive/vms")]
    pub vms: PathBuf,

    /// Name of this host, for the definitions' [host.NAME] [default: the host's own]
    #[arg(long, value_name = "NAME")]
    pub host: Option<String>,

    /// Write the findings as JSON
    #[arg(long)]
    pub json: bool,
}

const EXAMPLES: &str = "\
It changes nothing. The other host's node must have --listen (docs/node.md); both nodes check their own host. The way to
it is measured by one connection with TLS, so a link may carry more.

Examples:
  outlive doctor                               this host, with the arbiters of its VMs
  outlive doctor --peer hostb                  this host and host b, side by side
  outlive doctor --peer hostb@10.0.9.2         by the network of the link
  outlive doctor --peer hostb --json           the same for programs";
