//! What a keeper is told, and does.

use std::sync::mpsc::Sender;

use serde_json::json;

use super::Keeper;
use crate::asking::ask;
use crate::definition::{Definition, DefinitionError};
use crate::error::NodeError;
use crate::files::lock;
use crate::process::is_gone;
use crate::records::{By, Desired, Record, Stop};
use crate::view::State;

/// What a keeper is told.
#[derive(Debug)]
pub(crate) enum Order {
    /// The VM shall run.
    Start(Answer),
    /// Says whether a stop would be carried out, and changes nothing.
    MayStop { only_standby: bool, answer: Answer },
    /// It shall not run. The process is told once more if it was told before: then the guest is not waited for.
    Stop { only_standby: bool, answer: Answer },
    /// The process shall end, because the host does. What is desired stays.
    Park(Answer),
    /// The host is drained: what does not run here, and is not about to, is not started.
    Hold(Answer),
    /// It may be started again after all.
    Unpark(Answer),
    /// Says when everything that was told before is done.
    Settle(Answer),
    /// A definition was read.
    Define(Box<Result<Definition, DefinitionError>>),
    /// The definition is gone.
    Undefine {
        /// An operator wants it forgotten, and what was desired with it.
        forget: bool,
    },
}

/// Where an order's answer goes: it says that the order is carried out from now on.
pub(crate) type Answer = Sender<Result<(), NodeError>>;

impl Keeper {
    pub(super) fn obey(&mut self, order: Order) {
        match order {
            Order::Start(answer) => {
                let said = self.shall_run();
                self.answer(&answer, said);
            }
            Order::MayStop { only_standby, answer } => {
                let said = self.may_stop(only_standby);
                self.answer(&answer, said);
            }
            Order::Stop { only_standby, answer } => {
                let said = self.shall_stop(only_standby);
                self.answer(&answer, said);
            }
            Order::Park(answer) => {
                self.parked = true;
                let said = self.end_process();
                self.answer(&answer, said);
            }
            Order::Settle(answer) => self.answer(&answer, Ok(())),
            Order::Hold(answer) => {
                self.held = self.process.is_none() && self.state().0 != State::Waiting;
                self.answer(&answer, Ok(()));
            }
            Order::Unpark(answer) => {
                (self.parked, self.held) = (false, false);
                self.answer(&answer, Ok(()));
            }
            Order::Define(read) => self.is_defined(*read),
            Order::Undefine { forget } => {
                self.source = None;
                if forget {
                    self.shared.records.remove(&self.name);
                    self.is_unkept = false;
                    // Should the file come back at once, nothing is left of what was desired.
                    if self.process.is_none() {
                        (self.record, self.is_new) = (Record::fresh(false), true);
                        self.plan.forgive();
                    }
                    self.forget_lock();
                }
            }
        }
    }

    /// Removes the file that a process of the VM would lock, unless one has it. Only this thread starts processes that do,
    /// so nobody waits for the file that is removed.
    fn forget_lock(&self) {
        let path = self.lock();
        let removed = lock(&path).and_then(|free| match free {
            Some(_held) => std::fs::remove_file(&path),
            None => Ok(()),
        });
        if let Err(error) = removed {
            tracing::warn!(vm = self.name, %error, "its lock's file stays");
        }
    }

    /// Whoever hears it finds what has become of the VM.
    fn answer(&self, answer: &Answer, said: Result<(), NodeError>) {
        self.show();
        // Nobody may listen any more.
        let _ = answer.send(said);
    }

    fn is_defined(&mut self, read: Result<Definition, DefinitionError>) {
        if let Err(why) = &read
            && !matches!(&self.source, Some(Err(known)) if known == why)
        {
            self.tell("definition_bad", why.to_string(), json!({}));
        }
        if let Ok(it) = &read
            && self.source.is_none()
            && self.is_new
        {
            self.record = Record::fresh(it.autostart);
        }
        self.source = Some(read);
        self.judge();
    }

    fn shall_run(&mut self) -> Result<(), NodeError> {
        match &self.source {
            Some(Err(why)) if self.process.is_none() => return Err(why.clone().into()),
            None => return Err(NodeError::NoDefinition(self.name.clone(), "its file is gone".into())),
            _ => {}
        }
        // Before anything is kept: what is refused must not be done later.
        if self.process.is_none()
            && self.finds_another()
            && let Some(pid) = self.foreign
        {
            return Err(NodeError::Foreign { vm: self.name.clone(), pid });
        }
        self.plan.forgive();
        (self.parked, self.held) = (false, false);
        self.record.untold = None;
        self.desire(Desired::Running, By::Operator)
    }

