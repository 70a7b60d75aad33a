//! The small parts on their own.

use proptest::prelude::*;

use super::super::pool::Pool;
use super::super::{CHUNK, ChunkSet};

#[test]
fn buffers_are_bounded_and_used_again() {
    let mut pool = Pool::new(8 << 20);
    let sizes = [0, 1, 4096, 4097, 65536, (4 << 20) - (64 << 10)];
    for _ in 0..3 {
        let buffers: Vec<_> = sizes.iter().map(|&len| pool.lend(len).unwrap()).collect();
        for (buffer, len) in buffers.iter().zip(sizes) {
            assert!(buffer.len() >= len && (len == 0 || buffer.len() < (2 * len).max(4097)));
        }
        assert_eq!(pool.bytes(), 4096 + 4096 + 8192 + 65536 + (4 << 20));
        buffers.into_iter().for_each(|buffer| pool.give_back(buffer));
    }
    // Small unused buffers make room for large ones, buffers in use do not.
    let large: Vec<_> = (0..2).map(|_| pool.lend(4 << 20).unwrap()).collect();
    assert_eq!(pool.bytes(), 8 << 20);
    assert!(pool.lend(1).is_none());
    large.into_iter().for_each(|buffer| pool.give_back(buffer));
    let small: Vec<_> = (0..1024).map(|_| pool.lend(4096).unwrap()).collect();
    assert!(pool.lend(4 << 20).is_some_and(|buffer| buffer.len() == 4 << 20));
    assert_eq!((small.len(), pool.bytes()), (1024, 8 << 20));
}

#[test]
fn the_largest_buffer_is_always_to_be_had() {
    assert!(Pool::new(0).lend(4 << 20).is_some());
}

proptest! {
    #[test]
    fn a_set_of_chunks_is_a_set(
        bytes in 0u64..(300 * CHUNK),
        ranges in prop::collection::vec((0u64..(310 * CHUNK), 0u64..(5 * CHUNK)), 0..20),
        removed in prop::collection::vec(0u64..310, 0..20),
    ) {
        let mut set = ChunkSet::for_disk(bytes);
        let mut model = std::collections::BTreeSet::new();
        for (offset, len) in ranges {
            set.insert_bytes(offset, len);
            model.extend((0..bytes.div_ceil(CHUNK)).filter(|chunk| {
                len > 0 && chunk * CHUNK < offset + len && offset < (chunk + 1) * CHUNK
            }));
        }
        for chunk in removed {
            set.remove(chunk);
            model.remove(&chunk);
        }
        prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
        prop_assert_eq!((set.count(), set.is_empty()), (model.len() as u64, model.is_empty()));
        prop_assert!((0..310).all(|chunk| set.contains(chunk) == model.contains(&chunk)));
        set.clear();
        prop_assert!(set.is_empty() && set.iter().next().is_none());
    }
}
