//! The server against a real TCP client (the same stack in the other direction) over a wire that loses frames
//! on request, in simulated time.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use smoltcp::phy::{self, DeviceCapabilities, Medium};

use super::super::command::{Disk, Facts};
use super::super::work::{Control, Setting};
use super::*;

type Frames = Rc<RefCell<VecDeque<Vec<u8>>>>;

/// One end of the wire.
struct End {
    incoming: Frames,
    outgoing: Frames,
    /// Frames that may still be sent; the others are lost.
    credit: Rc<RefCell<usize>>,
    room: usize,
}

struct Rx(Vec<u8>);

impl phy::RxToken for Rx {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

struct Tx<'a>(&'a End);

impl phy::TxToken for Tx<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut frame = vec![0; len];
        let result = f(&mut frame);
        let mut credit = self.0.credit.borrow_mut();
        if *credit > 0 {
            *credit -= 1;
            self.0.outgoing.borrow_mut().push_back(frame);
        }
        result
    }
}

/// The frame that `peek` shows has to outlive the borrow of the queue, so it waits here.
struct Card {
    end: End,
    next: Option<Vec<u8>>,
}

impl Card {
    fn fetch(&mut self) {
        if self.next.is_none() {
            self.next = self.end.incoming.borrow_mut().pop_front();
        }
    }
}

