//! Makes a connection, from either end.

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::time::Duration;

use super::{Connection, Transport, tcp};

/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(1);

/// Connects to `address` (HOST:PORT); tries every address of the name.
///
/// # Errors
/// The error of the last address, or of the name resolution.
pub(crate) fn dial(address: &str) -> io::Result<Connection> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match tcp::Tcp::connect(&address, CONNECT) {
            Ok(connected) => return Ok(Connection::over(connected.prepare()?)),
            Err(error) => last = error,
        }
    }
    Err(last)
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

    /// Makes it a connection. Call it on a thread that may wait for this peer.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn open(self) -> io::Result<Connection> {
        self.0.prepare().map(Connection::over)
    }
}
