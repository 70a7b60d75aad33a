//! The entropy device with our own driver.

mod hostile;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::time::Instant;

use super::{BUDGET, EntropySource, HostEntropy, REQUEST, RngDevice, WINDOW};
use crate::devices::Device;
use virtio_queue::desc::split::Descriptor;

use crate::devices::virtio::hostile::*;

/// Gives 1, 2, 3 ... and can be told to give nothing. Counts the bytes that are asked of it.
#[derive(Default)]
struct Counter {
    next: AtomicU8,
    dry: Arc<AtomicBool>,
    asked: Arc<AtomicUsize>,
}

impl EntropySource for Counter {
    fn fill(&self, to: &mut [u8]) -> io::Result<()> {
        if self.dry.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.asked.fetch_add(to.len(), Ordering::Relaxed);
        to.fill(self.next.fetch_add(1, Ordering::Relaxed).wrapping_add(1));
        Ok(())
    }
}

type Device_ = RngDevice<Memory>;

fn rig() -> Rig<Device_> {
    rig_with(Counter::default())
}

fn rig_with(source: Counter) -> Rig<Device_> {
    Rig::new(|host| RngDevice::with_source(source, host).unwrap())
}

/// Asks for `len` bytes and waits for them.
fn ask(rig: &Rig<Device_>, len: u32) -> u32 {
    let ring = rig.ring(0);
    let index = ring.used_index();
    ring.put(0, Descriptor::new(BUFFERS, len, WRITE, 0));
    ring.offer(0);
    rig.kick(0);
    wait_for("random bytes", || ring.used_index() != index);
    let (head, given) = ring.used_entry(index);
    assert_eq!(head, 0);
    given
}

fn works(rig: &Rig<Device_>) {
    assert_eq!(ask(rig, 64), 64);
}

#[test]
fn requests_are_answered_and_told() {
    let rig = rig();
    assert_eq!(rig.read(0x08), 4, "the device is an entropy source");
    rig.boot(1);
    rig.device.go_live(false);
    let interrupts = rig.interrupts.get();
    assert_eq!(ask(&rig, 64), 64);
    assert_eq!(rig.bytes(BUFFERS, 65), [&[1; 64][..], &[0]].concat());
    assert_eq!(ask(&rig, 32), 32);
    assert_eq!(rig.bytes(BUFFERS, 64), [[2; 32], [1; 32]].concat(), "no byte is given twice");
    wait_for("the interrupt", || rig.interrupts.get() > interrupts);
    assert!(rig.wakes.get() > 0);
}

#[test]
fn a_large_request_gets_a_part_and_a_chain_is_filled_in_order() {
    let rig = rig();
    rig.boot(1);
    rig.device.go_live(false);
    assert_eq!(ask(&rig, 100_000), REQUEST as u32);
    let ring = rig.ring(0);
    ring.put(3, Descriptor::new(BUFFERS, 10, WRITE | NEXT, 5));
    ring.put(5, Descriptor::new(BUFFERS + 100, 20, WRITE, 0));
    ring.offer(3);
    rig.kick(0);
    wait_for("random bytes", || ring.used_index() == 2);
    assert_eq!(ring.used_entry(1), (3, 30));
    assert_eq!((rig.bytes(BUFFERS, 10), rig.bytes(BUFFERS + 100, 20)), (vec![2; 10], vec![2; 20]));
}

#[test]
fn nothing_is_given_before_the_machine_runs_and_in_a_pause() {
    let rig = rig();
    rig.boot(1);
    let ring = rig.ring(0);
    ring.put(0, Descriptor::new(BUFFERS, 64, WRITE, 0));
    ring.offer(0);
    rig.kick(0);
    settle();
    assert_eq!(ring.used_index(), 0);
    rig.gate.close();
    rig.device.go_live(false);
    settle();
    assert_eq!(ring.used_index(), 0);
    rig.gate.open();
    wait_for("random bytes", || ring.used_index() == 1);
}

#[test]
fn a_guest_that_asks_without_end_is_slowed_down_and_served() {
    let rig = rig();
    rig.boot(1);
    rig.device.go_live(false);
    for _ in 0..2 * BUDGET / (REQUEST * usize::from(QUEUE)) + 1 {
        ask_often(&rig, REQUEST as u32);
    }
    assert!(rig.device.throttled() > 0);
}

/// Fills the queue with requests for `len` bytes and waits until all are answered.
fn ask_often(rig: &Rig<Device_>, len: u32) {
    let ring = rig.ring(0);
    let index = ring.used_index();
    for slot in 0..QUEUE {
        ring.put(slot, Descriptor::new(BUFFERS, len, WRITE, 0));
        ring.offer(slot);
    }
    rig.kick(0);
    wait_for("random bytes", || ring.used_index() == index.wrapping_add(QUEUE));
}

/// Many small requests cost this host no more than a few large ones: each counts for a least number of bytes,
/// and no more bytes are made than fit.
#[test]
fn small_requests_buy_no_more_of_the_hosts_time_than_large_ones() {
    const WINDOWS: usize = 3;
    let asked = Arc::<AtomicUsize>::default();
    let rig = rig_with(Counter { asked: asked.clone(), ..Counter::default() });
    rig.boot(1);
    rig.device.go_live(false);
    let requests = WINDOWS * (BUDGET / 256) + 1;
    let start = Instant::now();
    for _ in 0..requests.div_ceil(QUEUE.into()) {
        ask_often(&rig, 1);
    }
    // The first window may have begun before.
    let least = WINDOW * (WINDOWS as u32 - 1);
    assert!(start.elapsed() >= least, "{:?}", start.elapsed());
    assert_eq!(asked.load(Ordering::Relaxed), requests.next_multiple_of(QUEUE.into()));
}

#[test]
fn a_host_without_random_bytes_is_asked_again() {
    let dry = Arc::new(AtomicBool::new(true));
    let rig = rig_with(Counter { dry: dry.clone(), ..Counter::default() });
    rig.boot(1);
    rig.device.go_live(false);
    let ring = rig.ring(0);
    ring.put(0, Descriptor::new(BUFFERS, 64, WRITE, 0));
    ring.offer(0);
    rig.kick(0);
    wait_for("the failure", || rig.device.failed() == 1);
    // A pause does not wait, and the request belongs to the state.
    rig.gate.close();
    rig.saved();
    rig.gate.open();
    assert!(!rig.needs_reset());
    dry.store(false, Ordering::Relaxed);
    wait_for("random bytes", || ring.used_index() == 1);
}

#[test]
fn a_resumed_guest_goes_on() {
    let old = rig();
    old.boot(1);
    old.device.go_live(false);
    works(&old);
    old.gate.close();
    let ring = old.ring(0);
    ring.put(0, Descriptor::new(BUFFERS, 64, WRITE, 0));
    ring.offer(0);
    old.kick(0);
    let state = old.saved();

    let source = Counter { next: 70.into(), ..Counter::default() };
    let new = Rig::on(old.memory.clone(), |host| RngDevice::with_source(source, host).unwrap());
    new.device.restore(&state).unwrap();
    assert_eq!(new.saved(), state);
    let interrupts = new.interrupts.get();
    new.device.go_live(true);
    wait_for("random bytes", || new.ring(0).used_index() == 2);
    assert_eq!(new.bytes(BUFFERS, 64), [71; 64]);
    assert!(new.interrupts.get() > interrupts);
}

#[test]
fn this_host_has_random_bytes() {
    let mut some = [[0; 1000]; 2];
    let host = HostEntropy::new().unwrap();
    some.iter_mut().for_each(|some| host.fill(some).unwrap());
    assert_ne!(some[0], some[1]);
}
