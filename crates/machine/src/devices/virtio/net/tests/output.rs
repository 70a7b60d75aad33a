//! Held output: never early, never reordered, never lost without being counted.

use std::collections::VecDeque;
use std::sync::atomic::AtomicU64;
use std::thread;

use proptest::prelude::*;

use super::*;
use crate::devices::virtio::net::{OutputStats, Pushed};

/// A frame of Ethernet's usual size.
const ETHERNET: usize = 1518;
const SMALL: OutputLimits = OutputLimits { frames: 8, bytes: 4096 };

fn output(limits: OutputLimits, mode: OutputMode) -> (Arc<Held>, Arc<Recorder>) {
    let sink = Arc::new(Recorder::default());
    (Held::new(sink.clone(), limits, mode), sink)
}

fn holding() -> (Arc<Held>, Arc<Recorder>) {
    let (output, sink) = output(SMALL, OutputMode::Hold);
    output.hold(1).unwrap();
    (output, sink)
}

/// Inside the gate.
fn take(output: &Output, number: u32) {
    assert_eq!(output.push(0, &frame(number, 60)), Pushed::Taken);
}

/// As the device's thread does it.
fn push(output: &Output, number: u32) {
    assert_eq!(output.push(0, &frame(number, 60)), Pushed::Taken);
    output.drain_if_open();
}

fn numbers(sink: &Recorder) -> Vec<u32> {
    sink.packets().iter().map(|frame| u32::from_le_bytes(frame[14..18].try_into().unwrap())).collect()
}

#[test]
fn nothing_leaves_before_its_epoch_is_committed() {
    let (output, sink) = holding();
    push(&output, 10);
    push(&output, 11);
    output.begin(2).unwrap();
    push(&output, 20);
    output.begin(3).unwrap();
    push(&output, 30);
    assert_eq!(output.release(0), Released { frames: 0, bytes: 0, complete: true });
    assert_eq!(sink.count(), 0);
    assert_eq!(output.release(1), Released { frames: 2, bytes: 120, complete: true });
    assert_eq!(numbers(&sink), [10, 11]);
    assert_eq!(output.release(2).frames, 1);
    assert_eq!(numbers(&sink), [10, 11, 20]);
    assert_eq!(output.stats().held_frames, 1);
}

#[test]
fn the_running_epoch_is_not_released_even_on_request() {
    let (output, sink) = holding();
    push(&output, 1);
    assert_eq!(output.release(1).frames, 0);
    assert_eq!(output.release(u64::MAX).frames, 0);
    assert_eq!(sink.count(), 0);
    output.begin(2).unwrap();
    push(&output, 2);
    assert_eq!(output.release(u64::MAX).frames, 1);
    assert_eq!(numbers(&sink), [1]);
}

#[test]
fn permission_is_asked_before_each_frame_and_its_loss_is_final() {
    let (output, sink) = holding();
    for number in 0..4 {
        push(&output, number);
    }
    output.begin(2).unwrap();
    let (released, asked) = output.release_with(1, 2);
    assert_eq!((released.frames, released.complete, asked), (2, false, 3));
    assert_eq!(output.release(1), Released::default(), "once refused, nothing leaves");
    assert_eq!(output.stats().held_frames, 2, "the frames are kept");
    assert_eq!(numbers(&sink), [0, 1]);
    assert!(output.open().complete, "unless this side has won the right to go on");
    assert_eq!(numbers(&sink), [0, 1, 2, 3]);
}

#[test]
fn permission_is_not_asked_when_nothing_is_due() {
    let (output, _) = holding();
    push(&output, 1);
    let (released, asked) = output.release_with(5, 0);
    assert_eq!((released.complete, asked), (true, 0), "nothing may leave");
}

#[test]
fn pass_through_flushes_in_order_and_then_is_direct() {
    let (output, sink) = holding();
    push(&output, 1);
    output.begin(2).unwrap();
    push(&output, 2);
    assert_eq!(output.open(), Released { frames: 2, bytes: 120, complete: true });
    push(&output, 3);
    assert_eq!(numbers(&sink), [1, 2, 3]);
    output.hold(7).unwrap();
    push(&output, 4);
    assert_eq!(numbers(&sink), [1, 2, 3]);
    let stats = output.stats();
    assert_eq!((stats.passed_frames, stats.released_frames, stats.held_frames), (1, 2, 1));
}

#[test]
fn discard_drops_what_is_held_and_what_comes() {
    let (output, sink) = holding();
    push(&output, 1);
    output.discard();
    push(&output, 2);
    output.begin(9).unwrap();
    push(&output, 3);
    assert_eq!(output.mode(), OutputMode::Discard, "a new epoch does not end it");
    assert_eq!(output.release(8), Released::default());
    assert!(!output.announce(&[0; 60]));
    assert_eq!(sink.count(), 0);
    assert_eq!(output.stats().discarded_frames, 3);
    assert_eq!(output.stats().held_frames, 0);
    output.hold(10).unwrap();
    push(&output, 4);
    output.begin(11).unwrap();
    assert_eq!(output.release(10).frames, 1);
    assert_eq!(numbers(&sink), [4]);
}

