//! KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with KVM_DIRTY_LOG_INITIALLY_SET makes all bits of the log begin as set,
//! so that enabling it need not write-protect anything. With a ring there are no such bits, and nothing is
//! protected.

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};

use crate::guest::{self, DATA, Job, PAGE, Stop};
use crate::ring::{RingVm, missed};
use crate::{Failure, Verdict};

const PAGES: u64 = 100;
/// With page modification logging KVM requires at least 1024.
const ENTRIES: u32 = 4096;

pub(crate) fn run() -> Result<Verdict, Failure> {
    let flags = u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET);
    let Some(without) = missed_with(None)? else {
        return Ok(Verdict::Skipped("no KVM with a dirty ring".into()));
    };
    let with = match missed_with(Some(flags)) {
        Ok(with) => with.unwrap_or(0),
        Err(error) => return Ok(Verdict::NotShown(format!("KVM refuses the two together: {error}"))),
    };
    let figures = format!(
        "of {PAGES} pages written after the log was turned on {with} were not in the ring; without it {without}"
    );
    Ok(if with > without { Verdict::Shown(figures) } else { Verdict::NotShown(figures) })
}

fn missed_with(manual: Option<u64>) -> Result<Option<usize>, Failure> {
    let vm = RingVm::new(64 << 20, ENTRIES, |vm| match manual {
        Some(flags) => guest::enable_cap(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags),
        None => Ok(()),
    })?;
    let Some(mut vm) = vm else { return Ok(None) };
    // The pages are mapped, and writable, when the log is turned on.
    vm.run(&Job::ordered(1, DATA, PAGE, PAGES))?;
    vm.set_logging(true)?;
    let job = Job::ordered(2, DATA, PAGE, PAGES);
    match vm.run(&job)? {
        Stop::Done => {
            let listed = vm.harvest();
            Ok(Some(missed(&vm, &job, &listed)))
        }
        stop => Err(format!("the guest stopped with {stop:?}").into()),
    }
}
