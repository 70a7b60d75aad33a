//! The standby's driver behind its lock, shared by all threads.

use std::io;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use outlive_epoch::{Audited, RefuseCode, VmId};
use outlive_machine::Host;
use outlive_pair::{
    After, ClaimResult, Introduction, Link, Standby, StandbyConfig, StandbyDriver, StandbyEvent as Event,
    StandbyStatus, Timing, Unwelcome,
};

use outlive_record::Recorder;

use super::audit::Differences;
use super::notes;
use super::outbox::{FAREWELL, Outbox};
use super::ports::{LOOK_AGAIN, MainMessage, Ports, Session};
use super::refusal::Refusal;
use crate::arbiter::{self, ArbiterSpecError, Claim, ClaimWorker, Watch};
use crate::cli::StandbyOptions;
use crate::clock::Clock;
use crate::console::Console;
use crate::disk::{Books, DiskEvent, STUCK};
use crate::events::{self, EventWriter};
use crate::network::Uplink;
use crate::status::Standing;
use crate::strays::Intake;
use crate::vm::Shelf;

/// Whether a decision was made or not, what the ports were given to do is done.
const NOTHING: After = After { drain: false, wake: false };

/// What this host provides for a standby.
#[derive(Clone)]
pub(super) struct Equipment {
    pub(super) host: Arc<Host>,
    pub(super) options: StandbyOptions,
    /// The host's ends of the VM's ports.
    pub(super) console: Arc<Console>,
    /// Looks whether the arbiter is there.
    pub(super) watch: Arc<Watch>,
    /// Watches this host's way to the guest's clients.
    pub(super) uplink: Option<Arc<Uplink>>,
    pub(super) events: EventWriter,
    /// What is known of this host's images.
    pub(super) books: Books,
    /// What `outlive status` tells.
    pub(super) standing: Arc<Standing>,
    /// The memory of a VM that this host has handed over.
    pub(super) shelf: Shelf,
    /// Takes strays; `None` if nobody is to have them.
    pub(super) strays: Option<Intake>,
    /// How often copies on this host were found not to be the VM.
    pub(super) differences: Arc<Differences>,
    /// Writes the VM's past down, if that is wanted.
    pub(super) record: Option<Arc<Recorder>>,
}

