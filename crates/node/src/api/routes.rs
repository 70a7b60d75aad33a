//! Every route. Those that write to the disk do so beside the API's own thread.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body as Content, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::access::Caller;
use super::body::json as answer;
use super::zeros::{self, Zeros};
use super::{OPENAPI, access, stream};
use crate::definition;
use crate::error::NodeError;
use crate::jobs::Job;
use crate::node::Node;
use crate::picture;
use crate::view::View;

/// The longest body of a request, in bytes: a definition in JSON, with its escapes.
const LONGEST: usize = 2 * definition::LONGEST;
/// How long a body may take. Its client has a connection meanwhile, which others may wait for.
const BODY: Duration = Duration::from_secs(5);
/// How much of a log is told, in bytes.
const LOG: u64 = 64 << 10;

type Of = State<Arc<Node>>;
type Answer = Result<Response, NodeError>;

pub(super) fn routes(node: Arc<Node>) -> Router {
    Router::new()
        .route("/v1/node", get(node_view))
        .route("/v1/node/drain", post(drain))
        .route("/v1/node/undrain", post(undrain))
        .route("/v1/check", get(check))
        .route("/v1/check/link", get(link))
        .route("/v1/vms", get(list))
        .route("/v1/vms/{name}", get(show).put(define).delete(undefine))
        .route("/v1/vms/{name}/start", post(start))
        .route("/v1/vms/{name}/stop", post(stop))
        .route("/v1/vms/{name}/hand-over", post(hand_over))
        .route("/v1/vms/{name}/log", get(log))
        .route("/v1/figures", get(figures))
        .route("/v1/jobs", get(jobs))
        .route("/v1/jobs/{id}", get(job))
        .route("/v1/jobs/{id}/cancel", post(cancel))
        .route("/v1/events", get(events))
        .route("/v1/openapi.json", get(openapi))
        .fallback(|uri: Uri| async move { NodeError::NoRoute(uri.path().to_owned()) })
        .method_not_allowed_fallback(|request: Request| async move {
            NodeError::NoMethod(format!("{} {}", request.method(), request.uri().path()))
        })
        .layer(middleware::from_fn(access::check))
        .layer(DefaultBodyLimit::max(LONGEST))
        .merge(picture::routes())
        .layer(middleware::from_fn(picture::guard))
        .with_state(node)
}

async fn node_view(State(node): Of) -> Response {
    answer(StatusCode::OK, &node.view())
}

async fn list(State(node): Of) -> Response {
    answer(StatusCode::OK, &json!({ "vms": node.list() }))
}

async fn show(State(node): Of, Path(name): Path<String>) -> Answer {
    Ok(answer(StatusCode::OK, &node.get(&name)?))
}

async fn define(State(node): Of, Path(name): Path<String>, headers: HeaderMap, body: Body) -> Answer {
    let body = body.0?;
    let is_json =
        headers.get(header::CONTENT_TYPE).is_some_and(|it| it.as_bytes().starts_with(b"application/json"));
    let text = if is_json {
        // The same tables and keys as in the file.
        let table: toml::Table = read(&body)?;
        toml::to_string(&table).map_err(|error| NodeError::BadRequest(error.to_string()))?
    } else {
        String::from_utf8(body.to_vec())
            .map_err(|_| NodeError::BadRequest("a definition is text in UTF-8".into()))?
    };
    let (vm, changed) = beside(move || node.define(&name, &text)).await?;
    Ok(answer(StatusCode::OK, &Defined { vm, changed }))
}

/// A VM, and whether its definition is another one now.
#[derive(Serialize)]
struct Defined {
    #[serde(flatten)]
    vm: View,
    changed: bool,
}

async fn undefine(State(node): Of, Path(name): Path<String>) -> Answer {
    beside(move || node.undefine(&name)).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn start(State(node): Of, Path(name): Path<String>) -> Answer {
    accepted(node.begin_start(&name))
}

/// What a stop may say.
#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Stop {
    now: bool,
    only_standby: bool,
}

async fn stop(State(node): Of, Path(name): Path<String>, body: Body) -> Answer {
    let Stop { now, only_standby } = body.or_default()?;
    accepted(beside(move || node.begin_stop(&name, only_standby, now)).await)
}

async fn hand_over(State(node): Of, Path(name): Path<String>) -> Answer {
    accepted(node.begin_hand_over(&name))
}

