//! The self-check: after every so many checkpoints both hosts compare all memory and all disks.

use std::thread;
use std::time::Duration;

use super::postgres::Load;
use super::stage::{Guest, Side, Stage};
use super::{Context, ProofError, ensure};
use crate::nested::cluster::DATA;
use crate::nested::image::GuestKernel;
use crate::nested::kernel::Series;

const IMAGE: &str = "small.img";
/// Checkpoints between two comparisons, for a guest that boots: it has few.
const EVERY: &str = "--self-check 20";
/// The same for a guest that writes little.
const OFTEN: &str = "--self-check 4";
/// The same for a database, whose disk rests while it is hashed.
const SELDOM: &str = "--self-check 100";
/// Comparisons of the database, the time that they may take, and the transactions that must complete between
/// them.
const COMPARISONS: usize = 3;
const LOAD: Duration = Duration::from_secs(600);
const TRANSACTIONS: u64 = 20;
const REST: Duration = Duration::from_secs(25);

pub(super) fn prove(context: &Context<'_>) -> Result<(), ProofError> {
    over_a_boot(context)?;
    of_a_guest_at_rest(context)?;
    over_a_load(context)
}

/// Protected from the first instruction on.
fn over_a_boot(context: &Context<'_>) -> Result<(), ProofError> {
    let mut stage = Stage::new(context.workspace, context.fetch, &[Series::Bookworm; 2])?;
    for host in [1, 2] {
        stage.cluster.command(host, &format!("truncate -s 16M {DATA}/{IMAGE}"))?;
    }
    let guest = Guest {
        disks: vec![IMAGE.into()],
        options: EVERY,
        ..Guest::busybox(GuestKernel::BookwormGeneric, "outlive.end=count")
    };
    let standby = stage.standby(2, None, &guest)?;
    let primary = stage.run(1, Some(2), &guest)?;
    stage.wait_until_protected(&primary)?;
    stage.wait_until_up(&primary)?;
    equal(&stage, &standby, 2)
}

/// Protected long after the boot: the guest does not overwrite memory that the standby's trial restore
/// changed in the copy, as it would while it boots.
fn of_a_guest_at_rest(context: &Context<'_>) -> Result<(), ProofError> {
    let mut stage = Stage::new(context.workspace, context.fetch, &[Series::Bookworm; 2])?;
    let guest = Guest { options: OFTEN, ..Guest::busybox(GuestKernel::BookwormCloud, "outlive.end=count") };
    let [_primary, standby] = stage.pair(&guest, "")?;
    thread::sleep(REST);
    equal(&stage, &standby, 2)
}

fn over_a_load(context: &Context<'_>) -> Result<(), ProofError> {
    let mut stage = Stage::new(context.workspace, context.fetch, &[Series::Bookworm; 2])?;
    let guest = Guest { options: SELDOM, ..Guest::debian(GuestKernel::TrixieCloud, "postgres") };
    let [_primary, standby] = stage.pair(&guest, "")?;
    let load = Load::start(&stage)?;
    let enough = || (standby.all("self_check").len() >= COMPARISONS).then_some(());
    standby.program.wait("comparisons", LOAD, enough)?;
    let acknowledged = load.end(&stage)?;
    ensure(acknowledged >= TRANSACTIONS, || {
        format!("only {acknowledged} transactions between the comparisons: too few to prove anything")
    })?;
    equal(&stage, &standby, COMPARISONS)
}

fn equal(stage: &Stage, standby: &Side, at_least: usize) -> Result<(), ProofError> {
    let checks = standby.all("self_check");
    let different = checks.iter().find(|check| !check["difference"].is_null());
    ensure(different.is_none(), || format!("the hosts' copies differ: {different:?}"))?;
    ensure(checks.len() >= at_least, || format!("there were only {} comparisons", checks.len()))?;
    stage.say(&format!("{} comparisons of all memory and disks, no difference", checks.len()));
    Ok(())
}
