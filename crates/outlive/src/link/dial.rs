//! Makes a connection, from either end.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use outlive_epoch::VmId;

use super::tls::Tls;
use super::{Connection, Security, Transport, tcp};
use crate::keys::{Certificate, Right};
use crate::names;

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(1);

/// A host that has a certificate, but not this right.
#[derive(Debug, thiserror::Error)]
#[error(
    "host {host} may not {right} VM {vm}: give it a certificate that allows it beside what it has (`outlive keys issue \
     --host {host} {options}`)"
)]
pub(crate) struct MayNot {
    /// Whose certificate it is.
    pub(crate) host: String,
    /// What it may not.
    pub(crate) right: Right,
    /// With which VM.
    pub(crate) vm: VmId,
    /// The options that make such a certificate.
    options: String,
}

impl MayNot {
    /// Of the host with this certificate.
    pub(crate) fn new(host: &Certificate, right: Right, vm: VmId) -> Self {
        Self { host: host.name.clone(), right, vm, options: host.grant.options_with(Some(right), &vm) }
    }
}

/// Whether the next attempt would most likely fail the same way: the keys of one of the hosts do not count, or the
/// other end does not speak TLS.
pub(crate) fn lasts(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::InvalidData)
}

/// Whether somebody was there, although nothing came of it: the system says why nobody could be reached, and what a
/// host did that was reached is in words of our own.
pub(crate) fn was_reached(error: &io::Error) -> bool {
    let of_system = error.get_ref().is_none() || error.kind() == io::ErrorKind::NotFound;
    let broken = matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe);
    broken || !of_system
}

/// Connects to `address` (HOST:PORT); tries every address of the name. With keys, the host there must have a
/// certificate, and if `vm` is given, one that allows it to hold this VM.
///
/// # Errors
/// The error of the last address, of the name resolution, or of the keys.
pub(crate) fn dial(address: &str, security: &Security, vm: Option<VmId>) -> io::Result<Connection> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let addresses = names::resolve(address);
    for address in addresses.map_err(|error| io::Error::new(io::ErrorKind::NotFound, error))? {
        match tcp::Tcp::connect(&address, CONNECT) {
            Ok(connected) => return secured(connected.begin()?, security, vm),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn secured(mut tcp: tcp::Tcp, security: &Security, vm: Option<VmId>) -> io::Result<Connection> {
    let Security::Keys(directory) = security else {
        tcp.prepare()?;
        return Ok(Connection::over(tcp, None));
    };
    let (mut tls, host) = Tls::dial(tcp, directory)?;
    if let Some(vm) = vm.filter(|vm| !host.grant.allows(Right::Hold, vm)) {
        let refused = MayNot::new(&host, Right::Hold, vm);
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, refused));
    }
    tls.tcp().prepare()?;
    Ok(Connection::over(tls, Some(host)))
}

/// The port that primaries connect to.
pub(crate) struct Listener(tcp::Listener);

impl Listener {
    /// Takes `address` (HOST:PORT). Connections are refused until [`listen`](Self::listen).
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn reserve(address: &str) -> io::Result<Self> {
        tcp::Listener::reserve(address).map(Self)
    }

    /// Accepts connections from now on.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn listen(&self) -> io::Result<()> {
        self.0.listen()
    }

    /// The address, with the port that the system chose if port 0 was asked for.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn address(&self) -> io::Result<SocketAddr> {
        self.0.address()
    }

    /// Waits for the next connection.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn accept(&self) -> io::Result<NewConnection> {
        self.0.accept().map(NewConnection)
    }
}

/// A new connection. Nothing has been read from it yet, so no thread has waited for its peer.
pub(crate) struct NewConnection(tcp::Tcp);

impl NewConnection {
    /// The peer's address, for messages.
    pub(crate) fn peer(&self) -> String {
        self.0.peer()
    }

    /// What ends it while [`open`](Self::open) waits.
    pub(crate) fn hangup(&self) -> Hangup {
        Hangup(self.0.hangup())
    }

    /// Makes it a connection; with keys, only if the peer has a certificate. Call it on a thread that may wait for
    /// this peer.
    ///
    /// # Errors
    /// The operating system's, or that of the keys.
    pub(crate) fn open(self, security: &Security) -> io::Result<Connection> {
        let mut tcp = self.0.begin()?;
        let Security::Keys(directory) = security else {
            tcp.prepare()?;
            return Ok(Connection::over(tcp, None));
        };
        let (mut tls, host) = Tls::accept(tcp, directory)?;
        tls.tcp().prepare()?;
        Ok(Connection::over(tls, Some(host)))
    }
}

/// Ends a connection that its peer keeps waiting.
pub(crate) struct Hangup(tcp::Hangup);

impl Hangup {
    /// Whoever waits for the peer returns.
    pub(crate) fn hang_up(&self) {
        self.0.hang_up();
    }
}
