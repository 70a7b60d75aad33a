//! `outlive node page`: the way of a browser to the node's socket, which only whoever has its permissions may use.
//!
//! It is a process of its own that an operator runs for as long as he looks, with his rights. It serves the picture's files
//! and passes requests on. It listens at this host's own addresses only, where every user and every web page may try:
//! - A link that counts once opens the page, and gives the browser a cookie that no script can read.
//! - The page is in a folder whose name nobody can guess, and the cookie is for that folder: browsers send cookies to every
//!   port of a host, and this one to none.
//! - Whoever asks under another host's name is refused, so a foreign page cannot come in by a name that it lets point here.
//! - Orders need a header that a foreign page cannot send.
//!
//! `gate`: who may do what. `pass`: the way to the node.

mod gate;
mod pass;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::io;
use std::net::{SocketAddr, TcpListener as StdListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, oneshot};

pub(crate) use self::gate::is_of_this_host;
use self::gate::{Gate, Verdict};
use crate::picture;

/// The most connections at a time. A browser has about six, and keeps some open.
const CONNECTIONS: usize = 64;
/// How long a browser may take to say what it wants, also on a connection that it keeps.
const HEAD: Duration = Duration::from_secs(60);
/// The longest head of a request, in bytes.
const LONGEST_HEAD: usize = 32 << 10;

/// Why the page is not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PageError {
    /// It would be open to others.
    #[error(
        "{0} is no address of this host alone, and the page is for nobody else: listen at 127.0.0.1:PORT or [::1]:PORT, and \
         from another machine use `ssh -L PORT:127.0.0.1:PORT`"
    )]
    NotLoopback(SocketAddr),
    /// The address is taken.
    #[error("cannot listen at {0}: {1}; give another port with --listen, or 0 for a free one")]
    Listen(SocketAddr, #[source] io::Error),
    /// No random numbers.
    #[error("the system gives no random numbers: {0}")]
    Random(#[source] io::Error),
    /// No threads.
    #[error("cannot start the page's thread: {0}; let this user have more of them")]
    Runtime(#[source] io::Error),
}

/// The server. Dropping it ends it, and all connections.
#[derive(Debug)]
pub(crate) struct Page {
    /// The link that opens the page.
    pub(crate) link: String,
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Page {
    fn drop(&mut self) {
        drop(self.end.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the page's thread had panicked");
        }
    }
}

/// Serves the page of the node at `socket`.
///
/// # Errors
/// See [`PageError`].
pub(crate) fn serve(at: SocketAddr, socket: &Path) -> Result<Page, PageError> {
    if !at.ip().is_loopback() {
        return Err(PageError::NotLoopback(at));
    }
    let listener = StdListener::bind(at).and_then(|it| it.set_nonblocking(true).map(|()| it));
    let listener = listener.map_err(|why| PageError::Listen(at, why))?;
    let at = listener.local_addr().map_err(|why| PageError::Listen(at, why))?;
    let gate = Gate::new().map_err(PageError::Random)?;
    let link = gate.link(at);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(PageError::Runtime)?;
    let server = Arc::new(Server { gate, socket: socket.to_owned() });
    let (end, ends) = oneshot::channel();
    let serve = move || {
        // It ends all connections with it.
        runtime.block_on(async {
            tokio::select! {
                () = accept(listener, server) => {}
                _ = ends => {}
            }
        });
    };
    let thread = thread::Builder::new().name("page".into()).spawn(serve).map_err(PageError::Runtime)?;
    Ok(Page { link, end: Some(end), thread: Some(thread) })
}

struct Server {
    gate: Gate,
    socket: PathBuf,
}

async fn accept(listener: StdListener, server: Arc<Server>) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the page is not served");
            return;
        }
    };
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // The room is never closed.
        let Ok(place) = room.clone().acquire_owned().await else { return };
        let Ok((browser, _)) = listener.accept().await else {
            // No descriptors, for example. It passes.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let server = server.clone();
        tokio::spawn(async move {
            let answer = |request| {
                let server = server.clone();
                async move { Ok::<_, Infallible>(server.answer(request).await) }
            };
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .max_buf_size(LONGEST_HEAD)
                .serve_connection(TokioIo::new(browser), service_fn(answer));
            // A browser that goes away is nobody's business.
            if let Err(error) = served.await {
                tracing::debug!(%error, "a browser has gone");
            }
            drop(place);
        });
    }
}

impl Server {
    async fn answer(&self, request: Request<Incoming>) -> Response {
        let (parts, body) = request.into_parts();
        match self.gate.judge(&parts.method, &parts.uri, &parts.headers) {
            Verdict::Open { cookie, to } => {
                // The next request is of this page itself, wherever the link was, so it has the cookie.
                let text = format!(
                    "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>Outlive</title>\
                     <meta http-equiv=\"refresh\" content=\"0; url={to}\"><p><a href=\"{to}\">The VMs of this host</a>"
                );
                let mut response = plain(StatusCode::OK, "text/html; charset=utf-8", text);
                response.headers_mut().insert(header::SET_COOKIE, cookie);
                response
            }
            Verdict::File(file) => file.answer(),
            Verdict::Pass(route) => pass::pass(&self.socket, &route, parts, body).await,
            Verdict::Refuse(status, why) => plain(status, "text/plain; charset=utf-8", format!("{why}\n")),
        }
    }
}

fn plain(status: StatusCode, kind: &'static str, text: String) -> Response {
    let mut response = (status, Body::from(text)).into_response();
    response.headers_mut().extend(picture::page_headers());
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
