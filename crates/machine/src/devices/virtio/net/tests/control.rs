//! Commands, what they change, and the announcement that the device asks for.

use super::*;
use crate::devices::virtio::net::Settings;
use crate::devices::virtio::net::control::{Allowed, execute};
use crate::devices::virtio::net::offload::{
    CTRL_GUEST_OFFLOADS, CTRL_MAC_ADDR, CTRL_RX, CTRL_VQ, GUEST_ANNOUNCE, GUEST_CSUM, GUEST_TSO4, MQ,
};

const CONTROLLED: u64 = FEATURES | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR | GUEST_ANNOUNCE;
const OK: u8 = 0;
const REFUSED: u8 = 1;

fn announce_asked(rig: &Rig<'_>) -> bool {
    let mut status = [0; 2];
    rig.device.registers().lock().unwrap().read(0x106, &mut status);
    assert_eq!(status[0] & 1, 1, "the link is up");
    status[0] & 2 != 0
}

#[test]
fn commands_do_what_they_say_or_nothing() {
    let all = CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR | CTRL_GUEST_OFFLOADS | GUEST_ANNOUNCE | MQ;
    let features = all | GUEST_CSUM | GUEST_TSO4;
    let start = Settings { announce: true, ..Settings::new(MAC) };
    let asked = |features, pairs, command: &[u8]| {
        let mut settings = start;
        let answer = execute(command, Allowed { features, pairs }, &mut settings);
        (answer, settings)
    };
    let does = |command: &[u8], expected: Settings| {
        assert_eq!(asked(features, 4, command), (OK, expected), "{command:?}");
        assert_eq!(asked(features & !all, 4, command), (REFUSED, start), "without its feature: {command:?}");
        for len in 0..command.len() {
            assert_eq!(asked(features, 4, &command[..len]), (REFUSED, start), "{len} of {command:?}");
        }
        let longer = [command, &[0]].concat();
        assert_eq!(asked(features, 4, &longer), (REFUSED, start), "{longer:?}");
    };
    does(&[0, 0, 1], Settings { promiscuous: true, ..start });
    does(&[0, 1, 1], Settings { all_multicast: true, ..start });
    does(&[1, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0x5e, 0, 0, 1], start);
    does(&[1, 1, 2, 3, 4, 5, 6, 7], Settings { mac: MacAddr([2, 3, 4, 5, 6, 7]), ..start });
    does(&[3, 0], Settings { announce: false, ..start });
    does(&[4, 0, 4, 0], Settings { pairs: 4, ..start });
    does(&[5, 0, 0x82, 0, 0, 0, 0, 0, 0, 0], Settings { offloads: 0x82, ..start });
    // TSO needs the checksum.
    does(&[5, 0, 0x80, 0, 0, 0, 0, 0, 0, 0], start);

    let refused = |command: &[u8]| assert_eq!(asked(features, 4, command), (REFUSED, start), "{command:?}");
    refused(&[0, 0, 2]);
    refused(&[0, 2, 1]); // CTRL_RX_EXTRA
    refused(&[1, 1, 1, 0, 0, 0, 0, 0]); // a group
    refused(&[1, 1, 0, 0, 0, 0, 0, 0]);
    refused(&[1, 0, 255, 255, 255, 255, 0, 0, 0, 0]); // more addresses than bytes
    refused(&[2, 0, 1, 0]); // VLAN
    refused(&[4, 0, 0, 0]);
    refused(&[4, 0, 5, 0]);
    refused(&[4, 1, 1, 0]); // RSS
    refused(&[5, 0, 0x83, 1, 0, 0, 0, 0, 0, 0]); // TSO6, not accepted
    refused(&[255, 255]);
}

#[test]
fn the_driver_asks_over_the_control_queue() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let (_, control) = rig.boot_with_control(CONTROLLED, 2);
    rig.device.go_live(false);
    assert_eq!(control.ask(0, 0, &[1]), OK);
    assert_eq!(control.ask(1, 1, &[2, 0, 0, 0, 0, 9]), OK);
    assert_eq!(control.ask(1, 1, &[1, 0, 0, 0, 0, 9]), REFUSED);
    assert_eq!(control.ask(4, 0, &[1, 0]), REFUSED, "not offered with one pair");
    assert_eq!(control.ask(9, 9, &[7; 60_000]), REFUSED);
    assert_eq!(control.ask(0, 0, &[]), REFUSED);
    assert_eq!(rig.device.mac(), MacAddr([2, 0, 0, 0, 0, 9]));
    let mut config = [0; 6];
    rig.device.registers().lock().unwrap().read(0x100, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 9]);
    assert!(rig.device.state().device.settings.promiscuous && !rig.needs_reset());
    // What a driver has set ends with it.
    rig.write(0x70, 0);
    assert_eq!(rig.device.state().device.settings, Settings::new(MAC));
}

