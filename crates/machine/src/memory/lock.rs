//! Memory that stays in RAM.

// UNSAFETY: limits and locks of the process are system calls.
#![allow(unsafe_code)]

use std::io;

use libc::{RLIM_INFINITY, RLIMIT_MEMLOCK};

use super::PAGE_SIZE;

/// Why the memory of the process cannot be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// RLIMIT_MEMLOCK is too low. A limit that is large enough for today would let an allocation fail later.
    #[error("this process may lock only {} KiB of memory", .0 >> 10)]
    Limit(u64),
    /// The kernel refuses.
    #[error("the kernel does not lock memory: {0}")]
    Refused(#[from] io::Error),
}

/// Keeps all memory of this process out of swap: the guest's memory, staging, and every other buffer, those of
/// today and those to come. Pages are locked when they are first touched, so memory that a guest has never used
/// still takes no room.
///
/// # Errors
/// [`LockError`].
pub fn lock_memory() -> Result<(), LockError> {
    let mut limit = libc::rlimit { rlim_cur: RLIM_INFINITY, rlim_max: RLIM_INFINITY };
    // SAFETY: both calls read or fill a structure of ours and keep no pointer to it. A limit that cannot be
    // raised is read instead.
    let known = unsafe {
        libc::setrlimit(RLIMIT_MEMLOCK, &limit) == 0 || libc::getrlimit(RLIMIT_MEMLOCK, &mut limit) == 0
    };
    if !known {
        return Err(io::Error::last_os_error().into());
    }
    if limit.rlim_cur != RLIM_INFINITY && !may_exceed(limit.rlim_cur) {
        return Err(LockError::Limit(limit.rlim_cur));
    }
    // SAFETY: locking changes no contents and no address.
    match unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error().into()),
    }
}

/// Whether this process may lock more than its limit, as CAP_IPC_LOCK allows. The kernel is asked with memory
/// that is only reserved: within a user namespace the process may have a capability that does not count here.
fn may_exceed(limit: u64) -> bool {
    let bytes = limit as usize + PAGE_SIZE;
    // SAFETY: a new mapping of our own, which is unmapped at once and never touched.
    unsafe {
        let (flags, access) =
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, libc::PROT_READ);
        let at = libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return false;
        }
        let locked = libc::mlock2(at, bytes, libc::MLOCK_ONFAULT) == 0;
        libc::munmap(at, bytes);
        locked
    }
}
