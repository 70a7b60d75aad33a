//! Maintenance: a host gives all of its VMs away and starts none.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::NodeError;
use crate::feed::Feed;
use crate::files::{self, replace};
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
    now: Mutex<Now>,
}

#[derive(Debug)]
struct Now {
    mode: Mode,
    /// What the disk has; `None`: nothing that can be read.
    kept: Option<Mode>,
    damage: Option<String>,
}

impl Modes {
    /// Reads what an earlier node has kept. A host whose mode cannot be read may be in its maintenance, so it counts as
    /// drained.
    pub(crate) fn open(file: PathBuf) -> Self {
        let (kept, damage) = match read(&file) {
            Ok(mode) => (Some(mode), None),
            Err(error) => {
                let file = file.display();
                let why = format!(
                    "{file} cannot be read, so this host counts as drained: `outlive node undrain` ends that ({error})"
                );
                tracing::error!("{why}");
                (None, Some(why))
            }
        };
        Self { file, now: Mutex::new(Now { mode: kept.unwrap_or(Mode::Drained), kept, damage }) }
    }

    /// The mode.
    pub(crate) fn get(&self) -> Mode {
        self.now().mode
    }

    /// Why it is not known what the host was before.
    pub(crate) fn damage(&self) -> Option<String> {
        self.now().damage.clone()
    }

    /// Changes it. What is only for a while, a drain or the end of the host, ends with the node: then the host is what it
    /// was before.
    ///
    /// # Errors
    /// The disk does not take it.
    pub(crate) fn set(&self, mode: Mode, feed: &Feed) -> Result<(), NodeError> {
        let mut now = self.now();
        if matches!(mode, Mode::Active | Mode::Drained) && now.kept != Some(mode) {
            // Plain data: this cannot fail.
            replace(&self.file, &serde_json::to_vec(&mode).expect("a mode is plain data"))
                .map_err(|error| NodeError::System("cannot keep the mode of the host".into(), error))?;
            (now.kept, now.damage) = (Some(mode), None);
        }
        change(&mut now, mode, feed);
        Ok(())
    }

    /// Goes back after something has failed. If the disk does not take it, it is so until the node ends.
    fn back_to(&self, mode: Mode, feed: &Feed) {
        if let Err(why) = self.set(mode, feed) {
            tracing::error!("this host is {} until its node ends: {why}", mode.name());
            change(&mut self.now(), mode, feed);
        }
    }

    fn now(&self) -> MutexGuard<'_, Now> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn change(now: &mut Now, mode: Mode, feed: &Feed) {
    if now.mode != mode {
        now.mode = mode;
        let name = mode.name();
        feed.tell("node_mode", None, format!("this host is {name}"), json!({ "mode": mode }));
    }
}

/// What the disk has of the mode; nothing is a host that was never drained.
fn read(file: &Path) -> io::Result<Mode> {
    let mut bytes = Vec::new();
    match files::open(file) {
        Ok(file) => file.take(100).read_to_end(&mut bytes)?,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Mode::Active),
        Err(error) => return Err(error),
    };
    Ok(serde_json::from_slice(&bytes)?)
}

/// Gives all VMs away. If one does not go, those that went stay where they are, and the host is active again.
pub(crate) fn drain(node: &Node, stop: bool, wait: Duration, work: &Work) -> Result<Value, NodeError> {
    let before = node.modes.get();
    node.modes.set(Mode::Draining, node.feed())?;
    if stop {
        let stopped = stop_all(node, wait, work);
        // One that was cancelled before anything was shut down.
        if node.modes.get() == Mode::Draining {
            node.modes.back_to(before, node.feed());
        }
        return stopped;
    }
    let drained = move_all(node, wait, work).and_then(|done| {
        // What does not run by now does not begin to.
        node.tell_all(None, Order::Hold)?;
        node.modes.set(Mode::Drained, node.feed())?;
        Ok(done)
    });
    if drained.is_err() {
        node.modes.back_to(Mode::Active, node.feed());
        node.tell_all(None, Order::Unpark)?;
    }
    drained
}

/// The VMs that run here.
fn here(node: &Node) -> Vec<View> {
    node.list().into_iter().filter(|it| matches!(it.state, State::Running | State::Stopping)).collect()
}

/// Waits for VMs of which it is not certain yet whether they will run here, but for those that have just left.
fn settle(node: &Node, left: &[Value], wait: Duration, work: &Work) -> Result<(), NodeError> {
    let is_open = |vm: &View| matches!(vm.state, State::Starting | State::Deciding | State::Waiting);
    let has_left = |vm: &View| left.iter().any(|it| it["vm"] == *vm.name);
    for vm in node.list().into_iter().filter(|vm| is_open(vm) && !has_left(vm)) {
        let name = &vm.name;
        if vm.state == State::Waiting && !vm.has_standby {
            return Err(NodeError::Said(format!(
                "VM {name} is about to be started again and has no standby, so it cannot leave this host: stop it first"
            )));
        }
        work.at(0, 1, &format!("it is not certain yet whether VM {name} will run here"));
        unless_gone(node.wait(name, wait, "the decision whether it runs here", |vm| {
            work.goes_on()?;
            Ok((!is_open(vm)).then_some(()))
        }))?;
    }
    Ok(())
}

/// A VM that is not there any more has left in its own way.
fn unless_gone<T>(waited: Result<T, NodeError>) -> Result<Option<T>, NodeError> {
    match waited {
        Err(NodeError::NoSuchVm(_)) => Ok(None),
        waited => waited.map(Some),
    }
}

