//! The host that can take over: `outlive standby`.
//!
//! ```text
//! listen.rs    accepts connections, hears their introduction, refuses what does not belong here
//! session.rs   one accepted primary: stages, acknowledges, applies
//! copy.rs      the VM's copy: machine, memory, the state of the last committed checkpoint
//! devices.rs   what the VM's devices are here
//! control.rs   decisions, carried out
//! takeover.rs  from the copy to the running VM
//! ```

mod control;
mod copy;
mod devices;
mod listen;
mod session;
mod takeover;

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use outlive_machine::Host;
use outlive_pair::{Standby, StandbyConfig, StandbyEvent, StandbyExit, Timing};

use crate::arbiter;
use crate::cli::StandbyOptions;
use crate::clock::Clock;
use crate::console::Console;
use crate::disk::{CopyEnd, DiskEvent};
use crate::events::{self, Event, EventWriter, Role};
use crate::link::Listener;
use crate::report::Reporter;
use crate::vm::{Launch, Relay};
use crate::{disk, process};
use control::{Control, Inbox};

/// A standby that listens.
pub(crate) struct Waiting {
    options: StandbyOptions,
    control: Arc<Control>,
    inbox: Receiver<Inbox>,
    events: EventWriter,
    stops: Relay<&'static str>,
}

/// What a standby's wait led to.
pub(crate) enum Outcome {
    /// The VM runs here and wants a coordinator.
    TakenOver(Box<Launch>),
    /// It ends.
    Ended(StandbyExit),
    /// It cannot go on. The text is for a person.
    Failed(String),
}

impl Waiting {
    /// Checks what can be checked without a primary, and listens.
    ///
    /// # Errors
    /// One line that names the remedy.
    pub(crate) fn prepare(options: &StandbyOptions) -> Result<Self, String> {
        let host = Arc::new(Host::open().map_err(|e| e.to_string())?);
        if let Some(net) = &options.net {
            copy::try_card(net)?;
        }
        disk::for_standby(&options.disks)?;
        let listener = Listener::bind(&options.listen).map_err(|e| {
            format!("cannot listen on {}: {e}; give --listen a free address of this host", options.listen)
        })?;
        // Opening the arbiter and the event stream may make files, so nothing that is likely to fail comes
        // after them.
        drop(arbiter::parse(&options.arbiter).map_err(|e| e.to_string())?);
        let events = events::open(options.active.events.as_deref())?;
        let (queue, inbox) = channel();
        let stops = Relay::new();
        let console = Arc::new(Console::open(options.active.console.as_ref(), stops.sender())?);
        let timing = Timing::new(options.active.dead_after);
        let clock = Clock::start();
        let pair = Standby::new(StandbyConfig { vm: None, timing }, clock.now());
        let control =
            Control::new(pair, clock, host, options.clone(), console, queue.clone(), events.clone());
        events.emit(Event::Started {
            role: Role::Standby,
            vm: None,
            vcpus: None,
            memory: None,
            tracker: None,
        });
        let addr = listener.address().map_or_else(|_| options.listen.clone(), |a| a.to_string());
        listen::start(listener, control.clone()).map_err(|e| format!("cannot start a thread: {e}"))?;
        tracing::info!(%addr, "standby waits for a primary");
        events.emit(Event::Listening { addr });
        process::on_stop(options.active.exit_with_stdin, stops.sender())
            .map_err(|e| format!("cannot watch signals: {e}"))?;
        stops.connect(move |why| drop(queue.send(Inbox::Stop(why))));
        Ok(Self { options: options.clone(), control, inbox, events, stops })
    }

    /// The event stream.
    pub(crate) fn events(&self) -> &EventWriter {
        &self.events
    }

    /// Waits until the VM is taken over or this standby is of no further use.
    pub(crate) fn run(self) -> Outcome {
        let _threads = Reporter::of_threads(self.events.clone())
            .inspect_err(|error| tracing::warn!(%error, "no statistics"));
        let outcome = self.wait();
        if !matches!(outcome, Outcome::TakenOver(_)) {
            // Threads that still wait for connections hold it too, so nothing drops it.
            self.control.console.close();
        }
        outcome
    }

    fn wait(&self) -> Outcome {
        loop {
            let deadline = self.control.next_deadline();
            let timeout = deadline.map(|d| d.saturating_sub(self.control.clock.now()));
            match self.inbox.recv_timeout(timeout.unwrap_or(Duration::from_secs(1))) {
                Ok(Inbox::Wake) => {}
                Ok(Inbox::Stop(why)) => {
                    tracing::info!("{why}");
                    self.control.handle(StandbyEvent::Stop);
                }
                Ok(Inbox::Disks(link, DiskEvent::Want(want))) => self.control.want(link, &want),
                Ok(Inbox::Disks(_, DiskEvent::Checked { checkpoint, difference })) => {
                    self.control.compared(checkpoint, difference.as_ref());
                }
                Ok(Inbox::Disks(link, DiskEvent::Settled { checkpoint })) => {
                    self.control.handle(StandbyEvent::Settled { link, checkpoint });
                }
                Ok(Inbox::Disks(link, DiskEvent::Failed(why))) => {
                    self.control.handle(StandbyEvent::Failed { link, why });
                }
                Ok(Inbox::TakeOver(order)) => return self.take_over(order),
                Ok(Inbox::Exit(reason)) => return Outcome::Ended(self.leave(reason)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    return Outcome::Failed("the standby's threads have ended".into());
                }
            }
            self.control.handle(StandbyEvent::Tick);
        }
    }

    fn take_over(&self, order: control::TakeOverOrder) -> Outcome {
        // From here on a stop is for the primary that this process becomes, as is one that has just come.
        self.stops.disconnect();
        for message in self.inbox.try_iter() {
            if let Inbox::Stop(why) = message {
                self.stops.send(why);
            }
        }
        match takeover::take_over(&self.control, order, &self.options, &self.events, &self.stops) {
            Ok(launch) => Outcome::TakenOver(Box::new(launch)),
            // The generation is won and cannot be given back: nobody else may run this VM now, so say so
            // loudly.
            Err(why) => Outcome::Failed(format!("takeover failed, the VM runs nowhere: {why}")),
        }
    }

    fn leave(&self, reason: StandbyExit) -> StandbyExit {
        self.control.finish();
        // The disks are brought to the last commit before the process ends; a journal that stays is replayed
        // by the next.
        let end = matches!(reason, StandbyExit::Followed(_)).then_some(CopyEnd::Followed);
        if let Some(copy) = self.control.take_copy()
            && let Err(why) = copy.disks().leave(end)
        {
            tracing::error!("the disks: {why}");
        }
        reason
    }
}
