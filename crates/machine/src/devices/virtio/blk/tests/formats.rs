//! The bytes of the saved state and of the configuration space.

use proptest::prelude::*;

use super::super::persist::{BlockState, DiskFacts, DiskState, InFlight};
use super::*;
use crate::devices::virtio::persist::{DecodeError, TransportState};

fn state() -> BlockState {
    let facts = DiskFacts {
        sectors: 0x0102_0304_0506_0708,
        shared: true,
        writeback: false,
        serial: *b"serial serial serial",
    };
    let in_flight = vec![InFlight { queue: 1, head: 0x203 }, InFlight { queue: 4, head: 5 }];
    BlockState {
        device: DiskState { facts, in_flight },
        transport: TransportState { device_type: 2, queue_count: 1, ..Default::default() },
    }
}

#[test]
fn the_state_is_written_as_it_always_was() {
    let mut bytes = Vec::new();
    state().encode(&mut bytes);
    let mut expected = vec![1, 0, 8, 7, 6, 5, 4, 3, 2, 1, 1, 0];
    expected.extend_from_slice(b"serial serial serial");
    expected.extend_from_slice(&[2, 0, 1, 0, 3, 2, 4, 0, 5, 0]);
    state().transport.encode(&mut expected);
    assert_eq!(bytes, expected);
    assert_eq!(BlockState::decode(&bytes), Ok(state()));
    assert!(bytes.len() <= BlockState::BYTES);
}

#[test]
fn bytes_that_are_no_state_are_refused() {
    let mut good = Vec::new();
    state().encode(&mut good);
    for len in 0..good.len() {
        assert_eq!(BlockState::decode(&good[..len]), Err(DecodeError::Short), "{len}");
    }
    let changed = |at: usize, value| {
        let mut bytes = good.clone();
        bytes[at] = value;
        BlockState::decode(&bytes)
    };
    assert_eq!(changed(0, 2), Err(DecodeError::Version { found: 2, known: 1 }));
    assert_eq!(changed(10, 2), Err(DecodeError::Value { field: "shared", value: 2 }));
    assert_eq!(changed(11, 7), Err(DecodeError::Value { field: "writeback", value: 7 }));
    let count = DecodeError::Value { field: "requests in flight", value: 0x102 };
    assert_eq!(changed(33, 1), Err(count));
    good.push(0);
    assert_eq!(BlockState::decode(&good), Err(DecodeError::Trailing(1)));
}

proptest! {
    /// Any bytes: no panic, and whatever is read is written back the same.
    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..300), version in any::<bool>()) {
        let mut bytes = bytes;
        if version && bytes.len() > 34 {
            bytes[..2].copy_from_slice(&[1, 0]);
            bytes[10] &= 1;
            bytes[11] &= 1;
            bytes[32] &= 7;
            bytes[33] = 0;
        }
        if let Ok(state) = BlockState::decode(&bytes) {
            let mut again = Vec::new();
            state.encode(&mut again);
            prop_assert_eq!(again, bytes);
        }
    }
}

#[test]
fn the_configuration_space() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 5 << 30);
    let rig = Rig::new(&memory, &DiskOptions { queues: 3, ..DiskOptions::new(&path) });
    assert_eq!(rig.read(0x08), 2, "a block device");
    let mut space = [0xee; 80];
    rig.registers.lock().unwrap().read(0x100, &mut space);
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| space[at + i]));
    assert_eq!((word(0), word(4)), (10 << 20, 0), "capacity");
    assert_eq!((word(8), word(12), word(20)), (32768, 126, 512), "size_max, seg_max, blk_size");
    assert_eq!(space[24..32], [3, 0, 8, 0, 0, 0, 0, 0], "topology");
    assert_eq!(space[32..36], [1, 0, 3, 0], "writeback, queues");
    assert_eq!((word(36), word(40), word(44)), (1 << 21, 16, 8), "discard");
    assert_eq!((word(48), word(52), space[56]), (1 << 17, 16, 1), "write zeroes");
    assert!(space[57..].iter().all(|&byte| byte == 0));
    let mut capacity = [0; 8];
    rig.registers.lock().unwrap().read(0x100, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 10 << 20);
    // Only `writeback` can be written, and only with a valid value.
    for (offset, value) in
        [(0x100, &[1u8, 2, 3, 4][..]), (0x120, &[2]), (0x120, &[0, 0, 0, 0]), (0x122, &[9])]
    {
        rig.registers.lock().unwrap().write(offset, value);
        let mut now = [0xee; 80];
        rig.registers.lock().unwrap().read(0x100, &mut now);
        assert_eq!(now, space);
    }
    assert_eq!(rig.offered() & F_RO, 0);
}
