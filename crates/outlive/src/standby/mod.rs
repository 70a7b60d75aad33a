//! The host that can take over: `outlive standby`.
//!
//! ```text
//! listen.rs     accepts connections, hears their introduction, refuses those that do not belong here
//! half_open.rs  those that have not introduced themselves
//! refusal.rs    why it does
//! reader.rs     a thread: hears an accepted primary all the time; writes the base, stages checkpoints
//! handover.rs   the buffers between reader and applier
//! applier.rs    a thread: tries the base, applies acknowledged checkpoints, owns the copy
//! audit.rs      compares pages of the copy with the VM's
//! sinks.rs      where a committed checkpoint goes: memory, state, disks, and before them the record
//! record.rs     what the VM's record is made of here
//! copy.rs       the VM's copy: machine, memory, the state of the last committed checkpoint, disks
//! devices.rs    the VM's devices on this host
//! decisions.rs  the driver of `pair` behind its lock
//! ports.rs      what the decisions reach
//! outbox.rs     what is said to the primary
//! notes.rs      what log and events say
//! tail.rs       copies of frames that no checkpoint has
//! fence.rs      the operator's command that cuts the lost primary off
//! takeover.rs   from the copy to the running VM
//! ```

mod applier;
mod audit;
mod copy;
mod decisions;
mod devices;
mod fence;
mod half_open;
mod handover;
mod listen;
mod memory;
mod notes;
mod outbox;
mod ports;
mod reader;
mod record;
mod refusal;
mod sinks;
mod tail;
mod takeover;

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use outlive_epoch::VmId;
use outlive_machine::{Host, HostError};
use outlive_pair::{StandbyEvent, StandbyExit, StandbyNote, TakeOver};

use crate::arbiter::{self, ArbiterSpecError, Here, Watch};
use crate::cli::{NetSpec, StandbyOptions};
use crate::console::{Console, ConsoleError};
use crate::disk::{Books, CopyEnd, PrepareError, ReplicaEndError};
use crate::events::{self, Event, EventWriter, EventsError, Role};
use crate::report::Reporter;
use crate::sandbox::Steward;
use crate::status::Standing;
use crate::strays::Intake;
use crate::vm::{self, CardError, Launch, Stops, UplinkError};
use crate::{disk, notify, sandbox};
use decisions::{Decisions, Equipment};
pub(crate) use fence::{About, Fence, FenceCheckError, Stop, check as check_fence, fence, run_fence_command};
pub(crate) use listen::{Door, DoorError};
use memory::MemoryWatch;
use notes::Notes;
use ports::{MainMessage, Session};
use tail::Tail;
use takeover::{TakeoverError, Won};

/// How often, and how long, a process that goes back to the standby's role tries to get back what it has just
/// let go: the kernel frees a tap and an image a moment after their last user.
const AGAIN: Duration = Duration::from_millis(50);
const LET_GO: Duration = Duration::from_secs(15);
/// How long a process whose copy has failed waits until it offers to hold another one, as long as systemd would wait
/// before it started a new one: what failed will most likely fail again.
const AFTER_FAILURE: Duration = Duration::from_secs(5);