/// How often the host is looked at anew after VMs were moved.
const ROUNDS: u32 = 3;

fn move_all(node: &Node, wait: Duration, work: &Work) -> Result<Value, NodeError> {
    let began = Instant::now();
    let mut moved = Vec::new();
    for _ in 0..ROUNDS {
        settle(node, &moved, wait, work)?;
        let all = here(node);
        if all.is_empty() {
            return Ok(json!({ "took_ms": began.elapsed().as_millis() as u64, "moved": moved }));
        }
        move_these(node, &all, &mut moved, wait, work)?;
    }
    let names: Vec<_> = here(node).into_iter().map(|it| it.name).collect();
    if names.is_empty() {
        return Ok(json!({ "took_ms": began.elapsed().as_millis() as u64, "moved": moved }));
    }
    let names = names.join(", ");
    Err(NodeError::Said(format!(
        "{names}: still here, or here again, after all VMs were moved, and this host is active again; `outlive vm list` says more"
    )))
}

fn move_these(
    node: &Node,
    all: &[View],
    moved: &mut Vec<Value>,
    wait: Duration,
    work: &Work,
) -> Result<(), NodeError> {
    // Nothing is moved if it is known that not everything can be.
    for vm in all {
        if !vm.has_standby && !vm.protected {
            let name = &vm.name;
            return Err(NodeError::Said(format!(
                "VM {name} has no standby, so it cannot leave this host, and no VM was moved: stop it first, or give \
                 its definition listen, standby and arbiter"
            )));
        }
    }
    let total = moved.len() + all.len();
    for vm in all {
        let name = &vm.name;
        work.at(moved.len(), total, &format!("VM {name} moves to its standby"));
        match move_one(node, name, wait, work) {
            Ok(None) => {}
            Ok(Some(took)) => moved.push(json!({ "vm": name, "took_ms": took })),
            Err(NodeError::Cancelled) => return Err(NodeError::Cancelled),
            Err(why) => {
                let count = moved.len();
                let why = format!(
                    "VM {name} stays here, {count} of {total} VMs were moved, and this host is active again: {why}"
                );
                return Err(NodeError::Failed { vm: name.clone(), why });
            }
        }
    }
    Ok(())
}

/// Returns how long it took, or nothing if the VM has ended or gone by itself.
fn move_one(node: &Node, name: &str, wait: Duration, work: &Work) -> Result<Option<u64>, NodeError> {
    let runs = unless_gone(node.wait(name, wait, "its protection, or its end", |vm| {
        work.goes_on()?;
        let runs = vm.state == State::Running;
        Ok((vm.state != State::Stopping && (!runs || vm.protected)).then_some(runs))
    }))?;
    if runs != Some(true) {
        return Ok(None);
    }
    let done = node.hand_over(name)?;
    // The process says that it waits, or ends, a little later.
    unless_gone(node.wait(name, Duration::from_secs(30), "the end of its run here", |vm| {
        Ok((vm.state != State::Running).then_some(()))
    }))?;
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
    // From here on nothing can be taken back. A host that was drained is so when it is back. A VM that was begun meanwhile
    // ends, too.
    let mut wrong = node.tell_all(Some(Mode::Stopping), Order::Park)?;
    let mut names: BTreeSet<_> = all.into_iter().map(|it| it.name).collect();
    names.extend(node.list().into_iter().filter(|it| it.state.is_kept()).map(|it| it.name));
    let ends = Instant::now();
    for name in names {
        let left = ENDS.saturating_sub(ends.elapsed());
        let ended =
            node.wait(&name, left, "the end of its process", |vm| Ok((!vm.state.is_kept()).then_some(())));
        match unless_gone(ended) {
            Ok(_) => stopped.push(name),
            Err(why) => wrong.push((name, why)),
        }
    }
    wrong.retain(|(name, _)| !stopped.contains(name));
    if wrong.is_empty() {
        return Ok(
            json!({ "took_ms": began.elapsed().as_millis() as u64, "moved": moved, "stopped": stopped }),
        );
    }
    let whys: Vec<_> = wrong.iter().map(|(name, why)| format!("VM {name}: {why}")).collect();
    Err(NodeError::Said(format!(
        "not every VM has ended, and this host is about to stop ({}); `outlive node undrain` takes that back, if the host stays",
        whys.join("; ")
    )))
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

    #[test]
    fn a_damaged_mode_is_a_drained_host_and_a_full_disk_no_half_drain() {
        let folder = tempfile::tempdir().unwrap();
        let (file, feed) = (folder.path().join("mode.json"), Feed::new());
        let open = || Modes::open(file.clone());
        for damage in ["", "\"dra", "\"stopping\"x"] {
            std::fs::write(&file, damage).unwrap();
            let modes = open();
            assert_eq!(modes.get(), Mode::Drained, "{damage}");
            assert!(modes.damage().unwrap().contains("`outlive node undrain`"));
        }
        let modes = open();
        modes.set(Mode::Active, &feed).unwrap();
        assert_eq!((modes.damage(), open().damage(), open().get()), (None, None, Mode::Active));
        // Nothing can be put in the place of a directory.
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir_all(file.join("x")).unwrap();
        modes.set(Mode::Draining, &feed).unwrap();
        modes.set(Mode::Drained, &feed).unwrap_err();
        modes.back_to(Mode::Active, &feed);
        assert_eq!(modes.get(), Mode::Active);
    }
}
