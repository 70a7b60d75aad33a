//! `outlive run`.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use clap::Args;

use super::active::ActiveOptions;
use super::standby::StandbyOptions;
use super::values::{
    BootFrom, DiskSpec, DiskUse, IpSpec, NetSpec, StandbyDisk, parse_listen, parse_name, parse_size,
    parse_vcpus,
};
use crate::arbiter;
use crate::disk::DangerKind;

/// `outlive run`.
#[derive(Clone, Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct RunOptions {
    /// Name of the VM, for people [default: the name that its images have, else vm]
    #[arg(long, value_parser = parse_name)]
    pub name: Option<String>,

    /// Virtual CPUs, 1 to 32
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = parse_vcpus)]
    pub vcpus: u8,

    /// Memory, for example 256M, 1.5G or 2G, from 32M to what this host has [default: 1G for Linux, else 256M]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub memory: Option<u64>,

    /// Linux kernel to boot, as distributions ship it (bzImage or ELF). Without it the built-in guest runs: a
    /// Redis server for trying Outlive out
    #[arg(long, value_name = "FILE", group = "linux")]
    pub kernel: Option<PathBuf>,

    /// Boot the kernel that the guest has on its disk: kernel, initrd and command line as GRUB's or a Boot Loader
    /// Specification's default entry in /boot says (ext2 to ext4), read again at every restart of the guest. It is the
    /// first disk, or the one with this serial number or at this position, from 0
    #[arg(long, value_name = "disk[=N|SERIAL]", group = "linux", requires = "disks", value_parser = BootFrom::from_str)]
    pub boot: Option<BootFrom>,

    /// Initial RAM disk of --kernel
    #[arg(long, value_name = "FILE", requires = "kernel", conflicts_with = "boot")]
    pub initrd: Option<PathBuf>,

    /// Its command line [default: console=ttyS0]. With --boot, words behind those of the disk's entry, so that of a
    /// word that counts once these win; console=ttyS0 is added if no word names a serial console
    #[arg(long, value_name = "TEXT", requires = "linux")]
    pub append: Option<String>,

    /// Disk of the guest: a raw image or a block device (repeat for more: vda, vdb ...); the built-in guest
    /// leaves its disks alone. With thin, a standby may have less room than the whole image takes; queues=1 to 16
    #[arg(long = "disk", value_name = "path=FILE[,readonly][,shared][,thin][,serial=TEXT][,queues=N][,sector=BYTES]", value_parser = DiskSpec::from_str)]
    pub disks: Vec<DiskSpec>,

    /// Network card: a tap interface that is created, and the bridge that it joins. mtu=9000 tells the guest that
    /// its packets may be so large; vlan=10 puts the bridge's port into a VLAN; queues=1 to 8. The standby's card gets
    /// the same
    #[arg(long, value_name = "tap=NAME[,bridge=BR][,mac=MAC][,queues=N][,mtu=N][,vlan=N]", value_parser = NetSpec::from_str)]
    pub net: Option<NetSpec>,

    /// IPv4 address of the built-in guest with its prefix length
    #[arg(long, default_value = "10.77.0.2/24", value_name = "ADDR/LEN", conflicts_with = "linux", value_parser = IpSpec::from_str)]
    pub ip: IpSpec,

    /// Default gateway of the built-in guest
    #[arg(long, value_name = "ADDR", requires = "net", conflicts_with = "linux")]
    pub gateway: Option<Ipv4Addr>,

    /// The third place that says who may run the VM: file:DIR, a directory that both hosts see; etcd:URL,...;
    /// outlive:HOST:PORT, where outlive arbiter serve listens; or manual, an operator (docs/arbitration.md)
    #[arg(long, value_name = "ARBITER")]
    pub arbiter: Option<String>,

    /// Address on which this process waits as the VM's standby once another host has won the VM [default: it
    /// ends with exit code 3]
    #[arg(long, value_name = "ADDR:PORT", requires = "arbiter", value_parser = parse_listen)]
    pub listen: Option<String>,

    /// Start the VM only if this host has its newest image, else wait as its standby. So both hosts can be
    /// started with the same command, at any time and in any order
    #[arg(long, requires_all = ["listen", "arbiter", "disks"], conflicts_with_all = [
        "accept_stale_image", "accept_replica", "accept_other_arbiter", "accept_lost_claims",
        "accept_foreign_image", "accept_moved_image", "accept_other_disks", "accept_shared_disk",
    ])]
    pub or_standby: bool,

    /// Seed of the guest's random numbers [default: fresh random numbers]
    #[arg(long, value_name = "N", hide = true)]
    pub seed: Option<u64>,

    /// Options that apply while the VM runs here.
    #[command(flatten)]
    pub active: ActiveOptions,

    /// The accepted dangers. They come last, because their heading holds for all options after it.
    #[command(flatten)]
    pub accept: AcceptOptions,
}

