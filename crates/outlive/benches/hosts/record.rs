//! What recording costs the VM: `cargo xtask bench record`, or
//! `cargo bench -p outlive --bench hosts -- record [--quick] [--json FILE]`.
//!
//! Both hosts, the link, the clients and the record are on this machine, in network namespaces, which only root may make. The
//! same VM is protected in turns by a standby that records it and by one that does not, and the medians stand beside each
//! other: the guest's writes, its checkpoints, and the time of a request of one client. The base is being copied in the first
//! part of it.

use std::time::{Duration, Instant};

use outlive::events::Event;

use crate::common::{Amount, NO_LIMIT, Scales, median, stats, writes};
use crate::support::{Client, Process, Side, Value, World};

/// Pages, and how many of a hundred writes go to a tenth of them.
const LOADS: [(u64, u32); 3] = [(16, 100), (300, 50), (1000, 90)];

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

/// What one way to protect a VM gives.
struct Given {
    /// Nanoseconds for a write of the guest.
    write: f64,
    /// Microseconds from one checkpoint to the next.
    checkpoint: f64,
    /// Microseconds for a request.
    request: f64,
    /// How often the VM went on without being recorded.
    gaps: usize,
}

fn protected(world: &World, records: bool) -> (Process, Process) {
    let record = world.dir().join("record").display().to_string();
    let option = ["--record", &record];
    let standby = world.standby_with(Side::B, if records { &option } else { &[] });
    let mut primary = world.run_with(Side::A, &["--standby", &Side::B.addr().to_string()]);
    primary.wait_protected();
    (primary, standby)
}

fn measure((pages, hot): (u64, u32), time: Duration, records: bool) -> Option<Given> {
    let world = World::new()?;
    let (mut primary, mut standby) = protected(&world, records);
    let mut client = Client::connect(&world);
    let reply = client.ask(&format!("WORK SET {pages} {hot} {NO_LIMIT}"));
    assert_eq!(reply, Ok(Value::Status("OK".into())));
    // Until hot pages are known. The counters come five times a second.
    std::thread::sleep(time / 3 + Duration::from_millis(250));
    let (before, done_before, began) = (stats(&mut primary), writes(&mut client), Instant::now());
    std::thread::sleep(time);
    let (done, took) = (writes(&mut client) - done_before, began.elapsed().as_secs_f64());
    std::thread::sleep(Duration::from_millis(250));
    let checkpoints = stats(&mut primary).checkpoints.saturating_sub(before.checkpoints).max(1);
    let checkpoint = (took + 0.25) * 1e6 / checkpoints as f64;
    let request = requests(&mut client, time);
    let gaps = standby.events().filter(|it| matches!(it, Event::RecordGap { .. })).count();
    Some(Given { write: took * 1e9 / done.max(1) as f64, checkpoint, request, gaps })
}

/// Microseconds for a request of one client, under the same load.
fn requests(client: &mut Client, time: Duration) -> f64 {
    let (began, mut count) = (Instant::now(), 0);
    while began.elapsed() < time {
        assert_eq!(client.ask("SET key value"), Ok(Value::Status("OK".into())));
        count += 1;
    }
    began.elapsed().as_secs_f64() * 1e6 / f64::from(count)
}

/// A row, and what a person reads.
fn row(bench: &str, case: &str, (value, unit): (f64, &str), peer_value: f64) -> String {
    let percent = peer_value * 100.0 / value;
    println!(
        "  {bench}: {value:.1} {unit}; not recorded {peer_value:.1} {unit}: {percent:.0} % of its speed"
    );
    crate::common::row(bench, case, (value, unit), ("not recorded", peer_value))
}

pub(crate) fn run(amount: Amount, rows: &mut String) -> Option<()> {
    let scale = SCALES.of(amount);
    for &(pages, hot) in scale.loads {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..scale.rounds {
            without.push(measure((pages, hot), scale.time, false)?);
            with.push(measure((pages, hot), scale.time, true)?);
        }
        let gaps = with.iter().map(|it| it.gaps).sum::<usize>();
        println!("{pages} pages, {hot} % hot: {gaps} gaps in {} rounds", scale.rounds);
        let case = format!("{{\"load\":\"work\",\"pages\":{pages},\"hot\":{hot},\"gaps\":{gaps}}}");
        let of = |what: fn(&Given) -> f64| (median(with.iter().map(what)), median(without.iter().map(what)));
        for (bench, unit, (value, peer)) in [
            ("record.write", "ns", of(|it| it.write)),
            ("record.checkpoint", "us", of(|it| it.checkpoint)),
            ("record.request", "us", of(|it| it.request)),
        ] {
            rows.push_str(&row(bench, &case, (value, unit), peer));
        }
    }
    Some(())
}
