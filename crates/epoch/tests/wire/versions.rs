//! Two releases agree on a version of the stream.

use outlive_epoch::{
    Accept, Encoder, HEADER_LEN, Hello, MAX_VCPU_CONSTANT, Message, Moment, Peer, Preface, ProtocolVersion,
    ReadError, Refuse, RefuseCode, SectionHeader, SectionKind, SectionReader, StrayKey, VcpuConstant,
    VersionRange, WireError, Wiring,
};

use crate::common::{Content, hello};

const V2: ProtocolVersion = ProtocolVersion::V2;
const V3: ProtocolVersion = ProtocolVersion::V3;

/// The versions of a release whose newest version is this one.
fn range(newest: ProtocolVersion) -> VersionRange {
    VersionRange { newest: newest as u32, ..VersionRange::CURRENT }
}

/// A standby's release whose newest version is `newest`: reads an introduction, answers it, and returns the
/// version that it agreed to, with its encoder and its reader.
fn answer(newest: ProtocolVersion, mut from: &[u8], to: &mut Vec<u8>) -> Option<(Encoder, SectionReader)> {
    let mut reader = SectionReader::up_to(Peer::Primary, newest);
    let introduction = match reader.read_preface(&mut from) {
        Ok(version) => version,
        Err(error) => {
            let version = newest.introduction();
            to.extend_from_slice(&Preface { version }.encode());
            Encoder::speaking(version).refuse(to, RefuseCode::Version, &error.to_string());
            return None;
        }
    };
    let mut encoder = Encoder::speaking(introduction);
    to.extend_from_slice(&Preface { version: introduction }.encode());
    let section = reader.read_section(&mut from).unwrap();
    let Message::Hello(hello) = Message::parse(&section).unwrap() else { panic!("no Hello") };
    match range(newest).common(hello.versions) {
        Ok(version) => {
            let accept = Accept {
                generation: 3,
                dead_after_us: 1,
                host: "b".into(),
                version,
                holds: false,
                strays: None,
            };
            encoder.accept(to, &accept).unwrap();
            reader.agree(version);
            Some((encoder, reader))
        }
        Err(why) => {
            encoder.refuse(to, RefuseCode::Version, &why);
            None
        }
    }
}

/// The primary's introduction in this version, and its encoder.
fn introduce(introduction: ProtocolVersion, versions: VersionRange) -> (Vec<u8>, Encoder) {
    let mut out = Preface { version: introduction }.encode().to_vec();
    let mut encoder = Encoder::speaking(introduction);
    encoder.hello(&mut out, &Hello { versions, ..hello() }).unwrap();
    (out, encoder)
}

/// What came back: the version in which the standby introduces itself, and its answer.
fn heard(
    newest: ProtocolVersion,
    mut from: &[u8],
) -> (ProtocolVersion, Result<Accept, Refuse>, SectionReader) {
    let mut reader = SectionReader::up_to(Peer::Standby, newest);
    let introduction = reader.read_preface(&mut from).unwrap();
    let answer = match Message::parse(&reader.read_section(&mut from).unwrap()).unwrap() {
        Message::Accept(accept) => Ok(accept),
        Message::Refuse(refuse) => Err(refuse),
        other => panic!("{other:?}"),
    };
    (introduction, answer, reader)
}

/// The whole conversation from the first attempt on: returns the version that was agreed on and the number of
/// attempts. A checkpoint goes out, an acknowledgement comes back, and each section has the version of that
/// stream.
fn converse(primary: ProtocolVersion, standby: ProtocolVersion) -> (ProtocolVersion, u32) {
    let (mut introduction, mut attempts) = (primary.introduction(), 0);
    loop {
        attempts += 1;
        let (there, mut writes) = introduce(introduction, range(primary));
        let mut back = Vec::new();
        let accepted = answer(standby, &there, &mut back);
        let (theirs, answer, mut hears) = heard(primary, &back);
        let Some((mut answers, mut reads)) = accepted else {
            let refuse = answer.unwrap_err();
            assert_eq!(refuse.code, Ok(RefuseCode::Version));
            assert!(theirs < introduction && attempts == 1, "it would never end: {}", refuse.text);
            introduction = theirs;
            continue;
        };
        let agreed = answer.unwrap().version;
        writes.speak(agreed);
        hears.agree(agreed);
        assert_eq!((writes.stream(), answers.stream()), (agreed, agreed));

        let content = Content::new(1, Default::default(), &[1, 5, 7]);
        let mut stream = Vec::new();
        content.encode(&mut writes, &mut stream, 2);
        let (mut source, mut pages) = (&stream[..], 0);
        loop {
            match reads.read_section(&mut source) {
                Ok(section) => {
                    let header = section.header();
                    assert_eq!(header.version, header.kind.version_in(agreed), "{:?}", header.kind);
                    if let Message::Pages(section) = Message::parse(&section).unwrap() {
                        pages += section.len();
                    }
                }
                Err(ReadError::Closed) => break,
                Err(error) => panic!("{error}"),
            }
        }
        assert_eq!(pages, 3);

        let mut ack = Vec::new();
        answers.ack(&mut ack, &outlive_epoch::Ack { generation: 3, number: 1, stamp_us: 9 });
        let section = hears.read_section(&mut &ack[..]).unwrap();
        assert!(matches!(Message::parse(&section), Ok(Message::Ack(ack)) if ack.number == 1));
        return (agreed, attempts);
    }
}

