//! The way between a host and a served arbiter: TLS 1.3 with certificates of both ends, as on the link of a pair, or
//! nothing at all for tests and for arbiters of the same machine.
//!
//! A host's certificate says of which VMs it may claim generations (`server.rs` looks). The arbiter's must say that it
//! may be one: any host of VMs has a certificate of the same CA, and must not be able to pose as the arbiter.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::keys::Certificate;
use crate::link::{Security, Talk};

/// A connection.
pub(super) trait Stream: Read + Write + Send {}

impl<T: Read + Write + Send> Stream for T {}

/// A host that poses as the arbiter, or has been given the wrong certificate.
#[derive(Debug, thiserror::Error)]
#[error(
    "host {0} may not be the arbiter: serve it on a third machine, with keys of its own (`outlive keys issue --host NAME \
     --arbiter`, on the host with the CA); with that option alone, a host of VMs could run and hold none any more"
)]
pub(super) struct NoArbiter(String);

impl NoArbiter {
    /// Whether a certificate is that of an arbiter.
    ///
    /// # Errors
    /// It is not.
    pub(super) fn check(certificate: &Certificate) -> Result<(), Self> {
        if certificate.grant.arbiter { Ok(()) } else { Err(Self(certificate.name.clone())) }
    }
}

/// Makes the connection of the end that asks. Its TCP connection has its deadlines already ([`prepare`]).
///
/// # Errors
/// The connection's, or why the other end is no arbiter; `PermissionDenied` and `InvalidData` last.
pub(super) fn to_arbiter(
    socket: TcpStream,
    security: &Security,
    patience: Duration,
) -> io::Result<Box<dyn Stream>> {
    let Security::Keys(keys) = security else { return Ok(Box::new(socket)) };
    let (talk, peer) = Talk::dial(socket, keys, patience)?;
    NoArbiter::check(&peer).map_err(|why| io::Error::new(ErrorKind::PermissionDenied, why))?;
    Ok(Box::new(talk))
}

/// Makes the connection of the end that answers. Returns who asks, if it has shown that.
///
/// # Errors
/// The connection's, or why the other end is refused.
pub(super) fn to_host(
    socket: TcpStream,
    security: &Security,
    patience: Duration,
) -> io::Result<(Box<dyn Stream>, Option<Certificate>)> {
    let Security::Keys(keys) = security else { return Ok((Box::new(socket), None)) };
    let (talk, peer) = Talk::accept(socket, keys, patience)?;
    Ok((Box::new(talk), Some(peer)))
}

/// Sets the deadlines of reads and writes, and sends small pieces at once.
///
/// # Errors
/// The operating system's.
pub(super) fn prepare(socket: &TcpStream, patience: Duration) -> io::Result<()> {
    socket.set_read_timeout(Some(patience))?;
    socket.set_write_timeout(Some(patience))?;
    socket.set_nodelay(true)
}
