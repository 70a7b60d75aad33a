//! How one controller makes all vCPU threads do the same step and learns that they have done it.
//!
//! The controller writes a *command* (a sequence number and what to do) into one word; the threads count
//! themselves into another. Both are futexes; there is no lock that two vCPUs could contend on (invariant 5).
//!
//! This order makes it correct: `arrived` is set to 0 *before* the command is published, and a thread counts
//! itself in *after* its work, with release; the controller reads the count with acquire, so it sees
//! everything that the threads wrote.
//!
//! A thread that is about to sleep on a word says so in the word itself, in the bit [`SLEEPS`]. So the thread
//! that changes the word learns, by the same access, whether there is anybody to wake, and mostly saves the
//! system call: while the guest runs no thread waits for an order.
//!
//! If there is a core for every thread, a wait watches its word for a moment before it sleeps ([`Looks`]); the
//! moment ends by itself, so nothing depends on it.
//!
//! Within a command the threads can [`meet`](Rendezvous::meet) without the controller.
//!
//! The controller can [lend](Rendezvous::lend) what it would do once all threads have arrived: then the thread
//! that arrives last does it. So nobody waits for the controller to wake up, and the last thread goes on with the
//! next command, which it has published itself. Who does it is decided in one word, together with the count:
//! exactly one, either the last thread or the controller, and nobody after it was [revoked](Rendezvous::revoke).

use std::time::{Duration, Instant};

use super::sync::{AtomicU32, Ordering, futex, spin_loop};

/// What every vCPU thread is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Command {
    /// Stay out of the guest; the initial command.
    Stay = 0,
    /// Run the guest until the next command.
    Run = 1,
    /// Leave the guest with all I/O completed.
    Stop = 2,
    /// As `Stop`, then save the state and harvest the dirty pages.
    Capture = 3,
    /// Copy the share of the dirty pages.
    Copy = 4,
    /// Do the task in the thread's slot.
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

/// A thread sleeps on the word, or is about to.
const SLEEPS: u32 = 1 << 31;
/// The sequence number of an order begins above its command, and ends below [`SLEEPS`].
const SEQUENCE_SHIFT: u32 = 3;

/// In the count of arrivals: the controller has lent its part.
const LENT: u32 = 1 << 30;
/// The count itself.
const COUNT: u32 = LENT - 1;

/// How far the lent part is.
mod part {
    /// It is not done.
    pub(super) const OPEN: u32 = 0;
    /// It is done.
    pub(super) const DONE: u32 = 1;
    /// It is not done, and the controller is called to help.
    pub(super) const CALLED: u32 = 2;
    /// The controller helps.
    pub(super) const HELPED: u32 = 3;
}

/// A command together with its sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Order(u32);

impl Order {
    pub(super) const FIRST: Self = Self(Command::Stay as u32);

    pub(super) fn command(self) -> Command {
        COMMANDS[(self.0 & 7) as usize % COMMANDS.len()]
    }

    /// Whether the next order comes soon: the others are in the same pause.
    fn is_short(self) -> bool {
        matches!(self.command(), Command::Capture | Command::Copy)
    }

    fn following(self, command: Command) -> Self {
        let sequence = (self.0 >> SEQUENCE_SHIFT).wrapping_add(1);
        Self((sequence << SEQUENCE_SHIFT | command as u32) & !SLEEPS)
    }
}

/// The meeting point of one VM's vCPU threads.
#[derive(Debug)]
pub(super) struct Rendezvous {
    /// The [`Order`] in force.
    order: AtomicU32,
    /// How many threads have carried it out.
    arrived: AtomicU32,
    threads: u32,
    /// Threads that wait for the others, and how often all have met.
    waiting: AtomicU32,
    met: AtomicU32,
    /// How far the part is that the controller has lent: see [`part`].
    part: AtomicU32,
    looks: Looks,
}

