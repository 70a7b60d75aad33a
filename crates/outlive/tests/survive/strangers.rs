//! Who has no right to a link gets nothing, and disturbs nobody: strangers, hosts of another CA, expired and revoked
//! ones, hosts without the right to a VM, older versions of TLS, and a session that was recorded.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use outlive::events::Event;
use outlive::keys::{self, Grant, Order, Vms};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::ring;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, Error, SignatureScheme, StreamOwned};

use crate::support::{PATIENCE, Process, Side, Witnesses, World, wait_until};

const DAY: Duration = Duration::from_secs(24 * 3600);
/// A standby complains about strangers once a second.
const COMPLAINT: Duration = Duration::from_millis(1100);
/// Connections at once, more than may be half open.
const CROWD: usize = 100;

/// A ClientHello of TLS 1.2, as OpenSSL sends it with `-tls1_2`: no extension names a newer version.
const TLS12: &[u8] = &[
    0x16, 0x03, 0x01, 0x00, 0x31, 0x01, 0x00, 0x00, 0x2d, 0x03, 0x03, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
    13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 0x00, 0x00, 0x02, 0xc0,
    0x2b, 0x01, 0x00, 0x00, 0x02, 0x00, 0x00,
];

fn knock(world: &World) -> TcpStream {
    let stream = world.on(Side::A, || TcpStream::connect_timeout(&Side::B.addr(), PATIENCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Says something to the standby, and returns its whole answer.
fn say(world: &World, words: &[u8]) -> Vec<u8> {
    let mut stream = knock(world);
    drop(stream.write_all(words));
    stream.shutdown(Shutdown::Write).ok();
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer));
    answer
}

/// Believes whatever the other end shows.
#[derive(Debug)]
struct Gullible;

impl ServerCertVerifier for Gullible {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        ring::default_provider().signature_verification_algorithms.supported_schemes()
    }
}

/// Comes over TLS with these keys or with none, and sends what a primary would. Returns why it was refused.
fn come(world: &World, keys: Option<&Path>) -> String {
    let config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Gullible));
    let config = match keys.map(|directory| keys::load(directory).unwrap()) {
        Some(keys) => config.with_client_auth_cert(keys.chain, keys.key).unwrap(),
        None => config.with_no_client_auth(),
    };
    let name = ServerName::try_from("standby").unwrap();
    let session = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = StreamOwned::new(session, knock(world));
    let preface = outlive_epoch::Preface::CURRENT.encode();
    let sent = stream.write_all(&preface).and_then(|()| stream.flush());
    let mut answer = Vec::new();
    match sent.and_then(|()| stream.read_to_end(&mut answer)) {
        Ok(_) => panic!("it was let in, and got {} bytes", answer.len()),
        Err(error) => {
            assert!(answer.is_empty(), "it got something: {answer:?}");
            error.to_string()
        }
    }
}

fn order(host: &str) -> Order {
    Order { host: host.into(), grant: Grant::ALL, life: DAY }
}

fn unharmed(processes: [&mut Process; 2]) {
    for process in processes {
        assert!(!process.ended());
        let disturbed = process.has(|e| {
            matches!(e, Event::LinkLost { .. } | Event::Unprotected { .. } | Event::Arbitrating { .. })
        });
        assert!(!disturbed, "protection was disturbed");
    }
}

/// Between the primary and the standby: keeps what the primary sends.
struct Recorder {
    addr: SocketAddr,
    heard: Arc<Mutex<Vec<u8>>>,
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
                    let Ok(standby) = TcpStream::connect(Side::B.addr()) else { continue };
                    let (mut from, mut to) = (standby.try_clone().unwrap(), primary.try_clone().unwrap());
                    thread::spawn(move || std::io::copy(&mut from, &mut to));
                    let heard = heard.clone();
                    thread::spawn(move || record(primary, standby, &heard));
                }
            })
        });
        recorder
    }
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

