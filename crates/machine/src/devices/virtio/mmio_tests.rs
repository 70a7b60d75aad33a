//! The transport, register by register, with a device that only writes down what happens to it.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard};

use proptest::prelude::*;

use super::chain::Broken;
use super::mmio::*;
use super::persist::{DecodeError, Fields, QueueRecord, TransportState};
use super::rig::{Count, Memory, memory};
use super::ring::Queues;
use super::rng::RngState;
use super::slot::{Batch, CONFIG_BYTES, Identity, Model, Outcome, Slot};
use super::*;
use crate::bus::BusDevice;
use crate::devices::Device;

const MEMORY: usize = 1 << 20;
const FEATURES: u64 = COMMON_FEATURES | 1 << 5;
const SIZES: [u16; 2] = [256, 64];

// Register offsets, written out from the specification and not taken from where the transport has them.
const DEVICE_FEATURES: u64 = 0x10;
const DEVICE_FEATURES_SEL: u64 = 0x14;
const DRIVER_FEATURES: u64 = 0x20;
const DRIVER_FEATURES_SEL: u64 = 0x24;
const QUEUE_SEL: u64 = 0x30;
const QUEUE_NUM_MAX: u64 = 0x34;
const QUEUE_NUM: u64 = 0x38;
const QUEUE_READY: u64 = 0x44;
const NOTIFY: u64 = 0x50;
const INTERRUPT_STATUS: u64 = 0x60;
const INTERRUPT_ACK: u64 = 0x64;
const STATUS: u64 = 0x70;
const DESC: u64 = 0x80;
const DRIVER_AREA: u64 = 0x90;
const DEVICE_AREA: u64 = 0xa0;
const CONFIG_GENERATION: u64 = 0xfc;
const CONFIG: u64 = 0x100;

const ACK: u32 = 1;
const DRIVER: u32 = 2;
const DRIVER_OK: u32 = 4;
const FEATURES_OK: u32 = 8;
const NEEDS_RESET: u32 = 64;
const FAILED: u32 = 128;

/// What happened to the device: the features and the sizes of the queues at each start, and how often it was
/// reset.
#[derive(Default)]
struct Log {
    activations: Vec<(u64, [Option<u16>; MAX_QUEUES])>,
    resets: usize,
}

struct Fake(Arc<Mutex<Log>>);

impl Model<Memory> for Fake {
    type Core = ();
    type State = RngState;
    type Refusal = Infallible;

    const NAME: &'static str = "fake";
    const THREAD: &'static str = "fake";

    fn identity(&self) -> Identity {
        Identity { device_type: 7, features: FEATURES, queue_sizes: SIZES.into() }
    }
    fn config(&self, (): &()) -> [u8; CONFIG_BYTES] {
        std::array::from_fn(|at| at as u8 + 1)
    }
    fn activate(&self, (): &mut (), queues: &Queues<Memory>) -> Result<(), ActivateError> {
        self.0.lock().unwrap().activations.push((queues.features, queues.sizes()));
        queues.need(0)
    }
    fn reset(&self, (): &mut ()) {
        self.0.lock().unwrap().resets += 1;
    }
    fn batch(&self, (): &mut (), _: Batch<'_, Memory>) -> Result<Outcome, Broken> {
        Ok(Outcome::default())
    }
    fn save(&self, (): &(), _: &mut Vec<u8>) {}
    fn check(&self, _: &RngState, _: &TransportState) -> Result<(), Infallible> {
        Ok(())
    }
    fn restore(&self, (): &mut (), _: RngState) {}
}

struct Bench {
    slot: Slot<Memory, Fake>,
    log: Arc<Mutex<Log>>,
    interrupts: Arc<Count>,
}

fn bench() -> Bench {
    let (log, interrupts) = <(Arc<Mutex<Log>>, Arc<Count>)>::default();
    let host = DeviceHost {
        memory: memory(MEMORY),
        gate: Arc::default(),
        interrupt: interrupts.clone(),
        waker: interrupts.clone(),
    };
    Bench { slot: Slot::without_thread(Fake(log.clone()), (), host).unwrap(), log, interrupts }
}

