//! Threads: named, undisturbed by signals, and punctual where it matters.

// UNSAFETY: the priority of a thread is set by system calls that no safe wrapper of our dependencies offers.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::sync::{Once, OnceLock};
use std::thread::{Builder, JoinHandle};

use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

/// Starts a thread that takes no signals. Linux shows the first 15 bytes of its name.
///
/// # Errors
/// The operating system's, when it refuses the thread.
pub fn spawn<T: Send + 'static>(
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let name = name.into();
    let known_as = name.clone();
    Builder::new().name(name).spawn(move || {
        block_signals();
        if let Some(confine) = AT_START.get() {
            confine(&known_as);
        }
        body()
    })
}

/// What every thread does first.
static AT_START: OnceLock<fn(&str)> = OnceLock::new();

/// Lets every thread that is started from now on call this first, with its name: the program confines its threads.
/// The first call counts.
pub fn at_thread_start(confine: fn(&str)) {
    let _ = AT_START.set(confine);
}

/// Blocks signals, which are for the threads that expect them: a signal in the middle of
/// KVM_RESET_DIRTY_RINGS loses pages. Signals that report a fault of the calling thread itself stay
/// unblocked.
fn block_signals() {
    const FAULTS: [Signal; 6] =
        [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP, Signal::SIGABRT];
    let mut signals = SigSet::all();
    FAULTS.into_iter().for_each(|signal| signals.remove(signal));
    if let Err(error) = signals.thread_block() {
        tracing::error!(%error, "a thread cannot block signals");
    }
}

/// Makes the calling thread's timed waits end within a microsecond of their time instead of the default 50
/// (PR_SET_TIMERSLACK); checkpoints come every millisecond.
pub fn precise_timers() {
    if let Err(error) = prctl::set_timerslack(1000) {
        tracing::debug!(%error, "timed waits end late");
    }
}

/// Lets the calling thread run before all others of the host, as far as this process may decide that. For
/// threads that sleep, and that must not wait for a core when their moment comes.
pub fn urgent() {
    let first = libc::sched_param { sched_priority: 1 };
    let policy = libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK;
    // SAFETY: both calls concern the calling thread only, and read a structure of ours.
    let failed = unsafe {
        libc::sched_setscheduler(0, policy, &first) != 0 && libc::setpriority(libc::PRIO_PROCESS, 0, -20) != 0
    };
    if failed {
        tracing::debug!(error = %io::Error::last_os_error(), "a thread that should be urgent is not");
    }
}

/// Gives the calling thread a table of descriptors of its own, with this one in it and nothing else: whatever others have
/// open at that moment, locks and pipes among it, would otherwise stay open for as long as the thread lives. The thread
/// must own no other descriptor.
///
/// # Errors
/// The operating system's. The table may then be that of the others, or have more in it.
pub fn keep_alone(fd: RawFd) -> io::Result<()> {
    let kept = fd as libc::c_uint;
    // SAFETY: the table is the calling thread's alone before anything in it is closed, so that nobody's descriptor is
    // closed under them.
    unsafe {
        if libc::unshare(libc::CLONE_FILES) != 0 {
            return Err(io::Error::last_os_error());
        }
        let below = kept == 0 || libc::close_range(0, kept - 1, 0) == 0;
        if !below || libc::close_range(kept.saturating_add(1), libc::c_uint::MAX, 0) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// The signal that takes a vCPU out of the guest.
pub(crate) fn kick() -> libc::c_int {
    SIGRTMIN() + 1
}

/// Installs the (empty) handler of the kick signal: its delivery alone ends `KVM_RUN`.
pub(crate) fn install_kick() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        if let Err(error) = register_signal_handler(kick(), on_kick) {
            tracing::error!(%error, "cannot install the handler of the kick signal");
        }
    });
}

/// Lets the calling thread receive kicks from now on.
pub(crate) fn take_kicks() {
    if let Err(error) = unblock_signal(kick()) {
        tracing::error!(%error, "cannot unblock the kick signal of a vCPU's thread");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_takes_faults_and_the_signals_that_it_asked_for() {
        let blocked = |ask: fn()| {
            let thread = spawn("a-thread", move || {
                ask();
                let name = std::thread::current().name().map(str::to_owned);
                assert_eq!(name.as_deref(), Some("a-thread"));
                vmm_sys_util::signal::get_blocked_signals().unwrap()
            });
            thread.unwrap().join().unwrap()
        };
        let (quiet, kicked) = (blocked(|| {}), blocked(take_kicks));
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGCHLD, kick() + 1] {
            assert!(quiet.contains(&signal) && kicked.contains(&signal), "{signal}");
        }
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGABRT] {
            assert!(!quiet.contains(&signal) && !kicked.contains(&signal), "{signal}");
        }
        assert!(quiet.contains(&kick()) && !kicked.contains(&kick()));
    }
}