    /// Asks the process whether the VM runs here: what it said last may be a second old, and it may have taken the VM
    /// over since then.
    fn may_stop(&mut self, only_standby: bool) -> Result<(), NodeError> {
        let name = self.name.clone();
        let socket = self.socket();
        if self.process.is_none() && self.finds_another() {
            return Err(NodeError::Foreign { vm: name, pid: self.foreign.unwrap_or_default() });
        }
        let Some(process) = &mut self.process else { return Ok(()) };
        let fresh = ask(&socket).ok().filter(|told| process.is(told.pid));
        match (&fresh, only_standby) {
            (Some(told), true) if told.runs => return Err(NodeError::RunsHere(name)),
            (Some(told), true) if told.takes_over => return Err(NodeError::TakesOver(name)),
            (None, true) => return Err(NodeError::SaysNothing(name)),
            _ => {}
        }
        // One that stands still has said before what it is.
        match fresh.as_ref().or(self.told.as_ref()) {
            Some(told) if told.decides && !only_standby => return Err(NodeError::Undecided(name)),
            Some(told) if !told.runs && !only_standby => return Err(NodeError::IsStandby(name)),
            _ => {}
        }
        self.told = fresh.or(self.told.take());
        Ok(())
    }

    fn shall_stop(&mut self, only_standby: bool) -> Result<(), NodeError> {
        self.may_stop(only_standby)?;
        let before = self.record.clone();
        let stop = if only_standby { Stop::Standby } else { Stop::Vm };
        self.record.untold = self.process.is_some().then_some(stop);
        if let Err(why) = self.desire(Desired::Stopped, By::Operator) {
            self.record = before;
            return Err(why);
        }
        if self.process.is_none() {
            // What failed before is over.
            self.plan.forgive();
            return Ok(());
        }
        if !only_standby {
            return self.end_process();
        }
        // The disk may have taken long. A standby is ended by the same signal that presses the power button of a VM, so
        // the process is asked once more: what is left is the time from its answer to the signal, far below a
        // millisecond. One that loses its primary within it may take the VM over, and shuts the guest down.
        self.may_stop(true).and_then(|()| self.end_process()).inspect_err(|_| {
            self.record = before;
            self.keep_record();
        })
    }

    pub(super) fn end_process(&mut self) -> Result<(), NodeError> {
        self.identify();
        let Some(process) = &mut self.process else { return Ok(()) };
        // One that is not known yet is told as soon as it is.
        self.is_owed = process.pid().is_none();
        if self.is_owed {
            self.asked = true;
            return Ok(());
        }
        let ended = match process.terminate() {
            // It has ended meanwhile.
            Err(error) if is_gone(&error) => Ok(()),
            told => told.map_err(|error| NodeError::System("cannot end the VM's process".into(), error)),
        };
        // One that was told before is still told.
        self.asked |= ended.is_ok();
        if ended.is_ok() && self.record.untold.take().is_some() {
            // After the word: a node that dies before it has told nobody.
            self.keep_record();
        }
        ended
    }

    /// Ends a process that an earlier node was to end, and that it may not have told.
    pub(super) fn carry_out(&mut self) {
        let Some(stop) = self.record.untold else { return };
        match self.shall_stop(stop == Stop::Standby) {
            Ok(()) => {
                self.tell("stop_goes_on", "the stop that an earlier node began goes on".into(), json!({}))
            }
            // It is asked again when it is decided.
            Err(NodeError::Undecided(_) | NodeError::SaysNothing(_) | NodeError::TakesOver(_)) => {}
            Err(why) => {
                self.record.untold = None;
                self.record.desired = Desired::Running;
                self.keep_record();
                self.tell(
                    "stop_refused",
                    format!("the stop that an earlier node began is not done: {why}"),
                    json!({}),
                );
            }
        }
    }

    fn desire(&mut self, desired: Desired, by: By) -> Result<(), NodeError> {
        let record = Record { desired, by, ..self.record.clone() };
        self.shared
            .records
            .write(&self.name, &record)
            .map_err(|error| NodeError::System("cannot keep what is desired".into(), error))?;
        self.record = record;
        Ok(())
    }
}
