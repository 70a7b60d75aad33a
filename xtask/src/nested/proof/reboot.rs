//! systemd's `reboot` of a Debian server that has used its disk and its card: alone, protected, and after a
//! takeover. There is no `panic=` on its command line, so a kernel that does not come up stays down.

use std::time::Duration;

use super::stage::{BOOT, Guest, SHORT, Side, Stage, UP};
use super::{Context, ProofError, ensure};
use crate::nested::image::GuestKernel;
use crate::nested::kernel::Series;

/// Time for systemd to start all services.
const STARTED: Duration = Duration::from_secs(300);
const BOOT_ID: &str = "cat /proc/sys/kernel/random/boot_id";
/// A little later, so that the agent can answer.
const REBOOT: &str = "systemd-run --on-active=2 systemctl reboot";
/// Uses the disk and, by the answer, the card.
const USE: &str = "sync; dd if=/dev/vda of=/dev/null bs=1M count=16 iflag=direct 2>/dev/null; \
                   redis-cli ping; psql -U postgres -At -c 'SELECT count(*) FROM pgbench_accounts' postgres";
/// A guest boots several times as slowly while it is protected by emulated hosts.
const PROTECTED_BOOT: Duration = Duration::from_secs(1500);

pub(super) fn prove(context: &Context<'_>) -> Result<(), ProofError> {
    let mut stage = Stage::new(context.workspace, context.fetch, &[Series::Bookworm; 2])?;
    let guest = Guest::server(GuestKernel::BookwormCloud);
    let first = stage.run(1, Some(2), &guest)?;
    stage.wait_until_up(&first)?;
    reboot(&stage, &first, BOOT, "alone")?;

    let second = stage.standby(2, Some(1), &guest)?;
    stage.wait_until_protected(&first)?;
    reboot(&stage, &first, PROTECTED_BOOT, "protected")?;
    let lost = first.all("link_lost").len() + second.all("link_lost").len();
    ensure(lost == 0, || "the restart cost the protection".into())?;

    stage.cut(1, &second)?;
    reboot(&stage, &second, BOOT, "after a takeover")?;
    stage.press_power_button(&second)
}

/// Has the guest restart and checks that it is the same machine, up once more, after exactly one restart.
fn reboot(stage: &Stage, side: &Side, limit: Duration, how: &str) -> Result<(), ProofError> {
    stage.all_services_run()?;
    let servers = stage.in_guest(USE, SHORT)?;
    ensure(servers.trim() == "PONG\n100000", || format!("the servers say {servers}"))?;
    let ups = || side.program.log().matches(UP).count();
    let (before, restarts, id) = (ups(), side.all("guest_restarted").len(), stage.in_guest(BOOT_ID, SHORT)?);
    stage.in_guest(REBOOT, SHORT)?;
    side.program.wait("the guest's restart", STARTED, || {
        (side.all("guest_restarted").len() > restarts).then_some(())
    })?;
    side.program.wait("the guest to be up again", limit, || (ups() > before).then_some(()))?;
    stage.all_services_run()?;
    let (servers, other) = (stage.in_guest(USE, SHORT)?, stage.in_guest(BOOT_ID, SHORT)?);
    ensure(servers.trim() == "PONG\n100000", || format!("after the restart the servers say {servers}"))?;
    ensure(other != id, || "it is the same boot".into())?;
    let events = side.all("guest_restarted");
    ensure(events.len() == restarts + 1, || format!("it restarted {} times", events.len() - restarts))?;
    let asked = events.last().and_then(|event| event["how"].as_str()).unwrap_or_default().to_owned();
    ensure(!asked.is_empty(), || "nobody knows how it restarted".into())?;
    ensure(side.all("guest_panicked").is_empty(), || "its kernel panicked".into())?;
    stage.say(&format!("rebooted {how}, by {asked}: every service runs again"));
    Ok(())
}
