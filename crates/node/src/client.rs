//! The way of the commands to the node's API.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::api::ErrorBody;
use crate::host::Host;
use crate::jobs::{Job, JobState};
use crate::remote::Keys;
use crate::sse::{Event, Reader};

/// How long an answer may take. Long work is a job, and is asked for again.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest answer, in bytes.
const LONGEST: usize = 16 << 20;
/// How long a stream of events may be silent: longer than between two signs of a node.
const SILENCE: Duration = Duration::from_secs(45);
/// How often a job is asked for: here, and over the network.
const STEP: Duration = Duration::from_millis(100);
const STEP_THERE: Duration = Duration::from_millis(500);
/// How long another host may take until it is known.
const CONNECT: Duration = Duration::from_secs(10);
/// How often in a row a job of another host may not be heard of: it goes on when the network is broken.
const MISSED: u32 = 20;

/// Why a command has come to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nobody is there.
    #[error("no node answers at {}: {source}; start it with `outlive node run`, or give its --socket", .path.display())]
    Nobody { path: PathBuf, source: io::Error },
    /// It is there, and not for this user.
    #[error("you may not ask the node at {}: ask as root, or as a member of the node's --socket-group", .0.display())]
    NotAllowed(PathBuf),
    /// Nobody is at another host.
    #[error(
        "no node answers at {at}: {why}; start it there with `outlive node run --listen 0.0.0.0:{port}`, or say where it is \
         with --host HOST:PORT"
    )]
    Unreachable { at: String, why: String, port: u16 },
    /// The keys here are no good.
    #[error("{0}; --keys or OUTLIVE_KEYS names another directory")]
    OwnKeys(String),
    /// Whoever is there cannot be trusted.
    #[error("{at} is not trusted, and has been told nothing: {why}")]
    Untrusted { at: String, why: String },
    /// Another host is there.
    #[error(
        "{at} is host {name} by its certificate, and was told nothing; if {name} is meant, say --host {name}@{at}"
    )]
    OtherHost { at: String, name: String },
    /// No host is there.
    #[error(
        "{at} shows the certificate of {name}, which is no host of VMs, and was told nothing; give --host the address of a \
         host's node"
    )]
    NoHost { at: String, name: String },
    /// The node does not want to know these keys.
    #[error(
        "the node at {0} does not accept these keys: its log says why; compare `outlive keys show` on both, and have them \
         renewed where the CA is"
    )]
    NotAccepted(String),
    /// The answer cannot be used.
    #[error("the node at {at} cannot be asked: {why}; is it of another release?")]
    Broken { at: String, why: String },
    /// The node says no.
    #[error("{0}")]
    Refused(ErrorBody),
}

impl ClientError {
    /// Whether it will most likely be so the next time.
    pub(crate) fn lasts(&self) -> bool {
        !matches!(self, Self::Nobody { .. } | Self::Unreachable { .. } | Self::Broken { .. })
    }
}

/// Where a node is.
#[derive(Debug)]
enum Place {
    /// On this host.
    Here(PathBuf),
    /// On another one.
    There(Host, Arc<dyn Keys>),
}

/// A node's API.
#[derive(Debug)]
pub(crate) struct Client {
    place: Place,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// At the socket of this host.
    pub(crate) fn here(path: &Path) -> io::Result<Self> {
        Self::new(Place::Here(path.to_owned()))
    }

    /// On another host.
    pub(crate) fn there(host: &Host, keys: Arc<dyn Keys>) -> io::Result<Self> {
        Self::new(Place::There(host.clone(), keys))
    }

