//! Headers: what passes, what is made zero, what is refused.

use super::*;
use crate::devices::virtio::net::offload::{
    CSUM, CTRL_RX, CTRL_VQ, GUEST_ANNOUNCE, GUEST_CSUM, GUEST_ECN, GUEST_TSO4, GUEST_TSO6, HOST_ECN,
    HOST_TSO4, HOST_TSO6, Header, MQ, effective,
};

const SENDS: u64 = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
const TAKES: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN;

/// An unfinished TCP checksum behind Ethernet and IPv4 headers.
const SUM: Header = Header {
    flags: 1,
    gso_type: 0,
    hdr_len: 0,
    gso_size: 0,
    csum_start: 34,
    csum_offset: 16,
    num_buffers: 0,
};
const TSO: Header = Header { gso_type: 1, hdr_len: 54, gso_size: 1448, ..SUM };

#[test]
fn headers_are_read_as_written() {
    let header = Header { num_buffers: 0x0b0a, csum_start: 0x0706, csum_offset: 0x0908, ..TSO };
    assert_eq!(header.bytes(), [1, 1, 54, 0, 0xa8, 5, 6, 7, 8, 9, 10, 11]);
    assert_eq!(Header::read(&header.bytes()), header);
}

#[test]
fn what_a_driver_may_claim() {
    let sends = |header: Header| header.to_send(3000, SENDS);
    assert_eq!(sends(Header::default()), Some(Header::default()));
    assert_eq!(sends(SUM), Some(SUM));
    assert_eq!(sends(TSO), Some(TSO));
    assert_eq!(sends(Header { gso_type: 4, csum_start: 54, ..TSO }).unwrap().gso_type, 4);
    assert_eq!(sends(Header { gso_type: 0x81, ..TSO }).unwrap().gso_type, 0x81);
    // Fields without meaning are not passed on.
    let noise =
        Header { flags: 0xfe, hdr_len: 9, gso_size: 9, csum_start: 9, csum_offset: 9, num_buffers: 9, ..SUM };
    assert_eq!(sends(noise), Some(Header::default()));
    assert_eq!(
        sends(Header { num_buffers: 7, flags: 0xff, hdr_len: 9999, ..TSO }),
        Some(Header { hdr_len: 3000, ..TSO })
    );

    for bad in [
        Header { csum_start: 13, ..SUM },
        Header { csum_start: 2983, ..SUM },
        Header { csum_start: u16::MAX, csum_offset: u16::MAX, ..SUM },
        Header { csum_offset: 2965, ..SUM },
        Header { flags: 0, ..TSO },
        Header { gso_size: 0, ..TSO },
        Header { csum_offset: 6, ..TSO },
        Header { csum_start: 2981, ..TSO },
        Header { gso_type: 3, ..TSO },
        Header { gso_type: 5, ..TSO },
        Header { gso_type: 2, ..TSO },
        Header { gso_type: 0x80, ..TSO },
        Header { gso_type: 0xff, ..TSO },
    ] {
        assert_eq!(sends(bad), None, "{bad:?}");
    }
    for (header, feature) in [
        (SUM, CSUM),
        (TSO, CSUM),
        (TSO, HOST_TSO4),
        (Header { gso_type: 4, ..TSO }, HOST_TSO6),
        (Header { gso_type: 0x81, ..TSO }, HOST_ECN),
    ] {
        assert!(header.to_send(3000, SENDS).is_some() && header.to_send(3000, SENDS & !feature).is_none());
    }
}

#[test]
fn what_a_guest_gets() {
    let one = |header: Header| Some(Header { num_buffers: 1, ..header });
    let valid = Header { flags: 2, ..Header::default() };
    assert_eq!(TSO.to_deliver(TAKES), one(TSO));
    assert_eq!(SUM.to_deliver(TAKES), one(SUM));
    assert_eq!(valid.to_deliver(TAKES), one(valid));
    assert_eq!(valid.to_deliver(0), one(Header::default()), "the guest has not asked");
    assert_eq!(Header { num_buffers: 77, ..Header::default() }.to_deliver(0), one(Header::default()));
    assert_eq!(SUM.to_deliver(0), None);
    assert_eq!(TSO.to_deliver(GUEST_CSUM), None);
    assert_eq!(Header { gso_type: 4, ..TSO }.to_deliver(GUEST_CSUM | GUEST_TSO4), None);
    assert_eq!(Header { gso_type: 0x81, ..TSO }.to_deliver(GUEST_CSUM | GUEST_TSO4), None);
    assert_eq!(Header { gso_type: 3, ..TSO }.to_deliver(TAKES), None);
}

#[test]
fn features_need_others() {
    assert_eq!(effective(!0), !0);
    assert_eq!(effective(SENDS & !CSUM), 0);
    assert_eq!(effective(CSUM | HOST_ECN), CSUM);
    assert_eq!(effective(TAKES & !GUEST_CSUM), 0);
    assert_eq!(effective(GUEST_CSUM | GUEST_TSO6 | GUEST_ECN), GUEST_CSUM | GUEST_TSO6 | GUEST_ECN);
    assert_eq!(effective(CTRL_RX | GUEST_ANNOUNCE | MQ), 0);
    assert_eq!(effective(CTRL_VQ | CTRL_RX), CTRL_VQ | CTRL_RX);
}

