//! A primary with a connection, and output that takes as long as a test pleases.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use outlive_epoch::{GfnRange, Hello, Layout, Limits, ProtocolVersion, VersionRange, VmId};
use outlive_machine::{HeldOutput, Lease, OutputMode, Permit, Valve};
use outlive_pair::{Link, Primary, PrimaryConfig, PrimaryEvent, Timing};

use super::super::driver::SharedDriver;
use super::super::inbox::{Messages, Queue, inbox};
use super::super::links::{self, Plan};
use super::super::ports::Ports;
use super::super::stats::Totals;
use crate::clock::Clock;
use crate::link::{Agreed, Security};

/// How long anything may take on a busy machine.
pub(super) const BOUND: Duration = Duration::from_secs(30);
/// Longer than any test.
const DEAD_AFTER: Duration = Duration::from_secs(600);
/// The link of the first dial.
pub(super) const LINK: Link = Link(0);

/// Output whose sink takes as long as the test pleases.
#[derive(Default)]
pub(super) struct Stuck {
    pub(super) draining: AtomicBool,
    free: AtomicBool,
}

impl Stuck {
    pub(super) fn set_free(&self) {
        self.free.store(true, Ordering::SeqCst);
    }

    pub(super) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }
}

impl HeldOutput for Stuck {
    fn newest_held(&self) -> Option<u64> {
        None
    }

    fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
        while !self.free.load(Ordering::SeqCst) {
            thread::sleep(Duration::from_micros(100));
        }
    }
}

/// Frees it at the end of a test that has failed, too.
pub(super) struct Free<'a>(pub(super) &'a Stuck);

impl Drop for Free<'_> {
    fn drop(&mut self) {
        self.0.set_free();
    }
}

pub(super) fn wait_for(what: &str, mut until: impl FnMut() -> bool) {
    let deadline = Instant::now() + BOUND;
    while !until() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_micros(200));
    }
}

/// Does something as another thread; what is told comes when it is done.
pub(super) fn beside(work: impl FnOnce() + Send + 'static) -> Receiver<()> {
    let (tell, told) = channel();
    thread::spawn(move || {
        work();
        tell.send(()).ok();
    });
    told
}

pub(crate) fn hello() -> Hello {
    Hello {
        vm: VmId([1; 16]),
        generation: 1,
        vcpus: 1,
        memory_bytes: 4096,
        layout: Layout::new(vec![GfnRange { start: 0, pages: 1 }]).unwrap(),
        firmware_bytes: 0,
        devices: Vec::new(),
        mac: None,
        limits: Limits { max_pages: 1, max_state_bytes: 1, slots: 4, max_disk_bytes: 0 },
        interval_us: 1000,
        dead_after_us: 1000,
        name: String::new(),
        host: String::new(),
        tracker: String::new(),
        vendor: String::new(),
        arbiter: String::new(),
        lineage: Default::default(),
        versions: VersionRange::CURRENT,
        microcode: 0,
        vcpu: None,
        since: None,
    }
}

/// What a test works with.
pub(super) struct Rig {
    pub(super) driver: Arc<SharedDriver>,
    pub(super) valve: Arc<Valve>,
    pub(super) inbox: Messages,
    pub(super) queue: Queue,
    pub(super) totals: Arc<Totals>,
}

/// A driver in front of `output` that is connected to `standby`.
pub(super) fn connected(output: Arc<Stuck>, standby: SocketAddr) -> Rig {
    let (queue, inbox) = inbox();
    let clock = Clock::start();
    let timing = Timing::new(DEAD_AFTER);
    let config = PrimaryConfig { generation: 1, checkpoint: 0, handed: false, standbys: 1, slots: 4, timing };
    let permit = Arc::new(Permit::new(OutputMode::PassThrough, Lease::new()));
    let valve = Arc::new(Valve::new(permit, vec![output]));
    let totals = Totals::new(0);
    let (errand, errands) = links::errands();
    let ports = Ports::new(hello(), clock, valve.clone(), queue.clone(), errand, totals.clone());
    let machine = Primary::new(config, clock.now());
    let driver = SharedDriver::new(machine, ports, clock, valve.clone(), queue.clone(), totals.clone());
    let plan = Plan {
        standbys: vec![standby.to_string()],
        security: Security::Open,
        vm: VmId([1; 16]),
        heartbeat: timing.heartbeat(),
        totals: totals.clone(),
        inbox: queue.clone(),
    };
    links::start(errands, &driver, plan).unwrap();
    driver.handle(PrimaryEvent::Tick);
    wait_for("the connection", || driver.standby(LINK).is_some());
    Rig { driver, valve, inbox, queue, totals }
}

impl Rig {
    /// The standby accepts.
    pub(super) fn accepted(self) -> Self {
        let agreed = Agreed { version: ProtocolVersion::CURRENT, holds: false, strays: None };
        self.driver.agreed(LINK, agreed);
        self.driver.handle(PrimaryEvent::Accepted { link: LINK, dead_after: DEAD_AFTER });
        self
    }
}
