//! What clients notice of a hand-over: `cargo xtask bench hand-over`, or
//! `cargo bench -p outlive --bench hosts -- hand-over [--quick] [--count N] [--json FILE]`.
//!
//! Both hosts, the link and the clients are on this machine, in network namespaces, which only root may make. Clients ask
//! a VM without a pause, each over its own connection, and a load inside the VM writes all over its memory, while the VM
//! is handed over to and fro. At the end every acknowledged write is read back, and the VM compares its memory.
//!
//! * *downtime*: from when the last vCPU stood still at the old host (`stands_still`, which comes a moment after it) until
//!   the first runs at the new one (`takeover`);
//! * *wait*: of each client, the longest time of a request that was under way in that time;
//! * *protected*: from `takeover` until the base of the old host, which is the standby then, is committed.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use outlive::events::{Event, Record};

use crate::common::{Amount, Scales, quantile, row};
use crate::support::{Client, MemoryLoad, PROGRAM, Process, Side, Value, World};

const CLIENTS: usize = 4;
/// How long the VM stays where it is.
const REST: Duration = Duration::from_millis(300);
/// What the issue wants of downtime at the median, of the wait at p99, and of the time without protection, in µs.
const GOALS: [(&str, &str, f64); 3] =
    [("downtime", "p50", 2_000.0), ("wait", "p99", 10_000.0), ("protected", "p99", 100_000.0)];

const SCALES: Scales<usize> = Scales { full: 200, quick: 20, smoke: 2 };

/// The clock of the events, in µs.
fn now_us() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC exists");
    Duration::from(now).as_micros() as u64
}

/// What a client knows at its end.
#[derive(Default)]
struct Seen {
    /// When each request began, and how long it took, in µs.
    requests: Vec<(u64, u64)>,
    /// Its counter in the VM as the last reply has it.
    counter: i64,
    /// A reply that was not the next number: a write was lost or doubled.
    lost: u64,
    /// Its connection broke.
    broken: Option<String>,
}

/// Clients that ask all the time.
struct Clients {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Seen>>,
}

impl Clients {
    fn start(world: &World) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let start = |number: usize| {
            let (client, stop) = (Client::connect(world), stop.clone());
            std::thread::spawn(move || ask(client, &format!("INCR c{number}"), &stop))
        };
        Self { threads: (0..CLIENTS).map(start).collect(), stop }
    }

    fn finish(self) -> Vec<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.threads.into_iter().map(|thread| thread.join().expect("a client does not panic")).collect()
    }
}

fn ask(mut client: Client, line: &str, stop: &AtomicBool) -> Seen {
    let mut seen = Seen::default();
    while !stop.load(Ordering::Relaxed) {
        let began = now_us();
        match client.ask(line) {
            Ok(Value::Integer(number)) => {
                seen.lost += u64::from(number != seen.counter + 1);
                seen.counter = number;
            }
            other => {
                seen.broken = Some(format!("{other:?}"));
                return seen;
            }
        }
        seen.requests.push((began, now_us() - began));
    }
    seen
}

/// The times of one hand-over, in µs.
#[derive(Clone, Copy)]
struct Times {
    still: u64,
    runs: u64,
    protected: u64,
}

fn at(records: &[Record], wanted: impl Fn(&Event) -> bool) -> Option<u64> {
    records.iter().rev().find(|record| wanted(&record.event)).map(|record| record.t_us)
}

