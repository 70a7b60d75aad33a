//! The clients: some keep one connection to the end, and one opens new connections all the time.
//!
//! No client ever retries. An error on a connection is what a user of the VM would have seen, so it is
//! counted as a broken connection and the client stops there; its ledger is still judged.

use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::client::{ClientError, Connection};
use super::gaps::Gaps;
use super::ledger::{Ledger, SLOTS};
use crate::events::now_us;

/// How long a client waits for a connection: the kernel repeats a lost SYN after 1 s, 3 s and 7 s.
const CONNECT_PATIENCE: Duration = Duration::from_secs(10);
/// How long a client waits for a reply before it calls the connection broken.
const REPLY_PATIENCE: Duration = Duration::from_secs(30);
/// New connections per second of the second kind of client.
const CONNECTION_RATE: u32 = 40;
/// A lasting client reads one of its keys back after this many rounds of writes.
const READ_BACK_EVERY: u64 = 4;

/// What the live status shows.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Acknowledged writes.
    pub(super) acked: AtomicU64,
    /// Connections that ended with an error.
    pub(super) broken: AtomicU64,
    /// Connections made by the second kind of client.
    pub(super) connections: AtomicU64,
}

/// What a client hands back when it is done.
#[derive(Debug)]
pub(super) struct Report {
    /// What it knows about its writes.
    pub(super) ledger: Ledger,
    /// Waits for replies.
    pub(super) gaps: Gaps,
    /// Longest wait for a new connection.
    pub(super) longest_connect_us: u64,
    /// What broke its connection, if anything did.
    pub(super) failure: Option<String>,
}

impl Report {
    pub(super) fn new(client: u32) -> Self {
        Self { ledger: Ledger::new(client), gaps: Gaps::default(), longest_connect_us: 0, failure: None }
    }
}

/// What the clients share with the director.
#[derive(Debug, Default)]
struct Shared {
    counters: Counters,
    /// The order to finish the request under way, then leave.
    stop: AtomicBool,
    /// Whether we are shutting the connections down: what breaks now is nobody's fault.
    aborted: AtomicBool,
    /// One handle for each client, to end a wait from outside.
    handles: Mutex<Vec<Option<TcpStream>>>,
}

/// All clients, running.
#[derive(Debug)]
pub(super) struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<Report>>,
}

impl Load {
    /// Starts `clients` lasting clients and one of the second kind. Together they send at most `rate`
    /// requests per second.
    pub(super) fn start(addr: SocketAddr, clients: u32, rate: u32) -> std::io::Result<Self> {
        let mut load = Self { shared: Arc::default(), threads: Vec::new() };
        load.shared
            .handles
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .resize_with(clients as usize + 1, || None);
        let pace = Duration::from_secs(1) * clients / rate;
        for client in 0..clients {
            load.spawn(client, move |run| run.lasting(addr, pace))?;
        }
        load.spawn(clients, move |run| run.changing(addr, Duration::from_secs(1) / CONNECTION_RATE))?;
        Ok(load)
    }

    fn spawn(
        &mut self,
        client: u32,
        talk: impl FnOnce(&mut Client) -> Result<(), ClientError> + Send + 'static,
    ) -> std::io::Result<()> {
        let shared = self.shared.clone();
        let body = move || {
            let mut run = Client { index: client as usize, shared, report: Report::new(client) };
            if let Err(error) = talk(&mut run)
                && !run.shared.aborted.load(Ordering::Relaxed)
            {
                run.shared.counters.broken.fetch_add(1, Ordering::Relaxed);
                run.report.failure = Some(format!("client {client}: {error}"));
            }
            run.report
        };
        self.threads.push(outlive_machine::spawn(format!("client-{client}"), body)?);
        Ok(())
    }

    /// The live numbers.
    pub(super) fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    /// Whether no lasting client is left.
    pub(super) fn all_gone(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Ends the load: the clients may take `patience` in all to finish the requests under way. Then the
    /// connections are shut down, which leaves their last request open but counts as no broken connection.
    pub(super) fn stop(mut self, patience: Duration) -> Vec<Report> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let deadline = Instant::now() + patience;
        while !self.all_gone() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(5));
        }
        self.abort();
        // A panic in a client is a bug in the demo and must not look like a good result.
        self.threads.drain(..).map(|t| t.join().expect("a client thread panicked")).collect()
    }

    fn abort(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.aborted.store(true, Ordering::Relaxed);
        for handle in self.shared.handles.lock().unwrap_or_else(PoisonError::into_inner).drain(..).flatten() {
            // It may be closed already.
            let _ = handle.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.abort();
    }
}

/// One client on its thread.
struct Client {
    index: usize,
    shared: Arc<Shared>,
    report: Report,
}

impl Client {
    /// One connection, which must last to the end.
    fn lasting(&mut self, addr: SocketAddr, pace: Duration) -> Result<(), ClientError> {
        let mut connection = self.connect(addr)?;
        let mut pacer = Pacer::new(pace);
        for round in 1u64.. {
            for step in 0..3 {
                if !pacer.wait(&self.shared.stop) {
                    return Ok(());
                }
                match step {
                    0 => self.increment(&mut connection)?,
                    1 => self.set(&mut connection)?,
                    _ if round % READ_BACK_EVERY == 0 => self.read_back(&mut connection, round)?,
                    _ => {}
                }
            }
        }
        Ok(())
    }