#[test]
fn the_newest_version_that_both_have_is_used() {
    assert_eq!(converse(V3, V3), (V3, 1));
    assert_eq!(converse(V2, V3), (V2, 1), "an older primary");
    assert_eq!(converse(V2, V2), (V2, 1));
    // It cannot read a Hello that has a range.
    assert_eq!(converse(V3, V2), (V2, 2), "an older standby");
}

/// A section whose payload is replaced, with all checksums right.
fn with_payload(section: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut header = SectionHeader::parse(section[..HEADER_LEN].try_into().unwrap()).unwrap();
    header.length = payload.len() as u32;
    header.payload_crc = crc32fast::hash(payload);
    [&header.encode()[..], payload].concat()
}

/// Whatever a later release appends to its introduction, this one can still read it.
#[test]
fn a_later_release_is_understood_as_long_as_it_has_a_version_of_ours() {
    let later = VersionRange { oldest: 3, newest: 12 };
    let (mut there, _) = introduce(ProtocolVersion::INTRODUCTION, later);
    let section = there.split_off(outlive_epoch::PREFACE_LEN);
    let payload = [&section[HEADER_LEN..], &[0xee; 17]].concat();
    there.extend(with_payload(&section, &payload));
    let mut back = Vec::new();
    assert!(answer(ProtocolVersion::CURRENT, &there, &mut back).is_some());

    let section = back.split_off(outlive_epoch::PREFACE_LEN);
    let payload = [&section[HEADER_LEN..], &[0xee; 9]].concat();
    back.extend(with_payload(&section, &payload));
    let (_, accept, _) = heard(ProtocolVersion::CURRENT, &back);
    assert_eq!(accept.unwrap().version, ProtocolVersion::CURRENT);
}

/// The microcode came without a new version: releases before it read the rest, and are read without it.
#[test]
fn a_primary_may_or_may_not_say_its_microcode() {
    let stream = |microcode| {
        let (mut encoder, mut out) = (Encoder::speaking(ProtocolVersion::INTRODUCTION), Vec::new());
        encoder.hello(&mut out, &Hello { microcode, ..crate::common::hello() }).unwrap();
        out
    };
    let parse = |section: &[u8]| match Message::parse_payload(
        SectionKind::Hello,
        SectionKind::Hello.version(),
        &section[HEADER_LEN..],
    ) {
        Ok(Message::Hello(hello)) => *hello,
        other => panic!("{other:?}"),
    };
    assert_eq!(parse(&stream(0xb00_0040)), Hello { microcode: 0xb00_0040, ..crate::common::hello() });
    assert_eq!(parse(&stream(0)), crate::common::hello());
    assert_eq!(stream(0xb00_0040).len(), stream(0).len() + 8);
}

fn told(hello: &Hello) -> Hello {
    let mut section = Vec::new();
    Encoder::new().hello(&mut section, hello).unwrap();
    assert!(section.len() - HEADER_LEN <= SectionKind::Hello.limit() as usize, "an older release refuses it");
    let version = SectionKind::Hello.version_in(ProtocolVersion::INTRODUCTION);
    match Message::parse_payload(SectionKind::Hello, version, &section[HEADER_LEN..]).unwrap() {
        Message::Hello(hello) => *hello,
        _ => panic!("it was an introduction"),
    }
}

