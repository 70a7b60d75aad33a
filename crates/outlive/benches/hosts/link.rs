//! What encryption of the link costs: `cargo xtask bench link`, or
//! `cargo bench -p outlive --bench hosts -- link [--quick] [--json FILE]`.
//!
//! Both hosts and the link are on this machine, in network namespaces, which only root may make. The same VM is
//! protected in turns over TLS 1.3 and over a plain link (`--insecure`), and the medians stand beside each other:
//! checkpoints of 16 pages as fast as they come, and the base of a VM whose memory is full of random bytes. A copy of
//! as many bytes between two sockets on the same link is the floor of the base.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use outlive::events::Event;

use crate::common::{Amount, Scales, median, stats};
use crate::support::{Client, Process, Side, Value, World};

/// A guest that writes to so many pages all the time.
const LOAD: &str = "WORK SET 16 100 1000000000";
/// The shortest one.
const INTERVAL: &str = "100us";
const VALUE: usize = 16 << 10;
const MIB: u64 = 1 << 20;

struct Scale {
    rounds: usize,
    time: Duration,
    /// Of the VM, in MiB; a quarter of it is filled.
    memory: u64,
}

static SCALES: Scales<Scale> = Scales {
    full: Scale { rounds: 5, time: Duration::from_secs(5), memory: 2048 },
    quick: Scale { rounds: 1, time: Duration::from_secs(3), memory: 1024 },
    smoke: Scale { rounds: 1, time: Duration::from_millis(300), memory: 64 },
};

/// What one way to protect a VM took.
struct Taken {
    /// A checkpoint, in microseconds.
    checkpoint: f64,
    /// A MiB of the base, in microseconds.
    base: f64,
    /// The same of processor time of the thread that sends it, and of the one that reads it.
    busy: [f64; 2],
    /// How many MiB it had.
    mib: f64,
}

fn world(is_plain: bool) -> Option<World> {
    if is_plain { World::plain() } else { World::new() }
}

/// Microseconds a checkpoint.
fn checkpoint(is_plain: bool, time: Duration) -> Option<f64> {
    let world = world(is_plain)?;
    let (mut primary, _standby) =
        world.protected_with(Side::A, &["--policy", "interval", "--interval", INTERVAL]);
    let reply = Client::connect(&world).ask(LOAD);
    assert_eq!(reply, Ok(Value::Status("OK".into())));
    // Until hot pages are known. The counters come five times a second.
    std::thread::sleep(time / 3 + Duration::from_millis(250));
    let (before, began) = (stats(&mut primary).checkpoints, Instant::now());
    std::thread::sleep(time);
    let done = stats(&mut primary).checkpoints.saturating_sub(before).max(1);
    Some(began.elapsed().as_secs_f64() * 1e6 / done as f64)
}

/// Fills a quarter of the VM's memory with random bytes.
fn fill(world: &World, memory: u64) {
    let mut client = Client::connect(world);
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut value = vec![0; VALUE];
    for number in 0..memory * MIB / 4 / VALUE as u64 {
        for word in value.chunks_exact_mut(8) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            word.copy_from_slice(&random.to_le_bytes());
        }
        let reply = client.call(&[b"SET", format!("key:{number}").as_bytes(), &value]);
        assert_eq!(reply, Ok(Value::Status("OK".into())));
    }
}

/// Seconds for which the threads of this name had a core so far.
fn processor(process: &Process, name: &str) -> f64 {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.pid())).unwrap().flatten();
    let of_name = tasks
        .filter(|task| fs::read_to_string(task.path().join("comm")).is_ok_and(|comm| comm.trim() == name));
    let times = of_name.filter_map(|task| fs::read_to_string(task.path().join("schedstat")).ok());
    times.filter_map(|line| line.split(' ').next()?.parse::<f64>().ok()).sum::<f64>() / 1e9
}

