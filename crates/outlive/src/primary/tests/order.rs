//! Decisions and pauses wait for no output that is on its way.

use std::net::TcpListener;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use outlive_machine::OutputMode;
use outlive_pair::{ExitReason, LossReason, PrimaryEvent as Event, PrimaryStatus, Wanted};

use super::rig::{BOUND, Free, LINK, Stuck, beside, connected, wait_for};
use crate::arbiter::{Arbiter, Claim, ClaimResult, ClaimWorker, FileArbiter, VmId};
use crate::events::{Event as Told, EventWriter};
use crate::primary::driver::SharedDriver;
use crate::primary::inbox::Inbox;

fn number(driver: &SharedDriver) -> Option<u64> {
    let base = matches!(driver.wanted(), Wanted::Base { .. });
    let (ticket, after) = driver.captured(LINK, base, false);
    assert!(!after.drain, "a pause lets nothing out");
    ticket.map(|ticket| ticket.number)
}

#[test]
fn a_decision_does_not_wait_for_the_output_of_an_acknowledgement() {
    let standby = TcpListener::bind("127.0.0.1:0").unwrap();
    let output = Arc::new(Stuck::default());
    let rig = connected(output.clone(), standby.local_addr().unwrap()).accepted();
    let _end = Free(&output);
    assert_eq!(number(&rig.driver), Some(1));
    let receiver = {
        let driver = rig.driver.clone();
        let stamp = driver.clock().now();
        beside(move || driver.handle(Event::Ack { link: LINK, generation: 1, checkpoint: 1, stamp }))
    };
    wait_for("the acknowledgement", || output.is_draining());
    // The next pause, decisions of other threads, and the coordinator's questions.
    let others = {
        let driver = rig.driver.clone();
        beside(move || {
            assert_eq!(number(&driver), Some(2));
            driver.handle(Event::Heard { link: LINK });
            driver.handle(Event::Tick);
            assert_eq!((driver.wait().wanted, driver.status()), (Wanted::Epoch, PrimaryStatus::Protected));
        })
    };
    assert!(others.recv_timeout(BOUND).is_ok(), "a decision waits for output on its way");
    assert!(receiver.try_recv().is_err(), "the output is still on its way");
    output.set_free();
    assert!(receiver.recv_timeout(BOUND).is_ok());
}

/// A thread that asks an arbiter where another host has won generation 2.
fn lost_arbitration(driver: &Arc<SharedDriver>) -> ClaimWorker {
    let directory = tempfile::tempdir().unwrap();
    let (mut arbiter, _) = FileArbiter::init(directory.path()).unwrap();
    let vm = VmId([1; 16]);
    assert_eq!(arbiter.claim(&vm, 1, "primary"), Claim::Won);
    assert_eq!(arbiter.claim(&vm, 2, "the standby"), Claim::Won);
    let told = driver.clone();
    let answered = move |it: ClaimResult| {
        assert!(directory.path().exists(), "it is needed until here");
        told.claimed(it.generation, it.claim, &EventWriter::disabled());
    };
    ClaimWorker::start(Box::new(arbiter), vm, "primary".into(), answered).unwrap()
}

#[test]
fn a_loser_is_silent_before_it_says_so() {
    let standby = TcpListener::bind("127.0.0.1:0").unwrap();
    let output = Arc::new(Stuck::default());
    let rig = connected(output.clone(), standby.local_addr().unwrap()).accepted();
    let _end = Free(&output);
    rig.driver.set_claims(lost_arbitration(&rig.driver));
    assert_eq!(number(&rig.driver), Some(1));
    rig.driver.handle(Event::LinkLost { link: LINK, why: LossReason::Closed });
    // The coordinator asks.
    rig.driver.handle(Event::Tick);
    wait_for("the discard", || output.is_draining());
    assert_eq!(rig.valve.mode(), OutputMode::Discard);
    assert!(rig.inbox.waiting().any(|it| matches!(it, Inbox::Exit(ExitReason::Fenced { .. }))));
    // What the coordinator does before it says why the process ends.
    let coordinator = {
        let driver = rig.driver.clone();
        beside(move || driver.finish_output())
    };
    assert!(coordinator.recv_timeout(Duration::from_millis(50)).is_err(), "a frame is on its way");
    output.set_free();
    assert!(coordinator.recv_timeout(BOUND).is_ok());
}

/// The thread that looks for rivals may hear of a loss before this side has asked, or at the same time.
#[test]
fn a_loss_is_told_once_whoever_hears_of_it_first() {
    let standby = TcpListener::bind("127.0.0.1:0").unwrap();
    let output = Arc::new(Stuck::default());
    let rig = connected(output.clone(), standby.local_addr().unwrap()).accepted();
    let _end = Free(&output);
    output.set_free();
    let events = EventWriter::disabled();
    let (tell, told) = channel();
    events.observe(move |event| {
        if let Told::Lost { generation, owner } = event {
            tell.send((*generation, owner.clone())).ok();
        }
    });
    assert_eq!(number(&rig.driver), Some(1));
    rig.driver.handle(Event::LinkLost { link: LINK, why: LossReason::Closed });
    assert_eq!(rig.driver.status(), PrimaryStatus::Arbitrating, "nobody has asked yet");
    rig.driver.superseded(2, "the standby".into(), &events);
    assert!(rig.inbox.waiting().any(|it| matches!(it, Inbox::Exit(ExitReason::Fenced { .. }))));
    rig.driver.claimed(2, Claim::Lost { owner: "the standby".into() }, &events);
    assert_eq!(told.try_iter().collect::<Vec<_>>(), [(2, "the standby".to_owned())]);
}
