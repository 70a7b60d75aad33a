//! Clients that record all their requests and answers, on keys that they share.
//!
//! Keys belong to a *chapter*. When a new chapter has begun for every client, nobody waits for an answer
//! about the old one: its history is complete, is read back once more and judged.

use std::collections::BTreeMap;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::history::{Fault, Operation, What, judge_counter, judge_register};
use crate::support::{Client, Dice, Value, World, wait_until};

const LASTING: usize = 4;
const REGISTERS: u64 = 5;
const COUNTERS: u64 = 2;
/// Rest after each command, to leave some of the machine to others.
const REST: Duration = Duration::from_millis(3);

/// A key: its chapter, whether it is a counter, and its number.
type Key = (u64, bool, u64);
/// A client's state.
type Histories = BTreeMap<Key, Vec<Operation>>;

fn name((chapter, counter, number): Key) -> String {
    format!("{}{number}:{chapter}", if counter { 'c' } else { 'r' })
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    chapter: AtomicU64,
    clients: Vec<Told>,
}

/// The part of a client's state that the rest of the play sees.
#[derive(Default)]
struct Told {
    answers: AtomicU64,
    longest_us: AtomicU64,
    histories: Mutex<Histories>,
    connection: Mutex<Option<TcpStream>>,
    broken: Mutex<Option<String>>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

/// All clients of one VM.
pub(super) struct Auditor {
    shared: Arc<Shared>,
    server: SocketAddr,
    began: Instant,
    /// Operations judged.
    pub(super) judged: u64,
}

impl Auditor {
    /// Starts them and waits until all have been served.
    pub(super) fn start(world: &World, dice: &mut Dice) -> Auditor {
        let clients = (0..=LASTING).map(|_| Told::default()).collect();
        let shared = Arc::new(Shared { clients, ..Shared::default() });
        let (server, began) = (world.server(), Instant::now());
        for number in 0..=LASTING {
            let dice = Dice::of(dice.below(u64::MAX));
            let auditing = Auditing { shared: shared.clone(), number, server, began, dice, sent: 0 };
            // A thread stays in the network of the thread that started it.
            world.lan(|| thread::spawn(move || auditing.run()));
        }
        let auditor = Auditor { shared, server, began, judged: 0 };
        auditor.hear_all();
        auditor
    }

    /// Why a client could not continue, if one could not.
    pub(super) fn broken(&self) -> Option<String> {
        self.shared.clients.iter().find_map(|client| lock(&client.broken).clone())
    }

    /// How many answers each client has had.
    pub(super) fn answers(&self) -> Vec<u64> {
        self.shared.clients.iter().map(|client| client.answers.load(Ordering::Relaxed)).collect()
    }

    /// Whether every client has been served since, and waits for no earlier answer.
    pub(super) fn heard_since(&self, before: &[u64]) -> bool {
        self.answers().iter().zip(before).all(|(now, before)| *now >= before + 2)
    }

    /// The longest wait for an answer since the last call.
    pub(super) fn longest_wait(&self) -> Duration {
        let longest = self.shared.clients.iter().map(|it| it.longest_us.swap(0, Ordering::Relaxed)).max();
        Duration::from_micros(longest.unwrap_or(0))
    }

    fn hear_all(&self) {
        let before = self.answers();
        wait_until("every client is served", || self.broken().is_some() || self.heard_since(&before));
        assert_eq!(self.broken(), None);
    }

    /// Ends the chapter: reads its keys once more and judges them.
    pub(super) fn judge(&mut self, world: &World) -> Result<(), Fault> {
        let chapter = self.shared.chapter.fetch_add(1, Ordering::Relaxed);
        self.hear_all();
        let mut last = Histories::new();
        world.lan(|| {
            let mut client = Client::open(self.server).unwrap();
            for key in keys(chapter) {
                let start = self.began.elapsed().as_nanos() as u64;
                let value = read_value(client.ask(&format!("GET {}", name(key))).unwrap());
                let end = Some(self.began.elapsed().as_nanos() as u64);
                last.insert(key, vec![Operation { what: What::Read(value), start, end }]);
            }
        });
        self.judge_all(last)
    }

    /// Judges the history when the VM has ended, including requests without an answer.
    pub(super) fn end(&mut self) -> Result<(), Fault> {
        self.stop();
        self.judge_all(Histories::new())
    }

