//! Takeovers at random moments of a guest's boot: every guest reaches user space. Both sides are processes of
//! one host, and the one that runs the guest is killed, again and again during one boot.

use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::kernels::last_count;
use super::stage::{BOOT, Guest, SYNC, Side, Stage, TAKEOVER, UP};
use super::{Context, ProofError};
use crate::nested::cluster::DATA;
use crate::nested::image::GuestKernel;
use crate::nested::kernel::Series;

const IMAGES: [&str; 2] = ["even.img", "odd.img"];
/// Longest time from a base checkpoint to the kill.
const LATEST_MS: u64 = 4000;

pub(super) fn prove(context: &Context<'_>) -> Result<(), ProofError> {
    let mut stage = Stage::new(context.workspace, context.fetch, &[Series::Bookworm])?;
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |it| it.subsec_nanos().into());
    stage.say(&format!("seed {seed}"));
    let mut random = fastrand::Rng::with_seed(seed);
    let mut restored = 0;
    for kernel in GuestKernel::ALL.into_iter().cycle() {
        if restored >= context.restores {
            break;
        }
        restored += boot(&mut stage, kernel, &mut random)?;
        stage.say(&format!("{}: in user space; {restored} takeovers so far", kernel.name()));
    }
    Ok(())
}

/// One boot, with as many takeovers as fit. Returns how many there were.
fn boot(stage: &mut Stage, kernel: GuestKernel, random: &mut fastrand::Rng) -> Result<u32, ProofError> {
    for image in IMAGES {
        stage.cluster.command(1, &format!("rm -f {DATA}/{image}* && truncate -s 16M {DATA}/{image}"))?;
    }
    let guest = Guest::busybox(kernel, "outlive.end=count");
    let mut number = 0;
    let mut active = stage.run_local(&guest, IMAGES[0], number)?;
    loop {
        number += 1;
        let standby = stage.standby_local(IMAGES[number as usize % 2], number)?;
        active.wait_for("protected", SYNC)?;
        thread::sleep(Duration::from_millis(random.u64(0..LATEST_MS)));
        let is_up = active.program.log().contains(UP);
        stage.cluster.signal(&active.program, "KILL")?;
        standby.wait_for("takeover", TAKEOVER)?;
        active = standby;
        if is_up {
            break;
        }
    }
    goes_on(&active)?;
    stage.cluster.signal(&active.program, "KILL")?;
    Ok(number.into())
}

/// Waits until the guest counts.
fn goes_on(side: &Side) -> Result<(), ProofError> {
    let first = side.program.wait("a count", BOOT, || last_count(&side.program.log()))?;
    let higher = || last_count(&side.program.log()).filter(|&count| count > first + 1);
    side.program.wait("the count to go on", BOOT, higher)?;
    Ok(())
}
