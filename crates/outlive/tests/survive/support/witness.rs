//! Clients that talk to the VM all the time and notice everything that is lost, duplicated or broken.
//!
//! A *lasting* witness has one connection for its whole life, a *changing* one opens a new connection for
//! each command. Neither ever repeats a command, so every answer has exactly one right value.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Client, Value, World, wait_until};

/// Keys that a witness writes in turn.
const SLOTS: u64 = 50;
/// Rest between two rounds, so that some hundred requests a second leave the machine to others.
const REST: Duration = Duration::from_millis(2);

/// All witnesses of a test.
pub(crate) struct Witnesses {
    server: SocketAddr,
    threads: Vec<(Arc<Shared>, Thread)>,
}

type Thread = JoinHandle<Result<Tally, String>>;

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    acked: AtomicU64,
    gone: AtomicBool,
}

/// A witness's knowledge at its end.
struct Tally {
    name: String,
    /// Value of its counter.
    count: u64,
    /// SETs that were acknowledged.
    sets: u64,
    longest: Duration,
}

impl Witnesses {
    /// Starts witnesses: this many lasting ones and one changing one.
    pub(crate) fn start(world: &World, lasting: u64) -> Witnesses {
        Witnesses::of(world, world.server(), "w", lasting)
    }

    /// The same for one VM of several. Their keys begin with `prefix`, which no earlier ones had.
    pub(crate) fn of(world: &World, server: SocketAddr, prefix: &str, lasting: u64) -> Witnesses {
        let mut threads = Vec::new();
        for number in 0..=lasting {
            let shared = Arc::new(Shared::default());
            let mut witness = Witness {
                server,
                shared: shared.clone(),
                tally: Tally {
                    name: format!("{prefix}{number}"),
                    count: 0,
                    sets: 0,
                    longest: Duration::ZERO,
                },
            };
            // A thread stays in the network of the thread that started it.
            let thread = world.lan(|| {
                std::thread::spawn(move || {
                    let result = if number == lasting { witness.changing() } else { witness.lasting() };
                    witness.shared.gone.store(true, Ordering::Relaxed);
                    let name = &witness.tally.name;
                    result.map_err(|e| format!("{name} after {} increments: {e}", witness.tally.count))?;
                    Ok(witness.tally)
                })
            });
            threads.push((shared, thread));
        }
        let witnesses = Witnesses { server, threads };
        witnesses.hear_all();
        witnesses
    }

    /// Commands acknowledged so far, of each witness.
    pub(crate) fn acked(&self) -> Vec<u64> {
        self.threads.iter().map(|(shared, _)| shared.acked.load(Ordering::Relaxed)).collect()
    }

    /// Waits until every witness has been served again.
    pub(crate) fn hear_all(&self) {
        let before = self.acked();
        wait_until("every client is served", || {
            let gone = self.threads.iter().any(|(shared, _)| shared.gone.load(Ordering::Relaxed));
            // `finish` reports its problem.
            gone || self.acked().iter().zip(&before).all(|(now, before)| *now >= before + 2)
        });
    }

    /// Ends them and reads everything back over one more connection. Panics if anything is wrong.
    pub(crate) fn finish(self, world: &World) {
        let (commands, longest) = self.end(world);
        println!("{commands} writes, none lost, none doubled; longest wait {} ms", longest.as_millis());
    }

    /// The same without a word. Returns how many writes there were, and the longest wait for an answer.
    pub(crate) fn end(self, world: &World) -> (u64, Duration) {
        self.threads.iter().for_each(|(shared, _)| shared.stop.store(true, Ordering::Relaxed));
        let ends: Vec<_> = self.threads.into_iter().map(|(_, thread)| thread.join().unwrap()).collect();
        let broken: Vec<&String> = ends.iter().filter_map(|end| end.as_ref().err()).collect();
        assert!(broken.is_empty(), "{broken:#?}");
        let mut client = world.lan(|| Client::open(self.server)).unwrap();
        let (mut commands, mut longest) = (0, Duration::ZERO);
        for tally in ends.into_iter().flatten() {
            tally.read_back(&mut client).unwrap();
            commands += tally.count + tally.sets;
            longest = longest.max(tally.longest);
        }
        (commands, longest)
    }
}

