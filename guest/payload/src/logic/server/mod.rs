//! The server: TCP/IP, connections, and the commands that come over them.

mod connection;
mod syn;

#[cfg(test)]
mod tests;

use alloc::vec::Vec;

use smoltcp::iface::{
    Config, Interface, PollIngressSingleResult, PollResult, SocketHandle, SocketSet, SocketStorage,
};
use smoltcp::phy::Device;
use smoltcp::socket::tcp::{self, Socket, State};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, HardwareAddress, IpCidr, IpEndpoint, Ipv4Address, Ipv4Cidr};

use super::command::{Machine, Totals};
use super::store::Store;
use connection::{Connection, Next, Turn};

/// Port of the server.
const PORT: u16 = 6379;

/// How much faster than real time the TCP/IP stack's clock runs.
///
/// smoltcp (0.13 and later) follows RFC 6298 and never retransmits in less than one second, without a way to
/// change that. After a takeover the response that died with the primary has to be sent again well before a
/// client's own 200 ms are over, so the stack lives 20 times as fast: its second is 50 ms, which is still
/// above the 40 ms for which a Linux client delays an acknowledgement. All other times given to the stack are
/// scaled too (`net_duration`).
const NET_TIME_FACTOR: u64 = 20;

/// Sockets kept in LISTEN. One would do, since frames are taken one at a time and a used one is replaced at
/// once.
const SPARE_LISTENERS: usize = 2;
/// Frames taken before the connections are served.
const INGRESS_BATCH: usize = 64;
/// A new connection must be complete within this time, for which Linux waits, too (`tcp_synack_retries`, tcp(7)). The
/// guest's answer may be held for many seconds: while an arbiter does not answer, or a standby gets nothing done.
const HANDSHAKE_TIMEOUT: u64 = 63_000_000;
/// A peer that does not answer for this long is gone.
const PEER_TIMEOUT: u64 = 180_000_000;
/// Idle connections are probed this often.
const KEEP_ALIVE: u64 = 60_000_000;
/// At SHUTDOWN, time for the clients to take what is in flight.
const SHUTDOWN_TIME_US: u64 = 500_000;

/// A network card that shows the next frame before the stack takes it.
pub trait NetDevice: Device {
    /// The next frame, if one waits.
    fn peek(&self) -> Option<&[u8]>;
    /// Drops the frame that `peek` shows.
    fn discard(&mut self);
}

/// Microseconds of real time as time of the TCP/IP stack.
fn net_time(us: u64) -> Instant {
    Instant::from_micros(i64::try_from(us.saturating_mul(NET_TIME_FACTOR)).unwrap_or(i64::MAX))
}

fn net_duration(us: u64) -> Duration {
    Duration::from_micros(us * NET_TIME_FACTOR)
}

/// How the heap is divided.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most connections.
    pub connections: usize,
    /// Bytes of the receive buffer of a connection, and of its transmit buffer.
    pub buffer: usize,
    /// Budget of the store.
    pub store: usize,
    /// Budget for requests and replies of all connections.
    pub client_bytes: usize,
}

impl Limits {
    /// For a heap of `heap` bytes: 1/8 for the sockets (256 of them at 128 MiB), 1/8 for requests and
    /// replies, and 5/8 for the data.
    pub fn for_heap(heap: usize) -> Self {
        let buffer = 32 << 10;
        Self {
            connections: (heap / 8 / (2 * buffer)).clamp(8, 1024),
            buffer,
            store: heap / 8 * 5,
            client_bytes: heap / 8,
        }
    }
}

/// Address of the guest in the network.
#[derive(Clone, Copy, Debug)]
pub struct Address {
    /// Of the card.
    pub mac: [u8; 6],
    /// Of the guest.
    pub ipv4: [u8; 4],
    /// Length of the network prefix.
    pub prefix: u8,
    /// Default gateway; zeros for none.
    pub gateway: [u8; 4],
}

/// The resource that was missing at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutOfMemory;

/// The server with all its connections.
pub struct Server {
    interface: Interface,
    sockets: SocketSet<'static>,
    listeners: Vec<SocketHandle>,
    connections: Vec<Connection>,
    store: Store,
    totals: Totals,
    limits: Limits,
    last_id: u64,
    /// No command runs before this time (DEBUG SLEEP).
    asleep_until: u64,
    /// Set by SHUTDOWN: the end comes at this time at the latest.
    end_at: Option<u64>,
}

