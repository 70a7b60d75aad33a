//! Whether a measurement was disturbed: other programs use the processors too.
// UNSAFETY: system calls that fill or read structures.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

/// A sample that was disturbed is taken again, but not forever.
const TRIES: usize = 5;

/// How often the scheduler has taken the processor from this thread.
pub(crate) fn preemptions() -> i64 {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: fills the structure, and cannot fail for the calling thread.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_nivcsw
    }
}

/// The processors this thread may use.
pub(crate) fn processors() -> Vec<usize> {
    let set = affinity();
    // SAFETY: every number is one that the set has room for.
    (0..libc::CPU_SETSIZE as usize).filter(|&cpu| unsafe { libc::CPU_ISSET(cpu, &set) }).collect()
}

fn affinity() -> libc::cpu_set_t {
    // SAFETY: a set is plain numbers, and the call fills it; of this thread it cannot fail.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set);
        set
    }
}

/// While it lives, this thread stays on one processor, so that two threads never share one while another is
/// idle.
pub(crate) struct Pinned(libc::cpu_set_t);

impl Pinned {
    pub(crate) fn to(cpu: usize) -> Pinned {
        let before = affinity();
        // SAFETY: a set of one processor that this thread may use; without effect if it has gone.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::CPU_SET(cpu, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set);
        }
        Pinned(before)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: the set of this same thread.
        unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &self.0) };
    }
}

/// A sample in which no thread lost its processor, or the last of a few. `sample` says whether it was
/// disturbed.
pub(crate) fn undisturbed<T>(mut sample: impl FnMut() -> (T, bool)) -> T {
    let mut tries = 1;
    loop {
        let (value, disturbed) = sample();
        if !disturbed || tries == TRIES {
            return value;
        }
        tries += 1;
    }
}
