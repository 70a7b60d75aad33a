//! The input tail, and what another host makes of it: each frame once, in its order, never in the guest's way.

use super::super::tail::{InputTail, PER_EPOCH};
use super::super::{Frame, FrameRing, MAX_PACKET, Pushed};
use super::*;
use crate::devices::virtio::net::offload::{GUEST_CSUM, GUEST_TSO4, MRG_RXBUF};

/// Frames of the tail, with their epochs and pairs.
fn taken(tail: &InputTail) -> Vec<(u64, u16, Vec<u8>)> {
    let mut copy = Vec::new();
    std::iter::from_fn(|| tail.take(&mut copy).map(|(epoch, pair)| (epoch, pair, copy[HEADER..].to_vec())))
        .collect()
}

/// Counts how often it was told.
fn count_told(tail: &InputTail) -> Arc<AtomicUsize> {
    let told = Arc::new(AtomicUsize::new(0));
    let counted = told.clone();
    let _ = tail.start(Arc::new(move || {
        counted.fetch_add(1, Ordering::Relaxed);
    }));
    told
}

#[test]
fn what_the_guest_gets_is_copied_with_the_epoch_that_will_have_it() {
    let memory = memory();
    let rig = Rig::new(&memory, OutputLimits::default(), OutputMode::PassThrough);
    let driver = rig.boot(FEATURES);
    rig.device.go_live(false);
    let tail = rig.device.input_tail();
    for slot in 0..8 {
        driver.give_buffer(slot, 1526);
    }
    rig.kick_rx();
    let arrives = |number: u32| {
        let before = driver.rx_used();
        rig.wire.send(&frame(number, 60)).unwrap();
        wait_for("the frame", || driver.rx_used() != before);
    };
    arrives(1);
    let told = count_told(tail);
    // An unprotected guest has no standby to copy for.
    arrives(2);
    rig.gate.close();
    rig.output.hold(7).unwrap();
    rig.gate.open();
    arrives(3);
    rig.gate.close();
    rig.output.begin(8).unwrap();
    rig.gate.open();
    arrives(4);
    arrives(5);
    wait_for("the word", || told.load(Ordering::Relaxed) > 0);
    assert_eq!(taken(tail), [(7, 0, frame(3, 60)), (8, 0, frame(4, 60)), (8, 0, frame(5, 60))]);
    assert!(taken(tail).is_empty(), "each once");
    let before = told.load(Ordering::Relaxed);
    arrives(6);
    wait_for("another word", || told.load(Ordering::Relaxed) > before);
    assert_eq!(taken(tail), [(8, 0, frame(6, 60))]);
}

#[test]
fn only_the_last_start_can_be_ended() {
    let tail = InputTail::default();
    let first = tail.start(Arc::new(|| {}));
    tail.push(1, 0, &[0; 60]);
    let second = tail.start(Arc::new(|| {}));
    assert!(taken(&tail).is_empty(), "of the first");
    tail.stop(&first);
    tail.push(2, 0, &[0; 60]);
    assert_eq!(taken(&tail).len(), 1);
    tail.stop(&second);
    assert!(!tail.is_on());
    tail.push(3, 0, &[0; 60]);
    assert!(taken(&tail).is_empty());
}

#[test]
fn the_tail_is_bounded_and_has_no_holes_within_an_epoch() {
    let tail = InputTail::default();
    let _ = tail.start(Arc::new(|| {}));
    let packet = |number: u32, len| [&[0; HEADER][..], &frame(number, len)].concat();
    for number in 0..PER_EPOCH.frames as u32 + 50 {
        tail.push(1, 0, &packet(number, 60));
    }
    // A frame that does not fit, and one that would.
    tail.push(2, 0, &packet(0, 60));
    tail.push(2, 0, &vec![0; PER_EPOCH.bytes]);
    tail.push(2, 0, &packet(1, 60));
    tail.push(3, 0, &packet(2, 60));
    let all = taken(&tail);
    let of = |epoch| all.iter().filter(|it| it.0 == epoch).map(|it| it.2.clone()).collect::<Vec<_>>();
    assert_eq!(of(1), (0..PER_EPOCH.frames as u32).map(|number| frame(number, 60)).collect::<Vec<_>>());
    assert_eq!((of(2), of(3)), (vec![frame(0, 60)], vec![frame(2, 60)]));
    assert_eq!(tail.dropped(), 52);
    // Nobody takes.
    for epoch in 4..200 {
        for number in 0..100 {
            tail.push(epoch, 0, &packet(number, 1514));
        }
    }
    let left = taken(&tail);
    assert!(left.len() <= 512 && left.iter().map(|it| it.2.len() + HEADER).sum::<usize>() <= 512 << 10);
    assert!(left.is_sorted_by_key(|it| it.0));
}