/// Why nobody can claim a VM for this host.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClaimsError {
    /// The arbiter cannot be used.
    #[error(transparent)]
    Place(#[from] ArbiterSpecError),
    /// Nobody would ask it.
    #[error("cannot start a thread: {0}")]
    NoThread(#[source] io::Error),
}

/// The driver; see the module.
pub(super) struct Decisions {
    driver: Mutex<StandbyDriver<Ports>>,
    clock: Clock,
    inbox: Sender<MainMessage>,
    pub(super) equipment: Equipment,
}

impl Decisions {
    /// The driver of a standby that listens. The main thread has the other end of `inbox`.
    pub(super) fn new(equipment: Equipment, inbox: Sender<MainMessage>) -> Arc<Self> {
        let clock = Clock::start();
        let timing = Timing::new(equipment.options.active.dead_after);
        let machine = Standby::new(StandbyConfig { vm: None, timing }, clock.now());
        let driver = Mutex::new(StandbyDriver::new(
            machine,
            Ports::new(inbox.clone(), equipment.uplink.clone(), equipment.watch.clone()),
        ));
        Arc::new(Self { driver, clock, inbox, equipment })
    }

    /// Takes an event, and does what follows.
    pub(super) fn handle(&self, event: Event) {
        self.with(|driver, now| ((), driver.handle(now, event)));
    }

    /// Whether a section of base pages, or of the base of disks, that has come may be written.
    pub(super) fn base_pages(&self, link: Link) -> bool {
        self.with(|driver, now| driver.base_pages(now, link))
    }

    /// Whether this introduction would be accepted now.
    pub(super) fn would_accept(&self, hello: &Introduction) -> Result<(), Unwelcome> {
        self.with(|driver, now| (driver.would_accept(now, hello), NOTHING))
    }

    /// Adds a connection of which nothing is known yet.
    pub(super) fn connect(&self, link: Link, outbox: Arc<Outbox>) {
        self.with(|driver, _| (driver.ports_mut().connect(link, outbox), NOTHING));
    }

    /// Forgets a connection whose thread ends.
    pub(super) fn disconnect(&self, link: Link) {
        self.with(|driver, _| (driver.ports_mut().disconnect(link), NOTHING));
    }

    /// Refuses a connection for a reason that needs no decision.
    pub(super) fn refuse(&self, link: Link, code: RefuseCode, text: String) {
        self.with(|driver, _| {
            outlive_pair::StandbyPorts::refuse(driver.ports_mut(), link, code, text);
            ((), NOTHING)
        });
    }

    /// Answers a host that has only asked. It is no primary, and no line for an operator.
    pub(super) fn answer(&self, link: Link, refusal: &Refusal) {
        tracing::debug!("another host: {refusal}");
        let (code, text) = (refusal.code(), refusal.to_string());
        self.with(|driver, _| (driver.ports_mut().turn_away(link, code, &text), NOTHING));
    }

    /// Takes a primary's introduction, with the copy that was made for its VM. If the decision has changed
    /// since [`would_accept`](Self::would_accept), the copy is returned and the refusal is on its way.
    pub(super) fn hello(
        &self,
        link: Link,
        hello: Introduction,
        session: Session,
    ) -> Result<(), Box<Session>> {
        self.with(|driver, now| {
            let mut session = Some(session);
            if driver.would_accept(now, &hello).is_ok()
                && let Some(session) = session.take()
            {
                driver.ports_mut().admit(session);
            }
            let after = driver.handle(now, Event::Hello { link, hello });
            (session.map_or(Ok(()), |session| Err(Box::new(session))), after)
        })
    }

    /// Tells the primary how far the comparison of pages is.
    pub(super) fn audited(&self, link: Link, audited: &Audited) {
        // The connection may be gone.
        self.with(|driver, _| (driver.ports_mut().audited(link, audited).ok(), NOTHING));
    }

    /// Takes an event of a session's disks.
    pub(super) fn disks(&self, link: Link, event: DiskEvent) {
        match event {
            DiskEvent::Want(want) => {
                // The connection may be gone, and with it the session.
                self.with(|driver, _| (driver.ports_mut().want(link, &want).ok(), NOTHING));
            }
            DiskEvent::Checked { checkpoint, difference } => {
                notes::compared(&self.equipment.events, checkpoint, difference.as_deref());
            }
            DiskEvent::Audited(audited, more) => {
                self.equipment.standing.disks_audited(more, audited.differs.is_some());
                // The connection may be gone.
                self.with(|driver, _| (driver.ports_mut().disk_audited(link, &audited).ok(), NOTHING));
            }
            DiskEvent::Differs { checkpoint, chunks, why } => {
                let place = chunks.into();
                self.equipment.events.emit(events::Event::AuditDiffers { checkpoint, place });
                self.equipment.differences.note();
                self.handle(Event::Differs { link, why: why.to_string() });
            }
            DiskEvent::Settled { checkpoint } => self.handle(Event::Settled { link, checkpoint }),
            DiskEvent::Released(result) => {
                let result = result.map_err(|error| error.to_string());
                self.handle(Event::Released { link, result });
            }
            DiskEvent::Failed(why) => self.handle(Event::Failed { link, why: why.to_string() }),
        }
    }

    /// Starts a thread that claims generations of `vm` and reports here.
    ///
    /// # Errors
    /// See [`ClaimsError`].
    pub(super) fn claim_worker(self: &Arc<Self>, vm: VmId) -> Result<ClaimWorker, ClaimsError> {
        let arbiter = arbiter::parse(&self.equipment.options.arbiter)?;
        let (decisions, watch) = (self.clone(), self.equipment.watch.clone());
        ClaimWorker::start(arbiter, arbiter::VmId(vm.0), arbiter::owner("standby"), move |answer| {
            let generation = answer.generation;
            if !matches!(answer.claim, Claim::Unreachable { .. }) {
                watch.answered();
            }
            let result = match answer.claim {
                Claim::Won => ClaimResult::Won,
                Claim::Lost { owner } => {
                    let lost = events::Event::Lost { generation, owner: owner.clone() };
                    decisions.equipment.events.emit(lost);
                    ClaimResult::Lost { owner }
                }
                Claim::Unreachable { why } => ClaimResult::Unreachable { why },
            };
            decisions.handle(Event::Claimed { generation, result });
        })
        .map_err(ClaimsError::NoThread)
    }

    /// How long the main thread may sleep if nobody wakes it.
    pub(super) fn wait(&self) -> Option<Duration> {
        let (until, now) = self.with(|driver, now| ((driver.wait(), now), NOTHING));
        until.map(|until| until.saturating_sub(now))
    }

    /// Checks the deadlines, and whether this standby still makes progress. One that does not is useless
    /// while the primary lives, and the VM must not wait for it. Without the primary it is all that the VM
    /// has.
    pub(super) fn tick(&self) {
        self.with(|driver, now| {
            let after = driver.handle(now, Event::Tick);
            let follows =
                matches!(driver.machine().status(), StandbyStatus::BaseSync | StandbyStatus::Protected);
            match driver.ports().stuck().filter(|_| follows) {
                Some((link, stuck)) => {
                    let why = stuck.to_string();
                    ((), after.and(driver.handle(now, Event::Failed { link, why })))
                }
                None => ((), after),
            }
        });
    }

    /// Bytes of memory of the VM that has a copy here, if one has.
    pub(super) fn memory_promised(&self) -> Option<u64> {
        self.with(|driver, _| (driver.ports_mut().memory_promised(), NOTHING))
    }

    /// What a takeover waits for that has lost its primary and is not ready to ask for the VM, and for how long a disk has
    /// not finished what it is at.
    pub(super) fn unsettled(&self) -> Option<(events::SettlePart, Duration)> {
        self.with(|driver, _| {
            let settles = driver.machine().status() == StandbyStatus::Settling;
            (driver.ports().unsettled().filter(|_| settles), NOTHING)
        })
    }

    /// For how long the last copy has been thrown away and is not gone. No primary is accepted meanwhile.
    pub(super) fn lingers(&self) -> Option<Duration> {
        self.with(|driver, _| (driver.ports().lingers(), NOTHING))
    }

    /// Takes the copy out once no decision needs it.
    pub(super) fn take_session(&self) -> Option<Session> {
        self.with(|driver, _| (driver.ports_mut().take_session(), NOTHING))
    }

    /// Waits until the last copy is thrown away, if one is, but not forever.
    /// Returns whether none is left.
    pub(super) fn wait_until_discarded(&self) -> bool {
        let Some(thread) = self.with(|driver, _| (driver.ports_mut().take_discards(), NOTHING)) else {
            return true;
        };
        let deadline = Instant::now() + STUCK;
        while !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(LOOK_AGAIN);
        }
        thread.is_finished()
    }

    /// Whether the primary may have heard that it has no rival any more.
    pub(super) fn has_handed_over(&self) -> bool {
        self.with(|driver, _| (driver.ports().has_handed_over(), NOTHING))
    }

    /// Gives the primary that this standby leaves time to read so, and to close: what this process has not
    /// read when it ends would make the system reset the connection.
    pub(super) fn wait_until_left(&self) {
        let deadline = Instant::now() + FAREWELL;
        while Instant::now() < deadline && self.with(|driver, _| (driver.ports().is_leaving(), NOTHING)) {
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Closes every connection; what was queued still goes out.
    pub(super) fn finish(&self) {
        self.with(|driver, _| (driver.ports_mut().finish(), NOTHING));
    }

    /// Works on the driver under its lock, and does what follows after dropping the lock.
    fn with<T>(&self, work: impl FnOnce(&mut StandbyDriver<Ports>, Duration) -> (T, After)) -> T {
        let mut driver = self.driver.lock().unwrap_or_else(PoisonError::into_inner);
        // Under the lock, so that messages to the main thread keep the order of the decisions.
        let (result, after) = work(&mut driver, self.clock.now());
        let deferred = driver.ports_mut().take_deferred();
        drop(driver);
        deferred.carry_out();
        if after.wake {
            // After a takeover nobody waits any more.
            self.inbox.send(MainMessage::Wake).ok();
        }
        result
    }
}
