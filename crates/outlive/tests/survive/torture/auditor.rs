//! Clients that record all their requests and answers, on keys that they share.
//!
//! Keys belong to a *chapter*. When a new chapter has begun for every client, nobody waits for an answer
//! about the old one: its history is complete, is read back once more and judged.
//!
//! Keys are in the guest's memory or on its disk. The disk outlives the loss of both hosts, and the next
//! auditor inherits the history of its blocks.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::disk::{BLOCK, BLOCKS};
use super::history::{Fault, Operation, What, judge_counter, judge_register};
use crate::support::{Client, Dice, Value, World, wait_until};

const LASTING: usize = 4;
const REGISTERS: u64 = 5;
const COUNTERS: u64 = 2;
const ON_DISK: u64 = 4;
/// Chapters whose blocks are in different places.
const PLACES: u64 = BLOCKS / ON_DISK;
/// One of this many commands to the disk is followed by one that makes it durable.
const SYNC_ONE_IN: u64 = 4;
/// Rest after each command, to leave some of the machine to others.
const REST: Duration = Duration::from_millis(3);

/// What is behind a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Sort {
    Register,
    Counter,
    /// A register in a block of the disk.
    Block,
}

/// A key: its chapter, its sort and its number.
type Key = (u64, Sort, u64);
/// A client's state.
type Histories = BTreeMap<Key, Vec<Operation>>;

fn name((chapter, sort, number): Key) -> String {
    let letter = match sort {
        Sort::Register => 'r',
        Sort::Counter => 'c',
        Sort::Block => 'd',
    };
    format!("{letter}{number}:{chapter}")
}

/// The block of a key on the disk.
fn place((chapter, _, number): Key) -> u64 {
    chapter % PLACES * ON_DISK + number
}

/// The request that reads a key.
fn reading(key: Key) -> String {
    if key.1 == Sort::Block { format!("DISK READ {}", place(key)) } else { format!("GET {}", name(key)) }
}

/// The value of a key, as a number; 0 for none. Any other value gives a number that nobody has written.
fn value(key: Key, reply: Value) -> u64 {
    match reply {
        Value::Bulk(None) => 0,
        Value::Bulk(Some(text)) if key.1 == Sort::Block => value_of_block(key, &text),
        Value::Bulk(Some(text)) => number(&text),
        _ => u64::MAX,
    }
}

/// The same for the text in a key's block. A text of another chapter is from before this one.
fn value_of_block(key: Key, text: &[u8]) -> u64 {
    let Some(colon) = text.iter().position(|byte| *byte == b':') else {
        return if text.is_empty() { 0 } else { u64::MAX };
    };
    let (chapter, value) = (&text[..colon], &text[colon + 1..]);
    match number(chapter) {
        chapter if chapter == key.0 => number(value),
        chapter if chapter < key.0 => 0,
        _ => u64::MAX,
    }
}

fn number(text: &[u8]) -> u64 {
    std::str::from_utf8(text).ok().and_then(|text| text.parse().ok()).unwrap_or(u64::MAX)
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
    /// The values in the blocks of the last chapter that was judged.
    last_blocks: Vec<(Key, u64)>,
}

/// What survives both hosts: the blocks' histories, which are not judged yet.
pub(super) struct Estate {
    blocks: Histories,
    began: Instant,
    chapter: u64,
}

impl Auditor {
    /// Starts them and waits until all have been served.
    pub(super) fn start(world: &World, dice: &mut Dice) -> Auditor {
        Auditor::start_in(world, dice, 1, Instant::now())
    }

    /// Starts them after a loss of both hosts and judges what the earlier ones left.
    pub(super) fn start_after(
        world: &World,
        dice: &mut Dice,
        estate: Estate,
    ) -> (Auditor, Result<(), Fault>) {
        // A request of the last chapter may still be on its way to a block.
        let mut auditor = Auditor::start_in(world, dice, estate.chapter + 2, estate.began);
        let keys: Vec<Key> = estate.blocks.keys().copied().collect();
        let mut all = auditor.read(world, keys.into_iter());
        for (key, operations) in estate.blocks {
            all.entry(key).or_default().extend(operations);
        }
        let judged = auditor.judge_these(all);
        (auditor, judged)
    }

    fn start_in(world: &World, dice: &mut Dice, chapter: u64, began: Instant) -> Auditor {
        let clients = (0..=LASTING).map(|_| Told::default()).collect();
        let shared = Arc::new(Shared { clients, chapter: chapter.into(), ..Shared::default() });
        let server = world.server();
        for number in 0..=LASTING {
            let dice = Dice::of(dice.below(u64::MAX));
            let auditing = Auditing { shared: shared.clone(), number, server, began, dice, sent: 0 };
            // A thread stays in the network of the thread that started it.
            world.lan(|| thread::spawn(move || auditing.run()));
        }
        let auditor = Auditor { shared, server, began, judged: 0, last_blocks: Vec::new() };
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
        let last = self.read(world, keys(chapter));
        let blocks = last.iter().filter(|(key, _)| key.1 == Sort::Block);
        self.last_blocks = blocks
            .filter_map(|(key, operations)| match operations[0].what {
                What::Read(value) => Some((*key, value)),
                _ => None,
            })
            .collect();
        self.judge_all(last)
    }

    /// Reads keys once more.
    fn read(&self, world: &World, keys: impl Iterator<Item = Key> + Send) -> Histories {
        world.lan(|| {
            let mut client = Client::open(self.server).unwrap();
            keys.map(|key| {
                let start = self.began.elapsed().as_nanos() as u64;
                let value = value(key, client.ask(&reading(key)).unwrap());
                let end = Some(self.began.elapsed().as_nanos() as u64);
                (key, vec![Operation { what: What::Read(value), start, end }])
            })
            .collect()
        })
    }

