//! The machine as the server sees it, and the loops of the vCPUs.

use crate::abi::{self, BootInfo};
use crate::cpu;
use crate::logic::clock::{Clock, MAX_SLEEP_US};
use crate::logic::command::{Disk, Facts, Machine};
use crate::logic::server::{NetDevice, Server};
use crate::logic::work::{Control, Step, Worker};
use crate::pool::{Pool, PoolArena};
use crate::virtio::{Blk, Net};

/// vCPU 0 looks for frames this long after its last work, before it pays two exits for a sleep. The cores are
/// shared with the VMM and often with a whole second VM, so it is short.
const SPIN_US: u64 = 20;
/// Writes of the load in one slice: with dirty tracking each may cost a fault of 9 µs.
const WORK_SLICE: u64 = 16;
/// A worker sleeps at least this long, so that a high rate comes in small bursts instead of one exit per
/// write.
const WORK_TICK_US: u64 = 250;
/// While the transmit queue is full, look again this soon: the device wakes us for received frames only.
const FULL_QUEUE_US: u64 = 500;

/// Windows behind the network card's that may hold a disk.
const OTHER_DEVICES: u64 = 4;

/// The board of the work load, shared by all vCPUs.
pub static CONTROL: Control = Control::new();

/// Number of workers in a VM with this many vCPUs, and the vCPU of the first.
fn workers(vcpus: u32) -> (u32, u32) {
    if vcpus == 1 { (1, 0) } else { (vcpus - 1, 1) }
}

fn seed(info: &BootInfo) -> u64 {
    u64::from_le_bytes(core::array::from_fn(|i| info.random_seed[24 + i]))
}

/// vCPU 0's knowledge of the machine.
pub struct Host {
    facts: Facts,
    workers: u32,
    first_worker: u32,
    worker_pages: u64,
    /// The network card's window; the other devices' follow.
    windows: u64,
    /// The first disk, from the first command that asks for it: a VM whose clients never do is as if it had
    /// no driver.
    disk: Option<Option<Blk>>,
}

impl Host {
    /// For the machine of `info`.
    pub fn new(info: &BootInfo, pool: &Pool) -> Self {
        let (workers, first_worker) = workers(info.vcpus);
        let facts = Facts { vcpus: info.vcpus, memory_bytes: info.memory_bytes, ..Facts::default() };
        let worker_pages = pool.pages_per_worker(workers.into());
        Self { facts, workers, first_worker, worker_pages, windows: info.net_mmio_base, disk: None }
    }
}

impl Machine for Host {
    fn facts(&self) -> Facts {
        self.facts
    }

    fn disk(&mut self) -> Option<&mut dyn Disk> {
        let base = self.windows;
        let find = || {
            let windows = (1..=OTHER_DEVICES).map(|slot| base + slot * abi::NET_MMIO_SIZE);
            // SAFETY: the page tables map the whole device window, and a window without a device reads as one
            // without a disk. Nobody else drives disks, and this runs once.
            windows.filter_map(|window| unsafe { Blk::new(window) }).next()
        };
        self.disk.get_or_insert_with(find).as_mut().map(|disk| disk as &mut dyn Disk)
    }

    fn control(&self) -> &Control {
        &CONTROL
    }

    fn workers(&self) -> usize {
        self.workers as usize
    }

    fn worker_pages(&self) -> u64 {
        self.worker_pages
    }

    fn wake_workers(&mut self) {
        if self.first_worker > 0 {
            cpu::wake(((1 << self.workers) - 1) << self.first_worker);
        }
    }
}

/// The load on vCPU 0 of a VM with one vCPU.
struct OwnWork {
    worker: Worker,
    arena: PoolArena,
}

impl OwnWork {
    /// When to continue.
    fn step(&mut self, now_us: u64) -> Option<u64> {
        match self.worker.step(&CONTROL, &mut self.arena, now_us, WORK_SLICE) {
            Step::Idle => None,
            Step::Until(at) => Some(at.max(now_us + WORK_TICK_US)),
            Step::Busy => Some(now_us),
        }
    }
}

/// The main loop of vCPU 0.
///
/// # Safety
/// Called once, on vCPU 0.
pub unsafe fn serve(info: &BootInfo, pool: Pool, mut net: Net, mut server: Server, mut clock: Clock) -> ! {
    let mut host = Host::new(info, &pool);
    let mut work = (host.first_worker == 0).then(|| OwnWork {
        worker: Worker::new(0, 1, seed(info)),
        // SAFETY: the only part of the pool, made once since `serve` is called once.
        arena: unsafe { pool.arena(0, 1) },
    });
    let mut quiet_since = 0;
    loop {
        let now = clock.update(cpu::tsc());
        host.facts.uptime_us = now;
        (host.facts.frames_sent, host.facts.net_kicks) = net.counters();
        let busy = server.poll(&mut net, &mut host, now);
        let work_due = work.as_mut().and_then(|work| work.step(now));
        net.flush();
        if server.is_finished(now) {
            cpu::power(abi::POWER_OFF);
        }
        if busy {
            quiet_since = clock.update(cpu::tsc());
            continue;
        }
        let now = clock.update(cpu::tsc());
        let full = if net.is_full() { Some(now + FULL_QUEUE_US) } else { None };
        if net.has_frame() && full.is_none() {
            continue;
        }
        if now.saturating_sub(quiet_since) < SPIN_US {
            spin(&net, &mut clock, quiet_since + SPIN_US);
            continue;
        }
        // Nothing was sent although a timer says "now" (because of a closed window, for example): do not spin
        // on it.
        let net_due = server.next_due(now).map(|due| due.max(now + SPIN_US));
        let due = [net_due, work_due, full].into_iter().flatten().min();
        let timeout = due.map_or(u64::from(MAX_SLEEP_US), |due| due.saturating_sub(now));
        if timeout > 0 {
            host.facts.idles += 1;
            cpu::idle(timeout.min(MAX_SLEEP_US.into()) as u32);
        }
    }
}

fn spin(net: &Net, clock: &mut Clock, until_us: u64) {
    while net.peek().is_none() && clock.update(cpu::tsc()) < until_us {
        core::hint::spin_loop();
    }
}

/// The main loop of the other vCPUs.
///
/// # Safety
/// Called once on each vCPU but 0, with its index.
pub unsafe fn work(info: &BootInfo, pool: Pool, index: u32) -> ! {
    let (count, first) = workers(info.vcpus);
    let number = index - first;
    // SAFETY: each vCPU makes its own part, once by the caller's promise.
    let mut arena = unsafe { pool.arena(number.into(), count.into()) };
    let mut worker = Worker::new(number as usize, count as usize, seed(info));
    let mut clock = Clock::new(info.tsc_khz, cpu::tsc());
    let mut verified = CONTROL.verification();
    loop {
        let now = clock.update(cpu::tsc());
        let step = worker.step(&CONTROL, &mut arena, now, WORK_SLICE);
        if verified != CONTROL.verification() && CONTROL.is_verified(count as usize, CONTROL.verification()) {
            verified = CONTROL.verification();
            // The client of WORK VERIFY waits on vCPU 0.
            cpu::wake(1);
        }
        match step {
            Step::Busy => {}
            Step::Idle => cpu::idle(abi::IDLE_FOREVER),
            Step::Until(at) => {
                let sleep = at.saturating_sub(now).clamp(WORK_TICK_US, MAX_SLEEP_US.into());
                cpu::idle(sleep as u32);
            }
        }
    }
}
