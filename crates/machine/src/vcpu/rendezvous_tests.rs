//! The meeting point with real threads; every interleaving of a few is in `rendezvous_model.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::rendezvous::{Command, Order, Rendezvous};

#[test]
fn every_thread_carries_out_every_command_once() {
    let meeting = Arc::new(Rendezvous::new(3, 0));
    let done = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let (meeting, done) = (meeting.clone(), done.clone());
            std::thread::spawn(move || {
                let mut last = Order::FIRST;
                loop {
                    last = meeting.next(last);
                    match last.command() {
                        Command::Quit => return meeting.arrive(),
                        Command::Copy => done.fetch_add(1, Ordering::Relaxed),
                        _ => 0,
                    };
                    meeting.arrive();
                }
            })
        })
        .collect();
    for round in 1..=5_000 {
        meeting.publish(Command::Copy);
        meeting.wait_all();
        assert_eq!(done.load(Ordering::Relaxed), 3 * round);
    }
    meeting.publish(Command::Quit);
    meeting.wait_all();
    threads.into_iter().for_each(|t| t.join().unwrap());
}

#[test]
fn a_thread_that_does_not_come_in_time_is_counted() {
    let meeting = Arc::new(Rendezvous::new(2, 50));
    let go = Arc::new(std::sync::Barrier::new(2));
    let threads: Vec<_> = [true, false]
        .map(|waits| {
            let (meeting, go) = (meeting.clone(), go.clone());
            std::thread::spawn(move || {
                meeting.next(Order::FIRST);
                if waits {
                    go.wait();
                }
                meeting.arrive();
            })
        })
        .into();
    meeting.publish(Command::Stop);
    let begun = Instant::now();
    let budget = Duration::from_millis(100);
    while meeting.missing() == 2 {
        std::thread::yield_now();
    }
    assert_eq!(meeting.wait_all_until(begun + budget), Err(1));
    assert!(begun.elapsed() >= budget);
    go.wait();
    meeting.wait_all();
    assert_eq!(meeting.wait_all_until(begun), Ok(()), "who has come is not late");
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn nobody_goes_on_before_all_have_met() {
    const THREADS: u32 = 4;
    let (meeting, came) = (Rendezvous::new(THREADS, 20), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for round in 1..=5_000 {
                    came.fetch_add(1, Ordering::Relaxed);
                    meeting.meet();
                    assert!(came.load(Ordering::Relaxed) >= round * u64::from(THREADS), "round {round}");
                }
            });
        }
    });
    Rendezvous::new(1, 0).meet();
}
