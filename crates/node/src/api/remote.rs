//! The same API for other hosts and operators: over TLS 1.3, on a thread of its own, so that strangers hold up nobody at
//! the socket of this host.
//!
//! A connection is a stranger's until it has shown a certificate that counts; nothing that it sends is read as a request
//! before. A certificate that is revoked or expires ends its connections, too.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{self, FromRequest};
use axum::response::IntoResponse;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use super::access::{Caller, forbidden};
use super::crowd::{Guests, OF_NAME, Strangers};
use super::routes::Body;
use super::{HEAD, ServeError, Thread, connection, routes};
use crate::error::NodeError;
use crate::node::Node;
use crate::remote::{Access, Keys, Visitor};

/// How long a stranger may take to show a certificate.
const HANDSHAKE: Duration = Duration::from_secs(2);
/// How often certificates of connections are judged again.
const AGAIN: Duration = Duration::from_secs(5);
/// How often the own keys are looked at.
const LOOK: Duration = Duration::from_secs(10);
/// How long the other end may take to acknowledge what was sent, or to read it.
const DEAD: Duration = Duration::from_secs(30);
/// How often an address that is not there is tried.
const TRY: Duration = Duration::from_secs(1);
/// How many threads read keys at a time: their disk may hang.
const READERS: usize = 4;

/// The port. Dropping it ends all connections.
#[derive(Debug)]
pub struct Port {
    _thread: Thread,
}

/// Serves a node at `address`, as soon as that is there, for whom the keys let in.
///
/// # Errors
/// There is no thread. An address that is not there and keys that cannot be used are none: VMs do not wait for them. The
/// log says so, and so do the node's warnings.
pub fn serve_hosts(node: &Arc<Node>, address: &str, keys: Arc<dyn Keys>) -> Result<Port, ServeError> {
    let hall = Arc::new(Hall {
        routes: routes::routes(node.clone()),
        keys,
        strangers: Strangers::default(),
        guests: Arc::default(),
        readers: Arc::new(Semaphore::new(READERS)),
        said: Mutex::default(),
    });
    let (node, address) = (node.clone(), address.to_owned());
    let thread = Thread::start("api-hosts", async move {
        let watched = watch(node.clone(), hall.clone());
        tokio::join!(watched, receive(&node, &address, hall));
    })?;
    Ok(Port { _thread: thread })
}

/// Looks at the own keys, and complains of what is new.
async fn watch(node: Arc<Node>, hall: Arc<Hall>) {
    loop {
        let complaint = hall.read(|keys| Ok(keys.complaint())).await;
        node.warn(KEYS, complaint.unwrap_or_else(Some));
        sleep(LOOK).await;
    }
}

/// What the node warns of.
const KEYS: &str = "the API for other hosts";
const ADDRESS: &str = "the address of the API for other hosts";

