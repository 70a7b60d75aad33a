//! The frame tail: what was on its way when a host died is answered without waiting for TCP's timer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use outlive::events::Event;

use crate::support::{Client, Dice, Process, Side, Value, World, wait_until};

/// How often the VM's host is killed.
const KILLS: usize = 8;
/// How many clients wait for an answer most of the time.
const CLIENTS: usize = 6;
/// A wait below this did not wait for TCP's timer, which is at least 200 ms.
const WITHOUT_TIMER: Duration = Duration::from_millis(150);
/// By then the primary has said that the output of an idle guest has left.
const IDLE: Duration = Duration::from_secs(1);

/// Clients that ask for the next number as soon as they have one.
struct Counting {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Waits>>,
}

/// The waits of one client: when each ended, and how long it was.
type Waits = Vec<(Instant, Duration)>;

impl Counting {
    fn start(world: &World) -> Counting {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |number: usize| {
            let (client, stop) = (Client::connect(world), stop.clone());
            thread::spawn(move || count(client, number, &stop))
        };
        Counting { clients: (0..CLIENTS).map(client).collect(), stop }
    }

    /// Every answer was right; returns how long each took.
    fn finish(self) -> Waits {
        self.stop.store(true, Ordering::Relaxed);
        self.clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    }
}

/// Each number comes once and in its turn: a request that was done twice, or not at all, would be seen here.
fn count(mut client: Client, number: usize, stop: &AtomicBool) -> Waits {
    let (mut waits, mut last) = (Vec::new(), 0);
    while !stop.load(Ordering::Relaxed) {
        let asked = Instant::now();
        let answer = client.ask(&format!("INCR tail:{number}"));
        last += 1;
        assert_eq!(answer, Ok(Value::Integer(last)), "client {number}");
        waits.push((Instant::now(), asked.elapsed()));
    }
    waits
}

/// Frames given to the guest and repeated, as a takeover has told it.
fn spent(process: &mut Process) -> (u64, u64) {
    match process.wait_for("the new primary", |e| matches!(e, Event::Takeover { .. })) {
        Event::Takeover { input_given, output_repeated, .. } => (input_given, output_repeated),
        _ => unreachable!("the filter above"),
    }
}

/// Kills the VM's host again and again. Returns when, and what each takeover has used.
fn kill_again_and_again(world: &World, options: &[&str]) -> Vec<(Instant, (u64, u64))> {
    let mut dice = Dice::new();
    let mut side = Side::A;
    let peers = [Side::A, Side::B].map(|side| side.other().addr().to_string());
    let with = |side: Side| [options, &["--standby", &peers[side as usize]]].concat();
    let mut standby = world.standby_with(side.other(), &with(side.other()));
    let mut active = world.run_with(side, &with(side));
    active.wait_protected();
    let counting = Counting::start(world);
    let mut kills = Vec::new();
    for _ in 0..KILLS {
        thread::sleep(Duration::from_millis(300));
        dice.sleep_below(Duration::from_millis(100));
        let killed = Instant::now();
        active.kill();
        kills.push((killed, spent(&mut standby)));
        let next = world.standby_with(side, &with(side));
        (active, standby) = (standby, next);
        active.wait_protected();
        side = side.other();
    }
    thread::sleep(Duration::from_millis(300));
    let waits = counting.finish();
    report(&kills, &waits);
    kills
}

/// Prints the longest wait around each kill. Nothing fails by it: a busy machine is slow.
fn report(kills: &[(Instant, (u64, u64))], waits: &Waits) {
    let longest: Vec<Duration> = kills
        .iter()
        .map(|&(killed, _)| {
            let around = waits.iter().filter(|(end, wait)| *end > killed && *end < killed + *wait + IDLE);
            around.map(|it| it.1).max().unwrap_or_default()
        })
        .collect();
    let in_flight: Vec<usize> = kills
        .iter()
        .map(|&(killed, _)| {
            let open = waits.iter().filter(|(end, wait)| *end > killed && *end - *wait <= killed);
            open.filter(|it| it.1 < WITHOUT_TIMER).count()
        })
        .collect();
    let answered = in_flight.iter().filter(|&&count| count == CLIENTS).count();
    println!("longest wait at each kill: {longest:?}");
    println!("requests in flight answered without a timer, of {CLIENTS} at each kill: {in_flight:?}");
    println!("all of them at {answered} of {} kills", kills.len());
}

#[test]
fn requests_in_flight_are_answered_by_the_new_host() {
    let Some(world) = World::new() else { return };
    let kills = kill_again_and_again(&world, &[]);
    let used: Vec<_> = kills.iter().map(|it| it.1).collect();
    println!("frames given and repeated: {used:?}");
    let (given, repeated) = used.iter().fold((0, 0), |sum, it| (sum.0 + it.0, sum.1 + it.1));
    assert!(given > 0, "no frame of a dead primary's guest was given to the new one");
    assert!(repeated > 0, "no committed frame was sent again");
    assert!(used.iter().all(|it| it.0 <= 1024 && it.1 <= 1024), "{used:?}");
}

#[test]
fn without_the_option_nothing_is_given_or_repeated() {
    let Some(world) = World::new() else { return };
    let kills = kill_again_and_again(&world, &["--frame-tail", "off"]);
    assert!(kills.iter().all(|it| it.1 == (0, 0)), "{kills:?}");
}

/// Nobody but the dead host has received it, and its client sends it once.
#[test]
fn a_request_that_is_sent_into_the_gap_follows_the_guest() {
    // On a busy machine the request itself may come too late for the gap.
    let followed = (0..3).any(|_| request_into_gap().is_none_or(|given| given > 0));
    assert!(followed, "the request has not followed the guest");
}

/// Sends a request between the death of a host and the takeover. Returns how many frames the guest was given then; `None`,
/// after saying why, where there are no VMs.
fn request_into_gap() -> Option<u64> {
    let world = World::new()?;
    let (active, mut standby) = world.protected(Side::A);
    let mut client = Client::connect(&world);
    assert_eq!(client.ask("INCR gap"), Ok(Value::Integer(1)));
    thread::sleep(IDLE);
    // The gap is as long as this.
    standby.signal(Signal::SIGSTOP);
    active.kill();
    let asking = thread::spawn(move || (client.ask("INCR gap"), client));
    // Less than TCP's timer.
    thread::sleep(Duration::from_millis(100));
    standby.signal(Signal::SIGCONT);
    let (given, _) = spent(&mut standby);
    let (answer, _client) = asking.join().unwrap();
    assert_eq!(answer, Ok(Value::Integer(2)));
    Some(given)
}

/// Committed output of long ago is not sent again: the primary has said meanwhile that it has left.
#[test]
fn an_idle_guests_last_words_are_not_repeated() {
    let Some(world) = World::new() else { return };
    let (active, mut standby) = world.protected(Side::A);
    let mut client = Client::connect(&world);
    for number in 1..=100 {
        assert_eq!(client.ask("INCR last"), Ok(Value::Integer(number)));
    }
    thread::sleep(IDLE);
    let before = world.settled_frames_out(Side::A);
    wait_until("the guest is idle", || world.settled_frames_out(Side::A) == before);
    active.kill();
    assert_eq!(spent(&mut standby).1, 0);
    assert_eq!(client.ask("INCR last"), Ok(Value::Integer(101)));
}
