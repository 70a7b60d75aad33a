//! Several queue pairs.

use super::*;
use crate::devices::virtio::net::offload::{CTRL_VQ, MQ};

const SEVERAL: u64 = FEATURES | CTRL_VQ | MQ;
const PAIRS_SET: (u8, u8) = (4, 0);

fn rig(memory: &Arc<Memory>, mode: OutputMode) -> Rig<'_> {
    Rig::with_pairs(memory, 3, OutputLimits::default(), mode)
}

fn set_pairs(control: &Control<'_, '_>, pairs: u16) -> u8 {
    control.ask(PAIRS_SET.0, PAIRS_SET.1, &pairs.to_le_bytes())
}

fn pair<'m>(memory: &'m Memory, index: u32) -> Driver<'m> {
    let at = |queue| ring_at(memory, rings_at(queue));
    Driver { memory, rx: at(2 * index), tx: at(2 * index + 1) }
}

#[test]
fn the_driver_sees_how_many_there_are() {
    let memory = memory();
    let rig = rig(&memory, OutputMode::PassThrough);
    let mut most = [0; 2];
    rig.device.registers().lock().unwrap().read(0x108, &mut most);
    assert_eq!(most, [3, 0]);
    rig.write(0x14, 0);
    assert_ne!(u64::from(rig.read(0x10)) & MQ, 0);
    assert_eq!(rig.device.kicks().len(), 7);
}

#[test]
fn pairs_come_into_use_and_go_out_of_it() {
    let memory = memory();
    let rig = rig(&memory, OutputMode::PassThrough);
    let told = || rig.port.told.lock().unwrap().last().copied();
    wait_for("one pair at first", || told() == Some(Told::Pairs(1)));
    let (first, control) = rig.boot_with_control(SEVERAL, 6);
    rig.device.go_live(false);
    let last = pair(&memory, 2);

    // Not in use: nothing is taken and nothing is given.
    last.send(0, &frame(0, 60));
    last.give_buffer(1, 1526);
    rig.write(0x50, 5);
    rig.write(0x50, 4);
    rig.wire.send_packet(2, [0; HEADER], &frame(1, 60)).unwrap();
    settle();
    assert_eq!((last.tx_used(), last.rx_used(), rig.sink.count()), (0, 0, 0));

    assert_eq!((set_pairs(&control, 0), set_pairs(&control, 4), set_pairs(&control, 3)), (1, 1, 0));
    wait_for("the port to be told", || told() == Some(Told::Pairs(3)));
    // No notification: what was there is looked at.
    wait_for("what waited", || last.tx_used() == 1 && last.rx_used() == 1 && rig.sink.count() == 1);
    assert_eq!((rig.sink.pairs(), last.received(0)), (vec![2], frame(1, 60)));
    first.send(0, &frame(2, 60));
    rig.kick_tx();
    wait_for("the first pair", || rig.sink.count() == 2);
    assert_eq!(rig.sink.pairs(), [2, 0]);

    assert_eq!(set_pairs(&control, 1), 0);
    wait_for("the port to be told", || told() == Some(Told::Pairs(1)));
    last.send(1, &frame(3, 60));
    rig.write(0x50, 5);
    settle();
    assert_eq!(last.tx_used(), 1);
    rig.write(0x70, 0);
    assert_eq!(rig.device.state().device.settings.pairs, 1);
}

#[test]
fn held_frames_leave_in_the_order_of_their_pushes() {
    let memory = memory();
    let rig = rig(&memory, OutputMode::Discard);
    rig.output.hold(1).unwrap();
    let (_, control) = rig.boot_with_control(SEVERAL, 6);
    rig.device.go_live(false);
    assert_eq!(set_pairs(&control, 3), 0);
    for number in 0..30u16 {
        let index = u32::from(number * 7 % 3);
        let driver = pair(&memory, index);
        let before = driver.tx_used();
        driver.send(number % QUEUE, &frame(number.into(), 60));
        rig.write(0x50, 2 * index + 1);
        wait_for("the frame to be taken", || driver.tx_used() == before + 1);
    }
    assert_eq!(rig.sink.count(), 0);
    rig.gate.close();
    rig.output.begin(2).unwrap();
    rig.gate.open();
    assert_eq!(rig.output.release(1).frames, 30);
    assert_eq!(rig.sink.frames(), (0..30).map(|n| frame(n, 60)).collect::<Vec<_>>());
    assert_eq!(rig.sink.pairs(), (0..30).map(|n| n * 7 % 3).collect::<Vec<_>>());
}

#[test]
fn a_driver_that_knows_of_one_finds_its_control_queue_behind_it() {
    let memory = memory();
    let rig = rig(&memory, OutputMode::PassThrough);
    let (driver, control) = rig.boot_with_control(SEVERAL & !MQ, 2);
    rig.device.go_live(false);
    assert_eq!(set_pairs(&control, 1), 1, "it has not agreed to several");
    driver.send(0, &frame(0, 60));
    rig.kick_tx();
    wait_for("a frame", || rig.sink.count() == 1);
    // One that knows nothing of either, as the payload.
    let driver = rig.boot(FEATURES);
    driver.send(0, &frame(1, 60));
    rig.kick_tx();
    wait_for("a frame", || rig.sink.count() == 2);
}

#[test]
fn pairs_the_driver_left_out_cannot_come_into_use() {
    let memory = memory();
    let rig = rig(&memory, OutputMode::PassThrough);
    rig.negotiate(SEVERAL);
    let rings = [0, 1, 2, 3, 4, 6].map(|index| {
        let ring = fresh_ring(&memory, rings_at(index));
        rig.add_queue(index, &ring);
        ring
    });
    rig.start();
    rig.device.go_live(false);
    let control = Control { rig: &rig, ring: rings[5], index: 6 };
    assert_eq!((set_pairs(&control, 3), set_pairs(&control, 2)), (1, 0));
}

#[test]
fn the_machine_that_takes_over_uses_the_same_pairs() {
    let memory = memory();
    let here = rig(&memory, OutputMode::PassThrough);
    let (_, control) = here.boot_with_control(SEVERAL, 6);
    here.device.go_live(false);
    assert_eq!(set_pairs(&control, 3), 0);
    let last = pair(&memory, 2);
    last.give_buffer(0, 1526);
    last.send(0, &frame(0, 60));
    here.write(0x50, 5);
    wait_for("a frame", || last.tx_used() == 1);
    here.gate.close();
    last.send(1, &frame(1, 60));
    let mut saved = Vec::new();
    here.device.save(&mut saved);
    let transport = here.device.state().transport;
    assert_eq!((transport.queues[5].next_avail, transport.queues[6].next_used), (1, 1));
    drop(here);

    let there = rig(&memory, OutputMode::PassThrough);
    there.device.take_over(&saved).unwrap();
    let told = || there.port.told.lock().unwrap().last().copied();
    wait_for("the port to be told", || told() == Some(Told::Pairs(3)));
    there.device.go_live(true);
    wait_for("the pending frame", || last.tx_used() == 2);
    there.wire.send_packet(2, [0; HEADER], &frame(2, 60)).unwrap();
    wait_for("a frame to the last pair", || last.rx_used() == 1);
    assert_eq!(last.received(0), frame(2, 60));

    // Not on a device with fewer pairs.
    let fewer = Rig::with_pairs(&memory, 2, OutputLimits::default(), OutputMode::PassThrough);
    assert!(fewer.device.take_over(&saved).is_err());
}