impl Bench {
    fn transport(&self) -> MutexGuard<'_, MmioTransport<Memory, Fake>> {
        self.slot.transport()
    }

    fn read(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.transport().read(register, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&self, register: u64, value: u32) {
        self.transport().write(register, &value.to_le_bytes());
    }

    fn features(&self, features: u64) {
        self.write(STATUS, ACK);
        self.write(STATUS, ACK | DRIVER);
        for half in 0..2 {
            self.write(DRIVER_FEATURES_SEL, half);
            self.write(DRIVER_FEATURES, (features >> (32 * half)) as u32);
        }
        self.write(STATUS, ACK | DRIVER | FEATURES_OK);
    }

    fn queue(&self, index: u32, size: u32, at: u64) {
        self.write(QUEUE_SEL, index);
        self.write(QUEUE_NUM, size);
        for (register, address) in [(DESC, at), (DRIVER_AREA, at + 0x1000), (DEVICE_AREA, at + 0x2000)] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
    }

    fn start(&self) {
        self.features(FEATURES);
        self.queue(0, 128, 0x1_0000);
        self.queue(1, 64, 0x2_0000);
        self.write(STATUS, ACK | DRIVER | FEATURES_OK | DRIVER_OK);
    }

    fn activations(&self) -> usize {
        self.log.lock().unwrap().activations.len()
    }
}

#[test]
fn tells_what_it_is() {
    let b = bench();
    assert_eq!(b.read(0x00), u32::from_le_bytes(*b"virt"));
    assert_eq!(b.read(0x04), 2);
    assert_eq!(b.read(0x08), 7);
    assert_eq!(b.read(DEVICE_FEATURES), FEATURES as u32);
    b.write(DEVICE_FEATURES_SEL, 1);
    assert_eq!(b.read(DEVICE_FEATURES), (FEATURES >> 32) as u32);
    b.write(DEVICE_FEATURES_SEL, 2);
    assert_eq!(b.read(DEVICE_FEATURES), 0);
    for (queue, max) in [(0, 256), (1, 64), (2, 0), (u32::MAX, 0)] {
        b.write(QUEUE_SEL, queue);
        assert_eq!(b.read(QUEUE_NUM_MAX), max);
        assert_eq!(b.read(QUEUE_READY), 0);
    }
    assert_eq!(b.read(0xb0), u32::MAX, "no shared memory");
    assert_eq!(b.read(CONFIG + 3), 0x0706_0504);
}

#[test]
fn a_proper_driver_gets_the_device_running() {
    let b = bench();
    b.start();
    assert_eq!(b.read(STATUS), ACK | DRIVER | FEATURES_OK | DRIVER_OK);
    let mut sizes = [None; MAX_QUEUES];
    sizes[..2].copy_from_slice(&[Some(128), Some(64)]);
    let expected = (FEATURES, sizes);
    assert_eq!(b.log.lock().unwrap().activations, [expected]);
    b.write(QUEUE_SEL, 1);
    assert_eq!(b.read(QUEUE_READY), 1);
    assert_eq!(b.interrupts.get(), 0);
}

#[test]
fn features_must_have_been_offered_and_be_modern() {
    for features in [FEATURES | 1 << 3, FEATURES | 1 << 40, FEATURES & !(1 << 32), 0] {
        let b = bench();
        b.features(features);
        assert_eq!(b.read(STATUS), ACK | DRIVER, "{features:#x}");
        b.write(STATUS, ACK | DRIVER | FEATURES_OK | DRIVER_OK);
        assert_eq!(b.read(STATUS), ACK | DRIVER);
        assert_eq!(b.activations(), 0);
    }
    let b = bench();
    b.features(1 << 32);
    assert_eq!(b.read(STATUS), ACK | DRIVER | FEATURES_OK);
}

