//! The host that can take over: `outlive standby`.
//!
//! ```text
//! listen.rs     accepts connections, hears their introduction, refuses those that do not belong here
//! reader.rs     a thread: hears an accepted primary all the time; writes the base, stages checkpoints
//! handover.rs   the buffers between reader and applier
//! applier.rs    a thread: tries the base, applies acknowledged checkpoints, owns the copy
//! sinks.rs      where a committed checkpoint goes: memory, state, disks
//! copy.rs       the VM's copy: machine, memory, the state of the last committed checkpoint, disks
//! devices.rs    the VM's devices on this host
//! decisions.rs  the driver of `pair` behind its lock
//! ports.rs      what the decisions reach
//! outbox.rs     what is said to the primary
//! notes.rs      what log and events say
//! takeover.rs   from the copy to the running VM
//! ```

mod applier;
mod copy;
mod decisions;
mod devices;
mod handover;
mod listen;
mod notes;
mod outbox;
mod ports;
mod reader;
mod sinks;
mod takeover;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use outlive_machine::Host;
use outlive_pair::{StandbyEvent, StandbyExit, TakeOver};

use crate::arbiter::{self, Here, Watch};
use crate::cli::StandbyOptions;
use crate::console::Console;
use crate::disk::CopyEnd;
use crate::events::{self, Event, EventWriter, Role};
use crate::link::Listener;
use crate::report::Reporter;
use crate::status::Standing;
use crate::vm::{Launch, Relay};
use crate::{disk, process};
use decisions::{Decisions, Equipment};
use notes::Notes;
use ports::{MainMessage, Session};

/// A standby that listens.
pub(crate) struct Waiting {
    decisions: Arc<Decisions>,
    inbox: Receiver<MainMessage>,
    stops: Relay<&'static str>,
}

/// How a standby's wait ended.
pub(crate) enum Outcome {
    /// The VM runs here and wants a coordinator.
    TakenOver(Box<Launch>),
    /// It ends.
    Ended(StandbyExit),
    /// It failed. The text is for a person.
    Failed(String),
}

impl Waiting {
    /// Checks what can be checked without a primary, and listens.
    ///
    /// # Errors
    /// One line that names the remedy.
    pub(crate) fn prepare(options: &StandbyOptions, standing: Arc<Standing>) -> Result<Self, String> {
        let host = Arc::new(Host::open().map_err(|e| e.to_string())?);
        if let Some(net) = &options.net {
            copy::try_card(net)?;
        }
        disk::for_standby(&options.disks).map_err(|e| e.to_string())?;
        let listener = Listener::bind(&options.listen).map_err(|e| {
            format!("cannot listen on {}: {e}; give --listen a free address of this host", options.listen)
        })?;
        // Opening the arbiter and the event stream may make files, so everything that is likely to fail comes
        // before.
        let arbiter = arbiter::parse(&options.arbiter).map_err(|e| e.to_string())?;
        let events = events::open(options.active.events.as_deref())?;
        let (queue, inbox) = channel();
        let stops = Relay::new();
        let console = Arc::new(Console::open(options.active.console.as_ref(), stops.sender())?);
        let watch = Watch::start(arbiter.prober(), events.clone(), Here::Waits);
        let watch = Arc::new(watch.map_err(|e| format!("cannot start a thread: {e}"))?);
        standing.watch(&watch);
        let equipment =
            Equipment { host, options: options.clone(), console, watch, events: events.clone(), standing };
        let decisions = Decisions::new(equipment, queue.clone());
        events.emit(Event::Started {
            role: Role::Standby,
            vm: None,
            vcpus: None,
            memory: None,
            tracker: None,
        });
        let addr = listener.address().map_or_else(|_| options.listen.clone(), |a| a.to_string());
        listen::start(listener, decisions.clone()).map_err(|e| format!("cannot start a thread: {e}"))?;
        tracing::info!(%addr, "standby waits for a primary");
        events.emit(Event::Listening { addr });
        process::on_stop(options.active.exit_with_stdin, stops.sender())
            .map_err(|e| format!("cannot watch signals: {e}"))?;
        stops.connect(move |why| drop(queue.send(MainMessage::Stop(why))));
        Ok(Self { decisions, inbox, stops })
    }

    /// The event stream.
    pub(crate) fn events(&self) -> &EventWriter {
        &self.decisions.equipment.events
    }

    /// Waits until the VM is taken over or this standby is no longer useful.
    pub(crate) fn run(self) -> Outcome {
        let _threads = Reporter::of_threads(self.events().clone())
            .inspect_err(|error| tracing::warn!(%error, "no statistics"));
        let outcome = self.wait();
        if !matches!(outcome, Outcome::TakenOver(_)) {
            // Threads that still wait for connections also hold it, so it is not dropped.
            self.decisions.equipment.console.close();
        }
        outcome
    }

    fn wait(&self) -> Outcome {
        let mut notes = Notes::new(self.events().clone(), self.decisions.equipment.standing.clone());
        loop {
            let timeout = self.decisions.wait().unwrap_or(Duration::from_secs(1));
            match self.inbox.recv_timeout(timeout) {
                Ok(MainMessage::Wake) => {}
                Ok(MainMessage::Stop(why)) => {
                    tracing::info!("{why}");
                    self.decisions.handle(StandbyEvent::Stop);
                }
                Ok(MainMessage::Note(at, note)) => notes.note(at, note),
                Ok(MainMessage::Refused(code, text)) => notes.refused(code, text),
                Ok(MainMessage::TakeOver(order)) => return self.take_over(order, &notes),
                Ok(MainMessage::Exit(reason)) => return Outcome::Ended(self.leave(reason)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Outcome::Failed("the standby's threads have ended".into());
                }
            }
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
        let copy =
            session.and_then(Session::into_copy).ok_or_else(|| "there is no copy of the VM".to_owned());
        let taken_over = copy.and_then(|copy| {
            takeover::take_over(copy, order, notes.times(), &self.decisions.equipment, &self.stops)
        });
        match taken_over {
            Ok(launch) => {
                self.decisions.equipment.watch.taken_over();
                Outcome::TakenOver(Box::new(launch))
            }
            // The generation is won and cannot be given back: nobody else may run this VM now, so say so
            // loudly.
            Err(why) => Outcome::Failed(format!("takeover failed, the VM runs nowhere: {why}")),
        }
    }

    fn leave(&self, reason: StandbyExit) -> StandbyExit {
        self.decisions.finish();
        // Bring the disks to the last commit before the process ends; the next process replays a journal that
        // stays.
        let end = match reason {
            StandbyExit::Followed(_) => Some(CopyEnd::Followed),
            _ => self.decisions.has_handed_over().then_some(CopyEnd::Released),
        };
        match self.decisions.take_session().map(Session::into_copy) {
            Some(Some(copy)) => {
                if let Err(why) = copy.disks().leave(end) {
                    tracing::error!("the disks: {why}");
                }
            }
            // Its applier does not end; the process ends without it.
            Some(None) => {}
            None => self.decisions.wait_until_discarded(),
        }
        self.decisions.wait_until_left();
        reason
    }
}
