//! The console with our own driver.

mod hostile;

use std::sync::{Arc, Mutex};

use super::{ConsoleDevice, ScreenSize};
use crate::devices::Device;
use crate::devices::port::{INPUT_BYTES, PortEnd, PortSink};
use virtio_queue::desc::split::Descriptor;

use crate::devices::virtio::hostile::*;

const RX: u32 = 0;
const TX: u32 = 1;

#[derive(Default)]
struct Recorder(Mutex<Vec<u8>>);

impl PortSink for Recorder {
    fn write(&self, bytes: &[u8]) {
        self.0.lock().unwrap().extend_from_slice(bytes);
    }
}

struct Setup {
    rig: Rig<ConsoleDevice<Memory>>,
    sink: Arc<Recorder>,
    end: PortEnd,
}

fn setup() -> Setup {
    let sink = Arc::new(Recorder::default());
    let end = PortEnd::new(sink.clone()).unwrap();
    let rig = Rig::new(|host| ConsoleDevice::new(end.clone(), host).unwrap());
    Setup { rig, sink, end }
}

fn live() -> Setup {
    let setup = setup();
    setup.rig.boot(2);
    setup.rig.device.go_live(false);
    setup
}

impl Setup {
    fn output(&self) -> Vec<u8> {
        self.sink.0.lock().unwrap().clone()
    }
}

fn print(rig: &Rig<ConsoleDevice<Memory>>, text: &[u8]) {
    use vm_memory::{Bytes, GuestAddress};
    let ring = rig.ring(TX);
    let index = ring.used_index();
    rig.memory.write_slice(text, GuestAddress(BUFFERS)).unwrap();
    ring.put(0, Descriptor::new(BUFFERS, text.len() as u32, 0, 0));
    ring.offer(0);
    rig.kick(TX);
    wait_for("the buffer back", || ring.used_index() != index);
}

/// Gives the device a buffer to fill.
fn listen(rig: &Rig<ConsoleDevice<Memory>>, slot: u16, len: u32) {
    let ring = rig.ring(RX);
    ring.put(slot, Descriptor::new(BUFFERS + 0x1_0000 + u64::from(slot) * 0x1000, len, WRITE, 0));
    ring.offer(slot);
    rig.kick(RX);
}

/// The bytes that the device put into the buffer used as number `index`.
fn heard(rig: &Rig<ConsoleDevice<Memory>>, index: u16) -> Vec<u8> {
    wait_for("input", || rig.ring(RX).used_index() > index);
    let (slot, len) = rig.ring(RX).used_entry(index);
    rig.bytes(BUFFERS + 0x1_0000 + u64::from(slot) * 0x1000, len as usize)
}

#[test]
fn bytes_pass_in_both_directions() {
    let setup = live();
    let rig = &setup.rig;
    assert_eq!(rig.read(0x08), 3, "the device is a console");
    print(rig, b"login: ");
    let long: Vec<u8> = (0..20_000u32).map(|n| (n % 251) as u8).collect();
    print(rig, &long);
    assert_eq!(setup.output(), [b"login: ", &long[..]].concat());
    listen(rig, 0, 64);
    listen(rig, 1, 3);
    listen(rig, 2, 64);
    let interrupts = rig.interrupts.get();
    assert_eq!(setup.end.input.push(b"root\r"), 5);
    assert_eq!(heard(rig, 0), b"root\r");
    wait_for("the interrupt", || rig.interrupts.get() > interrupts);
    setup.end.input.push(b"secret");
    assert_eq!((heard(rig, 1), heard(rig, 2)), (b"sec".to_vec(), b"ret".to_vec()));
    assert_eq!(setup.end.input.dropped(), 0);
}

#[test]
fn input_waits_for_a_buffer_and_finds_it() {
    let setup = live();
    assert_eq!(setup.end.input.push(&[7; 2 * INPUT_BYTES]), INPUT_BYTES);
    settle();
    assert_eq!(setup.end.input.room(), 0);
    listen(&setup.rig, 0, 0x1000);
    assert_eq!(heard(&setup.rig, 0), [7; INPUT_BYTES]);
    assert_eq!(setup.end.input.room(), INPUT_BYTES);
}

#[test]
fn nothing_is_typed_at_a_guest_that_does_not_run() {
    let setup = setup();
    setup.rig.boot(2);
    listen(&setup.rig, 0, 64);
    setup.end.input.push(b"early");
    setup.rig.device.go_live(false);
    settle();
    assert_eq!(setup.rig.ring(RX).used_index(), 0);
    setup.end.input.push(b"now");
    assert_eq!(heard(&setup.rig, 0), b"now");
    assert_eq!(setup.end.input.dropped(), 5);
}

#[test]
fn the_screen_has_a_size_that_may_change() {
    let setup = live();
    let rig = &setup.rig;
    assert_eq!(rig.read(0x10) & 1, 1, "the size is offered");
    assert_eq!(rig.read(0x100), 24 << 16 | 80);
    assert_eq!((rig.read(0x104), rig.read(0xfffc)), (0, 0));
    let generation = rig.read(0xfc);
    rig.device.resize(ScreenSize { columns: 132, rows: 50 });
    assert_eq!((rig.read(0x100), rig.read(0x60) & 2), (50 << 16 | 132, 2));
    assert_ne!(rig.read(0xfc), generation);
    rig.write(0x100, 7);
    assert_eq!(rig.read(0x100), 50 << 16 | 132);
}

#[test]
fn nothing_moves_in_a_pause_and_a_resumed_guest_goes_on() {
    let old = live();
    print(&old.rig, b"one");
    old.rig.device.resize(ScreenSize { columns: 100, rows: 30 });
    old.rig.gate.close();
    listen(&old.rig, 0, 64);
    let ring = old.rig.ring(TX);
    ring.put(1, Descriptor::new(BUFFERS, 3, 0, 0));
    ring.offer(1);
    old.rig.kick(TX);
    old.end.input.push(b"lost with the old host");
    settle();
    let state = old.rig.saved();
    assert_eq!((old.output(), old.rig.ring(RX).used_index()), (b"one".to_vec(), 0));

    let sink = Arc::new(Recorder::default());
    let end = PortEnd::new(sink.clone()).unwrap();
    let rig = Rig::on(old.rig.memory.clone(), |host| ConsoleDevice::new(end.clone(), host).unwrap());
    rig.device.restore(&state).unwrap();
    assert_eq!(rig.saved(), state);
    assert_eq!(rig.device.size(), ScreenSize { columns: 100, rows: 30 });
    let interrupts = rig.interrupts.get();
    rig.device.go_live(true);
    assert!(rig.interrupts.get() > interrupts);
    wait_for("output", || rig.ring(TX).used_index() == 2);
    assert_eq!(*sink.0.lock().unwrap(), b"one");
    end.input.push(b"hello");
    assert_eq!(heard(&rig, 0), b"hello");
}

#[test]
fn a_reboot_finds_a_fresh_device() {
    let setup = live();
    setup.rig.gate.close();
    setup.rig.device.reset();
    assert_eq!(setup.rig.read(0x70), 0);
    setup.rig.gate.open();
    setup.rig.boot(2);
    print(&setup.rig, b"again");
    assert_eq!(setup.output(), b"again");
}
