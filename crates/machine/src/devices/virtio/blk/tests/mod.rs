//! The disk with our own driver on one side and image files on the other.

mod answers;
mod driver;
mod engines;
mod faults;
mod formats;
mod hold;
mod hostile;
mod images;
mod lifecycle;
mod logging;
mod order;
mod permit;
mod sectors;
mod takeover;
mod units;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use self::driver::Driver;
use super::engine::manual::Manual;
use super::{BlockDevice, DiskOptions, EngineKind, Image, MAX_IN_FLIGHT, ReleasedWrites, WriteLog, engine};
use crate::devices::Device;
use crate::devices::valve::tests::Times;
use crate::devices::valve::{EpochError, Lease, OutputMode, Permit, Valve};
use crate::devices::virtio::hostile::{settle, wait_for};
use crate::devices::virtio::rig::{self, Count, Memory, Ring};
use crate::devices::virtio::{DeviceHost, Interrupt};

const MEMORY: usize = 32 << 20;
const EVENT_IDX: u64 = 1 << 29;
const F_RO: u64 = 1 << 5;
const F_FLUSH: u64 = 1 << 9;
const F_CONFIG_WCE: u64 = 1 << 11;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const ENGINES: [EngineKind; 2] = [EngineKind::Uring, EngineKind::Threads];

fn memory() -> Arc<Memory> {
    rig::memory(MEMORY)
}

/// For a disk that is not shared, or whose writes pass.
fn permit() -> Arc<Permit> {
    Arc::new(Permit::new(OutputMode::PassThrough, Lease::new()))
}

/// The memory of the machine that takes over: a copy.
fn copy(from: &Memory) -> Arc<Memory> {
    let to = memory();
    let mut bytes = vec![0; MEMORY];
    from.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    to.write_slice(&bytes, GuestAddress(0)).unwrap();
    to
}

/// A directory for images that goes away with the test.
struct Images(TempDir);

impl Images {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// In memory: faster, and another file system.
    fn in_memory() -> Self {
        Self(tempfile::tempdir_in("/dev/shm").unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// An image of zeroes without blocks.
    fn sparse(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }

    /// An image in which every sector begins with its number plus one.
    fn numbered(&self, name: &str, sectors: u64) -> PathBuf {
        let path = self.path(name);
        let mut bytes = vec![0; sectors as usize * 512];
        for (number, sector) in bytes.chunks_mut(512).enumerate() {
            sector[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
        }
        File::create(&path).unwrap().write_all(&bytes).unwrap();
        path
    }
}

fn content(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

/// A machine around one disk.
struct Rig {
    rig: rig::Rig<BlockDevice<Memory>>,
    permit: Arc<Permit>,
    valve: Valve,
    times: Arc<Times>,
    log: Arc<WriteLog>,
    full: Arc<Count>,
    /// The engine, if the test is it.
    manual: Option<Manual>,
}

impl std::ops::Deref for Rig {
    type Target = rig::Rig<BlockDevice<Memory>>;

    fn deref(&self) -> &Self::Target {
        &self.rig
    }
}

impl Rig {
    fn new(memory: &Arc<Memory>, options: &DiskOptions) -> Self {
        let (times, lease) = Times::lease();
        Self::with_lease(memory, options, times, lease)
    }

    /// A disk with the test's own lease.
    fn with_lease(memory: &Arc<Memory>, options: &DiskOptions, times: Arc<Times>, lease: Lease) -> Self {
        Self::build(memory, (times, lease), |log, permit, host| {
            (BlockDevice::new(options, 0, log, permit, host).unwrap(), None)
        })
    }

    /// A disk whose operations happen when the test says so, without a thread: [`turn`](Self::turn).
    fn manual(memory: &Arc<Memory>, options: &DiskOptions) -> Self {
        Self::build(memory, Times::lease(), |log, permit, host| {
            let image = Arc::new(Image::open(&options.path, options.readonly, options.shared, None).unwrap());
            let manual = Manual::new(image.clone()).unwrap();
            let engine = Box::new(manual.clone());
            let device = BlockDevice::with_engine(options, 0, log, permit, host, (image, engine)).unwrap();
            (device, Some(manual))
        })
    }

    /// A disk with its own engine and without a thread: each turn is the test's.
    fn by_turns(memory: &Arc<Memory>, options: &DiskOptions) -> Self {
        Self::build(memory, Times::lease(), |log, permit, host| {
            let image = Arc::new(Image::open(&options.path, options.readonly, options.shared, None).unwrap());
            let asked = options.shared.then(|| permit.clone());
            let engine = engine::start(options.engine, &image, MAX_IN_FLIGHT as u16, asked).unwrap();
            (BlockDevice::with_engine(options, 0, log, permit, host, (image, engine)).unwrap(), None)
        })
    }

    fn build(
        memory: &Arc<Memory>,
        (times, lease): (Arc<Times>, Lease),
        make: impl FnOnce(Arc<WriteLog>, Arc<Permit>, DeviceHost<Memory>) -> (BlockDevice<Memory>, Option<Manual>),
    ) -> Self {
        let full = Arc::new(Count::default());
        let log = {
            let full = full.clone();
            WriteLog::new(move || full.trigger())
        };
        let permit = Arc::new(Permit::new(OutputMode::PassThrough, lease));
        let mut manual = None;
        let rig = rig::Rig::on(memory.clone(), |host| {
            let (device, engine) = make(log.clone(), permit.clone(), host);
            manual = engine;
            device
        });
        let valve = Valve::new(permit.clone(), vec![rig.device.clone()]);
        Self { rig, permit, valve, times, log, full, manual }
    }

    /// Gives the device the thread that [`manual`](Self::manual) leaves out.
    fn start_thread(&mut self) {
        self.valve = Valve::new(self.permit.clone(), Vec::new());
        Arc::get_mut(&mut self.rig.device).expect("the test has no other").start_thread().unwrap();
        self.valve = Valve::new(self.permit.clone(), vec![self.device.clone()]);
    }

    /// Commits the epochs up to this one and lets their writes out.
    fn release(&self, through: u64) -> ReleasedWrites {
        self.valve.commit(through);
        self.device.let_out()
    }

    fn open(&self) -> ReleasedWrites {
        self.valve.open();
        self.device.let_out()
    }

    fn discard(&self) {
        self.valve.discard();
        self.valve.drain();
    }

    /// Has the driver set up the device with fresh queues and all features that it offers.
    fn boot(&self) -> Driver {
        self.boot_with(self.offered(), 1)
    }

    fn boot_with(&self, features: u64, queues: u16) -> Driver {
        let driver = Driver::fresh(&self.memory, queues);
        self.negotiate(features);
        for queue in 0..queues {
            self.add_queue(queue.into(), &driver.ring(queue));
        }
        self.start();
        driver
    }

    fn kick(&self, queue: u16) {
        self.rig.kick(queue.into());
    }

    /// Kicks queue 0 and waits until the device has used `used` chains in all.
    fn serve(&self, driver: &Driver, used: u16) {
        self.kick(0);
        wait_for("the requests", || driver.used(0) == used || self.needs_reset());
        assert!(!self.needs_reset());
    }

    /// The test's engine.
    fn engine(&self) -> &Manual {
        self.manual.as_ref().unwrap()
    }

    /// Does the thread's work, until nothing is left to do without the disk.
    fn turn(&self) {
        while self.device.turn() {}
    }

    /// Takes turns, and lets the disk do everything, until nothing is left to do.
    fn run(&self) {
        self.turn();
        while self.engine().complete_all() > 0 {
            self.turn();
        }
    }
}
