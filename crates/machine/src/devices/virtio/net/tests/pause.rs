//! A sink that does not come back delays no pause and no decision: invariant 5.

use std::sync::mpsc::{Receiver, channel};
use std::thread;

use super::*;
use crate::devices::valve::HeldOutput;

/// A frame on it is on its way until [`let_go`](Self::let_go).
#[derive(Default)]
struct Stuck {
    entered: AtomicUsize,
    free: AtomicUsize,
    log: Recorder,
}

impl FrameSink for Stuck {
    fn send(&self, pair: usize, packet: &[u8]) -> io::Result<()> {
        self.entered.fetch_add(1, Ordering::SeqCst);
        while self.free.load(Ordering::SeqCst) == 0 {
            thread::sleep(Duration::from_micros(100));
        }
        self.log.send(pair, packet)
    }
}

impl Stuck {
    fn wait_until_stuck(&self) {
        wait_for("a frame on its way", || self.entered.load(Ordering::SeqCst) == 1);
    }

    fn let_go(&self) {
        self.free.store(1, Ordering::SeqCst);
    }
}

impl Drop for LetGo<'_> {
    fn drop(&mut self) {
        self.0.let_go();
    }
}

/// Lets go at the end of a test that has failed, too.
struct LetGo<'a>(&'a Stuck);

fn rig<'m>(memory: &'m Arc<Memory>, sink: &Arc<Stuck>) -> (Rig<'m>, Arc<Held>) {
    let mut rig = Rig::usual(memory);
    let output = Held::new(sink.clone(), OutputLimits::default(), OutputMode::PassThrough);
    let port = rig.port.clone();
    rig.put_behind(port, &output);
    (rig, output)
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

/// The bound is not what is tested: without an end to the wait there would be no end to the test.
fn is_done(told: &Receiver<()>, what: &str) {
    assert!(told.recv_timeout(Duration::from_secs(30)).is_ok(), "{what} waits for the sink");
}

/// What the coordinator does in the pause in which protection begins, and in the one after it.
fn two_pauses(gate: &Arc<DeviceGate>, output: &Arc<Held>) -> Receiver<()> {
    let (gate, output) = (gate.clone(), output.clone());
    beside(move || {
        gate.close();
        output.hold(1).unwrap();
        output.begin(1).unwrap();
        gate.open();
        gate.close();
        output.begin(2).unwrap();
        gate.open();
    })
}

#[test]
fn a_pause_does_not_wait_for_a_frame_that_passes_through() {
    let (memory, sink) = (memory(), Arc::new(Stuck::default()));
    let (rig, output) = rig(&memory, &sink);
    let _end = LetGo(&sink);
    let driver = rig.boot(FEATURES);
    rig.device.go_live(false);
    driver.send(0, &frame(0, 60));
    rig.kick_tx();
    sink.wait_until_stuck();
    is_done(&two_pauses(&rig.gate, &output), "the pause");
    sink.let_go();
    wait_for("the frame", || sink.log.count() == 1);
    assert_eq!(output.mode(), OutputMode::Hold);
}

#[test]
fn a_pause_does_not_wait_for_an_announcement() {
    let (memory, sink) = (memory(), Arc::new(Stuck::default()));
    let (rig, output) = rig(&memory, &sink);
    let announced = {
        let output = output.clone();
        beside(move || assert!(output.announce(&[0; 60])))
    };
    let _end = LetGo(&sink);
    sink.wait_until_stuck();
    is_done(&two_pauses(&rig.gate, &output), "the pause");
    sink.let_go();
    is_done(&announced, "the announcement");
}

#[test]
fn neither_a_pause_nor_a_decision_waits_for_committed_output() {
    let (memory, sink) = (memory(), Arc::new(Stuck::default()));
    let (rig, output) = rig(&memory, &sink);
    let _end = LetGo(&sink);
    is_done(&two_pauses(&rig.gate, &output), "the pause");
    assert_eq!(output.push(0, &frame(2, 60)), crate::devices::virtio::net::Pushed::Taken);
    output.begin(3).unwrap();
    let receiver = {
        let output = output.clone();
        beside(move || {
            let _ = output.release(2);
        })
    };
    sink.wait_until_stuck();
    // The guest sends on, the next checkpoints are taken and committed, the link is lost, the arbiter speaks.
    let others = {
        let (gate, output) = (rig.gate.clone(), output.clone());
        beside(move || {
            gate.close();
            output.begin(4).unwrap();
            gate.open();
            let _ = output.push(0, &frame(4, 60));
            output.valve.commit(3);
            output.valve.open();
            output.valve.discard();
            assert_eq!(output.newest_held(), Some(4));
        })
    };
    is_done(&others, "a decision");
    // Only who carries the discard out waits: afterwards nothing is on its way.
    let discarded = {
        let output = output.clone();
        beside(move || output.valve.drain())
    };
    assert!(discarded.recv_timeout(Duration::from_millis(50)).is_err(), "a frame is on its way");
    sink.let_go();
    is_done(&discarded, "the discard");
    is_done(&receiver, "the receiver");
    assert_eq!(sink.log.count(), 1);
    assert_eq!((output.newest_held(), output.stats().discarded_frames), (None, 1));
}