    /// A new connection for each few requests.
    fn changing(&mut self, addr: SocketAddr, pace: Duration) -> Result<(), ClientError> {
        let mut pacer = Pacer::new(pace);
        for round in 1u64.. {
            if !pacer.wait(&self.shared.stop) {
                break;
            }
            let mut connection = self.connect(addr)?;
            self.shared.counters.connections.fetch_add(1, Ordering::Relaxed);
            self.increment(&mut connection)?;
            self.set(&mut connection)?;
            self.read_back(&mut connection, round)?;
        }
        Ok(())
    }

    fn connect(&mut self, addr: SocketAddr) -> Result<Connection, ClientError> {
        let from = now_us();
        let connection = Connection::open(addr, CONNECT_PATIENCE, REPLY_PATIENCE)?;
        self.report.longest_connect_us = self.report.longest_connect_us.max(now_us() - from);
        let handle = connection.handle()?;
        let mut handles = self.shared.handles.lock().unwrap_or_else(PoisonError::into_inner);
        match handles.get_mut(self.index) {
            Some(place) => *place = Some(handle),
            // The list is gone: the load was just aborted.
            None => handle.shutdown(Shutdown::Both)?,
        }
        Ok(connection)
    }

    fn increment(&mut self, connection: &mut Connection) -> Result<(), ClientError> {
        let key = self.report.ledger.counter_key();
        self.report.ledger.increment_sent();
        let from = now_us();
        let value = connection.increment(&key)?;
        self.report.gaps.waited(from, now_us());
        self.report.ledger.increment_acked(value);
        self.shared.counters.acked.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn set(&mut self, connection: &mut Connection) -> Result<(), ClientError> {
        let (key, value) = self.report.ledger.set_sent();
        let from = now_us();
        connection.set(&key, &value)?;
        self.report.gaps.waited(from, now_us());
        self.report.ledger.set_acked();
        self.shared.counters.acked.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Reads one of the keys; 7 and the number of slots have no common divisor, so all get their turn.
    fn read_back(&mut self, connection: &mut Connection, round: u64) -> Result<(), ClientError> {
        let slot = (round * 7 % SLOTS as u64) as usize;
        let key = self.report.ledger.slot_key(slot);
        let from = now_us();
        let value = connection.get(&key)?;
        self.report.gaps.waited(from, now_us());
        self.report.ledger.judge_slot(slot, value.as_deref());
        Ok(())
    }
}

/// Spreads requests over time. A client that fell behind does not catch up in a burst.
struct Pacer {
    pace: Duration,
    next: Instant,
}

impl Pacer {
    fn new(pace: Duration) -> Self {
        Self { pace, next: Instant::now() }
    }

    /// Waits for the next turn; `false` when it is time to stop.
    fn wait(&mut self, stop: &AtomicBool) -> bool {
        let now = Instant::now();
        if self.next > now {
            thread::sleep(self.next - now);
        }
        self.next = self.next.max(now) + self.pace;
        !stop.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::super::fake::{FakeServer, Fault};
    use super::*;

    fn run(server: &FakeServer, time: Duration) -> Vec<Report> {
        let load = Load::start(server.addr(), 2, 100_000).unwrap();
        thread::sleep(time);
        load.stop(Duration::from_secs(5))
    }

    #[test]
    fn a_faithful_server_breaks_and_damages_nothing() {
        let server = FakeServer::start(Fault::None);
        let load = Load::start(server.addr(), 2, 100_000).unwrap();
        thread::sleep(Duration::from_millis(300));
        let (live, connections) = (&load.counters().acked, &load.counters().connections);
        assert!(live.load(Ordering::Relaxed) > 100, "{live:?}");
        assert!(connections.load(Ordering::Relaxed) > 3, "{connections:?}");
        let reports = load.stop(Duration::from_secs(5));
        assert_eq!(reports.len(), 3);
        for report in &reports {
            assert_eq!((report.ledger.damage.lost, report.ledger.damage.duplicated), (0, 0));
            assert_eq!(report.failure, None);
            assert!(report.ledger.acked > 0);
        }
    }

    #[test]
    fn a_reset_breaks_each_lasting_connection_once() {
        let server = FakeServer::start(Fault::HangUpAfter(50));
        let reports = run(&server, Duration::from_millis(300));
        assert!(reports.iter().all(|r| r.failure.is_some()), "{reports:?}");
    }

    #[test]
    fn a_lost_increment_is_noticed_by_the_next_reply() {
        let server = FakeServer::start(Fault::LoseIncrement(20));
        let lost: u64 = run(&server, Duration::from_millis(300)).iter().map(|r| r.ledger.damage.lost).sum();
        assert_eq!(lost, 1);
    }

    #[test]
    fn a_silent_server_is_left_without_blame() {
        let server = FakeServer::start(Fault::SilentAfter(50));
        let load = Load::start(server.addr(), 2, 100_000).unwrap();
        thread::sleep(Duration::from_millis(200));
        let begin = Instant::now();
        let reports = load.stop(Duration::from_millis(100));
        assert!(begin.elapsed() < Duration::from_secs(5));
        assert!(reports.iter().all(|r| r.failure.is_none()), "{reports:?}");
    }

    #[test]
    fn the_pace_is_kept() {
        let mut pacer = Pacer::new(Duration::from_millis(10));
        let stop = AtomicBool::new(false);
        let begin = Instant::now();
        (0..6).for_each(|_| assert!(pacer.wait(&stop)));
        assert!(begin.elapsed() >= Duration::from_millis(50));
        stop.store(true, Ordering::Relaxed);
        assert!(!pacer.wait(&stop));
    }
}
