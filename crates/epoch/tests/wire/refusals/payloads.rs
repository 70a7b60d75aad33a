//! Payloads whose fields make no sense.

use outlive_epoch::{
    ArbiterSight, Audited, DeviceKind, DiskAudited, EncodeError, Encoder, HEADER_LEN, Hello,
    MAX_AUDIT_CHUNKS, MAX_AUDIT_RANGES, MAX_AUDIT_SPANS, MAX_FRAMES_BYTES, MAX_GENERATION, MAX_PACKET_BYTES,
    Message, ProtocolVersion, SectionKind, StateKind, StateSection, TailBuf, TailFrame,
};

use super::{BASE, begin};
use crate::common::hello;

#[test]
fn entries_that_do_not_add_up_to_the_data_are_refused() {
    let pages = |version: u16, count: u32, data_len: u32, words: &[u64], data: usize| {
        let mut payload = 1u64.to_le_bytes().to_vec();
        payload.extend_from_slice(&count.to_le_bytes());
        payload.extend_from_slice(&data_len.to_le_bytes());
        words.iter().for_each(|word| payload.extend_from_slice(&word.to_le_bytes()));
        payload.resize(payload.len() + data, 0);
        let parsed = Message::parse_payload(SectionKind::Pages, version, &payload);
        parsed.map(|_| ()).map_err(|error| error.to_string())
    };
    let unknown = "a page is written by a codec that this release does not know";
    let length = "a page has data of a length that its codec does not write";
    let old = |gfn: u64, codec: u64| gfn | codec << 52;
    let new = |gfn: u64, codec: u64, length: u64| gfn | codec << 40 | length << 48;
    assert_eq!(pages(1, 2, 4096, &[old(3, 0), old(4, 1)], 4096), Ok(()));
    assert_eq!(pages(2, 2, 4096, &[new(3, 0, 4096), new(4, 1, 0)], 4096), Ok(()));
    let raw = [(1, old(3, 0)), (2, new(3, 0, 4096))];
    for (version, word) in raw {
        for (count, data_len, words, data, why) in [
            (1, 4095, &[word][..], 4096, "the entries do not add up to the data's length (0xfff)"),
            (1, 4096, &[word], 4095, "the payload ends early, bytes missing (0x1)"),
            (1, 4096, &[word], 4097, "bytes are left over (0x1)"),
            (257, 0, &[], 0, "more pages than a section may have (0x101)"),
            (u32::MAX, 0, &[], 0, "more pages than a section may have (0xffffffff)"),
        ] {
            let expected = Err(format!("section Pages: {why}"));
            assert_eq!(pages(version, count, data_len, words, data), expected);
        }
    }
    for (version, word, why) in [
        (1, old(0, 2), format!("{unknown} (0x2)")),
        (1, old(0, 0x101), format!("{unknown} (0xff)")),
        (1, old(1 << 40, 0), "a page of an impossible frame (0x10000000000)".into()),
        (2, new(0, 2, 0), format!("{unknown} (0x2)")),
        (2, new(0, 0, 0), format!("{length} (0x0)")),
        (2, new(0, 0, 4095), format!("{length} (0xfff)")),
        (2, new(0, 0, 0xffff), format!("{length} (0xffff)")),
        (2, new(0, 1, 1), format!("{length} (0x1)")),
    ] {
        let found = pages(version, 1, 4096, &[word], 4096);
        assert_eq!(found, Err(format!("section Pages: {why}")), "{version} {word:#x}");
    }
}

