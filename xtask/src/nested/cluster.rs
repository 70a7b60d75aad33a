//! Nested hosts that see each other: a network for checkpoints, a network for clients, a directory that all
//! see, and a disk each. Killing QEMU cuts their power; their cables are cut at the harness's end.

use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::background::{Background, BackgroundError};
use super::host::{Host, HostError, Machine, Qemu, RunDirectory};
use super::image::{GuestImage, ImageError};
use super::kernel::{Kernel, KernelError, Series};
use super::network::{Net, Network, NetworkError};
use super::programs::quoted;
use super::share::{Share, ShareError, ShareServer, TAG};
use crate::packages;
use crate::run::Workspace;

/// Everything that a host needs to run `outlive`: KVM, its guest's network, its disk and its share.
const MODULES: [&str; 10] = [
    "kvm_amd",
    "tun",
    "bridge",
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_rng",
    "ext4",
    "virtiofs",
    "af_packet",
];
/// Paths of the share and of the disk in a host.
pub(crate) const SHARE: &str = "/share";
pub(crate) const DATA: &str = "/data";
/// The arbiter's directory, as the hosts see it.
pub(crate) const ARBITER: &str = "/share/arbiter";
/// The bridge of the guests in a host.
pub(crate) const BRIDGE: &str = "br0";
/// Time for a short command in a host.
const SHORT: Duration = Duration::from_secs(60);

/// Why hosts do not work.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClusterError {
    /// There is no network for them.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// There is no directory that all see.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// There is no kernel for them.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// There are no guests for them.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// One of them does not work.
    #[error("host {host}: {source}")]
    Host {
        /// Its number, from 1.
        host: usize,
        /// Why.
        source: HostError,
    },
    /// It has no power now.
    #[error("host {0} is off")]
    Off(usize),
    /// A command in a host ended with an exit status other than 0.
    #[error("host {host}: {command} ended with {status}:\n{output}")]
    Command {
        /// Which host.
        host: usize,
        /// The command.
        command: String,
        /// The exit status.
        status: i32,
        /// Its output.
        output: String,
    },
    /// A program in the background.
    #[error(transparent)]
    Background(#[from] BackgroundError),
    /// A file could not be used.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is nothing to emulate a machine with.
    #[error(transparent)]
    Qemu(HostError),
}

impl ClusterError {
    /// Whether packages could not be fetched, or not unpacked in a directory of their own.
    pub(crate) fn is_about_packages(&self) -> bool {
        matches!(
            self,
            ClusterError::Kernel(KernelError::Fetch { .. })
                | ClusterError::Image(ImageError::Fetch(_) | ImageError::Step { .. } | ImageError::Kernel(_))
        )
    }

    /// Whether something is missing on this machine, rather than broken.
    pub(crate) fn is_missing(&self) -> bool {
        matches!(
            self,
            ClusterError::Network(NetworkError::NotRoot | NetworkError::NoIp(_))
                | ClusterError::Share(ShareError::Missing)
                | ClusterError::Kernel(KernelError::NotFetched { .. })
                | ClusterError::Image(ImageError::NotBuilt | ImageError::NotRoot)
                | ClusterError::Qemu(HostError::NoQemu)
        )
    }
}