    fn new(place: Place) -> io::Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        Ok(Self { place, runtime })
    }

    /// Whether the node is on another host, so that each question costs more.
    pub(crate) fn is_far(&self) -> bool {
        matches!(self.place, Place::There(..))
    }

    /// Asks for something.
    pub(crate) fn get<T: DeserializeOwned>(&self, route: &str) -> Result<T, ClientError> {
        self.read(self.ask("GET", route, None)?)
    }

    /// Says something.
    pub(crate) fn send<T: DeserializeOwned>(
        &self,
        method: &str,
        route: &str,
        body: Option<(&str, String)>,
    ) -> Result<T, ClientError> {
        self.read(self.ask(method, route, body)?)
    }

    /// Waits for the end of a job. `tell` hears of each step.
    pub(crate) fn follow(&self, mut job: Job, tell: impl Fn(&Job)) -> Result<Job, ClientError> {
        let (step, most) = if self.is_far() { (STEP_THERE, MISSED) } else { (STEP, 0) };
        let (mut told, mut missed) = (None, 0);
        while job.state == JobState::Running {
            if told.as_ref() != Some(&job.progress) {
                told = Some(job.progress.clone());
                tell(&job);
            }
            std::thread::sleep(step);
            match self.get(&format!("/v1/jobs/{}", job.id)) {
                Ok(now) => (job, missed) = (now, 0),
                Err(why) if missed < most && !why.lasts() => missed += 1,
                Err(why) => return Err(why),
            }
        }
        Ok(job)
    }

    /// Follows the events after `last`, or from now on. `tell` hears of each, and of each place in the stream, and says
    /// whether it goes on. Ends, too, when the node does.
    pub(crate) fn events(
        &self,
        last: Option<&str>,
        mut tell: impl FnMut(Event) -> bool,
    ) -> Result<(), ClientError> {
        self.runtime.block_on(async {
            let mut request = Request::builder().uri("/v1/events").header("host", "node");
            if let Some(last) = last {
                request = request.header("last-event-id", last);
            }
            let request = request.body(Full::default()).map_err(|it| self.broken(it))?;
            let answer = timeout(PATIENCE, self.place.begin(request)).await;
            let answer = answer.map_err(|_| self.broken("it does not answer"))??;
            let status = answer.status();
            let mut body = answer.into_body();
            if !status.is_success() {
                let whole = Limited::new(body, LONGEST).collect().await.map_err(|it| self.broken(it))?;
                let refused = serde_json::from_slice(&whole.to_bytes());
                return Err(refused.map_or_else(|_| self.broken(status), ClientError::Refused));
            }
            let mut reader = Reader::default();
            // A node that is silent for so long has gone, though nobody has said so.
            while let Ok(Some(Ok(frame))) = timeout(SILENCE, body.frame()).await {
                let piece = frame.into_data().unwrap_or_default();
                let events = reader.read(&piece).ok_or_else(|| self.broken("it sends no events"))?;
                if !events.into_iter().all(&mut tell) {
                    break;
                }
            }
            Ok(())
        })
    }

    /// Reads an answer for its length alone, for at most this long: how many bytes came after the first piece, and how
    /// long they took.
    pub(crate) fn measure(&self, route: &str, most: Duration) -> Result<(u64, Duration), ClientError> {
        self.runtime.block_on(async {
            let request = Request::builder().uri(route).header("host", "node").body(Full::default());
            let request = request.map_err(|it| self.broken(it))?;
            let answer = timeout(PATIENCE, self.place.begin(request)).await;
            let answer = answer.map_err(|_| self.broken("it does not answer"))??;
            if !answer.status().is_success() {
                return Err(self.broken(answer.status()));
            }
            let mut body = answer.into_body();
            let first = timeout(PATIENCE, body.frame()).await;
            first.map_err(|_| self.broken("it sends nothing"))?;
            let (began, mut bytes) = (Instant::now(), 0);
            while let Ok(Some(frame)) = timeout(most.saturating_sub(began.elapsed()), body.frame()).await {
                let frame = frame.map_err(|it| self.broken(it))?;
                bytes += frame.data_ref().map_or(0, Bytes::len) as u64;
            }
            Ok((bytes, began.elapsed()))
        })
    }

    /// How long another host takes to accept a connection, at best: about a round trip.
    pub(crate) fn round_trip(&self, tries: usize) -> Result<Option<Duration>, ClientError> {
        let Place::There(host, keys) = &self.place else { return Ok(None) };
        let mut best = None;
        for _ in 0..tries {
            let connected = self.runtime.block_on(async { timeout(CONNECT, connect(host, keys)).await });
            let late = || unreachable(host, "it does not answer");
            let (_, took) = connected.unwrap_or_else(|_| Err(late()))?;
            best = best.into_iter().chain([took]).min();
        }
        Ok(best)
    }

    fn read<T: DeserializeOwned>(&self, value: Value) -> Result<T, ClientError> {
        serde_json::from_value(value).map_err(|error| self.broken(error))
    }

    fn broken(&self, why: impl ToString) -> ClientError {
        self.place.broken(why)
    }

    fn ask(&self, method: &str, route: &str, body: Option<(&str, String)>) -> Result<Value, ClientError> {
        let answer = async { timeout(PATIENCE, self.talk(method, route, body)).await };
        let (status, bytes) =
            self.runtime.block_on(answer).map_err(|_| self.broken("it does not answer"))??;
        if status.is_success() {
            let bytes: &[u8] = if bytes.is_empty() { b"null" } else { &bytes };
            return serde_json::from_slice(bytes).map_err(|error| self.broken(error));
        }
        match serde_json::from_slice(&bytes) {
            Ok(error) => Err(ClientError::Refused(error)),
            Err(_) => Err(self.broken(status)),
        }
    }

    async fn talk(
        &self,
        method: &str,
        route: &str,
        body: Option<(&str, String)>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let mut request = Request::builder().method(method).uri(route).header("host", "node");
        if let Some((kind, _)) = &body {
            request = request.header("content-type", *kind);
        }
        let body = Full::new(Bytes::from(body.map(|(_, text)| text).unwrap_or_default()));
        let request = request.body(body).map_err(|it| self.broken(it))?;
        let answer = self.place.begin(request).await?;
        let status = answer.status();
        let bytes =
            Limited::new(answer.into_body(), LONGEST).collect().await.map_err(|it| self.broken(it))?;
        Ok((status, bytes.to_bytes()))
    }
}

