//! A short conversation over TLS between hosts that are not a pair, such as a question to an arbiter: the same session
//! as on a link, and the same judgement of certificates, without the large buffers and the sentinel of a link.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::time::Duration;

use super::Transport;
use super::tcp::Tcp;
use super::tls::Tls;
use crate::keys::Certificate;

/// A conversation whose other end has shown its certificate.
pub(crate) struct Talk(Tls);

impl Talk {
    /// Begins, as the end that has connected. A read waits for so long at most.
    ///
    /// # Errors
    /// The keys cannot be used, or the other end is refused or refuses. The text has the remedy.
    pub(crate) fn dial(
        stream: TcpStream,
        keys: &Path,
        patience: Duration,
    ) -> io::Result<(Self, Certificate)> {
        Self::begin(Tls::dial(Tcp::from(stream), keys)?, patience)
    }

    /// Begins, as the end that has listened. A read waits for so long at most.
    ///
    /// # Errors
    /// See [`dial`](Self::dial).
    pub(crate) fn accept(
        stream: TcpStream,
        keys: &Path,
        patience: Duration,
    ) -> io::Result<(Self, Certificate)> {
        Self::begin(Tls::accept(Tcp::from(stream), keys)?, patience)
    }

    fn begin((tls, peer): (Tls, Certificate), patience: Duration) -> io::Result<(Self, Certificate)> {
        tls.set_read_timeout(Some(patience))?;
        Ok((Self(tls), peer))
    }
}

impl Read for Talk {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.0.read(to)
    }
}

impl Write for Talk {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.write(&[IoSlice::new(from)])
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
