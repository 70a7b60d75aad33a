//! Damage of every kind: it is refused, never causes a panic, and never results in a whole checkpoint that is
//! not the one that was sent.

use crate::common::{Content, receive, small_stream};
use outlive_epoch::{
    CheckpointFlags, DISK_RECORD_LEN, DiskOp, Encoder, HEADER_LEN, Message, PREFACE_LEN, SectionHeader,
    SectionKind, StateKind, UncheckedRecords,
};
use proptest::prelude::*;

/// Whether the accepted checkpoints are a beginning of those that were sent.
fn is_beginning(received: &[Content], sent: &[Content]) -> bool {
    received.len() <= sent.len() && received.iter().zip(sent).all(|(a, b)| a == b)
}

#[test]
fn every_single_bit_flip_is_refused() {
    let (stream, sent) = small_stream();
    for at in 0..stream.len() {
        for bit in 0..8 {
            let mut damaged = stream.clone();
            damaged[at] ^= 1 << bit;
            let (received, refusal) = receive(&damaged);
            assert!(refusal.is_some(), "byte {at} bit {bit} went unnoticed");
            assert!(is_beginning(&received, &sent), "byte {at} bit {bit} changed a checkpoint");
        }
    }
}

#[test]
fn every_truncation_ends_between_sections_or_is_refused() {
    let (stream, sent) = small_stream();
    let mut proper_ends = 0;
    for length in 0..stream.len() {
        let (received, refusal) = receive(&stream[..length]);
        assert!(is_beginning(&received, &sent));
        assert!(received.len() < sent.len() || length >= boundaries(&stream)[boundaries(&stream).len() - 2]);
        proper_ends += usize::from(refusal.is_none());
    }
    // After the preface and after each section but the last; an empty stream is "closed before the preface".
    assert_eq!(proper_ends, boundaries(&stream).len() - 1);
}

/// Where the preface and the sections of a valid stream end.
fn boundaries(stream: &[u8]) -> Vec<usize> {
    let mut ends = vec![PREFACE_LEN];
    while let Some(header) =
        stream.get(ends[ends.len() - 1]..).and_then(|rest| rest.first_chunk::<HEADER_LEN>())
    {
        let header = SectionHeader::parse(header).unwrap();
        ends.push(ends[ends.len() - 1] + HEADER_LEN + header.length as usize);
    }
    ends
}

#[test]
fn sections_lost_doubled_or_swapped_are_refused() {
    let (stream, sent) = small_stream();
    let ends = boundaries(&stream);
    let sections: Vec<&[u8]> = ends.windows(2).map(|pair| &stream[pair[0]..pair[1]]).collect();
    let join = |order: &[usize]| -> Vec<u8> {
        let mut joined = stream[..PREFACE_LEN].to_vec();
        order.iter().for_each(|index| joined.extend_from_slice(sections[*index]));
        joined
    };
    let all: Vec<usize> = (0..sections.len()).collect();
    assert_eq!(receive(&join(&all)), (sent.clone(), None));
    for index in 0..sections.len() - 1 {
        let mut lost = all.clone();
        lost.remove(index);
        let mut doubled = all.clone();
        doubled.insert(index, index);
        let mut swapped = all.clone();
        swapped.swap(index, index + 1);
        for order in [lost, doubled, swapped] {
            let (received, refusal) = receive(&join(&order));
            assert!(refusal.is_some_and(|why| why.contains("section number")), "order {order:?}");
            assert!(is_beginning(&received, &sent));
        }
    }
}