impl Server {
    /// A server on `device`. All memory that it cannot do without is taken here.
    pub fn new<D: Device>(
        device: &mut D,
        address: Address,
        limits: Limits,
        seed: &[u8; 32],
        now_us: u64,
    ) -> Result<Self, OutOfMemory> {
        let word = |at: usize| u64::from_le_bytes(core::array::from_fn(|i| seed[at * 8 + i]));
        let mut config = Config::new(HardwareAddress::Ethernet(EthernetAddress(address.mac)));
        config.random_seed = word(0);
        let mut interface = Interface::new(config, device, net_time(now_us));
        interface.update_ip_addrs(|addresses| {
            let cidr = Ipv4Cidr::new(Ipv4Address::from(address.ipv4), address.prefix);
            // The list has room for two and is empty.
            let _ = addresses.push(IpCidr::Ipv4(cidr));
        });
        if address.gateway != [0; 4] {
            // The table has room for two routes and is empty.
            let _ = interface.routes_mut().add_default_ipv4_route(Ipv4Address::from(address.gateway));
        }
        let total = limits.connections + SPARE_LISTENERS;
        let mut storage = vec_with_room(total)?;
        storage.extend((0..total).map(|_| SocketStorage::EMPTY));
        let mut server = Self {
            interface,
            sockets: SocketSet::new(storage),
            listeners: vec_with_room(SPARE_LISTENERS)?,
            connections: vec_with_room(total)?,
            store: Store::new(limits.store, (word(1), word(2))).map_err(|_| OutOfMemory)?,
            totals: Totals { max_clients: limits.connections, ..Totals::default() },
            limits,
            last_id: 0,
            asleep_until: 0,
            end_at: None,
        };
        server.refill_listeners();
        if server.listeners.is_empty() { Err(OutOfMemory) } else { Ok(server) }
    }

    /// Takes frames, runs commands, sends frames. True when there was or still is work.
    pub fn poll<D: NetDevice>(&mut self, device: &mut D, machine: &mut dyn Machine, now_us: u64) -> bool {
        let received = self.ingress(device, now_us);
        let more = self.serve(machine, now_us);
        let mut sent = false;
        while self.interface.poll_egress(net_time(now_us), device, &mut self.sockets)
            == PollResult::SocketStateChanged
        {
            sent = true;
        }
        received || more || sent
    }

    /// When `poll` has to be called again even if no frame comes.
    pub fn next_due(&mut self, now_us: u64) -> Option<u64> {
        let timer = self.interface.poll_at(net_time(now_us), &self.sockets);
        let timer = timer.map(|at| (at.total_micros().max(0) as u64).div_ceil(NET_TIME_FACTOR));
        let awake = if self.asleep_until > now_us { Some(self.asleep_until) } else { None };
        [timer, awake, self.end_at].into_iter().flatten().min()
    }

    /// True when the server was shut down and its clients know it.
    pub fn is_finished(&self, now_us: u64) -> bool {
        let open = |connection: &Connection| {
            let state = self.sockets.get::<Socket>(connection.handle).state();
            !matches!(state, State::Closed | State::TimeWait | State::FinWait2)
        };
        self.end_at.is_some_and(|end| now_us >= end || !self.connections.iter().any(open))
    }

    fn ingress<D: NetDevice>(&mut self, device: &mut D, now_us: u64) -> bool {
        let mut any = false;
        for _ in 0..INGRESS_BATCH {
            let Some(frame) = device.peek() else { break };
            let syn = syn::remote_of_syn(frame, PORT);
            let repeated = syn.is_some_and(|remote| self.knows(remote));
            if syn.is_some() && !repeated && (self.end_at.is_some() || !self.make_listener()) {
                device.discard();
                self.totals.dropped_connections += 1;
                continue;
            }
            if repeated {
                self.set_listening(false);
            }
            let result = self.interface.poll_ingress_single(net_time(now_us), device, &mut self.sockets);
            if repeated {
                self.set_listening(true);
            }
            if matches!(result, PollIngressSingleResult::None) {
                break;
            }
            any = true;
            if syn.is_some() {
                self.adopt();
                self.refill_listeners();
            }
        }
        any
    }

    /// True when a connection from `remote` exists already.
    fn knows(&self, remote: IpEndpoint) -> bool {
        let same = |connection: &Connection| {
            self.sockets.get::<Socket>(connection.handle).remote_endpoint() == Some(remote)
        };
        self.connections.iter().any(same)
    }

    /// Hides the listening sockets from the stack, or shows them again. The stack gives a segment to the
    /// first socket that would take it, so the repeated SYN of a connection would otherwise open a second
    /// one.
    fn set_listening(&mut self, on: bool) {
        for handle in &self.listeners {
            let socket = self.sockets.get_mut::<Socket>(*handle);
            if on {
                // Fails only for port 0 or an open socket.
                let _ = socket.listen(PORT);
            } else {
                socket.close();
            }
        }
    }

