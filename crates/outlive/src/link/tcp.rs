//! A connection over TCP.

use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::socket::{MsgFlags, send};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::{LinkKind, Transport};
use crate::sentinel::{self, Guarded};

/// How many bytes the kernel may buffer each way: a whole checkpoint of a few hundred pages, so that the
/// sender rarely waits.
const SOCKET_BUFFER: usize = 4 << 20;

/// How many unsent bytes may wait in the kernel. Without a limit a socket fills its whole buffer with pages,
/// megabytes, as fast as memory copies them. A heartbeat that is written then waits behind all of them, on a
/// slow link for as long as the standby waits before it takes over. TCP's windows, which depend on the round
/// trip, bound the bytes in flight. See TCP_NOTSENT_LOWAT in tcp(7) and `tcp_stream_memory_free` in Linux's
/// include/net/tcp.h.
const NOT_SENT: u32 = 128 << 10;

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 128;

/// A connected socket.
pub(super) struct Tcp(Arc<TcpStream>, Option<Guarded>);

impl From<TcpStream> for Tcp {
    fn from(stream: TcpStream) -> Self {
        Self(Arc::new(stream), None)
    }
}

impl Tcp {
    /// What ends it from elsewhere.
    pub(super) fn hangup(&self) -> Hangup {
        Hangup(self.0.clone())
    }

    /// Connects, but takes no longer than `patience`.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn connect(address: &SocketAddr, patience: Duration) -> io::Result<Self> {
        TcpStream::connect_timeout(address, patience).map(Self::from)
    }

    /// What is set before the other end is known: it sends at once (no Nagle).
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn begin(self) -> io::Result<Self> {
        self.0.set_nodelay(true)?;
        Ok(self)
    }

    /// Sets the options of every link: its buffers are large, and few unsent bytes wait in them. It ends with this
    /// process.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn prepare(&mut self) -> io::Result<()> {
        let socket = SockRef::from(&*self.0);
        // The kernel caps the size at its own limits.
        socket.set_send_buffer_size(SOCKET_BUFFER)?;
        socket.set_recv_buffer_size(SOCKET_BUFFER)?;
        socket.set_tcp_notsent_lowat(NOT_SENT)?;
        self.1 = sentinel::guard(&self.0);
        Ok(())
    }
}

/// Ends a connection that somebody else waits for.
pub(super) struct Hangup(Arc<TcpStream>);

impl Hangup {
    /// Whoever reads or writes returns.
    pub(super) fn hang_up(&self) {
        self.0.shutdown(Shutdown::Both).ok();
    }
}

impl Drop for Tcp {
    fn drop(&mut self) {
        // Closing the socket ends no connection of which the sentinel has a duplicate.
        self.close();
    }
}

impl Transport for Tcp {
    fn read(&self, to: &mut [u8]) -> io::Result<usize> {
        (&*self.0).read(to)
    }

    fn write(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        (&*self.0).write_vectored(from)
    }

    fn write_now(&self, from: &[u8]) -> io::Result<usize> {
        // For this call only, not for the socket, which another thread reads.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        Ok(send(self.0.as_raw_fd(), from, flags)?)
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(timeout)
    }

    fn finish(&self) {
        // Here and below, an error means that the connection is gone already.
        self.0.shutdown(Shutdown::Write).ok();
    }

    fn close(&self) {
        self.0.shutdown(Shutdown::Both).ok();
    }

    fn peer(&self) -> String {
        self.0.peer_addr().map_or_else(|_| "unknown peer".into(), |address| address.to_string())
    }

    fn kind(&self) -> Option<LinkKind> {
        Some(LinkKind::Plain)
    }
}

/// A socket that listens.
pub(super) struct Listener(TcpListener);

impl Listener {
    /// Takes `address` (HOST:PORT). Connections are refused until [`listen`](Self::listen).
    ///
    /// # Errors
    /// The operating system's, or that of the name's resolution.
    pub(super) fn reserve(address: &str) -> io::Result<Self> {
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in address.to_socket_addrs()? {
            match Self::bind(address) {
                Ok(socket) => return Ok(Self(socket.into())),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn bind(address: SocketAddr) -> io::Result<Socket> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM.cloexec(), Some(Protocol::TCP))?;
        // Connections of the last process may still be on their way out.
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        Ok(socket)
    }

    /// Accepts connections from now on.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn listen(&self) -> io::Result<()> {
        SockRef::from(&self.0).listen(BACKLOG)
    }

    /// The address, with the port that the system chose.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }

    /// The next connection.
    ///
    /// # Errors
    /// The operating system's.
    pub(super) fn accept(&self) -> io::Result<Tcp> {
        self.0.accept().map(|(stream, _)| Tcp::from(stream))
    }
}