    fn judge_all(&mut self, mut all: Histories) -> Result<(), Fault> {
        let chapter = self.shared.chapter.load(Ordering::Relaxed);
        let stopped = self.shared.stop.load(Ordering::Relaxed);
        for client in &self.shared.clients {
            let mut histories = lock(&client.histories);
            let going_on = if stopped { Histories::new() } else { histories.split_off(&(chapter, false, 0)) };
            for (key, operations) in std::mem::replace(&mut *histories, going_on) {
                all.entry(key).or_default().extend(operations);
            }
        }
        for (key, operations) in all {
            self.judged += operations.len() as u64;
            let judged = if key.1 { judge_counter(&operations) } else { judge_register(&operations) };
            judged.map_err(|fault| match fault {
                Fault::Lost(what) => Fault::Lost(format!("{}: {what}", name(key))),
                Fault::Doubled(what) => Fault::Doubled(format!("{}: {what}", name(key))),
            })?;
        }
        Ok(())
    }

    fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        for client in &self.shared.clients {
            if let Some(connection) = lock(&client.connection).take() {
                connection.shutdown(Shutdown::Both).ok();
            }
        }
    }
}

impl Drop for Auditor {
    fn drop(&mut self) {
        // Nobody waits for the threads: a thread that is connecting may take a minute, and holds nothing.
        self.stop();
    }
}

fn keys(chapter: u64) -> impl Iterator<Item = Key> {
    let registers = (0..REGISTERS).map(move |number| (chapter, false, number));
    registers.chain((0..COUNTERS).map(move |number| (chapter, true, number)))
}

/// The value of a key, as a number; 0 for none. Any other value gives a number that nobody has written.
fn read_value(reply: Value) -> u64 {
    match reply {
        Value::Bulk(None) => 0,
        Value::Bulk(Some(text)) => {
            String::from_utf8(text).ok().and_then(|text| text.parse().ok()).unwrap_or(u64::MAX)
        }
        _ => u64::MAX,
    }
}

/// One client at work.
struct Auditing {
    shared: Arc<Shared>,
    number: usize,
    server: SocketAddr,
    began: Instant,
    dice: Dice,
    sent: u64,
}

impl Auditing {
    fn run(mut self) {
        let result = self.talk();
        if let Err(why) = result
            && !self.shared.stop.load(Ordering::Relaxed)
        {
            let why = format!("client {} after {} commands: {why}", self.number, self.sent);
            *lock(&self.told().broken) = Some(why);
        }
    }

    fn told(&self) -> &Told {
        &self.shared.clients[self.number]
    }

    /// The last client opens a new connection after every few commands.
    fn talk(&mut self) -> Result<(), String> {
        let commands = if self.number == LASTING { 3 } else { u64::MAX };
        while !self.shared.stop.load(Ordering::Relaxed) {
            let mut client = Client::open(self.server)?;
            *lock(&self.told().connection) = Some(client.handle());
            for _ in 0..commands {
                if self.shared.stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                self.command(&mut client)?;
                thread::sleep(REST);
            }
            client.close()?;
        }
        Ok(())
    }

    fn command(&mut self, client: &mut Client) -> Result<(), String> {
        let chapter = self.shared.chapter.load(Ordering::Relaxed);
        self.sent += 1;
        // No two clients ever write the same value.
        let unique = (self.number as u64 + 1) << 40 | self.sent;
        let counter = self.dice.below(3) == 0;
        let key = (chapter, counter, self.dice.below(if counter { COUNTERS } else { REGISTERS }));
        let (what, line) = match (counter, self.dice.below(2)) {
            (true, _) => (What::Add(0), format!("INCR {}", name(key))),
            (false, 0) => (What::Write(unique), format!("SET {} {unique}", name(key))),
            (false, _) => (What::Read(0), format!("GET {}", name(key))),
        };
        let start = self.began.elapsed();
        self.note(key, Operation { what, start: start.as_nanos() as u64, end: None }, true);
        let reply = client.ask(&line)?;
        let end = self.began.elapsed();
        let what = match (what, reply) {
            (What::Add(_), Value::Integer(value)) => What::Add(value.try_into().unwrap_or(0)),
            (What::Write(_), Value::Status(text)) if text == "OK" => what,
            (What::Read(_), reply @ Value::Bulk(_)) => What::Read(read_value(reply)),
            (_, reply) => return Err(format!("{line} was answered with {reply:?}")),
        };
        let operation = Operation { what, start: start.as_nanos() as u64, end: Some(end.as_nanos() as u64) };
        self.note(key, operation, false);
        self.told().longest_us.fetch_max((end - start).as_micros() as u64, Ordering::Relaxed);
        self.told().answers.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Records an operation when it is sent, and later its answer in the same place.
    fn note(&self, key: Key, operation: Operation, new: bool) {
        let mut histories = lock(&self.told().histories);
        let history = histories.entry(key).or_default();
        match history.last_mut() {
            Some(last) if !new => *last = operation,
            _ => history.push(operation),
        }
    }
}
