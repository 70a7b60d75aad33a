//! KVM takes any entry whose flags say RESET, even if it has never written that entry. Three such entries
//! make its two indices cross: from then on the ring counts as full, with nothing in it.

use crate::guest::{DATA, Job, PAGE, Stop};
use crate::ring::RingVm;
use crate::{Failure, Verdict};

const UNSEEN: u64 = 3;

pub(crate) fn run() -> Result<Verdict, Failure> {
    let Some(mut vm) = RingVm::new(64 << 20, 4096, |_| Ok(()))? else {
        return Ok(Verdict::Skipped("no KVM with a dirty ring".into()));
    };
    vm.set_logging(true)?;
    vm.mark_unseen(UNSEEN);
    let counted = vm.reset()?;
    let job = Job::ordered(1, DATA, PAGE, 50);
    let mut full = 0;
    for _ in 0..10 {
        match vm.run(&job)? {
            Stop::Done => return Ok(Verdict::NotShown(format!("{counted} entries counted; the guest runs"))),
            Stop::RingFull => full += 1,
            Stop::Kicked => (),
        }
        vm.harvest();
        vm.reset()?;
    }
    Ok(Verdict::Shown(format!(
        "{UNSEEN} entries that KVM had not written were counted as {counted}; then {full} times in 10 \
         KVM_EXIT_DIRTY_RING_FULL, with all that was in the ring harvested and reset"
    )))
}
