//! A reader of log or events may stop, hang or go away: that costs lines and nothing else.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::{mkfifo, pipe};
use outlive::events::{Event, Record};

use crate::support::{Client, Log, Process, Readers, Side, Value, World, fill, wait_until};

/// Longer than the silence after which a primary counts as dead.
const A_WHILE: Duration = Duration::from_millis(1500);

/// A full pipe for standard error, and its end that nobody reads.
fn full_pipe() -> (Readers, OwnedFd) {
    let (read, write) = pipe().unwrap();
    fill(&write);
    (Readers { log: Log::Pipe(write), ..Readers::default() }, read)
}

/// A full named pipe for events, and its end that nobody reads.
fn full_fifo(path: &Path) -> (Readers, File) {
    mkfifo(path, Mode::from_bits_truncate(0o600)).unwrap();
    // Opened in both directions, so that no side waits for the other.
    let fifo = OpenOptions::new().read(true).write(true).open(path).unwrap();
    fill(&fifo);
    (Readers { events: Some(path.to_owned()), ..Readers::default() }, fifo)
}

/// Everything that a new reader gets, until `enough` of it has come.
fn read_until(from: impl AsFd, enough: impl Fn(&str) -> bool) -> String {
    let mut from = File::from(from.as_fd().try_clone_to_owned().unwrap());
    fcntl(&from, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    let mut said = Vec::new();
    wait_until("it says so when somebody reads", || {
        match from.read_to_end(&mut said) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) => panic!("{error}"),
        }
        enough(&String::from_utf8_lossy(&said))
    });
    String::from_utf8(said).unwrap()
}

/// The VM counts on one connection, loses its host and counts on.
fn counts_on_after_the_loss_of_its_host(world: &World, primary: Process, took_over: impl FnOnce()) {
    let mut client = Client::connect(world);
    for number in 1..=20 {
        assert_eq!(client.ask("INCR n"), Ok(Value::Integer(number)));
    }
    std::thread::sleep(A_WHILE);
    assert_eq!(client.ask("INCR n"), Ok(Value::Integer(21)), "held output is released all the time");
    primary.kill();
    took_over();
    assert_eq!(client.ask("INCR n"), Ok(Value::Integer(22)));
}

#[test]
fn a_log_that_nobody_reads_costs_no_protection_and_no_takeover() {
    let Some(world) = World::new() else { return };
    let ((to_a, _read_a), (to_b, read_b)) = (full_pipe(), full_pipe());
    let mut standby = world.standby_for(Side::B, to_b);
    let mut primary = world.run_for(Side::A, to_a);
    primary.wait_protected();
    std::thread::sleep(A_WHILE);
    assert!(!primary.has(|e| matches!(e, Event::LinkLost { .. })), "the protection ended");
    counts_on_after_the_loss_of_its_host(&world, primary, || {
        standby.wait_takeover();
    });
    // Protected again by a host whose log is read.
    let _next = world.standby(Side::A);
    standby.wait_protected();
    let events: Vec<&Event> = standby.events().collect();
    let takeover = events.iter().position(|e| matches!(e, Event::Takeover { .. })).unwrap();
    let lost = events[takeover..].iter().any(|e| matches!(e, Event::LinkLost { .. }));
    assert!(!lost, "the protection ended");
    let said = read_until(read_b, |said| said.contains("base_ms"));
    assert!(said.contains("TAKEN OVER"), "what the queue has room for is not lost: {said}");
    // Nor does the program wait at the end for a pipe that nobody reads.
    standby.signal(Signal::SIGTERM);
    assert_eq!(standby.wait_exit(), 0);
}

#[test]
fn a_process_that_is_told_to_end_ends_although_nobody_reads() {
    let Some(world) = World::new() else { return };
    let (to, _read) = full_pipe();
    let mut primary = world.run_for(Side::A, to);
    primary.wait_for("started", |e| matches!(e, Event::Started { .. }));
    primary.signal(Signal::SIGTERM);
    assert_eq!(primary.wait_exit(), 0);
}

#[test]
fn a_log_that_was_closed_costs_nothing() {
    let Some(world) = World::new() else { return };
    // One host has a pipe whose reader is gone, the other has no standard error at all.
    let (to, read) = full_pipe();
    drop(read);
    let mut standby = world.standby_for(Side::B, to);
    let mut primary = world.run_for(Side::A, Readers { log: Log::Closed, ..Readers::default() });
    primary.wait_protected();
    for process in [&mut primary, &mut standby] {
        process.signal(Signal::SIGPIPE);
    }
    counts_on_after_the_loss_of_its_host(&world, primary, || {
        standby.wait_takeover();
    });
    standby.signal(Signal::SIGTERM);
    assert_eq!(standby.wait_exit(), 0);
}

#[test]
fn events_that_nobody_reads_cost_no_protection_and_no_takeover() {
    let Some(world) = World::new() else { return };
    let (to_a, _read_a) = full_fifo(&world.dir().join("a"));
    let (to_b, read_b) = full_fifo(&world.dir().join("b"));
    let standby = world.standby_for(Side::B, to_b);
    let primary = world.run_for(Side::A, to_a);
    wait_until("it is protected", || primary.log().contains("base_ms"));
    counts_on_after_the_loss_of_its_host(&world, primary, || {
        wait_until("the takeover", || standby.log().contains("TAKEN OVER"));
    });
    assert_eq!(standby.log().matches("primary lost").count(), 1, "{}", standby.log());
    // The first packet may be told of before.
    let said = read_until(&read_b, |said| said.contains(r#""takeover""#));
    let records: Result<Vec<Record>, _> =
        said.lines().filter(|line| !line.is_empty()).map(serde_json::from_str).collect();
    let records = records.unwrap_or_else(|error| panic!("a line was torn: {error} in {said}"));
    assert!(records.iter().any(|record| matches!(record.event, Event::Takeover { generation: 2, .. })));
}

#[test]
fn a_named_pipe_for_events_that_has_no_reader_yet_holds_up_no_start() {
    let Some(world) = World::new() else { return };
    let path = world.dir().join("later");
    mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
    let mut primary = world.run_for(Side::A, Readers { events: Some(path.clone()), ..Readers::default() });
    wait_until("the VM runs", || Client::connect(&world).ask("INCR n") == Ok(Value::Integer(1)));
    assert!(primary.log().contains("nobody reads this named pipe yet"), "{}", primary.log());
    let reader = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(&path).unwrap();
    read_until(&reader, |said| said.contains(r#""started""#));
    primary.signal(Signal::SIGTERM);
    let said = read_until(&reader, |said| said.contains(r#""ended""#));
    assert!(said.lines().all(|line| serde_json::from_str::<Record>(line).is_ok()), "{said}");
    assert_eq!(primary.wait_exit(), 0);
}