struct Witness {
    server: SocketAddr,
    shared: Arc<Shared>,
    tally: Tally,
}

impl Witness {
    fn lasting(&mut self) -> Result<(), String> {
        let mut client = Client::open(self.server)?;
        let mut round = 0;
        while !self.shared.stop.load(Ordering::Relaxed) {
            round += 1;
            self.increment(&mut client)?;
            let (key, value) = (self.tally.key(round), self.tally.value(round));
            let reply = self.timed(&mut client, &format!("SET {key} {value}"))?;
            expect(reply, Value::Status("OK".into()))?;
            self.tally.sets = round;
            if round % 4 == 0 {
                let back = round.saturating_sub(round * 7 % SLOTS).max(1);
                let reply = self.timed(&mut client, &format!("GET {}", self.tally.key(back)))?;
                expect(reply, Value::Bulk(Some(self.tally.value(back).into_bytes())))?;
            }
            std::thread::sleep(REST);
        }
        Ok(())
    }

    fn changing(&mut self) -> Result<(), String> {
        while !self.shared.stop.load(Ordering::Relaxed) {
            let mut client = Client::open(self.server)?;
            self.increment(&mut client)?;
            client.close()?;
            std::thread::sleep(REST * 10);
        }
        Ok(())
    }

    fn increment(&mut self, client: &mut Client) -> Result<(), String> {
        let due = self.tally.count + 1;
        let reply = self.timed(client, &format!("INCR {}", self.tally.name))?;
        expect(reply, Value::Integer(due as i64))?;
        self.tally.count = due;
        Ok(())
    }

    fn timed(&mut self, client: &mut Client, line: &str) -> Result<Value, String> {
        let began = Instant::now();
        let reply = client.ask(line)?;
        self.tally.longest = self.tally.longest.max(began.elapsed());
        self.shared.acked.fetch_add(1, Ordering::Relaxed);
        Ok(reply)
    }
}

impl Tally {
    fn key(&self, round: u64) -> String {
        format!("{}:{}", self.name, round % SLOTS)
    }

    fn value(&self, round: u64) -> String {
        format!("{}-round-{round:09}", self.name)
    }

    fn read_back(&self, client: &mut Client) -> Result<(), String> {
        let count = client.ask(&format!("GET {}", self.name))?;
        expect(count, Value::Bulk(Some(self.count.to_string().into_bytes())))?;
        for round in (self.sets.saturating_sub(SLOTS) + 1)..=self.sets {
            let reply = client.ask(&format!("GET {}", self.key(round)))?;
            expect(reply, Value::Bulk(Some(self.value(round).into_bytes())))?;
        }
        Ok(())
    }
}

/// A load inside the VM that writes all over its memory, and knows afterwards what each page must hold.
pub(crate) struct MemoryLoad;

impl MemoryLoad {
    /// Writes to this many pages at this many writes a second, half of them to a tenth of the pages.
    pub(crate) fn start(world: &World, pages: u64, rate: u64) -> MemoryLoad {
        let reply = Client::connect(world).ask(&format!("WORK SET {pages} 50 {rate}"));
        assert_eq!(reply, Ok(Value::Status("OK".into())));
        MemoryLoad
    }

    /// Makes the VM compare all its pages. Panics if a page is older than it should be, or a mix of two
    /// versions.
    pub(crate) fn finish(self, world: &World) {
        let mut client = Client::connect(world);
        let reply = client.ask("WORK VERIFY").unwrap();
        assert!(!matches!(reply, Value::Error(_)), "{reply:?}");
        let mut number = |name: &str| client.work(name);
        let (writes, checked) = (number("writes"), number("verified_pages"));
        println!("{writes} memory writes, {checked} pages compared");
        assert!(writes > 0 && checked > 0);
        assert_eq!((number("stale_pages"), number("torn_pages")), (0, 0), "old pages, torn pages");
    }
}

fn expect(found: Value, due: Value) -> Result<(), String> {
    if found == due { Ok(()) } else { Err(format!("{found:?} came, {due:?} was due")) }
}
