//! What clients notice of a VM's protection: `cargo xtask bench clients`, or
//! `cargo bench -p outlive --bench hosts -- clients [--quick] [--json FILE]`.
//!
//! Both hosts, the link and the clients are on this machine, in network namespaces, which only root may make. Clients
//! set keys of 64 bytes, first at a guest without a standby and then at one with the default protection, in turns: the
//! time of a request of one client, and the requests of many. Then the VM's host is killed again and again (`kill -9`):
//! the longest wait of clients that ask all the time, and of clients that rest 2 ms between two requests, beside the
//! longest that they wait without a kill.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use crate::common::{Amount, Scales, median, quantile, row};
use crate::support::{Client, Side, Value, World};

/// Clients, and how many requests each has under way.
const LOADS: [(usize, usize); 3] = [(10, 1), (50, 1), (50, 16)];
/// Of clients that are not in a hurry.
const REST: Duration = Duration::from_millis(2);

struct Scale {
    loads: &'static [(usize, usize)],
    rounds: usize,
    time: Duration,
    kills: usize,
}

static SCALES: Scales<Scale> = Scales {
    full: Scale { loads: &LOADS, rounds: 5, time: Duration::from_secs(4), kills: 50 },
    quick: Scale { loads: &LOADS, rounds: 1, time: Duration::from_secs(2), kills: 5 },
    smoke: Scale { loads: &[(4, 4)], rounds: 1, time: Duration::from_millis(200), kills: 1 },
};

/// How long this client waited for each of its requests, in microseconds, until the end.
fn waits(client: &mut Client, under_way: usize, rest: Duration, ends: &AtomicBool) -> Vec<f64> {
    let (mut waits, mut number) = (Vec::new(), 0_u64);
    while !ends.load(Ordering::Relaxed) {
        let began = Instant::now();
        for _ in 0..under_way {
            number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (key, value) = (format!("key:{:06}", number >> 50), format!("{number:064}"));
            client.send(&[b"SET", key.as_bytes(), value.as_bytes()]).unwrap();
        }
        for _ in 0..under_way {
            assert_eq!(client.reply(), Ok(Value::Status("OK".into())));
        }
        waits.push(began.elapsed().as_secs_f64() * 1e6);
        if !rest.is_zero() {
            sleep(rest);
        }
    }
    waits
}

/// The waits of so many clients in some time.
fn load(world: &World, (clients, under_way): (usize, usize), time: Duration) -> Vec<f64> {
    let ends = AtomicBool::new(false);
    let mut clients: Vec<Client> = (0..clients).map(|_| Client::connect(world)).collect();
    scope(|threads| {
        let working: Vec<_> = clients
            .iter_mut()
            .map(|client| threads.spawn(|| waits(client, under_way, Duration::ZERO, &ends)))
            .collect();
        sleep(time);
        ends.store(true, Ordering::Relaxed);
        working.into_iter().flat_map(|client| client.join().unwrap()).collect()
    })
}

/// One client's waits, and the requests a second of each load: of a guest alone, or of a protected one.
fn round(is_protected: bool, scale: &Scale) -> Option<(Vec<f64>, Vec<f64>)> {
    let world = World::new()?;
    let _hosts = if is_protected {
        let (primary, standby) = world.protected(Side::A);
        (primary, Some(standby))
    } else {
        (world.run_with(Side::A, &[]), None)
    };
    let one = load(&world, (1, 1), scale.time);
    let many = scale.loads.iter().map(|&(clients, under_way)| {
        let done = load(&world, (clients, under_way), scale.time).len() * under_way;
        done as f64 / scale.time.as_secs_f64()
    });
    Some((one, many.collect()))
}