#[test]
fn features_are_fixed_once_accepted() {
    let b = bench();
    b.features(1 << 32);
    b.write(DRIVER_FEATURES_SEL, 0);
    b.write(DRIVER_FEATURES, u32::MAX);
    assert_eq!(b.transport().save().driver_features, 1 << 32);
}

#[test]
fn status_bits_come_in_order_and_do_not_go() {
    let b = bench();
    for early in [DRIVER, FEATURES_OK, DRIVER_OK, DRIVER | DRIVER_OK] {
        b.write(STATUS, early);
        assert_eq!(b.read(STATUS), 0, "{early:#x}");
    }
    b.write(STATUS, ACK | 0x10);
    assert_eq!(b.read(STATUS), 0, "an unknown bit");
    b.write(STATUS, ACK | DRIVER);
    b.write(STATUS, ACK);
    assert_eq!(b.read(STATUS), ACK | DRIVER, "a bit cannot be taken back");
    b.write(STATUS, ACK | DRIVER | NEEDS_RESET);
    assert_eq!(b.read(STATUS), ACK | DRIVER, "only the device says that it needs a reset");
    b.write(STATUS, ACK | DRIVER | FAILED);
    assert_eq!(b.read(STATUS), ACK | DRIVER | FAILED);
    b.write(STATUS, 0);
    assert_eq!(b.read(STATUS), 0);
}

#[test]
fn queues_outside_of_memory_or_unaligned_are_refused() {
    let end = MEMORY as u64;
    for (desc, driver, device) in [
        (end - 16, 0x1000, 0x2000),
        (0x1008, 0x2000, 0x3000),
        (0x1000, 0x2001, 0x3000),
        (0x1000, 0x2000, 0x3002),
        (0x1000, end - 2, 0x3000),
        (0x1000, 0x2000, end - 4),
        (!15, 0x2000, 0x3000),
        (0x1000, u64::MAX - 1, 0x3000),
        (0x1000, 0x2000, !3),
    ] {
        let b = bench();
        b.features(FEATURES);
        for (register, address) in [(DESC, desc), (DRIVER_AREA, driver), (DEVICE_AREA, device)] {
            b.write(register, address as u32);
            b.write(register + 4, (address >> 32) as u32);
        }
        b.write(QUEUE_READY, 1);
        assert_eq!(b.read(QUEUE_READY), 0, "{desc:#x} {driver:#x} {device:#x}");
    }
}

#[test]
fn queue_sizes_are_powers_of_two_within_the_limit() {
    let b = bench();
    b.features(FEATURES);
    for bad in [0, 3, 512, 65536 + 4, u32::MAX] {
        b.write(QUEUE_NUM, bad);
        assert_eq!(b.transport().save().queues[0].size, 256, "{bad}");
    }
    b.write(QUEUE_NUM, 8);
    assert_eq!(b.transport().save().queues[0].size, 8);
}

#[test]
fn queues_are_set_up_between_features_and_driver_only() {
    let b = bench();
    b.queue(0, 8, 0x1000);
    assert_eq!(b.transport().save().queues[0].size, 256, "too early");
    b.write(STATUS, 0);
    b.start();
    let before = b.transport().save();
    b.queue(0, 8, 0x5000);
    b.write(QUEUE_READY, 0);
    b.queue(9, 8, 0x5000);
    b.write(QUEUE_SEL, before.queue_select);
    assert_eq!(b.transport().save(), before, "too late");
}

#[test]
fn a_queue_in_use_is_not_changed() {
    let b = bench();
    b.features(FEATURES);
    b.queue(0, 8, 0x1000);
    b.queue(0, 16, 0x8000);
    assert_eq!(b.transport().save().queues[0].size, 8);
    assert_eq!(b.transport().save().queues[0].descriptors, 0x1000);
    b.write(QUEUE_READY, 0);
    b.queue(0, 16, 0x8000);
    assert_eq!(b.transport().save().queues[0].descriptors, 0x8000);
}

