//! A test at start-up, in a throw-away VM: can this kernel leave pages out of the re-arm, and does it pay?
//!
//! Leaving a bit of the bitmap set is documented (Documentation/virt/kvm/api.rst, 4.117). Giving a ring entry
//! back with another page in it is not: KVM takes slot and offset from the entry as user space left them
//! (virt/kvm/dirty_ring.c, kvm_dirty_ring_reset), and nothing promises that it always will. So the test tries
//! it. Whether it pays depends on the machine: a write fault costs about 7 us under a shadow MMU and next to
//! nothing with Intel's page modification logging.

#[cfg(target_arch = "x86_64")]
mod guest;
#[cfg(target_arch = "x86_64")]
mod log;
#[cfg(target_arch = "x86_64")]
mod proof;
#[cfg(all(test, target_arch = "x86_64"))]
mod tests;

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
#[cfg(target_arch = "x86_64")]
use std::time::Instant;

use crate::report;
#[cfg(target_arch = "x86_64")]
use guest::Machine;
#[cfg(target_arch = "x86_64")]
use proof::{Proof, Twist};

/// The log under test.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// KVM dirty rings, whose entries are given back with another page in them or with none.
    Ring,
    /// KVM_CLEAR_DIRTY_LOG, some bits of which stay set.
    ClearLog,
}

/// The results of a test in a throw-away VM for this kernel on this machine.
///
/// `Display` gives a line for the log.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SelfTest {
    /// Whether a page that is left out of the re-arm stays writable without a fault and without being logged,
    /// and every page that is re-armed is logged at its next write. If not, what happened instead.
    pub selective: Result<(), String>,
    /// The cost of the first write to a re-armed page for the guest, in nanoseconds: the median of passes
    /// over pages that trap, minus a pass over the same pages that do not. 0 if there was nothing to measure.
    pub fault_ns: u32,
    /// The cost of copying a page of 4 KiB from guest memory to a warm buffer, in nanoseconds (median).
    pub copy_ns: u32,
    /// How long the whole test took, including making and removing the VM.
    pub took: Duration,
}

/// Why the test could not be run. This says nothing about the kernel's dirty log.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SelfTestError {
    /// This kernel does not have the log to be tested.
    #[error("there is no {0} here")]
    Missing(&'static str),
    /// A step of making or running the throw-away VM failed.
    #[error("cannot {step} for the self-test of dirty logging")]
    Step {
        /// The step.
        step: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

#[cfg(target_arch = "x86_64")]
impl SelfTestError {
    fn at(step: &'static str) -> impl FnOnce(io::Error) -> SelfTestError {
        move |source| SelfTestError::Step { step, source }
    }
}

/// Why the test ended early.
#[cfg(target_arch = "x86_64")]
enum Failure {
    /// It could not be run.
    Error(SelfTestError),
    /// It ran, and the kernel or the guest misbehaved.
    Unexpected(String),
}

#[cfg(target_arch = "x86_64")]
impl From<SelfTestError> for Failure {
    fn from(error: SelfTestError) -> Failure {
        Failure::Error(error)
    }
}

/// The results for each kind of log, in this process. A test that could not be run is tried again.
static FOUND: [Mutex<Option<SelfTest>>; 2] = [Mutex::new(None), Mutex::new(None)];

impl SelfTest {
    /// The result of the first [`SelfTest::run`] in this process that had one: the kernel stays the same.
    ///
    /// # Errors
    /// As `run`.
    pub(crate) fn once(kvm: BorrowedFd<'_>, way: Way) -> Result<SelfTest, SelfTestError> {
        let found = match way {
            Way::Ring => &FOUND[0],
            Way::ClearLog => &FOUND[1],
        };
        // Held during the test: two tests at once would measure each other.
        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(test) = &*found {
            return Ok(test.clone());
        }
        let test = SelfTest::run(kvm, way)?;
        report::debug(format_args!("self-test of selective re-arm: {test}"));
        *found = Some(test.clone());
        Ok(test)
    }

    /// Makes a VM of its own with one vCPU and 2 MiB of memory, tests, and removes the VM. It takes about 15
    /// ms, in which the calling thread runs the vCPU.
    ///
    /// # Errors
    /// If the VM cannot be made or run. A kernel that cannot leave pages out is not an error;
    /// [`SelfTest::selective`] says so.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn run(kvm: BorrowedFd<'_>, way: Way) -> Result<SelfTest, SelfTestError> {
        SelfTest::with(kvm, way, guest::PROGRAM, |_, target| target)
    }

    /// The guest is a program for x86-64.
    #[cfg(not(target_arch = "x86_64"))]
    pub(crate) fn run(_kvm: BorrowedFd<'_>, _way: Way) -> Result<SelfTest, SelfTestError> {
        Err(SelfTestError::Missing("self-test of dirty logging on this architecture"))
    }

    /// As `run`, with a guest and a way of giving back that may be wrong.
    #[cfg(target_arch = "x86_64")]
    fn with(kvm: BorrowedFd<'_>, way: Way, program: &[u8], twist: Twist) -> Result<SelfTest, SelfTestError> {
        let started = Instant::now();
        let mut machine = Machine::new(kvm, way, program)?;
        let copy_ns = nanoseconds(machine.copy_time()?);
        let mut proof = Proof::new(&mut machine, way, twist)?;
        let selective = match proof.run() {
            Ok(()) => Ok(()),
            Err(Failure::Unexpected(reason)) => Err(reason),
            Err(Failure::Error(error)) => return Err(error),
        };
        let fault_ns = nanoseconds(proof.fault_time());
        drop(proof);
        drop(machine);
        Ok(SelfTest { selective, fault_ns, copy_ns, took: started.elapsed() })
    }

    /// How many epochs without a write may be between two epochs with one, so that copying a page in every
    /// epoch still costs less than faulting each time it is written: half of fault / copy; the other half is
    /// a margin for the further costs of an unchanged page. 0: do not leave pages out at all, because it does
    /// not work or does not pay.
    pub fn max_gap(&self) -> u32 {
        if self.selective.is_err() { 0 } else { self.fault_ns / self.copy_ns.max(1) / 2 }
    }
}

impl fmt::Display for SelfTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.selective {
            Ok(()) => f.write_str("pages can be left out of the re-arm"),
            Err(reason) => write!(f, "pages cannot be left out of the re-arm ({reason})"),
        }?;
        let took = self.took.as_secs_f64() * 1e3;
        write!(f, "; a write fault costs {} ns, a copy {} ns; took {took:.1} ms", self.fault_ns, self.copy_ns)
    }
}

#[cfg(target_arch = "x86_64")]
fn nanoseconds(time: Duration) -> u32 {
    time.as_nanos().try_into().unwrap_or(u32::MAX)
}

#[cfg(target_arch = "x86_64")]
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}
