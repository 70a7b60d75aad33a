//! `outlive standby`.

use std::str::FromStr;

use clap::Args;

use super::active::ActiveOptions;
use super::values::{NetSpec, StandbyDisk, parse_listen, parse_name, parse_standby_card};

/// `outlive standby`.
#[derive(Clone, Debug, Args)]
#[command(after_help = STANDBY_EXAMPLES)]
pub struct StandbyOptions {
    /// Address to listen on
    #[arg(long, value_name = "ADDR:PORT", value_parser = parse_listen)]
    pub listen: String,

    /// The third place that says who may run the VM: a directory that both hosts see
    #[arg(long, value_name = "file:DIR")]
    pub arbiter: String,

    /// Network card of the VM on this host: a tap interface that is created, and the bridge that it joins
    #[arg(long, value_name = "tap=NAME[,bridge=BR]", value_parser = parse_standby_card)]
    pub net: Option<NetSpec>,

    /// Image on this host for each of the VM's disks, in their order. The primary's data overwrites it if it
    /// holds nothing or an older state of the same VM; with overwrite, whatever it holds
    #[arg(long = "disk", value_name = "path=FILE[,overwrite]", value_parser = StandbyDisk::from_str)]
    pub disks: Vec<StandbyDisk>,

    /// Serve this VM only [default: any that its images allow]
    #[arg(long, value_name = "NAME|ID", value_parser = parse_name)]
    pub vm: Option<String>,

    /// Options that apply once the VM runs here.
    #[command(flatten)]
    pub active: ActiveOptions,
}

const STANDBY_EXAMPLES: &str = "\
Examples:
  outlive standby --listen 0.0.0.0:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0
      waits for one VM and takes it over when its host dies
  outlive standby --listen 0.0.0.0:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0 --disk path=server.img
      the same for a VM with a disk; to make the image: truncate --size SIZE server.img
  outlive standby --listen 0.0.0.0:7000 --arbiter file:/srv/arbiter --net tap=vm0,bridge=br0 --standby hosta:7000
      the same, and protects the VM with host a after a takeover

The link is not encrypted in this version: use a network that only the two hosts share.";
