//! `outlive standby`.

use std::str::FromStr;

use clap::Args;
use outlive_epoch::VmId;

use super::active::ActiveOptions;
use super::values::{NetSpec, StandbyDisk, parse_listen, parse_name, parse_size, parse_standby_card};
use crate::arbiter;
use crate::network::here::{address, is_of_this_host, split};
use crate::process;

/// `outlive standby`.
#[derive(Clone, Debug, Args)]
#[command(after_help = STANDBY_EXAMPLES)]
pub struct StandbyOptions {
    /// Address to listen on
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_listen)]
    pub listen: String,

    /// The third place that says who may run the VM: file:DIR, a directory that both hosts see; etcd:URL,...;
    /// outlive:HOST:PORT, where outlive arbiter serve listens; or manual, an operator (docs/arbitration.md)
    #[arg(long, value_name = "ARBITER")]
    pub arbiter: String,

    /// Network card of the VM on this host: a tap interface that is created, and the bridge that it joins
    #[arg(long, value_name = "tap=NAME[,bridge=BR]", value_parser = parse_standby_card)]
    pub net: Option<NetSpec>,

    /// Image on this host for each of the VM's disks, in their order. The primary's data overwrites it if it
    /// holds nothing or an older state of the same VM; with overwrite, whatever it holds. With thin, its file
    /// system need not have room for all of it
    #[arg(long = "disk", value_name = "path=FILE[,overwrite][,thin]", value_parser = StandbyDisk::from_str)]
    pub disks: Vec<StandbyDisk>,

    /// Serve this VM only [default: any that its images allow]
    #[arg(long, value_name = "NAME|ID", value_parser = parse_name)]
    pub vm: Option<String>,

    /// Most memory that a VM may have here, with the kernel and initrd that it was started with; a larger one is refused.
    /// Checkpoints in flight come on top [default: what this host has available]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_memory: Option<u64>,

    /// The VM that ran here last, once one has run in this process.
    #[arg(skip)]
    pub(crate) known: Option<VmId>,

    /// These are the options of an `outlive run`: [`vm`](Self::vm) is a name, and its card and disks are as it says.
    #[arg(skip)]
    pub(crate) was_run: bool,

    /// End with exit code 3 once another host has won the VM, instead of waiting as its standby again
    #[arg(long)]
    pub once: bool,

    /// Options that apply once the VM runs here.
    #[command(flatten)]
    pub active: ActiveOptions,
}

/// A standby that would have itself for a standby once the VM runs here.
#[derive(Debug, thiserror::Error)]
#[error("--standby {standby} is this host itself (--listen {listen}): give the other host's address")]
pub(crate) struct ItsOwnStandby {
    standby: String,
    listen: String,
}

impl StandbyOptions {
    /// The same, with the arbiter asked with this process's keys.
    pub(crate) fn with_keys(&self) -> Self {
        let arbiter = arbiter::with_keys(&self.arbiter, self.active.keys.as_deref());
        Self { arbiter, ..self.clone() }
    }

    /// Refuses a standby that would be its own, as far as that can be known without asking a name server.
    ///
    /// # Errors
    /// See [`ItsOwnStandby`].
    pub(crate) fn refuse_itself(&self) -> Result<(), ItsOwnStandby> {
        match self.active.standbys.iter().find(|standby| self.listens_at(standby)) {
            Some(standby) => Err(ItsOwnStandby { standby: standby.clone(), listen: self.listen.clone() }),
            None => Ok(()),
        }
    }

    fn listens_at(&self, standby: &str) -> bool {
        let (Some((listens, port)), Some((host, its_port))) = (split(&self.listen), split(standby)) else {
            return false;
        };
        // Port 0 is any free one, which nobody can have named.
        if port != its_port || port == 0 {
            return false;
        }
        let (listens, host) = (listens.to_ascii_lowercase(), host.to_ascii_lowercase());
        match (address(&listens), address(&host)) {
            (Some(listens), Some(host)) => {
                listens == host || host.is_unspecified() || listens.is_unspecified() && is_of_this_host(host)
            }
            (Some(listens), None) => {
                listens.is_unspecified() && host == process::host_name().to_ascii_lowercase()
            }
            (None, _) => listens == host,
        }
    }

    /// The name of its socket for `outlive status`, where none is given.
    pub(crate) fn status_name(&self) -> String {
        let port = split(&self.listen).map_or(0, |(_, port)| port);
        format!("{}.standby-{port}", self.vm.as_deref().unwrap_or("any"))
    }
}

const STANDBY_EXAMPLES: &str = "\
Examples:
  outlive standby --listen 0.0.0.0:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0
      waits for one VM and takes it over when its host dies
  outlive standby --listen 0.0.0.0:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0 --disk path=server.img
      the same for a VM with a disk; to make the image: truncate --size SIZE server.img
  outlive standby --listen 0.0.0.0:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0 --standby hosta:7000
      the same, and protects the VM with host a after a takeover
  outlive standby --listen 0.0.0.0:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0 --disk path=/dev/mapper/lun --fence /usr/local/sbin/preempt-hosta
      a disk that both hosts see: host a loses its reservation before the VM runs here

The link needs keys of both hosts: outlive keys init on one, outlive keys issue for the other (docs/trust.md).";
