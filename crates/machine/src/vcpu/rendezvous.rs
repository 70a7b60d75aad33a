//! How one controller makes all vCPU threads do the same step and learns that they did.
//!
//! The controller writes a *command* (a sequence number and what to do) into one word, the threads
//! count themselves into another. Both are futexes, so nobody polls and nobody sleeps; there is no
//! lock that two vCPUs could contend on (invariant 5).
//!
//! Order that makes it right: `arrived` is set to 0 *before* the command is published, and a thread
//! counts itself in *after* its work, with release; the controller reads the count with acquire, so
//! it sees everything that the threads wrote.
//!
//! Within a command the threads can [`meet`](Rendezvous::meet) without the controller.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use crate::futex;

/// What every vCPU thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Command {
    /// Stay out of the guest; the start.
    Stay = 0,
    /// Run the guest until the next command.
    Run = 1,
    /// Leave the guest with all I/O completed.
    Stop = 2,
    /// As `Stop`, then save the state and harvest the dirty pages.
    Capture = 3,
    /// Copy the share of the dirty pages.
    Copy = 4,
    /// Do the task that lies in the thread's slot.
    Task = 5,
    /// End the thread.
    Quit = 6,
}

const COMMANDS: [Command; 7] = [
    Command::Stay,
    Command::Run,
    Command::Stop,
    Command::Capture,
    Command::Copy,
    Command::Task,
    Command::Quit,
];

/// A command together with its sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Order(u32);

impl Order {
    pub(super) const FIRST: Self = Self(Command::Stay as u32);

    pub(super) fn command(self) -> Command {
        COMMANDS[(self.0 & 7) as usize % COMMANDS.len()]
    }
}

/// The meeting point of one VM's vCPU threads.
#[derive(Debug)]
pub(super) struct Rendezvous {
    order: AtomicU32,
    arrived: AtomicU32,
    threads: u32,
    /// Threads that wait for the others, and how often all have met.
    waiting: AtomicU32,
    met: AtomicU32,
}

impl Rendezvous {
    pub(super) fn new(threads: u32) -> Self {
        Self {
            order: AtomicU32::new(Order::FIRST.0),
            arrived: AtomicU32::new(0),
            threads,
            waiting: AtomicU32::new(0),
            met: AtomicU32::new(0),
        }
    }

    /// The order that is in force.
    pub(super) fn current(&self) -> Order {
        Order(self.order.load(Ordering::Acquire))
    }

    /// Controller: publishes the next command. Threads that run the guest must be kicked by the
    /// caller *after* this returns, so that a kicked thread finds the new order.
    pub(super) fn publish(&self, command: Command) {
        self.arrived.store(0, Ordering::Relaxed);
        let sequence = (self.order.load(Ordering::Relaxed) >> 3).wrapping_add(1);
        self.order.store(sequence << 3 | command as u32, Ordering::SeqCst);
        futex::wake_all(&self.order);
    }

    /// Controller: waits until every thread has carried out the last command.
    pub(super) fn wait_all(&self) {
        while self.missing() > 0 {
            self.wait_arrival(None);
        }
    }

    /// The same, but not beyond `deadline`. The next command may be published only after every thread has
    /// come.
    ///
    /// # Errors
    /// How many have not.
    pub(super) fn wait_all_until(&self, deadline: Instant) -> Result<(), u32> {
        loop {
            let missing = self.missing();
            if missing == 0 {
                return Ok(());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(missing);
            }
            self.wait_arrival(Some(left));
        }
    }

    fn missing(&self) -> u32 {
        self.threads - self.arrived.load(Ordering::Acquire)
    }

    fn wait_arrival(&self, timeout: Option<Duration>) {
        let arrived = self.arrived.load(Ordering::Acquire);
        if arrived < self.threads {
            futex::wait(&self.arrived, arrived, timeout);
        }
    }

    /// Thread: waits for an order other than `last`.
    pub(super) fn next(&self, last: Order) -> Order {
        loop {
            let order = self.current();
            if order != last {
                return order;
            }
            futex::wait(&self.order, last.0, None);
        }
    }

    /// Thread: waits until all threads are here, in a command that they all carry out. What each did before
    /// is seen by all after. Returns whether there is another.
    pub(super) fn meet(&self) -> bool {
        if self.threads == 1 {
            return false;
        }
        // Before the count: once the last one is counted, `met` may change at any time.
        let met = self.met.load(Ordering::Acquire);
        if self.waiting.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            // Nobody comes again before `met` has changed.
            self.waiting.store(0, Ordering::Relaxed);
            self.met.store(met.wrapping_add(1), Ordering::Release);
            futex::wake_all(&self.met);
        } else {
            while self.met.load(Ordering::Acquire) == met {
                futex::wait(&self.met, met, None);
            }
        }
        true
    }

    /// Thread: says that the last command is carried out.
    pub(super) fn arrive(&self) {
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            futex::wake_all(&self.arrived);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn every_thread_carries_out_every_command_once() {
        let meeting = Arc::new(Rendezvous::new(3));
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
        let meeting = Arc::new(Rendezvous::new(2));
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
        let (meeting, came) = (Rendezvous::new(THREADS), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    for round in 1..=5_000 {
                        came.fetch_add(1, Ordering::Relaxed);
                        assert!(meeting.meet());
                        assert!(came.load(Ordering::Relaxed) >= round * u64::from(THREADS), "round {round}");
                    }
                });
            }
        });
        assert!(!Rendezvous::new(1).meet());
    }
}