/// Totals and chain catch a peer that leaves sections out and numbers the others anew.
#[test]
fn a_checkpoint_with_sections_of_another_is_refused() {
    let flags = CheckpointFlags { base_final: true, end: None, hand_over: false };
    let one = Content::new(7, flags, &[1, 2, 3, 4]);
    let mut other = one.clone();
    other.pages[1].1.as_mut().unwrap()[9] ^= 1;
    let [a, b] = [&one, &other].map(|content| {
        let mut out = outlive_epoch::Preface::CURRENT.encode().to_vec();
        content.encode(&mut Encoder::new(), &mut out, 2);
        out
    });
    let ends = boundaries(&a);
    // The second section of b (pages 1 and 2 with other bytes, valid in itself) in place of a's.
    let mixed = [&a[..ends[1]], &b[ends[1]..ends[2]], &a[ends[2]..]].concat();
    let (received, refusal) = receive(&mixed);
    assert!(received.is_empty());
    assert!(refusal.is_some_and(|why| why.contains("chain")), "only the chain can see this");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_checkpoint_arrives_as_it_was_sent(
        number in 0..u64::MAX,
        gfns in proptest::collection::btree_set(prop_oneof![0u64..1000, 0x10_0000u64..0x10_0000 + 1000], 0..40),
        per_section in 1usize..30,
        state in proptest::collection::btree_map((0usize..6, 0u16..9), proptest::collection::vec(any::<u8>(), 0..200), 0..8),
    ) {
        let flags = CheckpointFlags { base_final: true, end: None, hand_over: false };
        let mut content = Content::new(number, flags, &gfns.into_iter().collect::<Vec<_>>());
        content.state = state.into_iter().map(|((kind, index), bytes)| (StateKind::ALL[kind], 1, index, bytes)).collect();
        let mut stream = outlive_epoch::Preface::CURRENT.encode().to_vec();
        content.encode(&mut Encoder::new(), &mut stream, per_section);
        prop_assert_eq!(receive(&stream), (vec![content], None));
    }

    #[test]
    fn random_bytes_never_make_a_payload_panic(kind in 0usize..16, version in 1u16..4, payload in proptest::collection::vec(any::<u8>(), 0..700)) {
        let message = Message::parse_payload(SectionKind::ALL[kind], version, &payload);
        if let Ok(Message::DiskWrites { writes: it, .. } | Message::DiskBlocks { blocks: it, .. }) = message {
            let _ = it.check(&[u64::MAX; 9]);
        }
    }

    #[test]
    fn random_bytes_are_never_more_records_than_they_have_room_for(
        heads in proptest::collection::vec((0u16..4, 0u16..5, any::<u64>(), 0u64..40), 0..20),
    ) {
        // Random heads one after another; the heads that follow are their data.
        let mut bytes = Vec::new();
        for (disk, op, offset, len) in heads {
            bytes.extend_from_slice(&[disk.to_le_bytes(), op.to_le_bytes(), [0; 2], [0; 2]].concat());
            bytes.extend_from_slice(&(offset >> (offset % 64)).to_le_bytes());
            bytes.extend_from_slice(&len.to_le_bytes());
        }
        if let Ok(records) = UncheckedRecords::new(&bytes).check(&[1 << 62; 4]) {
            let data: u64 = records.iter().map(|it| if let DiskOp::Data(_) = it.op { it.len() } else { 0 }).sum();
            prop_assert_eq!(records.iter().count() * DISK_RECORD_LEN + data as usize, bytes.len());
        }
    }

    /// Wrong fields with right checksums: a peer that makes a mistake.
    #[test]
    fn a_wrong_byte_with_right_checksums_never_panics(at in any::<proptest::sample::Index>(), xor in 1u8..=255) {
        let (stream, _) = small_stream();
        let ends = boundaries(&stream);
        let mut damaged = stream.clone();
        let at = PREFACE_LEN + at.index(stream.len() - PREFACE_LEN);
        damaged[at] ^= xor;
        let section = ends.iter().rposition(|end| *end <= at).unwrap();
        let (start, end) = (ends[section], ends[section + 1]);
        let crc = crc32fast::hash(&damaged[start + HEADER_LEN..end]);
        if at >= start + HEADER_LEN {
            damaged[start + 12..start + 16].copy_from_slice(&crc.to_le_bytes());
        }
        let crc = crc32fast::hash(&damaged[start..start + 28]);
        damaged[start + 28..start + 32].copy_from_slice(&crc.to_le_bytes());
        receive(&damaged);
    }
}
