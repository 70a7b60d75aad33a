//! The link between the two hosts: a TCP connection and the threads at its ends.
//!
//! ```text
//! primary   coordinator ──jobs──► sender thread ──► socket      socket ──► receiver thread ──► decisions
//! standby   socket ──► session thread (stages, acknowledges, applies)      any thread ──► writer ──► socket
//! ```
//!
//! Every socket has large kernel buffers, sends at once (no Nagle) and is closed by `shutdown`, which wakes
//! whoever reads or writes it.

mod receiver;
mod records;
mod sender;

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::time::Duration;

use socket2::SockRef;

pub(crate) use receiver::receive;
pub(crate) use sender::{CheckpointPart, Job, Sender, SenderReport};

/// Bytes that the kernel may buffer each way: a whole checkpoint of some hundred pages, so that the sender
/// rarely waits.
const SOCKET_BUFFER: usize = 4 << 20;
/// How long connecting may take.
const CONNECT: Duration = Duration::from_secs(1);

/// Connects to `address` (HOST:PORT); every address that the name has is tried.
///
/// # Errors
/// The error of the last address, or of the name.
pub(crate) fn dial(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(stream) => {
                prepare(&stream)?;
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Sets the options that every link has.
///
/// # Errors
/// The operating system's.
pub(crate) fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    // The kernel takes what its limits allow.
    socket.set_send_buffer_size(SOCKET_BUFFER)?;
    socket.set_recv_buffer_size(SOCKET_BUFFER)
}

/// The peer's address for logs.
pub(crate) fn peer(stream: &TcpStream) -> String {
    stream.peer_addr().map_or_else(|_| "unknown peer".into(), |a: SocketAddr| a.to_string())
}