/// Hands the VM over, and waits until it is protected again.
fn hand_over(old: &mut Process, new: &mut Process) -> Result<Times, String> {
    let said = Command::new(PROGRAM).arg("hand-over").arg("--socket").arg(old.socket()).output();
    let said = said.map_err(|error| error.to_string())?;
    if !said.status.success() {
        return Err(String::from_utf8_lossy(&said.stderr).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let after = said.split_once("generation ").map_or("", |(_, rest)| rest);
    let number = after.split(|c: char| !c.is_ascii_digit()).next().and_then(|it| it.parse::<u64>().ok());
    let generation = number.ok_or(said)?;
    let is_protected = |e: &Event| matches!(e, Event::Protected { generation: it, .. } if *it == generation);
    let takes_over = |e: &Event| matches!(e, Event::Takeover { generation: it, .. } if *it == generation);
    new.wait_for("protected again", is_protected);
    let still = at(old.records(), |e| matches!(e, Event::StandsStill { .. }));
    let (runs, protected) = (at(new.records(), takes_over), at(new.records(), is_protected));
    let times = still.zip(runs).zip(protected);
    let ((still, runs), protected) = times.ok_or("an event is missing")?;
    Ok(Times { still, runs, protected })
}

/// Of each client, how long it waited for a reply around this hand-over.
fn waits(seen: &[Seen], times: Times) -> impl Iterator<Item = f64> {
    let overlaps = move |(began, took): &(u64, u64)| *began <= times.runs && began + took >= times.still;
    seen.iter().filter_map(move |client| {
        let longest = client.requests.iter().filter(|it| overlaps(it)).map(|(_, took)| *took).max();
        longest.map(|took| took as f64)
    })
}

fn count(scale: usize) -> usize {
    let arguments: Vec<String> = std::env::args().collect();
    let given = arguments.iter().position(|it| it == "--count").and_then(|at| arguments.get(at + 1));
    given.and_then(|it| it.parse().ok()).unwrap_or(scale)
}

fn rows(scale: &usize, text: &mut String) -> Option<()> {
    let world = World::new()?;
    let [here, there] = [Side::A, Side::B].map(|side| side.addr().to_string());
    let standby = world.staying_standby_with(Side::B, &["--standby", &here]);
    let active = world.run_with(Side::A, &["--standby", &there, "--listen", &here]);
    let mut hosts = [active, standby];
    hosts[0].wait_protected();
    let load = MemoryLoad::start(&world, 500, 20_000);
    let clients = Clients::start(&world);
    let (mut all, mut kept) = (Vec::new(), 0u64);
    let mut owner = 0;
    for time in 0..count(*scale) {
        std::thread::sleep(REST);
        let [a, b] = &mut hosts;
        let (old, new) = if owner == 0 { (a, b) } else { (b, a) };
        match hand_over(old, new) {
            Ok(times) => {
                all.push(times);
                owner = 1 - owner;
            }
            // It stays where it is.
            Err(why) => {
                println!("hand-over {time}: {why}");
                kept += 1;
                std::thread::sleep(REST * 10);
            }
        }
    }
    std::thread::sleep(REST);
    let seen = clients.finish();
    load.finish(&world);
    let (lost, broken) = (
        seen.iter().map(|client| client.lost).sum::<u64>(),
        seen.iter().filter(|client| client.broken.is_some()).count(),
    );
    seen.iter()
        .filter_map(|client| client.broken.as_ref())
        .for_each(|why| println!("a connection broke: {why}"));
    if std::env::var_os("OUTLIVE_LOGS").is_some() {
        hosts.iter().for_each(|host| println!("{}", host.log()));
    }
    if all.is_empty() {
        println!("no hand-over succeeded");
        return None;
    }
    let requests: usize = seen.iter().map(|client| client.requests.len()).sum();
    println!(
        "{} hand-overs under load ({CLIENTS} clients, {requests} requests): {kept} did not take place, {lost} writes \
         lost or doubled, {broken} connections broken",
        all.len()
    );
    let of = |what: &str| -> Vec<f64> {
        match what {
            "downtime" => all.iter().map(|it| it.runs.saturating_sub(it.still) as f64).collect(),
            "wait" => all.iter().flat_map(|times| waits(&seen, *times)).collect(),
            _ => all.iter().map(|it| it.protected.saturating_sub(it.runs) as f64).collect(),
        }
    };
    for (what, goal_at, goal) in GOALS {
        let values = of(what);
        if values.is_empty() {
            continue;
        }
        for (name, share) in [("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0)] {
            let value = quantile(values.iter().copied(), share).max(1.0);
            let case = format!(
                "{{\"what\":\"{what}\",\"at\":\"{name}\",\"hand_overs\":{},\"kept\":{kept},\"lost\":{lost},\"broken\":{broken}}}",
                all.len()
            );
            let verdict = match (name == goal_at, value <= goal) {
                (false, _) => String::new(),
                (true, true) => format!("   goal {} ms: reached", goal / 1e3),
                (true, false) => format!("   goal {} ms: MISSED", goal / 1e3),
            };
            println!("  {what:<10} {name:<4} {:9.2} ms{verdict}", value / 1e3);
            *text += &row("hand-over", &case, (value, "us"), ("goal", goal));
        }
    }
    Some(())
}

pub(crate) fn run(amount: Amount, text: &mut String) -> Option<()> {
    rows(SCALES.of(amount), text)
}
