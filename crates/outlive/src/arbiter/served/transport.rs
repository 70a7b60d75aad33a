//! The way between a host and a served arbiter. Whatever protects it goes in here: both ends see only something that
//! can be read and written, and make it out of a TCP connection with these functions.

use std::io::{self, Read, Write};
use std::net::{IpAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

/// A connection.
pub(super) trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

/// Makes the connection that is used out of the one that the system gives. It may speak with the other end; the TCP
/// connection has its deadlines already.
pub(super) type Wrap = Arc<dyn Fn(TcpStream) -> io::Result<Box<dyn Stream>> + Send + Sync>;

/// No protection: whoever is on the way can read and change what is said.
pub(super) fn plain() -> Wrap {
    Arc::new(|socket| Ok(Box::new(socket)))
}

/// Sets the deadlines of reads and writes, and sends small pieces at once.
pub(super) fn prepare(socket: &TcpStream, patience: Duration) -> io::Result<()> {
    socket.set_read_timeout(Some(patience))?;
    socket.set_write_timeout(Some(patience))?;
    socket.set_nodelay(true)
}

/// Whether nobody else can be on the way.
pub(super) fn is_private(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}
