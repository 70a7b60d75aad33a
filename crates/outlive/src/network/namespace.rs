//! Network namespaces without a name: nothing to clean up, however the program ends.
//!
//! A namespace lives as long as a process or a thread is in it or an open descriptor refers to it. When the
//! last of them is gone, the kernel removes it with every interface in it, also after SIGKILL.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::resume_unwind;
use std::process::{Child, Command};
use std::thread;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{getegid, geteuid};

use super::{Netlink, NetlinkError};

/// Why a network namespace could not be made or entered.
#[derive(Debug, thiserror::Error)]
pub enum EnterError {
    /// Namespaces belong to threads; threads that already run would stay outside.
    #[error("cannot enter a network namespace: {threads} threads already run; enter it before starting any")]
    Threads {
        /// Number of threads of the process.
        threads: usize,
    },
    /// The user is not root, and this system does not let users make user namespaces.
    #[error(
        "cannot make a network namespace without root: user namespaces are disabled here ({source}); \
         run as root, or allow them: sysctl -w {knob}"
    )]
    UserNamespacesOff {
        /// What the kernel said.
        source: io::Error,
        /// The setting that most likely forbids it, with the value that allows it.
        knob: &'static str,
    },
    /// A namespace for a part of the program needs the right to make namespaces.
    #[error("cannot make a network namespace: no permission; run as root or with CAP_SYS_ADMIN")]
    Permission,
    /// The kernel refused for another reason.
    #[error("cannot {what}: {source}")]
    Refused {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The loopback interface of the new namespace could not be switched on.
    #[error("the new network namespace has no working loopback: {0}")]
    Loopback(#[from] NetlinkError),
}

/// Puts this process into a new network namespace, with the loopback interface up and nothing else.
///
/// With the right to do so (root) only the network changes. Without it the process first becomes root of a
/// new user namespace: its files still belong to the user, and supplementary groups such as `kvm` still
/// count.
///
/// Call it before any thread starts. Every process started later is in the namespace too.
pub fn enter_own_namespace() -> Result<(), EnterError> {
    let threads = fs::read_dir("/proc/self/task").map(Iterator::count).unwrap_or(1);
    if threads != 1 {
        return Err(EnterError::Threads { threads });
    }
    match unshare(CloneFlags::CLONE_NEWNET) {
        Ok(()) => {}
        Err(Errno::EPERM) => enter_user_and_network_namespace()?,
        Err(error) => return Err(refused("make a network namespace", error)),
    }
    prepare()
}

/// For users without rights: makes a user namespace in which they are root, and in it the network namespace.
fn enter_user_and_network_namespace() -> Result<(), EnterError> {
    let (user, group) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET).map_err(user_namespaces_off)?;
    let write = |what, path: &str, text: String| {
        fs::write(path, text).map_err(|source| EnterError::Refused { what, source })
    };
    // The kernel demands this order: a process without rights outside may map its group only after it gave up
    // setgroups (user_namespaces(7)).
    write("give up setgroups", "/proc/self/setgroups", "deny".to_string())?;
    write("map the user", "/proc/self/uid_map", format!("0 {user} 1"))?;
    write("map the group", "/proc/self/gid_map", format!("0 {group} 1"))
}

/// Names the setting that forbids user namespaces; the kernel's error number does not.
fn user_namespaces_off(error: Errno) -> EnterError {
    let holds = |path: &str, value: &str| fs::read_to_string(path).is_ok_and(|text| text.trim() == value);
    let knob = if holds("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        "kernel.unprivileged_userns_clone=1"
    } else if holds("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1") {
        "kernel.apparmor_restrict_unprivileged_userns=0"
    } else {
        "user.max_user_namespaces=10000"
    };
    EnterError::UserNamespacesOff { source: error.into(), knob }
}

/// Makes a fresh namespace ready for use.
fn prepare() -> Result<(), EnterError> {
    // Without this, every interface that goes up sends router solicitations and duplicate address probes.
    // They are only noise; kernels without IPv6 lack the setting.
    for scope in ["all", "default"] {
        let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{scope}/disable_ipv6"), "1");
    }
    Netlink::open()?.set_up("lo")?;
    Ok(())
}

fn refused(what: &'static str, error: Errno) -> EnterError {
    EnterError::Refused { what, source: error.into() }
}

/// A network namespace beside that of the process. It ends when the handle and all processes in it are gone.
///
/// The handle is a file descriptor; code runs in the namespace on threads that enter it. Needs CAP_SYS_ADMIN
/// (root, or a process that went through [`enter_own_namespace`]).
#[derive(Debug)]
pub struct Namespace {
    fd: OwnedFd,
}

impl Namespace {
    /// Makes a namespace with the loopback interface up and nothing else.
    pub fn new() -> Result<Namespace, EnterError> {
        on_thread(|| {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|error| match error {
                Errno::EPERM => EnterError::Permission,
                other => refused("make a network namespace", other),
            })?;
            prepare()?;
            // thread-self, not self: only this thread is in the new namespace.
            let file = File::open("/proc/thread-self/ns/net")
                .map_err(|source| EnterError::Refused { what: "open the new network namespace", source })?;
            Ok(Namespace { fd: file.into() })
        })
    }

    /// Runs `work` in the namespace, on a new thread, and waits for its result. A panic is passed on.
    ///
    /// Sockets that `work` opens stay in the namespace wherever they are used later.
    pub fn run<R: Send>(&self, work: impl FnOnce() -> R + Send) -> Result<R, EnterError> {
        on_thread(|| {
            setns(&self.fd, CloneFlags::CLONE_NEWNET).map_err(|error| match error {
                Errno::EPERM => EnterError::Permission,
                other => refused("enter the network namespace", other),
            })?;
            Ok(work())
        })
    }

    /// Starts a process in the namespace.
    ///
    /// The thread that starts it ends at once, so a process that asks for a signal at the death of its parent
    /// (`PR_SET_PDEATHSIG`) gets it immediately.
    pub fn spawn(&self, command: &mut Command) -> Result<Child, EnterError> {
        self.run(|| command.spawn())?.map_err(|source| EnterError::Refused {
            what: "start a process in the network namespace",
            source,
        })
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A thread keeps its namespace for its whole life, hence a new thread each time.
fn on_thread<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|panic| resume_unwind(panic)))
}