#[test]
fn a_full_ring_leaves_the_frame_with_the_guest() {
    let (output, _) = holding();
    for number in 0..8 {
        push(&output, number);
    }
    assert_eq!(output.push(0, &frame(8, 60)), Pushed::Full);
    assert!(output.space().read().is_err());
    assert_eq!(output.release(0).frames, 0);
    output.begin(2).unwrap();
    output.release(1);
    assert_eq!(output.space().read().unwrap(), 1, "told once there is room");
    let (output, _) = holding();
    for _ in 0..2 {
        assert_eq!(output.push(0, &[0; ETHERNET]), Pushed::Taken);
    }
    assert_eq!(output.push(0, &[0; ETHERNET]), Pushed::Full, "bytes are bounded too");
    assert_eq!(output.push(0, &[0; 1000]), Pushed::Taken);
    let stats = output.stats();
    assert_eq!((stats.held_frames, stats.held_bytes, stats.most_bytes, stats.full), (3, 4036, 4036, 1));
}

#[test]
fn epochs_do_not_go_back_under_held_frames() {
    let (output, _) = holding();
    output.begin(5).unwrap();
    output.begin(4).unwrap();
    push(&output, 1);
    let refused = EpochError { asked: 3, held: 4 };
    assert_eq!(output.begin(3), Err(refused));
    assert_eq!(output.hold(3), Err(refused));
    output.discard();
    output.hold(1).unwrap();
}

#[test]
fn only_a_vm_that_nobody_can_replace_announces_itself() {
    let (output, sink) = holding();
    push(&output, 1);
    assert!(!output.announce(&frame(99, 60)));
    assert!(numbers(&sink).is_empty());
    output.open();
    assert!(output.announce(&frame(99, 60)));
    assert_eq!(numbers(&sink), [1, 99]);
}

#[test]
fn the_first_frame_that_leaves_is_reported_once() {
    let seen = Arc::new(Count::default());
    let hook = |output: &Output| {
        let seen = seen.clone();
        output.on_first_frame(move || _ = seen.add());
    };
    let (output, _) = holding();
    hook(&output);
    output.announce(&[0; 60]);
    push(&output, 1);
    push(&output, 2);
    output.begin(2).unwrap();
    assert_eq!(seen.get(), 0, "held is not sent");
    output.release(1);
    assert_eq!(seen.get(), 1);
    output.open();
    hook(&output);
    push(&output, 3);
    push(&output, 4);
    assert_eq!(seen.get(), 2);
}

/// A sink that is down every second time.
#[derive(Default)]
struct Flaky(Recorder, AtomicU64);

impl FrameSink for Flaky {
    fn send(&self, pair: usize, frame: &[u8]) -> io::Result<()> {
        if self.1.fetch_add(1, Ordering::Relaxed) % 2 == 1 {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.0.send(pair, frame)
    }
}

#[test]
fn a_sink_that_refuses_a_frame_does_not_stop_the_others() {
    let sink = Arc::new(Flaky::default());
    let output = Held::new(sink.clone(), SMALL, OutputMode::Hold);
    output.hold(1).unwrap();
    for number in 0..4 {
        push(&output, number);
    }
    output.begin(2).unwrap();
    assert_eq!(output.release(1), Released { frames: 4, bytes: 240, complete: true });
    assert_eq!(numbers(&sink.0), [0, 2]);
    output.open();
    push(&output, 4);
    push(&output, 5);
    assert_eq!(numbers(&sink.0), [0, 2, 4]);
    assert_eq!(output.stats().refused_frames, 3);
}

#[derive(Clone, Debug)]
enum Op {
    Push(usize),
    NextEpoch,
    /// Commit this many epochs behind the running one; permission for so many frames.
    Release(u64, usize),
    Hold,
    PassThrough,
    Discard,
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        12 => prop_oneof![18usize..=200, 18usize..=ETHERNET].prop_map(Op::Push),
        4 => Just(Op::NextEpoch),
        4 => (0u64..4, prop_oneof![Just(usize::MAX), 0usize..6])
            .prop_map(|(behind, may)| Op::Release(behind, may)),
        1 => Just(Op::Hold),
        1 => Just(Op::PassThrough),
        1 => Just(Op::Discard),
    ]
}

/// The naive output: what must have left, and what is held.
struct Oracle {
    mode: OutputMode,
    epoch: u64,
    forbidden: bool,
    held: VecDeque<(u64, Vec<u8>)>,
    left: Vec<Vec<u8>>,
    discarded: u64,
}

