//! Maintenance: a host gives all of its VMs away and starts none.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::NodeError;
use crate::feed::Feed;
use crate::files::replace;
use crate::jobs::Work;
use crate::keeper::Order;
use crate::node::Node;
use crate::view::{State, View};

/// How long the processes may take to end when the host stops.
const ENDS: Duration = Duration::from_secs(170);

/// Whether a host takes VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// It does.
    Active,
    /// It gives them away.
    Draining,
    /// It has given them away.
    Drained,
    /// It has given them away, or shut them down, and is about to stop.
    Stopping,
}

impl Mode {
    /// For people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Draining => "draining",
            Self::Drained => "drained",
            Self::Stopping => "stopping",
        }
    }
}

/// The mode of this host, also after its node has ended.
#[derive(Debug)]
pub(crate) struct Modes {
    file: PathBuf,
    mode: Mutex<Mode>,
}

impl Modes {
    /// Reads what an earlier node has kept.
    pub(crate) fn open(file: PathBuf) -> Self {
        let kept = std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let mode = if kept == Some(Mode::Drained) { Mode::Drained } else { Mode::Active };
        Self { file, mode: Mutex::new(mode) }
    }

    /// The mode.
    pub(crate) fn get(&self) -> Mode {
        *self.mode.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes it. What is only for a while, a drain or the end of the host, ends with the node: then the host is what it
    /// was before.
    ///
    /// # Errors
    /// The disk does not take it.
    pub(crate) fn set(&self, mode: Mode, feed: &Feed) -> Result<(), NodeError> {
        let mut now = self.mode.lock().unwrap_or_else(PoisonError::into_inner);
        if *now == mode {
            return Ok(());
        }
        if matches!(mode, Mode::Active | Mode::Drained) {
            // Plain data: this cannot fail.
            replace(&self.file, &serde_json::to_vec(&mode).expect("a mode is plain data"))
                .map_err(|error| NodeError::System("cannot keep the mode of the host".into(), error))?;
        }
        *now = mode;
        let name = mode.name();
        feed.tell("node_mode", None, format!("this host is {name}"), json!({ "mode": mode }));
        Ok(())
    }
}

/// Gives all VMs away. If one does not go, those that went stay where they are, and the host is active again.
pub(crate) fn drain(node: &Node, stop: bool, wait: Duration, work: &Work) -> Result<Value, NodeError> {
    let before = node.modes.get();
    node.modes.set(Mode::Draining, node.feed())?;
    if !stop {
        let drained = move_all(node, wait, work);
        node.modes.set(if drained.is_ok() { Mode::Drained } else { Mode::Active }, node.feed())?;
        return drained;
    }
    let stopped = stop_all(node, wait, work);
    // One that was cancelled before anything was shut down.
    if node.modes.get() == Mode::Draining {
        node.modes.set(before, node.feed())?;
    }
    stopped
}

/// The VMs that run here.
fn here(node: &Node) -> Vec<View> {
    node.list().into_iter().filter(|it| matches!(it.state, State::Running | State::Stopping)).collect()
}

/// Waits for VMs of which it is not certain yet whether they will run here.
fn settle(node: &Node, wait: Duration, work: &Work) -> Result<(), NodeError> {
    let is_open = |vm: &View| vm.has_process && matches!(vm.state, State::Starting | State::Deciding);
    for vm in node.list().into_iter().filter(is_open) {
        work.at(0, 1, &format!("it is not certain yet whether VM {} will run here", vm.name));
        node.wait(&vm.name, wait, "the decision whether it runs here", |vm| {
            work.goes_on()?;
            Ok((!is_open(vm)).then_some(()))
        })?;
    }
    Ok(())
}

fn move_all(node: &Node, wait: Duration, work: &Work) -> Result<Value, NodeError> {
    let began = Instant::now();
    settle(node, wait, work)?;
    let all = here(node);
    // Nothing is moved if it is known that not everything can be.
    for vm in &all {
        if !vm.has_standby && !vm.protected {
            let name = &vm.name;
            return Err(NodeError::Said(format!(
                "VM {name} has no standby, so it cannot leave this host, and no VM was moved: stop it first, or give \
                 its definition listen, standby and arbiter"
            )));
        }
    }
    let mut moved = Vec::new();
    for (number, vm) in all.iter().enumerate() {
        let name = &vm.name;
        work.at(number, all.len(), &format!("VM {name} moves to its standby"));
        match move_one(node, name, wait, work) {
            Ok(None) => {}
            Ok(Some(took)) => moved.push(json!({ "vm": name, "took_ms": took })),
            Err(NodeError::Cancelled) => return Err(NodeError::Cancelled),
            Err(why) => {
                let (count, total) = (moved.len(), all.len());
                let why = format!(
                    "VM {name} stays here, {count} of {total} VMs were moved, and this host is active again: {why}"
                );
                return Err(NodeError::Failed { vm: name.clone(), why });
            }
        }
    }
    Ok(json!({ "took_ms": began.elapsed().as_millis() as u64, "moved": moved }))
}

/// Returns how long it took, or nothing if the VM has ended or gone by itself.
fn move_one(node: &Node, name: &str, wait: Duration, work: &Work) -> Result<Option<u64>, NodeError> {
    let runs = node.wait(name, wait, "its protection", |vm| {
        work.goes_on()?;
        let runs = vm.state == State::Running;
        Ok((!runs || vm.protected).then_some(runs))
    })?;
    if !runs {
        return Ok(None);
    }
    let done = node.hand_over(name)?;
    // The process says that it waits, or ends, a little later.
    node.wait(name, Duration::from_secs(30), "the end of its run here", |vm| {
        Ok((vm.state != State::Running).then_some(()))
    })?;
    Ok(done["took_ms"].as_u64())
}

/// For the end of the host: what can be moved is moved, and every process ends in order. What is desired stays.
fn stop_all(node: &Node, wait: Duration, work: &Work) -> Result<Value, NodeError> {
    let began = Instant::now();
    let all: Vec<_> = node.list().into_iter().filter(|it| it.state.is_kept()).collect();
    let (mut moved, mut stopped) = (Vec::new(), Vec::new());
    for (number, vm) in all.iter().enumerate() {
        let name = &vm.name;
        work.at(number, all.len(), &format!("VM {name} leaves this host"));
        if vm.state == State::Running && (vm.has_standby || vm.protected) {
            match move_one(node, name, wait, work) {
                Ok(Some(took)) => moved.push(json!({ "vm": name, "took_ms": took })),
                Ok(None) => {}
                Err(NodeError::Cancelled) => return Err(NodeError::Cancelled),
                Err(why) => tracing::warn!(vm = name, "the VM is shut down and not moved: {why}"),
            }
        }
    }
    // From here on nothing can be taken back. A host that was drained is so when it is back.
    node.modes.set(Mode::Stopping, node.feed())?;
    for vm in node.list() {
        node.order(&vm.name, Order::Park)?;
    }
    let left = |began: Instant| ENDS.saturating_sub(began.elapsed());
    let ends = Instant::now();
    for vm in &all {
        node.wait(&vm.name, left(ends), "the end of its process", |vm| {
            Ok((!vm.state.is_kept()).then_some(()))
        })?;
        stopped.push(vm.name.clone());
    }
    Ok(json!({ "took_ms": began.elapsed().as_millis() as u64, "moved": moved, "stopped": stopped }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maintenance_outlives_the_node_and_a_drain_does_not() {
        let folder = tempfile::tempdir().unwrap();
        let (file, feed) = (folder.path().join("mode.json"), Feed::new());
        let open = || Modes::open(file.clone());
        assert_eq!(open().get(), Mode::Active);
        open().set(Mode::Draining, &feed).unwrap();
        assert_eq!(open().get(), Mode::Active);
        open().set(Mode::Drained, &feed).unwrap();
        assert_eq!(open().get(), Mode::Drained);
        // The host is started anew in its maintenance.
        let modes = open();
        modes.set(Mode::Draining, &feed).unwrap();
        modes.set(Mode::Stopping, &feed).unwrap();
        assert_eq!((modes.get(), open().get()), (Mode::Stopping, Mode::Drained));
        open().set(Mode::Active, &feed).unwrap();
        assert_eq!(open().get(), Mode::Active);
    }
}
