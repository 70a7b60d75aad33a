//! The network of nested hosts: bridges in a network namespace that belongs only to this process and the
//! processes that it starts. It disappears with the last of them, however they end.

use std::fs::File;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};

use crate::run::describe;

/// The calling thread's own.
const OWN_NAMESPACE: &str = "/proc/thread-self/ns/net";

/// Why hosts have no network.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NetworkError {
    /// Only root may make network namespaces that reach /dev/net/tun.
    #[error("nested hosts with a network need root: run it as root, for example with sudo")]
    NotRoot,
    /// The kernel refuses a network namespace.
    #[error("cannot make a network namespace: {0}")]
    Namespace(io::Error),
    /// `ip` could not be started.
    #[error("cannot run ip: {0}; to get it: apt-get install iproute2")]
    NoIp(io::Error),
    /// `ip` refused a command.
    #[error("{command} failed: {reason}")]
    Ip {
        /// The command.
        command: String,
        /// Its output.
        reason: String,
    },
}

/// One of the networks that hosts are on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Net {
    /// Between the hosts only: checkpoints and heartbeats.
    Link,
    /// The hosts' bridges, the guests, and clients in the harness's namespace.
    Clients,
}

impl Net {
    pub(crate) const ALL: [Net; 2] = [Net::Link, Net::Clients];
    /// Prefix of all its addresses.
    pub(crate) const PREFIX: u8 = 24;

    fn bridge(self) -> &'static str {
        match self {
            Net::Link => "hosts",
            Net::Clients => "clients",
        }
    }

    /// The harness's end of the cable to a host. Hosts are counted from 1.
    pub(crate) fn cable(self, host: usize) -> String {
        format!("{}-{host}", self.bridge())
    }

    /// The network card of that cable in the host.
    pub(crate) fn card(self) -> &'static str {
        match self {
            Net::Link => "eth0",
            Net::Clients => "eth1",
        }
    }

    fn number(self) -> u8 {
        match self {
            Net::Link => 77,
            Net::Clients => 78,
        }
    }

    /// Address of a host.
    pub(crate) fn host(self, host: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, self.number(), 0, last_byte(host))
    }

    /// Address of a guest.
    pub(crate) fn guest(guest: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, Net::Clients.number(), 0, 100 + last_byte(guest))
    }

    /// Address of the harness, where the clients are.
    pub(crate) fn harness(self) -> Ipv4Addr {
        Ipv4Addr::new(10, self.number(), 0, 254)
    }

    /// Hardware address of a host's card.
    pub(crate) fn mac(self, host: usize) -> String {
        format!("52:54:00:{:02x}:00:{:02x}", self.number(), last_byte(host))
    }
}

fn last_byte(number: usize) -> u8 {
    u8::try_from(number).ok().filter(|it| (1..=99).contains(it)).expect("from 1 to 99")
}

/// The namespace with a bridge for each network.
pub(crate) struct Network {
    namespace: File,
    ip: PathBuf,
}

impl Network {
    /// Makes it, with the harness's own addresses.
    pub(crate) fn new(ip: PathBuf) -> Result<Network, NetworkError> {
        if !nix::unistd::geteuid().is_root() {
            return Err(NetworkError::NotRoot);
        }
        // A thread of its own enters it and ends; the open file keeps the namespace.
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            File::open(OWN_NAMESPACE)
        });
        let namespace = made.join().expect("the thread does not panic").map_err(NetworkError::Namespace)?;
        let network = Network { namespace, ip };
        network.ip("link set lo up")?;
        for net in Net::ALL {
            let bridge = net.bridge();
            network.ip(&format!("link add name {bridge} type bridge"))?;
            network.ip(&format!("address add {}/{} dev {bridge}", net.harness(), Net::PREFIX))?;
            network.ip(&format!("link set {bridge} up"))?;
        }
        Ok(network)
    }

    /// Connects a host to each network by a cable.
    pub(crate) fn add_host(&self, host: usize) -> Result<(), NetworkError> {
        for net in Net::ALL {
            let cable = net.cable(host);
            self.ip(&format!("tuntap add dev {cable} mode tap"))?;
            self.ip(&format!("link set {cable} master {} up", net.bridge()))?;
        }
        Ok(())
    }

    /// Cuts or repairs a cable. The host still sees a carrier: frames are lost silently.
    pub(crate) fn set_cable(&self, host: usize, net: Net, up: bool) -> Result<(), NetworkError> {
        self.ip(&format!("link set {} {}", net.cable(host), if up { "up" } else { "down" }))
    }

    fn ip(&self, arguments: &str) -> Result<(), NetworkError> {
        let mut command = self.command(&self.ip);
        command.args(arguments.split(' '));
        let output = command.output().map_err(NetworkError::NoIp)?;
        if output.status.success() {
            return Ok(());
        }
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_string();
        Err(NetworkError::Ip { command: describe(&command), reason })
    }

    /// A program in the namespace. It is killed when the thread that starts it ends.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        let namespace = format!("--net=/proc/{}/fd/{}", std::process::id(), self.namespace.as_raw_fd());
        command.arg(namespace).args(["--", "setpriv", "--pdeathsig", "KILL", "--"]).arg(program);
        command
    }

    /// A connection from the namespace; it stays there, whichever thread uses it.
    pub(crate) fn connect(&self, to: SocketAddr, limit: Duration) -> io::Result<TcpStream> {
        let namespace = self.namespace.try_clone()?;
        let connecting = thread::spawn(move || {
            setns(&namespace, CloneFlags::CLONE_NEWNET)?;
            TcpStream::connect_timeout(&to, limit)
        });
        connecting.join().expect("the thread does not panic")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::run::output;

    #[test]
    fn every_cable_and_address_is_another() {
        let mut seen = std::collections::BTreeSet::new();
        for net in Net::ALL {
            assert!(seen.insert(net.harness().to_string()) && seen.insert(net.card().to_string()));
            for host in [1, 2, 99] {
                let cable = net.cable(host);
                assert!(cable.len() < 16, "the kernel takes no longer names: {cable}");
                for name in [cable, net.host(host).to_string(), net.mac(host)] {
                    assert!(seen.insert(name.clone()), "{name}");
                }
            }
        }
        assert!(seen.insert(Net::guest(1).to_string()));
    }

    #[test]
    fn bridges_are_in_a_namespace_that_goes_with_us() {
        let ip = PathBuf::from("ip");
        let network = match Network::new(ip) {
            Ok(network) => network,
            Err(error @ (NetworkError::NotRoot | NetworkError::NoIp(_))) => {
                println!("skipped: {error}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        network.add_host(1).unwrap();
        network.set_cable(1, Net::Link, false).unwrap();
        let links = |command: &mut Command| output(command.args(["-brief", "link"])).unwrap();
        let inside = links(&mut network.command("ip"));
        assert!(inside.contains("hosts-1") && inside.contains("clients-1"), "{inside}");
        assert!(!links(&mut Command::new("ip")).contains("hosts-1"));
        let error = network.set_cable(2, Net::Link, false).unwrap_err();
        assert!(error.to_string().contains("hosts-2"), "{error}");
    }
}
