//! What a process that runs a VM, or waits for one, cannot do any more once it has begun.
//!
//! ```text
//! descriptors.rs  what was left open is closed
//! steward/        a small process keeps the rights, and does what needs them later
//! privileges.rs   no capability, no new privileges, another user
//! run.rs          mounts of its own: of /run, what this process needs
//! state.rs        of what the node notes down, nothing but the place of its events
//! places.rs       Landlock: the files that the command line names, and a few more
//! secrets.rs      what no rule may reach
//! roles.rs        seccomp: the system calls of each thread
//! plan.rs         all of it from the command line
//! ```
//!
//! Everything happens in this order, before a second thread exists and before the guest, a peer or an image is looked at. So
//! whatever a takeover does later was possible at the start, too: a place that is out of reach is reported then.
//! docs/sandbox.md says what it is for and what it cannot do.

mod descriptors;
mod places;
mod plan;
mod privileges;
mod roles;
mod run;
mod secrets;
mod state;
mod steward;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use clap::ValueEnum;
use landlock::RulesetError;
use rustix::thread::CapabilitySet;
use seccompiler::{BackendError, BpfProgram, SeccompAction, apply_filter};

pub(crate) use places::{Foreign, foreign, was_made};
use places::{Lack, NotOurs, Places};
pub(crate) use plan::Plan;
pub(crate) use privileges::{PrivilegeError, find_user};
use roles::Role;
use run::{NotHidden, Own};
use secrets::Exposed;
use state::{InReach, States};
pub(crate) use steward::{Ending, Pending, Steward, StewardError, command};

use crate::keys;

/// Whether a process is confined.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Mode {
    /// It is
    On,
    /// It is, but system calls that are not allowed are made and logged by the kernel
    Log,
    /// It is not
    Off,
}

impl Mode {
    /// As an argument.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::On => "on",
            Self::Log => "log",
            Self::Off => "off",
        }
    }
}

