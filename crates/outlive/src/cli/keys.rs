//! `outlive keys`.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Subcommand};
use outlive_epoch::VmId;

use crate::keys::USUAL;

/// `outlive keys`.
#[derive(Clone, Debug, Args)]
#[command(after_help = KEYS_EXAMPLES)]
pub struct KeysOptions {
    /// What to do.
    #[command(subcommand)]
    pub command: KeysCommand,
}

/// The commands of `outlive keys`.
#[derive(Clone, Debug, Subcommand)]
pub enum KeysCommand {
    /// Make a private CA and this host's certificate: once, on one host
    Init {
        /// A new or empty directory
        #[arg(value_name = "DIR", default_value = USUAL)]
        directory: PathBuf,
        /// Name of this host [default: the one that the system has]
        #[arg(long, value_name = "NAME")]
        host: Option<String>,
        /// Make the keys of the other host, too, as outlive keys issue does: NAME.keys, to be copied there (repeat for
        /// more). For hosts with different rights use outlive keys issue
        #[arg(long, value_name = "NAME", conflicts_with_all = ["send", "hold", "arbiter"])]
        issue: Vec<String>,
        /// What it may do.
        #[command(flatten)]
        grant: GrantOptions,
    },
    /// Make the keys of another host, as a directory to be copied there
    Issue {
        /// Name of that host
        #[arg(long, value_name = "NAME")]
        host: String,
        /// The directory with the CA
        #[arg(long, value_name = "DIR", default_value = USUAL)]
        keys: PathBuf,
        /// Where to make the directory [default: NAME.keys]
        #[arg(long, value_name = "DIR")]
        to: Option<PathBuf>,
        /// What it may do.
        #[command(flatten)]
        grant: GrantOptions,
    },
    /// Make the keys of an operator, who then may use the API of every host's node over the network, for everything
    Operator {
        /// Name of the person or program, for logs; no host's
        #[arg(value_name = "NAME")]
        name: String,
        /// The directory with the CA
        #[arg(long, value_name = "DIR", default_value = USUAL)]
        keys: PathBuf,
        /// Where to make the directory [default: NAME.keys]
        #[arg(long, value_name = "DIR")]
        to: Option<PathBuf>,
        /// How long the certificate counts.
        #[command(flatten)]
        days: DaysOption,
    },
    /// Renew this host's key and certificate; links that are open go on with the old ones
    Rotate {
        /// The directory with the CA
        #[arg(long, value_name = "DIR", default_value = USUAL)]
        keys: PathBuf,
        /// Make a new CA instead; certificates of the old one still count
        #[arg(long, conflicts_with_all = ["forget_old_cas", "days"])]
        ca: bool,
        /// From now on accept certificates of the newest CA only
        #[arg(long, conflicts_with = "days")]
        forget_old_cas: bool,
        /// Also if hosts that have certificates of an old CA only would be shut out, or may not know the new CA
        #[arg(long, conflicts_with = "ca")]
        force: bool,
        /// How long the certificate counts.
        #[command(flatten)]
        days: DaysOption,
    },
    /// Show whose keys these are, what they allow and when they expire
    Show {
        /// The directory
        #[arg(long, value_name = "DIR", default_value = USUAL)]
        keys: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Accept certificates no longer: those that were made here for a host or an operator, or one
    Revoke {
        /// Name of the host or operator, or the serial number of the certificate
        #[arg(value_name = "NAME|SERIAL")]
        who: String,
        /// The directory
        #[arg(long, value_name = "DIR", default_value = USUAL)]
        keys: PathBuf,
    },
}

/// What a certificate allows, and how long.
#[derive(Clone, Debug, Args)]
pub struct GrantOptions {
    /// Only for the VM with this id, which outlive arbiter list and outlive image show tell (repeat for more)
    /// [default: any VM, also one that does not exist yet]
    #[arg(long = "vm", value_name = "ID|any", value_parser = parse_vm)]
    pub(crate) vm: Vec<AnyVm>,

    /// It may run VMs and send them to a standby [default: both]
    #[arg(long)]
    pub send: bool,

    /// It may hold copies of VMs and take them over [default: both]
    #[arg(long)]
    pub hold: bool,

    /// It may be the arbiter: serve generations to hosts with outlive arbiter serve. Without --vm, --send and --hold it
    /// then may neither run nor hold VMs, as suits a third machine
    #[arg(long)]
    pub arbiter: bool,

    /// How long the certificate counts.
    #[command(flatten)]
    pub days: DaysOption,
}

impl GrantOptions {
    /// The VMs; none means any.
    ///
    /// # Errors
    /// Any VM and one of them.
    pub(crate) fn vms(&self) -> Result<Vec<VmId>, AnyAndOne> {
        let ids: Vec<VmId> = self.vm.iter().filter_map(|vm| vm.0).collect();
        match ids.first() {
            Some(id) if ids.len() < self.vm.len() => Err(AnyAndOne(*id)),
            _ => Ok(ids),
        }
    }
}

/// Whoever names one VM means no other.
#[derive(Debug, thiserror::Error)]
#[error("--vm any allows every VM, so --vm {0} beside it would say nothing: give one of the two")]
pub(crate) struct AnyAndOne(VmId);

/// A VM's id, or nothing for any.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AnyVm(Option<VmId>);

fn parse_vm(text: &str) -> Result<AnyVm, String> {
    if text == "any" {
        return Ok(AnyVm(None));
    }
    let id: VmId = text.parse().map_err(|why| format!("{why}; any allows all VMs"))?;
    Ok(AnyVm(Some(id)))
}

/// How long a certificate counts.
#[derive(Clone, Copy, Debug, Args)]
pub struct DaysOption {
    /// Days until the certificate expires. No new link is made with it then; one that is open goes on
    #[arg(long, default_value_t = 398, value_name = "N", value_parser = RangedU64ValueParser::<u64>::new().range(1..=3650))]
    pub days: u64,
}

impl DaysOption {
    /// As a time.
    pub(crate) fn life(self) -> Duration {
        Duration::from_secs(self.days * 24 * 3600)
    }
}

const KEYS_EXAMPLES: &str = "\
Examples:
  outlive keys init                                  this host's keys, in /etc/outlive/keys, and a CA, beside them
  outlive keys init --issue hostb                    the same, and host b's keys in hostb.keys; then:
  ssh root@hostb mkdir -p -m 700 /etc/outlive/keys && scp -p hostb.keys/* root@hostb:/etc/outlive/keys/ && rm -r hostb.keys
  outlive keys issue --host hostb                    the second host's keys, the first or new ones; then:
  ssh root@hostb mkdir -p -m 700 /etc/outlive/keys && scp -p hostb.keys/* root@hostb:/etc/outlive/keys/ &&
    rm -r hostb.keys
  outlive keys issue --host hostb --vm 3f2a9c04d17be6508c5d2e9b41f6a703 --hold
                                                     a host that may only hold copies of one VM
  outlive keys issue --host third --arbiter          the machine on which outlive arbiter serve runs
  outlive keys operator alice --days 90              alice may use the API of every host's node, for everything
  outlive keys show                                  names, rights, expiry, warnings
  outlive keys rotate                                a new key and certificate for this host
  outlive keys rotate --ca                           a new CA; docs/trust.md has the steps
  outlive keys revoke hostb                          accept its certificates no longer; copy the list to every host";