#[test]
fn windows_that_make_no_sense_are_refused() {
    let parse = |kind, words: [&[u8]; 5]| {
        Message::parse_payload(kind, kind.version(), &words.concat())
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    let two = |n: u16| n.to_le_bytes();
    let four = |n: u32| n.to_le_bytes();
    let eight = |n: u64| n.to_le_bytes();
    let sums = |zero, count, first, rest: &[u8]| {
        parse(SectionKind::DiskSums, [&two(0), &two(zero), &four(count), &eight(first), rest])
    };
    assert_eq!(sums(0, 1, 9, &[1; 32]), Ok(()));
    assert_eq!(sums(1, 16 * 1024, 9, &[]), Ok(()));
    for (zero, count, first, rest, why) in [
        (0, 1, 9, &[1; 31][..], "the payload ends early, bytes missing (0x1)"),
        (0, 1, 9, &[1; 33], "bytes are left over (0x1)"),
        (0, 257, 9, &[], "more sums than a section may have (0x101)"),
        (0, u32::MAX, 9, &[], "a window of too many chunks (0xffffffff)"),
        (1, 16 * 1024 + 1, 9, &[], "a window of too many chunks (0x4001)"),
        (1, 1, 9, &[0], "bytes are left over (0x1)"),
        (2, 1, 9, &[], "the zero flag is neither 0 nor 1 (0x2)"),
        (1, 1, u64::MAX, &[], "a window beyond every disk, first chunk (0xffffffffffffffff)"),
    ] {
        assert_eq!(sums(zero, count, first, rest), Err(format!("section DiskSums: {why}")));
    }
    let want = |length, count, positions: &[u16]| {
        let rest: Vec<u8> = positions.iter().flat_map(|at| at.to_le_bytes()).collect();
        parse(SectionKind::DiskWant, [&two(0), &two(length), &four(count), &eight(0), &rest])
    };
    assert_eq!(want(3, 9, &[0, 7, 8]), Ok(()));
    for (length, count, positions, why) in [
        (1, 9, &[9][..], "a wanted chunk is out of order or its window (0x9)"),
        (2, 9, &[5, 5], "a wanted chunk is out of order or its window (0x5)"),
        (2, 9, &[6, 5], "a wanted chunk is out of order or its window (0x5)"),
        (257, 1000, &[], "more chunks wanted than a window has (0x101)"),
        (2, 9, &[6], "the payload ends early, bytes missing (0x2)"),
        (1, 9, &[6, 7], "bytes are left over (0x2)"),
    ] {
        assert_eq!(want(length, count, positions), Err(format!("section DiskWant: {why}")));
    }
}

#[test]
fn frames_that_make_no_sense_are_refused() {
    let head = |length: u32, reserved: u16| {
        let parts =
            [&9u64.to_le_bytes()[..], &length.to_le_bytes(), &3u16.to_le_bytes(), &reserved.to_le_bytes()];
        parts.concat()
    };
    for kind in [SectionKind::Input, SectionKind::Output] {
        let parse = |payload: &[u8]| {
            let parsed = Message::parse_payload(kind, kind.version(), payload);
            parsed.map(|_| ()).map_err(|error| error.to_string())
        };
        assert_eq!(parse(&[]), Ok(()));
        assert_eq!(parse(&[&head(1, 0)[..], &[5]].concat()), Ok(()));
        let most = MAX_PACKET_BYTES as u32;
        assert_eq!(parse(&[&head(most, 0)[..], &vec![5; MAX_PACKET_BYTES]].concat()), Ok(()));
        for (length, reserved, rest, why) in [
            (0, 0, &[][..], "a packet of an impossible length (0x0)"),
            (most + 1, 0, &[], "a packet of an impossible length (0x1001e)"),
            (u32::MAX, 0, &[], "a packet of an impossible length (0xffffffff)"),
            (2, 0, &[1], "the payload ends early, bytes missing (0x1)"),
            (2, 0, &[1, 1, 1], "the payload ends early, bytes missing (0xf)"),
            (2, 0x700, &[1, 1], "a reserved field is not zero (0x7)"),
        ] {
            let found = parse(&[&head(length, reserved)[..], rest].concat());
            assert_eq!(found, Err(format!("section {kind:?}: {why}")));
        }
    }
    let released = |payload: &[u8]| Message::parse_payload(SectionKind::Released, 1, payload).is_ok();
    assert!(released(&[0xff; 8]) && !released(&[0; 7]) && !released(&[0; 9]));
}

#[test]
fn frames_are_put_together_as_far_as_there_is_room() {
    let mut frames = TailBuf::default();
    let packets: Vec<Vec<u8>> = (1..200).map(|number| vec![number as u8; number * 400]).collect();
    fn frame(packet: &[u8]) -> TailFrame<'_> {
        TailFrame { epoch: 5, pair: 2, packet }
    }
    assert!(!frames.push(frame(&[])) && !frames.push(frame(&vec![0; MAX_PACKET_BYTES + 1])));
    let fit = packets.iter().take_while(|packet| frames.push(frame(packet))).count();
    assert!(fit > 10 && frames.len() <= MAX_FRAMES_BYTES && !frames.is_empty());
    let (mut out, mut encoder) = (Vec::new(), Encoder::speaking(ProtocolVersion::V6));
    encoder.input(&mut out, &frames).unwrap();
    let message = Message::parse_payload(SectionKind::Input, 1, &out[HEADER_LEN..]).unwrap();
    let Message::Input(read) = message else { panic!("{message:?}") };
    assert!(read.iter().eq(packets[..fit].iter().map(|packet| frame(packet))));
    frames.clear();
    assert!(frames.push(frame(&vec![0; MAX_PACKET_BYTES])));
}

