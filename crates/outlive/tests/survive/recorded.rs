//! A session that somebody has recorded is no session: neither end takes it for the other one.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use outlive::events::Event;

use crate::strangers::{COMPLAINT, say, unharmed};
use crate::support::{Side, Witnesses, World};

/// More than the handshake of a host, and less than anything that a session is good for.
const HANDSHAKE: usize = 8192;

/// What each end has said.
#[derive(Default)]
struct Heard {
    primary: Mutex<Vec<u8>>,
    standby: Mutex<Vec<u8>>,
    /// It plays the standby, and is no way to it.
    plays: AtomicBool,
}

/// Between the primary and the standby.
struct Recorder {
    addr: SocketAddr,
    heard: Arc<Heard>,
}

impl Recorder {
    fn start(world: &World) -> Recorder {
        let listener = world.on(Side::A, || TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
        let recorder = Recorder { addr: listener.local_addr().unwrap(), heard: Arc::default() };
        let heard = recorder.heard.clone();
        // In the network of the host; the thread ends with the test's process.
        world.on(Side::A, || {
            thread::spawn(move || {
                for primary in listener.incoming().flatten() {
                    if heard.plays.load(Ordering::Acquire) {
                        play(primary, &heard.standby.lock().unwrap());
                    } else if let Ok(standby) = TcpStream::connect(Side::B.addr()) {
                        record_both(primary, standby, &heard);
                    }
                }
            })
        });
        recorder
    }
}

fn record_both(primary: TcpStream, standby: TcpStream, heard: &Arc<Heard>) {
    let (one, other) = (heard.clone(), heard.clone());
    let (from, to) = (standby.try_clone().unwrap(), primary.try_clone().unwrap());
    thread::spawn(move || record(from, to, &one.standby));
    thread::spawn(move || record(primary, standby, &other.primary));
}

fn record(mut from: TcpStream, mut to: TcpStream, heard: &Mutex<Vec<u8>>) {
    let mut bytes = vec![0; 64 << 10];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        heard.lock().unwrap().extend_from_slice(&bytes[..count]);
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    to.shutdown(Shutdown::Write).ok();
}

/// Says what a standby has said once, whatever it hears.
fn play(mut primary: TcpStream, said: &[u8]) {
    // A standby speaks second.
    drop(primary.read(&mut [0; 4096]));
    drop(primary.write_all(said));
    primary.shutdown(Shutdown::Write).ok();
    drop(primary.read_to_end(&mut Vec::new()));
}

/// Whether these are records of a handshake, and alerts: of TLS 1.3 all but the first look like data.
fn is_a_handshake(mut answer: &[u8]) -> bool {
    let length = answer.len();
    while let [kind, 3, _, high, low, rest @ ..] = answer {
        let record = usize::from(*high) << 8 | usize::from(*low);
        if !(0x14..=0x17).contains(kind) || rest.len() < record {
            return false;
        }
        answer = &rest[record..];
    }
    answer.is_empty() && length < HANDSHAKE
}

#[test]
fn a_session_that_was_recorded_is_nobodys() {
    let Some(world) = World::new() else { return };
    let recorder = Recorder::start(&world);
    let mut standby = world.standby(Side::B);
    let mut primary = world.run_with(Side::A, &["--standby", &recorder.addr.to_string()]);
    primary.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    witnesses.hear_all();
    thread::sleep(COMPLAINT);

    // To the standby, as its primary.
    let session = recorder.heard.primary.lock().unwrap().clone();
    assert!(session.len() > 10_000, "a session was recorded");
    let answer = say(&world, &session);
    assert!(is_a_handshake(&answer), "{} bytes: {answer:?}", answer.len());
    standby.wait_says("refused a connection: TLS: ", 1);
    let tls = |e: &Event| matches!(e, Event::ConnectionRefused { why, .. } if why.starts_with("TLS: "));
    standby.wait_for("told of it", tls);
    assert_eq!(standby.events().filter(|e| matches!(e, Event::PrimaryAttached { .. })).count(), 1);
    witnesses.hear_all();
    unharmed([&mut primary, &mut standby]);

    // To the primary, as its standby, which is gone.
    assert!(recorder.heard.standby.lock().unwrap().len() > 2000, "so was what the standby says");
    recorder.heard.plays.store(true, Ordering::Release);
    standby.kill();
    primary.wait_for("alone", |e| matches!(e, Event::Won { .. }));
    let why = primary.wait_for("refusing the recording", |e| match e {
        Event::StandbyUnreachable { why } => why.contains("TLS: "),
        Event::Protected { .. } => panic!("the recording is its standby"),
        _ => false,
    });
    println!("{why:?}");
    witnesses.hear_all();
    recorder.heard.plays.store(false, Ordering::Release);
    let _standby = world.standby(Side::B);
    primary.wait_protected();
    witnesses.hear_all();
    witnesses.finish(&world);
}
