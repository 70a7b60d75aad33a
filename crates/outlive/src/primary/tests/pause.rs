//! Invariant 5 with everything real: a machine on KVM, the coordinator, the driver and its ports, a link to a
//! standby that acknowledges. (That the vCPUs' threads allocate nothing in a pause is the business of
//! `crates/machine/tests/pause.rs`.)

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use outlive_epoch::{
    Accept, Ack, Encoder, Message, Peer, Preface, ProtocolVersion, SectionReader, VersionRange, VmId,
};
use outlive_machine::{
    After as Then, Host, HostError, InPause, Machine, Options, Outgoing, OutputMode, PayloadOptions,
    SpillError,
};
use outlive_pair::{PrimaryStatus, Wanted};

use super::rig::{BOUND, Free, Stuck, connected, wait_for};
use crate::cli::Ending;
use crate::disk::Sidecars;
use crate::events::{EventWriter, Role};
use crate::link::CheckpointPart;
use crate::primary::capture::{self, InsidePause, Of};
use crate::primary::coordinator::{Coordinator, Setup};
use crate::primary::own_kernel::OwnKernel;
use crate::primary::self_check::SelfCheck;
use crate::status::Standing;
use crate::vm::limits::SLOTS;

/// Dirty pages at which an epoch ends.
const MAX_DIRTY: usize = 512;

/// A machine that runs the built-in guest, or a skip that is counted.
fn machine() -> Option<Machine> {
    let host = match Host::open() {
        Ok(host) => Arc::new(host),
        Err(HostError::Missing) => {
            println!("skipped: no /dev/kvm");
            return None;
        }
        Err(other) => panic!("{other}"),
    };
    let options = Options {
        vcpus: 2,
        memory: 64 << 20,
        firmware_bytes: 0,
        net: None,
        output: OutputMode::PassThrough,
        disks: Vec::new(),
        rng: false,
        console: None,
        serial: None,
        tracker: Default::default(),
        trigger: MAX_DIRTY,
        max_dirty: 2 * MAX_DIRTY,
        events: Arc::new(|_| {}),
    };
    let mut machine = Machine::new(host, &options).unwrap();
    let guest = PayloadOptions { ipv4: [10, 0, 0, 2], prefix: 24, gateway: [0; 4], random_seed: [7; 32] };
    machine.boot_payload(outlive_guest::PAYLOAD, &guest).unwrap();
    machine.go_live(false);
    machine.resume();
    Some(machine)
}

/// A standby that accepts and acknowledges everything, of a release that knows no newer version than this one.
/// It leaves when something comes that such a release would not read.
fn standby(mut stream: TcpStream, newest: ProtocolVersion) {
    let versions = VersionRange { newest: newest as u32, ..VersionRange::CURRENT };
    let mut reader = SectionReader::new(Peer::Primary);
    let mut encoder = Encoder::new();
    reader.read_preface(&mut stream).unwrap();
    let (mut open, mut out) = (None, Vec::new());
    while let Ok(section) = reader.read_section(&mut stream) {
        out.clear();
        match Message::parse(&section).unwrap() {
            Message::Hello(hello) => {
                out.extend_from_slice(&Preface::CURRENT.encode());
                let dead_after_us = Duration::from_secs(600).as_micros() as u64;
                let version = versions.common(hello.versions).unwrap();
                reader.agree(version);
                let (generation, host) = (hello.generation, "standby".to_owned());
                let accept = Accept { generation, dead_after_us, host, version, holds: false, strays: None };
                encoder.accept(&mut out, &accept).unwrap();
            }
            Message::CheckpointBegin(begin) => open = Some(begin.generation),
            Message::State { state, .. } => {
                assert_eq!(state.version, newest.state_versions().of(state.kind), "{:?}", state.kind);
            }
            Message::CheckpointEnd(end) => {
                let ack = Ack { generation: open.unwrap(), number: end.number, stamp_us: end.stamp_us };
                encoder.ack(&mut out, &ack);
            }
            _ => {}
        }
        if stream.write_all(&out).is_err() {
            return;
        }
    }
}

/// A coordinator whose machine is captured for the first time, in front of `output`.
fn guarding(machine: Machine, output: Arc<Stuck>) -> Coordinator {
    guarding_with(machine, output, ProtocolVersion::CURRENT)
}

/// The same with a standby that knows no newer version than this one.
fn guarding_with(machine: Machine, output: Arc<Stuck>, newest: ProtocolVersion) -> Coordinator {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let rig = connected(output, listener.local_addr().unwrap());
    thread::spawn(move || standby(listener.accept().unwrap().0, newest));
    let setup = Setup {
        arbiter_watch: None,
        rivals: None,
        own_kernel: OwnKernel::new(rig.queue.clone()),
        self_check: SelfCheck::new(None, &machine, rig.queue),
        machine,
        driver: rig.driver,
        inbox: rig.inbox,
        took_over: None,
        last_host_ended: false,
        disk_timeout: None,
        fences: false,
        wants_protection: false,
        stop_budget: Duration::from_secs(20),
        stop_within: Duration::from_secs(60),
        policy: capture::policy(Ending::Interval(Duration::from_millis(1)), MAX_DIRTY),
        staging_pages: 2 * MAX_DIRTY,
        longest_pause: Duration::from_secs(20),
        replicates_disks: false,
        books: crate::disk::Books::default(),
        known: None,
        shelf: (crate::vm::Shelf::default(), VmId([1; 16])),
        sidecars: Arc::new(
            Sidecars::start(Vec::new(), crate::disk::tests::provenance(VmId([1; 16]))).unwrap(),
        ),
        totals: rig.totals,
        events: EventWriter::disabled(),
        standing: Standing::new(Role::Primary, None, "a test"),
        reporter: None,
    };
    let mut coordinator = Coordinator::new(setup);
    turn_until(&mut coordinator, |it| it.captures > 0);
    coordinator
}

