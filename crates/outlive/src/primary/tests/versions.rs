//! A primary whose standby is older. The connection, its threads and the state machine are the real ones.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use outlive_dirty::Gfn;
use outlive_epoch::{
    Accept, Encoder, Hello, Message, Peer, Preface, ProtocolVersion, RefuseCode, SectionKind, SectionReader,
};
use outlive_machine::Ram;
use outlive_pair::PrimaryEvent;

use super::rig::{LINK, Rig, Stuck, connected, wait_for};
use crate::link::Job;
use crate::primary::inbox::Inbox;

const V2: ProtocolVersion = ProtocolVersion::V2;

/// What a primary says first.
fn introduction(stream: &mut TcpStream) -> (ProtocolVersion, u16, Box<Hello>, SectionReader) {
    let mut reader = SectionReader::new(Peer::Primary);
    let version = reader.read_preface(stream).unwrap();
    let section = reader.read_section(stream).unwrap();
    let payload = section.header().version;
    let Message::Hello(hello) = Message::parse(&section).unwrap() else { panic!("no Hello") };
    (version, payload, hello, reader)
}

/// The next connection, for which the clock of the state machine must go on.
fn next_connection(rig: &Rig, listener: &TcpListener) -> TcpStream {
    listener.set_nonblocking(true).unwrap();
    let mut accepted = None;
    wait_for("another connection", || {
        rig.driver.handle(PrimaryEvent::Tick);
        accepted = listener.accept().ok();
        accepted.is_some()
    });
    let (stream, _) = accepted.unwrap();
    stream.set_nonblocking(false).unwrap();
    stream
}

#[test]
fn a_primary_goes_on_in_the_version_that_was_agreed_on() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let rig = connected(Arc::new(Stuck::default()), listener.local_addr().unwrap());
    let mut stream = listener.accept().unwrap().0;
    let (version, _, hello, mut reader) = introduction(&mut stream);
    assert_eq!(version, ProtocolVersion::INTRODUCTION);
    let accept = Accept {
        generation: hello.generation,
        dead_after_us: 1,
        host: "b".into(),
        version: V2,
        holds: false,
        strays: None,
    };
    let mut out = Preface { version }.encode().to_vec();
    Encoder::speaking(version).accept(&mut out, &accept).unwrap();
    stream.write_all(&out).unwrap();
    reader.agree(V2);

    wait_for("the base", || rig.inbox.waiting().any(|it| matches!(it, Inbox::StartBase(..))));
    let ram = Arc::new(Ram::new(64 << 20, 64).unwrap());
    rig.driver.send(LINK, Job::BaseRound { round: 1, gfns: vec![Gfn(1)], ram });
    loop {
        // A reader that has agreed on version 2 takes nothing newer.
        let section = reader.read_section(&mut stream).unwrap();
        if section.kind() == SectionKind::BasePages {
            assert_eq!(section.header().version, SectionKind::BasePages.version_in(V2));
            break;
        }
    }
}

#[test]
fn a_standby_that_cannot_read_the_introduction_is_dialled_once_more_in_its_own_version() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let rig = connected(Arc::new(Stuck::default()), listener.local_addr().unwrap());
    for round in 0..2 {
        // What it answers does not matter to the attempt after the next: it may have been upgraded.
        let mut stream = next_connection(&rig, &listener);
        let (version, payload, ..) = introduction(&mut stream);
        assert_eq!(
            (version, payload),
            (ProtocolVersion::INTRODUCTION, SectionKind::Hello.version()),
            "{round}"
        );
        let mut out = Preface { version: V2 }.encode().to_vec();
        Encoder::speaking(V2).refuse(&mut out, RefuseCode::Version, "too new");
        stream.write_all(&out).unwrap();

        let mut stream = next_connection(&rig, &listener);
        let (version, payload, ..) = introduction(&mut stream);
        assert_eq!((version, payload), (V2, SectionKind::Hello.version_in(V2)), "{round}");
        let mut out = Preface { version: V2 }.encode().to_vec();
        Encoder::speaking(V2).refuse(&mut out, RefuseCode::Busy, "busy");
        stream.write_all(&out).unwrap();
    }
}

#[test]
fn a_standby_that_accepts_twice_is_left() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let rig = connected(Arc::new(Stuck::default()), listener.local_addr().unwrap());
    let mut stream = listener.accept().unwrap().0;
    let (version, _, hello, _) = introduction(&mut stream);
    let mut out = Preface { version }.encode().to_vec();
    let mut encoder = Encoder::speaking(version);
    for version in [version, V2] {
        let accept = Accept {
            generation: hello.generation,
            dead_after_us: 1,
            host: "b".into(),
            version,
            holds: false,
            strays: None,
        };
        encoder.accept(&mut out, &accept).unwrap();
        encoder.speak(ProtocolVersion::INTRODUCTION);
    }
    stream.write_all(&out).unwrap();
    let is_end =
        |it| matches!(it, Inbox::Note(note) if format!("{note:?}").contains("an acceptance after the first"));
    wait_for("the end of the link", || rig.inbox.waiting().any(is_end));
}
