//! The API: REST and JSON over HTTP/1.1, on a socket of this host, and for other hosts and operators over TLS.
//! `docs/api/openapi.json` describes it, and a test holds the server to it.
//!
//! - `routes.rs`, `body.rs`, `stream.rs`, `zeros.rs`: what is answered. `access.rs`: who may ask for what.
//! - `remote.rs`: connections over TLS, and `crowd.rs`: room for few of them.
//!
//! Everything is bounded: connections, the time for a request's head, the length of a body, events that are kept, jobs.
//! A client that does not read holds a connection and nothing else.

mod access;
mod body;
mod crowd;
mod remote;
mod routes;
mod stream;
#[cfg(test)]
mod tests;
mod zeros;

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, fchmod};
use nix::unistd::{Gid, Group, chown};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::net::UnixListener;
use tokio::sync::{Semaphore, oneshot};

pub(crate) use access::Caller;
pub use body::ErrorBody;
pub use remote::{Port, serve_hosts};

use crate::node::Node;

/// The most clients at a time. The next one waits.
const CONNECTIONS: usize = 64;
/// How many requests may wait for the disk, or for a VM's process, at a time.
const WAITING: usize = 32;
/// How long a client may take to say what it wants.
const HEAD: Duration = Duration::from_secs(5);
/// The longest head of a request, in bytes.
const LONGEST_HEAD: usize = 32 << 10;

/// How long what waits for the disk may take at the end.
const END: Duration = Duration::from_secs(5);

/// The description of the API.
pub const OPENAPI: &str = include_str!("../../../../docs/api/openapi.json");

/// Why the API is not served.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// There can be no socket.
    #[error("cannot listen at {}: {source}; give another path with --socket", .path.display())]
    Socket {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Something else is there.
    #[error("{} is in the way and is no socket: give another path with --socket", .0.display())]
    NotASocket(PathBuf),
    /// Somebody answers there.
    #[error("another node answers at {}: one host has one node; `outlive node status` asks it", .0.display())]
    Taken(PathBuf),
    /// There is no such group.
    #[error("there is no group {0} on this host: make it, or leave out --socket-group")]
    NoGroup(String),
    /// No threads.
    #[error("cannot start the API's threads: {0}; let this user have more of them")]
    Runtime(#[source] io::Error),
}

/// The socket, and what answers there. Dropping it removes the socket.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    thread: Option<Thread>,
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.thread.take());
        // Somebody may have removed it before.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A thread with a runtime of its own. Dropping it ends all connections with it.
#[derive(Debug)]
struct Thread {
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Thread {
    fn start(name: &str, serve: impl Future<Output = ()> + Send + 'static) -> Result<Self, ServeError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .max_blocking_threads(WAITING)
            .enable_all()
            .build()
            .map_err(ServeError::Runtime)?;
        let (end, ends) = oneshot::channel();
        let run = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = serve => {}
                    _ = ends => {}
                }
            });
            // What is being written may be finished, and a disk that hangs does not hold up the end.
            runtime.shutdown_timeout(END);
        };
        let thread = thread::Builder::new().name(name.into()).spawn(run).map_err(ServeError::Runtime)?;
        Ok(Self { end: Some(end), thread: Some(thread) })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        drop(self.end.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the API's thread had panicked");
        }
    }
}

/// Serves a node at `path`, for its own user or also for a group.
///
/// # Errors
/// See [`ServeError`].
pub fn serve(node: &Arc<Node>, path: &Path, group: Option<&str>) -> Result<Server, ServeError> {
    let group = group.map(|name| match Group::from_name(name) {
        Ok(Some(group)) => Ok(group.gid),
        _ => Err(ServeError::NoGroup(name.to_owned())),
    });
    let group = group.transpose()?;
    let refused = |source| ServeError::Socket { path: path.to_owned(), source };
    clear(path)?;
    if let Some(folder) = path.parent() {
        crate::files::make_folder(folder).map_err(refused)?;
    }
    let listener = bind(path).map_err(refused)?;
    if let Some(group) = group {
        give_to(group, path).map_err(refused)?;
    }
    let thread = Thread::start("api", accept(listener, routes::routes(node.clone())))?;
    Ok(Server { path: path.to_owned(), thread: Some(thread) })
}

/// There is no moment in which another user may connect.
fn bind(path: &Path) -> io::Result<std::os::unix::net::UnixListener> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    fchmod(&socket, Mode::S_IRUSR | Mode::S_IWUSR)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(128)?;
    socket.set_nonblocking(true)?;
    Ok(std::os::fd::OwnedFd::from(socket).into())
}

/// Lets a group connect. Somebody may have put a link in the place of the socket since it was made: what is opened here is
/// looked at, and is what is changed.
fn give_to(group: Gid, path: &Path) -> io::Result<()> {
    let there =
        File::options().read(true).custom_flags((OFlag::O_PATH | OFlag::O_NOFOLLOW).bits()).open(path)?;
    if !there.metadata()?.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "somebody else has put something in its place",
        ));
    }
    // A descriptor that only names a file changes it by this way alone.
    let named = format!("/proc/self/fd/{}", there.as_raw_fd());
    chown(named.as_str(), None, Some(group))?;
    std::fs::set_permissions(&named, std::fs::Permissions::from_mode(0o660))
}

/// Removes the socket of a node that has ended.
fn clear(path: &Path) -> Result<(), ServeError> {
    let Ok(there) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !there.file_type().is_socket() {
        return Err(ServeError::NotASocket(path.to_owned()));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(ServeError::Taken(path.to_owned())),
        Err(_) => {
            std::fs::remove_file(path).map_err(|source| ServeError::Socket { path: path.to_owned(), source })
        }
    }
}

async fn accept(listener: std::os::unix::net::UnixListener, routes: axum::Router) {
    let listener = match UnixListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the API is not served");
            return;
        }
    };
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        // The room is never closed.
        let Ok(place) = room.clone().acquire_owned().await else { return };
        let client = match listener.accept().await {
            Ok((client, _)) => client,
            Err(error) => {
                // No descriptors, for example. It passes.
                tracing::warn!(%error, "the API cannot take a client");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let routes = TowerToHyperService::new(routes.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Caller::Here);
            routes.call(request)
        });
        tokio::spawn(async move {
            let served = connection().serve_connection(TokioIo::new(client), service);
            // A client that goes away is none of the node's business.
            if let Err(error) = served.await {
                tracing::debug!(%error, "a client of the API has gone");
            }
            drop(place);
        });
    }
}

/// How a connection is served, from wherever it comes.
fn connection() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(LONGEST_HEAD);
    builder
}