    /// Compares the blocks of the last chapter that was judged, which nobody writes any more, with an image.
    /// Returns how many there were.
    pub(super) fn compare(&self, image: &Path) -> Result<u64, String> {
        let file = File::open(image).map_err(|error| format!("{}: {error}", image.display()))?;
        for &(key, due) in &self.last_blocks {
            let mut bytes = vec![0; BLOCK];
            file.read_exact_at(&mut bytes, place(key) * BLOCK as u64).map_err(|error| error.to_string())?;
            let end = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            let found = value_of_block(key, &bytes[..end]);
            if found != due {
                return Err(format!(
                    "{} is {found} in {}, and the guest reads {due}",
                    name(key),
                    image.display()
                ));
            }
        }
        Ok(self.last_blocks.len() as u64)
    }

    /// Judges the history when the VM has ended, including requests without an answer.
    pub(super) fn end(&mut self) -> Result<(), Fault> {
        self.stop();
        self.judge_all(Histories::new())
    }

    /// The same when the VM will start again from its disk.
    pub(super) fn end_for_now(&mut self) -> (Estate, Result<(), Fault>) {
        self.stop();
        let mut all = self.collect(Histories::new());
        let blocks: Histories = all.extract_if(.., |key, _| key.1 == Sort::Block).collect();
        let chapter = self.shared.chapter.load(Ordering::Relaxed);
        (Estate { blocks, began: self.began, chapter }, self.judge_these(all))
    }

    fn judge_all(&mut self, last: Histories) -> Result<(), Fault> {
        let all = self.collect(last);
        self.judge_these(all)
    }

    /// The histories of all chapters that have ended.
    fn collect(&self, mut all: Histories) -> Histories {
        let chapter = self.shared.chapter.load(Ordering::Relaxed);
        let stopped = self.shared.stop.load(Ordering::Relaxed);
        for client in &self.shared.clients {
            let mut histories = lock(&client.histories);
            let going_on =
                if stopped { Histories::new() } else { histories.split_off(&(chapter, Sort::Register, 0)) };
            for (key, operations) in std::mem::replace(&mut *histories, going_on) {
                all.entry(key).or_default().extend(operations);
            }
        }
        all
    }

    fn judge_these(&mut self, all: Histories) -> Result<(), Fault> {
        for (key, operations) in all {
            self.judged += operations.len() as u64;
            let judged = match key.1 {
                Sort::Counter => judge_counter(&operations),
                Sort::Register | Sort::Block => judge_register(&operations),
            };
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
    let sorts = [(Sort::Register, REGISTERS), (Sort::Counter, COUNTERS), (Sort::Block, ON_DISK)];
    sorts.into_iter().flat_map(move |(sort, count)| (0..count).map(move |number| (chapter, sort, number)))
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
        let (sort, count) = match self.dice.below(9) {
            0..3 => (Sort::Counter, COUNTERS),
            3..7 => (Sort::Register, REGISTERS),
            _ => (Sort::Block, ON_DISK),
        };
        let key = (chapter, sort, self.dice.below(count));
        let (what, line) = match (sort, self.dice.below(2)) {
            (Sort::Counter, _) => (What::Add(0), format!("INCR {}", name(key))),
            (Sort::Register, 0) => (What::Write(unique), format!("SET {} {unique}", name(key))),
            (Sort::Block, 0) => {
                (What::Write(unique), format!("DISK WRITE {} {chapter}:{unique}", place(key)))
            }
            _ => (What::Read(0), reading(key)),
        };
        let start = self.began.elapsed();
        self.note(key, Operation { what, start: start.as_nanos() as u64, end: None }, true);
        let reply = client.ask(&line)?;
        let end = self.began.elapsed();
        let what = match (what, reply) {
            (What::Add(_), Value::Integer(value)) => What::Add(value.try_into().unwrap_or(0)),
            (What::Write(_), Value::Status(text)) if text == "OK" => what,
            (What::Read(_), reply @ Value::Bulk(_)) => What::Read(value(key, reply)),
            (_, reply) => return Err(format!("{line} was answered with {reply:?}")),
        };
        let operation = Operation { what, start: start.as_nanos() as u64, end: Some(end.as_nanos() as u64) };
        self.note(key, operation, false);
        self.told().longest_us.fetch_max((end - start).as_micros() as u64, Ordering::Relaxed);
        self.told().answers.fetch_add(1, Ordering::Relaxed);
        if sort == Sort::Block && self.dice.below(SYNC_ONE_IN) == 0 {
            let reply = client.ask("DISK SYNC")?;
            if reply != Value::Status("OK".into()) {
                return Err(format!("DISK SYNC was answered with {reply:?}"));
            }
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_with_a_text_of_an_earlier_chapter_has_no_value_yet() {
        let key = (70, Sort::Block, 3);
        assert_eq!(value(key, Value::Bulk(None)), 0);
        assert_eq!(value(key, Value::Bulk(Some(b"70:17".to_vec()))), 17);
        assert_eq!(value(key, Value::Bulk(Some(b"6:17".to_vec()))), 0);
        for never in [&b"71:17"[..], b"17", b"70", b"70:", b"70:x", b"\xff", b":1"] {
            assert_eq!(value(key, Value::Bulk(Some(never.to_vec()))), u64::MAX, "{never:?}");
        }
    }

    #[test]
    fn the_blocks_of_neighbouring_chapters_are_in_different_places() {
        let places =
            |chapter| keys(chapter).filter(|key| key.1 == Sort::Block).map(place).collect::<Vec<_>>();
        assert!(places(9).iter().all(|place| !places(10).contains(place) && !places(8).contains(place)));
        assert!((0..2 * PLACES).flat_map(places).all(|place| place < BLOCKS));
    }
}
