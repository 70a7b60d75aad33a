//! The picture: a page that shows the VMs of this host, from the API and with nothing else.
//!
//! Its files are in `files/`, and in the program as they are: no build step, no framework, nothing from elsewhere. A browser
//! holds the page to that by its Content-Security-Policy. All that it loads is relative to the page itself, so it works
//! wherever it is served: here beside the API, and by `outlive node page` (`page`).

#[cfg(test)]
mod browser;
#[cfg(test)]
mod tests;

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use crate::api::Caller;
use crate::error::NodeError;
use crate::page::is_of_this_host;

/// What a browser may do for the page: load and ask what is beside it, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";

/// A file of the page.
#[derive(Debug)]
pub(crate) struct File {
    /// Its name beside the page; that of the page is empty.
    pub(crate) name: &'static str,
    kind: &'static str,
    text: &'static str,
}

/// All files.
pub(crate) const FILES: [File; 10] = [
    File { name: "", kind: HTML, text: include_str!("files/picture.html") },
    File { name: "picture.css", kind: "text/css; charset=utf-8", text: include_str!("files/picture.css") },
    File { name: "picture.svg", kind: "image/svg+xml", text: include_str!("files/picture.svg") },
    File { name: "picture.js", kind: SCRIPT, text: include_str!("files/picture.js") },
    File { name: "node.js", kind: SCRIPT, text: include_str!("files/node.js") },
    File { name: "vms.js", kind: SCRIPT, text: include_str!("files/vms.js") },
    File { name: "lanes.js", kind: SCRIPT, text: include_str!("files/lanes.js") },
    File { name: "heat.js", kind: SCRIPT, text: include_str!("files/heat.js") },
    File { name: "lists.js", kind: SCRIPT, text: include_str!("files/lists.js") },
    File { name: "words.js", kind: SCRIPT, text: include_str!("files/words.js") },
];

impl File {
    pub(crate) fn answer(&self) -> Response {
        let mut response = ([(header::CONTENT_TYPE, self.kind)], self.text).into_response();
        response.headers_mut().extend(page_headers());
        response
    }
}

/// What every answer has that a browser may show as a page.
pub(crate) fn page_headers() -> HeaderMap {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
        // Another release has other files of the same names.
        (header::CACHE_CONTROL, "no-store"),
    ];
    let own = headers.map(|(name, value)| (name, HeaderValue::from_static(value)));
    own.into_iter().chain(isolation()).collect()
}

/// What keeps pages of other origins from using an answer.
fn isolation() -> [(HeaderName, HeaderValue); 2] {
    [
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (HeaderName::from_static("cross-origin-resource-policy"), HeaderValue::from_static("same-origin")),
    ]
}

/// The page and its files.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.iter().fold(Router::new(), |routes, file| {
        routes.route(&format!("/{}", file.name), get(move || async { file.answer() }))
    })
}

/// Lets no page of another origin give orders, and none ask at the socket of this host. A browser that has a certificate, or a
/// cookie, sends it with whatever any page asks; it also says which page that was. Other clients say nothing of the kind.
pub(crate) async fn guard(request: Request<Body>, next: Next) -> Response {
    let is_there = matches!(request.extensions().get::<Caller>(), Some(Caller::There(_)));
    if !is_there && !is_under_own_name(request.headers()) {
        return NodeError::ForeignName.into_response();
    }
    if is_order(request.method()) && !is_own_page(request.headers()) {
        return NodeError::ForeignPage.into_response();
    }
    let mut response = next.run(request).await;
    response.headers_mut().extend(isolation());
    response
}

/// Whether a request may change something.
pub(crate) fn is_order(method: &Method) -> bool {
    ![Method::GET, Method::HEAD].contains(method)
}

/// Whether a request is of a page that was loaded from the same place, or of no page at all.
pub(crate) fn is_own_page(headers: &HeaderMap) -> bool {
    let text = |name: &HeaderName| headers.get(name).map(|it| it.to_str().unwrap_or_default());
    let host = text(&header::HOST).unwrap_or_default();
    let of_origin = |origin: &str| {
        origin.split_once("://").is_some_and(|(_, from)| !host.is_empty() && from.eq_ignore_ascii_case(host))
    };
    let of_site = |site: &str| ["same-origin", "none"].contains(&site);
    text(&header::ORIGIN).is_none_or(of_origin)
        && text(&HeaderName::from_static("sec-fetch-site")).is_none_or(of_site)
}

/// Whether a request at the socket of this host can be no page of somebody else. Who forwards the socket to a port (`ssh -L`)
/// lets a browser ask there, and to the browser a page whose name leads to that port since a moment ago (DNS rebinding) is of
/// the same origin. So a browser asks under a name that is this host's for certain; and so does whoever says nothing of a
/// page, as a browser does not without TLS, unless the name is one that no page of the Internet has.
fn is_under_own_name(headers: &HeaderMap) -> bool {
    let is_browser = [header::ORIGIN, HeaderName::from_static("sec-fetch-site")];
    let is_browser = is_browser.iter().any(|name| headers.contains_key(name));
    let has_dot = headers.get_all(header::HOST).iter().any(|host| host.as_bytes().contains(&b'.'));
    is_of_this_host(headers) || !is_browser && !has_dot
}
