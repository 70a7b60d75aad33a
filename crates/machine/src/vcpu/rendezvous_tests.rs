//! The meeting point with real threads; every interleaving of a few is in `rendezvous_model.rs`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::lent::{Lent, Who};
use super::rendezvous::{Command, Looks, Order, Rendezvous};

fn looks(each: u32) -> Looks {
    Looks { meeting: each, within: each, other: each }
}

#[test]
fn every_thread_carries_out_every_command_once() {
    let meeting = Arc::new(Rendezvous::new(3, Looks::default()));
    let done = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..3)
        .map(|_| {
            let (meeting, done) = (meeting.clone(), done.clone());
            std::thread::spawn(move || {
                let mut last = Order::FIRST;
                loop {
                    last = meeting.next(last);
                    match last.command() {
                        Command::Quit => {
                            meeting.arrive();
                            return;
                        }
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
    let meeting = Arc::new(Rendezvous::new(2, looks(50)));
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
    let (meeting, came) = (Rendezvous::new(THREADS, looks(20)), AtomicU64::new(0));
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
    Rendezvous::new(1, Looks::default()).meet();
}

/// Carries out orders with the machine's own carrier of lent work, until the last.
fn serve(meeting: &Rendezvous, lent: &Lent, done: &AtomicU64) {
    let mut last = Order::FIRST;
    loop {
        last = meeting.next(last);
        done.fetch_add(1, Ordering::Relaxed);
        if meeting.arrive() {
            last = lent.take(meeting, last);
        }
        if last.command() == Command::Quit {
            return;
        }
    }
}

#[test]
fn what_is_lent_is_done_once_after_every_thread_by_whoever_comes_last() {
    const THREADS: u64 = 3;
    let (meeting, lent, done) =
        (Rendezvous::new(THREADS as u32, Looks::default()), Lent::default(), AtomicU64::new(0));
    let mut by = [0u32; 2];
    std::thread::scope(|scope| {
        (0..THREADS).for_each(|_| {
            scope.spawn(|| serve(&meeting, &lent, &done));
        });
        for round in 0..500 {
            meeting.publish(Command::Capture);
            if round % 7 == 0 {
                meeting.wait_all();
            }
            let mut times = 0;
            let mut work = |who| {
                times += 1;
                by[who as usize] += 1;
                assert_eq!(done.load(Ordering::Relaxed), THREADS * (2 * round + 1), "all have come");
                // The one that does it gives the next order too.
                meeting.publish(Command::Stop);
            };
            lent.lend(&meeting, &mut work, None, || None, || ()).unwrap();
            assert_eq!(times, 1, "round {round}");
            meeting.wait_all();
        }
        meeting.publish(Command::Quit);
    });
    assert!(by[Who::Controller as usize] > 0 && by[Who::LastVcpu as usize] > 0, "{by:?}");
}

#[test]
fn whoever_orders_a_copy_and_does_its_share_does_not_do_it_again() {
    const THREADS: u64 = 2;
    let (meeting, lent, done) =
        (Rendezvous::new(THREADS as u32, Looks::default()), Lent::default(), AtomicU64::new(0));
    std::thread::scope(|scope| {
        (0..THREADS).for_each(|_| {
            scope.spawn(|| serve(&meeting, &lent, &done));
        });
        let mut lends = 0;
        for round in 0..500 {
            meeting.publish(Command::Capture);
            let mut work = |who| {
                meeting.publish(Command::Copy);
                if who == Who::LastVcpu {
                    lends += 1;
                    done.fetch_add(1, Ordering::Relaxed);
                    meeting.arrive();
                }
                meeting.wait_all();
            };
            lent.lend(&meeting, &mut work, None, || None, || ()).unwrap();
            // As after a copy that has failed: the next order is the controller's.
            meeting.publish(Command::Stop);
            meeting.wait_all();
            assert_eq!(done.load(Ordering::Relaxed), 3 * THREADS * (round + 1), "round {round}");
        }
        meeting.publish(Command::Quit);
        assert!(lends > 0);
    });
}

#[test]
fn what_is_taken_back_is_done_by_nobody() {
    let (meeting, lent) = (Rendezvous::new(2, Looks::default()), Lent::default());
    std::thread::scope(|scope| {
        scope.spawn(|| {
            meeting.next(Order::FIRST);
            assert!(!meeting.arrive());
        });
        meeting.publish(Command::Capture);
        while meeting.missing() == 2 {
            std::thread::yield_now();
        }
        let (mut asked, now) = (0, Instant::now());
        let late = || {
            asked += 1;
            (asked < 3).then_some(now)
        };
        let result = lent.lend(&meeting, &mut |_| panic!("too late"), Some(now), late, || ());
        assert_eq!((result, asked), (Err(1), 3));
        // The second comes after all.
        assert!(!meeting.arrive(), "what is gone would be done");
    });
}

#[test]
fn the_controller_helps_when_it_is_called_and_is_waited_for() {
    let (meeting, lent, helped) = (Rendezvous::new(1, Looks::default()), Lent::default(), AtomicU64::new(0));
    let count = || helped.load(Ordering::Relaxed);
    let mut lends = 0;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut last = Order::FIRST;
            while last.command() != Command::Quit {
                last = meeting.next(last);
                // Mostly after the controller has lent its part.
                std::thread::sleep(Duration::from_millis(2));
                if meeting.arrive() {
                    last = lent.take(&meeting, last);
                }
            }
        });
        for _ in 0..20 {
            meeting.publish(Command::Capture);
            let mut work = |who| {
                if who == Who::Controller {
                    return;
                }
                lends += 1;
                for round in 0..20 {
                    let before = count();
                    meeting.call();
                    while round % 2 == 0 && count() == before {
                        std::thread::yield_now();
                    }
                    meeting.call_off();
                    // From here on nobody helps.
                    let now = count();
                    std::thread::yield_now();
                    assert_eq!(count(), now);
                }
            };
            let help = || {
                std::thread::yield_now();
                helped.fetch_add(1, Ordering::Relaxed);
            };
            lent.lend(&meeting, &mut work, None, || None, help).unwrap();
        }
        meeting.publish(Command::Quit);
    });
    assert!(lends > 0 && count() >= 10 * lends, "{} of {lends}", count());
}
