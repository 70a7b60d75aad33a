//! The bytes of the state that devices write, as they were when a release wrote them first. Each file stays as long as
//! its version is read.

use std::fmt::Debug;
use std::fs;
use std::path::Path;

use crate::check::{DiskHash, Hashes};
use crate::devices::serial::SerialState;
use crate::devices::virtio::blk::persist::{BlockState, DiskFacts, DiskState, InFlight};
use crate::devices::virtio::console::ScreenSize;
use crate::devices::virtio::net::control::Settings;
use crate::devices::virtio::net::mac::MacAddr;
use crate::devices::virtio::net::persist::CardState;
use crate::devices::virtio::persist::{DeviceState, QueueRecord, SavedState, TransportState};
use crate::devices::virtio::rng::RngState;

/// What to do when a test of this file fails.
const REMEDY: &str = "a host of the release before could not read this. Give the new bytes a new version, write their \
                      file with OUTLIVE_WRITE_GOLDEN=1, and keep the old file with its reader (docs/upgrade.md)";

/// Compares what is written now with the file of that version, and reads the file.
fn keeps<T: PartialEq + Debug>(name: &str, state: &T, written: &[u8], read: impl Fn(&[u8]) -> T) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    // A file that is there is never changed.
    if std::env::var_os("OUTLIVE_WRITE_GOLDEN").is_some() && !path.exists() {
        fs::write(&path, written).unwrap();
    }
    let golden = fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(golden == written, "the bytes of {name} have changed: {REMEDY}");
    assert_eq!(read(&golden), *state, "{name} is read as something else: {REMEDY}");
}

fn device<S: DeviceState + PartialEq + Debug>(name: &str, device: S, transport: TransportState) {
    let state = SavedState { device, transport };
    let mut bytes = Vec::new();
    state.encode(&mut bytes);
    keeps(&format!("{name}-v{}.bin", S::VERSION), &state, &bytes, |it| SavedState::decode(it).unwrap());
}

/// Registers of which each has a value of its own.
fn transport(device_type: u32, count: usize) -> TransportState {
    let mut transport = TransportState {
        device_type,
        status: 0x0f,
        driver_features: 0x0001_0000_0003_0000,
        device_features_select: 1,
        driver_features_select: 2,
        queue_select: 3,
        interrupt_status: 1,
        config_generation: 0x0405_0607,
        queue_count: count as u32,
        ..Default::default()
    };
    for (queue, at) in transport.queues.iter_mut().take(count).zip(1..) {
        *queue = QueueRecord {
            size: 256,
            ready: true,
            next_avail: 0x100 + at,
            next_used: 0x200 + at,
            descriptors: 0x10_0000 * u64::from(at),
            available: 0x10_0000 * u64::from(at) + 0x1000,
            used: 0x10_0000 * u64::from(at) + 0x2000,
        };
    }
    transport
}

#[test]
fn devices_are_saved_as_the_release_before_reads_them() {
    let facts = DiskFacts {
        sectors: 0x0102_0304_0506,
        shared: true,
        writeback: false,
        serial: *b"serial of the disk\0\0",
    };
    let in_flight = vec![InFlight { queue: 1, head: 0x203 }, InFlight { queue: 0, head: 5 }];
    device("blk", DiskState { facts, in_flight }, transport(2, 2));
    let mac = MacAddr([2, 0x11, 0x22, 0x33, 0x44, 0x55]);
    let settings = Settings {
        mac: MacAddr([2, 0x66, 0x77, 0x88, 0x99, 0xaa]),
        announce: true,
        promiscuous: true,
        all_multicast: false,
        offloads: 0x0102,
        pairs: 2,
    };
    device("net", CardState { mac, settings }, transport(1, 5));
    device("console", ScreenSize { columns: 132, rows: 43 }, transport(3, 2));
    device("rng", RngState, transport(4, 1));
}

#[test]
fn a_disk_with_requests_in_flight_is_the_type_that_a_checkpoint_has() {
    let bytes = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/blk-v1.bin")).unwrap();
    assert_eq!(BlockState::decode(&bytes).unwrap().device.in_flight.len(), 2);
}

#[test]
fn a_serial_port_is_saved_as_the_release_before_reads_it() {
    let mut fifo = [0; 64];
    fifo[..5].copy_from_slice(b"login");
    let state = SerialState {
        divisor: [12, 0],
        interrupt_enable: 0x0f,
        interrupt_identification: 0x04,
        line_control: 0x03,
        line_status: 0x61,
        modem_control: 0x08,
        modem_status: 0xb0,
        scratch: 0x5a,
        waiting: 5,
        fifo,
    };
    let mut bytes = Vec::new();
    state.encode(&mut bytes);
    keeps("serial-v1.bin", &state, &bytes, |it| SerialState::decode(it).unwrap());
}

#[test]
fn hashes_are_sent_as_the_release_before_reads_them() {
    let disks = vec![DiskHash { disk: 0, hash: 7 }, DiskHash { disk: 3, hash: 0x1112_1314_1516_1718 }];
    let hashes = Hashes { memory: 0x0102_0304_0506_0708, disks };
    let mut bytes = Vec::new();
    hashes.encode(&mut bytes);
    keeps("check-v1.bin", &hashes, &bytes, |it| Hashes::decode(it).unwrap());
}