/// The parts of a cluster.
pub(crate) struct Options {
    /// The kernel of each host.
    pub(crate) kernels: Vec<Series>,
    /// Processors of each.
    pub(crate) cpus: u32,
    /// A feature that the processor of the last one lacks, by QEMU's name.
    pub(crate) last_lacks: Option<&'static str>,
    /// Memory of each.
    pub(crate) memory_mib: u32,
    /// Programs of this machine, by their path in the host.
    pub(crate) programs: Vec<(&'static str, PathBuf)>,
    /// Whether each has a disk with guest images at `/data`.
    pub(crate) guests: bool,
    /// Whether each has a serial line with a shell for a person.
    pub(crate) shell: bool,
    /// Whether missing parts are fetched and built.
    pub(crate) fetch: bool,
}

/// Hosts that see each other. Everything ends when this is dropped, or when the thread that started it ends.
pub(crate) struct Cluster {
    hosts: Vec<Place>,
    qemu: Qemu,
    kernels: Vec<Kernel>,
    server: ShareServer,
    options: Options,
    started: u32,
    image: Option<GuestImage>,
    network: Network,
    share: PathBuf,
    _directory: RunDirectory,
}

/// A host's place, whether it has power or not.
struct Place {
    directory: PathBuf,
    /// Keeps the directory with the short name: paths of sockets must be short.
    short: File,
    host: Option<(Host, Share)>,
}

impl Place {
    fn socket(&self, name: &str) -> PathBuf {
        format!("/proc/{}/fd/{}/{name}", std::process::id(), self.short.as_raw_fd()).into()
    }
}

impl Cluster {
    /// Starts the hosts side by side and waits until each takes commands and has its network.
    pub(crate) fn start(workspace: &Workspace, options: Options) -> Result<Cluster, ClusterError> {
        packages::provide(workspace, &[packages::IPROUTE], options.fetch);
        let ip = packages::find(workspace, "ip").unwrap_or_else(|| "ip".into());
        let network = Network::new(ip)?;
        let qemu = Qemu::get(workspace, options.fetch).map_err(ClusterError::Qemu)?;
        let server = ShareServer::get(workspace, options.fetch)?;
        let kernels = options.kernels.iter().map(|&series| Kernel::get(workspace, series, options.fetch));
        let kernels = kernels.collect::<Result<Vec<_>, _>>()?;
        let image = options.guests.then(|| GuestImage::get(workspace, options.fetch)).transpose()?;
        let directory = RunDirectory::new(&workspace.target.join("nested"))
            .map_err(|source| ClusterError::Host { host: 1, source })?;
        let share = directory.path.join("share");
        make_directory(&share.join("arbiter"))?;
        let mut hosts = Vec::new();
        for number in 1..=options.kernels.len() {
            network.add_host(number)?;
            hosts.push(Place::new(directory.path.join(format!("host-{number}")), image.as_ref())?);
            make_directory(&share.join(number.to_string()))?;
        }
        let mut cluster = Cluster {
            hosts,
            qemu,
            kernels,
            server,
            options,
            started: 0,
            image,
            network,
            share,
            _directory: directory,
        };
        let numbers: Vec<usize> = (1..=cluster.hosts.len()).collect();
        cluster.switch_on(&numbers)?;
        Ok(cluster)
    }

    /// Gives power to hosts that are off, and waits until they are up. Their disks are as they were.
    pub(crate) fn switch_on(&mut self, hosts: &[usize]) -> Result<(), ClusterError> {
        for &host in hosts {
            let started = self.spawn_host(host)?;
            self.hosts[host - 1].host = Some(started);
        }
        for &host in hosts {
            self.host(host)?.wait_until_up().map_err(|source| ClusterError::Host { host, source })?;
            self.command(host, &self.set_up(host))?;
        }
        Ok(())
    }

    fn spawn_host(&self, host: usize) -> Result<(Host, Share), ClusterError> {
        let place = &self.hosts[host - 1];
        let socket = place.socket("fs");
        // Left over by the previous file server.
        let _ = fs::remove_file(&socket);
        let share = self.server.serve(&self.share, &socket, &place.directory.join("share.log"))?;
        let machine = Machine {
            kernel: &self.kernels[host - 1],
            cpus: self.options.cpus,
            lacks: self.options.last_lacks.filter(|_| host == self.hosts.len()),
            memory_mib: self.options.memory_mib,
            modules: &MODULES,
            programs: &self.options.programs,
            devices: &self.devices(host),
            network: Some(&self.network),
        };
        let started = Host::switch_on(&self.qemu, &machine, &place.directory);
        Ok((started.map_err(|source| ClusterError::Host { host, source })?, share))
    }