/// Why this host cannot be a standby.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PostError {
    /// It cannot run a VM.
    #[error(transparent)]
    Host(#[from] HostError),
    /// What it has for the VM cannot be used.
    #[error(transparent)]
    Parts(#[from] PartsError),
    /// Nobody can come to it.
    #[error(transparent)]
    Door(#[from] DoorError),
    /// Nobody could watch the way to the clients.
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    /// The option `--arbiter` is wrong.
    #[error(transparent)]
    Place(#[from] ArbiterSpecError),
    /// There is no event stream.
    #[error(transparent)]
    Events(#[from] EventsError),
    /// There is no console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// Nobody would watch the arbiter, or record.
    #[error("cannot start a thread: {0}")]
    NoThread(#[source] io::Error),
}

/// Why what this host has for a VM cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PartsError {
    /// The card.
    #[error(transparent)]
    Card(#[from] CardError),
    /// The images.
    #[error(transparent)]
    Images(#[from] PrepareError),
}

/// What a process needs to be a standby, whenever it is one. It is claimed at the start and kept while the VM
/// runs here, so that a host that loses the VM can protect it at once.
pub(crate) struct Post {
    equipment: Equipment,
    door: Door,
    stops: Stops,
}

/// A standby that listens.
struct Waiting {
    decisions: Arc<Decisions>,
    inbox: Receiver<MainMessage>,
    stops: Stops,
}

/// How a standby's wait ended.
pub(crate) enum Outcome {
    /// The VM runs here and wants a coordinator.
    TakenOver(Box<Launch>),
    /// It ends. If its copy has failed, nothing of that copy is left, and it never asked for the VM.
    Ended(StandbyExit),
    /// It failed. The text is for a person.
    Failed(String),
}

impl Post {
    /// Of a process that begins as a standby: checks what can be checked without a primary.
    ///
    /// # Errors
    /// See [`PostError`].
    pub(crate) fn prepare(
        options: &StandbyOptions,
        door: Door,
        standing: Arc<Standing>,
        stops: Stops,
    ) -> Result<Self, PostError> {
        let host = Arc::new(Host::open()?);
        check(options, None)?;
        door.listen()?;
        let uplink = vm::watch_uplink(options.net.as_ref(), &options.active)?;
        // Opening the arbiter and the event stream may make files, so everything that is likely to fail comes
        // before.
        let arbiter = arbiter::parse(&options.arbiter)?;
        let events = events::open(&options.active.events_to())?;
        events.emit(Event::Confined { sandbox: sandbox::is_on() });
        let console = Arc::new(Console::open(options.active.console.as_ref(), stops.sender())?);
        console.waits();
        let watch = Watch::start(arbiter.as_ref(), events.clone(), Here::Waits);
        let watch = Arc::new(watch.map_err(PostError::NoThread)?);
        standing.watch(&watch);
        if let Some(uplink) = &uplink {
            standing.uplink(uplink);
        }
        standing.tells(&events);
        events.emit(Event::Started {
            role: Role::Standby,
            vm: None,
            vcpus: None,
            memory: None,
            tracker: None,
        });
        let record = options.active.record.as_ref();
        let record =
            record.map(|spec| record::open(spec, &events)).transpose().map_err(PostError::NoThread)?;
        standing.records(record.as_ref());
        let (options, books) = (options.clone(), Books::default());
        let (differences, shelf, strays) = (Arc::default(), vm::Shelf::default(), intake(&door, &options));
        let equipment = Equipment {
            host,
            options,
            console,
            watch,
            uplink,
            events,
            books,
            standing,
            shelf,
            strays,
            differences,
            record,
        };
        Ok(Self { equipment, door, stops })
    }

    /// Of a process that begins with the VM, and has claimed `door`. `None` if the VM has no arbiter: nobody
    /// can win it then.
    ///
    /// # Errors
    /// This host cannot run a VM, or start a thread.
    pub(crate) fn of(
        options: StandbyOptions,
        door: Door,
        launch: &Launch,
    ) -> Result<Option<Self>, PostError> {
        let Some(watch) = launch.watch.clone() else { return Ok(None) };
        let host = Arc::new(Host::open()?);
        let (console, events) = (launch.console.clone(), launch.events.clone());
        let (standing, uplink) = (launch.standing.clone(), launch.uplink.clone());
        let record = options.active.record.as_ref();
        let record =
            record.map(|spec| record::open(spec, &events)).transpose().map_err(PostError::NoThread)?;
        standing.records(record.as_ref());
        let books = launch.books.clone();
        let (differences, shelf, strays) = (Arc::default(), launch.shelf.clone(), intake(&door, &options));
        let equipment = Equipment {
            host,
            options,
            console,
            watch,
            uplink,
            events,
            books,
            standing,
            shelf,
            strays,
            differences,
            record,
        };
        let mut post = Self { equipment, door, stops: launch.stops.clone() };
        post.has_run(launch.identity.provenance.vm);
        Ok(Some(post))
    }

    /// This VM runs here now.
    pub(crate) fn has_run(&mut self, vm: VmId) {
        self.equipment.options.known = Some(vm);
    }

    /// Whether this process stays as a standby when another host has won the VM.
    pub(crate) fn stays(&self) -> bool {
        !self.equipment.options.once
    }

    /// Goes back to the standby's role: another host has the VM, and `why` says so. What this process had of
    /// the VM is gone when this is called: it sends nothing and writes to no disk any more.
    ///
    /// # Errors
    /// This host cannot be a standby.
    pub(crate) fn back(&mut self, why: &str) -> Result<(), PartsError> {
        self.waits_again(why);
        let deadline = Instant::now() + LET_GO;
        loop {
            match check(&self.equipment.options, Some(&self.equipment.shelf)) {
                Err(why) if Instant::now() < deadline => tracing::debug!("not yet: {why}"),
                checked => return checked,
            }
            std::thread::sleep(AGAIN);
        }
    }

    /// Goes back to the standby's role after this host's copy has failed, as soon as that is possible: a full file
    /// system must have room again, for example. Returns false if the operator wants a stop meanwhile.
    pub(crate) fn back_after_failure(&mut self, why: &str) -> bool {
        self.waits_again(why);
        let mut said = String::new();
        loop {
            self.rest();
            if self.stops.was_used() {
                return false;
            }
            let Err(why) = check(&self.equipment.options, Some(&self.equipment.shelf)) else { return true };
            let why = why.to_string();
            if why != said {
                tracing::error!("this host cannot be the VM's standby yet: {why}; trying again");
                self.equipment.standing.waits_here(&why);
                said = why;
            }
        }
    }

    fn waits_again(&mut self, why: &str) {
        let Equipment { watch, uplink, events, books, standing, .. } = &self.equipment;
        books.close();
        if let Some(uplink) = uplink {
            uplink.stands_by();
        }
        watch.is_now(Here::Waits);
        standing.waits_here(why);
        tracing::warn!("{why}; this process waits as its standby now");
        events.emit(Event::BackToStandby { why: why.to_owned() });
        // Whoever asks for a stop now asks the standby.
        self.stops.disconnect();
    }

    /// Waits a while, because this host's copy has just failed. An order to stop ends it.
    fn rest(&self) {
        let until = Instant::now() + AFTER_FAILURE;
        while Instant::now() < until && !self.stops.was_used() {
            notify::alive();
            std::thread::sleep(AGAIN);
        }
    }

    /// Writes what is to be recorded, for a moment at most.
    pub(crate) fn close_record(&self) {
        if let Some(record) = &self.equipment.record {
            record.close();
        }
    }

    /// The event stream.
    pub(crate) fn events(&self) -> &EventWriter {
        &self.equipment.events
    }

    /// The host's ends of the VM's ports.
    pub(crate) fn console(&self) -> &Console {
        &self.equipment.console
    }

    /// The operator's orders to stop.
    pub(crate) fn stops(&self) -> &Stops {
        &self.stops
    }

    /// Waits until the VM is taken over or this standby is no longer useful.
    pub(crate) fn wait(&mut self) -> Outcome {
        let (queue, inbox) = channel();
        let decisions = Decisions::new(self.equipment.clone(), queue.clone());
        if let Err(why) = self.door.open(decisions.clone()) {
            return Outcome::Failed(why.to_string());
        }
        let addr = self.door.address().to_owned();
        tracing::info!(%addr, "standby waits for a primary");
        self.events().emit(Event::Listening { addr });
        self.stops.connect(move |why| drop(queue.send(MainMessage::Stop(why))));
        let _threads = Reporter::of_threads(self.events().clone())
            .inspect_err(|error| tracing::warn!(%error, "no statistics"));
        Waiting { decisions, inbox, stops: self.stops.clone() }.wait()
    }
}

/// Takes strays, if the VM may have a card, and they are wanted.
fn intake(door: &Door, options: &StandbyOptions) -> Option<Intake> {
    door.strays().filter(|_| options.net.is_some() && options.active.frame_tail.is_on())
}

/// Checks that the card can be made here and the images can be a standby's, and brings them to their last
/// commit. A card whose tap this process still has need not be tried.
fn check(options: &StandbyOptions, shelf: Option<&vm::Shelf>) -> Result<(), PartsError> {
    let has_tap = |net: &&NetSpec| shelf.is_some_and(|shelf| shelf.has_tap(&net.tap));
    if let Some(net) = options.net.as_ref().filter(|net| !has_tap(net)) {
        copy::try_card(net)?;
    }
    Ok(disk::for_standby(&options.disks)?)
}

/// Why a standby leaves that could not fence its primary.
const NO_STEWARD: &str = "the process that keeps this one's rights (vm-steward) has ended, so this standby could not run \
                          the fence command, and so not take the VM over: start this command again";

/// Watches over the rights that a takeover with a fence command needs.
struct StewardWatch {
    /// Whether there is such a command.
    is_needed: bool,
    looked: Option<Instant>,
    /// The steward has ended, and that was told.
    lost: bool,
}

impl StewardWatch {
    fn new(is_needed: bool) -> Self {
        Self { is_needed, looked: None, lost: false }
    }

    /// Whether its loss is to be told now. Looks once a second.
    fn finds_loss(&mut self) -> bool {
        let looked = self.looked.is_some_and(|at| at.elapsed() < Duration::from_secs(1));
        if !self.is_needed || self.lost || looked {
            return false;
        }
        self.looked = Some(Instant::now());
        self.lost = sandbox::steward().is_some_and(Steward::is_gone);
        self.lost
    }
}

impl Waiting {
    fn wait(&self) -> Outcome {
        let mut asked = false;
        let mut steward = StewardWatch::new(self.decisions.equipment.options.active.fence().is_some());
        let mut memory = MemoryWatch::default();
        let mut notes =
            Notes::new(self.decisions.equipment.events.clone(), self.decisions.equipment.standing.clone());
        loop {
            notify::alive();
            if steward.finds_loss() {
                tracing::error!("{NO_STEWARD}; this standby leaves, so that nobody relies on it");
                self.decisions.handle(StandbyEvent::Stop);
            }
            let Equipment { events, standing, .. } = &self.decisions.equipment;
            memory.look(self.decisions.memory_promised(), events, standing);
            let timeout = self.decisions.wait().unwrap_or(Duration::from_secs(1));
            match self.inbox.recv_timeout(timeout) {
                Ok(MainMessage::Wake) => {}
                Ok(MainMessage::Stop(why)) => {
                    tracing::info!("{why}");
                    self.decisions.handle(StandbyEvent::Stop);
                }
                Ok(MainMessage::Note(at, note)) => {
                    asked |= matches!(note, StandbyNote::Arbitrating { .. });
                    notes.note(at, note);
                }
                Ok(MainMessage::Refused(code, text, untold)) => {
                    notes.refused(code, text, Instant::now());
                    drop(untold);
                }
                Ok(MainMessage::TakeOver(order)) => return self.take_over(order, &notes),
                Ok(MainMessage::Exit(reason)) => {
                    let outcome = self.leave(reason, asked);
                    return match outcome {
                        // A supervisor starts it again, with its rights.
                        Outcome::Ended(StandbyExit::Stopped) if steward.lost => {
                            Outcome::Failed(NO_STEWARD.into())
                        }
                        other => other,
                    };
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Outcome::Failed("the standby's threads have ended".into());
                }
            }
            if notes.is_settling() {
                notes.settles(Instant::now(), self.decisions.unsettled());
            }
            notes.lingers(Instant::now(), self.decisions.lingers());
            self.decisions.equipment.shelf.tidy();
            self.decisions.tick();
        }
    }

    fn take_over(&self, order: TakeOver, notes: &Notes) -> Outcome {
        // From here on an order to stop is for the primary that this process becomes, even one that has just
        // come.
        self.stops.disconnect();
        for message in self.inbox.try_iter() {
            if let MainMessage::Stop(why) = message {
                self.stops.send(why);
            }
        }
        let session = self.decisions.take_session().filter(|session| session.link == order.link);
        let frames = session.as_ref().map(|session| session.tail.clone());
        let copy = session.and_then(Session::into_copy).ok_or(TakeoverError::NoCopy);
        let frames = frames.unwrap_or_else(|| Arc::new(Tail::new(false)));
        let taken_over = copy.and_then(|copy| {
            let won = Won { order, times: notes.times(), frames };
            takeover::take_over(copy, won, &self.decisions.equipment, &self.stops)
        });
        match taken_over {
            Ok(launch) => {
                self.decisions.equipment.watch.is_now(Here::Runs);
                Outcome::TakenOver(Box::new(launch))
            }
            // The generation is won and cannot be given back: nobody else may run this VM now, so say so
            // loudly.
            Err(why) => Outcome::Failed(format!("takeover failed, the VM runs nowhere: {why}")),
        }
    }

    fn leave(&self, reason: StandbyExit, asked: bool) -> Outcome {
        self.decisions.finish();
        // Bring the disks to the last commit before the process ends; the next process replays a journal that
        // stays.
        let end = match reason {
            StandbyExit::Followed(_) => Some(CopyEnd::Followed),
            _ => self.decisions.has_handed_over().then_some(CopyEnd::Released),
        };
        let gone = match self.decisions.take_session().map(Session::into_copy) {
            Some(Some(copy)) => match copy.disks().leave(end) {
                Ok(()) | Err(ReplicaEndError::Failed(_)) => true,
                Err(why) => {
                    tracing::error!("the disks: {why}");
                    false
                }
            },
            // Its applier does not end; the process ends without it.
            Some(None) => false,
            None => self.decisions.wait_until_discarded(),
        };
        self.decisions.wait_until_left();
        match reason {
            // What is left of this copy would be in the way of the next, or the VM may be this host's.
            StandbyExit::Failed(_) if asked || !gone => Outcome::Failed(reason.to_string()),
            _ => Outcome::Ended(reason),
        }
    }
}
