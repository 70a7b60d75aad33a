//! A link over TLS: what is written arrives, in its order, from any of the threads that a link has.

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::super::{Connection, Listener, Security, dial};
use crate::keys::{self, Grant, Order, Vms};

const LIFE: Duration = Duration::from_secs(3600);

fn order(host: &str, grant: Grant) -> Order {
    Order { host: host.into(), grant, life: LIFE }
}

/// Keys of two hosts in a directory.
fn keys_in(dir: &Path, standby: Grant) -> [PathBuf; 2] {
    let [a, b] = ["a", "b"].map(|host| dir.join(host));
    keys::init(&a, &order("hosta", Grant::ALL)).unwrap();
    keys::issue(&a, &order("hostb", standby), &b).unwrap();
    [a, b]
}

/// The ends of a connection between two hosts: the one that dials, and the one that listens.
fn connected(keys: &[PathBuf; 2]) -> io::Result<(Connection, io::Result<Connection>)> {
    let [a, b] = keys.clone().map(Security::Keys);
    let listener = Listener::reserve("127.0.0.1:0").unwrap();
    listener.listen().unwrap();
    let address = listener.address().unwrap().to_string();
    let listening = std::thread::spawn(move || listener.accept().unwrap().open(&b));
    let dialled = dial(&address, &a, Some(outlive_epoch::VmId([5; 16])));
    let accepted = listening.join().unwrap();
    dialled.map(|dialled| (dialled, accepted))
}

#[test]
fn what_both_ends_write_at_once_arrives_whole_and_in_order() {
    const TOTAL: usize = 8 << 20;
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = connected(&keys_in(dir.path(), Grant::ALL)).unwrap();
    let b = b.unwrap();
    assert_eq!((a.host.unwrap().name, b.host.unwrap().name), ("hostb".into(), "hosta".into()));
    let bytes: Vec<u8> = (0..TOTAL).map(|at| ((at * 31) >> 8) as u8).collect();
    let bytes = &bytes;
    let check = |mut reader: super::super::Reader| {
        let (mut got, mut at) = (vec![0; 70_001], 0);
        while at < TOTAL {
            // Small pieces and large ones, as a reader of sections asks for them.
            let most = if at % 3 == 0 { 20 } else { got.len() };
            let count = reader.read(&mut got[..most]).unwrap();
            assert!(count > 0 && got[..count] == bytes[at..at + count], "at {at}");
            at += count;
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(move || check(a.reader));
        scope.spawn(move || check(b.reader));
        let (mut writer, now) = (a.writer, b.writer);
        scope.spawn(move || {
            let mut at = 0;
            while at < TOTAL {
                let (one, two) = bytes[at..].split_at((TOTAL - at).min(100));
                at += writer.write_vectored(&[IoSlice::new(one), IoSlice::new(two)]).unwrap();
            }
        });
        let mut at = 0;
        while at < TOTAL {
            match now.write_now(&bytes[at..]) {
                Ok(count) => at += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::yield_now(),
                Err(error) => panic!("{error}"),
            }
        }
    });
}

#[test]
fn a_standby_that_may_not_hold_the_vm_and_strangers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let others = Grant { send: Vms::Any, hold: Vms::Only(vec![outlive_epoch::VmId([6; 16])]), ..Grant::NONE };
    let keys = keys_in(dir.path(), others);
    let why = connected(&keys).err().unwrap().to_string();
    assert!(why.contains("host hostb may not hold VM 05050505"), "{why}");
    let foreign = dir.path().join("foreign");
    keys::init(&foreign, &order("hosta", Grant::ALL)).unwrap();
    let why = connected(&[keys[0].clone(), foreign]).err().unwrap().to_string();
    assert!(why.contains("its certificate is of another CA"), "{why}");
}

