//! A connection over TLS 1.3, on which both ends have shown a certificate.
//!
//! Two threads share one session behind a lock that is held while at most [`PIECE`] bytes are encrypted or one record
//! is decrypted; they read and write the socket without it. Only the writing thread writes to the socket, so the
//! records arrive in the order in which they were encrypted; what the reading thread makes the session say (a new
//! key) goes out before the next bytes. `docs/trust.md` has what this costs beside two one-way sessions.
//!
//! The end of the TCP connection ends the link, whether TLS said goodbye or not: every message that matters says by
//! itself that it is whole, and what a peer means by leaving is a message, too.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::pki_types::ServerName;
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, Connection, ProtocolVersion, ServerConfig,
    ServerConnection,
};

use super::security::complain;
use super::tcp::Tcp;
use super::verify::Verifier;
use super::{LinkKind, Transport};
use crate::keys::{self, Certificate, Loaded};

/// How long both ends may take to know each other.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// Most bytes that are encrypted before they are written: while the kernel sends them, the next are encrypted.
const PIECE: usize = 64 << 10;
/// Most slices of one piece.
const SLICES: usize = 16;
/// Most bytes of a record (RFC 8446, 5.1).
const RECORD: usize = 16 << 10;
/// Bytes that are read from the socket at once.
const RAW: usize = 128 << 10;

/// A link over TLS; see the module.
pub(super) struct Tls {
    tcp: Tcp,
    session: Mutex<Connection>,
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
}

/// Of the reading thread. In each buffer, what lies between the numbers is not used up.
struct Incoming {
    raw: Box<[u8]>,
    raw_from: usize,
    raw_to: usize,
    /// Of a record that was only partly asked for.
    plain: Box<[u8]>,
    plain_from: usize,
    plain_to: usize,
}

/// Of the writing thread.
#[derive(Default)]
struct Outgoing {
    records: Vec<u8>,
    sent: usize,
    /// How many plain bytes the records have.
    plain: usize,
}

impl Tls {
    /// Begins, as the end that has connected.
    ///
    /// # Errors
    /// The keys cannot be used, or the other end is refused or refuses. The text has the remedy.
    pub(super) fn dial(tcp: Tcp, directory: &Path) -> io::Result<(Self, Certificate)> {
        let keys = keys::load(directory).map_err(denied)?;
        complain(&keys);
        let verifier = Verifier::new(&keys).map_err(denied)?;
        let config = client_config(keys, &verifier).map_err(io::Error::other)?;
        // Certificates say what a host may do, not where it is.
        let name = ServerName::try_from("standby.outlive").map_err(io::Error::other)?;
        let session = ClientConnection::new(Arc::new(config), name).map_err(io::Error::other)?;
        Self::shake(tcp, session.into(), &verifier)
    }

    /// Begins, as the end that has listened.
    ///
    /// # Errors
    /// See [`dial`](Self::dial).
    pub(super) fn accept(tcp: Tcp, directory: &Path) -> io::Result<(Self, Certificate)> {
        let keys = keys::load(directory).map_err(denied)?;
        complain(&keys);
        let verifier = Verifier::new(&keys).map_err(denied)?;
        let config = server_config(keys, &verifier).map_err(io::Error::other)?;
        let session = ServerConnection::new(Arc::new(config)).map_err(io::Error::other)?;
        Self::shake(tcp, session.into(), &verifier)
    }

    fn shake(tcp: Tcp, mut session: Connection, verifier: &Verifier) -> io::Result<(Self, Certificate)> {
        let mut stream = Until { tcp: &tcp, deadline: Instant::now() + HANDSHAKE };
        let mut shake = || {
            while session.is_handshaking() {
                session.complete_io(&mut stream)?;
            }
            while session.wants_write() {
                session.write_tls(&mut stream)?;
            }
            Ok(())
        };
        let shaken = shake();
        let peer = judged(shaken, verifier).inspect_err(|_| stream.let_it_hear())?;
        tcp.set_read_timeout(None)?;
        let incoming = Incoming {
            raw: vec![0; RAW].into(),
            raw_from: 0,
            raw_to: 0,
            plain: vec![0; RECORD].into(),
            plain_from: 0,
            plain_to: 0,
        };
        let outgoing = Outgoing { records: Vec::with_capacity(PIECE + PIECE / 8), ..Outgoing::default() };
        let (session, incoming, outgoing) = (Mutex::new(session), Mutex::new(incoming), Mutex::new(outgoing));
        Ok((Self { tcp, session, incoming, outgoing }, peer))
    }

