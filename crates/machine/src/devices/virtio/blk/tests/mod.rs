//! The disk with a driver of ours on one side and image files on the other.

mod driver;
mod engines;
mod formats;
mod hold;
mod hostile;
mod images;
mod lifecycle;
mod logging;
mod order;
mod permit;
mod takeover;
mod units;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use self::driver::Driver;
use super::engine::manual::Manual;
use super::{BlockDevice, DiskOptions, EngineKind, Image, ReleasedWrites, WriteLog};
use crate::bus::SharedDevice;
use crate::devices::Device;
use crate::devices::gate::DeviceGate;
use crate::devices::valve::tests::Times;
use crate::devices::valve::{EpochError, Lease, OutputMode, Permit, Valve};
use crate::devices::virtio::{DeviceHost, Interrupt, Waker};

type Memory = GuestMemoryMmap<AtomicBitmap>;

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
    Arc::new(Memory::from_ranges(&[(GuestAddress(0), MEMORY)]).unwrap())
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

fn wait_for(what: &str, mut until: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !until() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}

/// Gives the device thread time to do what it must not do.
fn settle() {
    std::thread::sleep(Duration::from_millis(20));
}

#[derive(Default)]
struct Count(AtomicUsize);

impl Count {
    fn get(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Interrupt for Count {
    fn trigger(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Waker for Count {
    fn wake(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A directory for images that goes away with the test.
struct Images(TempDir);

impl Images {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    /// Somewhere in memory: faster, and another file system.
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
    memory: Arc<Memory>,
    device: Arc<BlockDevice<Memory>>,
    permit: Arc<Permit>,
    valve: Valve,
    times: Arc<Times>,
    registers: SharedDevice,
    log: Arc<WriteLog>,
    full: Arc<Count>,
    gate: Arc<DeviceGate>,
    interrupts: Arc<Count>,
    wakes: Arc<Count>,
    /// The engine, if the test is it.
    manual: Option<Manual>,
}

impl Rig {
    fn new(memory: &Arc<Memory>, options: &DiskOptions) -> Self {
        let (times, lease) = Times::lease();
        Self::with_lease(memory, options, times, lease)
    }

    /// A disk with a lease of the test's own.
    fn with_lease(memory: &Arc<Memory>, options: &DiskOptions, times: Arc<Times>, lease: Lease) -> Self {
        Self::build(memory, (times, lease), |log, permit, host| {
            (BlockDevice::new(options, 0, log, permit, host).unwrap(), None)
        })
    }

    /// A disk whose operations happen when the test says so. Without a thread: [`turn`](Self::turn).
    fn manual(memory: &Arc<Memory>, options: &DiskOptions) -> Self {
        Self::build(memory, Times::lease(), |log, permit, host| {
            let image = Arc::new(Image::open(&options.path, options.readonly, options.shared).unwrap());
            let manual = Manual::new(image.clone()).unwrap();
            let engine = Box::new(manual.clone());
            let device = BlockDevice::with_engine(options, 0, log, permit, host, (image, engine)).unwrap();
            (device, Some(manual))
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
        let (gate, interrupts, wakes) =
            (Arc::new(DeviceGate::new()), Arc::new(Count::default()), Arc::new(Count::default()));
        let host = DeviceHost {
            memory: memory.clone(),
            gate: gate.clone(),
            interrupt: interrupts.clone(),
            waker: wakes.clone(),
        };
        let permit = Arc::new(Permit::new(OutputMode::PassThrough, lease));
        let (device, manual) = make(log.clone(), permit.clone(), host);
        let device = Arc::new(device);
        let registers = device.registers();
        let valve = Valve::new(permit.clone(), vec![device.clone()]);
        Self {
            memory: memory.clone(),
            device,
            permit,
            valve,
            times,
            registers,
            log,
            full,
            gate,
            interrupts,
            wakes,
            manual,
        }
    }

    /// Gives the device the thread that [`manual`](Self::manual) leaves out.
    fn start_thread(&mut self) {
        self.valve = Valve::new(self.permit.clone(), Vec::new());
        Arc::get_mut(&mut self.device).expect("the test has no other").start_thread().unwrap();
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

    fn write(&self, register: u64, value: u32) {
        self.registers.lock().unwrap().write(register, &value.to_le_bytes());
    }

    fn read(&self, register: u64) -> u32 {
        let mut word = [0; 4];
        self.registers.lock().unwrap().read(register, &mut word);
        u32::from_le_bytes(word)
    }

    fn needs_reset(&self) -> bool {
        self.read(0x70) & 64 != 0
    }

    fn offered(&self) -> u64 {
        (0..2).fold(0, |all, half| {
            self.write(0x14, half);
            all | u64::from(self.read(0x10)) << (32 * half)
        })
    }

    /// Has the driver set up the device with fresh queues and all it offers.
    fn boot(&self) -> Driver {
        self.boot_with(self.offered(), 1)
    }

    fn boot_with(&self, features: u64, queues: u16) -> Driver {
        let driver = Driver::fresh(&self.memory, queues);
        self.write(0x70, 0);
        self.write(0x70, 3);
        for half in 0..2 {
            self.write(0x24, half);
            self.write(0x20, (features >> (32 * half)) as u32);
        }
        self.write(0x70, 11);
        for queue in 0..queues {
            let [table, available, used] = Driver::rings(queue);
            self.write(0x30, queue.into());
            self.write(0x38, driver::QUEUE.into());
            self.write(0x80, table as u32);
            self.write(0x90, available as u32);
            self.write(0xa0, used as u32);
            self.write(0x44, 1);
        }
        self.write(0x70, 15);
        assert_eq!(self.read(0x70), 15, "the device starts");
        driver
    }

    fn kick(&self, queue: u16) {
        self.write(0x50, queue.into());
    }

    /// Kicks queue 0 and waits until it has used `used` chains in all.
    fn serve(&self, driver: &Driver, used: u16) {
        self.kick(0);
        wait_for("the requests", || driver.used(0) == used || self.needs_reset());
        assert!(!self.needs_reset());
    }

    fn save(&self) -> Vec<u8> {
        let mut saved = Vec::with_capacity(self.device.state_bytes());
        let room = saved.capacity();
        self.device.save(&mut saved);
        assert_eq!(saved.capacity(), room, "saving allocates");
        saved
    }

    /// The test's engine.
    fn engine(&self) -> &Manual {
        self.manual.as_ref().unwrap()
    }

    /// Does what the thread would do, until nothing is left to do without the disk.
    fn turn(&self) {
        while self.device.turn() {}
    }

    /// Turns, and lets the disk do everything, until nothing is left to do.
    fn run(&self) {
        self.turn();
        while self.engine().complete_all() > 0 {
            self.turn();
        }
    }
}