#[test]
fn a_device_that_cannot_start_asks_for_a_reset() {
    let b = bench();
    b.features(FEATURES);
    b.queue(1, 8, 0x1000);
    b.write(STATUS, ACK | DRIVER | FEATURES_OK | DRIVER_OK);
    assert_eq!(b.read(STATUS), ACK | DRIVER | FEATURES_OK | DRIVER_OK | NEEDS_RESET);
    assert_eq!(b.read(INTERRUPT_STATUS), 2);
    assert_eq!(b.interrupts.get(), 1);
    b.write(STATUS, 0);
    assert_eq!((b.read(STATUS), b.read(INTERRUPT_STATUS)), (0, 0));
    b.start();
    assert_eq!(b.read(STATUS), ACK | DRIVER | FEATURES_OK | DRIVER_OK);
}

#[test]
fn reset_forgets_everything() {
    let b = bench();
    let new = b.transport().save();
    b.start();
    b.transport().line().signal_used();
    b.write(STATUS, 0);
    assert_eq!(b.transport().save(), new);
    assert_eq!(b.log.lock().unwrap().resets, 1);
}

#[test]
fn interrupts_stay_until_acknowledged() {
    let b = bench();
    b.start();
    b.transport().line().signal_used();
    b.transport().config_changed();
    assert_eq!(b.read(INTERRUPT_STATUS), 3);
    assert_eq!(b.read(CONFIG_GENERATION), 1);
    assert_eq!(b.interrupts.get(), 2);
    b.write(INTERRUPT_ACK, 1);
    assert_eq!(b.read(INTERRUPT_STATUS), 2);
    b.write(INTERRUPT_ACK, u32::MAX);
    assert_eq!(b.read(INTERRUPT_STATUS), 0);
}

#[test]
fn notifications_reach_the_eventfd_of_their_queue() {
    let b = bench();
    b.write(NOTIFY, 0);
    assert!(b.slot.kicks()[0].read().is_err(), "not running yet");
    b.start();
    b.write(NOTIFY, 1);
    b.write(NOTIFY, 1);
    b.write(NOTIFY, 2);
    b.write(NOTIFY, u32::MAX);
    assert_eq!(b.slot.kicks()[1].read().unwrap(), 2);
    assert!(b.slot.kicks()[0].read().is_err());
}

#[test]
fn registers_are_words() {
    let b = bench();
    for (offset, len) in [(0, 1), (0, 2), (0, 8), (2, 4), (0xfe, 4)] {
        let mut data = vec![0; len];
        b.transport().read(offset, &mut data);
        assert!(data.iter().all(|&byte| byte == 0xff), "{offset} {len}");
        b.transport().write(offset, &data);
    }
    b.transport().write(STATUS, &[1]);
    assert_eq!(b.read(STATUS), 0);
}

#[test]
fn a_saved_transport_goes_on_elsewhere() {
    let here = bench();
    here.start();
    here.transport().line().signal_used();
    here.write(DEVICE_FEATURES_SEL, 1);
    let mut state = here.transport().save();
    (state.queues[0].next_avail, state.queues[0].next_used) = (0xfffe, 0xfff0);

    let mut bytes = Vec::new();
    state.encode(&mut bytes);
    assert!(bytes.len() <= TransportState::BYTES);
    let mut fields = Fields::new(&bytes);
    assert_eq!(TransportState::decode(&mut fields), Ok(state));
    assert_eq!(fields.finish(), Ok(()));

    let there = bench();
    there.transport().restore(&state).unwrap();
    assert_eq!(there.transport().save(), state);
    assert_eq!(there.activations(), 1);
    let positions = there.slot.shared().core().queues.as_ref().unwrap().positions(0);
    assert_eq!(positions, Some((0xfffe, 0xfff0)));
    // What the device has come to counts, not what the driver had set up.
    there.slot.shared().core().queues.as_mut().unwrap().ring(0).unwrap().0.put_back(1);
    assert_eq!(there.transport().save().queues[0].next_avail, 0xfffd);
    assert_eq!(there.read(INTERRUPT_STATUS), 1);
    assert_eq!(there.read(DEVICE_FEATURES), (FEATURES >> 32) as u32);
}

