//! Which part this host has, with `--or-standby`: asked until it is certain.

use std::path::Path;
use std::time::{Duration, Instant};

use super::RunOptions;
use crate::arbiter;
use crate::disk::Part;

/// What a standby needs at most from the loss of its primary to its claim, beyond the silence that it waits for.
/// A host that is started again sooner would win the VM from its standby and boot it anew.
const TAKEOVER: Duration = Duration::from_secs(3);

/// Decides. A VM that another host may be about to take over is left to it for a while: then that host has a
/// running copy of what this one could only boot again.
///
/// # Errors
/// One line with the remedy.
pub(super) fn of(options: &RunOptions) -> Result<Part, String> {
    let now = Part::Starts { after: Duration::ZERO, may_be_taken_over: false };
    let Some(place) = options.arbiter.as_deref().filter(|_| options.or_standby) else { return Ok(now) };
    let written: Vec<&Path> =
        options.disks.iter().filter(|d| !d.readonly && !d.shared).map(|d| d.path.as_path()).collect();
    let mut arbiter = arbiter::parse(place).map_err(|e| e.to_string())?;
    let mut decide =
        || Part::decide(&written, arbiter.as_mut(), options.name.as_deref()).map_err(|e| e.to_string());
    let began = Instant::now();
    loop {
        let part = decide()?;
        let Part::Starts { after, may_be_taken_over } = &part else { return Ok(part) };
        let takeover = if *may_be_taken_over { TAKEOVER + options.active.dead_after } else { Duration::ZERO };
        let wait = (*after + takeover).saturating_sub(began.elapsed());
        if wait.is_zero() {
            return Ok(part);
        }
        if began.elapsed() < wait {
            let secs = wait.as_secs_f32();
            tracing::info!("this host starts the VM in {secs:.1} s, unless another one has it by then");
        }
        std::thread::sleep(wait);
    }
}
