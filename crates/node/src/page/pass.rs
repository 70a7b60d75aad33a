//! Passes a request on to the node, and its answer back, as it comes.

use std::path::Path;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::request::Parts;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper::body::Incoming;

use crate::api::ErrorBody;
use crate::client::{ClientError, begin};
use crate::picture;

/// The longest body of a request, in bytes: the page's are a few words.
const LONGEST: usize = 4 << 10;
/// How long it may take.
const BODY: Duration = Duration::from_secs(5);
/// How long the node may take to begin its answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the node hears of a browser's headers. It hears nothing of the cookie.
const HEARD: [HeaderName; 2] = [header::CONTENT_TYPE, HeaderName::from_static("last-event-id")];

/// Asks the node for this route.
pub(super) async fn pass(socket: &Path, route: &str, parts: Parts, body: Incoming) -> Response {
    let read = tokio::time::timeout(BODY, Limited::new(body, LONGEST).collect()).await;
    let Ok(Ok(body)) = read else {
        return said(
            StatusCode::BAD_REQUEST,
            "bad_request",
            "the request's body is too long, or it broke off".into(),
        );
    };
    let mut request = Request::builder().method(parts.method).uri(route).header("host", "node");
    for (name, value) in HEARD.iter().filter_map(|name| parts.headers.get(name).map(|it| (name, it))) {
        request = request.header(name, value);
    }
    let request = match request.body(Full::new(body.to_bytes())) {
        Ok(request) => request,
        Err(error) => return said(StatusCode::BAD_REQUEST, "bad_request", error.to_string()),
    };
    match tokio::time::timeout(PATIENCE, ask(socket, request)).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => said(StatusCode::BAD_GATEWAY, "system", error.to_string()),
        Err(_) => said(StatusCode::GATEWAY_TIMEOUT, "too_long", "the node does not answer".into()),
    }
}

async fn ask(socket: &Path, request: Request<Full<Bytes>>) -> Result<Response, ClientError> {
    let answer = begin(socket, request).await?;
    let (parts, body) = answer.into_parts();
    let mut response = (parts.status, Body::new(body)).into_response();
    let headers = response.headers_mut();
    headers.extend(picture::page_headers());
    let kind = parts.headers.get(header::CONTENT_TYPE).cloned();
    headers
        .insert(header::CONTENT_TYPE, kind.unwrap_or(HeaderValue::from_static("application/octet-stream")));
    Ok(response)
}

/// An error, as the node says its own.
fn said(status: StatusCode, code: &str, message: String) -> Response {
    let error = ErrorBody { code: code.to_owned(), message, remedy: String::new() };
    // Plain data: this cannot fail.
    let text = serde_json::to_vec(&error).expect("an error is plain data");
    (status, picture::page_headers(), [(header::CONTENT_TYPE, "application/json")], text).into_response()
}
