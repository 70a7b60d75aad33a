//! Debian boots the kernel of its own disk, and after an upgrade another one: protected, and after a takeover
//! on the other host.

use std::time::Duration;

use super::stage::{Guest, PATIENT, SHORT, Side, Stage, UP};
use super::{Context, ProofError, ensure};
use crate::nested::kernel::Series;

/// As `apt upgrade` leaves it: the files of the new kernel, and Debian's own update of the menu.
const INSTALL: &str = "cp /outlive/new-kernel/* /boot/ && update-grub && sync";
/// The old kernel as the default, as an administrator does it who does not like the new one.
const BACK: &str = "set -e; id=$(grep -o 'gnulinux-advanced-[^'\"'\"']*' /boot/grub/grub.cfg | head -n 1); \
                    old=$(grep -o 'gnulinux-6[.]1[.][^'\"'\"']*-advanced-[^'\"'\"']*' /boot/grub/grub.cfg | head -n 1); \
                    grub-set-default \"$id>$old\"; sync; grub-editenv list";
/// A little later, so that the agent can answer. File systems are unmounted as by systemd at its end.
const REBOOT: &str = "(sleep 2; sync; echo u >/proc/sysrq-trigger; sleep 3; reboot -f) >/dev/null 2>&1 &";
/// `update-grub` under two emulations.
const LONG: Duration = Duration::from_secs(600);
/// Time for the guest to stop.
const STOPPED: Duration = Duration::from_secs(400);
/// A guest boots several times as slowly while it is protected by emulated hosts.
const ANY_BOOT: Duration = Duration::from_secs(1500);

pub(super) fn prove(context: &Context<'_>) -> Result<(), ProofError> {
    let mut stage = Stage::new(context.workspace, context.fetch, &[Series::Bookworm; 2])?.dead_after(PATIENT);
    let guest = Guest::own_kernel();
    let first = stage.run(1, Some(2), &guest)?;
    first.program.wait_for(UP, ANY_BOOT)?;
    stage.say("the guest is up");
    runs(&stage, &first, "6.1.", "as its disk says at the start")?;

    let second = stage.standby(2, Some(1), &guest)?;
    stage.wait_until_protected(&first)?;
    stage.in_guest(INSTALL, LONG)?;
    stage.say("the guest has installed another kernel");
    reboot(&stage, &first)?;
    runs(&stage, &first, "6.12.", "the new one after a protected reboot")?;
    let lost = first.all("link_lost").len() + second.all("link_lost").len();
    ensure(lost == 0, || "the restart cost the protection".into())?;

    let default = stage.in_guest(BACK, LONG)?;
    ensure(default.contains("saved_entry=gnulinux-advanced-"), || format!("grubenv has {default}"))?;
    // The standby must have the choice on its disk before its host is alone with it.
    stage.in_guest("sync; sleep 5", SHORT)?;
    stage.cut(1, &second)?;
    reboot(&stage, &second)?;
    runs(&stage, &second, "6.1.", "the old one again after a takeover")?;
    for side in [&first, &second] {
        let last = side.all("boots_last_kernel");
        ensure(last.is_empty(), || format!("a disk could not be read: {last:?}"))?;
    }
    stage.press_power_button(&second)
}

/// Checks which kernel the guest runs, and that it is the one that the host says it has read.
fn runs(stage: &Stage, side: &Side, version: &str, how: &str) -> Result<(), ProofError> {
    let release = stage.in_guest("uname -r", SHORT)?;
    let release = release.trim();
    ensure(release.starts_with(version), || format!("it runs {release}, not {version}*"))?;
    let event = side.all("boots_from_disk").pop().unwrap_or_default();
    let kernel = event["kernel"].as_str().unwrap_or_default();
    ensure(kernel == format!("/boot/vmlinuz-{release}"), || format!("the host has read {event}"))?;
    let line = stage.in_guest("cat /proc/cmdline", SHORT)?;
    ensure(line.trim() == event["command_line"].as_str().unwrap_or_default(), || {
        format!("the command line is '{line}', and the host says {event}")
    })?;
    stage.say(&format!("it runs {release}: {how}"));
    Ok(())
}

/// Has the guest restart and waits until it is up.
fn reboot(stage: &Stage, side: &Side) -> Result<(), ProofError> {
    let ups = || side.program.log().matches(UP).count();
    let (before, restarts) = (ups(), side.all("guest_restarted").len());
    stage.in_guest(REBOOT, SHORT)?;
    side.program.wait("the guest's restart", STOPPED, || {
        (side.all("guest_restarted").len() > restarts).then_some(())
    })?;
    side.program.wait("the guest to be up again", ANY_BOOT, || (ups() > before).then_some(()))?;
    Ok(())
}