#[test]
fn the_wiring_of_a_card_is_told() {
    for (mtu, vlan) in [(None, None), (Some(9000), None), (None, Some(4094)), (Some(65_521), Some(1))] {
        let mut hello = hello();
        hello.devices[0].wiring = Wiring { mtu, vlan };
        assert_eq!(told(&hello), hello);
        // A release that does not know the wiring refuses, and does not guess.
        let mut section = Vec::new();
        Encoder::speaking(V2).hello(&mut section, &hello).unwrap();
        let version = SectionKind::Hello.version_in(V2);
        let old = Message::parse_payload(SectionKind::Hello, version, &section[HEADER_LEN..]);
        assert_eq!(old.is_ok(), mtu.is_none() && vlan.is_none(), "{:?}", old.map(|_| ()));
    }
    for (mtu, vlan, why) in [
        (Some(67), None, "an MTU smaller than every network's (0x43)"),
        (None, Some(4095), "a VLAN larger than every VLAN (0xfff)"),
    ] {
        let mut hello = hello();
        hello.devices[0].wiring = Wiring { mtu, vlan };
        let mut section = Vec::new();
        Encoder::new().hello(&mut section, &hello).unwrap();
        let version = SectionKind::Hello.version_in(ProtocolVersion::INTRODUCTION);
        let error = Message::parse_payload(SectionKind::Hello, version, &section[HEADER_LEN..]).map(|_| ());
        assert_eq!(error.map_err(|e| e.to_string()), Err(format!("section Hello: {why}")));
    }
}

#[test]
fn what_a_vcpu_is_restored_with_is_told_as_far_as_there_is_room() {
    for (length, fits) in [(0, true), (2400, true), (3900, false), (MAX_VCPU_CONSTANT, false)] {
        let vcpu = VcpuConstant { version: 1, bytes: (0..length).map(|at| at as u8).collect() };
        let hello = Hello { vcpu: Some(vcpu), ..hello() };
        let told = told(&hello);
        assert_eq!(told.vcpu, hello.vcpu.filter(|_| fits), "{length} bytes");
    }
    let long = VcpuConstant { version: 1, bytes: vec![0; MAX_VCPU_CONSTANT + 1] };
    let long = Hello { vcpu: Some(long), ..hello() };
    assert!(Encoder::new().hello(&mut Vec::new(), &long).is_err());
}

#[test]
fn the_moment_that_a_vm_runs_on_from_is_told() {
    let since = Some(Moment { generation: 7, checkpoint: 1 << 40 });
    for vcpu in [None, Some(VcpuConstant { version: 1, bytes: vec![7; 100] })] {
        let hello = Hello { since, vcpu, ..hello() };
        assert_eq!(told(&hello), hello);
    }
    // In a form that this release does not know it is none: the standby gets a whole base.
    let mut section = Vec::new();
    Encoder::new().hello(&mut section, &Hello { since, ..hello() }).unwrap();
    let version_at = section.len() - 16 - 6;
    section[version_at] += 1;
    let version = SectionKind::Hello.version_in(ProtocolVersion::INTRODUCTION);
    match Message::parse_payload(SectionKind::Hello, version, &section[HEADER_LEN..]).unwrap() {
        Message::Hello(told) => assert_eq!(*told, hello()),
        _ => panic!("it was an introduction"),
    }
}

/// In a stream that does not have the flag, the checkpoint is one like all others.
#[test]
fn a_hand_over_is_told_only_to_those_who_know_it() {
    let flags = outlive_epoch::CheckpointFlags { hand_over: true, ..Default::default() };
    for (stream, told) in [(ProtocolVersion::V7, false), (ProtocolVersion::V8, true)] {
        let (mut encoder, mut out) = (Encoder::speaking(stream), Vec::new());
        Content::new(3, flags, &[1]).encode(&mut encoder, &mut out, 2);
        let mut reader = SectionReader::new(Peer::Primary);
        reader.agree(stream);
        let section = reader.read_section(&mut &out[..]).unwrap();
        match Message::parse(&section).unwrap() {
            Message::CheckpointBegin(begin) => assert_eq!(begin.flags.hand_over, told),
            _ => panic!("it was the beginning of a checkpoint"),
        }
        // The flag in the beginning of an older stream is damage.
        let old = SectionKind::CheckpointBegin.version_in(ProtocolVersion::V7);
        let begin = &out[HEADER_LEN..HEADER_LEN + section.header().length as usize];
        let parsed = Message::parse_payload(SectionKind::CheckpointBegin, old, begin);
        assert_eq!(parsed.is_err(), told);
    }
}