/// Starts that may give something up, or run a VM twice. Each is refused without its own option and is
/// written to the log, the events and the image's sidecar. All but `--accept-replica`, `--accept-moved-image`,
/// `--accept-other-disks` and `--accept-shared-disk` begin a new VM with the old one as ancestor.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "What may be given up (each only after `outlive image show`)")]
pub struct AcceptOptions {
    /// Start although the VM has since run elsewhere: give up what was committed there
    #[arg(long)]
    pub accept_stale_image: bool,

    /// Start from a standby's copy: give up what the other host has beyond its last commit
    #[arg(long)]
    pub accept_replica: bool,

    /// Start with another arbiter than the image's VM had; that VM must run nowhere
    #[arg(long)]
    pub accept_other_arbiter: bool,

    /// Start although the arbiter has lost the claims of the image's VM; that VM must run nowhere
    #[arg(long)]
    pub accept_lost_claims: bool,

    /// Start without the arbiter that the image's VM had; that VM must run nowhere
    #[arg(long, conflicts_with = "arbiter")]
    pub accept_no_arbiter: bool,

    /// Make one VM of images that belonged to several
    #[arg(long)]
    pub accept_foreign_image: bool,

    /// Start although an image is not the file that its sidecar was written for (it was copied, restored, made anew
    /// or cut); no other copy of the VM may run
    #[arg(long)]
    pub accept_moved_image: bool,

    /// Start with the VM's disks in another order, or without some of them
    #[arg(long)]
    pub accept_other_disks: bool,

    /// Start on a shared disk although another host may run a VM on it; that VM must run nowhere
    #[arg(long)]
    pub accept_shared_disk: bool,
}

impl AcceptOptions {
    /// The dangers that the options accept.
    pub(crate) fn dangers(&self) -> Vec<DangerKind> {
        let named = [
            (self.accept_stale_image, DangerKind::StaleImage),
            (self.accept_replica, DangerKind::Replica),
            (self.accept_other_arbiter, DangerKind::OtherArbiter),
            (self.accept_lost_claims, DangerKind::LostClaims),
            (self.accept_no_arbiter, DangerKind::NoArbiter),
            (self.accept_foreign_image, DangerKind::ForeignImage),
            (self.accept_moved_image, DangerKind::MovedImage),
            (self.accept_other_disks, DangerKind::OtherDisks),
            (self.accept_shared_disk, DangerKind::SharedDisk),
        ];
        named.into_iter().filter(|(is, _)| *is).map(|(_, danger)| danger).collect()
    }
}

impl RunOptions {
    /// The same, with the arbiter asked with this process's keys.
    pub(crate) fn with_keys(&self) -> Self {
        let arbiter = self.arbiter.as_deref();
        let arbiter = arbiter.map(|it| arbiter::with_keys(it, self.active.keys.as_deref()));
        Self { arbiter, ..self.clone() }
    }

