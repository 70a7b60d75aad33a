//! Addresses, announcements and saved bytes.

use std::time::{Duration, Instant};

use super::*;
use crate::devices::virtio::net::announce::{Schedule, rarp};
use crate::devices::virtio::net::device::Net;
use crate::devices::virtio::net::mac::MacError;
use crate::devices::virtio::net::persist::NetState;
use crate::devices::virtio::persist::DecodeError;
use crate::devices::virtio::slot::RestoreError;

#[test]
fn mac_addresses_as_text() {
    assert_eq!("52:54:00:ab:CD:ef".parse(), Ok(MAC));
    assert_eq!(MAC.to_string(), "52:54:00:ab:cd:ef");
    for text in [
        "",
        "52:54:00:ab:cd",
        "52:54:00:ab:cd:ef:01",
        "52-54-00-ab-cd-ef",
        "+2:54:00:ab:cd:ef",
        "g2:54:00:ab:cd:ef",
    ] {
        assert_eq!(text.parse::<MacAddr>(), Err(MacError::Form(text.to_owned())));
    }
    for text in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00"] {
        assert!(matches!(text.parse::<MacAddr>(), Err(MacError::NotUnicast(_))), "{text}");
    }
}

#[test]
fn the_announcement_is_a_rarp_request_from_the_guest() {
    let frame = rarp(MAC);
    assert_eq!(frame.len(), 60);
    assert_eq!(frame[..6], [0xff; 6]);
    assert_eq!(frame[6..12], MAC.0);
    assert_eq!(frame[12..14], [0x80, 0x35]);
    assert_eq!(frame[14..22], [0, 1, 8, 0, 6, 4, 0, 3]);
    assert_eq!((&frame[22..28], &frame[28..32]), (&MAC.0[..], &[0; 4][..]));
    assert_eq!((&frame[32..38], &frame[38..42]), (&MAC.0[..], &[0; 4][..]));
    assert_eq!(frame[42..], [0; 18]);
}

#[test]
fn announcements_are_due_five_times_in_350_ms() {
    let start = Instant::now();
    let mut schedule = Schedule::new(start);
    let due: Vec<u64> =
        (0..1000).filter(|&ms| schedule.take_due(start + Duration::from_millis(ms))).collect();
    assert_eq!(due, [0, 50, 150, 250, 350]);
    assert_eq!(schedule.next_at(), None);
    let mut late = Schedule::new(start);
    assert!(late.take_due(start + Duration::from_millis(200)));
    assert_eq!(late.next_at(), Some(start + Duration::from_millis(250)), "missed ones are not made up for");
}

#[test]
fn saved_bytes_are_checked() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let _driver = rig.boot(FEATURES);
    let mut bytes = Vec::with_capacity(NetState::BYTES);
    let room = bytes.capacity();
    rig.device.save(&mut bytes);
    assert!(bytes.len() <= NetState::BYTES && bytes.capacity() == room, "saving does not allocate");
    assert_eq!(bytes[..8], [2, 0, 0x52, 0x54, 0, 0xab, 0xcd, 0xef]);
    assert_eq!(NetState::decode(&bytes), Ok(rig.device.state()));

    for len in 0..bytes.len() {
        assert_eq!(NetState::decode(&bytes[..len]), Err(DecodeError::Short), "{len}");
    }
    bytes.push(0);
    assert_eq!(NetState::decode(&bytes), Err(DecodeError::Trailing(1)));
    bytes.pop();
    bytes[2] |= 1;
    let bad = |bytes: &[u8]| NetState::decode(bytes).unwrap_err();
    assert!(matches!(bad(&bytes), DecodeError::Value { field: "mac", .. }));
    bytes[0] = 3;
    assert_eq!(
        rig.device.take_over(&bytes),
        Err(RestoreError::Decode(DecodeError::Version { found: 3, known: 2 }))
    );
    bytes[0] = 1;
    let old = rig.device.take_over(&bytes).unwrap_err();
    assert!(old.to_string().contains("version 1, but this release knows 2"), "{old}");
}

/// Told or not told, a guest stays with it: its driver relies on what it has accepted.
#[test]
fn a_driver_is_told_the_largest_packet_if_there_is_one() {
    const F_MTU: u64 = 1 << 3;
    let memory = memory();
    let with = |mtu| {
        let mut rig = Rig::usual(&memory);
        let (port, output) = (rig.port.clone(), rig.output.output.clone());
        let net = Net::new(port, output).telling(mtu);
        rig.rig = rig::Rig::on(memory.clone(), |host| NetDevice::with(MAC, net, host).unwrap());
        rig
    };
    let (told, untold) = (with(Some(9000)), with(None));
    assert_eq!((told.offered() & F_MTU, untold.offered() & F_MTU), (F_MTU, 0));
    let mtu = |rig: &Rig<'_>| {
        let mut config = [0; 2];
        rig.device.registers().lock().unwrap().read(0x10a, &mut config);
        u16::from_le_bytes(config)
    };
    assert_eq!((mtu(&told), mtu(&untold)), (9000, 0));
    told.negotiate(FEATURES | F_MTU);
    let relies = told.saved();
    let next = with(Some(9000));
    next.device.take_over(&relies).unwrap();
    assert_eq!(mtu(&next), 9000);
    assert!(with(None).device.take_over(&relies).is_err(), "nobody would tell it again after a reset");
    untold.negotiate(FEATURES);
    with(None).device.take_over(&untold.saved()).unwrap();
}
