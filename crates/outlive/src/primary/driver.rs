//! The driver of the primary's decisions, shared by all threads.
//!
//! One lock covers the state machine and its ports, so actions are carried out in the order of the decisions,
//! whichever thread brought the event. Nothing under the lock makes a system call that could wait, because
//! the VM's pause waits for the lock. What takes time is done after the lock is dropped: above all, the
//! thread that read the acknowledgement sends the committed epoch's output.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use outlive_epoch::Moment;
use outlive_machine::Valve;
use outlive_pair::{
    After, ClaimResult, Link, Primary, PrimaryDriver, PrimaryEvent, PrimaryStatus, Ticket, Wanted,
};

use super::inbox::{Inbox, Queue};
use super::ports::{Commit, Connection, Ports};
use super::stats::Totals;
use crate::arbiter::{Claim, ClaimWorker};
use crate::clock::Clock;
use crate::events::{Event, EventWriter};
use crate::link::{Agreed, CheckpointPart, Job, LinkKind};
use crate::pulse::Pulse;

/// How often, and in what distance, the lock is tried by a thread that must not wait for it.
const LOCK_LOOKS: u32 = 100;
const LOCK_LOOK: Duration = Duration::from_millis(1);

/// What the coordinator waits for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    /// The checkpoint that is wanted.
    pub(super) wanted: Wanted,
    /// When a `Tick` is due.
    pub(super) deadline: Option<Duration>,
    /// The newest committed checkpoint.
    pub(super) committed: Option<Commit>,
}

/// The driver; see the module.
pub(crate) struct SharedDriver {
    driver: Mutex<PrimaryDriver<Ports>>,
    clock: Clock,
    valve: Arc<Valve>,
    inbox: Queue,
    totals: Arc<Totals>,
    pulse: Arc<Pulse>,
    /// This side has left the VM to its standby and decides nothing any more. Written under the lock.
    left: AtomicBool,
    /// It was told that another process has the VM.
    told_lost: AtomicBool,
}

impl SharedDriver {
    /// A driver of `machine` through `ports`; `valve` and `inbox` are those of the ports.
    pub(super) fn new(
        machine: Primary,
        ports: Ports,
        clock: Clock,
        valve: Arc<Valve>,
        inbox: Queue,
        totals: Arc<Totals>,
    ) -> Arc<Self> {
        let pulse = ports.pulse().clone();
        let driver = Mutex::new(PrimaryDriver::new(machine, ports));
        let (left, told_lost) = (AtomicBool::new(false), AtomicBool::new(false));
        Arc::new(Self { driver, clock, valve, inbox, totals, pulse, left, told_lost })
    }

    /// Whether this side may still say that it lives.
    pub(crate) fn pulse(&self) -> &Arc<Pulse> {
        &self.pulse
    }

    /// Leaves the VM to its standby, as [`leave`](Self::leave) does, if it has one and the coordinator still
    /// gives no sign. Whoever may hold the lock for good is not waited for: where nobody decides any more,
    /// nothing has to be kept from being decided. Returns whether this process is to end.
    pub(super) fn leave_if_wedged(&self) -> bool {
        for _ in 0..LOCK_LOOKS {
            if let Ok(driver) = self.driver.try_lock() {
                let protected = driver.machine().status() == PrimaryStatus::Protected;
                let wedged = protected && !self.pulse.lasts() && !self.left.load(Ordering::Relaxed);
                if wedged {
                    self.left.store(true, Ordering::Relaxed);
                    self.valve.discard();
                }
                return wedged;
            }
            std::thread::sleep(LOCK_LOOK);
        }
        self.totals.is_protected() && !self.pulse.lasts()
    }

    /// The time for the state machine.
    pub(crate) fn clock(&self) -> Clock {
        self.clock
    }

    /// Takes an event, and does what follows from it.
    pub(crate) fn handle(&self, event: PrimaryEvent) {
        let after = {
            let mut driver = self.lock();
            if self.left.load(Ordering::Relaxed) {
                return;
            }
            driver.handle(self.clock.now(), event)
        };
        self.follow(after);
    }

    /// Does what a call left for its caller, on this thread.
    pub(super) fn follow(&self, after: After) {
        if after.drain {
            self.totals.releases();
            let began = Instant::now();
            self.valve.drain();
            self.totals.released(began.elapsed());
        }
        if after.wake {
            self.tell(Inbox::Wake);
        }
    }

    /// Takes a new connection into use.
    pub(super) fn connected(&self, connection: Connection) {
        let after = {
            let mut driver = self.lock();
            if self.left.load(Ordering::Relaxed) {
                return;
            }
            let link = connection.link;
            driver.ports_mut().connect(connection);
            driver.handle(self.clock.now(), PrimaryEvent::Connected { link })
        };
        self.follow(after);
    }

    /// Both sides of a link have agreed on a version of the stream. To be called before the acceptance is
    /// handled.
    pub(super) fn agreed(&self, link: Link, agreed: Agreed) {
        self.lock().ports_mut().agreed(link, agreed);
    }

    /// A checkpoint is captured. Called inside the pause; what it leaves to do is done after the pause.
    /// `link` and `base` say what was wanted when the pause began, and `stays` whether the vCPUs stay stopped.
    pub(super) fn captured(&self, link: Link, base: bool, stays: bool) -> (Option<Ticket>, After) {
        self.lock().captured(self.clock.now(), link, base, stays)
    }

