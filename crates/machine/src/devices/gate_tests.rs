//! The gate under real threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::gate::DeviceGate;

#[test]
fn no_batch_is_in_progress_while_the_gate_is_closed() {
    const THREADS: u64 = 4;
    let gate = Arc::new(DeviceGate::new());
    let quit = Arc::new(AtomicBool::new(false));
    let begun = Arc::new(AtomicU64::new(0));
    let ended = Arc::new(AtomicU64::new(0));
    let workers: Vec<_> = (0..THREADS)
        .map(|_| {
            let (gate, quit, begun, ended) = (gate.clone(), quit.clone(), begun.clone(), ended.clone());
            thread::spawn(move || {
                while let Some(pass) = gate.enter_unless(&quit) {
                    begun.fetch_add(1, Ordering::Relaxed);
                    for _ in 0..100 {
                        if pass.must_leave() {
                            break;
                        }
                        std::hint::spin_loop();
                    }
                    ended.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();

    let mut seen = 0;
    for _ in 0..2000 {
        gate.close();
        let now = ended.load(Ordering::Relaxed);
        assert_eq!(begun.load(Ordering::Relaxed), now);
        thread::yield_now();
        assert_eq!(begun.load(Ordering::Relaxed), now, "a batch began behind a closed gate");
        seen = now;
        gate.open();
    }
    let deadline = Instant::now() + Duration::from_secs(20);
    while ended.load(Ordering::Relaxed) == seen && Instant::now() < deadline {
        thread::yield_now();
    }
    assert!(ended.load(Ordering::Relaxed) > seen, "nobody came back after the gate opened");
    // The last pause is never ended: threads parked at a closed gate must still be able to quit.
    gate.close();
    quit.store(true, Ordering::Release);
    gate.recheck();
    for worker in workers {
        worker.join().unwrap();
    }
}

#[test]
fn closing_twice_and_opening_an_open_gate_do_no_harm() {
    let gate = DeviceGate::new();
    gate.open();
    gate.close();
    gate.close();
    assert!(gate.is_closed());
    assert!(gate.try_enter().is_none());
    gate.open();
    let pass = gate.try_enter().expect("the gate is open");
    assert!(!pass.must_leave());
    assert!(gate.try_enter().is_some(), "many may be inside at once");
}

#[test]
fn must_leave_tells_a_batch_that_the_coordinator_waits() {
    let gate = Arc::new(DeviceGate::new());
    let pass = gate.enter();
    let closer = {
        let gate = gate.clone();
        thread::spawn(move || gate.close())
    };
    while !pass.must_leave() {
        thread::yield_now();
    }
    assert!(!closer.is_finished(), "the gate closed over the head of someone inside");
    drop(pass);
    closer.join().unwrap();
}