/// How often a wait looks at its word before it sleeps.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Looks {
    /// Threads that wait for each other in a [meeting](Rendezvous::meet).
    pub(super) meeting: u32,
    /// A thread that waits for the next order within a pause.
    pub(super) within: u32,
    /// Any other wait.
    pub(super) other: u32,
}

impl Rendezvous {
    /// A meeting point of this many threads.
    pub(super) fn new(threads: u32, looks: Looks) -> Self {
        Self {
            order: AtomicU32::new(Order::FIRST.0),
            arrived: AtomicU32::new(0),
            threads,
            waiting: AtomicU32::new(0),
            met: AtomicU32::new(0),
            part: AtomicU32::new(part::DONE),
            looks,
        }
    }

    /// The order in force.
    pub(super) fn current(&self) -> Order {
        Order(self.order.load(Ordering::Acquire) & !SLEEPS)
    }

    /// Whether there is only one thread, which has nobody to meet.
    pub(super) fn is_of_one(&self) -> bool {
        self.threads == 1
    }

    /// Controller: publishes the next command. Threads that run the guest must be kicked by the
    /// caller *after* this returns, so that a kicked thread finds the new order.
    pub(super) fn publish(&self, command: Command) {
        self.arrived.store(0, Ordering::Relaxed);
        let next = self.current().following(command);
        // Only sleeping threads have written to the word meanwhile.
        if self.order.swap(next.0, Ordering::SeqCst) & SLEEPS != 0 {
            futex::wake_all(&self.order);
        }
    }

    /// Controller: waits until every thread has carried out the last command.
    pub(super) fn wait_all(&self) {
        while self.missing() > 0 {
            self.wait_arrival(None);
        }
    }

    /// The same, but at most until `deadline`. The next command may be published only after every thread has
    /// arrived.
    ///
    /// # Errors
    /// How many threads have not arrived.
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

    /// How many threads have not carried out the last command.
    pub(super) fn missing(&self) -> u32 {
        self.threads.saturating_sub(self.arrived.load(Ordering::Acquire) & COUNT)
    }

    fn wait_arrival(&self, timeout: Option<Duration>) {
        if comes(self.looks.other, || self.missing() == 0) {
            return;
        }
        let arrived = self.arrived.load(Ordering::Acquire);
        if arrived & COUNT < self.threads {
            sleep(&self.arrived, arrived, timeout);
        }
    }

    /// Thread: waits for an order other than `last`.
    pub(super) fn next(&self, last: Order) -> Order {
        let looks = if last.is_short() { self.looks.within } else { self.looks.other };
        comes(looks, || self.current() != last);
        loop {
            let order = self.current();
            if order != last {
                return order;
            }
            // The bit may be set already, or a new order may come: the next round tells.
            sleep(&self.order, self.order.load(Ordering::Acquire) & SLEEPS | last.0, None);
        }
    }

    /// Thread: waits until all threads are here, in a command that they all carry out. Afterwards every
    /// thread sees what each did before.
    pub(super) fn meet(&self) {
        // Before the count: once the last thread is counted, `met` may change at any time.
        let met = self.met.load(Ordering::Acquire) & !SLEEPS;
        if self.waiting.fetch_add(1, Ordering::AcqRel) + 1 == self.threads {
            // No thread comes again before `met` has changed.
            self.waiting.store(0, Ordering::Relaxed);
            if self.met.swap(met.wrapping_add(1) & !SLEEPS, Ordering::AcqRel) & SLEEPS != 0 {
                futex::wake_all(&self.met);
            }
            return;
        }
        let now = || self.met.load(Ordering::Acquire);
        comes(self.looks.meeting, || now() & !SLEEPS != met);
        while now() & !SLEEPS == met {
            sleep(&self.met, now() & SLEEPS | met, None);
        }
    }

    /// Thread: says that the last command is carried out. Returns whether this thread is to do what the
    /// controller has lent; then it sees what all others did.
    pub(super) fn arrive(&self) -> bool {
        let before = self.arrived.fetch_add(1, Ordering::AcqRel);
        if (before & COUNT) + 1 < self.threads {
            return false;
        }
        if before & SLEEPS != 0 {
            futex::wake_all(&self.arrived);
        }
        before & LENT != 0
    }