    /// Makes sure that a socket listens; if there are too many, gives up a connection that only waits for its
    /// end.
    fn make_listener(&mut self) -> bool {
        if self.listeners.is_empty() {
            let ended = |connection: &Connection| {
                self.sockets.get::<Socket>(connection.handle).state() == State::TimeWait
            };
            if self.connections.len() >= self.limits.connections
                && let Some(index) = self.connections.iter().position(ended)
            {
                self.remove(index);
            }
            self.refill_listeners();
        }
        !self.listeners.is_empty()
    }

    fn refill_listeners(&mut self) {
        while self.listeners.len() < SPARE_LISTENERS
            && self.connections.len() + self.listeners.len() < self.limits.connections
        {
            let Ok(socket) = new_socket(self.limits.buffer) else { return };
            let handle = self.sockets.add(socket);
            self.listeners.push(handle);
        }
    }

    /// Makes connections of the listening sockets that got a SYN.
    fn adopt(&mut self) {
        let mut index = 0;
        while index < self.listeners.len() {
            let handle = self.listeners[index];
            if self.sockets.get::<Socket>(handle).state() == State::Listen {
                index += 1;
                continue;
            }
            self.listeners.swap_remove(index);
            self.last_id += 1;
            self.connections.push(Connection::new(handle, self.last_id));
        }
    }

    /// Serves each connection once. True when one has more to do at once.
    fn serve(&mut self, machine: &mut dyn Machine, now_us: u64) -> bool {
        let mut more = false;
        let mut index = 0;
        while index < self.connections.len() {
            let asleep = now_us < self.asleep_until;
            let next = self.serve_one(index, machine, now_us, asleep);
            match next {
                Next::Wait => {}
                Next::Again => more = true,
                Next::Remove => {
                    self.remove(index);
                    self.refill_listeners();
                    continue;
                }
                Next::Sleep(us) => self.asleep_until = now_us + us,
                Next::ListClients => {
                    self.list_clients(index);
                    more = true;
                }
                Next::Shutdown => {
                    self.end_at = Some(now_us + SHUTDOWN_TIME_US);
                    self.connections.iter_mut().for_each(Connection::close);
                    more = true;
                }
            }
            index += 1;
        }
        more
    }

    fn serve_one(&mut self, index: usize, machine: &mut dyn Machine, now_us: u64, asleep: bool) -> Next {
        let connection = &mut self.connections[index];
        let socket = self.sockets.get_mut::<Socket>(connection.handle);
        if !connection.greeted && socket.state() == State::Established {
            socket.set_timeout(Some(net_duration(PEER_TIMEOUT)));
            socket.set_keep_alive(Some(net_duration(KEEP_ALIVE)));
            connection.greeted = true;
            self.totals.connections += 1;
            self.totals.clients += 1;
        }
        let before = connection.footprint();
        let buffers_full = self.totals.client_bytes > self.limits.client_bytes;
        let (store, totals) = (&mut self.store, &mut self.totals);
        let next = connection.serve(Turn { socket, store, totals, machine, now_us, asleep, buffers_full });
        let after = self.connections[index].footprint();
        self.totals.client_bytes = self.totals.client_bytes + after - before;
        next
    }

    fn remove(&mut self, index: usize) {
        let connection = self.connections.swap_remove(index);
        self.totals.client_bytes -= connection.footprint();
        self.totals.clients -= usize::from(connection.greeted);
        self.sockets.remove(connection.handle);
    }

    fn list_clients(&mut self, index: usize) {
        let mut text = super::resp::Reply::default();
        for connection in self.connections.iter().filter(|connection| connection.greeted) {
            connection.describe(self.sockets.get::<Socket>(connection.handle), &mut text);
        }
        let out = &mut self.connections[index].out;
        let before = out.footprint();
        out.bulk(text.pending());
        self.totals.client_bytes = self.totals.client_bytes + out.footprint() - before;
    }
}

fn vec_with_room<T>(len: usize) -> Result<Vec<T>, OutOfMemory> {
    let mut list = Vec::new();
    list.try_reserve_exact(len).map_err(|_| OutOfMemory)?;
    Ok(list)
}

fn new_socket(buffer: usize) -> Result<Socket<'static>, OutOfMemory> {
    let ring = || {
        let mut bytes = vec_with_room(buffer)?;
        bytes.resize(buffer, 0);
        Ok(tcp::SocketBuffer::new(bytes))
    };
    let mut socket = Socket::new(ring()?, ring()?);
    socket.set_nagle_enabled(false);
    // Acknowledge when the frames of a batch are served: with the reply if there is one, otherwise at once.
    socket.set_ack_delay(None);
    socket.set_timeout(Some(net_duration(HANDSHAKE_TIMEOUT)));
    // Fails only for port 0 or an open socket.
    let _ = socket.listen(PORT);
    Ok(socket)
}