/// The route of a VM, and of what belongs to it. A name's bytes that mean something in a URL are no part of it.
pub(crate) fn of_vm(name: &str, rest: &str) -> String {
    let mut route = String::from("/v1/vms/");
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.".contains(&byte) {
            route.push(byte.into());
        } else {
            route += &format!("%{byte:02X}");
        }
    }
    route + rest
}

/// Sends a request to the node at `path`, and returns the answer as it begins.
///
/// # Errors
/// See [`ClientError`]. What the node says is none.
pub(crate) async fn begin(
    path: &Path,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, ClientError> {
    Place::Here(path.to_owned()).begin(request).await
}

impl Place {
    fn broken(&self, why: impl ToString) -> ClientError {
        let at = match self {
            Self::Here(path) => path.display().to_string(),
            Self::There(host, _) => host.to_string(),
        };
        ClientError::Broken { at, why: why.to_string() }
    }

    /// Sends a request, and returns the answer as it begins.
    async fn begin(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, ClientError> {
        match self {
            Self::Here(path) => {
                let stream = UnixStream::connect(path).await.map_err(|it| unanswered(path, it))?;
                over(stream, request).await.map_err(|it| self.broken(it))
            }
            Self::There(host, keys) => {
                let late =
                    || unreachable(host, format!("it has not answered within {} s", CONNECT.as_secs()));
                let connected = timeout(CONNECT, connect(host, keys)).await;
                let (stream, _) = connected.unwrap_or_else(|_| Err(late()))?;
                // A client is done with the handshake before it hears what the node thinks of its certificate.
                let refused = |it: hyper::Error| match is_refused(&it) {
                    true => ClientError::NotAccepted(host.to_string()),
                    false => self.broken(said(&it)),
                };
                over(stream, request).await.map_err(refused)
            }
        }
    }
}

async fn over(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Full<Bytes>>,
) -> hyper::Result<Response<Incoming>> {
    let (mut ask, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // What ends it is heard by who asks.
    let connection = tokio::spawn(connection);
    match ask.send_request(request).await {
        // That it has ended, which is no reason; the connection may have one.
        Err(why) if why.is_canceled() || why.is_closed() => match connection.await {
            Ok(Err(first)) => Err(first),
            _ => Err(why),
        },
        answer => answer,
    }
}

/// Finds the node of another host, and nobody else. Says how long that host took to accept a connection, too.
async fn connect(host: &Host, keys: &Arc<dyn Keys>) -> Result<(TlsStream<TcpStream>, Duration), ClientError> {
    let keys = keys.clone();
    let dial = tokio::task::spawn_blocking(move || keys.dial()).await;
    let dial = dial.unwrap_or_else(|error| Err(error.to_string())).map_err(ClientError::OwnKeys)?;
    let at = host.to_string();
    let began = Instant::now();
    let stream = TcpStream::connect(host.address()).await.map_err(|it| unreachable(host, it))?;
    let took = began.elapsed();
    stream.set_nodelay(true).map_err(|it| unreachable(host, it))?;
    // Certificates say who a host is, not where; the name is compared here.
    let name = ServerName::try_from("node.outlive").map_err(|it| unreachable(host, it))?;
    let shaken = TlsConnector::from(dial.config).connect(name, stream).await;
    let (stream, end) = match shaken {
        Ok(stream) => (Some(stream), Ok(())),
        Err(error) => (None, Err(error)),
    };
    let peer = (dial.judge)(end).map_err(|why| ClientError::Untrusted { at: at.clone(), why })?;
    match stream {
        _ if !peer.is_host => Err(ClientError::NoHost { at, name: peer.name }),
        _ if !host.is(&peer.name) => Err(ClientError::OtherHost { at, name: peer.name }),
        Some(stream) => Ok((stream, took)),
        None => Err(unreachable(host, "it has gone")),
    }
}

fn unreachable(host: &Host, why: impl ToString) -> ClientError {
    ClientError::Unreachable { at: host.to_string(), why: why.to_string(), port: host.port() }
}

/// Whether the other end has said that it does not accept the certificate.
fn is_refused(error: &hyper::Error) -> bool {
    use rustls::AlertDescription::{AccessDenied, CertificateRequired};
    let Some(source) = error.source().and_then(|it| it.downcast_ref::<io::Error>()) else { return false };
    let tls = source.get_ref().and_then(|it| it.downcast_ref::<rustls::Error>());
    matches!(tls, Some(rustls::Error::AlertReceived(AccessDenied | CertificateRequired)))
}

/// An error with its reason.
fn said(error: &hyper::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |why| format!("{error}: {why}"))
}

fn unanswered(path: &Path, source: io::Error) -> ClientError {
    match source.kind() {
        io::ErrorKind::PermissionDenied => ClientError::NotAllowed(path.to_owned()),
        _ => ClientError::Nobody { path: path.to_owned(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_may_not_ask_is_not_told_to_start_a_node() {
        let path = Path::new("/run/x");
        let said = |kind: std::io::ErrorKind| unanswered(path, kind.into()).to_string();
        let denied = said(std::io::ErrorKind::PermissionDenied);
        assert!(denied.contains("--socket-group") && !denied.contains("node run"), "{denied}");
        assert!(said(std::io::ErrorKind::NotFound).contains("`outlive node run`"));
    }

    #[test]
    fn names_do_not_leave_their_place_in_a_url() {
        assert_eq!(of_vm("web-1.x", "/start"), "/v1/vms/web-1.x/start");
        assert_eq!(of_vm("a/../b?c#d e", ""), "/v1/vms/a%2F..%2Fb%3Fc%23d%20e");
    }
}