    /// Bytes of guest memory.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.unwrap_or(if self.kernel.is_some() || self.boot.is_some() { 1 << 30 } else { 256 << 20 })
    }

    /// The command line of a kernel that is a file.
    pub(crate) fn command_line(&self) -> String {
        self.append.clone().unwrap_or_else(|| "console=ttyS0".into())
    }

    /// The position of the disk from which the guest boots. `None` if it boots from none, or there is no such disk.
    pub(crate) fn boot_disk(&self) -> Option<usize> {
        let BootFrom(wanted) = self.boot.as_ref()?;
        let Some(wanted) = wanted else { return (!self.disks.is_empty()).then_some(0) };
        let of_serial = self.disks.iter().position(|disk| disk.serial.as_ref() == Some(wanted));
        of_serial.or_else(|| wanted.parse().ok().filter(|number| *number < self.disks.len()))
    }

    /// The disks that the VM writes to and does not share, with their positions among all disks.
    pub(crate) fn written(&self) -> Vec<(u16, &Path)> {
        let written = self.disks.iter().zip(0..).filter(|(disk, _)| !disk.readonly && !disk.shared);
        written.map(|(disk, number)| (number, disk.path.as_path())).collect()
    }

    /// The disks that both hosts write to.
    pub(crate) fn shared(&self) -> Vec<&Path> {
        let shared = self.disks.iter().filter(|disk| disk.shared && !disk.readonly);
        shared.map(|disk| disk.path.as_path()).collect()
    }

    /// What this process would have been given as the VM's standby, if it may become one.
    pub(crate) fn as_standby(&self, name: Option<&str>) -> Option<StandbyOptions> {
        let (listen, arbiter) = (self.listen.clone()?, self.arbiter.clone()?);
        // The rest of card and disks comes from the primary.
        let card = |net: &NetSpec| NetSpec { mac: None, queues: 1, ..net.clone() };
        let disk = |disk: &DiskSpec| {
            let said = Some(DiskUse { readonly: disk.readonly, shared: disk.shared });
            StandbyDisk { path: disk.path.clone(), overwrite: false, thin: disk.thin, said }
        };
        Some(StandbyOptions {
            listen,
            arbiter,
            net: self.net.as_ref().map(card),
            disks: self.disks.iter().map(disk).collect(),
            vm: name.map(str::to_owned),
            max_memory: None,
            known: None,
            was_run: true,
            once: false,
            active: self.active.clone(),
        })
    }
}

const RUN_EXAMPLES: &str = "\
Examples:
  outlive run --net tap=vm0 --ip 10.77.0.2/24
      an unprotected VM with a Redis server on port 6379; to reach it from this host:
      ip addr add 10.77.0.1/24 dev vm0; redis-cli -h 10.77.0.2
  outlive run --net tap=vm0,bridge=br0 --ip 10.0.0.5/24 --standby hostb:7000 --arbiter file:/srv/arbiter
      the same VM protected by host b; /srv/arbiter is a directory that both hosts see
  outlive run --kernel /boot/vmlinuz-6.1.0-40-amd64 --initrd /boot/initrd.img-6.1.0-40-amd64 \\
      --append 'console=ttyS0 root=/dev/vda1' --disk path=/srv/server.img --console stdio
      a Linux server from its disk image, with its console on this terminal
  outlive run --boot disk --append panic=10 --disk path=/srv/server.img --net tap=vm0,bridge=br0 --console stdio
      the same with the kernel that the server itself has in /boot, so that its upgrades of the kernel count
  outlive run --listen 0.0.0.0:7000 --standby hostb:7000 --arbiter file:/srv/arbiter --disk path=/srv/server.img ...
      a VM whose host becomes its standby by itself, should the other host win it
  outlive run --or-standby --listen 0.0.0.0:7000 --standby hostb:7000 --arbiter file:/srv/arbiter ...
      the same on both hosts (with the other host as --standby): the one with the newest image starts the VM
  outlive run --vcpus 2 --memory 1G --policy interval --interval 500us --max-dirty 8192 ...
      two checkpoints a millisecond, whatever the guest does
  outlive run --uplink bond0 --uplink-timeout 5s --disk-timeout 1m ...
      leaves the VM to its standby when bond0 has no carrier for 5 s, or a disk does not answer for a minute
  outlive run --events /var/log/outlive/events --events-max 64M --events-keep 8 ...
      events in files of 64 MiB, the present one and the last eight";
