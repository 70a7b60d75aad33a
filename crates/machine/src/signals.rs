//! The kick signal, and threads that take no other.

// UNSAFETY: signal masks and handlers are process state behind libc calls.
#![allow(unsafe_code)]

use std::sync::Once;

/// Installs the (empty) handler of the kick signal: its delivery alone ends `KVM_RUN`.
pub(crate) fn install_kick() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        if let Err(error) = vmm_sys_util::signal::register_signal_handler(kick(), on_kick) {
            tracing::error!(%error, "the kick signal cannot be handled");
        }
    });
}

/// The signal that takes a vCPU out of the guest.
pub(crate) fn kick() -> libc::c_int {
    libc::SIGRTMIN() + 1
}

/// Blocks every signal for the calling thread, except the kick when `take_kick`. Hot threads do
/// this: a signal in KVM_RESET_DIRTY_RINGS loses pages (facts/dirty-tracking.md §5.5).
pub fn block_all(take_kick: bool) {
    // SAFETY: the set is initialised by sigfillset before it is used; the mask of the calling
    // thread alone changes.
    unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigfillset(&mut set);
        if take_kick {
            libc::sigdelset(&mut set, kick());
        }
        libc::pthread_sigmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// Lets the calling thread's timed waits end within a microsecond of their time instead of the
/// default 50 (PR_SET_TIMERSLACK); checkpoints come every millisecond.
pub fn precise_timers() {
    // SAFETY: a plain request about the calling thread.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1000u64, 0u64, 0u64, 0u64) };
}
