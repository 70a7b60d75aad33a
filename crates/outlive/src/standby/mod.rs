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

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use outlive_machine::Host;
use outlive_pair::{Standby, StandbyConfig, StandbyEvent, StandbyExit, Timing};

use crate::arbiter;
use crate::cli::StandbyOptions;
use crate::clock::Clock;
use crate::console::Console;
use crate::disk::Told;
use crate::events::{Event, EventWriter, Role};
use crate::primary;
use crate::{disk, exit, process};
use control::{Control, Inbox};

/// `outlive standby`: returns the exit code.
pub fn command(options: &StandbyOptions) -> u8 {
    match prepare(options) {
        Ok(waiting) => {
            let control = waiting.control.clone();
            let code = waiting.run();
            // Threads that still wait for connections hold it too, so nothing drops it.
            control.console.close();
            code
        }
        Err(line) => exit::usage(line),
    }
}

struct Waiting {
    options: StandbyOptions,
    control: Arc<Control>,
    inbox: Receiver<Inbox>,
    events: EventWriter,
    stop_to: StopTo,
}

/// Where the operator's stop goes: to the standby, or, after a takeover, to the primary that it became.
type StopTo = Arc<Mutex<StopTarget>>;

enum StopTarget {
    Standby(Sender<Inbox>),
    Primary(Sender<primary::Inbox>),
}

/// Brings an operator's stop to whoever runs here at that moment.
fn stop_by(target: &StopTo) -> impl Fn(&'static str) + Send + Clone + 'static {
    let target = target.clone();
    move |why| match &*target.lock().unwrap_or_else(PoisonError::into_inner) {
        StopTarget::Standby(queue) => drop(queue.send(Inbox::Stop(why))),
        StopTarget::Primary(queue) => drop(queue.send(primary::Inbox::Stop(why))),
    }
}

fn prepare(options: &StandbyOptions) -> Result<Waiting, String> {
    let host = Arc::new(Host::open().map_err(|e| e.to_string())?);
    if let Some(net) = &options.net {
        copy::try_card(net)?;
    }
    let images: Vec<&Path> = options.disks.iter().map(PathBuf::as_path).collect();
    disk::for_standby(&images)?;
    let listener = TcpListener::bind(&options.listen).map_err(|e| {
        format!("cannot listen on {}: {e}; give --listen a free address of this host", options.listen)
    })?;
    // Opening the arbiter and the event stream may make files, so nothing that is likely to fail comes after
    // them.
    drop(arbiter::parse(&options.arbiter).map_err(|e| e.to_string())?);
    let events = primary::open_events(options.active.events.as_deref())?;
    let (queue, inbox) = channel();
    let stop_to: StopTo = Arc::new(Mutex::new(StopTarget::Standby(queue.clone())));
    let stop = stop_by(&stop_to);
    let console = Arc::new(Console::open(options.active.console.as_ref(), stop.clone())?);
    let timing = Timing::new(options.active.dead_after);
    let clock = Clock::start();
    let pair = Standby::new(StandbyConfig { vm: None, timing }, clock.now());
    let control = Control::new(pair, clock, host, options.clone(), console, queue, events.clone());
    events.emit(Event::Started { role: Role::Standby, vm: None, vcpus: None, memory: None, tracker: None });
    let addr = listener.local_addr().map_or_else(|_| options.listen.clone(), |a| a.to_string());
    listen::start(listener, control.clone()).map_err(|e| format!("cannot start a thread: {e}"))?;
    tracing::info!(%addr, "standby waits for a primary");
    events.emit(Event::Listening { addr });
    process::on_stop(options.active.exit_with_stdin, stop)
        .map_err(|e| format!("cannot watch signals: {e}"))?;
    Ok(Waiting { options: options.clone(), control, inbox, events, stop_to })
}

impl Waiting {
    fn run(self) -> u8 {
        loop {
            let deadline = self.control.next_deadline();
            let timeout = deadline.map(|d| d.saturating_sub(self.control.clock.now()));
            match self.inbox.recv_timeout(timeout.unwrap_or(Duration::from_secs(1))) {
                Ok(Inbox::Wake) => {}
                Ok(Inbox::Stop(why)) => {
                    tracing::info!("{why}");
                    self.control.handle(StandbyEvent::Stop);
                }
                Ok(Inbox::Disks(link, Told::Want(want))) => self.control.want(link, &want),
                Ok(Inbox::Disks(_, Told::Checked { checkpoint, difference })) => {
                    self.control.compared(checkpoint, difference.as_ref());
                }
                Ok(Inbox::Disks(_, Told::Settled { checkpoint })) => {
                    self.control.handle(StandbyEvent::Settled { checkpoint });
                }
                Ok(Inbox::Disks(_, Told::Failed(why))) => {
                    self.control.handle(StandbyEvent::Failed { why });
                }
                Ok(Inbox::TakeOver(order)) => return self.take_over(order),
                Ok(Inbox::Exit(reason)) => return self.exit(&reason),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return exit::FAILED,
            }
            self.control.handle(StandbyEvent::Tick);
        }
    }

    fn take_over(self, order: control::TakeOverOrder) -> u8 {
        match takeover::take_over(&self.control, order, &self.options, &self.events) {
            Ok(launching) => {
                let mut target = self.stop_to.lock().unwrap_or_else(PoisonError::into_inner);
                *target = StopTarget::Primary(launching.queue.clone());
                drop(target);
                // A stop that came while the VM was being resumed.
                for message in self.inbox.try_iter() {
                    if let Inbox::Stop(why) = message {
                        launching.queue.send(primary::Inbox::Stop(why)).ok();
                    }
                }
                primary::launch(launching)
            }
            Err(why) => {
                // The generation is won and cannot be given back: nobody else may run this VM now, so say so
                // loudly.
                tracing::error!("takeover failed, the VM runs nowhere: {why}");
                self.events.emit(Event::Ended { reason: why, code: exit::FAILED.into() });
                exit::FAILED
            }
        }
    }

    fn exit(&self, reason: &StandbyExit) -> u8 {
        self.control.finish();
        // The disks are brought to the last commit before the process ends; a journal that stays is replayed
        // by the next.
        if let Some(copy) = self.control.take_copy()
            && let Err(why) = copy.disks().leave()
        {
            tracing::error!("the disks: {why}");
        }
        let code = reason.code();
        match reason {
            StandbyExit::Followed(_) | StandbyExit::Stopped => tracing::info!("{reason}"),
            StandbyExit::Lost { .. } | StandbyExit::Failed(_) => eprintln!("outlive: {reason}"),
        }
        self.events.emit(Event::Ended { reason: reason.to_string(), code });
        u8::try_from(code).unwrap_or(exit::FAILED)
    }
}
