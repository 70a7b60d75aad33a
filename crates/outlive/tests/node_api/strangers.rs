//! Who has no business at the API gets nothing, and disturbs nobody.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, TcpStream};
use std::thread;
use std::time::Duration;

use outlive::keys::{self, Grant};

use crate::support::{COMPLAINT, Stage, Tls, order, shown, talk, wait_until};

/// A ClientHello of TLS 1.2, as OpenSSL sends it with `-tls1_2`: no extension names a newer version.
const TLS12: &[u8] = &[
    0x16, 0x03, 0x01, 0x00, 0x31, 0x01, 0x00, 0x00, 0x2d, 0x03, 0x03, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,
    13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32, 0x00, 0x00, 0x02, 0xc0,
    0x2b, 0x01, 0x00, 0x00, 0x02, 0x00, 0x00,
];
/// More than may be half open, of any address and of one.
const CROWD: usize = 100;
const GET: &str = "GET /v1/vms HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
const OPEN: &str = "GET /v1/vms HTTP/1.1\r\nhost: x\r\n\r\n";

/// Says something without TLS, and returns the whole answer.
fn say(stage: &Stage, words: &[u8]) -> Vec<u8> {
    let mut stream = stage.knock();
    drop(stream.write_all(words));
    stream.shutdown(Shutdown::Write).ok();
    let mut answer = Vec::new();
    drop(stream.read_to_end(&mut answer));
    answer
}

#[test]
fn who_shows_no_certificate_that_counts_gets_nothing() {
    let mut stage = Stage::new();
    keys::init(&stage.at("foreign"), &order("alice", Grant::OPERATOR)).unwrap();
    stage.issue_for("late", Grant::OPERATOR, Duration::ZERO);
    let thief = stage.issue("thief", Grant::OPERATOR);
    // The good client is there all the time.
    let mut good = stage.tls(Some("alice"));
    assert!(hears(&mut good));
    // Without a restart.
    keys::revoke(&stage.at("hosta"), &thief.serial).unwrap();
    for (words, complaint) in [
        (&b"GET /v1/vms HTTP/1.1\r\nhost: x\r\n\r\n"[..], "does not speak TLS 1.3"),
        (&[0; 1000][..], "does not speak TLS 1.3"),
        (TLS12, "a connection of 127.0.0.1 at the API"),
    ] {
        thread::sleep(COMPLAINT);
        let said = stage.log().matches(complaint).count();
        let answer = say(&stage, words);
        // At most an alert.
        assert!(answer.is_empty() || answer[0] == 0x15 && answer.len() == 7, "{answer:?}");
        stage.wait_says(complaint, said + 1);
        still_heard(&stage, &mut good);
    }
    for (keys, complaint) in [
        (None, "it has shown no certificate"),
        (Some("foreign"), "its certificate is of another CA"),
        (Some("late"), "its certificate has expired"),
        (Some("thief"), "of thief is revoked"),
    ] {
        thread::sleep(COMPLAINT);
        let why = talk(&mut stage.tls(keys), GET).expect_err("it was let in");
        let told = why.contains("AccessDenied") || why.contains("CertificateRequired");
        assert!(told, "{keys:?}: the other end learns that it may not, and not why: {why}");
        stage.wait_says(complaint, 1);
        still_heard(&stage, &mut good);
    }
    // And as the command hears it.
    let why = stage.bad("thief", &["vm", "list"], 2);
    assert!(why.contains("does not accept these keys") && why.contains("its log says why"), "{why}");
    stage.good("alice", &["vm", "list"]);
    stage.unharmed();
}

/// A request on a connection that is kept, and whether it is still there.
fn hears(stream: &mut Tls) -> bool {
    let mut answer = vec![0; 1000];
    let asked = stream.write_all(OPEN.as_bytes()).and_then(|()| stream.flush());
    let count = asked.and_then(|()| stream.read(&mut answer)).unwrap_or_default();
    assert!(count == 0 || answer.starts_with(b"HTTP/1.1 200 "), "{}", String::from_utf8_lossy(&answer));
    count > 0
}