#[test]
fn sums_of_pages_that_make_no_sense_are_refused() {
    let parse = |spans: &[[u64; 3]], more: &[u8]| {
        let words = [7].into_iter().chain(spans.as_flattened().iter().copied());
        let payload: Vec<u8> = words.flat_map(u64::to_le_bytes).chain(more.iter().copied()).collect();
        Message::parse_payload(SectionKind::Audit, 1, &payload).map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(parse(&[[64, 1, 0], [128, u64::MAX, 3]], &[]), Ok(()));
    assert_eq!(parse(&[], &[]), Ok(()));
    for (spans, more, why) in [
        (&[[65, 1, 0]][..], &[][..], "a span that begins at no multiple of 64 (0x41)"),
        (&[[u64::MAX - 63, 1, 0]], &[], "a span that begins at no multiple of 64 (0xffffffffffffffc0)"),
        (&[[64, 0, 9]], &[], "a span without pages (0x40)"),
        (&[[64, 1, 0]], &[1, 2], "bytes are left over (0x2)"),
        (&[[64, 1, 0]; MAX_AUDIT_SPANS + 1], &[], "more spans than a section may have (0x401)"),
    ] {
        assert_eq!(parse(spans, more), Err(format!("section Audit: {why}")));
    }
}

#[test]
fn sights_of_the_arbiter_that_make_no_sense_are_refused() {
    let parse = |payload: &[u8]| {
        let parsed = Message::parse_payload(SectionKind::ArbiterSight, 1, payload);
        parsed.map(drop).map_err(|error| error.to_string())
    };
    assert_eq!(parse(&[1, 0, 0, 0, 255, 255, 255, 255]), Ok(()));
    for (payload, why) in [
        (&[3, 0, 0, 0, 0, 0, 0, 0][..], "unknown sight of the arbiter (0x3)"),
        (&[1, 0, 4, 0, 0, 0, 0, 0], "a reserved field is not zero (0x4)"),
        (&[2, 0, 0, 0, 5, 0, 0, 0], "a reserved field is not zero (0x5)"),
        (&[2, 0, 0, 0, 0, 0, 0], "the payload ends early, bytes missing (0x1)"),
        (&[2, 0, 0, 0, 0, 0, 0, 0, 0], "bytes are left over (0x1)"),
    ] {
        assert_eq!(parse(payload), Err(format!("section ArbiterSight: {why}")));
    }
}

#[test]
fn sums_of_chunks_that_make_no_sense_are_refused() {
    /// Disk, reserved, count, first, sum.
    type Range = (u16, u16, u32, u64, u64);
    let bytes = |(disk, zero, count, first, sum): &Range| {
        let (head, tail) = ([*disk, *zero].map(u16::to_le_bytes), [*first, *sum].map(u64::to_le_bytes));
        [head.as_flattened(), &count.to_le_bytes(), tail.as_flattened()].concat()
    };
    let parse = |ranges: &[Range], more: &[u8]| {
        let head = 7u64.to_le_bytes();
        let payload: Vec<u8> =
            head.into_iter().chain(ranges.iter().flat_map(bytes)).chain(more.iter().copied()).collect();
        Message::parse_payload(SectionKind::DiskAudit, 1, &payload)
            .map(drop)
            .map_err(|error| error.to_string())
    };
    let beyond = i64::MAX as u64 / 65_536 + 1;
    assert_eq!(parse(&[(0, 0, 1, 0, 9), (u16::MAX, 0, MAX_AUDIT_CHUNKS, beyond - 1, 0)], &[]), Ok(()));
    assert_eq!(parse(&[], &[]), Ok(()));
    for (ranges, more, why) in [
        (&[(0, 0, 0, 0, 0)][..], &[][..], "a range of no chunks, or of too many (0x0)"),
        (&[(0, 0, MAX_AUDIT_CHUNKS + 1, 0, 0)], &[], "a range of no chunks, or of too many (0x41)"),
        (&[(0, 5, 1, 0, 0)], &[], "a reserved field that is not zero (0x5)"),
        (&[(0, 0, 1, beyond, 0)], &[], "a range beyond every disk, first chunk (0x800000000000)"),
        (&[(0, 0, 2, 3, 9)], &[], "several chunks that are not all zero, first chunk (0x3)"),
        (&[(0, 0, 1, 0, 0)], &[1, 2], "bytes are left over (0x2)"),
        (&[(0, 0, 1, 0, 0); MAX_AUDIT_RANGES + 1], &[], "more ranges than a section may have (0x41)"),
    ] {
        assert_eq!(parse(ranges, more), Err(format!("section DiskAudit: {why}")));
    }
    let word = |zero: u16, count: u32| {
        let words = [5u64, 6, 7, 8].map(u64::to_le_bytes);
        let payload = [words.as_flattened(), &bytes(&(3, zero, count, 8, 0))[..16]].concat();
        Message::parse_payload(SectionKind::DiskAudited, 1, &payload).map(|it| format!("{it:?}")).ok()
    };
    assert!(word(0, 0).unwrap().contains("differs: None"));
    assert!(word(0, 2).unwrap().contains("differs: Some(ChunkRange { disk: 3, first: 8, count: 2 })"));
    assert_eq!((word(1, 0), word(0, MAX_AUDIT_CHUNKS + 1)), (None, None));
}

#[test]
fn an_older_stream_has_no_audits() {
    let (mut out, mut encoder) = (Vec::new(), Encoder::speaking(ProtocolVersion::V6));
    let errors = [
        encoder.audit(&mut out, &[]),
        encoder.audited(&mut out, &Audited::default()),
        encoder.arbiter_sight(&mut out, ArbiterSight::Seen),
        encoder.disk_audit(&mut out, &[]),
        encoder.disk_audited(&mut out, &DiskAudited::default()),
    ];
    assert!(errors.iter().all(|it| matches!(it, Err(EncodeError::Order(_)))) && out.is_empty());
    let mut encoder = Encoder::speaking(ProtocolVersion::V7);
    let outside = [encoder.audit(&mut out, &[]), encoder.disk_audit(&mut out, &[])];
    assert!(outside.iter().all(|it| matches!(it, Err(EncodeError::Order(_)))) && out.is_empty());
}

/// An older standby must never see what it does not know.
#[test]
fn an_older_stream_has_no_frames() {
    let mut encoder = Encoder::speaking(ProtocolVersion::V5);
    let (mut out, frames) = (Vec::new(), TailBuf::default());
    let errors =
        [encoder.input(&mut out, &frames), encoder.output(&mut out, &frames), encoder.released(&mut out, 3)];
    assert!(errors.iter().all(|it| matches!(it, Err(EncodeError::Order(_)))) && out.is_empty());
}

#[test]
fn devices_that_make_no_sense_are_refused() {
    let mut out = Vec::new();
    let mut one = hello();
    one.devices.truncate(1);
    // In this version nothing may follow the last field.
    let old = ProtocolVersion::V2;
    Encoder::speaking(old).hello(&mut out, &one).unwrap();
    let payload = &out[HEADER_LEN..];
    let text_at = payload.windows(6).position(|w| w == b"golden").unwrap() - 2;
    let device = text_at - 16;
    assert_eq!(payload[device], DeviceKind::Net as u8);
    for (at, byte, why) in [
        (device - 1, 33, "more devices than a VM has (0x21)"),
        (device, 0, "unknown kind of device (0x0)"),
        (device, 6, "unknown kind of device (0x6)"),
        (device + 1, 1, "a reserved field is not zero (0x1)"),
        (device + 2, 8, "unknown device flags (0x8)"),
        (device + 13, 0x80, "a disk larger than every disk (0x8000000000000000)"),
        (device + 14, 21, "a text is longer than its limit (0x15)"),
        (payload.len() - 25, 17, "more ancestors than a VM remembers (0x11)"),
        (payload.len() - 25, 2, "the payload ends early, bytes missing (0x18)"),
        (payload.len() - 25, 0, "bytes are left over (0x18)"),
    ] {
        let mut wrong = payload.to_vec();
        wrong[at] = byte;
        let error = Message::parse_payload(SectionKind::Hello, SectionKind::Hello.version_in(old), &wrong)
            .map(|_| ())
            .map_err(|e| e.to_string());
        assert_eq!(error, Err(format!("section Hello: {why}")), "{at}");
    }
}

/// What is counted from a peer's generation must not overflow.
#[test]
fn a_generation_beyond_every_vms_is_refused() {
    let parse = |generation| {
        let mut out = Vec::new();
        Encoder::new().hello(&mut out, &Hello { generation, ..hello() }).unwrap();
        let payload = &out[HEADER_LEN..];
        let parsed = Message::parse_payload(SectionKind::Hello, SectionKind::Hello.version(), payload);
        parsed.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(parse(MAX_GENERATION), Ok(()));
    for (beyond, named) in [(MAX_GENERATION + 1, "0x4000000000000001"), (u64::MAX, "0xffffffffffffffff")] {
        let why = format!("section Hello: a generation that no VM comes to ({named})");
        assert_eq!(parse(beyond), Err(why));
    }
}

#[test]
fn state_sections_that_make_no_sense_are_refused() {
    let state = |kind: u16, reserved: u16, bytes: usize| {
        let mut payload = 1u64.to_le_bytes().to_vec();
        [kind, 1, 0, reserved].iter().for_each(|half| payload.extend_from_slice(&half.to_le_bytes()));
        payload.resize(payload.len() + bytes, 7);
        let parsed = Message::parse_payload(SectionKind::State, SectionKind::State.version(), &payload);
        parsed.map(|_| ()).map_err(|error| error.to_string())
    };
    for kind in StateKind::ALL {
        assert_eq!(state(kind as u16, 0, kind.limit()), Ok(()));
        let long = format!("a state section of more bytes than its kind has ({:#x})", kind.limit() + 1);
        assert_eq!(state(kind as u16, 0, kind.limit() + 1), Err(format!("section State: {long}")));
    }
    for (kind, reserved, why) in [
        (0, 0, "a state section of an unknown kind (0x0)"),
        (7, 0, "a state section of an unknown kind (0x7)"),
        (u16::MAX, 0, "a state section of an unknown kind (0xffff)"),
        (1, 5, "a reserved field is not zero (0x5)"),
    ] {
        assert_eq!(state(kind, reserved, 9), Err(format!("section State: {why}")));
    }
    let mut out = Vec::new();
    let mut encoder = Encoder::new();
    encoder.checkpoint_begin(&mut out, &begin(1, 0, 0, BASE)).unwrap();
    let bytes = vec![0; StateKind::Check.limit() + 1];
    let error = encoder
        .state_head(&mut out, &StateSection { kind: StateKind::Check, version: 1, index: 0, bytes: &bytes });
    assert!(matches!(error, Err(EncodeError::TooLong { .. })), "{error:?}");
}