fn turn_until(coordinator: &mut Coordinator, until: impl Fn(&Coordinator) -> bool) {
    let deadline = Instant::now() + BOUND;
    while !until(coordinator) {
        assert!(Instant::now() < deadline, "it is {:?}", coordinator.with.driver.status());
        assert_eq!(coordinator.turn(), None);
    }
}

/// What the primary does in a pause, counted on the thread that does it: mostly a vCPU's.
struct Counted<'a> {
    inside: InsidePause<'a>,
    thread: ThreadId,
    allocations: u64,
}

impl InPause for Counted<'_> {
    fn counted(&mut self, pages: usize) {
        self.thread = thread::current().id();
        self.allocations += allocation_counter::measure(|| self.inside.counted(pages)).count_total;
    }

    fn spill(&mut self, staging: &mut Outgoing) -> Result<(), SpillError> {
        self.inside.spill(staging)
    }
}

/// Takes a checkpoint and hands it over. Returns how often the pause has allocated something, on this thread and
/// where the primary decides, and whether that was another thread. (What vCPUs' threads do beside it is counted by
/// `crates/machine/tests/pause.rs`.)
fn allocations_of_a_pause(coordinator: &mut Coordinator) -> (u64, bool) {
    turn_until(coordinator, |it| {
        it.with.driver.wanted() == Wanted::Epoch && it.protection.as_ref().unwrap().pool.has_free()
    });
    let protection = coordinator.protection.as_ref().unwrap();
    let (pool, of) = (protection.pool.clone(), Of { link: protection.link, base: false, stays: false });
    let (mut staging, driver) = (pool.take().unwrap(), coordinator.with.driver.clone());
    let here = thread::current().id();
    let inside = InsidePause::new(&driver, &pool, of);
    let mut inside = Counted { inside, thread: here, allocations: 0 };
    let mut report = None;
    let counted = allocation_counter::measure(|| {
        report = Some(coordinator.pause(&mut staging, Then::Resume, &mut inside));
    });
    let (ticket, pages) = (inside.inside.decided.ticket.unwrap(), report.unwrap().unwrap().pages);
    let totals = Some((pages, staging.state().len()));
    driver.ship(Box::new(CheckpointPart { ticket, totals, last: true, staging }));
    (counted.count_total + inside.allocations, inside.thread != here)
}

#[test]
fn a_pause_of_the_whole_primary_allocates_nothing() {
    let counted = allocation_counter::measure(|| drop(std::hint::black_box(Box::new([0u8; 64]))));
    assert_eq!(counted.count_total, 1, "the count counts");
    let Some(machine) = machine() else { return };
    let output = Arc::new(Stuck::default());
    output.set_free();
    let mut coordinator = guarding(machine, output);
    // The first ones size buffers.
    turn_until(&mut coordinator, |it| it.captures >= 20);
    let mut elsewhere = 0;
    for round in 0..300 {
        if round % 5 == 0 {
            // Enough pages for the parallel copy.
            coordinator.with.machine.ram().log().mark_range(0x80_0000, 150 * 4096);
        }
        let (allocations, other) = allocations_of_a_pause(&mut coordinator);
        assert_eq!(allocations, 0, "checkpoint {round}");
        elsewhere += u32::from(other);
    }
    assert!(elsewhere > 0, "no vCPU's thread has ended a pause");
    assert_eq!(coordinator.with.driver.status(), PrimaryStatus::Protected);
}

/// The thread that has read an acknowledgement is in the middle of a write to the tap, which does not return.
#[test]
fn a_pause_of_the_whole_primary_waits_for_no_output() {
    let Some(machine) = machine() else { return };
    let output = Arc::new(Stuck::default());
    let _end = Free(&output);
    let mut coordinator = guarding(machine, output.clone());
    wait_for("the acknowledgement of the base", || output.is_draining());
    let (done, waits) = channel();
    let watched = output.clone();
    let watch = thread::spawn(move || {
        let late = waits.recv_timeout(BOUND).is_err();
        watched.set_free();
        late
    });
    // After the base as many as there are slots, for no other acknowledgement is read.
    turn_until(&mut coordinator, |it| it.captures > SLOTS);
    done.send(()).ok();
    assert!(!watch.join().unwrap(), "a pause waits for output on its way");
}

/// Pages and state are such that a standby of the release before can read them.
#[test]
fn an_older_standby_gets_what_it_reads() {
    let Some(machine) = machine() else { return };
    let output = Arc::new(Stuck::default());
    output.set_free();
    let mut coordinator = guarding_with(machine, output, ProtocolVersion::V2);
    turn_until(&mut coordinator, |it| it.captures >= 20);
    assert_eq!(coordinator.with.driver.status(), PrimaryStatus::Protected);
}
