//! The gate under every interleaving of a few threads, by the loom model checker.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use loom::thread;

/// What `gate.rs` finds under `super::sync` when it is compiled as part of this model.
mod sync {
    pub(super) use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    pub(super) use loom::sync::{Condvar, Mutex, MutexGuard};
}

#[path = "gate.rs"]
#[allow(dead_code, unreachable_pub, reason = "the model does not use all of the gate")]
#[allow(clippy::duplicate_mod, reason = "compiled once for threads and once for the model")]
mod checked;

use checked::DeviceGate;

fn model(check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(check);
}

/// A device thread makes the two counters differ inside the gate; the coordinator must never see that.
fn batch(gate: &DeviceGate, a: &AtomicU32, b: &AtomicU32) {
    let pass = gate.enter();
    a.fetch_add(1, Ordering::Relaxed);
    b.fetch_add(1, Ordering::Relaxed);
    drop(pass);
}

#[test]
fn a_closed_gate_is_empty_and_everyone_goes_on_when_it_opens() {
    model(|| {
        let gate = Arc::new(DeviceGate::new());
        let (a, b) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let workers: Vec<_> = (0..2)
            .map(|_| {
                let (gate, a, b) = (gate.clone(), a.clone(), b.clone());
                thread::spawn(move || batch(&gate, &a, &b))
            })
            .collect();
        gate.close();
        let seen = a.load(Ordering::Relaxed);
        assert_eq!(seen, b.load(Ordering::Relaxed), "a batch was half done behind a closed gate");
        thread::yield_now();
        assert_eq!(seen, a.load(Ordering::Relaxed), "someone worked behind a closed gate");
        gate.open();
        for worker in workers {
            worker.join().unwrap();
        }
        assert_eq!(a.load(Ordering::Relaxed), 2);
    });
}

#[test]
fn two_pauses_in_a_row() {
    model(|| {
        let gate = Arc::new(DeviceGate::new());
        let (a, b) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let worker = {
            let (gate, a, b) = (gate.clone(), a.clone(), b.clone());
            thread::spawn(move || {
                batch(&gate, &a, &b);
                batch(&gate, &a, &b);
            })
        };
        for _ in 0..2 {
            gate.close();
            assert_eq!(a.load(Ordering::Relaxed), b.load(Ordering::Relaxed));
            gate.open();
        }
        worker.join().unwrap();
    });
}

#[test]
fn a_parked_thread_can_be_called_off() {
    model(|| {
        let gate = Arc::new(DeviceGate::new());
        let quit = Arc::new(AtomicBool::new(false));
        gate.close();
        let worker = {
            let (gate, quit) = (gate.clone(), quit.clone());
            thread::spawn(move || assert!(gate.enter_unless(&quit).is_none()))
        };
        quit.store(true, Ordering::Release);
        gate.recheck();
        worker.join().unwrap();
    });
}