impl Oracle {
    fn release(&mut self, through: u64, mut may: usize) -> bool {
        if self.mode == OutputMode::Discard || self.forbidden {
            return false;
        }
        while self.held.front().is_some_and(|(epoch, _)| *epoch <= through && *epoch < self.epoch) {
            if may == 0 {
                self.forbidden = true;
                return false;
            }
            may -= 1;
            self.left.push(self.held.pop_front().unwrap().1);
        }
        true
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn output_does_what_the_naive_one_does(ops in prop::collection::vec(op(), 1..120)) {
        let (output, sink) = output(SMALL, OutputMode::PassThrough);
        let mut oracle = Oracle {
            mode: OutputMode::PassThrough, epoch: 0, forbidden: false,
            held: VecDeque::new(), left: Vec::new(), discarded: 0,
        };
        for (number, op) in ops.into_iter().enumerate() {
            match op {
                Op::Push(len) => {
                    let frame = frame(number as u32, len);
                    let pushed = output.push(0, &frame);
                    output.drain_if_open();
                    let bytes: usize = oracle.held.iter().map(|(_, frame)| frame.len()).sum();
                    match oracle.mode {
                        _ if pushed == Pushed::Full => {
                            prop_assert_eq!(oracle.mode, OutputMode::Hold);
                            // The free bytes may be in two pieces, one too short and one skipped.
                            let little = SMALL.bytes - bytes < len + ETHERNET;
                            prop_assert!(oracle.held.len() == SMALL.frames || little);
                        }
                        OutputMode::PassThrough => oracle.left.push(frame),
                        OutputMode::Discard => oracle.discarded += 1,
                        OutputMode::Hold => {
                            prop_assert!(oracle.held.len() < SMALL.frames && bytes + len <= SMALL.bytes);
                            oracle.held.push_back((oracle.epoch, frame));
                        }
                    }
                }
                Op::NextEpoch => {
                    oracle.epoch += 1;
                    output.begin(oracle.epoch).unwrap();
                }
                Op::Release(behind, frames) => {
                    // 0 asks for the running epoch itself, which must be refused.
                    let through = oracle.epoch.saturating_sub(behind);
                    let before = oracle.left.len();
                    let complete = oracle.release(through, frames);
                    let (released, _) = output.release_with(through, frames);
                    prop_assert_eq!(released.complete, complete);
                    prop_assert_eq!(released.frames as usize, oracle.left.len() - before);
                }
                Op::Hold => {
                    oracle.epoch += 1;
                    (oracle.mode, oracle.forbidden) = (OutputMode::Hold, false);
                    output.hold(oracle.epoch).unwrap();
                }
                Op::PassThrough => {
                    (oracle.mode, oracle.forbidden) = (OutputMode::PassThrough, false);
                    oracle.left.extend(oracle.held.drain(..).map(|(_, frame)| frame));
                    prop_assert!(output.open().complete);
                }
                Op::Discard => {
                    oracle.mode = OutputMode::Discard;
                    oracle.discarded += oracle.held.len() as u64;
                    oracle.held.clear();
                    output.discard();
                }
            }
            prop_assert_eq!(&sink.packets(), &oracle.left);
            let OutputStats { held_frames, discarded_frames, .. } = output.stats();
            prop_assert_eq!((held_frames as usize, discarded_frames), (oracle.held.len(), oracle.discarded));
        }
    }
}

/// Checks each frame against the epoch that is committed at this moment.
struct Judge {
    committed: AtomicU64,
    frames: Mutex<Vec<(u64, u32)>>,
}

impl FrameSink for Judge {
    fn send(&self, _pair: usize, frame: &[u8]) -> io::Result<()> {
        let epoch = u64::from_le_bytes(frame[20..28].try_into().unwrap());
        let number = u32::from_le_bytes(frame[14..18].try_into().unwrap());
        assert!(epoch <= self.committed.load(Ordering::SeqCst), "epoch {epoch} left before its commit");
        self.frames.lock().unwrap().push((epoch, number));
        Ok(())
    }
}

/// A guest that sends as fast as it can, a coordinator that ends epochs, a receiver that releases them: at
/// the end the VM goes on alone. Everything sent has left, once, in order, none before its epoch's commit.
#[test]
fn three_threads_keep_the_order() {
    const EPOCHS: u64 = 300;
    let judge = Arc::new(Judge { committed: AtomicU64::new(0), frames: Mutex::default() });
    let limits = OutputLimits { frames: 64, bytes: 16 << 10 };
    let output = Held::new(judge.clone(), limits, OutputMode::Hold);
    output.hold(1).unwrap();
    let gate = Arc::new(DeviceGate::new());
    let epoch = Arc::new(AtomicU64::new(1));
    let done = Arc::new(AtomicU64::new(0));

    let guest = {
        let (output, gate, epoch, done) = (output.clone(), gate.clone(), epoch.clone(), done.clone());
        thread::spawn(move || {
            let mut number = 0;
            while done.load(Ordering::SeqCst) == 0 {
                let pass = gate.enter();
                let mut frame = frame(number, 60 + (number as usize * 37) % 300);
                frame[20..28].copy_from_slice(&epoch.load(Ordering::SeqCst).to_le_bytes());
                if output.push(0, &frame) == Pushed::Taken {
                    number += 1;
                }
                drop(pass);
                output.drain_if_open();
            }
            number
        })
    };
    let receiver = {
        let (output, judge, epoch) = (output.clone(), judge.clone(), epoch.clone());
        thread::spawn(move || {
            loop {
                let commit = epoch.load(Ordering::SeqCst) - 1;
                judge.committed.store(commit, Ordering::SeqCst);
                assert!(output.release(commit).complete);
                if commit >= EPOCHS {
                    return;
                }
                thread::yield_now();
            }
        })
    };
    for next in 2..=EPOCHS + 1 {
        gate.close();
        epoch.store(next, Ordering::SeqCst);
        output.begin(next).unwrap();
        gate.open();
        thread::sleep(Duration::from_micros(200));
    }
    receiver.join().unwrap();
    judge.committed.store(u64::MAX, Ordering::SeqCst);
    assert!(output.open().complete);
    done.store(1, Ordering::SeqCst);
    let sent = guest.join().unwrap();

    let frames = judge.frames.lock().unwrap();
    let numbers: Vec<u32> = frames.iter().map(|&(_, number)| number).collect();
    assert_eq!(numbers, (0..sent).collect::<Vec<_>>());
    assert!(sent > 300, "only {sent} frames: the test showed nothing");
}

/// A sink that lets the test act while a frame is on its way.
#[derive(Default)]
struct Slow {
    entered: AtomicU64,
    go: AtomicU64,
    sent: AtomicU64,
    log: Recorder,
}

impl FrameSink for Slow {
    fn send(&self, pair: usize, frame: &[u8]) -> io::Result<()> {
        self.entered.fetch_add(1, Ordering::SeqCst);
        wait_for("leave to go on", || self.go.load(Ordering::SeqCst) > 0);
        self.sent.fetch_add(1, Ordering::SeqCst);
        self.log.send(pair, frame)
    }
}

#[test]
fn a_frame_sent_during_a_flush_leaves_with_it_and_before_later_ones() {
    let sink = Arc::new(Slow::default());
    let output = Held::new(sink.clone(), SMALL, OutputMode::Hold);
    output.hold(1).unwrap();
    push(&output, 0);
    let flush = {
        let output = output.clone();
        thread::spawn(move || output.open())
    };
    wait_for("the first frame", || sink.entered.load(Ordering::SeqCst) == 1);
    take(&output, 1);
    take(&output, 2);
    sink.go.store(1, Ordering::SeqCst);
    assert_eq!(flush.join().unwrap(), Released { frames: 3, bytes: 180, complete: true });
    push(&output, 3);
    assert_eq!(numbers(&sink.log), [0, 1, 2, 3]);
}

#[test]
fn discard_and_hold_win_over_a_flush_under_way() {
    for discard in [true, false] {
        let sink = Arc::new(Slow::default());
        let output = Held::new(sink.clone(), SMALL, OutputMode::Hold);
        output.hold(1).unwrap();
        for number in 0..3 {
            push(&output, number);
        }
        let flush = {
            let output = output.clone();
            thread::spawn(move || output.open())
        };
        wait_for("the first frame", || sink.entered.load(Ordering::SeqCst) == 1);
        // The guest is not stopped by a flush, however slow the sink.
        push(&output, 3);
        let order = {
            let (output, sink) = (output.clone(), sink.clone());
            thread::spawn(move || {
                if discard {
                    output.discard()
                } else {
                    output.hold(2).unwrap()
                }
                sink.sent.load(Ordering::SeqCst)
            })
        };
        let expected = if discard { OutputMode::Discard } else { OutputMode::Hold };
        wait_for("the order", || output.mode() == expected && (discard || order.is_finished()));
        sink.go.store(1, Ordering::SeqCst);
        let (released, sent_then) = (flush.join().unwrap(), order.join().unwrap());
        assert!(!released.complete);
        assert_eq!(output.mode(), expected);
        if discard {
            assert_eq!(
                (sent_then, sink.sent.load(Ordering::SeqCst)),
                (1, 1),
                "nothing leaves after a discard"
            );
            assert_eq!(output.stats().held_frames, 0);
        } else {
            assert_eq!(released.frames, 3, "what the flush was for, not what came after");
            assert_eq!(output.stats().held_frames, 1);
        }
    }
}
