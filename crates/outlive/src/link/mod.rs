//! The link between the two hosts: a connection and the threads at its ends.
//!
//! ```text
//! primary   coordinator ──jobs──► sender thread ──► Writer      Reader ──► receiver thread ──► decisions
//! standby   Reader ──► reader thread ──► decisions      the event's thread, after the decision ──► Writer
//! ```
//!
//! A connection is split into three: a [`Reader`] and a [`Writer`], each for one thread, and a [`Closer`] for
//! everybody, which wakes the threads that read or write. One trait, [`Transport`], hides what carries the
//! bytes:
//!
//! - `tcp.rs` is the first transport, and the only file that knows sockets.
//! - `tls.rs` is the other one, over the first; `verify.rs` judges certificates.
//! - `security.rs` has what links are made with: keys, or nothing.
//! - `dial.rs` makes a connection, from either end.
//! - `api.rs` is TLS for the node's API, which has a runtime of its own: the same judgement of certificates.
//! - `talk.rs` is a short conversation over TLS with somebody else than the other host of a pair.
//! - `jobs.rs` has what the sender is told, `sender.rs` what a primary writes, `receiver.rs` what it reads; `tail.rs` copies of the guest's frames.

mod api;
mod dial;
mod jobs;
mod receiver;
mod security;
mod sender;
mod tail;
mod talk;
mod tcp;
mod tls;
mod verify;

#[cfg(test)]
mod tests;

use std::io::{self, IoSlice, Read, Write};
use std::sync::Arc;
use std::time::Duration;

use crate::keys::Certificate;
pub(crate) use api::open_keys;
pub(crate) use dial::{Hangup, Listener, MayNot, NewConnection, dial, lasts, was_reached};
pub(crate) use jobs::{CheckpointPart, Job, SenderReport, SentRound, Shipped};
pub(crate) use receiver::{Agreed, Heard, receive};
pub use security::LinkKind;
pub(crate) use security::{Security, SecurityError, may_be_open, usable};
pub(crate) use sender::Sender;
pub(crate) use tail::FrameTail;
pub(crate) use talk::Talk;

/// What carries the bytes of a connection. One thread may read, another may write and any thread may close
/// it, all at the same time.
pub(crate) trait Transport: Send + Sync {
    /// Like [`Read::read`]: waits for bytes, but not beyond the timeout.
    ///
    /// # Errors
    /// The operating system's; `WouldBlock` or `TimedOut` after the timeout.
    fn read(&self, to: &mut [u8]) -> io::Result<usize>;

    /// Reads what comes as it is, also where it is damaged and can no longer be deciphered. Only for bytes that are dropped.
    ///
    /// # Errors
    /// As for [`read`](Self::read).
    fn read_raw(&self, to: &mut [u8]) -> io::Result<usize> {
        self.read(to)
    }

    /// Like [`Write::write_vectored`]: waits for room.
    ///
    /// # Errors
    /// The operating system's.
    fn write(&self, from: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Writes as much as there is room for now. Never waits. After an error the next call must begin with the same
    /// bytes: some of them may be on their way in another form.
    ///
    /// # Errors
    /// The operating system's; `WouldBlock` when there is not enough room.
    fn write_now(&self, from: &[u8]) -> io::Result<usize>;

    /// Sets how long a read may wait; `None` means until bytes come.
    ///
    /// # Errors
    /// The operating system's.
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()>;

    /// Says that nothing more will be written; what was written still goes out.
    fn finish(&self);

    /// Breaks the connection. Reads and writes end, even those that wait.
    fn close(&self);

    /// The peer's address, for messages.
    fn peer(&self) -> String;

    /// What protects it, as both ends have agreed.
    fn kind(&self) -> Option<LinkKind>;
}

/// A connection, split into its ends.
pub(crate) struct Connection {
    /// For the thread that reads.
    pub(crate) reader: Reader,
    /// For the thread that writes.
    pub(crate) writer: Writer,
    /// For the thread that ends it.
    pub(crate) closer: Closer,
    /// Who is at the other end, if it has shown that.
    pub(crate) host: Option<Certificate>,
}

impl Connection {
    fn over(transport: impl Transport + 'static, host: Option<Certificate>) -> Self {
        let transport: Arc<dyn Transport> = Arc::new(transport);
        Self {
            reader: Reader(transport.clone()),
            writer: Writer(transport.clone()),
            closer: Closer(transport),
            host,
        }
    }
}

/// The reading end.
pub(crate) struct Reader(Arc<dyn Transport>);

impl Reader {
    /// The peer's address.
    pub(crate) fn peer(&self) -> String {
        self.0.peer()
    }

    /// What protects the connection, as both ends have agreed; not what was asked for.
    pub(crate) fn kind(&self) -> Option<LinkKind> {
        self.0.kind()
    }

    /// Sets how long a read may wait from now on; `None` means until bytes come.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn set_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(timeout)
    }
}

impl Reader {
    /// Reads and drops what still comes, until the peer or this side closes. A connection whose last words must
    /// arrive ends with this: Linux resets a socket that is closed with unread bytes, or that gets more bytes
    /// when it is closed for reading, and what a reset overtakes is not sent again.
    pub(crate) fn drop_the_rest(&mut self) {
        let mut dropped = [0; 16 << 10];
        loop {
            match self.0.read_raw(&mut dropped) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

impl Read for Reader {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.0.read(to)
    }
}

/// The writing end. Nothing is buffered in it.
pub(crate) struct Writer(Arc<dyn Transport>);

impl Writer {
    /// Writes as much as there is room for now. Never waits. After an error the next call must begin with the same
    /// bytes.
    ///
    /// # Errors
    /// The operating system's; `WouldBlock` when there is not enough room.
    pub(crate) fn write_now(&self, from: &[u8]) -> io::Result<usize> {
        self.0.write_now(from)
    }
}

impl Write for Writer {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        self.0.write(&[IoSlice::new(from)])
    }

    fn write_vectored(&mut self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.write(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Ends a connection, from any thread.
#[derive(Clone)]
pub(crate) struct Closer(Arc<dyn Transport>);

impl Closer {
    /// Breaks the connection at once: threads that read or write return.
    pub(crate) fn close(&self) {
        self.0.close();
    }

    /// Says that nothing more will be written; what was written still goes out.
    pub(crate) fn finish(&self) {
        self.0.finish();
    }
}
