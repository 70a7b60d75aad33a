//! From the command line to the machine's options.

use std::net::Ipv4Addr;
use std::sync::Arc;

use outlive_epoch::VmId;
use outlive_machine::{DiskOptions, MacAddr, NetConfig, OutputLimits, Tap};

use super::Card;
use crate::cli::{DiskSpec, NetSpec};
use crate::disk::Held;

/// How many frames and bytes of output may be held for uncommitted epochs.
const OUTPUT_LIMITS: OutputLimits = OutputLimits { frames: 16_384, bytes: 16 << 20 };

/// A network card's options.
pub(crate) fn card(net: &NetSpec, tap: Arc<Tap>, mac: MacAddr) -> NetConfig {
    NetConfig { tap: Some(tap), mac, pairs: net.queues.into(), mtu: net.mtu, limits: OUTPUT_LIMITS }
}

/// The options of a card that is connected to nothing.
pub(crate) fn card_without_network(seen: Card, mac: MacAddr) -> NetConfig {
    NetConfig { tap: None, mac, pairs: seen.pairs, mtu: seen.wiring.mtu, limits: OUTPUT_LIMITS }
}

/// A disk's options; its image is handed over if it is held.
pub(crate) fn disk_options(spec: &DiskSpec, held: &Held) -> DiskOptions {
    let DiskSpec { path, readonly, shared, serial, sectors, queues, .. } = spec.clone();
    let locked = held.at(&path).cloned();
    DiskOptions { readonly, shared, serial, sectors, queues: queues.into(), locked, ..DiskOptions::new(path) }
}

/// The card's address: the given one, or one that is locally administered, so it cannot collide with a
/// vendor's. A Linux guest's is made of the VM's id, which its images keep. The built-in guest has no image, so
/// its VM is a new one at each start; it never announces itself either. So its address is made of its IPv4
/// address, and who has talked to it before a restart still reaches it. (Two VMs with one such address would
/// have one IPv4 address as well.)
pub(crate) fn mac_of(net: Option<&NetSpec>, vm: VmId, built_in: Option<Ipv4Addr>) -> MacAddr {
    let made = || match (built_in.map(|address| address.octets()), vm.0) {
        (Some([a, b, c, d]), _) => [0x02, 0x00, a, b, c, d],
        (None, [a, b, c, d, e, ..]) => [0x02, a, b, c, d, e],
    };
    MacAddr(net.and_then(|n| n.mac).unwrap_or_else(made))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_guest_keeps_its_address_over_a_restart() {
        let (one, other) = (VmId([1; 16]), VmId([2; 16]));
        let card: NetSpec = "tap=t0".parse().unwrap();
        let given: NetSpec = "tap=t0,mac=06:00:00:00:00:09".parse().unwrap();
        let at = |last| Some(Ipv4Addr::new(10, 77, 0, last));
        assert_eq!(mac_of(Some(&card), one, at(2)), mac_of(Some(&card), other, at(2)));
        assert_ne!(mac_of(Some(&card), one, at(2)), mac_of(Some(&card), one, at(3)));
        assert_ne!(mac_of(Some(&card), one, None), mac_of(Some(&card), other, None), "Linux");
        assert_eq!(mac_of(Some(&given), one, at(2)), MacAddr([6, 0, 0, 0, 0, 9]));
        for mac in [mac_of(None, one, at(2)), mac_of(None, one, None)] {
            assert_eq!(mac.0[0] & 3, 2, "locally administered, unicast");
        }
    }
}