/// The base of a VM that does nothing but have its memory.
fn base(is_plain: bool, memory: u64) -> Option<([f64; 3], f64)> {
    let world = world(is_plain)?;
    let (there, size) = (Side::B.addr().to_string(), format!("{memory}M"));
    let mut primary = world.run_with(Side::A, &["--standby", &there, "--memory", &size, "--audit", "off"]);
    fill(&world, memory);
    let standby = world.standby(Side::B);
    let began = |e: &Event| matches!(e, Event::BaseProgress { .. } | Event::Protected { .. });
    primary.wait_for("the base has begun", began);
    let event = primary.wait_for("protected", |e| matches!(e, Event::Protected { .. }));
    let Event::Protected { base_ms, .. } = event else { unreachable!("waited for it") };
    let busy = [processor(&primary, "sender"), processor(&standby, "session")];
    // The counters come five times a second.
    std::thread::sleep(Duration::from_millis(250));
    let mib = stats(&mut primary).bytes as f64 / MIB as f64;
    Some(([base_ms as f64 / 1e3, busy[0], busy[1]].map(|seconds| seconds * 1e6 / mib), mib))
}

/// Microseconds for a MiB of memory from one host to the other, over the same link.
fn copy(mib: u64) -> Option<f64> {
    let world = World::new()?;
    let address = SocketAddr::new(Side::B.addr().ip(), 7999);
    let listener = world.on(Side::B, || TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7999)).unwrap());
    let reader = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let (mut buffer, mut read) = (vec![0; 1 << 20], 0);
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            read += count as u64;
        }
        read
    });
    let mut stream = world.on(Side::A, || TcpStream::connect(address).unwrap());
    let (memory, began) = (vec![7; 4 << 20], Instant::now());
    for _ in 0..mib.div_ceil(4) {
        stream.write_all(&memory).unwrap();
    }
    drop(stream);
    let read = reader.join().unwrap();
    Some(began.elapsed().as_secs_f64() * 1e6 / (read as f64 / MIB as f64))
}

fn measure(is_plain: bool, scale: &Scale) -> Option<Taken> {
    let checkpoint = checkpoint(is_plain, scale.time)?;
    let ([base, sender, reader], mib) = base(is_plain, scale.memory)?;
    Some(Taken { checkpoint, base, busy: [sender, reader], mib })
}

/// A row, and what a person reads.
fn row(bench: &str, (value, unit): (f64, &str), (peer, peer_value): (&str, f64)) -> String {
    let percent = peer_value * 100.0 / value;
    println!("{bench}: {value:.1} {unit}; {peer} {peer_value:.1} {unit}: {percent:.0} % of its speed");
    crate::common::row(bench, "{\"link\":\"tls1.3\"}", (value, unit), (peer, peer_value))
}

fn rows(scale: &Scale, text: &mut String) -> Option<()> {
    let (mut tls, mut plain, mut floor) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..scale.rounds {
        tls.push(measure(false, scale)?);
        plain.push(measure(true, scale)?);
        floor.push(copy(tls[0].mib as u64)?);
    }
    let both = |of: fn(&Taken) -> f64| (median(tls.iter().map(of)), median(plain.iter().map(of)));
    let (value, peer) = both(|taken| taken.checkpoint);
    *text += &row("link.checkpoint", (value, "us"), ("plain", peer));
    let (value, peer) = both(|taken| taken.base);
    *text += &row("link.base", (value, "us/MiB"), ("plain", peer));
    *text += &row("link.copy", (value, "us/MiB"), ("a copy over the same link", median(floor)));
    let (value, peer) = both(|taken| taken.busy[0]);
    *text += &row("link.sender", (value, "us/MiB"), ("plain", peer));
    println!("  {:.2} GB for a second of a core", MIB as f64 / value / 1e3);
    let (value, peer) = both(|taken| taken.busy[1]);
    *text += &row("link.reader", (value, "us/MiB"), ("plain", peer));
    println!("  {:.2} GB for a second of a core", MIB as f64 / value / 1e3);
    Some(())
}

pub(crate) fn run(amount: Amount, text: &mut String) -> Option<()> {
    rows(SCALES.of(amount), text)
}
