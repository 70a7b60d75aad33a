//! The threads of a VM: vCPUs that work in steps, a device model, and the way to stop them all.
// UNSAFETY: has a handler for a signal, which does nothing, and sends it to threads of its own.
#![allow(unsafe_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::Failure;
use crate::guest::{Stop, Vcpu};
use crate::vm::Plan;

/// A step of the guest's work; a round has ten, or as many as fit.
const STEP: Duration = Duration::from_millis(10);
/// How long a vCPU waits for room in its ring before it checks whether it should stop.
const ROOM: Duration = Duration::from_millis(1);

/// The action when KVM says that the ring of a vCPU is full: wait this long for room.
pub(crate) type RingFull<'t> = dyn Fn(usize, Duration) -> Result<(), Failure> + Sync + 't;

/// Stops the vCPUs and the device, and lets them continue.
#[derive(Default)]
pub(crate) struct Gate {
    stop: AtomicBool,
    standing: AtomicUsize,
    lock: Mutex<()>,
    changed: Condvar,
    /// Thread numbers of the vCPUs.
    threads: Mutex<Vec<libc::pid_t>>,
    /// Nanoseconds in KVM_RUN, and pages written in them.
    pub(crate) guest_ns: AtomicU64,
    pub(crate) guest_pages: AtomicU64,
}

impl Gate {
    pub(crate) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn threads(&self) -> MutexGuard<'_, Vec<libc::pid_t>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes every present KVM_RUN return.
    fn kick(&self) {
        for &thread in &*self.threads() {
            // SAFETY: a signal with a handler that does nothing, to a thread of this process or to none.
            unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, SIGRTMIN()) };
        }
    }

    /// Ends when everything should stop, or after this long.
    fn rest(&self, time: Duration) {
        let lock = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_timeout_while(lock, time, |()| !self.is_stopping()));
    }
}

extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The threads of a running VM, in the scope of the migration.
pub(crate) struct Running<'s> {
    gate: &'s Gate,
    vcpus: Vec<ScopedJoinHandle<'s, Result<(), Failure>>>,
    device: ScopedJoinHandle<'s, Result<(), Failure>>,
}

/// The work of the guest.
#[derive(Clone, Copy)]
pub(crate) struct Work {
    pub(crate) plan: Plan,
    pub(crate) vcpus: u64,
    /// Pages that all vCPUs write in a round.
    pub(crate) pages: u64,
    pub(crate) round: Duration,
}

impl<'s> Running<'s> {
    pub(crate) fn start<'e>(
        scope: &'s Scope<'s, 'e>,
        gate: &'s Gate,
        work: Work,
        vcpus: &'s mut [Vcpu],
        ring_full: &'s RingFull<'s>,
        device: impl Fn(u64) -> Result<(), Failure> + Send + 's,
    ) -> Result<Running<'s>, Failure> {
        register_signal_handler(SIGRTMIN(), kicked)?;
        let spawn = |(index, vcpu): (usize, &'s mut Vcpu)| {
            scope.spawn(move || {
                let ended = vcpu_thread(gate, work, index, vcpu, ring_full);
                gate.standing.fetch_add(1, Ordering::SeqCst);
                ended
            })
        };
        let vcpus = vcpus.iter_mut().enumerate().map(spawn).collect();
        let device = scope.spawn(move || {
            let mut count = 0;
            while !gate.is_stopping() {
                count += 1;
                device(count)?;
                gate.rest(Duration::from_millis(5));
            }
            Ok(())
        });
        Ok(Running { gate, vcpus, device })
    }

    /// Stops everything, for good: this example does not resume the source. Returns once all have stopped.
    pub(crate) fn stop(self) -> Result<(), Failure> {
        self.gate.stop.store(true, Ordering::SeqCst);
        drop(self.gate.lock.lock().unwrap_or_else(PoisonError::into_inner));
        self.gate.changed.notify_all();
        while self.gate.standing.load(Ordering::SeqCst) < self.vcpus.len() {
            // A signal just before KVM_RUN is lost, so it is sent until all have stopped.
            self.gate.kick();
            thread::sleep(Duration::from_micros(30));
        }
        let mut threads = self.vcpus.into_iter().chain([self.device]);
        threads.try_for_each(|thread| thread.join().map_err(|_| "a thread panicked")?)
    }
}

/// Runs steps at a steady pace, until told to stop. Then the registers can be read.
fn vcpu_thread(
    gate: &Gate,
    work: Work,
    index: usize,
    vcpu: &mut Vcpu,
    ring_full: &RingFull<'_>,
) -> Result<(), Failure> {
    // SAFETY: no argument.
    gate.threads().push(unsafe { libc::gettid() });
    let steps = (work.round.as_micros() / STEP.as_micros()).max(1) as u64;
    let pages = (work.pages / steps / work.vcpus).max(1);
    let begin = Instant::now();
    for step in 1.. {
        vcpu.set_job(&work.plan.step_job(step + 1, index as u64, work.vcpus, pages))?;
        let running = Instant::now();
        loop {
            match vcpu.run()? {
                Stop::Done => break,
                // Other threads fetch, which makes room; KVM would return at once again and again.
                Stop::RingFull => ring_full(index, ROOM)?,
                Stop::Kicked => (),
            }
            if gate.is_stopping() {
                vcpu.finish();
                return Ok(());
            }
        }
        vcpu.finish();
        gate.guest_ns.fetch_add(running.elapsed().as_nanos() as u64, Ordering::Relaxed);
        gate.guest_pages.fetch_add(pages, Ordering::Relaxed);
        gate.rest((work.round / steps as u32 * step as u32).saturating_sub(begin.elapsed()));
        if gate.is_stopping() {
            break;
        }
    }
    Ok(())
}
