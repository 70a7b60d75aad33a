//! Orders, takers and drains under every interleaving of a few threads, by the loom model checker.

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::sync::{Arc, Mutex};
use loom::thread;
use std::collections::VecDeque;
use std::time::Duration;

/// What the files find under `super::sync` when they are compiled as part of this model.
mod sync {
    pub(super) use loom::sync::atomic::{AtomicU64, Ordering};
}

#[path = "lease.rs"]
#[allow(dead_code, unreachable_pub, clippy::duplicate_mod, reason = "compiled once more for the model")]
mod lease;
#[path = "permit.rs"]
#[allow(dead_code, unreachable_pub, clippy::duplicate_mod, reason = "compiled once more for the model")]
mod permit;

use lease::Lease;
use permit::{Fate, OutputMode, Permit, Tag};

/// An output like the card's: a queue, a lock over what leaves, and what has left.
struct Model {
    permit: Permit,
    held: Mutex<VecDeque<Tag>>,
    writer: Mutex<()>,
    left: Mutex<Vec<u64>>,
    /// What is committed. Set before the order is given.
    committed: AtomicU64,
    /// A discard has been carried out.
    silent: AtomicU64,
}

impl Model {
    fn new(mode: OutputMode, leased: u64) -> Arc<Self> {
        // A clock that has passed the lease after this many looks. The first output of an epoch is one of
        // them.
        let looks = AtomicU64::new(0);
        let lease = Lease::with_clock(move || Duration::from_nanos(looks.fetch_add(1, Ordering::SeqCst)));
        lease.set((leased != u64::MAX).then(|| Duration::from_nanos(leased)));
        Arc::new(Self {
            permit: Permit::new(mode, lease),
            held: Mutex::new(VecDeque::new()),
            writer: Mutex::new(()),
            left: Mutex::new(Vec::new()),
            committed: AtomicU64::new(0),
            silent: AtomicU64::new(0),
        })
    }

    fn push(&self) {
        let mut held = self.held.lock().unwrap();
        let tag = self.permit.tag();
        if tag.mode != OutputMode::Discard {
            held.push_back(tag);
        }
        drop(held);
        self.permit.note_held(tag);
        self.permit.tell_held();
    }

    fn drain(&self) {
        let _writer = self.writer.lock().unwrap();
        loop {
            let (order, tag) = {
                let mut held = self.held.lock().unwrap();
                let order = self.permit.order();
                while held.front().is_some_and(|&tag| self.permit.fate(order, tag) == Fate::Dropped) {
                    held.pop_front();
                }
                let Some(&tag) = held.front() else { return };
                if self.permit.fate(order, tag) != Fate::Leaves {
                    return;
                }
                (order, tag)
            };
            if !self.permit.confirms(order) {
                continue;
            }
            assert_eq!(
                self.silent.load(Ordering::SeqCst),
                0,
                "a frame left after the discard was carried out"
            );
            if order.mode() == OutputMode::Hold {
                assert!(tag.epoch <= self.committed.load(Ordering::SeqCst), "it left before its commit");
            }
            self.left.lock().unwrap().push(tag.epoch);
            self.held.lock().unwrap().pop_front();
        }
    }

    /// As the receiver of an acknowledgement does.
    fn commit(&self, through: u64) {
        self.committed.store(through, Ordering::SeqCst);
        self.permit.commit(through);
        self.drain();
    }
}

fn model(check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(check);
}

#[test]
fn what_is_committed_leaves_and_nothing_before() {
    model(|| {
        let model = Model::new(OutputMode::PassThrough, u64::MAX);
        model.permit.hold(1);
        model.push();
        model.permit.begin(2);
        let receiver = {
            let model = model.clone();
            thread::spawn(move || model.commit(1))
        };
        // The guest continues and its device's thread drains too; then the next pause.
        model.push();
        model.drain();
        model.permit.begin(3);
        model.push();
        receiver.join().unwrap();
        assert_eq!(*model.left.lock().unwrap(), [1]);
        model.commit(2);
        assert_eq!(*model.left.lock().unwrap(), [1, 2]);
        assert_eq!(model.held.lock().unwrap().len(), 1);
    });
}

#[test]
fn a_commit_of_one_thread_is_drained_by_one_of_both() {
    model(|| {
        let model = Model::new(OutputMode::PassThrough, u64::MAX);
        model.permit.hold(1);
        model.push();
        model.permit.begin(2);
        model.push();
        model.permit.begin(3);
        let other = {
            let model = model.clone();
            thread::spawn(move || model.drain())
        };
        model.commit(2);
        other.join().unwrap();
        assert_eq!(*model.left.lock().unwrap(), [1, 2]);
    });
}

#[test]
fn nothing_is_on_its_way_when_a_discard_has_been_carried_out() {
    model(|| {
        let model = Model::new(OutputMode::PassThrough, u64::MAX);
        model.permit.hold(1);
        model.push();
        model.permit.begin(2);
        let receiver = {
            let model = model.clone();
            thread::spawn(move || model.commit(1))
        };
        model.permit.discard();
        model.drain();
        model.silent.store(1, Ordering::SeqCst);
        model.push();
        receiver.join().unwrap();
        assert!(model.held.lock().unwrap().is_empty());
    });
}

#[test]
fn a_hold_while_output_passes_keeps_what_comes_after_it() {
    model(|| {
        let model = Model::new(OutputMode::PassThrough, u64::MAX);
        model.push();
        let device = {
            let model = model.clone();
            thread::spawn(move || model.drain())
        };
        // The device's thread drains outside the gate, so a pause can come in between.
        model.permit.hold(1);
        model.push();
        device.join().unwrap();
        let left = model.left.lock().unwrap().len();
        assert_eq!((left, model.held.lock().unwrap().len()), (1, 1));
    });
}

#[test]
fn a_lease_that_ends_stops_all_drains_and_no_later_order() {
    model(|| {
        // One look for the first output, one for the first that leaves.
        let model = Model::new(OutputMode::PassThrough, 2);
        model.permit.hold(1);
        model.push();
        model.push();
        model.permit.begin(2);
        let receiver = {
            let model = model.clone();
            thread::spawn(move || model.commit(1))
        };
        model.drain();
        model.permit.open();
        receiver.join().unwrap();
        assert!(!model.permit.order().is_refused(), "the refusal was of the order before");
        model.drain();
        assert_eq!(*model.left.lock().unwrap(), [1, 1]);
    });
}