    /// Queues a checkpoint, or a part of one, for the link of its ticket. If that link is no longer in use,
    /// the buffer is dropped like the protection that it belonged to.
    pub(super) fn ship(&self, part: Box<CheckpointPart>) {
        let shipped = self.lock().ship(self.clock.now(), part.ticket, part);
        // A returned part is dropped here, after the lock.
        if let Ok(after) = shipped {
            self.follow(after);
        }
    }

    /// What the coordinator may wait for. It is woken when there is something to do sooner.
    pub(super) fn wait(&self) -> Waiting {
        let mut driver = self.lock();
        let (wanted, deadline) = driver.wait();
        Waiting { wanted, deadline, committed: driver.ports().committed() }
    }

    /// Which checkpoint is wanted next.
    pub(super) fn wanted(&self) -> Wanted {
        self.lock().machine().wanted_capture()
    }

    /// What the primary is doing.
    pub(crate) fn status(&self) -> PrimaryStatus {
        self.lock().machine().status()
    }

    /// Whether vCPUs may run.
    pub(super) fn guest_may_run(&self) -> bool {
        self.lock().machine().guest_may_run()
    }

    /// Whether the guest stands still because it is being handed over.
    pub(super) fn stands_still(&self) -> bool {
        self.lock().machine().stands_still()
    }

    /// The moment at which the VM was handed over to the host that has it now; see
    /// [`Primary::handed_over`](outlive_pair::Primary::handed_over).
    pub(super) fn handed_over(&self) -> Option<Moment> {
        let driver = self.lock();
        let machine = driver.machine();
        let checkpoint = machine.handed_over()?;
        Some(Moment { generation: machine.generation(), checkpoint })
    }

    /// From now on writes to the VM's memory may be missed.
    pub(super) fn forgets_writes(&self) {
        self.lock().ports_mut().forgets_writes();
    }

    /// Queues a job for the link, if it is still the one in use.
    pub(crate) fn send(&self, link: Link, job: Job) {
        let driver = self.lock();
        if let Some(connection) = driver.ports().connection(link) {
            return connection.sender.send(job);
        }
        drop(driver);
        drop(job);
    }

    /// The standby that a link leads to, for people, and what protects the link.
    pub(super) fn standby(&self, link: Link) -> Option<(String, Option<LinkKind>)> {
        self.lock().ports().connection(link).map(|connection| (connection.address.clone(), connection.kind))
    }

    /// Tells the coordinator something.
    pub(crate) fn tell(&self, message: Inbox) {
        self.inbox.send(message).ok();
    }

    /// Gives the driver the thread that makes claims.
    pub(super) fn set_claims(&self, claims: ClaimWorker) {
        self.lock().ports_mut().set_claims(claims);
    }

    /// The arbiter has answered.
    pub(super) fn claimed(&self, generation: u64, claim: Claim, events: &EventWriter) {
        let result = match claim {
            Claim::Won => ClaimResult::Won,
            Claim::Lost { owner } => {
                self.tell_lost(generation, &owner, events);
                ClaimResult::Lost { owner }
            }
            Claim::Unreachable { why } => ClaimResult::Unreachable { why },
        };
        self.handle(PrimaryEvent::Claimed { generation, result });
    }

    /// Another process has won this generation. This side may be asking for it: then that is its standby, as far as is known,
    /// and whoever hears of it first, this or the answer, ends the VM here.
    pub(super) fn superseded(&self, generation: u64, owner: String, events: &EventWriter) {
        let (status, own) = {
            let driver = self.lock();
            (driver.machine().status(), driver.machine().generation())
        };
        if own >= generation || status == PrimaryStatus::Over {
            return;
        }
        if status != PrimaryStatus::Arbitrating {
            tracing::error!(
                generation,
                owner,
                "another process has won this VM: an image of it was started elsewhere"
            );
        }
        self.tell_lost(generation, &owner, events);
        self.handle(PrimaryEvent::Superseded { generation, owner });
    }

    /// The VM is lost once, whoever says so first.
    fn tell_lost(&self, generation: u64, owner: &str, events: &EventWriter) {
        if !self.told_lost.swap(true, Ordering::Relaxed) {
            events.emit(Event::Lost { generation, owner: owner.to_owned() });
        }
    }

    /// Since when the oldest output of the running epoch is held, on the driver's clock.
    pub(super) fn held_since(&self) -> Option<Duration> {
        self.valve.held_since().map(|since| self.clock.since_start(since))
    }

    /// Lets everything out that may leave. If output is discarded, waits for the frame that is being sent:
    /// nothing leaves after this.
    pub(super) fn finish_output(&self) {
        self.valve.drain();
    }

    /// Leaves the VM to its standby: throws output away and closes the link without a word, as when this
    /// process dies. Nothing is decided here from now on; above all, the closed link does not make this side
    /// claim the next generation.
    pub(super) fn leave(&self) {
        let mut driver = self.lock();
        self.left.store(true, Ordering::Relaxed);
        self.valve.discard();
        if let Some(connection) = driver.ports_mut().take_connection() {
            connection.sender.close();
            // Its thread may be writing; do not wait for it.
            std::mem::forget(connection);
        }
    }

    /// Sends what is queued and closes the link.
    pub(super) fn finish(&self, patience: Duration) {
        let connection = self.lock().ports_mut().take_connection();
        if let Some(connection) = connection {
            connection.sender.finish(patience);
        }
    }

    fn lock(&self) -> MutexGuard<'_, PrimaryDriver<Ports>> {
        self.driver.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
