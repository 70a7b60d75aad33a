//! A server as Debian installs it: its own kernel, its own initrd, systemd with all services, and only
//! `console=` and `root=` on the command line (and an address, which a server has in its files).

use super::stage::{Guest, SHORT, Stage};
use super::{Context, ProofError, ensure};
use crate::nested::image::GuestKernel;
use crate::nested::kernel::Series;

/// Values that stay the same until the next boot.
const BOOT: &str = "cat /proc/sys/kernel/random/boot_id; systemctl show --value -p InvocationID redis-server postgresql@15-main";
const DEVICES: &str = "cat /sys/class/misc/hw_random/rng_current; ls /sys/block | tr '\\n' ' '; \
                       ls /sys/class/net | tr '\\n' ' '; ls /dev/hvc0 /dev/ttyS0 | tr '\\n' ' '";
const SERVERS: &str =
    "redis-cli ping; psql -U postgres -At -c 'SELECT count(*) FROM pgbench_accounts' postgres";

pub(super) fn prove(context: &Context<'_>) -> Result<(), ProofError> {
    let mut stage = Stage::new(context.workspace, context.fetch, &[Series::Bookworm; 2])?;
    let guest = Guest::server(GuestKernel::BookwormGeneric);
    let first = stage.run(1, Some(2), &guest)?;
    stage.wait_until_up(&first)?;
    stage.all_services_run()?;
    let devices = stage.in_guest(DEVICES, SHORT)?;
    for expected in ["virtio_rng.0", "vda", "eth0", "/dev/hvc0", "/dev/ttyS0"] {
        ensure(devices.contains(expected), || format!("there is no {expected} among {devices}"))?;
    }
    stage.say("all services of Debian run, all devices are there");

    let second = stage.standby(2, Some(1), &guest)?;
    stage.wait_until_protected(&first)?;
    let (boot, servers) = (stage.in_guest(BOOT, SHORT)?, stage.in_guest(SERVERS, SHORT)?);
    ensure(servers.trim() == "PONG\n100000", || format!("the servers say {servers}"))?;
    stage.cut(1, &second)?;
    let after = (stage.in_guest(BOOT, SHORT)?, stage.in_guest(SERVERS, SHORT)?);
    ensure(after == (boot, servers), || format!("it is not the same boot: {after:?}"))?;
    stage.all_services_run()?;
    stage.say("the same boot, no service was started again or has failed");
    stage.press_power_button(&second)
}
