//! What a guest notices of its protection, and what its checkpoints cost on the link: `cargo xtask bench guest`, or
//! `cargo bench -p outlive --bench hosts -- guest [--quick] [--json FILE]`.
//!
//! Both hosts, the link and the clients are on this machine, in network namespaces, which only root may make. A
//! guest that writes its memory (`WORK SET pages hot-percent`) is measured in turns without a standby and with
//! one, and the medians stand beside each other. The bytes of a checkpoint stand beside those of its pages raw.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use outlive::events::Stats;

use crate::common::{Amount, NO_LIMIT, Scales, median, row, stats, writes};
use crate::support::{Client, Side, Value, World};

/// Pages, and how many of a hundred writes go to a tenth of them.
const LOADS: [(u64, u32); 4] = [(16, 100), (300, 50), (1000, 90), (3000, 50)];
const PAGE: u64 = 4096;
/// The beginning and the end of a checkpoint of which nothing has changed.
const LEAST_BYTES: u64 = 128;

struct Scale {
    loads: &'static [(u64, u32)],
    rounds: usize,
    time: Duration,
}

static SCALES: Scales<Scale> = Scales {
    full: Scale { loads: &LOADS, rounds: 5, time: Duration::from_secs(3) },
    quick: Scale { loads: &LOADS, rounds: 1, time: Duration::from_secs(2) },
    smoke: Scale { loads: &[(100, 50)], rounds: 1, time: Duration::from_millis(300) },
};

/// What was sent in some time.
struct Sent {
    checkpoints: u64,
    bytes: u64,
    pages: u64,
}

impl Sent {
    fn between(before: &Stats, after: &Stats) -> Sent {
        let pages = |stats: &Stats| {
            let pages = stats.pages;
            pages.raw + pages.zero + pages.granules + pages.unchanged
        };
        Sent {
            checkpoints: (after.checkpoints - before.checkpoints).max(1),
            bytes: after.bytes - before.bytes,
            pages: pages(after) - pages(before),
        }
    }
}

/// Writes a second under this load.
fn speed(world: &World, (pages, hot): (u64, u32), time: Duration) -> f64 {
    let mut client = Client::connect(world);
    let reply = client.ask(&format!("WORK SET {pages} {hot} {NO_LIMIT}"));
    assert_eq!(reply, Ok(Value::Status("OK".into())));
    // Until hot pages are known.
    std::thread::sleep(time / 3);
    let (before, began) = (writes(&mut client), Instant::now());
    std::thread::sleep(time);
    let done = writes(&mut client) - before;
    done as f64 / began.elapsed().as_secs_f64()
}

/// The same alone and protected, and what the protected one sent in a second or two.
fn round(load: (u64, u32), time: Duration) -> Option<(f64, f64, Sent)> {
    let world = World::new()?;
    let alone = world.run_with(Side::A, &[]);
    let free = speed(&world, load, time);
    alone.kill();
    let world = World::new()?;
    let (mut primary, _standby) = world.protected(Side::A);
    let before = stats(&mut primary);
    let kept = speed(&world, load, time);
    // The counters come five times a second.
    std::thread::sleep(Duration::from_millis(250));
    let sent = Sent::between(&before, &stats(&mut primary));
    Some((free, kept, sent))
}

/// Bytes of a checkpoint beside those of its pages raw, or, of one that has hardly any, beside the fewest.
fn bytes_row(case: &str, sent: &Sent, is_idle: bool) -> String {
    let each = |total: u64| total as f64 / sent.checkpoints as f64;
    let (bytes, raw) = (each(sent.bytes), each(sent.pages * PAGE).max(1.0));
    let (peer, fewest) = if is_idle { ("an empty one", LEAST_BYTES as f64) } else { ("raw pages", raw) };
    let percent = bytes * 100.0 / fewest;
    println!("  {case}: {bytes:.0} B a checkpoint, {percent:.1} % of {peer} ({fewest:.0} B)");
    row("guest.bytes", case, (bytes, "B"), (peer, fewest))
}

fn work(scale: &Scale, rows: &mut String) -> Option<()> {
    for &(pages, hot) in scale.loads {
        let case = format!("{{\"load\":\"work\",\"pages\":{pages},\"hot\":{hot}}}");
        let (mut free, mut kept, mut last) = (Vec::new(), Vec::new(), None);
        for _ in 0..scale.rounds {
            let (alone, protected, sent) = round((pages, hot), scale.time)?;
            free.push(alone);
            kept.push(protected);
            last = Some(sent);
        }
        let (free, kept) = (median(free), median(kept).max(1.0));
        println!(
            "{pages} pages, {hot} % hot: {:.2} of {:.2} million writes/s, {:.1} % of the speed",
            kept / 1e6,
            free / 1e6,
            kept * 100.0 / free
        );
        rows.push_str(&row("guest.work", &case, (1e9 / kept, "ns"), ("unprotected", 1e9 / free)));
        rows.extend(last.map(|sent| bytes_row(&case, &sent, false)));
    }
    Some(())
}

/// A VM that nobody uses, and one with ten clients that set 64 bytes each time.
fn wire(scale: &Scale, rows: &mut String) -> Option<()> {
    let world = World::new()?;
    let (mut primary, _standby) = world.protected(Side::A);
    std::thread::sleep(Duration::from_millis(500));
    let before = stats(&mut primary);
    std::thread::sleep(scale.time + Duration::from_millis(250));
    let idle = stats(&mut primary);
    rows.push_str(&bytes_row("{\"load\":\"idle\"}", &Sent::between(&before, &idle), true));
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for client in 0..10u64 {
            let mut connection = Client::connect(&world);
            let stop = &stop;
            scope.spawn(move || {
                let mut number = client;
                while !stop.load(Ordering::Relaxed) {
                    number = number
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let reply = connection.ask(&format!("SET key:{:06} {number:064}", number >> 50));
                    assert_eq!(reply, Ok(Value::Status("OK".into())));
                }
            });
        }
        std::thread::sleep(scale.time + Duration::from_millis(250));
        stop.store(true, Ordering::Relaxed);
    });
    std::thread::sleep(Duration::from_millis(250));
    let sent = Sent::between(&idle, &stats(&mut primary));
    rows.push_str(&bytes_row("{\"load\":\"set\",\"clients\":10}", &sent, false));
    Some(())
}

pub(crate) fn run(amount: Amount, rows: &mut String) -> Option<()> {
    let scale = SCALES.of(amount);
    work(scale, rows)?;
    wire(scale, rows)
}