async fn log(State(node): Of, Path(name): Path<String>, uri: Uri) -> Answer {
    let after = match uri.query().map(|query| query.strip_prefix("after=").map(str::parse)) {
        None => None,
        Some(Some(Ok(after))) => Some(after),
        Some(_) => return Err(NodeError::BadRequest("a log has ?after=BYTES or nothing".into())),
    };
    let (text, next) = beside(move || node.log(&name, after, LOG)).await?;
    Ok(answer(StatusCode::OK, &json!({ "log": text, "next": next })))
}

async fn figures(State(node): Of, uri: Uri) -> Answer {
    let place = match uri.query().map(|query| query.strip_prefix("after=")) {
        None => None,
        Some(Some(place)) => Some(place),
        Some(None) => return Err(NodeError::BadRequest("figures have ?after=PLACE or nothing".into())),
    };
    Ok(answer(StatusCode::OK, &node.figures().after(place)))
}

/// What a drain may say.
#[derive(Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Drain {
    stop: bool,
    wait_s: u16,
}

impl Default for Drain {
    fn default() -> Self {
        Self { stop: false, wait_s: 60 }
    }
}

async fn drain(State(node): Of, body: Body) -> Answer {
    let Drain { stop, wait_s } = body.or_default()?;
    accepted(node.begin_drain(stop, Duration::from_secs(wait_s.into())))
}

async fn undrain(State(node): Of) -> Answer {
    Ok(answer(StatusCode::OK, &beside(move || node.undrain()).await?))
}

/// It may take some seconds.
async fn check(State(node): Of) -> Answer {
    Ok(answer(StatusCode::OK, &beside(move || node.check()).await?))
}

async fn link(uri: Uri) -> Answer {
    let bytes = uri.query().and_then(|query| query.strip_prefix("bytes=")?.parse().ok());
    let bytes = bytes.filter(|bytes| (1..=zeros::MOST).contains(bytes)).ok_or_else(|| {
        NodeError::BadRequest(format!("say ?bytes=N, with a number from 1 to {}", zeros::MOST))
    })?;
    let head = [(header::CONTENT_TYPE, "application/octet-stream"), (header::CACHE_CONTROL, "no-store")];
    Ok((head, Content::new(Zeros(bytes))).into_response())
}

async fn jobs(State(node): Of) -> Response {
    answer(StatusCode::OK, &json!({ "jobs": node.jobs.list() }))
}

async fn job(State(node): Of, Path(id): Path<String>) -> Answer {
    Ok(answer(StatusCode::OK, &node.jobs.get(&id)?))
}

async fn cancel(State(node): Of, Path(id): Path<String>) -> Answer {
    Ok(answer(StatusCode::ACCEPTED, &node.jobs.cancel(&id)?))
}

async fn events(State(node): Of, Extension(caller): Extension<Caller>, headers: HeaderMap) -> Answer {
    let last = headers.get("last-event-id").and_then(|it| it.to_str().ok());
    stream::events(node.feed().clone(), caller.follows(), last)
}

async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], OPENAPI).into_response()
}

/// Long work is a job, which was begun.
fn accepted(job: Result<Job, NodeError>) -> Answer {
    Ok(answer(StatusCode::ACCEPTED, &job?))
}

/// Does something that may wait for the disk.
async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NodeError> + Send + 'static,
) -> Result<T, NodeError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|_| Err(NodeError::Said("the node has failed at this; its log says more".into())))
}

/// A request's body, or why it is refused, in the API's own words.
pub(super) struct Body(Result<Bytes, NodeError>);

impl Body {
    /// No body is one without anything special.
    fn or_default<T: DeserializeOwned + Default>(self) -> Result<T, NodeError> {
        let bytes = self.0?;
        if bytes.is_empty() { Ok(T::default()) } else { read(&bytes) }
    }
}

impl<S: Send + Sync> axum::extract::FromRequest<S> for Body {
    type Rejection = std::convert::Infallible;

    async fn from_request(request: Request, state: &S) -> Result<Self, Self::Rejection> {
        let why =
            |_| NodeError::BadRequest(format!("the body is longer than {LONGEST} bytes, or it broke off"));
        let late = |_| NodeError::BadRequest(format!("the body has not come within {} s", BODY.as_secs()));
        let bytes = tokio::time::timeout(BODY, Bytes::from_request(request, state)).await;
        Ok(Self(bytes.map_err(late).and_then(|bytes| bytes.map_err(why))))
    }
}

fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, NodeError> {
    serde_json::from_slice(bytes)
        .map_err(|error| NodeError::BadRequest(format!("the body is not understood: {error}")))
}