/// A stranger on the way changes a byte.
#[test]
fn a_changed_record_is_wrong_and_not_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let keys = keys_in(dir.path(), Grant::ALL);
    let [a, b] = keys.map(Security::Keys);
    let listener = Listener::reserve("127.0.0.1:0").unwrap();
    listener.listen().unwrap();
    let address = listener.address().unwrap();
    let wire = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let between = wire.local_addr().unwrap().to_string();
    let (go, gone) = std::sync::mpsc::channel::<()>();
    std::thread::spawn(move || {
        let (mut from, _) = wire.accept().unwrap();
        let mut to = std::net::TcpStream::connect(address).unwrap();
        let (mut back_from, mut back_to) = (to.try_clone().unwrap(), from.try_clone().unwrap());
        std::thread::spawn(move || io::copy(&mut back_from, &mut back_to));
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            if gone.try_recv().is_ok() {
                bytes[count - 1] ^= 1;
            }
            to.write_all(&bytes[..count]).unwrap();
        }
    });
    let listening = std::thread::spawn(move || listener.accept().unwrap().open(&b).unwrap());
    let mut a = dial(&between, &a, None).unwrap();
    let mut b = listening.join().unwrap();
    let mut got = [0; 5];
    a.writer.write_all(b"hello").unwrap();
    b.reader.read_exact(&mut got).unwrap();
    go.send(()).unwrap();
    a.writer.write_all(b"again").unwrap();
    let error = b.reader.read(&mut got).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidData, "{error}");
}

/// Each byte comes soon after the one before; the whole would take ten seconds, and then it ends.
#[test]
fn a_handshake_that_comes_byte_by_byte_is_given_up() {
    let dir = tempfile::tempdir().unwrap();
    let [_, b] = keys_in(dir.path(), Grant::ALL).map(Security::Keys);
    let listener = Listener::reserve("127.0.0.1:0").unwrap();
    listener.listen().unwrap();
    let address = listener.address().unwrap();
    std::thread::spawn(move || {
        let mut stranger = std::net::TcpStream::connect(address).unwrap();
        // The head of a long record of a handshake.
        let head = [0x16, 3, 1, 0x40, 0].into_iter().chain(std::iter::repeat(1));
        for byte in head.take(100) {
            std::thread::sleep(Duration::from_millis(100));
            if stranger.write_all(&[byte]).is_err() {
                break;
            }
        }
    });
    let refused = listener.accept().unwrap().open(&b).err().unwrap();
    assert_eq!(refused.kind(), ErrorKind::TimedOut, "{refused}");
}

/// Why the end that listens refuses, and what the other end learns when it reads.
fn refused(keys: &[PathBuf; 2]) -> [String; 2] {
    let (mut dialled, accepted) = connected(keys).unwrap();
    let learned = dialled.reader.read(&mut [0; 10]).unwrap_err();
    [accepted.err().unwrap().to_string(), learned.to_string()]
}

#[test]
fn revoked_and_expired_hosts_are_refused_and_do_not_learn_why() {
    let dir = tempfile::tempdir().unwrap();
    let keys = keys_in(dir.path(), Grant::ALL);
    let late = dir.path().join("late");
    let order = Order { life: Duration::ZERO, ..order("late", Grant::ALL) };
    keys::issue(&keys[0], &order, &late).unwrap();
    std::thread::sleep(Duration::from_millis(1100));
    let [why, learned] = refused(&[late, keys[1].clone()]);
    assert!(why.contains("has expired"), "{why}");
    assert!(learned.contains("does not accept this host's certificate"), "{learned}");
    let serial = keys::load(&keys[0]).unwrap().host.serial;
    keys::revoke(&keys[1], &serial).unwrap();
    let [why, learned] = refused(&keys);
    assert!(why.contains("of hosta is revoked"), "{why}");
    assert!(learned.contains("does not accept this host's certificate"), "{learned}");
}

#[test]
fn a_host_whose_list_is_lost_lets_nobody_in() {
    let dir = tempfile::tempdir().unwrap();
    let keys = keys_in(dir.path(), Grant::ALL);
    let list = keys[1].join("revoked");
    std::fs::remove_file(&list).unwrap();
    // It has no keys that it may use, so the other end learns nothing.
    let listener = Listener::reserve("127.0.0.1:0").unwrap();
    listener.listen().unwrap();
    let (address, [a, b]) = (listener.address().unwrap().to_string(), keys.clone().map(Security::Keys));
    let listening = std::thread::spawn(move || listener.accept().unwrap().open(&b));
    let dialled = dial(&address, &a, None).and_then(|mut it| it.reader.read(&mut [0; 10]));
    let why = listening.join().unwrap().err().unwrap().to_string();
    assert!(dialled.is_err());
    assert!(why.contains("revoked is missing, so nobody is let in") && why.lines().count() == 1, "{why}");
    std::fs::write(&list, "").unwrap();
    connected(&keys).unwrap().1.unwrap();
}
