//! A pending signal makes KVM_RESET_DIRTY_RINGS return between two entries (Linux 6.17). The entries of the
//! pages that it has gathered by then, up to 64, are cleared and counted, but the pages are never
//! write-protected.
// UNSAFETY: sets a timer and a handler that does nothing.
#![allow(unsafe_code)]

use std::io;
use std::time::{Duration, Instant};

use vmm_sys_util::signal::{block_signal, register_signal_handler, unblock_signal};

use crate::guest::{DATA, Job, PAGE};
use crate::ring::{RingVm, missed};
use crate::{Failure, Verdict};

const PAGES: u64 = 3000;
const EPOCHS: usize = 40;
/// An emulated host completes fewer.
const ENOUGH: Duration = Duration::from_secs(20);
/// More than 64 pages apart, so that each is a batch of its own.
const APART: u64 = 80 * PAGE;

pub(crate) fn run() -> Result<Verdict, Failure> {
    let Some(mut vm) = RingVm::new(1 << 30, 65_536, |_| Ok(()))? else {
        return Ok(Verdict::Skipped("no KVM with a dirty ring".into()));
    };
    register_signal_handler(libc::SIGALRM, nothing)?;
    let scattered = epochs(&mut vm, APART, false)?;
    let together = epochs(&mut vm, PAGE, false)?;
    let blocked = epochs(&mut vm, APART, true)?;
    let figures = format!(
        "signals come, pages apart:    {scattered}\nsignals come, pages together: {together}\n\
         signals blocked, pages apart: {blocked}"
    );
    let lost = scattered.missed + together.missed;
    if blocked.missed != 0 {
        return Err(format!("pages were missed without a signal\n{figures}").into());
    }
    if scattered.cut + together.cut == 0 {
        return Ok(Verdict::NotShown(format!("no call was cut short\n{figures}")));
    }
    Ok(if lost > 0 { Verdict::Shown(figures) } else { Verdict::NotShown(figures) })
}

extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// The result of some epochs.
struct Outcome {
    epochs: usize,
    /// Resets that returned before all was done.
    cut: usize,
    /// Pages that were written and not logged afterwards.
    missed: usize,
    most: usize,
    /// All counts added up to what was harvested.
    sums_right: bool,
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Outcome { epochs, cut, missed, most, sums_right } = self;
        let sums = if *sums_right { "added up" } else { "did NOT add up" };
        write!(f, "{epochs} epochs of {PAGES} pages, {cut} resets cut short, counts {sums}, ")?;
        write!(f, "{missed} written pages missed afterwards, at most {most} in an epoch")
    }
}

fn epochs(vm: &mut RingVm, stride: u64, blocked: bool) -> io::Result<Outcome> {
    let mut outcome = Outcome { epochs: 0, cut: 0, missed: 0, most: 0, sums_right: true };
    vm.begin_anew()?;
    let mut period = Duration::from_micros(50);
    let started = Instant::now();
    for epoch in 0..EPOCHS + 2 {
        if outcome.epochs >= 3 && started.elapsed() > ENOUGH {
            break;
        }
        let stamp = epoch as u64 * 2 + 1;
        // Every page is trapped here, and logged.
        vm.begin_anew()?;
        vm.run(&Job::ordered(stamp, DATA, stride, PAGES))?;
        let harvested = vm.harvest().len() as u64;
        if epoch < 2 {
            // How long a reset takes here, to send several signals during it.
            let begin = Instant::now();
            vm.reset()?;
            period = (begin.elapsed() / 10).max(Duration::from_micros(50));
            continue;
        }
        let (calls, reset) = reset_under_fire(vm, harvested, period, blocked)?;
        outcome.epochs += 1;
        outcome.cut += usize::from(calls > 1);
        outcome.sums_right &= reset == harvested;
        // And here every page should be there once more.
        let job = Job::ordered(stamp + 1, DATA, stride, PAGES);
        vm.run(&job)?;
        let listed = vm.harvest();
        vm.reset()?;
        let missed = missed(vm, &job, &listed);
        outcome.missed += missed;
        outcome.most = outcome.most.max(missed);
    }
    Ok(outcome)
}

/// Resets until all entries are counted, and returns how many calls that took.
fn reset_under_fire(vm: &RingVm, entries: u64, period: Duration, blocked: bool) -> io::Result<(u32, u64)> {
    let signal = |result: Result<(), _>| result.map_err(|_| io::Error::other("cannot block a signal"));
    if blocked {
        signal(block_signal(libc::SIGALRM))?;
    }
    set_timer(period)?;
    let (mut calls, mut sum) = (0, 0);
    while sum < entries && calls < 5000 {
        calls += 1;
        match vm.reset() {
            Ok(count) => sum += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => return Err(error),
        }
    }
    set_timer(Duration::ZERO)?;
    if blocked {
        signal(unblock_signal(libc::SIGALRM))?;
    }
    Ok((calls, sum))
}

fn set_timer(period: Duration) -> io::Result<()> {
    let time = libc::timeval { tv_sec: 0, tv_usec: period.subsec_micros().into() };
    let timer = libc::itimerval { it_interval: time, it_value: time };
    // SAFETY: reads the structure.
    match unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
