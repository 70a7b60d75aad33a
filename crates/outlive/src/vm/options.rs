//! From the command line to the machine's options.

use outlive_epoch::VmId;
use outlive_machine::{DiskOptions, MacAddr, NetConfig, OutputLimits};

use crate::cli::{DiskSpec, NetSpec};

/// How many frames and bytes of output may be held for uncommitted epochs.
const OUTPUT_LIMITS: OutputLimits = OutputLimits { frames: 16_384, bytes: 16 << 20 };

/// A network card's options.
pub(crate) fn card(net: &NetSpec, mac: MacAddr) -> NetConfig {
    NetConfig { tap: net.tap.clone(), mac, pairs: net.queues.into(), limits: OUTPUT_LIMITS }
}

/// A disk's options.
pub(crate) fn disk_options(spec: &DiskSpec) -> DiskOptions {
    let DiskSpec { path, readonly, shared, serial, queues } = spec.clone();
    DiskOptions { readonly, shared, serial, queues: queues.into(), ..DiskOptions::new(path) }
}

/// The card's address: the given one, or one made of the VM's id (locally administered, so it cannot collide
/// with a vendor's).
pub(crate) fn mac_of(net: Option<&NetSpec>, vm: VmId) -> MacAddr {
    let [a, b, c, d, e, ..] = vm.0;
    MacAddr(net.and_then(|n| n.mac).unwrap_or([0x02, a, b, c, d, e]))
}