#[test]
fn commands_the_device_stops_for() {
    for lay in [
        // No room for the answer.
        |ring: &Ring<'_>| ring.put(0, Descriptor::new(COMMANDS, 3, 0, 0)),
        |ring: &Ring<'_>| {
            ring.put(0, Descriptor::new(COMMANDS, 3, NEXT, 1));
            ring.put(1, Descriptor::new(ANSWERS, 0, WRITE, 0));
        },
        // A command behind the answer.
        |ring: &Ring<'_>| {
            ring.put(0, Descriptor::new(ANSWERS, 1, WRITE | NEXT, 1));
            ring.put(1, Descriptor::new(COMMANDS, 3, 0, 0));
        },
        // The answer outside of memory.
        |ring: &Ring<'_>| {
            ring.put(0, Descriptor::new(COMMANDS, 3, NEXT, 1));
            ring.put(1, Descriptor::new(MEMORY as u64, 1, WRITE, 0));
        },
        // Longer than any.
        |ring: &Ring<'_>| {
            ring.put(0, Descriptor::new(COMMANDS, 0x2_0000, NEXT, 1));
            ring.put(1, Descriptor::new(ANSWERS, 1, WRITE, 0));
        },
        // A loop.
        |ring: &Ring<'_>| ring.put(0, Descriptor::new(COMMANDS, 1, NEXT, 0)),
    ] {
        let memory = memory();
        let rig = Rig::usual(&memory);
        let (_, control) = rig.boot_with_control(CONTROLLED, 2);
        rig.device.go_live(false);
        lay(&control.ring);
        control.ring.offer(0);
        rig.write(0x50, 2);
        wait_for("the device to stop", || rig.needs_reset());
        assert_eq!(control.ring.used_index(), 0);
        let (_, control) = rig.boot_with_control(CONTROLLED, 2);
        assert_eq!(control.ask(0, 0, &[1]), OK);
    }
}

#[test]
fn a_command_without_class_is_refused() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let (_, control) = rig.boot_with_control(CONTROLLED, 2);
    rig.device.go_live(false);
    memory.write_slice(&[0xee], GuestAddress(ANSWERS)).unwrap();
    control.ring.put(0, Descriptor::new(ANSWERS, 1, WRITE, 0));
    control.ring.offer(0);
    rig.write(0x50, 2);
    wait_for("the answer", || control.ring.used_index() == 1);
    assert_eq!(memory.read_obj::<u8>(GuestAddress(ANSWERS)).unwrap(), REFUSED);
}

#[test]
fn a_machine_that_takes_over_has_the_driver_announce_it() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let (_, control) = rig.boot_with_control(CONTROLLED, 2);
    assert!(!announce_asked(&rig));
    rig.device.go_live(false);
    assert!(!announce_asked(&rig), "nothing has moved");
    let generation = rig.read(0xfc);
    rig.gate.close();
    rig.device.go_live(true);
    assert!(announce_asked(&rig));
    assert_eq!(rig.read(0x60) & 2, 2, "by a configuration interrupt");
    assert_ne!(rig.read(0xfc), generation);

    // Asked and not yet done is part of the state.
    let mut saved = Vec::new();
    rig.device.save(&mut saved);
    rig.device.take_over(&saved).unwrap();
    assert!(announce_asked(&rig));
    rig.gate.open();
    assert_eq!(control.ask(3, 0, &[]), OK);
    assert!(!announce_asked(&rig));
    assert_eq!(control.ask(3, 0, &[]), OK, "once more does no harm");
}

#[test]
fn a_driver_that_does_not_know_how_is_not_asked() {
    for features in [CONTROLLED & !GUEST_ANNOUNCE, CONTROLLED & !CTRL_VQ] {
        let memory = memory();
        let rig = Rig::usual(&memory);
        let _driver = rig.boot_with_control(features, 2);
        rig.device.go_live(true);
        assert!(!announce_asked(&rig));
        assert_eq!(rig.read(0x60) & 2, 0);
    }
    let memory = memory();
    let rig = Rig::usual(&memory);
    let _driver = rig.boot(CONTROLLED);
    rig.device.go_live(true);
    assert!(!announce_asked(&rig), "without a control queue it could not answer");
}

#[test]
fn settings_that_no_driver_can_have_made_are_refused() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let _driver = rig.boot(FEATURES);
    let good = rig.device.state();
    let refused = |change: fn(&mut Settings)| {
        let mut state = good;
        change(&mut state.device.settings);
        let mut bytes = Vec::new();
        state.encode(&mut bytes);
        let error = rig.device.take_over(&bytes).unwrap_err().to_string();
        assert!(error.contains("impossible"), "{error}");
        assert_eq!(rig.read(0x70), 0);
    };
    refused(|settings| settings.pairs = 0);
    refused(|settings| settings.pairs = 2);
    refused(|settings| settings.offloads = 2);
    refused(|settings| settings.announce = true);
    let mut bytes = Vec::new();
    good.encode(&mut bytes);
    rig.device.take_over(&bytes).unwrap();
}
