//! The thread between the guest's ports and their clients.
//!
//! One `poll` loop serves all. The guest waits for nothing that it does: output is in the hubs, and a client
//! that does not read loses it; input is read from clients only as fast as the guest takes it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use outlive_machine::devices::line_log::LineLog;
use outlive_machine::devices::port::{PortInput, PortSink};

use super::client::{Client, Fate};
use super::hub::Hub;
use super::stdio::Stdio;
use crate::serving::ServingThread;
use crate::socket::Listener;

/// How many clients one port may have.
const MAX_CLIENTS: usize = 16;
/// How long the thread waits at its end for clients to read the rest.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// One port of the guest.
pub(crate) struct Served {
    pub(crate) hub: Arc<Hub>,
    pub(crate) input: Arc<PortInput>,
    pub(crate) log: LineLog,
    pub(crate) listener: Option<Listener>,
    pub(crate) stdio: Option<Stdio>,
    pub(crate) clients: Vec<Client>,
    /// How far the log has read.
    pub(crate) logged: u64,
}

/// The running thread. Dropping it shows the remaining output and ends the thread.
#[derive(Debug)]
pub(crate) struct Server {
    _thread: ServingThread,
}

impl Server {
    pub(crate) fn start(ports: Vec<Served>) -> io::Result<Self> {
        let thread = ServingThread::start("console", move |quit| Loop { ports, quit }.run())?;
        Ok(Self { _thread: thread })
    }
}

struct Loop<'a> {
    ports: Vec<Served>,
    quit: &'a EventFd,
}

/// What an entry of the poll set belongs to.
#[derive(Clone, Copy)]
enum Who {
    Quit,
    News(usize),
    Room(usize),
    Listener(usize),
    Client(usize, usize),
    Keys(usize),
    Screen(usize),
}

impl Loop<'_> {
    fn run(mut self) {
        let mut buffer = vec![0; 4096];
        let mut last = None;
        loop {
            let mut due = false;
            for port in &mut self.ports {
                due |= port.pump();
            }
            let deadline: Option<Instant> = last;
            let idle = self.ports.iter().all(Served::is_done);
            if deadline.is_some_and(|at| idle || Instant::now() >= at) {
                return;
            }
            let timeout = match (due, deadline) {
                (true, _) => PollTimeout::ZERO,
                (false, Some(_)) => PollTimeout::from(20u8),
                (false, None) => PollTimeout::NONE,
            };
            let Some(found) = self.wait(timeout, deadline.is_some()) else { return };
            // Clients from the last to the first, so that removing one does not move the others.
            for &(who, flags) in found.iter().rev() {
                match who {
                    Who::Quit => last = Some(Instant::now() + LAST_WORDS),
                    _ => self.serve(who, flags, &mut buffer),
                }
            }
        }
    }

    fn wait(&self, timeout: PollTimeout, ending: bool) -> Option<Vec<(Who, PollFlags)>> {
        let (mut who, mut fds) = (Vec::new(), Vec::new());
        let mut add = |whose: Who, fd, flags| {
            who.push(whose);
            fds.push(PollFd::new(fd, flags));
        };
        if !ending {
            add(Who::Quit, self.quit.as_fd(), PollFlags::POLLIN);
        }
        for (index, port) in self.ports.iter().enumerate() {
            port.watch(index, &mut add);
        }
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(error) => {
                tracing::error!(%error, "the console ends: it cannot wait for events");
                return None;
            }
        }
        let flags = fds.iter().map(|fd| fd.revents().unwrap_or(PollFlags::POLLERR));
        Some(who.into_iter().zip(flags).filter(|(_, flags)| !flags.is_empty()).collect())
    }

    fn serve(&mut self, who: Who, flags: PollFlags, buffer: &mut [u8]) {
        match who {
            Who::Quit => {}
            Who::News(port) => self.ports[port].hub.clear_news(),
            Who::Room(port) => self.ports[port].input.clear_room_event(),
            Who::Listener(port) => self.ports[port].accept(),
            Who::Client(port, client) => {
                let Served { clients, input, .. } = &mut self.ports[port];
                if clients[client].ready(flags, input, buffer) == Fate::Goes {
                    clients.remove(client);
                }
            }
            Who::Keys(port) => {
                let Served { stdio, input, .. } = &mut self.ports[port];
                if let Some(stdio) = stdio {
                    stdio.keys(input, buffer);
                }
            }
            Who::Screen(port) => {
                let Served { stdio, hub, .. } = &mut self.ports[port];
                if let Some(stdio) = stdio {
                    stdio.screen(hub, flags);
                }
            }
        }
    }
}

impl Served {
    /// Hands output to the log and to each client that has room. Returns whether there is more to hand over
    /// at once.
    fn pump(&mut self) -> bool {
        let mut part = [0; 4096];
        let read = self.hub.read(&mut self.logged, &mut part);
        if read.lost > 0 {
            tracing::debug!(target: "guest", bytes = read.lost, "lines lost: the log is too slow");
        }
        self.log.write(&part[..read.count]);
        let hub = &self.hub;
        self.clients.retain_mut(|client| client.pump(hub) == Fate::Stays);
        let end = self.hub.sleep();
        self.logged < end || self.clients.iter().any(|client| client.out.is_due(end))
    }

    /// Everyone has seen everything.
    fn is_done(&self) -> bool {
        let end = self.hub.sleep();
        self.logged >= end
            && self.clients.iter().all(|client| client.out.is_done(end))
            && self.stdio.as_ref().is_none_or(|stdio| stdio.is_done(end))
    }

    fn watch<'a>(&'a self, index: usize, add: &mut impl FnMut(Who, BorrowedFd<'a>, PollFlags)) {
        add(Who::News(index), self.hub.news(), PollFlags::POLLIN);
        let room = self.input.room();
        if room == 0 {
            add(Who::Room(index), self.input.room_event(), PollFlags::POLLIN);
        }
        if let Some(listener) = self.listener.as_ref().filter(|_| self.clients.len() < MAX_CLIENTS) {
            add(Who::Listener(index), listener.socket.as_fd(), PollFlags::POLLIN);
        }
        for (number, client) in self.clients.iter().enumerate() {
            if let Some(flags) = client.interest(room) {
                add(Who::Client(index, number), client.socket.as_fd(), flags);
            }
        }
        if let Some(stdio) = &self.stdio {
            if let Some(keys) = stdio.wants_keys(room) {
                add(Who::Keys(index), keys, PollFlags::POLLIN);
            }
            if let Some(screen) = stdio.wants_screen(self.hub.sleep()) {
                add(Who::Screen(index), screen, PollFlags::POLLOUT);
            }
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        match listener.socket.accept().and_then(|(socket, _)| Client::new(socket, &self.hub)) {
            Ok(client) => self.clients.push(client),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => tracing::warn!(%error, "cannot serve a new client of the console"),
        }
    }
}