    fn devices(&self, host: usize) -> Vec<String> {
        let place = &self.hosts[host - 1];
        let mut devices = vec!["-device".to_string(), "virtio-rng-pci,addr=0x4".to_string()];
        let mut add = |back: &str, spec: String, device: String| {
            devices.extend([format!("-{back}"), spec, "-device".to_string(), device]);
        };
        for (slot, net) in Net::ALL.into_iter().enumerate() {
            let (name, mac) = (net.cable(host), net.mac(host));
            add(
                "netdev",
                format!("tap,id={name},ifname={name},script=no,downscript=no"),
                format!("virtio-net-pci,netdev={name},mac={mac},romfile=,addr=0x{:x}", 0x10 + slot),
            );
        }
        add(
            "chardev",
            format!("socket,id=share,path={}", place.socket("fs").display()),
            format!("vhost-user-fs-pci,chardev=share,tag={TAG},addr=0x5"),
        );
        if self.image.is_some() {
            let disk = place.directory.join("disk").display().to_string().replace(',', ",,");
            add(
                "drive",
                format!("if=none,id=disk,format=raw,discard=unmap,file={disk}"),
                "virtio-blk-pci,drive=disk,addr=0x6".to_string(),
            );
        }
        if self.options.shell {
            let socket = place.socket("shell");
            devices.extend([
                "-chardev".to_string(),
                format!("socket,id=shell,path={},server=on,wait=off", socket.display()),
                "-serial".to_string(),
                "chardev:shell".to_string(),
            ]);
        }
        devices
    }

    /// Turns a machine that has just started into a host.
    fn set_up(&self, host: usize) -> String {
        let (link, clients) = (Net::Link, Net::Clients);
        let prefix = Net::PREFIX;
        let mut lines = vec![
            format!("hostname host-{host}"),
            format!("echo 'export PATH=/bin PS1=\"host-{host}# \"' >/etc/profile"),
            format!("mount -t virtiofs {TAG} {SHARE}"),
            format!("ip address add {}/{prefix} dev {}", link.host(host), link.card()),
            format!("ip link set {} up", link.card()),
            format!("ip link add {BRIDGE} type bridge"),
            format!("ip link set {} master {BRIDGE}", clients.card()),
            format!("ip address add {}/{prefix} dev {BRIDGE}", clients.host(host)),
            format!("ip link set {} up", clients.card()),
            format!("ip link set {BRIDGE} up"),
        ];
        // The first host makes it an arbiter; for the others it is one already.
        if let Some((program, _)) = self.options.programs.iter().find(|(path, _)| path.ends_with("/outlive"))
        {
            lines.push(format!("{program} arbiter init file:{ARBITER}"));
            // The same with keys, except that a second attempt is refused. All hosts share one certificate.
            lines.push(format!("({program} keys init {SHARE}/keys --host hosts 2>/dev/null || true)"));
            lines.push(format!("mkdir -p /etc/outlive && ln -sfn {SHARE}/keys /etc/outlive/keys"));
        }
        for other in 1..=self.hosts.len() {
            lines.push(format!("echo {} host-{other} >>/etc/hosts", link.host(other)));
        }
        if self.image.is_some() {
            lines.push(format!("mount -t ext4 /dev/vda {DATA}"));
        }
        format!("mkdir -p /etc && {}", lines.join(" && "))
    }

    /// How many hosts there are, with power or without.
    pub(crate) fn len(&self) -> usize {
        self.hosts.len()
    }

    fn host(&mut self, host: usize) -> Result<&mut Host, ClusterError> {
        self.hosts[host - 1].host.as_mut().map(|(it, _)| it).ok_or(ClusterError::Off(host))
    }

    /// Runs a line of shell in a host. Returns its exit status and both outputs.
    pub(crate) fn run(
        &mut self,
        host: usize,
        command: &str,
        limit: Duration,
    ) -> Result<(i32, String), ClusterError> {
        let mut output = String::new();
        let status = self.host(host)?.run(command, limit, |line| {
            output.push_str(line);
            output.push('\n');
        });
        Ok((status.map_err(|source| ClusterError::Host { host, source })?, output))
    }

    /// Runs a short command that must succeed. Returns its output.
    pub(crate) fn command(&mut self, host: usize, command: &str) -> Result<String, ClusterError> {
        let (status, output) = self.run(host, command, SHORT)?;
        if status == 0 {
            return Ok(output);
        }
        Err(ClusterError::Command { host, command: command.to_string(), status, output })
    }

