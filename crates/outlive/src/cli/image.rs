//! `outlive image`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::values::{parse_name, parse_size};

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
    /// Make a raw image, as VMs have it, of a disk image in another format: qcow2, vmdk, vhdx, vdi or raw
    Import(ImportOptions),
    /// Make a disk from which cloud-init configures a distribution's cloud image at its first start
    Seed(SeedOptions),
}

/// `outlive image import`.
#[derive(Clone, Debug, Args)]
#[command(after_help = IMPORT_EXAMPLES)]
pub struct ImportOptions {
    /// What is imported: its format is told by its first bytes, not by its name
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// The image that is made: a new file, or a block device
    #[arg(long, value_name = "IMAGE")]
    pub to: PathBuf,
    /// Make the disk larger than it is in FILE, for example 20G. The new space is a hole; the guest grows its file system
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub size: Option<u64>,
    /// Lose what IMAGE has now. A disk of a VM is not overwritten
    #[arg(long)]
    pub overwrite: bool,
    /// Read other files that FILE names: an image that it is based on, a file for its data. Only for an image that you made:
    /// another one could name any file of this host
    #[arg(long)]
    pub allow_backing: bool,
    /// Read both once more and compare them before the image gets its name
    #[arg(long)]
    pub verify: bool,
}

/// `outlive image seed`.
#[derive(Clone, Debug, Args)]
#[command(after_help = SEED_EXAMPLES)]
pub struct SeedOptions {
    /// What cloud-init is to do: #cloud-config (YAML), a script (#!), #include or a MIME message
    #[arg(long, value_name = "FILE")]
    pub user_data: PathBuf,
    /// Which instance this is, as YAML with instance-id [default: made from everything else, so a changed seed is a new
    /// instance]
    #[arg(long, value_name = "FILE", conflicts_with = "hostname")]
    pub meta_data: Option<PathBuf>,
    /// The network, as YAML with version: 1 or 2. Without it, cloud images ask DHCP
    #[arg(long, value_name = "FILE")]
    pub network_config: Option<PathBuf>,
    /// What the vendor of the image wants, in the forms of user-data
    #[arg(long, value_name = "FILE")]
    pub vendor_data: Option<PathBuf>,
    /// Name of the server
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// The image that is made, of 2 MiB
    #[arg(long, value_name = "IMAGE")]
    pub to: PathBuf,
    /// Lose what IMAGE has now. A disk of a VM is not overwritten
    #[arg(long)]
    pub overwrite: bool,
}

const IMAGE_EXAMPLES: &str = "\
Examples:
  outlive image show --arbiter file:/srv/arbiter /srv/vm/server.img
  outlive image accept --arbiter file:/srv/arbiter /srv/vm/server.img          what would be given up
  outlive image accept --arbiter file:/srv/arbiter --yes /srv/vm/server.img    a new VM begins with what is in it
  outlive image import debian-12-genericcloud-amd64.qcow2 --to /srv/vm/server.img
  outlive image seed --user-data user-data.yaml --hostname server --to /srv/vm/seed.img

To start from an image that is only out of date, or a standby's copy, outlive run has words of its own.";

const IMPORT_EXAMPLES: &str = "\
Examples:
  outlive image import debian-12-genericcloud-amd64.qcow2 --to /srv/vm/server.img --size 20G
  outlive image import exported-disk1.vmdk --to /dev/vg0/server --verify
  outlive image import base.qcow2 --to /srv/vm/server.img --allow-backing

The image gets its name when it is whole and durable; until then it is IMAGE.importing. It is sparse: what is zero takes no
room. Encrypted images, VMware's with several files, and those that have only what differs from another image (snapshots of
vmdk, vhdx and vdi) are not read; the error names the command of qemu-img that makes a raw image of them.";

const SEED_EXAMPLES: &str = "\
Examples:
  outlive image seed --user-data user-data.yaml --hostname server --to /srv/vm/seed.img
  outlive image seed --user-data user-data.yaml --network-config network.yaml --to /srv/vm/seed.img

A NoCloud seed: a FAT file system with the label CIDATA. The same input makes the same bytes. Give it to outlive run as a second
disk; cloud-init does its work once for each instance-id. YAML is not checked here: on a machine that has cloud-init,
cloud-init schema --config-file user-data.yaml does it.";