    /// Controller: lends its part of the last command to the thread that arrives last. Returns false if all
    /// have arrived: then the part stays with the controller.
    pub(super) fn lend(&self) -> bool {
        self.part.store(part::OPEN, Ordering::Relaxed);
        self.arrived.fetch_or(LENT, Ordering::AcqRel) & COUNT < self.threads
    }

    /// Controller: takes the lent part back, unless it is being done. The count of those that have not arrived,
    /// or `None` if it is too late.
    pub(super) fn revoke(&self) -> Option<u32> {
        let before = self.arrived.fetch_and(!LENT, Ordering::AcqRel);
        // Without the bit the next command has been published already.
        let missing = self.threads.saturating_sub(before & COUNT);
        (before & LENT != 0 && missing > 0).then_some(missing)
    }

    /// Controller: waits until the lent part is done, at most until `deadline`, and does `help` when it is
    /// called. Returns whether it is done; then the controller sees what the thread did.
    pub(super) fn wait_done(&self, deadline: Option<Instant>, help: impl Fn()) -> bool {
        loop {
            let seen = self.part.load(Ordering::Acquire);
            match seen & !SLEEPS {
                part::DONE => return true,
                part::CALLED => self.help(&help),
                _ if comes(self.looks.other, || self.part.load(Ordering::Acquire) != seen) => {}
                _ => {
                    let left = deadline.map(|it| it.saturating_duration_since(Instant::now()));
                    if left.is_some_and(|left| left.is_zero()) {
                        return false;
                    }
                    sleep(&self.part, seen, left);
                }
            }
        }
    }

    fn help(&self, help: impl Fn()) {
        let (called, helped) = (part::CALLED, part::HELPED);
        // It may not be wanted any more.
        if self.part.compare_exchange(called, helped, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            help();
            self.set_part(part::OPEN);
        }
    }

    /// Thread with the lent part: calls the controller to help. The call costs a system call, and the thread
    /// need not wait until the controller has woken up.
    pub(super) fn call(&self) {
        self.set_part(part::CALLED);
    }

    /// Thread with the lent part: help is no longer wanted. Waits for the controller if it is helping.
    pub(super) fn call_off(&self) {
        let (called, open) = (part::CALLED, part::OPEN);
        if self.part.compare_exchange(called, open, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
            return;
        }
        loop {
            let seen = self.part.load(Ordering::Acquire);
            if seen & !SLEEPS != part::HELPED {
                return;
            }
            sleep(&self.part, seen, None);
        }
    }

    /// Thread with the lent part, which it has taken for the order `last`, before [`done`](Self::done): the order
    /// that it has carried out last. If the copy that it ordered is still in force, it has done its own share and
    /// has counted itself in. A second time would count for the next order, which the controller publishes.
    pub(super) fn carried_out(&self, last: Order) -> Order {
        let order = self.current();
        if order.command() == Command::Copy { order } else { last }
    }

    /// Thread with the lent part: it is done. What was lent must not be touched any more.
    pub(super) fn done(&self) {
        self.set_part(part::DONE);
    }

    fn set_part(&self, now: u32) {
        if self.part.swap(now, Ordering::AcqRel) & SLEEPS != 0 {
            futex::wake_all(&self.part);
        }
    }
}

/// Checks for a moment whether the condition comes true.
fn comes(looks: u32, is_so: impl Fn() -> bool) -> bool {
    (0..looks).any(|_| {
        spin_loop();
        is_so()
    })
}

/// Sleeps on `word` if it holds `seen`, and says so in it. May return without a reason.
fn sleep(word: &AtomicU32, seen: u32, timeout: Option<Duration>) {
    let slept = seen | SLEEPS;
    if seen == slept || word.compare_exchange(seen, slept, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
        futex::wait(word, slept, timeout);
    }
}