/// The node sends a client away that says nothing for 5 s, and lets it in again.
fn still_heard(stage: &Stage, good: &mut Tls) {
    if !hears(good) {
        *good = stage.tls(Some("alice"));
        assert!(hears(good));
    }
}

#[test]
fn a_flood_of_silent_connections_keeps_nobody_out_and_fills_no_log() {
    let mut stage = Stage::new();
    let before = stage.log().lines().count();
    let crowd = |of: fn(usize) -> Ipv4Addr| -> Vec<TcpStream> {
        (0..CROWD).map(|number| stage.knock_from(of(number))).collect()
    };
    // From one address, and from many.
    let one = crowd(|_| Ipv4Addr::LOCALHOST);
    stage.good("alice", &["vm", "list"]);
    let many = crowd(|number| Ipv4Addr::new(127, 0, 1, 1 + number as u8));
    stage.good("alice", &["vm", "list"]);
    // One that says a little is no better.
    let mut slow = stage.knock_from(Ipv4Addr::new(127, 0, 2, 1));
    slow.write_all(&TLS12[..4]).unwrap();
    // Each of them is ended.
    for mut stranger in one.into_iter().chain(many).chain([slow]) {
        let mut answer = Vec::new();
        let ended = stranger.read_to_end(&mut answer);
        let waits = ended.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        assert!(!waits && answer.len() <= 7, "{ended:?} {answer:?}");
    }
    stage.good("alice", &["vm", "list"]);
    let lines = stage.log().lines().count() - before;
    assert!(lines < 60, "{lines} lines in the log");
    stage.unharmed();
}

/// A certificate that counts and allows nothing, as each arbiter's: however often it comes, it takes no place of others.
#[test]
fn a_client_that_may_do_nothing_is_told_so_and_has_no_place() {
    let mut stage = Stage::new();
    stage.issue("third", Grant::ARBITER);
    let mut told = Vec::new();
    for _ in 0..20 {
        let mut stream = stage.tls(Some("third"));
        stream.write_all(OPEN.as_bytes()).unwrap();
        stream.flush().unwrap();
        let mut answer = vec![0; 4096];
        let count = stream.read(&mut answer).unwrap();
        let answer = String::from_utf8(answer[..count].to_vec()).unwrap();
        assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("forbidden"), "{answer}");
        // It stays, as far as it can.
        told.push(stream);
    }
    for mut stream in told {
        let ended = stream.read(&mut [0; 100]);
        let waits = ended.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        assert!(!waits && !matches!(ended, Ok(1..)), "{ended:?}");
    }
    stage.good("alice", &["vm", "list"]);
    stage.unharmed();
}

/// With a certificate that counts.
#[test]
fn a_client_that_only_stays_keeps_nobody_else_out() {
    let mut stage = Stage::new();
    stage.issue("hostb", Grant::ALL);
    // Each follows the events, and stays.
    let follow = "GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut followers = Vec::new();
    let refused = loop {
        let mut stream = stage.tls(Some("hostb"));
        stream.write_all(follow.as_bytes()).unwrap();
        stream.flush().unwrap();
        let mut answer = vec![0; 4096];
        let count = stream.read(&mut answer).unwrap();
        answer.truncate(count);
        if !answer.starts_with(b"HTTP/1.1 200 ") {
            // It is closed without a word of TLS.
            let _ = stream.read_to_end(&mut answer);
            break String::from_utf8(answer).unwrap();
        }
        followers.push(stream);
    };
    assert!(refused.starts_with("HTTP/1.1 429 ") && refused.contains("too_many"), "{refused}");
    assert_eq!(followers.len(), 16);
    let why = stage.bad("hostb", &["vm", "list"], 1);
    assert!(why.contains("16 connections with these keys"), "{why}");
    stage.good("alice", &["vm", "list"]);
    drop(followers);
    wait_until("there is room again", || stage.from("hostb", &["vm", "list"]).status.success());
    // Silence after the handshake is ended, too.
    let mut silent = stage.tls(Some("hostb"));
    shown(&mut silent).unwrap();
    let ended = silent.read(&mut [0; 100]);
    let waits = ended.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
    assert!(!waits && !matches!(ended, Ok(1..)), "{ended:?}");
    stage.unharmed();
}
