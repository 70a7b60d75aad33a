//! A proxy between a host and an arbiter, which loses answers or everything.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::spawn;

use crate::conformance::Reach;

#[derive(Clone)]
struct State {
    reach: Arc<Mutex<Reach>>,
    target: Arc<Mutex<SocketAddr>>,
    connections: Arc<AtomicUsize>,
    /// The first words of the server are no answer yet.
    is_tls: bool,
    /// What clients have said.
    heard: Arc<Mutex<Vec<u8>>>,
}

/// The proxy. Its thread ends with its last connection.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    state: State,
}

impl Proxy {
    pub(crate) fn before(target: SocketAddr) -> Self {
        Self::new(target, false)
    }

    /// Before a server that speaks TLS.
    pub(crate) fn before_tls(target: SocketAddr) -> Self {
        Self::new(target, true)
    }

    fn new(target: SocketAddr, is_tls: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (reach, target) = (Arc::new(Mutex::new(Reach::Here)), Arc::new(Mutex::new(target)));
        let state = State { reach, target, connections: Arc::default(), is_tls, heard: Arc::default() };
        let accepted = state.clone();
        spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                accepted.connections.fetch_add(1, Ordering::Relaxed);
                accepted.join(client);
            }
        });
        Self { address, state }
    }

    /// How many there have been.
    pub(crate) fn connections(&self) -> usize {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// What clients have said since then.
    pub(crate) fn heard(&self) -> Vec<u8> {
        self.state.heard.lock().unwrap().clone()
    }

    /// Forgets what it has heard.
    pub(crate) fn forget(&self) {
        self.state.heard.lock().unwrap().clear();
    }

    pub(crate) fn reach(&self, reach: Reach) {
        *self.state.reach.lock().unwrap() = reach;
    }

    pub(crate) fn target(&self, target: SocketAddr) {
        *self.state.target.lock().unwrap() = target;
    }
}

impl State {
    fn join(&self, client: TcpStream) {
        let target = *self.target.lock().unwrap();
        if *self.reach.lock().unwrap() == Reach::Away {
            return;
        }
        let Ok(server) = TcpStream::connect(target) else { return };
        let (there, back) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let (one, other) = (self.clone(), self.clone());
        // The server has spoken; the client has spoken after that.
        let greeted = Arc::new((AtomicBool::new(false), AtomicBool::new(false)));
        let its = greeted.clone();
        spawn(move || one.copy(there, server, false, &its));
        spawn(move || other.copy(back, client, true, &greeted));
    }

    fn copy(
        &self,
        mut from: TcpStream,
        mut to: TcpStream,
        is_answer: bool,
        (server, client): &(AtomicBool, AtomicBool),
    ) {
        let mut buffer = [0; 8192];
        loop {
            let length = from.read(&mut buffer).unwrap_or(0);
            let greets = self.is_tls && !client.load(Ordering::Relaxed);
            if is_answer {
                server.store(true, Ordering::Relaxed);
            } else if server.load(Ordering::Relaxed) {
                client.store(true, Ordering::Relaxed);
            }
            if !is_answer {
                self.heard.lock().unwrap().extend_from_slice(&buffer[..length]);
            }
            let lost = match *self.reach.lock().unwrap() {
                Reach::Here => false,
                Reach::Away => true,
                Reach::Deaf => is_answer && !greets,
            };
            if length == 0 || lost || to.write_all(&buffer[..length]).is_err() {
                let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
                return;
            }
        }
    }
}
