//! What an operator has done with a VM, or with all of them: each is a job.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Node, NodeView};
use crate::drain::{self, Mode};
use crate::ended::End;
use crate::error::NodeError;
use crate::jobs::{Job, Kind, Work};
use crate::keeper::Order;
use crate::short::{Hears, run};
use crate::view::{State, View};

/// How long a process may take until it says something. It may wait for its arbiter before that, and say so.
const STARTS: Duration = Duration::from_secs(60);
/// How long it may take to decide which host starts the VM. The other host may be about to take it over.
const DECIDES: Duration = Duration::from_secs(180);
/// How long the end of a VM may take: as long as a guest may be given (`--stop-within`), and some more.
const STOPS: Duration = Duration::from_secs(3700);
/// How long `outlive hand-over` may take. It gives up long before.
const HANDS_OVER: Duration = Duration::from_secs(60);

impl Node {
    /// Starts a VM. The job ends when its process says what it does.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub(crate) fn begin_start(self: &Arc<Self>, name: &str) -> Result<Job, NodeError> {
        self.takes_vms()?;
        let view = self.get(name)?;
        if let Some(why) = view.definition_error.filter(|_| !view.has_process) {
            return Err(NodeError::NoDefinition(name.to_owned(), why));
        }
        let (node, name) = (self.clone(), name.to_owned());
        self.jobs.begin((Kind::Start, Some(&name.clone())), false, move |work| node.start_vm(&name, work))
    }

    fn takes_vms(&self) -> Result<(), NodeError> {
        match self.modes.get() {
            Mode::Active => Ok(()),
            Mode::Stopping => Err(NodeError::Stopping),
            Mode::Draining | Mode::Drained => Err(NodeError::Drained),
        }
    }

    fn start_vm(&self, name: &str, work: &Work) -> Result<Value, NodeError> {
        let began = Instant::now();
        // No drain begins beside this job, and one may have ended before it.
        self.takes_vms()?;
        let before = self.get(name)?.last_end;
        self.order(name, Order::Start)?;
        work.at(0, 1, "the process starts");
        self.wait(name, STARTS, "the process's first word", |view| {
            goes_on(view, before.as_ref())?;
            Ok(view.status.as_ref().map(drop))
        })?;
        self.wait(name, DECIDES, "the decision which host starts the VM", |view| {
            goes_on(view, before.as_ref())?;
            if matches!(view.state, State::Running | State::Standby) {
                let took = began.elapsed().as_millis() as u64;
                return Ok(Some(json!({ "took_ms": took, "state": view.state, "pid": view.pid })));
            }
            if let Some(why) = &view.why {
                work.at(0, 1, why);
            }
            Ok(None)
        })
    }

    /// Stops a VM: presses its power button. `only_standby`: ends its protection by this host instead. `now`: the
    /// guest is not waited for. It may wait for the VM's process.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub(crate) fn begin_stop(
        self: &Arc<Self>,
        name: &str,
        only_standby: bool,
        now: bool,
    ) -> Result<Job, NodeError> {
        // Said at once, and looked at once more when it is done.
        self.order(name, |answer| Order::MayStop { only_standby, answer })?;
        let (node, name) = (self.clone(), name.to_owned());
        self.jobs.begin((Kind::Stop, Some(&name.clone())), false, move |work| {
            node.stop_vm(&name, only_standby, now, work)
        })
    }

    fn stop_vm(&self, name: &str, only_standby: bool, now: bool, work: &Work) -> Result<Value, NodeError> {
        let began = Instant::now();
        let before = self.get(name)?.last_end;
        let stop = |answer| Order::Stop { only_standby, answer };
        self.order(name, stop)?;
        if now && !only_standby {
            // A second word means that the guest is not waited for.
            self.order(name, stop)?;
        }
        work.at(0, 1, if now || only_standby { "the process ends" } else { "the guest shuts down" });
        self.wait(name, STOPS, "the end of the process", |view| {
            if view.state.is_kept() {
                return Ok(None);
            }
            let said = if only_standby {
                format!("this host is not the standby of VM {name} any more")
            } else {
                format!("VM {name} is stopped")
            };
            // An earlier end has nothing to do with this.
            let end = view.last_end.as_ref().filter(|it| Some(*it) != before.as_ref());
            let took = began.elapsed().as_millis() as u64;
            Ok(Some(json!({ "took_ms": took, "said": said, "end": end.map(|it| &it.what) })))
        })
    }

    /// Moves a VM to its standby.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub(crate) fn begin_hand_over(self: &Arc<Self>, name: &str) -> Result<Job, NodeError> {
        let view = self.get(name)?;
        match view.state {
            State::Running | State::Foreign => {}
            State::Standby => return Err(NodeError::IsStandby(name.to_owned())),
            _ => return Err(NodeError::NotRunning(name.to_owned())),
        }
        let (node, name) = (self.clone(), name.to_owned());
        self.jobs.begin((Kind::HandOver, Some(&name.clone())), false, move |work| {
            work.at(0, 1, "the VM moves to its standby");
            node.hand_over(&name)
        })
    }

    /// Moves a VM to its standby, as `outlive hand-over` does.
    ///
    /// # Errors
    /// The command's words.
    pub(crate) fn hand_over(&self, name: &str) -> Result<Value, NodeError> {
        let began = Instant::now();
        let socket = self.shared.places.socket_of(name);
        let mut command = Command::new(&self.shared.program.path);
        command.arg("hand-over").arg("--socket").arg(socket);
        let (ended, said) = run(command, Hears::Everything, HANDS_OVER)
            .map_err(|error| NodeError::System("cannot run outlive hand-over".into(), error))?;
        let said = said.trim().strip_prefix("outlive: ").unwrap_or(said.trim()).to_owned();
        let took = began.elapsed().as_millis() as u64;
        match ended {
            Some(true) => Ok(json!({ "took_ms": took, "said": said })),
            Some(false) => Err(NodeError::Failed { vm: name.to_owned(), why: said }),
            None => Err(NodeError::TooLong {
                vm: name.to_owned(),
                what: "the answer to the hand-over".into(),
                secs: HANDS_OVER.as_secs(),
            }),
        }
    }

    /// Moves all VMs that run here to their standbys, one after another, and starts none from then on. `stop`: the
    /// host is about to stop, so what cannot be moved is stopped, and so is every standby.
    ///
    /// # Errors
    /// See [`NodeError`].
    pub(crate) fn begin_drain(self: &Arc<Self>, stop: bool, wait: Duration) -> Result<Job, NodeError> {
        let node = self.clone();
        self.jobs.begin((Kind::Drain, None), true, move |work| drain::drain(&node, stop, wait, work))
    }

    /// Ends the maintenance. VMs stay where they are.
    ///
    /// # Errors
    /// A job is under way, or the disk does not take it.
    pub(crate) fn undrain(&self) -> Result<NodeView, NodeError> {
        let running = self.jobs.list().into_iter().find(|it| it.kind == Kind::Drain && it.ended.is_none());
        if let Some(Job { id: job, .. }) = running {
            return Err(NodeError::Busy { what: "this host".into(), job });
        }
        for (vm, why) in self.tell_all(Some(Mode::Active), Order::Unpark)? {
            tracing::warn!(vm, "the VM may not hear yet that the maintenance is over: {why}");
        }
        Ok(self.view())
    }
}

/// Whether a VM that is being started may still come to something. `before`: how its last process had ended.
fn goes_on(view: &View, before: Option<&End>) -> Result<(), NodeError> {
    let vm = view.name.clone();
    match &view.last_end {
        _ if view.state == State::Foreign => {
            Err(NodeError::Foreign { vm, pid: view.pid.unwrap_or_default() })
        }
        // It is not tried again.
        Some(end) if Some(end) != before && !view.state.is_kept() && view.state != State::Waiting => {
            Err(NodeError::Failed { vm, why: end.what.clone() })
        }
        Some(end) if Some(end) != before => Err(NodeError::NotStarted { vm, why: end.what.clone() }),
        _ => Ok(()),
    }
}