    /// Starts a program with its arguments in a host and does not wait for it. Its output goes to the share,
    /// so that it can be read after the host has lost its power.
    pub(crate) fn spawn(
        &mut self,
        host: usize,
        name: &str,
        program: &str,
    ) -> Result<Background, ClusterError> {
        self.started += 1;
        let name = format!("{name}-{}", self.started);
        let background = Background::new(host, &name, &self.share.join(host.to_string()));
        let at = format!("{SHARE}/{host}/{name}");
        let inner = quoted(&format!("echo $$ >{at}.pid; exec {program}"));
        self.command(
            host,
            &format!("(sh -c {inner} </dev/null >{at}.log 2>&1; echo $? >{at}.status) >/dev/null 2>&1 &"),
        )?;
        Ok(background)
    }

    /// Ends a program in the background with a signal such as `TERM`.
    pub(crate) fn signal(&mut self, program: &Background, signal: &str) -> Result<(), ClusterError> {
        let pid = program.pid()?;
        self.command(program.host, &format!("kill -{signal} {pid}")).map(drop)
    }

    /// Cuts a host's power, in the middle of whatever it does.
    pub(crate) fn cut_power(&mut self, host: usize) -> Result<(), ClusterError> {
        self.hosts[host - 1].host.take().map(drop).ok_or(ClusterError::Off(host))
    }

    /// Whether the host has power.
    pub(crate) fn has_power(&self, host: usize) -> bool {
        self.hosts[host - 1].host.is_some()
    }

    /// Stops a host for a while, including its clocks.
    pub(crate) fn freeze(&mut self, host: usize) -> Result<(), ClusterError> {
        self.host(host)?.freeze().map_err(|source| ClusterError::Host { host, source })
    }

    /// Lets it continue.
    pub(crate) fn thaw(&mut self, host: usize) -> Result<(), ClusterError> {
        self.host(host)?.thaw().map_err(|source| ClusterError::Host { host, source })
    }

    /// Cuts a host's cable. The host does not see it.
    pub(crate) fn cut_link(&self, host: usize, net: Net) -> Result<(), ClusterError> {
        Ok(self.network.set_cable(host, net, false)?)
    }

    /// Repairs it.
    pub(crate) fn restore_link(&self, host: usize, net: Net) -> Result<(), ClusterError> {
        Ok(self.network.set_cable(host, net, true)?)
    }

    /// The directory that all hosts see as [`SHARE`].
    pub(crate) fn share(&self) -> &Path {
        &self.share
    }

    /// Runs a program of this machine on the clients' network.
    pub(crate) fn client(&self, program: &str) -> Command {
        self.network.command(program)
    }

    /// A connection of a client on the clients' network.
    pub(crate) fn connect(&self, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
        self.network.connect(to, limit)
    }

    /// A program of the guest image, a client of its servers, on the clients' network: `redis-cli`, `psql`,
    /// `pgbench`.
    ///
    /// # Panics
    ///
    /// If the hosts have no guests.
    pub(crate) fn guest_client(&self, program: &str) -> Command {
        let image = self.image.as_ref().expect("the cluster was started with guests");
        let mut command = self.network.command("chroot");
        command.arg(image.root()).arg(program).env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        command
    }

    /// The disk of a host, to read while the host is off.
    pub(crate) fn disk(&self, host: usize) -> PathBuf {
        self.hosts[host - 1].directory.join("disk")
    }

    /// The socket of the serial line with a shell.
    pub(crate) fn shell_socket(&self, host: usize) -> PathBuf {
        self.hosts[host - 1].socket("shell")
    }
}

impl Place {
    fn new(directory: PathBuf, image: Option<&GuestImage>) -> Result<Place, ClusterError> {
        make_directory(&directory)?;
        if let Some(image) = image {
            image.copy_disk(&directory.join("disk"))?;
        }
        let short = File::open(&directory).map_err(|source| file_error(&directory, source))?;
        Ok(Place { directory, short, host: None })
    }
}

fn make_directory(path: &Path) -> Result<(), ClusterError> {
    fs::create_dir_all(path).map_err(|source| file_error(path, source))
}

fn file_error(path: &Path, source: io::Error) -> ClusterError {
    ClusterError::File { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests;