fn requests(scale: &Scale, text: &mut String) -> Option<()> {
    let (mut alone, mut kept) = (Vec::new(), Vec::new());
    for _ in 0..scale.rounds {
        alone.push(round(false, scale)?);
        kept.push(round(true, scale)?);
    }
    let mean = |waits: &[f64]| waits.iter().sum::<f64>() / waits.len() as f64;
    let p99 = |waits: &[f64]| quantile(waits.iter().copied(), 0.99);
    type Figure<'a> = &'a dyn Fn(&[f64]) -> f64;
    for (name, figure) in [("mean", &mean as Figure<'_>), ("p99", &p99)] {
        let of = |rounds: &[(Vec<f64>, Vec<f64>)]| median(rounds.iter().map(|(one, _)| figure(one)));
        let (value, peer) = (of(&kept), of(&alone));
        println!(
            "one client, {name}: {value:.0} us, unprotected {peer:.0} us: {:.0} us are added",
            value - peer
        );
        let case = format!("{{\"load\":\"set\",\"clients\":1,\"figure\":\"{name}\"}}");
        text.push_str(&row("clients.wait", &case, (value, "us"), ("unprotected", peer)));
    }
    for (number, (clients, under_way)) in scale.loads.iter().enumerate() {
        let of = |rounds: &[(Vec<f64>, Vec<f64>)]| median(rounds.iter().map(|(_, many)| many[number]));
        let (value, peer) = (of(&kept).max(1.0), of(&alone).max(1.0));
        println!(
            "{clients} clients, {under_way} requests under way each: {value:.0} of {peer:.0} a second, {:.0} %",
            value * 100.0 / peer
        );
        let case = format!("{{\"load\":\"set\",\"clients\":{clients},\"pipeline\":{under_way}}}");
        text.push_str(&row("clients.request", &case, (1e6 / value, "us"), ("unprotected", 1e6 / peer)));
    }
    Some(())
}

/// The longest wait of any of four clients around each kill, and in as long a time without one; milliseconds.
fn gaps(rest: Duration, kills: usize) -> Option<(Vec<f64>, Vec<f64>)> {
    const CLIENTS: usize = 4;
    const AROUND: Duration = Duration::from_millis(300);
    let world = World::new()?;
    let (mut active, mut standby) = world.protected(Side::A);
    let mut side = Side::A;
    let mut clients: Vec<Client> = (0..CLIENTS).map(|_| Client::connect(&world)).collect();
    let mut around = |event: &mut dyn FnMut()| {
        let ends = AtomicBool::new(false);
        scope(|threads| {
            let asking: Vec<_> =
                clients.iter_mut().map(|client| threads.spawn(|| waits(client, 1, rest, &ends))).collect();
            sleep(AROUND / 3);
            event();
            sleep(AROUND);
            ends.store(true, Ordering::Relaxed);
            let longest = asking.into_iter().flat_map(|client| client.join().unwrap()).fold(0.0, f64::max);
            longest / 1e3
        })
    };
    let (mut killed, mut quiet) = (Vec::new(), Vec::new());
    for _ in 0..kills {
        quiet.push(around(&mut || ()));
        let mut victim = Some(active);
        killed.push(around(&mut || victim.take().expect("one kill").kill()));
        standby.wait_takeover();
        active = standby;
        standby = world.standby(side);
        side = side.other();
        active.wait_protected();
    }
    Some((killed, quiet))
}

fn kills(scale: &Scale, text: &mut String) -> Option<()> {
    for (name, rest) in [("no rest", Duration::ZERO), ("2 ms of rest", REST)] {
        let (killed, quiet) = gaps(rest, scale.kills)?;
        for (figure, share) in [("p50", 0.5), ("p99", 0.99)] {
            let of = |waits: &[f64]| quantile(waits.iter().copied(), share);
            let (value, peer) = (of(&killed), of(&quiet));
            println!(
                "kill -9, clients with {name}: longest wait {figure} {value:.1} ms, without a kill {peer:.1} ms"
            );
            let case = format!("{{\"clients\":4,\"rest_ms\":{},\"figure\":\"{figure}\"}}", rest.as_millis());
            text.push_str(&row("clients.kill", &case, (value, "ms"), ("without a kill", peer)));
        }
    }
    Some(())
}

pub(crate) fn run(amount: Amount, rows: &mut String) -> Option<()> {
    let scale = SCALES.of(amount);
    requests(scale, rows)?;
    kills(scale, rows)
}
