//! Drivers that break the rules.

use proptest::prelude::*;

use super::super::RngState;
use super::*;
use crate::devices::virtio::persist::{DecodeError, SavedState};

#[test]
fn broken_drivers_stop_the_device_alone() {
    let rig = rig();
    rig.device.go_live(false);
    hostile(&rig, 1, 0, WRITE, works);
}

#[test]
fn an_empty_buffer_is_refused() {
    let rig = rig();
    rig.boot(1);
    rig.device.go_live(false);
    rig.ring(0).put(0, Descriptor::new(BUFFERS, 0, WRITE, 0));
    rig.ring(0).offer(0);
    rig.kick(0);
    wait_for("the device to stop", || rig.needs_reset());
}

#[test]
fn states_of_no_device_are_refused() {
    let rig = rig();
    rig.boot(1);
    let good = rig.saved();
    for len in 0..good.len() {
        assert_eq!(SavedState::<RngState>::decode(&good[..len]), Err(DecodeError::Short));
    }
    assert!(rig.device.restore(&[&good[..], &[0]].concat()).is_err());
    let mut version = good.clone();
    version[0] = 9;
    assert!(rig.device.restore(&version).is_err());
    let mut kind = good.clone();
    kind[2] = 3;
    assert!(rig.device.restore(&kind).is_err());
    rig.device.restore(&good).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_driver_breaks_the_device((rings, registers) in any_guest()) {
        let rig = rig();
        rig.device.go_live(false);
        let other = |memory: &Arc<Memory>| {
            Rig::on(memory.clone(), |host| RngDevice::with_source(Counter::default(), host).unwrap())
        };
        fuzz(&rig, other, 1, &rings, &registers, works);
    }
}