/// Makes `frame` behind `header` available in the transmit queue.
fn send_large(driver: &Driver<'_>, header: Header, frame: &[u8]) {
    driver.memory.write_slice(&header.bytes(), GuestAddress(LARGE)).unwrap();
    driver.memory.write_slice(frame, GuestAddress(LARGE + 12)).unwrap();
    driver.tx.put(0, Descriptor::new(LARGE, 12 + frame.len() as u32, 0, 0));
    driver.tx.offer(0);
}

#[test]
fn a_large_frame_is_held_with_its_header_until_its_epoch_is_committed() {
    let memory = memory();
    let rig = Rig::new(&memory, OutputLimits::default(), OutputMode::Discard);
    rig.output.hold(1).unwrap();
    let driver = rig.boot(FEATURES | SENDS);
    rig.device.go_live(false);
    for (round, len) in [60_000, MAX_FRAME].into_iter().enumerate() {
        let frame = frame(round as u32, len);
        send_large(&driver, Header { num_buffers: 3, flags: 0xff, ..TSO }, &frame);
        rig.kick_tx();
        wait_for("the frame to be taken", || driver.tx_used() == round as u16 + 1);
        settle();
        assert_eq!(rig.sink.count(), round, "nothing leaves before its epoch's commit");
        let epoch = round as u64 + 2;
        rig.gate.close();
        rig.output.begin(epoch).unwrap();
        rig.gate.open();
        assert!(rig.output.release(epoch - 1).complete);
        let packet = rig.sink.packets().pop().unwrap();
        assert_eq!(Header::read(packet.first_chunk().unwrap()), TSO);
        assert!(packet[12..] == frame[..]);
    }
    assert_eq!(rig.device.stats().tx_bytes, 60_000 + MAX_FRAME as u64);
}

#[test]
fn large_frames_fill_the_held_output_and_then_stay_with_the_guest() {
    let memory = memory();
    let limits = OutputLimits { frames: 100, bytes: crate::devices::virtio::net::MAX_PACKET };
    let rig = Rig::new(&memory, limits, OutputMode::Discard);
    rig.output.hold(1).unwrap();
    let driver = rig.boot(FEATURES | SENDS);
    rig.device.go_live(false);
    let frame = frame(7, MAX_FRAME);
    for _ in 0..3 {
        send_large(&driver, TSO, &frame);
    }
    rig.kick_tx();
    for round in 1..=3 {
        wait_for("one frame to be taken", || driver.tx_used() == round);
        settle();
        assert_eq!((driver.tx_used(), rig.sink.count()), (round, usize::from(round) - 1));
        rig.gate.close();
        rig.output.begin(u64::from(round) + 1).unwrap();
        rig.gate.open();
        assert!(rig.output.release(round.into()).complete);
    }
    assert!(rig.sink.frames().iter().all(|sent| *sent == frame));
    assert_eq!(rig.sink.count(), 3);
}

#[test]
fn claims_that_must_not_be_are_counted_and_the_next_frame_goes() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    for (features, bad) in [(FEATURES, SUM), (FEATURES | SENDS, Header { gso_size: 0, ..TSO })] {
        let before = rig.sink.count();
        let driver = rig.boot(features);
        rig.device.go_live(false);
        send_large(&driver, bad, &frame(1, 3000));
        rig.kick_tx();
        wait_for("the frame to be given back", || driver.tx_used() == 1);
        driver.send(1, &frame(2, 60));
        rig.kick_tx();
        wait_for("the next frame", || rig.sink.count() > before);
        assert_eq!(rig.sink.frames().pop().unwrap(), frame(2, 60));
        assert!(!rig.needs_reset());
    }
    assert_eq!((rig.device.stats().tx_bad_headers, rig.device.stats().tx_frames), (2, 2));
}

#[test]
fn the_port_follows_the_driver() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let told = || rig.port.told.lock().unwrap().last().copied();
    wait_for("the port to be told of nothing", || told() == Some(Told::Pairs(1)));
    for (features, offloads) in [(FEATURES | TAKES, TAKES), (FEATURES, 0), (FEATURES | GUEST_TSO4, 0)] {
        let _driver = rig.boot(features);
        wait_for("the port to be told", || rig.device.state().device.settings.offloads == offloads);
        settle();
        let last = told();
        assert!(last == Some(Told::Offloads(offloads)), "{last:?}");
    }
    let _driver = rig.boot(FEATURES | TAKES);
    wait_for("offloads", || told() == Some(Told::Offloads(TAKES)));
    rig.write(0x70, 0);
    wait_for("no offloads after a reset", || told() == Some(Told::Offloads(0)));
}

#[test]
fn frames_with_work_left_come_only_to_a_guest_that_does_it() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    rig.device.go_live(false);
    let driver = rig.boot(FEATURES);
    driver.give_buffer(0, 4096);
    rig.kick_rx();
    rig.wire.send_packet(0, SUM.bytes(), &frame(1, 100)).unwrap();
    rig.wire.send(&frame(2, 100)).unwrap();
    wait_for("the plain frame", || driver.rx_used() == 1);
    assert_eq!(driver.received(0), frame(2, 100));
    assert_eq!(rig.device.stats().rx_dropped, 1);

    let driver = rig.boot(FEATURES | TAKES);
    driver.give_buffer(0, 4096);
    rig.kick_rx();
    rig.wire.send_packet(0, TSO.bytes(), &frame(3, 3000)).unwrap();
    wait_for("the large frame", || driver.rx_used() == 1);
    let mut header = [0; 12];
    memory.read_slice(&mut header, GuestAddress(RX_BUFFERS)).unwrap();
    assert_eq!(Header::read(&header), Header { num_buffers: 1, ..TSO });
    assert_eq!(driver.rx.used_entry(0), (0, 3012));
}