#[test]
fn given_frames_come_first_once_and_in_their_order() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let driver = rig.boot(FEATURES);
    for slot in 0..8 {
        driver.give_buffer(slot, 1526);
    }
    rig.wire.send(&frame(90, 60)).unwrap();
    let packet = |number| [&[0; HEADER][..], &frame(number, 60)].concat();
    for number in 1..=3 {
        // A pair that the guest does not use.
        assert!(rig.device.give(number as u16, &packet(number)));
    }
    assert!(rig.device.give(0, &packet(4)[..HEADER + 10]), "too short a frame is found when it is its turn");
    settle();
    assert_eq!(driver.rx_used(), 0, "not before the machine runs");
    rig.device.go_live(true);
    wait_for("the given frames", || driver.rx_used() == 3);
    rig.wire.send(&frame(4, 60)).unwrap();
    wait_for("a frame of this host", || driver.rx_used() == 4);
    settle();
    let got: Vec<_> = (0..driver.rx_used()).map(|index| driver.received(index)).collect();
    assert_eq!(got, (1..=4).map(|number| frame(number, 60)).collect::<Vec<_>>());
    let stats = rig.device.stats();
    assert_eq!((stats.rx_given, stats.rx_dropped, stats.stale), (4, 1, 1));
}

#[test]
fn a_stray_reaches_a_running_guest_and_only_so_many_wait() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    let stray = |number| rig.device.give_stray(0, &[&[0; HEADER][..], &frame(number, 60)].concat());
    assert!(!stray(0), "there is no driver");
    let driver = rig.boot(FEATURES);
    rig.device.go_live(true);
    driver.give_buffer(0, 1526);
    settle();
    assert!(stray(1));
    wait_for("a stray, although nothing comes from the tap", || driver.rx_used() == 1);
    let taken = (0..3000).take_while(|_| stray(2)).count();
    assert_eq!(taken, 1024, "without buffers of the driver they wait");
    driver.give_buffer(1, 1526);
    rig.kick_rx();
    wait_for("one that has waited", || driver.rx_used() == 2);
    assert_eq!((driver.received(0), driver.received(1)), (frame(1, 60), frame(2, 60)));
    assert!(!rig.device.give_stray(0, &vec![0; MAX_PACKET + 1]));
}

#[test]
fn without_a_driver_nothing_is_given() {
    let memory = memory();
    let rig = Rig::usual(&memory);
    assert!(!rig.device.give(0, &[0; 72]));
    let _driver = rig.boot(FEATURES);
    assert!(!rig.device.give(0, &vec![0; MAX_PACKET + 1]));
    assert!(rig.device.give(0, &vec![0; MAX_PACKET]));
    rig.device.reset();
    rig.device.go_live(true);
}