    /// The socket.
    pub(super) fn tcp(&mut self) -> &mut Tcp {
        &mut self.tcp
    }

    /// Encrypts the beginning of the slices, behind everything that the session wants to say.
    fn encrypt(&self, from: &[IoSlice<'_>], out: &mut Outgoing) -> io::Result<()> {
        let mut piece = [IoSlice::new(&[]); SLICES];
        let (mut count, mut room) = (0, PIECE);
        for (to, slice) in piece.iter_mut().zip(from) {
            let length = slice.len().min(room);
            *to = IoSlice::new(&slice[..length]);
            (count, room) = (count + 1, room - length);
        }
        out.records.clear();
        (out.sent, out.plain) = (0, 0);
        let mut session = locked(&self.session);
        out.plain = session.writer().write_vectored(&piece[..count])?;
        while session.wants_write() {
            session.write_tls(&mut out.records)?;
        }
        Ok(())
    }
}

/// What the end that connects brings along.
pub(super) fn client_config(keys: Loaded, verifier: &Arc<Verifier>) -> Result<ClientConfig, rustls::Error> {
    let config = ClientConfig::builder_with_provider(verifier.provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_client_auth_cert(keys.chain, keys.key);
    let mut config = config?;
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// What the end that listens brings along.
pub(super) fn server_config(keys: Loaded, verifier: &Arc<Verifier>) -> Result<ServerConfig, rustls::Error> {
    let config = ServerConfig::builder_with_provider(verifier.provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier.clone())
        .with_single_cert(keys.chain, keys.key);
    let mut config = config?;
    // Nobody resumes a session, so nothing of one can be replayed.
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Who the other end is, or why it is refused, once a handshake has ended.
pub(super) fn judged(shaken: io::Result<()>, verifier: &Verifier) -> io::Result<Certificate> {
    match (shaken, verifier.verdict()) {
        (_, Some(Err(refused))) => Err(io::Error::new(ErrorKind::PermissionDenied, refused)),
        (Err(error), _) => Err(explained(error)),
        (Ok(()), Some(Ok(peer))) => Ok(peer),
        // The library asks the verifier in every full handshake, and there are no others.
        (Ok(()), None) => Err(io::Error::new(ErrorKind::PermissionDenied, "it has shown no certificate")),
    }
}

/// Nobody panics while they hold one of these locks, and a session is never half changed.
fn locked<T>(it: &Mutex<T>) -> MutexGuard<'_, T> {
    it.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Incoming {
    /// Gives out what is left of a record.
    fn take(&mut self, to: &mut [u8]) -> usize {
        let count = to.len().min(self.plain_to - self.plain_from);
        to[..count].copy_from_slice(&self.plain[self.plain_from..self.plain_from + count]);
        self.plain_from += count;
        count
    }

    /// Decrypts a record, into `to` if it fits there in any case. `None` if none is whole.
    fn decrypt(&mut self, session: &mut Connection, to: &mut [u8]) -> io::Result<Option<usize>> {
        loop {
            let direct = to.len() >= RECORD;
            let read = session.reader().read(if direct { to } else { &mut self.plain });
            match read {
                Ok(count) if direct || count == 0 => return Ok(Some(count)),
                Ok(count) => {
                    (self.plain_from, self.plain_to) = (0, count);
                    return Ok(Some(self.take(to)));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
            if self.raw_from == self.raw_to {
                return Ok(None);
            }
            let mut rest = &self.raw[self.raw_from..self.raw_to];
            self.raw_from += session.read_tls(&mut rest)?;
            session
                .process_new_packets()
                .map_err(|error| explained(io::Error::new(ErrorKind::InvalidData, error)))?;
        }
    }
}

impl Transport for Tls {
    fn read(&self, to: &mut [u8]) -> io::Result<usize> {
        let mut incoming = locked(&self.incoming);
        let incoming = &mut *incoming;
        let count = incoming.take(to);
        if count > 0 || to.is_empty() {
            return Ok(count);
        }
        loop {
            if let Some(count) = incoming.decrypt(&mut locked(&self.session), to)? {
                return Ok(count);
            }
            match self.tcp.read(&mut incoming.raw)? {
                0 => return Ok(0),
                count => (incoming.raw_from, incoming.raw_to) = (0, count),
            }
        }
    }

    fn read_raw(&self, to: &mut [u8]) -> io::Result<usize> {
        self.tcp.read(to)
    }

    fn write(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut out = locked(&self.outgoing);
        // As in `write_now`: what it has encrypted and could not send is the beginning of `from`.
        if out.sent == out.records.len() {
            self.encrypt(from, &mut out)?;
        }
        while out.sent < out.records.len() {
            match self.tcp.write(&[IoSlice::new(&out.records[out.sent..])]) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(count) => out.sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(out.plain)
    }

    fn write_now(&self, from: &[u8]) -> io::Result<usize> {
        let mut out = locked(&self.outgoing);
        // What was encrypted must go out before anything else is.
        if out.sent == out.records.len() {
            self.encrypt(&[IoSlice::new(from)], &mut out)?;
        }
        while out.sent < out.records.len() {
            match self.tcp.write_now(&out.records[out.sent..]) {
                Ok(count) => out.sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(out.plain)
    }

    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.tcp.set_read_timeout(timeout)
    }

    fn finish(&self) {
        self.tcp.finish();
    }

    fn close(&self) {
        self.tcp.close();
    }

    fn peer(&self) -> String {
        self.tcp.peer()
    }

    fn kind(&self) -> Option<LinkKind> {
        let version = locked(&self.session).protocol_version();
        (version == Some(ProtocolVersion::TLSv1_3)).then_some(LinkKind::Tls13)
    }
}

/// A socket that is read until a deadline, however slowly the bytes come.
struct Until<'a> {
    tcp: &'a Tcp,
    deadline: Instant,
}

impl Until<'_> {
    /// Lets the other end read why it was refused: a socket that is closed with unread bytes is reset, and the reset
    /// overtakes what was written.
    fn let_it_hear(&mut self) {
        self.tcp.finish();
        let mut dropped = [0; 4096];
        while self.read(&mut dropped).is_ok_and(|count| count > 0) {}
    }
}

impl Read for Until<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        self.tcp.set_read_timeout(Some(left))?;
        self.tcp.read(to)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        // A handshake fits into the buffer of any socket.
        self.tcp.write_now(from)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// This host's own keys are no good.
fn denied(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(ErrorKind::PermissionDenied, why)
}

/// Why a session ended, with the remedy. Its kind says whether the bytes were wrong (`InvalidData`).
fn explained(error: io::Error) -> io::Error {
    let (kind, text) = match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::AlertReceived(
            AlertDescription::AccessDenied | AlertDescription::CertificateRequired,
        )) => (
            ErrorKind::PermissionDenied,
            "the other host does not accept this host's certificate: its log says why; compare `outlive keys show` \
             on both"
                .to_owned(),
        ),
        Some(rustls::Error::AlertReceived(alert)) => {
            (ErrorKind::ConnectionAborted, format!("the other side has ended TLS: {alert:?}"))
        }
        Some(rustls::Error::InvalidMessage(_)) => (
            ErrorKind::InvalidData,
            "it does not speak TLS 1.3: is the port another service's, or has one end no keys (--insecure)?".to_owned(),
        ),
        Some(rustls::Error::NoCertificatesPresented) => (
            ErrorKind::PermissionDenied,
            "it has shown no certificate: `outlive keys issue` makes one".to_owned(),
        ),
        Some(other) => (ErrorKind::InvalidData, format!("TLS: {other}")),
        None if error.kind() == ErrorKind::UnexpectedEof => (
            ErrorKind::ConnectionAborted,
            "it has hung up before it had shown a certificate: has it no keys, or is it an older release?".to_owned(),
        ),
        None if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            (ErrorKind::TimedOut, format!("it has not shown a certificate within {} s", HANDSHAKE.as_secs()))
        }
        None => return error,
    };
    io::Error::new(kind, text)
}
