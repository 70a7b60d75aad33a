//! The way of the commands to the node's API.

use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::api::ErrorBody;
use crate::jobs::{Job, JobState};
use crate::sse::{Event, Reader};

/// How long an answer may take. Long work is a job, and is asked for again.
const PATIENCE: Duration = Duration::from_secs(30);
/// The longest answer, in bytes.
const LONGEST: usize = 16 << 20;
/// How long a stream of events may be silent: longer than between two signs of a node.
const SILENCE: Duration = Duration::from_secs(45);
/// How often a job is asked for.
const STEP: Duration = Duration::from_millis(100);

/// Why a command has come to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// Nobody is there.
    #[error("no node answers at {}: {source}; start it with `outlive node run`, or give its --socket", .path.display())]
    Nobody { path: PathBuf, source: std::io::Error },
    /// It is there, and not for this user.
    #[error("you may not ask the node at {}: ask as root, or as a member of the node's --socket-group", .0.display())]
    NotAllowed(PathBuf),
    /// The answer cannot be used.
    #[error("the node at {} cannot be asked: {why}; is it of another release?", .path.display())]
    Broken { path: PathBuf, why: String },
    /// The node says no.
    #[error("{0}")]
    Refused(ErrorBody),
}

/// A node's API.
#[derive(Debug)]
pub(crate) struct Client {
    path: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    pub(crate) fn new(path: &Path) -> Result<Self, ClientError> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|source| ClientError::Nobody { path: path.to_owned(), source })?;
        Ok(Self { path: path.to_owned(), runtime })
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
        let mut told = None;
        while job.state == JobState::Running {
            if told.as_ref() != Some(&job.progress) {
                told = Some(job.progress.clone());
                tell(&job);
            }
            std::thread::sleep(STEP);
            job = self.get(&format!("/v1/jobs/{}", job.id))?;
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
            let answer = begin(&self.path, request).await?;
            let status = answer.status();
            let mut body = answer.into_body();
            if !status.is_success() {
                let whole = Limited::new(body, LONGEST).collect().await.map_err(|it| self.broken(it))?;
                let refused = serde_json::from_slice(&whole.to_bytes());
                return Err(refused.map_or_else(|_| self.broken(status), ClientError::Refused));
            }
            let mut reader = Reader::default();
            // A node that is silent for so long has gone, though nobody has said so.
            while let Ok(Some(Ok(frame))) = tokio::time::timeout(SILENCE, body.frame()).await {
                let piece = frame.into_data().unwrap_or_default();
                let events = reader.read(&piece).ok_or_else(|| self.broken("it sends no events"))?;
                if !events.into_iter().all(&mut tell) {
                    break;
                }
            }
            Ok(())
        })
    }

    fn read<T: DeserializeOwned>(&self, value: Value) -> Result<T, ClientError> {
        serde_json::from_value(value).map_err(|error| self.broken(error))
    }

    fn broken(&self, why: impl ToString) -> ClientError {
        broken(&self.path, why)
    }

    fn ask(&self, method: &str, route: &str, body: Option<(&str, String)>) -> Result<Value, ClientError> {
        let answer = async { tokio::time::timeout(PATIENCE, self.talk(method, route, body)).await };
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
        let answer = begin(&self.path, request).await?;
        let status = answer.status();
        let bytes =
            Limited::new(answer.into_body(), LONGEST).collect().await.map_err(|it| self.broken(it))?;
        Ok((status, bytes.to_bytes()))
    }
}

/// Sends a request to the node at `path`, and returns the answer as it begins.
///
/// # Errors
/// See [`ClientError`]. What the node says is none.
pub(crate) async fn begin(
    path: &Path,
    request: Request<Full<Bytes>>,
) -> Result<Response<Incoming>, ClientError> {
    let stream = UnixStream::connect(path).await.map_err(|it| unanswered(path, it))?;
    let (mut ask, connection) =
        http1::handshake(TokioIo::new(stream)).await.map_err(|it| broken(path, it))?;
    tokio::spawn(connection);
    ask.send_request(request).await.map_err(|it| broken(path, it))
}

fn broken(path: &Path, why: impl ToString) -> ClientError {
    ClientError::Broken { path: path.to_owned(), why: why.to_string() }
}

fn unanswered(path: &Path, source: std::io::Error) -> ClientError {
    match source.kind() {
        std::io::ErrorKind::PermissionDenied => ClientError::NotAllowed(path.to_owned()),
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
}
