//! Kernels of guests, and kernels of hosts.

use std::time::Duration;

use super::stage::{Guest, SHORT, SYNC, Side, Stage};
use super::{Context, ProofError, ensure};
use crate::nested::cluster::DATA;
use crate::nested::image::GuestKernel;
use crate::nested::kernel::Series;
use crate::nested::network::Net;

const IMAGE: &str = "small.img";
/// Time for two boots and a reboot.
const CYCLE: Duration = Duration::from_secs(240);
/// Time for a guest to count further.
const COUNT: Duration = Duration::from_secs(30);

/// Every kernel with one and two vCPUs: it boots, sees its devices, restarts, finds the data that it had
/// written, and switches off. Each host has a guest of its own, independent of the other.
pub(super) fn prove_guests(context: &Context<'_>) -> Result<(), ProofError> {
    let mut stage = Stage::new(context.workspace, context.fetch, &[Series::Bookworm; 2])?;
    for kernel in GuestKernel::ALL {
        let sides = [1, 2].map(|vcpus| start(&mut stage, vcpus as usize, kernel, vcpus));
        for (side, vcpus) in sides.into_iter().zip([1, 2]) {
            cycle(&stage, &side?, kernel, vcpus)?;
        }
    }
    Ok(())
}

fn start(stage: &mut Stage, host: usize, kernel: GuestKernel, vcpus: u32) -> Result<Side, ProofError> {
    stage.cluster.command(host, &format!("rm -f {DATA}/{IMAGE}* && truncate -s 16M {DATA}/{IMAGE}"))?;
    let guest =
        Guest { vcpus, disks: vec![IMAGE.into()], ..Guest::busybox(kernel, "outlive.end=cycle panic=-1") };
    stage.run(host, None, &guest)
}

fn cycle(stage: &Stage, side: &Side, kernel: GuestKernel, vcpus: u32) -> Result<(), ProofError> {
    let status = side.program.wait_for_end(CYCLE)?;
    let (log, name) = (side.program.log(), kernel.name());
    let wrong = |what: &str| format!("{name} with {vcpus} vCPUs: {what} ({status}); its log:\n{log}");
    ensure(status == 0, || wrong("did not switch off in order"))?;
    let processors = format!(", {vcpus} processors, network eth0 {}/{}", Net::guest(1), Net::PREFIX);
    for (expected, times) in [
        ("outlive guest is up: ", 2),
        (processors.as_str(), 2),
        ("disks: vda", 2),
        ("random: virtio_rng.0", 2),
        ("the disk says that this is the second time", 1),
    ] {
        let count = log.matches(expected).count();
        ensure(count == times, || wrong(&format!("'{expected}' is there {count} times, not {times}")))?;
    }
    ensure(side.all("guest_restarted").len() == 1, || wrong("did not restart once"))?;
    stage.say(&format!("{name} with {vcpus} vCPUs: up, disk, network, entropy, restarted, switched off"));
    Ok(())
}

/// Every kernel of a host: the guest is protected by the best that the kernel has, and survives.
pub(super) fn prove_hosts(context: &Context<'_>) -> Result<(), ProofError> {
    Series::ALL.into_iter().try_for_each(|series| pair(context, series))?;
    lesser(context)
}

/// A host whose processor lacks a feature refuses the guest, which runs on where it is.
fn lesser(context: &Context<'_>) -> Result<(), ProofError> {
    let mut stage = Stage::unequal(context.workspace, context.fetch, &[Series::Bookworm; 2], Some("adx"))?;
    let guest = Guest::busybox(GuestKernel::BookwormCloud, "outlive.end=count");
    let primary = stage.run(1, Some(2), &guest)?;
    stage.wait_until_up(&primary)?;
    let standby = stage.standby(2, None, &guest)?;
    standby.program.wait_for("features that this host lacks (CPUID leaf 0x7.0 EBX 0x80000)", SYNC)?;
    let counting = last_count(&primary.program.log()).unwrap_or(0);
    primary.program.wait("the count to go on", COUNT, || {
        last_count(&primary.program.log()).filter(|&count| count > counting + 2)
    })?;
    ensure(primary.all("protected").is_empty(), || "it is protected by a host that cannot run it".into())?;
    stage.say("a host whose processor lacks a feature refuses, and the guest goes on");
    Ok(())
}

fn pair(context: &Context<'_>, series: Series) -> Result<(), ProofError> {
    let mut stage = Stage::new(context.workspace, context.fetch, &[series; 2])?;
    for host in [1, 2] {
        stage.cluster.command(host, &format!("truncate -s 16M {DATA}/{IMAGE}"))?;
    }
    let guest =
        Guest { disks: vec![IMAGE.into()], ..Guest::busybox(GuestKernel::TrixieCloud, "outlive.end=count") };
    let [primary, standby] = stage.pair(&guest, "")?;
    let tracker = primary.wait_for("started", SHORT)?["tracker"].clone();
    let expected = if series == Series::Bullseye { "clear-log" } else { "ring" };
    ensure(tracker == expected, || format!("dirty pages are found with {tracker}, not {expected}"))?;
    let counting = last_count(&primary.program.log()).unwrap_or(0);
    let before = primary.program.wait("the count to go on while protected", COUNT, || {
        last_count(&primary.program.log()).filter(|&count| count > counting + 2)
    })?;
    stage.cut(1, &standby)?;
    let counted = standby.program.wait("the count to go on", COUNT, || {
        last_count(&standby.program.log()).filter(|&count| count > before + 2)
    })?;
    ensure(!standby.program.log().contains("Linux version"), || "the guest was booted again".into())?;
    let guest = Net::guest(1).to_string();
    let mut ping = stage.cluster.guest_client("ping");
    let answer = ping.args(["-c", "3", "-W", "5", &guest]).output();
    let answer = answer.map_err(|source| ProofError::Client { what: "ping".into(), source })?;
    ensure(answer.status.success(), || format!("the guest does not answer to ping: {answer:?}"))?;
    stage.say(&format!("{expected}: the guest had counted to {before}, and has gone on to {counted}"));
    Ok(())
}

pub(super) fn last_count(log: &str) -> Option<u64> {
    log.lines().rev().find_map(|line| line.trim().strip_prefix("count ")?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_found_among_other_lines() {
        assert_eq!(last_count("count 1\r\ncount 2\r\n[   3.1] random: ready\r\ncou"), Some(2));
        assert_eq!(last_count("discount 5\n"), None);
    }
}