#[test]
fn a_broken_device_is_restored_broken() {
    let here = bench();
    here.start();
    here.transport().line().fail();
    let state = here.transport().save();
    let there = bench();
    there.transport().restore(&state).unwrap();
    assert_eq!(there.read(STATUS) & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(there.activations(), 0, "it must not touch the queues again");
    assert_eq!(there.transport().save(), state);
}

#[test]
fn impossible_states_are_refused_and_leave_a_reset_device() {
    use TransportRestoreError as Error;
    let b = bench();
    b.start();
    let good = b.transport().save();
    let queue = |change: fn(&mut QueueRecord)| {
        let mut state = good;
        change(&mut state.queues[0]);
        (state, Error::Queue(0))
    };
    let cases = [
        (TransportState { device_type: 1, ..good }, Error::DeviceType { found: 1, expected: 7 }),
        (TransportState { queue_count: 1, ..good }, Error::QueueCount { found: 1, expected: 2 }),
        (TransportState { driver_features: FEATURES | 1, ..good }, Error::Features(1)),
        (TransportState { driver_features: 0, ..good }, Error::Features(0)),
        (TransportState { status: 0x100, ..good }, Error::Status(0x100)),
        (TransportState { status: ACK | DRIVER | DRIVER_OK, ..good }, Error::Status(7)),
        (TransportState { status: FEATURES_OK, ..good }, Error::Status(8)),
        (TransportState { interrupt_status: 4, ..good }, Error::InterruptStatus(4)),
        queue(|queue| queue.size = 0),
        queue(|queue| queue.size = 512),
        queue(|queue| queue.size = 100),
        queue(|queue| queue.descriptors = MEMORY as u64),
        queue(|queue| queue.available = 1),
        queue(|queue| queue.used = u64::MAX - 3),
    ];
    let fresh = bench().transport().save();
    for (state, expected) in cases {
        let b = bench();
        b.start();
        assert_eq!(b.transport().restore(&state), Err(expected));
        assert_eq!(b.transport().save(), fresh);
    }
    let mut state = good;
    state.queues[0].ready = false;
    let b = bench();
    assert_eq!(b.transport().restore(&state), Err(Error::Activate(ActivateError::QueueNotReady(0))));
    assert_eq!(b.transport().save(), fresh);
}

#[test]
fn cut_or_senseless_bytes_are_no_state() {
    let b = bench();
    b.start();
    let mut bytes = Vec::new();
    b.transport().save().encode(&mut bytes);
    for len in 0..bytes.len() {
        assert_eq!(TransportState::decode(&mut Fields::new(&bytes[..len])), Err(DecodeError::Short));
    }
    let ready = 8 * 4 + 8 + 2;
    let count = ready - 2 - 4;
    for (at, field, value) in [(ready, "queue ready", 2), (count, "queue count", MAX_QUEUES as u64 + 1)] {
        let mut bytes = bytes.clone();
        bytes[at] = value as u8;
        let refused = Err(DecodeError::Value { field, value });
        assert_eq!(TransportState::decode(&mut Fields::new(&bytes)), refused);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever a driver writes wherever: no panic, the rules of the status register hold, and the state it
    /// leads to can be saved and restored.
    #[test]
    fn any_writes_lead_to_a_valid_state(writes in prop::collection::vec(
        (prop_oneof![Just(STATUS), Just(QUEUE_READY), Just(QUEUE_SEL), (0u64..0x44).prop_map(|r| r * 4)],
         prop_oneof![0u32..16, any::<u32>()]), 1..200), proper in any::<bool>()) {
        let b = bench();
        if proper {
            b.start();
        }
        for (register, value) in writes {
            b.write(register, value);
            b.read(register);
            let status = b.read(STATUS);
            prop_assert!(status & DRIVER_OK == 0 || status & FEATURES_OK != 0);
            prop_assert!(status & FEATURES_OK == 0 || status & DRIVER != 0);
        }
        let state = b.transport().save();
        let there = bench();
        there.transport().restore(&state).unwrap();
        prop_assert_eq!(there.transport().save(), state);
    }
}