#[test]
fn without_a_common_version_both_ranges_and_the_remedy_are_named() {
    for (versions, host) in [
        (VersionRange { oldest: 20, newest: 21 }, "standby's"),
        (VersionRange { oldest: 1, newest: 1 }, "primary's"),
    ] {
        let (there, _) = introduce(ProtocolVersion::INTRODUCTION, versions);
        let mut back = Vec::new();
        assert!(answer(ProtocolVersion::CURRENT, &there, &mut back).is_none());
        let (_, refuse, _) = heard(ProtocolVersion::CURRENT, &back);
        let refuse = refuse.unwrap_err();
        assert_eq!(refuse.code, Ok(RefuseCode::Version));
        let (ours, theirs) = (VersionRange::CURRENT, versions);
        for words in [
            format!("the standby reads {ours}, the primary writes {theirs};"),
            format!("upgrade Outlive on the {host} host"),
        ] {
            assert!(refuse.text.contains(&words), "{}", refuse.text);
        }
    }
}

#[test]
fn what_is_newer_than_the_agreement_is_refused() {
    let (there, mut encoder) = introduce(V3, range(V3));
    let (mut source, mut reader) = (&there[..], SectionReader::new(Peer::Primary));
    reader.read_preface(&mut source).unwrap();
    reader.read_section(&mut source).unwrap();
    reader.agree(V2);
    // It continues as if nothing had been agreed on.
    let mut out = Vec::new();
    encoder.base_pages_head(&mut out, 1, [outlive_epoch::PageEntry::zero(1)].into_iter(), &[]).unwrap();
    let error = reader.read_section(&mut &out[..]).unwrap_err();
    let kind = SectionKind::BasePages;
    let expected = WireError::UnknownVersion { kind, version: 2, oldest: 1, newest: 1 };
    assert!(matches!(&error, ReadError::Wire(wire) if *wire == expected), "{error}");
}

#[test]
fn versions_that_make_no_sense_are_refused() {
    let parse = |kind: SectionKind, payload: &[u8]| {
        Message::parse_payload(kind, kind.version(), payload).map(|_| ()).map_err(|error| error.to_string())
    };
    let (there, _) = introduce(V3, VersionRange { oldest: 4, newest: 3 });
    let hello = &there[outlive_epoch::PREFACE_LEN + HEADER_LEN..];
    let why = "section Hello: the oldest version of the stream is newer than the newest (0x4)";
    assert_eq!(parse(SectionKind::Hello, hello), Err(why.into()));
    let early = "section Hello: the payload ends early, bytes missing (0x1)";
    assert_eq!(parse(SectionKind::Hello, &hello[..hello.len() - 1]), Err(early.into()));

    let mut out = Vec::new();
    let accept =
        Accept { generation: 3, dead_after_us: 1, host: "b".into(), version: V3, holds: false, strays: None };
    Encoder::new().accept(&mut out, &accept).unwrap();
    let mut accept = out[HEADER_LEN..].to_vec();
    assert_eq!(parse(SectionKind::Accept, &accept), Ok(()));
    let version = accept.len() - 4;
    accept[version] = 77;
    let why = "section Accept: a version of the stream that was not offered (0x4d)";
    assert_eq!(parse(SectionKind::Accept, &accept), Err(why.into()));
}

#[test]
fn an_acceptance_says_with_what_strays_are_taken_and_older_ones_do_not() {
    let told = |holds: bool, strays: Option<[u8; 32]>| {
        let strays = strays.map(StrayKey);
        let accept = Accept { generation: 3, dead_after_us: 1, host: "b".into(), version: V3, holds, strays };
        let mut out = Vec::new();
        Encoder::new().accept(&mut out, &accept).unwrap();
        (accept, out[HEADER_LEN..].to_vec())
    };
    let parse =
        |payload: &[u8]| Message::parse_payload(SectionKind::Accept, 2, payload).map(|it| format!("{it:?}"));
    let key: [u8; 32] = std::array::from_fn(|index| index as u8);
    let (plain, before) = told(false, None);
    for (accept, payload) in
        [(plain, before.clone()), told(true, None), told(false, Some(key)), told(true, Some(key))]
    {
        let expected = Message::Accept(accept);
        assert_eq!(Message::parse_payload(SectionKind::Accept, 2, &payload), Ok(expected.clone()));
        // What a later release appends is passed over, but only behind what this one knows.
        if payload.len() > before.len() + 1 {
            let later = [&payload[..], b"later"].concat();
            assert_eq!(Message::parse_payload(SectionKind::Accept, 2, &later), Ok(expected));
        }
    }
    let (accept, whole) = told(true, Some(key));
    let cut = parse(&whole[..whole.len() - 1]).unwrap();
    assert!(cut.contains("strays: None"), "a part of a key is none: {cut}");
    assert!(!format!("{accept:?}").contains("31"), "nobody reads it in a log");
}
