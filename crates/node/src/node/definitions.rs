//! The definitions of a node: read, changed, and kept by threads.

use std::io;
use std::sync::mpsc::channel;
use std::sync::{MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::json;

use super::{ANSWERS, Node, STEP, answered};
use crate::definition::{self, DefinitionError, conflict, is_name};
use crate::drain::Mode;
use crate::error::NodeError;
use crate::keeper::{Answer, Kept, Order, Source};
use crate::records::Desired;
use crate::view::{State, View};

/// How often the definitions are looked at.
const LOOKS: Duration = Duration::from_secs(1);
/// How long a keeper may take to end. It may be asking a process.
const ENDS: Duration = Duration::from_secs(5);
/// The most VMs that a host may have.
const MOST: usize = 1000;

impl Node {
    /// Takes a definition, new or changed. A process that runs keeps what it was started with. Returns the VM, and whether
    /// anything has changed.
    ///
    /// # Errors
    /// See [`NodeError`]; then nothing has changed. It names no file: the text is in none of the node's.
    pub(crate) fn define(&self, name: &str, text: &str) -> Result<(View, bool), NodeError> {
        if !is_name(name) {
            return Err(NodeError::BadName(name.to_owned()));
        }
        if text.len() > definition::LONGEST {
            return Err(NodeError::BadRequest(format!(
                "a definition has at most {} bytes",
                definition::LONGEST
            )));
        }
        let parsed = self.folder.parse(name, text, &self.shared.program);
        let definition = parsed.map_err(DefinitionError::of_text)?;
        // Two that are defined at a time see each other.
        let _one = self.defining();
        let others = self.folder.read(&self.shared.program).map_err(|error| self.no_folder(error))?;
        if let Some(conflict) = conflict(&definition, others.values().flatten()) {
            return Err(conflict.of_text().into());
        }
        let known = self.folder.has(name, text) && self.vms().get(name).is_some_and(|it| !it.is_over());
        if known {
            return Ok((self.get(name)?, false));
        }
        if !self.has_room_for(name) {
            return Err(NodeError::BadRequest(format!("a host has at most {MOST} VMs")));
        }
        self.folder.write(name, text).map_err(|error| self.no_folder(error))?;
        self.keep(name, Some(Ok(definition)));
        self.order(name, Order::Settle)?;
        self.feed().tell("vm_defined", Some(name), "the VM is defined".into(), json!({}));
        Ok((self.get(name)?, true))
    }

    /// Removes a definition.
    ///
    /// # Errors
    /// See [`NodeError`]; then nothing has changed.
    pub(crate) fn undefine(&self, name: &str) -> Result<(), NodeError> {
        let _one = self.defining();
        let view = self.get(name)?;
        // A process of somebody else needs no definition.
        if view.state.is_kept() || view.desired == Desired::Running && view.state != State::Misdefined {
            return Err(NodeError::HasProcess(name.to_owned()));
        }
        self.folder.remove(name).map_err(|error| self.no_folder(error))?;
        if let Some(vm) = self.vms().get(name) {
            vm.tell(Order::Undefine { forget: true });
        }
        // Its keeper ends, and nobody sees a VM without a definition meanwhile.
        let began = Instant::now();
        while began.elapsed() < ENDS && self.vms().get(name).is_some_and(|it| !it.is_over()) {
            thread::sleep(STEP);
        }
        self.forget_ended();
        self.feed().tell("vm_undefined", Some(name), "the VM's definition is removed".into(), json!({}));
        Ok(())
    }

    fn no_folder(&self, error: io::Error) -> NodeError {
        NodeError::System(format!("cannot use {}", self.shared.places.definitions.display()), error)
    }

    /// Processes whose definition has gone are kept, too, until they end.
    pub(super) fn adopt_undefined(&self) {
        let _one = self.defining();
        for name in self.shared.records.names().unwrap_or_default() {
            if !self.vms().contains_key(&name) {
                self.keep(&name, None);
            }
        }
    }

    pub(super) fn read_definitions(&self) {
        let _one = self.defining();
        let read = match self.folder.read(&self.shared.program) {
            Ok(read) => read,
            Err(error) => {
                tracing::error!(%error, "the definitions cannot be read; those that are known count");
                return;
            }
        };
        self.forget_ended();
        for (_, vm) in self.vms().iter().filter(|(name, _)| !read.contains_key(*name)) {
            vm.tell(Order::Undefine { forget: false });
        }
        for (name, read) in read {
            if let Err(why) = &read
                && !is_name(&name)
            {
                tracing::error!("{why}");
            } else if self.has_room_for(&name) {
                self.keep(&name, Some(read));
            } else {
                tracing::error!(vm = name, "a host has at most {MOST} VMs: this one is left out");
            }
        }
    }

    /// Only who is [`defining`](Self::defining) may call it: a new keeper looks at the disk, and nobody waits for that who
    /// only wants to know.
    fn keep(&self, name: &str, source: Source) {
        if let (Some(vm), Some(read)) = (self.vms().get(name), &source)
            && vm.tell(Order::Define(Box::new(read.clone())))
        {
            return;
        }
        match Kept::start(name, source, self.modes.get(), self.shared.clone()) {
            Ok(kept) => drop(self.vms().insert(name.to_owned(), kept)),
            Err(error) => tracing::error!(vm = name, %error, "the VM is not kept: there is no thread for it"),
        }
    }

    /// Changes the mode of the host, unless it is to stay, and tells every VM, also one that is being defined. Returns what
    /// went wrong, VM by VM.
    ///
    /// # Errors
    /// The disk does not take the mode; then nobody was told.
    pub(crate) fn tell_all(
        &self,
        mode: Option<Mode>,
        order: impl Fn(Answer) -> Order,
    ) -> Result<Vec<(String, NodeError)>, NodeError> {
        let one = self.defining();
        mode.map_or(Ok(()), |mode| self.modes.set(mode, self.feed()))?;
        let mut told = Vec::new();
        for (name, vm) in self.vms().iter() {
            let (answer, heard) = channel();
            // One that is over does nothing any more.
            if vm.tell(order(answer)) {
                told.push((name.clone(), heard));
            }
        }
        drop(one);
        let until = Instant::now() + ANSWERS;
        let heard = told.into_iter().map(|(name, heard)| {
            let left = until.saturating_duration_since(Instant::now());
            let said = answered(&name, heard.recv_timeout(left));
            (name, said)
        });
        let wrong = heard.filter_map(|(name, said)| match said {
            Ok(()) | Err(NodeError::NoSuchVm(_)) => None,
            Err(why) => Some((name, why)),
        });
        Ok(wrong.collect())
    }

    fn has_room_for(&self, name: &str) -> bool {
        let vms = self.vms();
        vms.contains_key(name) || vms.len() < MOST
    }

    fn forget_ended(&self) {
        self.vms().retain(|_, vm| !vm.is_over());
    }

    /// Who has it changes which VMs there are, one at a time, and may wait for the disk meanwhile.
    fn defining(&self) -> MutexGuard<'_, ()> {
        self.defining.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Reads the definitions again when one of them has changed.
pub(super) fn watch(node: &Weak<Node>, mut seen: Option<definition::Seen>) {
    loop {
        thread::sleep(LOOKS);
        let Some(node) = node.upgrade() else { return };
        let now = node.folder.seen().ok();
        if now != seen && now.is_some() {
            node.read_definitions();
            seen = now;
        }
        node.forget_ended();
    }
}
