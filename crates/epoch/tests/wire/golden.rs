//! The bytes of the format, committed: a change of them is a change of the format, and needs a new version.
//!
//! `OUTLIVE_WRITE_GOLDEN=1 cargo test -p outlive-epoch --test wire golden` writes the files that are missing.

use std::path::PathBuf;

use outlive_epoch::{
    Accept, Ack, ArbiterSight, Audited, ChunkRange, DiskAudited, DiskWant, Encoder, LeaveReason, Message,
    Peer, Preface, ProtocolVersion, RefuseCode, SectionKind, SectionReader, StrayKey,
};

/// What to do when a test of this file fails.
const REMEDY: &str = "a host of the release before could not read this. Give the stream a new version (wire/version.rs), \
                      write its golden file with OUTLIVE_WRITE_GOLDEN=1, and keep the old ones with their readers \
                      (docs/upgrade.md)";

fn check(name: &str, bytes: &[u8]) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    // A file that is there is never changed.
    if std::env::var_os("OUTLIVE_WRITE_GOLDEN").is_some() && !path.exists() {
        std::fs::write(&path, bytes).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    let first = golden.iter().zip(bytes).position(|(a, b)| a != b);
    assert_eq!(first, None, "{name}: first difference: {REMEDY}");
    assert_eq!(golden.len(), bytes.len(), "{name}: length: {REMEDY}");
}

#[test]
fn the_primarys_stream_is_the_committed_one() {
    let (stream, contents) = crate::common::small_stream();
    check("primary-v8.bin", &stream);
    let golden = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/primary-v8.bin")).unwrap();
    assert_eq!(crate::common::receive(&golden), (contents, None));
}

/// Release N reads what earlier releases wrote, and writes the same bytes when it is told to.
#[test]
fn the_streams_of_the_versions_before_are_read_and_written() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (name, version) in [
        ("primary-v2.bin", ProtocolVersion::V2),
        ("primary-v3.bin", ProtocolVersion::V3),
        ("primary-v4.bin", ProtocolVersion::V4),
        ("primary-v5.bin", ProtocolVersion::V5),
        ("primary-v6.bin", ProtocolVersion::V6),
        ("primary-v7.bin", ProtocolVersion::V7),
    ] {
        let golden = std::fs::read(directory.join(name)).unwrap();
        let (stream, contents) = crate::common::stream_of(version);
        assert_eq!(crate::common::receive(&golden), (contents, None), "{name}");
        check(name, &stream);
        assert_ne!(stream, crate::common::small_stream().0, "{name}");
    }
}

/// No kind of section is without its bytes.
#[test]
fn every_kind_is_in_the_newest_streams() {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut found = Vec::new();
    for (side, peer) in [("primary", Peer::Primary), ("standby", Peer::Standby)] {
        let name = format!("{side}-v{}.bin", ProtocolVersion::CURRENT as u32);
        let golden =
            std::fs::read(directory.join(&name)).unwrap_or_else(|_| panic!("{name} is missing: {REMEDY}"));
        let (mut source, mut reader) = (&golden[..], SectionReader::up_to(peer, ProtocolVersion::CURRENT));
        reader.read_preface(&mut source).unwrap();
        while let Ok(section) = reader.read_section(&mut source) {
            found.push(section.kind() as u16);
            if let Ok(Message::Hello(_) | Message::Accept(_)) = Message::parse(&section) {
                reader.agree(ProtocolVersion::CURRENT);
            }
        }
        assert!(source.is_empty(), "{name}");
    }
    for kind in SectionKind::ALL {
        assert!(found.contains(&(kind as u16)), "no {kind:?} in the golden files: {REMEDY}");
    }
}

#[test]
fn the_standbys_stream_is_the_committed_one() {
    standbys_stream("standby-v2.bin", ProtocolVersion::V2);
    standbys_stream("standby-v3.bin", ProtocolVersion::V3);
    standbys_stream("standby-v4.bin", ProtocolVersion::V4);
    standbys_stream("standby-v5.bin", ProtocolVersion::V5);
    standbys_stream("standby-v6.bin", ProtocolVersion::V6);
    standbys_stream("standby-v7.bin", ProtocolVersion::V7);
    standbys_stream("standby-v8.bin", ProtocolVersion::V8);
}

/// From version 8 on.
const WITH_ITS_RIGHT: [LeaveReason; 4] = [
    LeaveReason::BadStreamReleased,
    LeaveReason::FailedReleased,
    LeaveReason::DiffersReleased,
    LeaveReason::Dismissed,
];

