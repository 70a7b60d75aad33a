//! Decisions and pauses wait for no output that is on its way.

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use outlive_epoch::{GfnRange, Layout, Limits, VmId};
use outlive_machine::{HeldOutput, Lease, Permit};
use outlive_pair::{PrimaryConfig, Timing};

use super::*;

/// Output whose sink takes as long as the test pleases.
#[derive(Default)]
struct Stuck {
    draining: AtomicBool,
    free: AtomicBool,
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
struct Free<'a>(&'a Stuck);

impl Drop for Free<'_> {
    fn drop(&mut self) {
        self.0.free.store(true, Ordering::SeqCst);
    }
}

fn wait_for(what: &str, until: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !until() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        thread::sleep(Duration::from_micros(200));
    }
}

fn hello() -> Hello {
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
    }
}

/// A control in front of `output` with a standby that has accepted.
fn attached(output: Arc<Stuck>, standby: &TcpListener) -> (Arc<Control>, Link, Receiver<Inbox>) {
    let (inbox, told) = channel();
    let clock = Clock::start();
    let timing = Timing::new(Duration::from_secs(60));
    let config = PrimaryConfig { generation: 1, checkpoint: 0, standbys: 1, slots: 4, timing };
    let facts = Facts {
        standbys: vec![standby.local_addr().unwrap().to_string()],
        hello: hello(),
        heartbeat: timing.heartbeat(),
    };
    let permit = Arc::new(Permit::new(OutputMode::PassThrough, Lease::new()));
    let valve = Arc::new(Valve::new(permit, vec![output]));
    let pair = Primary::new(config, clock.now());
    let control = Control::new(pair, clock, facts, valve, inbox, EventWriter::disabled(), Totals::new(0));
    control.handle(Event::Tick);
    wait_for("the connection", || control.link().is_some());
    let link = control.link().unwrap();
    control.handle(Event::Accepted { link, dead_after: Duration::from_secs(60) });
    (control, link, told)
}

/// Does something as another thread; what is told comes when it is done.
fn beside(work: impl FnOnce() + Send + 'static) -> Receiver<()> {
    let (tell, told) = channel();
    thread::spawn(move || {
        work();
        tell.send(()).ok();
    });
    told
}

#[test]
fn a_pause_does_not_wait_for_the_output_of_an_acknowledgement() {
    let standby = TcpListener::bind("127.0.0.1:0").unwrap();
    let output = Arc::new(Stuck::default());
    let (control, link, _inbox) = attached(output.clone(), &standby);
    let _end = Free(&output);
    assert_eq!(control.captured().map(|ticket| ticket.number), Some(1));
    assert!(!output.draining.load(Ordering::SeqCst), "a pause lets nothing out");
    let receiver = {
        let control = control.clone();
        let stamp = control.clock.now();
        beside(move || control.handle(Event::Ack { link, generation: 1, checkpoint: 1, stamp }))
    };
    wait_for("the acknowledgement", || output.draining.load(Ordering::SeqCst));
    // The next pause, decisions of other threads, and the coordinator's questions.
    let others = {
        let control = control.clone();
        beside(move || {
            assert_eq!(control.captured().map(|ticket| ticket.number), Some(2));
            control.handle(Event::Heard { link });
            control.handle(Event::Tick);
            assert_eq!((control.wanted().0, control.status()), (Wanted::Epoch, PrimaryStatus::Protected));
        })
    };
    let bound = Duration::from_secs(30);
    assert!(others.recv_timeout(bound).is_ok(), "a pause waits for output on its way");
    assert!(receiver.try_recv().is_err(), "the output is still on its way");
    output.free.store(true, Ordering::SeqCst);
    assert!(receiver.recv_timeout(bound).is_ok());
}

#[test]
fn a_loser_is_silent_before_it_says_so() {
    let standby = TcpListener::bind("127.0.0.1:0").unwrap();
    let output = Arc::new(Stuck::default());
    let (control, link, inbox) = attached(output.clone(), &standby);
    let _end = Free(&output);
    control.captured().unwrap();
    control.handle(Event::LinkLost { link, why: LossReason::Closed });
    let claimed = {
        let control = control.clone();
        beside(move || control.claimed(2, Claim::Lost { owner: "the standby".into() }))
    };
    wait_for("the discard", || output.draining.load(Ordering::SeqCst));
    assert_eq!(control.valve.mode(), OutputMode::Discard);
    assert!(inbox.try_iter().any(|it| matches!(it, Inbox::Exit(ExitReason::Fenced { .. }))));
    // What the coordinator does before it says why the process ends.
    let coordinator = {
        let control = control.clone();
        beside(move || control.finish_output())
    };
    assert!(coordinator.recv_timeout(Duration::from_millis(50)).is_err(), "a frame is on its way");
    output.free.store(true, Ordering::SeqCst);
    for told in [claimed, coordinator] {
        assert!(told.recv_timeout(Duration::from_secs(30)).is_ok());
    }
}
