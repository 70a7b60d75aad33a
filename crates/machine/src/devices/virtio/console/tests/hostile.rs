//! Drivers that break the rules.

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::persist::{DecodeError, SavedState};

fn works(rig: &Rig<ConsoleDevice<Memory>>) {
    print(rig, b"fine");
}

#[test]
fn broken_drivers_stop_the_device_alone() {
    let setup = live();
    hostile(&setup.rig, 2, TX, 0, works);
    // Waiting input makes the device look at the receive queue.
    setup.end.input.push(&[b'k'; INPUT_BYTES]);
    hostile(&setup.rig, 2, RX, WRITE, |rig| {
        setup.end.input.push(b"k");
        listen(rig, 0, 1);
        assert_eq!(heard(rig, 0), b"k");
    });
}

#[test]
fn absurd_buffers_are_refused() {
    let setup = live();
    for (queue, len, flags) in [(TX, 65_537, 0), (TX, u32::MAX, 0), (RX, 0, WRITE)] {
        setup.rig.boot(2);
        setup.end.input.push(b"k");
        setup.rig.ring(queue).put(0, Descriptor::new(BUFFERS, len, flags, 0));
        setup.rig.ring(queue).offer(0);
        setup.rig.kick(queue);
        wait_for("the device to stop", || setup.rig.needs_reset());
    }
    assert_eq!(setup.output(), b"");
}

#[test]
fn states_of_no_device_are_refused() {
    let setup = live();
    let good = setup.rig.saved();
    for len in 0..good.len() {
        assert_eq!(SavedState::<ScreenSize>::decode(&good[..len]), Err(DecodeError::Short));
    }
    assert!(setup.rig.device.restore(&[&good[..], &[0]].concat()).is_err());
    for (at, value) in [(0, 9), (6, 4)] {
        let mut bad = good.clone();
        bad[at] = value;
        assert!(setup.rig.device.restore(&bad).is_err(), "byte {at}");
    }
    setup.rig.device.restore(&good).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn no_driver_breaks_the_device((rings, registers) in any_guest(), typed in 0..3000usize) {
        let setup = live();
        setup.end.input.push(&vec![b'k'; typed]);
        let other = |memory: &Arc<Memory>| {
            let end = PortEnd::new(Arc::new(Recorder::default())).unwrap();
            Rig::on(memory.clone(), |host| ConsoleDevice::new(end, host).unwrap())
        };
        fuzz(&setup.rig, other, 2, &rings, &registers, works);
    }
}
