//! Which part this host has, with `--or-standby`: asked until it is certain.

use std::time::{Duration, Instant};

use super::RunOptions;
use crate::arbiter::ArbiterSpecError;
use crate::disk::{self, Part, STUCK};
use crate::link::Security;
use crate::primary::{Answer, ask};
use crate::vm::Stops;
use crate::{arbiter, notify};

/// What a standby usually needs from the loss of its primary to its claim, beyond the silence that it waits for.
/// A host that is started again sooner would win the VM from its standby and boot it anew.
const TAKEOVER: Duration = Duration::from_secs(3);
/// What it needs at most: disks and applier that take longer count as stuck, and it gives up.
const SLOW_TAKEOVER: Duration = STUCK.saturating_add(TAKEOVER);
/// Time between two questions.
const AGAIN: Duration = Duration::from_millis(500);

/// Why the part of this host is unknown.
#[derive(Debug, thiserror::Error)]
pub(super) enum PartError {
    /// The option `--arbiter` is wrong.
    #[error(transparent)]
    Place(#[from] ArbiterSpecError),
    /// Images and arbiter do not say.
    #[error(transparent)]
    Undecided(#[from] disk::PartError),
    /// An operator wants it so.
    #[error("told to stop while it was not decided which host starts the VM: nothing was changed")]
    Stopped,
}

/// Decides. A VM that another host may be about to take over is left to it for a while: then that host has a
/// running copy of what this one could only boot again. `tell` hears what is waited for, and an order to stop ends it.
///
/// # Errors
/// See [`PartError`].
pub(super) fn of(options: &RunOptions, stops: &Stops, tell: impl Fn(&str)) -> Result<Part, PartError> {
    let now = Part::Starts { after: Duration::ZERO, may_be_taken_over: false };
    let Some(place) = options.arbiter.as_deref().filter(|_| options.or_standby) else { return Ok(now) };
    let written = options.written();
    let mut arbiter = arbiter::parse(place)?;
    let mut decide = || Part::decide(&written, arbiter.as_mut(), options.name.as_deref());
    let began = Instant::now();
    let mut said = None;
    loop {
        let part = decide()?;
        if stops.was_used() {
            return Err(PartError::Stopped);
        }
        let Part::Starts { after, may_be_taken_over } = &part else { return Ok(part) };
        let (mut wait, mut why) = (*after, None);
        // The question comes after the decision: whoever has not won the VM by then, and says that it is not
        // about to, does not win it later.
        if *may_be_taken_over {
            let (takeover, slow) = takeover(&options.active.standbys, &options.active.security());
            (wait, why) = (wait + takeover + options.active.dead_after, slow);
        }
        let left = wait.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Ok(part);
        }
        if said.replace(why.clone()) != Some(why.clone()) {
            let (secs, why) = (left.as_secs_f32(), why.map_or_else(String::new, |why| format!(": {why}")));
            let now =
                format!("this host starts the VM in {secs:.1} s, unless another one has it by then{why}");
            tracing::info!("{now}");
            tell(&now);
        }
        // A standby whose guest has crashed asks, too.
        notify::alive();
        std::thread::sleep(left.min(AGAIN));
    }
}

/// How long the other hosts may take to take a VM over, and why that may be long.
fn takeover(others: &[String], security: &Security) -> (Duration, Option<String>) {
    let slow = others.iter().find_map(|address| match ask(address, security) {
        Answer::Idle => None,
        Answer::Busy(why) => Some(format!("{address} may be taking it over: {why}")),
        Answer::Unknown(why) | Answer::Unreachable(why) => {
            Some(format!("{address} may be taking it over and does not say: {why}"))
        }
    });
    match slow {
        None if others.is_empty() => {
            (SLOW_TAKEOVER, Some("no --standby says whether it is taking the VM over".into()))
        }
        None => (TAKEOVER, None),
        why => (SLOW_TAKEOVER, why),
    }
}
