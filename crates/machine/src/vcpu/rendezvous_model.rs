//! The meeting point under every interleaving of a few threads, by the loom model checker. A lost wake-up is
//! a deadlock, which the checker reports.

use loom::sync::Arc;
use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

/// What `rendezvous.rs` finds under `super::sync` when it is compiled as part of this model.
mod sync {
    pub(super) use loom::hint::spin_loop;
    pub(super) use loom::sync::atomic::{AtomicU32, Ordering};

    /// A futex as the kernel has it: it compares the word and goes to sleep in one step, and a wake-up is for
    /// the threads that sleep on that word.
    pub(super) mod futex {
        use std::collections::HashMap;
        use std::time::Duration;

        use loom::sync::atomic::{AtomicU32, Ordering};
        use loom::sync::{Condvar, Mutex};

        loom::lazy_static! {
            static ref WAKES: Mutex<HashMap<usize, u64>> = Mutex::new(HashMap::new());
            static ref WOKEN: Condvar = Condvar::new();
        }

        fn of(word: &AtomicU32) -> usize {
            std::ptr::from_ref(word).addr()
        }

        pub(in super::super) fn wait(word: &AtomicU32, expected: u32, _timeout: Option<Duration>) {
            let mut wakes = WAKES.lock().unwrap();
            if word.load(Ordering::SeqCst) != expected {
                return;
            }
            let before = wakes.get(&of(word)).copied();
            while wakes.get(&of(word)).copied() == before {
                wakes = WOKEN.wait(wakes).unwrap();
            }
        }

        pub(in super::super) fn wake_all(word: &AtomicU32) {
            *WAKES.lock().unwrap().entry(of(word)).or_default() += 1;
            WOKEN.notify_all();
        }
    }
}

#[path = "rendezvous.rs"]
#[allow(dead_code, unreachable_pub, reason = "the model does not use all of the meeting point")]
#[allow(clippy::duplicate_mod, reason = "compiled once for threads and once for the model")]
mod checked;

use checked::{Command, Looks, Order, Rendezvous};

fn model(check: impl Fn() + Sync + Send + 'static) {
    model_with(2, check);
}

/// As often as `preemptions` a thread is held up where it need not wait.
fn model_with(preemptions: usize, check: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(check);
}

/// Carries out orders until the last one; `done` records what it did in each.
fn serve(meeting: &Rendezvous, done: &AtomicU32) {
    let mut last = Order::FIRST;
    while last.command() != Command::Quit {
        last = meeting.next(last);
        done.fetch_add(1, Ordering::Relaxed);
        meeting.arrive();
    }
}

#[test]
fn each_order_is_carried_out_once_by_all_and_nobody_sleeps_on() {
    model(|| {
        let meeting = Arc::new(Rendezvous::new(1, Looks::default()));
        let done = Arc::new(AtomicU32::new(0));
        let thread = {
            let (meeting, done) = (meeting.clone(), done.clone());
            thread::spawn(move || serve(&meeting, &done))
        };
        for (round, command) in [Command::Stop, Command::Capture, Command::Quit].into_iter().enumerate() {
            meeting.publish(command);
            meeting.wait_all();
            assert_eq!(done.load(Ordering::Relaxed), round as u32 + 1);
        }
        thread.join().unwrap();
    });
}

