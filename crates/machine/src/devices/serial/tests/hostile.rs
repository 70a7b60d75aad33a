//! Drivers and saved states that make no sense.

use proptest::prelude::*;

use super::super::SerialState;
use super::super::persist::FIFO;
use super::*;
use crate::bus::Bus;
use crate::devices::virtio::persist::DecodeError;
use crate::map::ports::COM1;

/// The entry of a fuzz target: the guest's accesses and what is typed, as bytes. Each step is a register, a
/// kind of access and a value. Whatever they are, the port works afterwards and its state can be taken over.
fn fuzz(steps: &[u8]) {
    let rig = Rig::live();
    let mut bus = Bus::new();
    bus.insert(COM1.first.into(), COM1.count.into(), rig.registers.clone()).unwrap();
    for step in steps.chunks_exact(3) {
        let (address, value) = (u64::from(COM1.first) + u64::from(step[0] % 10), step[2]);
        match step[1] % 8 {
            0..3 => _ = bus.write(address, &[value]),
            3..5 => _ = bus.read(address, &mut [value]),
            5 => _ = bus.write(address, &[value, step[0], value, step[1]]),
            6 => _ = bus.read(address, &mut [0; 8]),
            _ => _ = rig.end.input.push(&vec![value; usize::from(value) * 4]),
        }
    }
    rig.gate.close();
    let state = rig.saved();
    let other = Rig::new();
    other.port.restore(&state).unwrap();
    assert_eq!(other.saved(), state);
    rig.port.reset();
    rig.gate.open();
    rig.write(DATA, b'!');
    assert_eq!(rig.output().last(), Some(&b'!'));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn no_driver_breaks_the_port(steps in prop::collection::vec(any::<u8>(), 0..600)) {
        fuzz(&steps);
    }

    #[test]
    fn no_state_breaks_the_port(mut state in prop::collection::vec(any::<u8>(), SerialState::BYTES), count in 0u8..66) {
        state[..2].copy_from_slice(&[1, 0]);
        let rig = Rig::new();
        let _ = rig.port.restore(&state);
        // Nearer to one that is right.
        let [ier, lcr, mcr] = [state[4] & 15, state[6], state[8]];
        state[4..12].copy_from_slice(&[ier, 1, lcr, 0x60 | u8::from(count > 0), mcr, 0xb0, 0, count]);
        state[12 + usize::from(count).min(FIFO)..].fill(0);
        prop_assert_eq!(rig.port.restore(&state).is_ok(), usize::from(count) <= FIFO);
        rig.port.go_live();
        rig.write(LCR, 3);
        prop_assert!(rig.drain().len() <= FIFO);
    }
}

#[test]
fn states_of_no_port_are_refused_and_change_nothing() {
    let rig = Rig::live();
    rig.write(IER, RECEIVED);
    rig.type_in(b"keep");
    let good = rig.saved();
    for len in 0..good.len() {
        assert_eq!(rig.port.restore(&good[..len]).unwrap_err().0, DecodeError::Short);
    }
    let long = [&good[..], &[0]].concat();
    assert_eq!(rig.port.restore(&long).unwrap_err().0, DecodeError::Trailing(1));
    for (at, value) in [(0, 9), (4, 0x10), (5, 0), (5, 0x81), (7, 0x60), (7, 0x63), (9, 1), (11, 65), (20, 1)]
    {
        let mut bad = good.clone();
        bad[at] = value;
        assert!(rig.port.restore(&bad).is_err(), "byte {at} = {value:#x}");
    }
    assert_eq!(rig.saved(), good);
    assert_eq!(rig.drain(), b"keep");
}

#[test]
fn accesses_past_the_last_register_reach_nothing() {
    let rig = Rig::live();
    let mut bus = Bus::new();
    bus.insert(COM1.first.into(), COM1.count.into(), rig.registers.clone()).unwrap();
    let mut data = [0; 4];
    assert!(!bus.read(0x3fd, &mut data));
    assert!(!bus.write(0x400, &[1]));
    assert_eq!(data, [0xff; 4]);
}