/// What is left to do about a frame is left to a guest that has agreed to it, and to no other.
#[test]
fn a_given_frame_has_a_header_that_the_guest_has_agreed_to() {
    const OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4;
    for (features, arrives) in [(FEATURES | MRG_RXBUF | OFFLOADS, true), (FEATURES | MRG_RXBUF, false)] {
        let memory = memory();
        let rig = Rig::usual(&memory);
        let driver = rig.boot(features);
        for slot in 0..16 {
            driver.give_buffer(slot, 1526);
        }
        // Needs a checksum and to be cut, and takes several buffers.
        let header = [1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
        assert!(rig.device.give(0, &[&header[..], &frame(1, 9000)].concat()));
        assert!(rig.device.give(0, &[&[0; HEADER][..], &frame(2, 60)].concat()));
        rig.device.go_live(true);
        wait_for("the last frame", || driver.rx_used() == if arrives { 7 } else { 1 });
        let (head, len) = driver.rx.used_entry(0);
        let mut first = vec![0; len as usize];
        memory.read_slice(&mut first, GuestAddress(RX_BUFFERS + u64::from(head) * 4096)).unwrap();
        let buffers = if arrives { 6 } else { 1 };
        assert_eq!(first[10..12], [buffers, 0], "the number of its buffers");
        assert_eq!(first[..10], if arrives { header[..10].to_vec() } else { vec![0; 10] });
        assert_eq!(rig.device.stats().rx_dropped, u64::from(!arrives));
    }
}

#[test]
fn repeated_output_comes_before_everything_that_the_guest_sends() {
    let memory = memory();
    let rig = Rig::new(&memory, OutputLimits::default(), OutputMode::Discard);
    let driver = rig.boot(FEATURES);
    driver.send(0, &frame(9, 60));
    rig.output.valve.open();
    let packet = |number, len| [&[0; HEADER][..], &frame(number, len)].concat();
    assert!(rig.device.repeat(0, &packet(1, 60)));
    assert!(rig.device.repeat(0, &packet(2, 1514)));
    assert!(!rig.device.repeat(0, &packet(3, 60)[..HEADER + 13]), "too short");
    assert!(!rig.device.repeat(0, &[1; 100]), "a header that claims what this guest may not");
    assert!(!rig.device.repeat(0, &vec![0; MAX_PACKET + 1]));
    assert!(!rig.device.repeat(0, &[]));
    // The device's thread may let them out before, in their order; nothing of the guest's is among them yet.
    rig.device.go_live(false);
    let _ = rig.output.drain();
    wait_for("the guest's own", || rig.sink.count() == 3);
    assert_eq!(rig.sink.frames(), [frame(1, 60), frame(2, 1514), frame(9, 60)]);
}

#[test]
fn what_an_epoch_has_sent_can_be_copied_until_it_leaves() {
    let output = Held::new(Arc::new(Recorder::default()), OutputLimits::default(), OutputMode::PassThrough);
    let send = |number| assert_eq!(output.push(number as usize % 2, &frame(number, 60)), Pushed::Taken);
    let copies = |epoch| {
        let (mut copy, mut from) = (Vec::new(), 0);
        std::iter::from_fn(|| {
            let (number, pair) = output.copy_held(epoch, from, &mut copy)?;
            from = number + 1;
            assert_eq!(u32::from(pair), u32::from_le_bytes(copy[14..18].try_into().unwrap()) % 2);
            Some(copy.clone())
        })
        .collect::<Vec<_>>()
    };
    send(1);
    output.hold(5).unwrap();
    send(2);
    send(3);
    output.begin(6).unwrap();
    output.begin(7).unwrap();
    send(4);
    assert_eq!(copies(5), [frame(2, 60), frame(3, 60)]);
    assert_eq!(copies(7), [frame(4, 60)]);
    assert!(copies(4).is_empty() && copies(6).is_empty() && copies(8).is_empty());
    let _ = output.release(5);
    assert!(copies(5).is_empty(), "it has left");
    assert_eq!(copies(7).len(), 1);
}

#[test]
fn it_is_known_through_which_epoch_everything_has_left() {
    let output = Held::new(Arc::new(Recorder::default()), OutputLimits::default(), OutputMode::PassThrough);
    assert_eq!(output.released_through(), 0, "nothing is held");
    output.hold(5).unwrap();
    assert_eq!(output.released_through(), 4, "epochs before were not held");
    assert_eq!(output.push(0, &frame(1, 60)), Pushed::Taken);
    output.begin(6).unwrap();
    output.begin(7).unwrap();
    assert_eq!(output.push(0, &frame(2, 60)), Pushed::Taken);
    output.begin(8).unwrap();
    assert_eq!(output.released_through(), 4, "what epoch 5 has sent is held");
    output.valve.commit(5);
    assert_eq!(output.released_through(), 4, "it may leave and has not left");
    let (released, _) = output.release_with(5, 0);
    assert_eq!((released.frames, output.released_through()), (0, 4), "the lease has ended");
    output.valve.renew(None);
    let _ = output.release(5);
    assert_eq!(output.released_through(), 6, "epoch 6 has sent nothing");
    let _ = output.release(7);
    assert_eq!(output.released_through(), 7);
    output.discard();
    assert_eq!(output.released_through(), 0);
}

#[test]
fn a_ring_keeps_frames_in_their_order_within_its_bounds() {
    let limits = OutputLimits { frames: 5, bytes: 100 };
    let mut ring = FrameRing::new(limits);
    let mut model = std::collections::VecDeque::new();
    let mut seed = 7u64;
    let mut random = |below: u64| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) % below
    };
    for number in 0..20_000u64 {
        let packet = vec![number as u8; random(50) as usize];
        if ring.push(number, number as u16, &packet) {
            model.push_back((number, packet));
        }
        for _ in 0..random(3) {
            ring.pop();
            model.pop_front();
        }
        assert!(ring.len() <= limits.frames && ring.bytes() <= limits.bytes);
        assert_eq!((ring.len(), ring.is_empty()), (model.len(), model.is_empty()));
        let same = ring.iter().eq(model.iter().map(|(label, packet)| {
            let pair = *label as u16;
            Frame { label: *label, pair, packet: &packet[..] }
        }));
        assert!(same);
        assert_eq!(ring.newest(), model.back().map(|it| it.0));
        assert_eq!(ring.place_after(|label| label < number), model.iter().filter(|it| it.0 < number).count());
    }
    ring.clear();
    assert_eq!((ring.len(), ring.bytes(), ring.front()), (0, 0, None));
}