async fn receive(node: &Node, address: &str, hall: Arc<Hall>) {
    let listener = loop {
        match TcpListener::bind(address).await {
            Ok(listener) => break listener,
            Err(error) => {
                let remedy = "is it an address of this host, and free? it is tried again";
                node.warn(ADDRESS, Some(format!("cannot listen on {address}: {error}; {remedy}")));
            }
        }
        sleep(TRY).await;
    };
    node.warn(ADDRESS, None);
    if let Ok(address) = listener.local_addr() {
        tracing::info!("other hosts and operators are answered at {address}");
    }
    loop {
        match listener.accept().await {
            Ok((client, from)) => hall.meet(client, from),
            Err(error) => {
                // No descriptors, for example. It passes.
                hall.complain(|| format!("the API cannot take a client: {error}"));
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// What all connections have in common.
#[derive(Debug)]
struct Hall {
    routes: Router,
    keys: Arc<dyn Keys>,
    strangers: Strangers,
    guests: Arc<Guests>,
    readers: Arc<Semaphore>,
    /// When something was said of strangers.
    said: Mutex<Option<std::time::Instant>>,
}

/// Why a stranger is sent away, and its connection.
type Refused = (String, Option<TcpStream>);

impl Hall {
    fn meet(self: &Arc<Self>, client: TcpStream, from: SocketAddr) {
        let hall = self.clone();
        let crowded = self.strangers.enter(from.ip(), |number| {
            tokio::spawn(async move { hall.answer(client, from.ip(), number).await }).abort_handle()
        });
        if crowded {
            self.complain(|| "too many connections that show no certificate; the oldest are dropped".into());
        }
    }

    async fn answer(self: Arc<Self>, client: TcpStream, from: IpAddr, number: u64) {
        let until = Instant::now() + HANDSHAKE;
        let late = || format!("it has not shown a certificate within {} s", HANDSHAKE.as_secs());
        let known = timeout_at(until, self.know(client)).await;
        match known.unwrap_or_else(|_| Err((late(), None))) {
            Ok((client, visitor)) => self.serve(client, from, visitor, number).await,
            Err((why, client)) => {
                self.complain(|| format!("refused a connection of {from} at the API: {why}"));
                if let Some(client) = client {
                    // What has no time left need not hear it.
                    let _ = timeout_at(until, let_it_hear(client)).await;
                }
            }
        }
        self.strangers.leave(number);
    }

    /// Waits until it has shown who it is.
    async fn know(&self, client: TcpStream) -> Result<(TlsStream<TcpStream>, Visitor), Refused> {
        prepare(&client).map_err(|error| (error.to_string(), None))?;
        let serve = match self.read(|keys| keys.serve()).await {
            Ok(serve) => serve,
            Err(why) => return Err((why, Some(client))),
        };
        match TlsAcceptor::from(serve.config).accept(client).into_fallible().await {
            Ok(client) => match (serve.judge)(Ok(())) {
                Ok(visitor) => Ok((client, visitor)),
                Err(why) => Err((why, None)),
            },
            Err((error, client)) => match (serve.judge)(Err(error)) {
                Ok(visitor) => Err((format!("{} has gone", visitor.name), None)),
                Err(why) => Err((why, Some(client))),
            },
        }
    }

    /// Answers its requests, until it goes, is silent or counts no longer.
    async fn serve(&self, client: TlsStream<TcpStream>, from: IpAddr, visitor: Visitor, number: u64) {
        let name = visitor.name.clone();
        if visitor.access == Access::Nothing {
            self.complain(|| format!("{name} ({from}) may do nothing here, and is told so"));
            return self.send_away(client, |request| forbidden(request, &name, Access::Nothing)).await;
        }
        let Some(_place) = self.guests.seat(&visitor) else {
            self.complain(|| {
                format!("{OF_NAME} connections of {name}, or too many in all, are open; one from {from} is sent away")
            });
            return self.send_away(client, |_| NodeError::TooManyClients(OF_NAME)).await;
        };
        self.strangers.leave(number);
        let shown = client.get_ref().1.peer_certificates().unwrap_or_default();
        let shown: Vec<_> = shown.iter().map(|it| it.clone().into_owned()).collect();
        let routes = TowerToHyperService::new(self.routes.clone());
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(Caller::There(visitor.clone()));
            routes.call(request)
        });
        tokio::select! {
            served = connection().serve_connection(TokioIo::new(client), service) => {
                // A client that goes away is none of the node's business.
                if let Err(error) = served {
                    tracing::debug!(%error, "{name} has gone from the API");
                }
            }
            why = self.outlived(shown) => {
                tracing::warn!("a connection of {name} ({from}) at the API is ended: {why}");
            }
        }
    }

    /// Answers one request with this. The client takes no place of those who are known: it is among the strangers for so long.
    async fn send_away(&self, client: TlsStream<TcpStream>, why: impl Fn(&extract::Request) -> NodeError) {
        let answer = service_fn(async |request: Request<Incoming>| {
            let request = request.map(axum::body::Body::new);
            let why = why(&request);
            // Whoever still sends a body when the connection is closed may not hear the answer.
            let Ok(_) = Body::from_request(request, &()).await;
            Ok::<_, std::convert::Infallible>(why.into_response())
        });
        let served = connection().keep_alive(false).serve_connection(TokioIo::new(client), answer);
        // Nothing is owed to it.
        let _ = timeout(HEAD, served).await;
    }

    /// Waits until what was shown counts no longer, and says why.
    async fn outlived(&self, shown: Vec<tokio_rustls::rustls::pki_types::CertificateDer<'static>>) -> String {
        loop {
            sleep(AGAIN).await;
            let shown = shown.clone();
            if let Err(why) = self.read(move |keys| keys.counts(&shown)).await {
                return why;
            }
        }
    }

    /// Does something that may wait for the disk.
    async fn read<T: Send + 'static>(
        &self,
        what: impl FnOnce(&dyn Keys) -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        // The semaphore is never closed.
        let turn = self.readers.clone().acquire_owned().await;
        let keys = self.keys.clone();
        let read = tokio::task::spawn_blocking(move || {
            // Also if nobody waits for it any more.
            let _turn = turn;
            what(&*keys)
        });
        read.await.unwrap_or_else(|_| Err("reading the keys has failed; the log says more".into()))
    }

    /// A line in the log, once a second: strangers cannot fill the disk.
    fn complain(&self, line: impl FnOnce() -> String) {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.is_none_or(|said| said.elapsed() >= Duration::from_secs(1)) {
            *said = Some(std::time::Instant::now());
            tracing::warn!("{}", line());
        }
    }
}

/// Sends at once, and notices a client that is dead or does not read.
fn prepare(client: &TcpStream) -> io::Result<()> {
    client.set_nodelay(true)?;
    SockRef::from(client).set_tcp_user_timeout(Some(DEAD))
}

/// Lets a client read why it is refused: a socket that is closed with unread bytes is reset, and the reset overtakes what was
/// written.
async fn let_it_hear(mut client: TcpStream) {
    // It may have gone.
    let _ = client.shutdown().await;
    let mut dropped = [0; 4096];
    while client.read(&mut dropped).await.is_ok_and(|count| count > 0) {}
}