fn standbys_stream(name: &str, version: ProtocolVersion) {
    let introduction = version.introduction();
    let mut out = Preface { version: introduction }.encode().to_vec();
    let mut encoder = Encoder::speaking(introduction);
    let holds = version >= ProtocolVersion::V8;
    let accept =
        Accept { generation: 3, dead_after_us: 500_000, host: "host-b".into(), version, holds, strays: None };
    let ack = Ack { generation: 3, number: 40, stamp_us: 123_456 };
    encoder.accept(&mut out, &accept).unwrap();
    encoder.ack(&mut out, &ack);
    encoder.heartbeat(&mut out, 123_456);
    let want = DiskWant { disk: 1, first: 14, count: 2, wanted: vec![0, 1] };
    encoder.disk_want(&mut out, &want).unwrap();
    let reach = (version >= ProtocolVersion::V5).then_some([None, Some(false), Some(true)]);
    reach.into_iter().flatten().for_each(|reaches| encoder.reach(&mut out, reaches));
    let audited = Audited { checkpoint: 40, pages: 1 << 33, spent_ns: 5_000_000, differs: None };
    let differs = Audited { checkpoint: 41, differs: Some((64, 1 << 63 | 5)), ..audited };
    let audits = (version >= ProtocolVersion::V7).then_some([audited, differs]);
    audits.iter().flatten().for_each(|audited| encoder.audited(&mut out, audited).unwrap());
    let sights = [ArbiterSight::Unknown, ArbiterSight::Lost { for_s: 70_000 }, ArbiterSight::Seen];
    let sights = (version >= ProtocolVersion::V7).then_some(sights);
    sights.iter().flatten().for_each(|sight| encoder.arbiter_sight(&mut out, *sight).unwrap());
    let audited = DiskAudited {
        checkpoint: 42,
        chunks: 1 << 34,
        spent_ns: 6_000_000,
        read_ns: 70_000_000,
        differs: None,
    };
    let chunks = ChunkRange { disk: 1, first: 14, count: 2 };
    let differs = DiskAudited { checkpoint: 43, differs: Some(chunks), ..audited };
    let disk_audits = (version >= ProtocolVersion::V7).then_some([audited, differs]);
    disk_audits.iter().flatten().for_each(|audited| encoder.disk_audited(&mut out, audited).unwrap());
    encoder.leave(&mut out, LeaveReason::Stopped);
    encoder.refuse(&mut out, RefuseCode::Busy, "another primary is attached");
    // A standby that takes strays, and does not have the memory of the moment.
    let key = StrayKey(std::array::from_fn(|at| 0xa0 ^ at as u8));
    let takes_strays = (version >= ProtocolVersion::V8).then(|| Accept {
        holds: false,
        strays: Some(key),
        ..accept.clone()
    });
    takes_strays.iter().for_each(|accept| encoder.accept(&mut out, accept).unwrap());
    let with_its_right: &[LeaveReason] = if version >= ProtocolVersion::V8 { &WITH_ITS_RIGHT } else { &[] };
    with_its_right.iter().for_each(|reason| encoder.leave(&mut out, *reason));
    check(name, &out);

    let (mut source, mut reader) = (&out[..], SectionReader::up_to(Peer::Standby, version));
    reader.read_preface(&mut source).unwrap();
    let mut next = || format!("{:?}", Message::parse(&reader.read_section(&mut source).unwrap()).unwrap());
    assert_eq!(next(), format!("{:?}", Message::Accept(accept)));
    assert_eq!(next(), format!("{:?}", Message::Ack(ack)));
    assert_eq!(next(), "Heartbeat { stamp_us: 123456 }");
    assert_eq!(next(), format!("{:?}", Message::DiskWant(want)));
    for reaches in reach.into_iter().flatten() {
        assert_eq!(next(), format!("Reach({reaches:?})"));
    }
    for audited in audits.iter().flatten() {
        assert_eq!(next(), format!("{:?}", Message::Audited(*audited)));
    }
    for sight in sights.iter().flatten() {
        assert_eq!(next(), format!("ArbiterSight({sight:?})"));
    }
    for audited in disk_audits.iter().flatten() {
        assert_eq!(next(), format!("{:?}", Message::DiskAudited(*audited)));
    }
    assert_eq!(next(), "Leave(Stopped)");
    assert_eq!(next(), r#"Refuse(Refuse { code: Ok(Busy), text: "another primary is attached" })"#);
    if let Some(accept) = takes_strays {
        // What is printed of a key says nothing.
        let section = reader.read_section(&mut source).unwrap();
        assert!(matches!(Message::parse(&section), Ok(Message::Accept(read)) if read == accept));
    }
    for reason in with_its_right {
        let section = reader.read_section(&mut source).unwrap();
        assert_eq!(Message::parse(&section), Ok(Message::Leave(*reason)));
    }
    assert!(source.is_empty());
}

/// An older primary must know that the right is handed over; why is in the standby's log.
#[test]
fn an_older_stream_says_that_a_right_is_handed_over_without_the_reason() {
    for reason in WITH_ITS_RIGHT {
        let mut out = Vec::new();
        Encoder::speaking(ProtocolVersion::V7).leave(&mut out, reason);
        let mut released = Vec::new();
        Encoder::speaking(ProtocolVersion::V7).leave(&mut released, LeaveReason::Released);
        assert_eq!(out, released);
    }
}
