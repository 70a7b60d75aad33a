//! User, capabilities and limits.
//!
//! Capabilities and `no_new_privs` belong to a thread and go over to the threads that it starts. So all of this is done
//! while the process has one thread.

use std::ffi::CString;
use std::io;

use nix::sys::prctl;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit, setrlimit};
use nix::unistd::{User, getuid, initgroups, setgid, setuid};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
};

use super::steward::Charter;

/// Why rights cannot be given up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PrivilegeError {
    /// Nobody is called so.
    #[error(
        "--user {0}: there is no such user; make it with `useradd --system {0}`, or leave the option out"
    )]
    NoUser(String),
    /// A process that keeps its rights keeps its user.
    #[error("--user makes no sense with --sandbox off: leave one of them out")]
    Off,
    /// Only root can become somebody else.
    #[error(
        "--user {0}: only root can become another user; start this command as {0}, or leave the option out"
    )]
    NotRoot(String),
    /// The kernel refuses.
    #[error("cannot give up the rights of this process ({what}): {source}; --sandbox off keeps them")]
    Refused {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn refused<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> PrivilegeError {
    move |source| PrivilegeError::Refused { what, source: source.into() }
}

/// A user by name, or by number.
///
/// # Errors
/// See [`PrivilegeError`].
pub(crate) fn find_user(name: &str) -> Result<User, PrivilegeError> {
    let found = User::from_name(name).map_err(refused("user"))?;
    let user = found.ok_or_else(|| PrivilegeError::NoUser(name.to_owned()))?;
    if !getuid().is_root() && getuid() != user.uid {
        return Err(PrivilegeError::NotRoot(name.to_owned()));
    }
    Ok(user)
}

/// Raises the limits that stand in for capabilities which this process gives up: what a thread may lock in memory
/// (CAP_IPC_LOCK), and the lowest real-time priority, for the keepers of the links (CAP_SYS_NICE). Without the right to
/// raise them they stay, and what is returned says whether memory may be locked without a capability.
pub(super) fn raise_limits() -> bool {
    let raise = |what: Resource, to| {
        let (now, most) = getrlimit(what)?;
        setrlimit(what, now.max(to), most.max(to))
    };
    for (what, to) in [(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY), (Resource::RLIMIT_RTPRIO, 1)] {
        if let Err(error) = raise(what, to) {
            tracing::debug!(?what, %error, "a limit stays as it is");
        }
    }
    getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(now, _)| now == RLIM_INFINITY)
}

/// How long a thread of real-time priority may run without waiting, in microseconds.
const REAL_TIME: u64 = 1_000_000;

/// See [`bound_real_time`](super::bound_real_time). Both limits: SIGXCPU comes at the first one, and may be blocked.
pub(super) fn bound_real_time() {
    if let Err(error) = setrlimit(Resource::RLIMIT_RTTIME, REAL_TIME, REAL_TIME) {
        tracing::debug!(%error, "real-time threads have no limit");
    }
}

/// Takes the real-time priority back that [`raise_limits`] gave. The keepers have theirs, and the steward, whose limits are
/// its own, starts sentinels. By it a thread that a guest has taken over would keep a core from everybody else.
pub(super) fn end_real_time() {
    // A smaller limit needs no right.
    if let Err(error) = setrlimit(Resource::RLIMIT_RTPRIO, 0, 0) {
        tracing::debug!(%error, "threads may still become real-time ones");
    }
}

/// Gives up every right but those that are `kept`: becomes `user`, if one is named, drops all other capabilities for
/// ever, and lets no program that is started get new ones.
///
/// # Errors
/// See [`PrivilegeError`].
pub(super) fn drop_all(user: Option<&User>, kept: CapabilitySet) -> Result<(), PrivilegeError> {
    prctl::set_no_new_privs().map_err(refused("no_new_privs"))?;
    let own = capabilities(None).map_err(refused("capabilities"))?;
    let kept = kept & own.permitted;
    if own.effective.contains(CapabilitySet::SETPCAP) {
        shrink_bounding_set(kept).map_err(refused("bounding set"))?;
        lock_secure_bits().map_err(refused("securebits"))?;
    }
    if let Some(user) = user.filter(|user| user.uid != getuid()) {
        let name = CString::new(user.name.as_str()).map_err(|_| PrivilegeError::NoUser(user.name.clone()))?;
        initgroups(&name, user.gid).map_err(refused("groups"))?;
        setgid(user.gid).map_err(refused("group"))?;
        setuid(user.uid).map_err(refused("user"))?;
        // Otherwise its own files in /proc would be root's. A core has no guest in it (MADV_DONTDUMP), and there is none.
        prctl::set_dumpable(true).map_err(refused("dumpable"))?;
    }
    drop_capabilities(kept).map_err(refused("capabilities"))
}

/// Takes everything from the steward that its charter does not need. The fence command is the operator's and may
/// need anything.
pub(super) fn keep_for_steward(charter: &Charter) -> io::Result<()> {
    if charter.fence.is_some() {
        return Ok(());
    }
    prctl::set_no_new_privs()?;
    let own = capabilities(None)?;
    // A sentinel wants to be the first to run.
    let mut kept = CapabilitySet::SYS_NICE;
    if charter.card.is_some() {
        kept |= CapabilitySet::NET_ADMIN;
    }
    let kept = kept & own.permitted;
    if own.effective.contains(CapabilitySet::SETPCAP) {
        shrink_bounding_set(kept)?;
    }
    drop_capabilities(kept)?;
    Ok(())
}

/// Leaves the calling thread without any capability.
pub(crate) fn drop_own_capabilities() -> io::Result<()> {
    prctl::set_no_new_privs()?;
    Ok(drop_capabilities(CapabilitySet::empty())?)
}

fn drop_capabilities(kept: CapabilitySet) -> rustix::io::Result<()> {
    clear_ambient_capability_set()
        .or_else(|error| if error == rustix::io::Errno::INVAL { Ok(()) } else { Err(error) })?;
    set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )
}

fn shrink_bounding_set(kept: CapabilitySet) -> rustix::io::Result<()> {
    for bit in 0..64 {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        if kept.contains(one) {
            continue;
        }
        match remove_capability_from_bounding_set(one) {
            Ok(()) => {}
            // The kernel knows no more of them.
            Err(rustix::io::Errno::INVAL) => break,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Root is a user like any other from now on. A change of the user leaves the capabilities that are kept.
fn lock_secure_bits() -> rustix::io::Result<()> {
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
}