/// Why a process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SandboxError {
    /// It keeps rights.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// Nobody would have the rights that are needed later.
    #[error(transparent)]
    Steward(#[from] StewardError),
    /// A place is somebody else's.
    #[error(transparent)]
    NotOurs(#[from] NotOurs),
    /// A place has too much.
    #[error(transparent)]
    Exposed(#[from] Exposed),
    /// A place has what is the node's.
    #[error(transparent)]
    InReach(#[from] InReach),
    /// Landlock.
    #[error("cannot confine this process to its files (Landlock): {0}; --sandbox off does without")]
    Places(#[from] RulesetError),
    /// A filter that is none.
    #[error("a filter of system calls is wrong: {0}")]
    Filter(#[from] BackendError),
    /// Seccomp.
    #[error("cannot filter system calls ({0}): use a kernel with CONFIG_SECCOMP_FILTER, or --sandbox off")]
    Seccomp(#[from] seccompiler::Error),
}

static STEWARD: OnceLock<Steward> = OnceLock::new();
static FILTERS: OnceLock<BTreeMap<Role, BpfProgram>> = OnceLock::new();
static IS_ON: OnceLock<bool> = OnceLock::new();
/// Why a process that stays root can reach the sockets of others.
static IN_REACH: OnceLock<String> = OnceLock::new();

/// The keys that an escape from the guest would have, where that matters.
static EXPOSED_KEYS: OnceLock<PathBuf> = OnceLock::new();

/// Who has the rights that this process has given up; `None` if it has them itself.
pub(crate) fn steward() -> Option<&'static Steward> {
    STEWARD.get()
}

/// Whether this process is confined.
pub(crate) fn is_on() -> bool {
    IS_ON.get().copied().unwrap_or(false)
}

/// Closes what this process was left with. Call it first.
pub(crate) fn close_inherited() {
    descriptors::close_inherited();
}

/// Confines this process. Call it while there is one thread.
///
/// # Errors
/// See [`SandboxError`]. The process may have given up some of its rights by then.
pub(crate) fn enter(plan: &Plan) -> Result<(), SandboxError> {
    let otherwise = match plan.mode {
        Mode::Off => return Ok(()),
        Mode::Log => {
            tracing::warn!(
                "SANDBOX INCOMPLETE (--sandbox log): system calls that are not allowed are made, and logged by the kernel"
            );
            SeccompAction::Log
        }
        Mode::On => SeccompAction::KillProcess,
    };
    learn_about_memory();
    crate::notify::reach_manager();
    let steward = Steward::start(&plan.charter)?;
    let denied = plan.places.denied();
    let states = States::find();
    let not_hidden = hide(&plan.places, &states).err();
    let may_lock = privileges::raise_limits();
    // Root of a container may lack the right to raise a limit, and have the one to lock memory.
    let locks = plan.lock_memory && !may_lock;
    let kept = if locks { CapabilitySet::IPC_LOCK } else { CapabilitySet::empty() };
    privileges::drop_all(plan.user.as_ref(), kept)?;
    plan.places.check(&denied)?;
    plan.places.check_secrets()?;
    plan.places.check_states(&states, not_hidden.as_ref())?;
    confine_to(&plan.places)?;
    filter(&otherwise)?;
    let _ = STEWARD.set(steward);
    let _ = IS_ON.set(plan.mode == Mode::On);
    if let Some(keys) = &plan.exposed_keys {
        let _ = EXPOSED_KEYS.set(keys.clone());
    }
    Ok(())
}

/// Hides the sockets of other programs, and what the node notes down.
///
/// # Errors
/// The latter is not hidden.
fn hide(places: &Places, states: &States) -> Result<(), NotHidden> {
    let in_reach = |why: &NotHidden| {
        tracing::debug!("sockets below /run stay in reach: {why}");
        if places.stays_root() {
            let _ = IN_REACH.set(why.to_string());
        }
    };
    let own = Own::make().inspect_err(in_reach)?;
    let needed: Vec<_> = places.needed().collect();
    // Before `/run` is another one: a node of a test has its state there.
    let hidden = states.hide(&own, &needed);
    if let Err(why) = own.hide_run(needed.into_iter()) {
        in_reach(&why);
    }
    hidden
}

/// Says what the sandbox does not do here. A command that fails has one line, which is another one.
pub(crate) fn say_what_remains() {
    if let Some(why) = IN_REACH.get() {
        tracing::info!(
            "sockets below /run stay in reach of this process, which stays root ({why}): give --user, one user for each \
             VM, where the guest is not trusted"
        );
    }
    if let Some(line) = EXPOSED_KEYS.get().and_then(|keys| too_wide(keys)) {
        tracing::warn!("{line}");
    }
}

/// The complaint about keys that are good for other VMs than that of the process which has them. What is wrong with keys
/// that cannot be read is said elsewhere.
fn too_wide(keys: &Path) -> Option<String> {
    let host = keys::load(keys).ok()?.host;
    host.grant.concerns_all_or(None).then(|| {
        format!(
            "the keys in {} allow every VM, and an escape from this guest would have them: where the guest is not trusted, \
             give this VM keys of its own (`outlive keys issue --host {}-NAME --vm ID`, where ID is this VM's id)",
            keys.display(),
            host.name
        )
    })
}

fn confine_to(places: &Places) -> Result<(), RulesetError> {
    match places.enforce()? {
        None => {}
        Some(Lack::NotThere | Lack::NotEnabled) => tracing::warn!(
            "this kernel has no Landlock, so this process can use every file of its user: use Linux 5.13 or newer with \
             `landlock` in the list of /sys/kernel/security/lsm"
        ),
        Some(Lack::Newest) => tracing::debug!("this kernel's Landlock is older than it could be"),
    }
    Ok(())
}

/// Confines a process that serves an arbiter to the arbiter's directory and its keys, without any right. What the kernel
/// does not do is said: an arbiter that is missing would be worse. Call it while there is one thread.
///
/// # Errors
/// What it needs is somebody else's, or reaches the key of a CA.
pub(crate) fn enter_arbiter(directory: &Path, keys: Option<&Path>) -> Result<(), SandboxError> {
    let mut places = Places::of(None);
    places.keep(directory);
    if let Some(keys) = keys {
        places.guard(keys);
        places.read(keys);
    }
    learn_about_memory();
    let denied = places.denied();
    if let Err(why) = privileges::drop_all(None, CapabilitySet::empty()) {
        tracing::warn!("this arbiter keeps its rights: {why}");
        return Ok(());
    }
    places.check(&denied).map_err(NotOurs::without_option)?;
    places.check_secrets()?;
    if let Err(why) = confine_to(&places) {
        tracing::warn!("this arbiter is not confined to its files (Landlock): {why}");
    }
    Ok(())
}

/// The C library opens files below `/proc` and `/sys` for what it wants to know once: how many cores there are, when a
/// second thread first allocates, and whether memory may be overcommitted, when a thread other than the first one
/// gives memory back (glibc, malloc/arena.c: `check_may_shrink_heap`). Later it would be too late.
fn learn_about_memory() {
    const BLOCKS: usize = 64;
    /// Not so large that it gets a mapping of its own.
    const BLOCK: usize = 64 << 10;
    let allocate = || (0..BLOCKS).map(|_| std::hint::black_box(vec![1_u8; BLOCK])).collect::<Vec<_>>();
    let _ = std::thread::spawn(move || drop(allocate())).join();
}

/// Filters the calls of this thread and of all that it starts.
fn filter(otherwise: &SeccompAction) -> Result<(), SandboxError> {
    let own = std::process::id();
    let mut filters = BTreeMap::new();
    for role in Role::ALL {
        filters.insert(role, role.filter(own, otherwise.clone())?);
    }
    apply_filter(&roles::no_clone3()?)?;
    apply_filter(&filters[&Role::Control])?;
    let _ = FILTERS.set(filters);
    outlive_machine::at_thread_start(confine_thread);
    Ok(())
}

/// Gives the calling thread, which has just begun, the filter of its role.
fn confine_thread(name: &str) {
    let role = Role::of(name);
    let filter = FILTERS.get().and_then(|filters| filters.get(&role)).filter(|_| role != Role::Control);
    let Some(filter) = filter else { return };
    // It has that of its parent in any case. The kernel refuses only when it has no memory, and then a VM that runs is
    // worth more.
    if let Err(error) = apply_filter(filter) {
        tracing::error!(%error, name, "a thread has no filter of its own");
    }
}

/// A thread of this process that has real-time priority may not keep a core for longer than a second without waiting, or
/// the kernel ends the process: cgroups do not bind such threads. For sentinels, which wait nearly all the time, and not
/// for a process with vCPUs: an operator may give those a real-time priority.
pub(crate) fn bound_real_time() {
    privileges::bound_real_time();
}

/// From now on no thread of a confined process can become a real-time one.
pub(crate) fn end_real_time() {
    if FILTERS.get().is_some() {
        privileges::end_real_time();
    }
}

/// Confines a helper process to what its role needs.
pub(crate) fn enter_sentinel() {
    let confined = privileges::drop_own_capabilities().map_err(|error| error.to_string()).and_then(|()| {
        let filter = Role::Sentinel.filter(std::process::id(), SeccompAction::KillProcess);
        filter
            .map_err(|error| error.to_string())
            .and_then(|it| apply_filter(&it).map_err(|error| error.to_string()))
    });
    if let Err(error) = confined {
        tracing::debug!(error, "a sentinel is not confined");
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use outlive_epoch::VmId;

    use super::*;
    use crate::keys::{Grant, Order, Vms};

    #[test]
    fn keys_for_every_vm_are_too_wide_and_those_for_one_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let order = |host: &str, grant| Order { host: host.into(), grant, life: Duration::from_secs(3600) };
        keys::init(&path("keys"), &order("hosta", Grant::ALL)).unwrap();
        let line = too_wide(&path("keys")).unwrap();
        assert!(line.contains("--host hosta-NAME --vm ID") && !line.contains('\n'), "{line}");
        let hold = Grant { hold: Vms::Any, ..Grant::NONE };
        keys::issue(&path("keys"), &order("hostb", hold), &path("b")).unwrap();
        assert!(too_wide(&path("b")).is_some(), "whoever may hold them has their memory");
        let one = Vms::Only(vec![VmId([1; 16])]);
        let own = Grant { send: one.clone(), hold: one, ..Grant::NONE };
        keys::issue(&path("keys"), &order("hosta-web", own), &path("web")).unwrap();
        assert_eq!((too_wide(&path("web")), too_wide(&path("none"))), (None, None));
    }
}
