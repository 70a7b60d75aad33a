//! How many checkpoints a second are held, and what is left of the guest's time then: `cargo xtask bench rate`, or
//! `cargo bench -p outlive --bench hosts -- rate [--quick] [--json FILE]`.
//!
//! Both hosts and the link are on this machine, in network namespaces, which only root may make. A guest writes to 16
//! pages all the time. For each interval that is asked for, the checkpoints that were taken stand beside those that
//! the interval would be, and the guest's writes beside those of the same guest without a standby. The share of the
//! time in which its vCPU was in the guest is from the pauses as the vCPU saw them.

use std::thread::sleep;
use std::time::{Duration, Instant};

use outlive::events::Event;

use crate::common::{Amount, NO_LIMIT, Scales, median, row, stats, writes};
use crate::support::{Client, Process, Side, Value, World, wait_until};

struct Scale {
    /// Microseconds; the options take nothing shorter than 100.
    intervals: &'static [u64],
    rounds: usize,
    time: Duration,
}

static SCALES: Scales<Scale> = Scales {
    full: Scale { intervals: &[1000, 200, 100], rounds: 3, time: Duration::from_secs(60) },
    quick: Scale { intervals: &[200, 100], rounds: 1, time: Duration::from_secs(3) },
    smoke: Scale { intervals: &[1000], rounds: 1, time: Duration::from_millis(300) },
};

/// What was seen of a guest.
struct Seen {
    /// Its writes a second.
    writes: f64,
    /// Checkpoints a second.
    checkpoints: f64,
    /// Of its time, in percent.
    running: f64,
}

fn load(world: &World) -> Client {
    let mut client = Client::connect(world);
    let reply = client.ask(&format!("WORK SET 16 100 {NO_LIMIT}"));
    assert_eq!(reply, Ok(Value::Status("OK".into())));
    // Until hot pages are known.
    sleep(Duration::from_secs(1));
    client
}

/// Microseconds of all pauses that were told of so far, as the vCPU saw them, and how many there were.
fn away(primary: &mut Process) -> (f64, f64) {
    let measured = primary.events().filter_map(|event| match event {
        Event::Measured(measured) => Some(measured),
        _ => None,
    });
    let pauses = measured.filter_map(|it| it.phases.get("vcpu_pause")).flatten();
    pauses.fold((0.0, 0.0), |(time, count), &(nanoseconds, more)| {
        (time + nanoseconds as f64 * more as f64 / 1e3, count + more as f64)
    })
}

fn protected(interval: u64, time: Duration) -> Option<Seen> {
    let world = World::new()?;
    let every = format!("{interval}us");
    let (mut primary, _standby) =
        world.protected_with(Side::A, &["--policy", "interval", "--interval", &every]);
    let mut client = load(&world);
    let (paused, taken, written, began) =
        (away(&mut primary), stats(&mut primary).checkpoints, writes(&mut client), Instant::now());
    sleep(time);
    let (written, seconds) = ((writes(&mut client) - written) as f64, began.elapsed().as_secs_f64());
    let taken = (stats(&mut primary).checkpoints - taken).max(1) as f64;
    // They are told of once a second, and less often later.
    let told = away(&mut primary);
    wait_until("the last pauses are told of", || away(&mut primary).1 > told.1);
    let now = away(&mut primary);
    let pause = (now.0 - paused.0) / (now.1 - paused.1);
    let rate = taken / seconds;
    Some(Seen { writes: written / seconds, checkpoints: rate, running: 100.0 - rate * pause / 1e4 })
}

fn alone(time: Duration) -> Option<f64> {
    let world = World::new()?;
    let _vm = world.run_with(Side::A, &[]);
    let mut client = load(&world);
    let (written, began) = (writes(&mut client), Instant::now());
    sleep(time);
    Some((writes(&mut client) - written) as f64 / began.elapsed().as_secs_f64())
}

fn rates(scale: &Scale, rows: &mut String) -> Option<()> {
    for &interval in scale.intervals {
        let (mut free, mut kept) = (Vec::new(), Vec::new());
        for _ in 0..scale.rounds {
            free.push(alone(scale.time.min(Duration::from_secs(5)))?);
            kept.push(protected(interval, scale.time)?);
        }
        let of = |figure: fn(&Seen) -> f64| median(kept.iter().map(figure));
        let (checkpoints, running) = (of(|it| it.checkpoints), of(|it| it.running));
        let (writes, free) = (of(|it| it.writes).max(1.0), median(free).max(1.0));
        println!(
            "every {interval} us: {checkpoints:.0} checkpoints/s, the guest runs {running:.0} % of the time, {:.0} % of \
             its writes",
            writes * 100.0 / free
        );
        let case = format!("{{\"pages\":16,\"interval_us\":{interval}}}");
        *rows += &row("rate.checkpoint", &case, (1e6 / checkpoints, "us"), ("the interval", interval as f64));
        *rows += &row("rate.away", &case, (100.0 - running, "%"), ("all of the time", 100.0));
        *rows += &row("rate.work", &case, (1e9 / writes, "ns"), ("unprotected", 1e9 / free));
    }
    Some(())
}

pub(crate) fn run(amount: Amount, rows: &mut String) -> Option<()> {
    rates(SCALES.of(amount), rows)
}