#[test]
fn who_has_no_right_gets_nothing_and_disturbs_nobody() {
    let Some(world) = World::new() else { return };
    let recorder = Recorder::start(&world);
    let mut standby = world.standby(Side::B);
    let mut primary = world.run_with(Side::A, &["--standby", &recorder.addr.to_string()]);
    primary.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    let place = |name: &str| -> PathBuf { world.dir().join(name) };
    keys::init(&place("foreign"), &order("hosta")).unwrap();
    let ours = world.keys(Side::A);
    keys::issue(&ours, &Order { life: Duration::ZERO, ..order("late") }, &place("late")).unwrap();
    let thief = keys::issue(&ours, &order("thief"), &place("thief")).unwrap();
    keys::revoke(&world.keys(Side::B), &thief.serial).unwrap();

    for words in [&b"GET / HTTP/1.1\r\n\r\n"[..], &outlive_epoch::Preface::CURRENT.encode(), TLS12] {
        thread::sleep(COMPLAINT);
        // At most an alert.
        let answer = say(&world, words);
        assert!(answer.is_empty() || answer[0] == 0x15 && answer.len() == 7, "{answer:?}");
    }
    standby.wait_says("it does not speak TLS 1.3", 2);
    for (keys, complaint) in [
        (None, "it has shown no certificate"),
        (Some("foreign"), "its certificate is of another CA"),
        (Some("late"), "its certificate has expired"),
        (Some("thief"), "of thief is revoked"),
    ] {
        thread::sleep(COMPLAINT);
        let why = come(&world, keys.map(place).as_deref());
        let told = why.contains("AccessDenied") || why.contains("CertificateRequired");
        assert!(told, "{keys:?}: the other end learns that it may not, and not why: {why}");
        standby.wait_says(complaint, 1);
    }
    thread::sleep(COMPLAINT);
    let session = recorder.heard.lock().unwrap().clone();
    assert!(session.len() > 10_000, "a session was recorded");
    say(&world, &session);
    witnesses.hear_all();
    unharmed([&mut primary, &mut standby]);
    assert!(standby.has(|e| matches!(e, Event::ConnectionRefused { .. })));
    witnesses.finish(&world);
}

#[test]
fn hosts_without_the_right_to_a_vm_are_refused_on_both_sides() {
    let Some(world) = World::new() else { return };
    let none = Grant::NONE;
    let other = Vms::Only(vec![outlive::arbiter::VmId([7; 16])]);
    let make = |name: &str, grant: Grant| {
        let to = world.dir().join(name);
        keys::issue(&world.keys(Side::A), &Order { grant, ..order(name) }, &to).unwrap();
        to.display().to_string()
    };
    let holds = make("holds", Grant { hold: Vms::Any, ..none.clone() });
    let sends = make("sends", Grant { send: Vms::Any, ..none.clone() });
    let elsewhere = make("elsewhere", Grant { send: other.clone(), ..none.clone() });
    let holds_other = make("holds-other", Grant { hold: other, ..none });
    let there = Side::B.addr().to_string();
    let standby = world.standby_with(Side::B, &["--keys", &holds]);
    for (keys, host) in [(&holds, "holds"), (&elsewhere, "elsewhere")] {
        let mut primary = world.run_with(Side::A, &["--standby", &there, "--keys", keys]);
        let complaint = format!("host {host} may not send VM");
        wait_until("the primary is told", || primary.log().contains(&complaint));
        standby.wait_says(&complaint, 1);
        assert!(!primary.has(|e| matches!(e, Event::Protected { .. })));
        primary.kill();
    }
    let mut primary = world.run_with(Side::A, &["--standby", &there, "--keys", &sends]);
    primary.wait_protected();
    primary.kill();
    drop(standby);
    // And the other way round: a standby that may not hold it.
    let standby = world.standby_with(Side::B, &["--keys", &holds_other]);
    let mut primary = world.run(Side::A);
    wait_until("the primary complains", || primary.log().contains("host holds-other may not hold VM"));
    assert!(!primary.has(|e| matches!(e, Event::Protected { .. })));
    primary.kill();
    drop(standby);
    // One that could never be a standby is told so when it starts.
    let (arbiters, vm) = (world.arbiter_keys().display().to_string(), "3".repeat(32));
    for (options, host) in [
        (&["--keys", &sends][..], "sends"),
        (&["--keys", &arbiters], "third"),
        (&["--keys", &holds_other, "--vm", &vm], "holds-other"),
    ] {
        let mut refused = world.standby_with_failure(Side::B, options);
        assert_eq!(refused.wait_exit(), 2, "{}", refused.log());
        refused.wait_says("so this host can be no standby of", 1);
        refused.wait_says(&format!("`outlive keys issue --host {host}"), 1);
    }
}

#[test]
fn a_flood_of_silent_connections_drops_no_protection_and_fills_no_log() {
    let Some(world) = World::new() else { return };
    let (mut primary, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    let before = standby.log().lines().count();
    for _ in 0..3 {
        let crowd: Vec<TcpStream> = (0..CROWD).map(|_| knock(&world)).collect();
        witnesses.hear_all();
        drop(crowd);
    }
    // Whoever has the right comes in while strangers still wait.
    let crowd: Vec<TcpStream> = (0..CROWD).map(|_| knock(&world)).collect();
    unharmed([&mut primary, &mut standby]);
    drop(standby);
    primary.wait_for("alone", |e| matches!(e, Event::Won { .. }));
    let mut again = world.standby(Side::B);
    let more: Vec<TcpStream> = (0..CROWD).map(|_| knock(&world)).collect();
    primary.wait_protected();
    drop((crowd, more));
    assert!(!again.ended());
    let lines = again.log().lines().count();
    assert!(before + lines < 60, "{lines} lines in the log");
    witnesses.finish(&world);
}