#[test]
fn two_threads_are_awaited() {
    model(|| {
        let meeting = Arc::new(Rendezvous::new(2, Looks::default()));
        let done = Arc::new(AtomicU32::new(0));
        let threads = [(); 2].map(|()| {
            let (meeting, done) = (meeting.clone(), done.clone());
            thread::spawn(move || serve(&meeting, &done))
        });
        meeting.publish(Command::Quit);
        meeting.wait_all();
        assert_eq!(done.load(Ordering::Relaxed), 2);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

/// No vCPU's state is saved before all are out of the guest. When any thread has met, everything that each
/// did before the meeting is done, in this pause and in the next.
#[test]
fn who_has_met_sees_that_all_are_out() {
    model(|| {
        let meeting = Arc::new(Rendezvous::new(2, Looks::default()));
        let out = Arc::new(AtomicU32::new(0));
        let pauses = |meeting: &Rendezvous, out: &AtomicU32| {
            for round in 1..=2 {
                out.fetch_add(1, Ordering::Relaxed);
                meeting.meet();
                assert!(out.load(Ordering::Relaxed) >= round * 2, "one is in the guest yet");
            }
        };
        let other = {
            let (meeting, out) = (meeting.clone(), out.clone());
            thread::spawn(move || pauses(&meeting, &out))
        };
        pauses(&meeting, &out);
        other.join().unwrap();
    });
}

/// Carries out orders until the last, and does what is lent: counts it, and gives the last order.
fn serve_and_end(meeting: &Rendezvous, done: &AtomicU32, ended: &AtomicU32, threads: u32) {
    let mut last = Order::FIRST;
    while last.command() != Command::Quit {
        last = meeting.next(last);
        done.fetch_add(1, Ordering::Relaxed);
        if meeting.arrive() {
            assert_eq!(done.load(Ordering::Relaxed), threads, "one has not done its part");
            ended.fetch_add(1, Ordering::Relaxed);
            meeting.publish(Command::Quit);
            meeting.done();
        }
    }
}

fn lends(threads: u32) {
    model(move || {
        let meeting = Arc::new(Rendezvous::new(threads, Looks::default()));
        let (done, ended) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
        let running: Vec<_> = (0..threads)
            .map(|_| {
                let (meeting, done, ended) = (meeting.clone(), done.clone(), ended.clone());
                thread::spawn(move || serve_and_end(&meeting, &done, &ended, threads))
            })
            .collect();
        meeting.publish(Command::Capture);
        if meeting.lend() {
            assert!(meeting.wait_done(None, || ()));
        } else {
            assert_eq!(done.load(Ordering::Relaxed), threads, "one has not done its part");
            ended.fetch_add(1, Ordering::Relaxed);
            meeting.publish(Command::Quit);
        }
        assert_eq!(ended.load(Ordering::Relaxed), 1);
        running.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(ended.load(Ordering::Relaxed), 1);
    });
}

/// What the controller has lent is done exactly once, when all have arrived, and the controller sees it.
#[test]
fn what_is_lent_to_one_thread_is_done_once() {
    lends(1);
}

#[test]
fn what_is_lent_to_two_threads_is_done_once() {
    lends(2);
}

/// Carries out orders until the last. Whoever ends the pause orders a copy, does its own share, and leaves the next
/// order to the controller: so it is after a copy that failed, and after a long pause.
fn serve_and_copy(meeting: &Rendezvous, done: &AtomicU32) {
    let mut last = Order::FIRST;
    while last.command() != Command::Quit {
        last = meeting.next(last);
        done.fetch_add(1, Ordering::Relaxed);
        if meeting.arrive() {
            meeting.publish(Command::Copy);
            done.fetch_add(1, Ordering::Relaxed);
            meeting.arrive();
            meeting.wait_all();
            last = meeting.carried_out(last);
            meeting.done();
        }
    }
}

fn copies(threads: u32, preemptions: usize) {
    model_with(preemptions, move || {
        let meeting = Arc::new(Rendezvous::new(threads, Looks::default()));
        let done = Arc::new(AtomicU32::new(0));
        let running: Vec<_> = (0..threads)
            .map(|_| {
                let (meeting, done) = (meeting.clone(), done.clone());
                thread::spawn(move || serve_and_copy(&meeting, &done))
            })
            .collect();
        meeting.publish(Command::Capture);
        if meeting.lend() {
            assert!(meeting.wait_done(None, || ()));
        } else {
            meeting.publish(Command::Copy);
            meeting.wait_all();
        }
        assert_eq!(done.load(Ordering::Relaxed), 2 * threads, "one has carried out an order twice");
        meeting.publish(Command::Quit);
        meeting.wait_all();
        assert_eq!(
            done.load(Ordering::Relaxed),
            3 * threads,
            "all are said to have carried out the last order"
        );
        running.into_iter().for_each(|thread| thread.join().unwrap());
        assert_eq!(meeting.missing(), 0);
        assert_eq!(done.load(Ordering::Relaxed), 3 * threads, "one has carried out an order twice");
    });
}

/// A thread that ends a pause counts itself in once for each order, whatever comes after it.
#[test]
fn a_thread_that_orders_a_copy_does_its_share_once() {
    copies(1, 2);
}

#[test]
fn of_two_threads_the_one_that_orders_a_copy_does_its_share_once() {
    // One is enough to find a second arrival, and two take minutes.
    copies(2, 1);
}

/// Either the controller gets back what it has lent, and then nobody does it, or it is done, although whoever does
/// it has published another command meanwhile.
#[test]
fn what_is_taken_back_is_done_by_nobody() {
    model(|| {
        let meeting = Arc::new(Rendezvous::new(1, Looks::default()));
        let ended = Arc::new(AtomicU32::new(0));
        let thread = {
            let (meeting, ended) = (meeting.clone(), ended.clone());
            thread::spawn(move || {
                meeting.next(Order::FIRST);
                if meeting.arrive() {
                    meeting.publish(Command::Run);
                    ended.fetch_add(1, Ordering::Relaxed);
                    meeting.done();
                }
            })
        };
        meeting.publish(Command::Capture);
        let done = if !meeting.lend() {
            0
        } else if meeting.revoke().is_some() {
            // Whatever it was that was lent is gone now.
            0
        } else {
            assert!(meeting.wait_done(None, || ()));
            1
        };
        assert_eq!(ended.load(Ordering::Relaxed), done);
        thread.join().unwrap();
        assert_eq!(ended.load(Ordering::Relaxed), done);
    });
}

/// The controller helps only between the call and the calling off.
#[test]
fn nobody_helps_after_the_calling_off() {
    model(|| {
        let meeting = Arc::new(Rendezvous::new(1, Looks::default()));
        let open = Arc::new(AtomicU32::new(0));
        let thread = {
            let (meeting, open) = (meeting.clone(), open.clone());
            thread::spawn(move || {
                meeting.next(Order::FIRST);
                if meeting.arrive() {
                    open.store(1, Ordering::Relaxed);
                    meeting.call();
                    meeting.call_off();
                    open.store(0, Ordering::Relaxed);
                    meeting.done();
                }
            })
        };
        meeting.publish(Command::Capture);
        if meeting.lend() {
            let help = || {
                assert_eq!(open.load(Ordering::Relaxed), 1, "it is too early");
                thread::yield_now();
                assert_eq!(open.load(Ordering::Relaxed), 1, "it is too late");
            };
            assert!(meeting.wait_done(None, help));
        }
        thread.join().unwrap();
    });
}