impl Device for Card {
    type RxToken<'a> = Rx;
    type TxToken<'a> = Tx<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Rx, Tx<'_>)> {
        let frame = self.next.take()?;
        self.fetch();
        Some((Rx(frame), Tx(&self.end)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Tx<'_>> {
        if self.end.outgoing.borrow().len() < self.end.room { Some(Tx(&self.end)) } else { None }
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = 1514;
        capabilities
    }
}

impl NetDevice for Card {
    fn peek(&self) -> Option<&[u8]> {
        self.next.as_deref()
    }

    fn discard(&mut self) {
        self.next = None;
        self.fetch();
    }
}

struct Bench(Control);

impl Machine for Bench {
    fn facts(&self) -> Facts {
        Facts::default()
    }

    fn disk(&mut self) -> Option<&mut dyn Disk> {
        None
    }

    fn control(&self) -> &Control {
        &self.0
    }

    fn workers(&self) -> usize {
        1
    }

    fn worker_pages(&self) -> u64 {
        100
    }

    fn wake_workers(&mut self) {}
}

const SERVER_IP: [u8; 4] = [10, 0, 0, 2];

/// A server, a wire and a host with many client sockets.
struct World {
    server: Server,
    server_card: Card,
    server_credit: Rc<RefCell<usize>>,
    machine: Bench,
    host: Interface,
    host_card: Card,
    host_credit: Rc<RefCell<usize>>,
    sockets: SocketSet<'static>,
    now_us: u64,
    next_port: u16,
}

impl World {
    fn new(connections: usize) -> Self {
        Self::with_limits(Limits { connections, buffer: 8 << 10, store: 8 << 20, client_bytes: 4 << 20 })
    }

    fn with_limits(limits: Limits) -> Self {
        let (to_server, to_host) = (Frames::default(), Frames::default());
        let server_credit = Rc::new(RefCell::new(usize::MAX));
        let host_credit = Rc::new(RefCell::new(usize::MAX));
        let card = |incoming: &Frames, outgoing: &Frames, credit: &Rc<RefCell<usize>>, room| Card {
            end: End { incoming: incoming.clone(), outgoing: outgoing.clone(), credit: credit.clone(), room },
            next: None,
        };
        let mut server_card = card(&to_server, &to_host, &server_credit, 64);
        let mut host_card = card(&to_host, &to_server, &host_credit, 4096);
        let address =
            Address { mac: [2, 0, 0, 0, 0, 2], ipv4: SERVER_IP, prefix: 24, gateway: [10, 0, 0, 1] };
        let server = Server::new(&mut server_card, address, limits, &[7; 32], 0).unwrap();
        let config = Config::new(HardwareAddress::Ethernet(EthernetAddress([2, 0, 0, 0, 0, 1])));
        let mut host = Interface::new(config, &mut host_card, Instant::ZERO);
        host.update_ip_addrs(|list| {
            list.push(IpCidr::new(Ipv4Address::new(10, 0, 0, 1).into(), 24)).unwrap();
        });
        Self {
            server,
            server_card,
            server_credit,
            machine: Bench(Control::new()),
            host,
            host_card,
            host_credit,
            sockets: SocketSet::new(vec![]),
            now_us: 0,
            next_port: 50_000,
        }
    }

    /// Lets time pass: both sides work until nothing moves, then the clock advances.
    fn step(&mut self, us: u64) {
        for _ in 0..1000 {
            let (host, server) = (self.host_works(), self.server_works());
            if !host && !server {
                break;
            }
        }
        self.now_us += us;
    }

    fn host_works(&mut self) -> bool {
        self.host_card.fetch();
        let at = Instant::from_micros(self.now_us as i64);
        self.host.poll(at, &mut self.host_card, &mut self.sockets) == PollResult::SocketStateChanged
    }

    fn server_works(&mut self) -> bool {
        self.server_card.fetch();
        self.server.poll(&mut self.server_card, &mut self.machine, self.now_us)
    }

    /// Opens a connection without waiting for it.
    fn dial(&mut self) -> SocketHandle {
        let buffer = || tcp::SocketBuffer::new(vec![0; 64 << 10]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_ack_delay(None);
        socket.set_nagle_enabled(false);
        self.next_port += 1;
        let remote = (Ipv4Address::from(SERVER_IP), PORT);
        socket.connect(self.host.context(), remote, self.next_port).unwrap();
        self.sockets.add(socket)
    }

    fn connect(&mut self) -> SocketHandle {
        let handle = self.dial();
        (0..20).for_each(|_| self.step(1000));
        assert_eq!(self.state(handle), State::Established);
        handle
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut Socket<'static> {
        self.sockets.get_mut(handle)
    }

    fn state(&mut self, handle: SocketHandle) -> State {
        self.socket(handle).state()
    }

    fn send(&mut self, handle: SocketHandle, text: &str) {
        assert_eq!(self.socket(handle).send_slice(text.as_bytes()), Ok(text.len()));
    }

    fn take(&mut self, handle: SocketHandle) -> String {
        let mut bytes = vec![0; 1 << 20];
        let len = self.socket(handle).recv_slice(&mut bytes).unwrap_or(0);
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    }

    fn ask(&mut self, handle: SocketHandle, line: &str) -> String {
        self.send(handle, &format!("{line}\r\n"));
        (0..5).for_each(|_| self.step(100));
        self.take(handle)
    }
}

#[test]
fn a_client_is_served() {
    let mut world = World::new(8);
    let client = world.connect();
    assert_eq!(world.ask(client, "PING"), "+PONG\r\n");
    assert_eq!(
        world.ask(client, "*3\r\n$3\r\nSET\r\n$1\r\na\r\n$1\r\nb\r\n*2\r\n$3\r\nGET\r\n$1\r\na"),
        "+OK\r\n$1\r\nb\r\n"
    );
    assert!(world.ask(client, "CLIENT LIST").contains("id=1 addr=10.0.0.1:50001 name= "));
    assert_eq!(world.ask(client, "QUIT"), "+OK\r\n");
    assert_eq!(world.state(client), State::CloseWait, "the server closed");
    world.socket(client).close();
    (0..3000).for_each(|_| world.step(1000));
    assert_eq!(world.server.connections.len(), 0);
    assert_eq!(world.server.totals.client_bytes, 0);
}

#[test]
fn a_lost_response_comes_again_within_100_ms() {
    let mut world = World::new(8);
    let client = world.connect();
    for _ in 0..20 {
        assert_eq!(world.ask(client, "PING"), "+PONG\r\n");
        world.step(50_000);
    }
    // The request arrives; everything that the server says from now on is lost, as at a takeover.
    *world.server_credit.borrow_mut() = 0;
    assert_eq!(world.ask(client, "INCR n"), "");
    *world.server_credit.borrow_mut() = usize::MAX;
    let lost_at = world.now_us;
    let mut reply = String::new();
    while reply.is_empty() && world.now_us < lost_at + 1_000_000 {
        world.step(1000);
        reply = world.take(client);
    }
    assert_eq!(reply, ":1\r\n");
    assert!(world.now_us - lost_at < 100_000, "only after {} us", world.now_us - lost_at);
    // And the timer requests it, so that the idle vCPU is woken for it.
    assert_eq!(world.ask(client, "INCR n"), ":2\r\n");
}

#[test]
fn the_retransmission_is_due_while_the_vcpu_idles() {
    let mut world = World::new(8);
    let client = world.connect();
    world.step(300_000);
    *world.server_credit.borrow_mut() = 0;
    world.ask(client, "PING");
    let due = world.server.next_due(world.now_us).expect("a timer runs");
    assert!(due > world.now_us && due < world.now_us + 100_000, "due in {} us", due - world.now_us);
}

#[test]
fn a_burst_of_connections_is_never_refused() {
    let mut world = World::new(64);
    let clients: Vec<_> = (0..64).map(|_| world.dial()).collect();
    (0..50).for_each(|_| world.step(1000));
    for client in &clients {
        assert_eq!(world.ask(*client, "PING"), "+PONG\r\n");
    }
    // The connection beyond the limit is not reset: it keeps asking, and gets in when there is room.
    let late = world.dial();
    (0..50).for_each(|_| world.step(1000));
    assert_eq!(world.state(late), State::SynSent);
    assert!(world.server.totals.dropped_connections > 0);
    world.socket(clients[0]).close();
    (0..3000).for_each(|_| world.step(1000));
    assert_eq!(world.state(late), State::Established);
    assert_eq!(world.ask(late, "PING"), "+PONG\r\n");
}

#[test]
fn connections_that_wait_for_their_end_make_room() {
    let mut world = World::new(8);
    for round in 0..100 {
        let client = world.dial();
        (0..5).for_each(|_| world.step(100));
        assert_eq!(world.ask(client, "QUIT"), "+OK\r\n", "round {round}");
        world.socket(client).close();
        (0..3).for_each(|_| world.step(100));
    }
    assert_eq!(world.server.totals.dropped_connections, 0);
}

#[test]
fn a_repeated_syn_does_not_open_a_second_connection() {
    let mut world = World::new(8);
    let first = world.connect();
    // No SYN|ACK arrives any more, so the clients repeat their SYN after their own second.
    *world.server_credit.borrow_mut() = 0;
    let second = world.dial();
    world.step(1000);
    // The first socket ends, and when the next connection comes it listens again, in front of the second one.
    world.socket(first).abort();
    world.step(1000);
    world.step(1000);
    let third = world.dial();
    (0..1500).for_each(|_| world.step(1000));
    assert_eq!(world.server.connections.len(), 2);
    *world.server_credit.borrow_mut() = usize::MAX;
    (0..4000).for_each(|_| world.step(1000));
    assert_eq!(world.server.connections.len(), 2);
    for client in [second, third] {
        assert_eq!(world.ask(client, "PING"), "+PONG\r\n");
    }
}

/// What the server sends may be held for as long as a standby gets nothing done: that costs a client that connects just
/// then only time.
#[test]
fn a_connection_whose_answers_are_held_for_long_comes_about() {
    let mut world = World::new(8);
    // Both know each other's addresses.
    let _ = world.connect();
    let client = world.dial();
    world.host_works();
    for _ in 0..31_000 {
        world.server_works();
        world.now_us += 1000;
    }
    assert_eq!(world.state(client), State::SynSent);
    (0..20).for_each(|_| world.step(1000));
    assert_eq!(world.ask(client, "PING"), "+PONG\r\n");
}

#[test]
fn an_idle_client_keeps_its_connection() {
    let mut world = World::new(8);
    let client = world.connect();
    (0..1000).for_each(|_| world.step(1_000_000));
    assert_eq!(world.ask(client, "PING"), "+PONG\r\n");
}

#[test]
fn a_client_that_vanishes_frees_its_place() {
    let mut world = World::new(8);
    let _gone = world.connect();
    *world.host_credit.borrow_mut() = 0;
    (0..200).for_each(|_| world.step(1_000_000));
    assert_eq!(world.server.connections.len(), 0);
}

#[test]
fn a_slow_reader_stops_its_own_requests_only() {
    let mut world = World::new(8);
    let (slow, other) = (world.connect(), world.connect());
    let value = "v".repeat(4000);
    world.ask(other, &format!("SET big {value}"));
    let requests = 3000;
    let mut asked = 0;
    for _ in 0..300 {
        while asked < requests && world.socket(slow).send_queue() < 60_000 {
            world.send(slow, "GET big\r\n");
            asked += 1;
        }
        world.step(1000);
    }
    assert!(
        world.server.totals.client_bytes < 300_000,
        "{} bytes buffered",
        world.server.totals.client_bytes
    );
    assert_eq!(world.ask(other, "PING"), "+PONG\r\n");
    let (mut got, expected) = (0, requests * (4000 + 9));
    while got < expected && world.now_us < 600_000_000 {
        while asked < requests && world.socket(slow).send_queue() < 60_000 {
            world.send(slow, "GET big\r\n");
            asked += 1;
        }
        got += world.take(slow).len();
        world.step(1000);
        assert!(
            world.server.totals.client_bytes < 300_000,
            "{} bytes buffered",
            world.server.totals.client_bytes
        );
    }
    assert_eq!(got, expected);
}

#[test]
fn a_megabyte_goes_through_small_buffers() {
    let mut world = World::new(8);
    let client = world.connect();
    let value: String = (0..1 << 20).map(|i| char::from(b'a' + (i % 23) as u8)).collect();
    let request = format!(
        "*3\r\n$3\r\nSET\r\n$1\r\nk\r\n${}\r\n{value}\r\n*2\r\n$3\r\nGET\r\n$1\r\nk\r\n",
        value.len()
    );
    let (mut sent, mut got) = (0, String::new());
    let expected = format!("+OK\r\n${}\r\n{value}\r\n", value.len());
    while got.len() < expected.len() && world.now_us < 60_000_000 {
        sent += world.socket(client).send_slice(&request.as_bytes()[sent..]).unwrap();
        world.step(1000);
        got += &world.take(client);
    }
    assert!(got == expected);
}

#[test]
fn protocol_errors_end_the_connection_with_a_word() {
    let mut world = World::new(8);
    let client = world.connect();
    assert_eq!(
        world.ask(client, "PING\r\n*1\r\n?"),
        "+PONG\r\n-ERR Protocol error: expected '$', got '?'\r\n"
    );
    assert_eq!(world.state(client), State::CloseWait);
}

#[test]
fn full_client_buffers_end_the_greedy_only() {
    let mut world =
        World::with_limits(Limits { connections: 8, buffer: 8 << 10, store: 1 << 20, client_bytes: 200_000 });
    let (greedy, modest) = (world.connect(), world.connect());
    world.send(greedy, "*2\r\n$3\r\nGET\r\n$1000000\r\n");
    let mut reply = String::new();
    for _ in 0..300 {
        let room = 60_000 - world.socket(greedy).send_queue().min(60_000);
        let _ = world.socket(greedy).send_slice(&vec![b'x'; room]);
        world.step(1000);
        reply += &world.take(greedy);
    }
    assert_eq!(reply, "-ERR the memory for client buffers is used up\r\n");
    assert_eq!(world.ask(modest, "SET a 1"), "+OK\r\n");
}

#[test]
fn sleep_holds_commands_back_and_the_network_goes_on() {
    let mut world = World::new(8);
    let (a, b) = (world.connect(), world.connect());
    assert_eq!(world.ask(a, "DEBUG SLEEP 0.5"), "");
    assert_eq!(world.ask(b, "PING"), "");
    assert_eq!(world.socket(b).send_queue(), 0, "the request is acknowledged");
    assert!(world.server.next_due(world.now_us).is_some_and(|due| due <= 600_000));
    (0..600).for_each(|_| world.step(1000));
    assert_eq!((world.take(a), world.take(b)), ("+OK\r\n".to_owned(), "+PONG\r\n".to_owned()));
}

#[test]
fn verification_is_answered_when_it_is_done() {
    let mut world = World::new(8);
    let (a, b) = (world.connect(), world.connect());
    world.machine.0.set(Setting { pages: 10, hot_percent: 0, rate: 10 });
    assert_eq!(world.ask(a, "WORK VERIFY\r\nPING"), "", "and later commands wait their turn");
    assert_eq!(world.ask(b, "PING"), "+PONG\r\n");
    let mut worker = super::super::work::Worker::new(0, 1, 3);
    struct Memory(Vec<super::super::work::Page>, Vec<u32>);
    impl super::super::work::Arena for Memory {
        fn pages(&self) -> u64 {
            10
        }
        fn page(&mut self, index: u64) -> &mut super::super::work::Page {
            &mut self.0[index as usize]
        }
        fn counter(&mut self, index: u64) -> &mut u32 {
            &mut self.1[index as usize]
        }
    }
    let mut memory = Memory(vec![[0; 512]; 10], vec![0; 10]);
    (0..4).for_each(|_| _ = worker.step(&world.machine.0, &mut memory, 0, 100));
    (0..5).for_each(|_| world.step(100));
    let fields = "*6\r\n$14\r\nverified_pages\r\n:10\r\n$11\r\nstale_pages\r\n:0\r\n$10\r\ntorn_pages\r\n:0\r\n+PONG\r\n";
    assert_eq!(world.take(a), fields);
}

#[test]
fn shutdown_closes_every_connection_first() {
    let mut world = World::new(8);
    let (a, b) = (world.connect(), world.connect());
    assert!(!world.server.is_finished(world.now_us));
    assert_eq!(world.ask(a, "SHUTDOWN NOSAVE"), "");
    for client in [a, b] {
        assert_eq!(world.state(client), State::CloseWait);
    }
    assert!(world.server.is_finished(world.now_us), "all clients have acknowledged the end");
    let late = world.dial();
    (0..20).for_each(|_| world.step(1000));
    assert_eq!(world.state(late), State::SynSent);
}

#[test]
fn shutdown_does_not_wait_for_a_dead_client() {
    let mut world = World::new(8);
    let (a, _dead) = (world.connect(), world.connect());
    world.send(a, "SHUTDOWN\r\n");
    world.step(100);
    *world.host_credit.borrow_mut() = 0;
    *world.server_credit.borrow_mut() = 0;
    (0..600).for_each(|_| world.step(1000));
    assert!(world.server.is_finished(world.now_us));
}

/// Changes one byte behind the Ethernet addresses, cuts the frame or leaves it, then makes its checksums
/// right again, so that the damage gets past them.
fn damage(frame: &mut Vec<u8>, place: usize, value: u8, kind: u8) {
    use smoltcp::wire::{EthernetFrame, IpProtocol, Ipv4Packet, TcpPacket};
    match kind % 4 {
        0 if frame.len() > 12 => {
            let at = 12 + place % (frame.len() - 12);
            frame[at] = value;
        }
        1 => frame.truncate(place % (frame.len() + 1)),
        _ => return,
    }
    let Ok(mut ethernet) = EthernetFrame::new_checked(&mut frame[..]) else { return };
    let Ok(mut ip) = Ipv4Packet::new_checked(ethernet.payload_mut()) else { return };
    ip.fill_checksum();
    let (from, to, tcp) = (ip.src_addr(), ip.dst_addr(), ip.next_header() == IpProtocol::Tcp);
    if let (true, Ok(mut segment)) = (tcp, TcpPacket::new_checked(ip.payload_mut())) {
        segment.fill_checksum(&from.into(), &to.into());
    }
}

proptest::proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(200))]
    #[test]
    fn damaged_frames_hurt_nobody_else(
        damages in proptest::collection::vec(proptest::prelude::any::<(usize, u8, u8)>(), 1..60),
    ) {
        let mut world = World::new(8);
        let mut clients = vec![world.dial(), world.dial()];
        for (place, value, kind) in damages {
            let at = Instant::from_micros(world.now_us as i64);
            world.host_card.fetch();
            world.host.poll(at, &mut world.host_card, &mut world.sockets);
            let queue = world.server_card.end.incoming.clone();
            for frame in queue.borrow_mut().iter_mut() {
                damage(frame, place, value, kind);
            }
            world.step(1000);
            if kind % 8 == 7 {
                clients.push(world.dial());
            }
            for client in &clients {
                let _ = world.socket(*client).send_slice(b"INCR n\r\n");
                let _ = world.take(*client);
            }
        }
        // Forged segments may have taken all places; the places of dead connections come back.
        for client in clients {
            world.socket(client).abort();
        }
        (0..400).for_each(|_| world.step(500_000));
        let fresh = world.connect();
        proptest::prop_assert_eq!(world.ask(fresh, "PING"), "+PONG\r\n");
    }
}
