//! The place of a VM's card in the host's network: a tap, and the bridge that it joins.
//!
//! The bridge carries other traffic, so it must be after the VM what it was before:
//!
//! * **MTU.** A bridge whose MTU nobody has set follows its smallest port. So the tap gets the bridge's MTU before it
//!   is attached.
//! * **Address.** A bridge whose address nobody has set takes the lowest address of its ports, and a host whose
//!   bridge changes its address loses its connections. So the tap gets an address that begins with `fe`, higher than
//!   those of cards and of other virtual machines. If the bridge would take even that, because no port has a lower
//!   one, its present address is given to it for good.
//! * **VLAN.** The port is in its VLAN, and out of the bridge's default one, before it is switched on.
//!
//! A tap that was there before belongs to somebody else: nothing of it is changed, except that it is attached and
//! switched on if it is not. Unless it has gone meanwhile: a tap that belonged to a copy of the VM that this process
//! is just discarding gives way to a new one of the same name.

use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_epoch::Wiring;
use outlive_machine::Tap;
use outlive_machine::devices::virtio::net::TapError;

use super::NoRandom;
use crate::cli::NetSpec;
use crate::network::{Link, Netlink, NetlinkError};
use crate::process;
use crate::sandbox::{self, StewardError};

/// The MTU of Ethernet.
const USUAL_MTU: u32 = 1500;
/// A process that has just ended may have a sentinel that still sends [strays](crate::strays) after
/// the guest.
const FOLLOWING: Duration = Duration::from_secs(1);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// The first byte of a tap's address: the highest that is locally administered and not multicast.
const HIGH: u8 = 0xfe;

/// Why a card cannot have its place.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PlaceError {
    /// The kernel does not tell, or does not change something.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The bridge would follow the tap's MTU.
    #[error(
        "the tap {tap} has an MTU of {has} and would reduce that of the bridge {bridge}, which is {wide}: set it \
         first, with `ip link set {tap} mtu {wide}`"
    )]
    NarrowTap { tap: String, has: u32, bridge: String, wide: u32 },
    /// The guest would send larger frames than the network takes.
    #[error(
        "the VM's card has mtu={told}, but {narrow} carries {has} bytes at most: set it and the network behind it to \
         {told} (`ip link set {narrow} mtu {told}`), or give outlive run a smaller mtu="
    )]
    NarrowNetwork { told: u32, narrow: String, has: u32 },
    /// There is no bridge to be in a VLAN of.
    #[error("the VM's card is in VLAN {0} of a bridge: give --net bridge=NAME")]
    NoBridge(u16),
    /// A tap that somebody else has made keeps its VLAN.
    #[error(
        "the tap {tap} was there before and stays as it is, so vlan={vlan} cannot be set: delete it, or set its \
         VLAN yourself (`bridge vlan add dev {tap} vid {vlan} pvid untagged`) and leave vlan= out"
    )]
    VlanOfOthers { tap: String, vlan: u16 },
    /// The bridge has no VLANs.
    #[error(
        "the VM's card is in VLAN {vlan}, but the bridge {bridge} does not look at VLANs: switch that on with \
         `ip link set {bridge} type bridge vlan_filtering 1`"
    )]
    NoVlans { vlan: u16, bridge: String },
    /// A new tap would have no address.
    #[error(transparent)]
    NoRandom(#[from] NoRandom),
}

/// Why the VM's card has no tap here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CardError {
    /// It has no place in the network.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// There is no tap for it.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The one who has the rights says why.
    #[error(transparent)]
    Steward(#[from] StewardError),
}

/// Opens the tap of a card with this many queue pairs, and puts it into its place. The steward does it, if there is
/// one.
///
/// # Errors
/// See [`CardError`].
pub(crate) fn open_card(net: &NetSpec, pairs: u16, wiring: Wiring) -> Result<Arc<Tap>, CardError> {
    let tap = match sandbox::steward() {
        Some(steward) => steward.card(&net.tap, pairs, wiring)?,
        None => place_card(net, pairs, wiring)?,
    };
    Ok(Arc::new(tap))
}

/// The same with this process' own rights.
///
/// # Errors
/// See [`CardError`].
pub(crate) fn place_card(net: &NetSpec, pairs: u16, wiring: Wiring) -> Result<Tap, CardError> {
    let until = Instant::now() + FOLLOWING;
    loop {
        match place_now(net, pairs, wiring) {
            Err(
                CardError::Tap(TapError::Busy { .. }) | CardError::Place(PlaceError::VlanOfOthers { .. }),
            ) if Instant::now() < until => {
                std::thread::sleep(LOOK_AGAIN);
            }
            placed => return placed,
        }
    }
}

fn place_now(net: &NetSpec, pairs: u16, wiring: Wiring) -> Result<Tap, CardError> {
    let place = TapPlace::look(net, wiring)?;
    let tap = Tap::with_queues(&net.tap, pairs)?;
    place.join()?;
    Ok(tap)
}

/// A card's place, which was looked at before its tap was opened; see the module.
struct TapPlace {
    netlink: Netlink,
    tap: String,
    wiring: Wiring,
    /// The tap, if it was there.
    before: Option<Link>,
    bridge: Option<Link>,
}

impl TapPlace {
    /// Looks at the place of a card that is to be wired like this. The tap is not opened yet.
    ///
    /// # Errors
    /// See [`PlaceError`].
    fn look(net: &NetSpec, wiring: Wiring) -> Result<Self, PlaceError> {
        let mut netlink = Netlink::open()?;
        let before = match netlink.link(&net.tap) {
            Ok(link) => Some(link),
            Err(NetlinkError::NoInterface { .. }) => None,
            Err(other) => return Err(other.into()),
        };
        let bridge = match &net.bridge {
            Some(name) => Some(netlink.bridge(&net.tap, name)?),
            None => None,
        };
        let place = Self { netlink, tap: net.tap.clone(), wiring, before, bridge };
        place.check_mtu()?;
        place.check_vlan()?;
        Ok(place)
    }

    /// The MTU that the tap is to have.
    fn mtu(&self) -> u32 {
        let told = self.wiring.mtu.map_or(USUAL_MTU, u32::from);
        self.before.as_ref().or(self.bridge.as_ref()).map_or(told, |link| link.mtu)
    }

    fn check_mtu(&self) -> Result<(), PlaceError> {
        let (tap, has) = (&self.tap, self.mtu());
        if let Some(bridge) = self.bridge.as_ref().filter(|bridge| !self.is_port_of(bridge))
            && has < bridge.mtu
        {
            let (tap, bridge, wide) = (tap.clone(), bridge.name.clone(), bridge.mtu);
            return Err(PlaceError::NarrowTap { tap, has, bridge, wide });
        }
        match self.wiring.mtu.map(u32::from) {
            Some(told) if told > has => {
                let narrow = self.before.as_ref().or(self.bridge.as_ref()).map_or(tap, |link| &link.name);
                Err(PlaceError::NarrowNetwork { told, narrow: narrow.clone(), has })
            }
            _ => Ok(()),
        }
    }

    fn check_vlan(&self) -> Result<(), PlaceError> {
        let Some(vlan) = self.wiring.vlan else { return Ok(()) };
        let bridge = self.bridge.as_ref().ok_or(PlaceError::NoBridge(vlan))?;
        if self.before.is_some() {
            return Err(PlaceError::VlanOfOthers { tap: self.tap.clone(), vlan });
        }
        if !bridge.vlans.filtering {
            return Err(PlaceError::NoVlans { vlan, bridge: bridge.name.clone() });
        }
        Ok(())
    }

    fn is_port_of(&self, bridge: &Link) -> bool {
        self.before.as_ref().is_some_and(|tap| tap.bridge == Some(bridge.index))
    }

    /// Puts the tap, which is open now, into its place, and switches it on.
    ///
    /// # Errors
    /// See [`PlaceError`].
    fn join(mut self) -> Result<(), PlaceError> {
        // As it is now, and only if it is still the same: the kernel gives no number twice.
        let now = self.netlink.link(&self.tap)?;
        self.before = self.before.take().filter(|before| before.index == now.index).map(|_| now);
        if self.before.is_none() {
            self.prepare()?;
        }
        if let Some(bridge) = self.bridge.take() {
            // What an administrator has set up already needs no rights of ours.
            if !self.is_port_of(&bridge) {
                self.keep_address(&bridge)?;
                self.netlink.attach(&self.tap, &bridge.name)?;
            }
            self.enter_vlan(&bridge)?;
        }
        if self.before.as_ref().is_some_and(|tap| tap.up) {
            return Ok(());
        }
        Ok(self.netlink.set_up(&self.tap)?)
    }

    /// Gives a new tap its MTU and its address.
    fn prepare(&mut self) -> Result<(), PlaceError> {
        let mtu = self.mtu();
        let tap = self.netlink.link(&self.tap)?;
        if tap.mtu != mtu {
            self.netlink.set_mtu(&self.tap, mtu)?;
        }
        // Random, because the taps of both hosts are in one network.
        let tail = process::random::<5>().map_err(NoRandom)?;
        let mut mac = [HIGH; 6];
        mac[1..].copy_from_slice(&tail);
        Ok(self.netlink.set_mac(&self.tap, mac)?)
    }

    /// Keeps a bridge from taking the tap's address, before it is attached.
    fn keep_address(&mut self, bridge: &Link) -> Result<(), PlaceError> {
        let (Some(own), links) = (bridge.mac, self.netlink.links()?) else { return Ok(()) };
        let tap = links.iter().find(|link| link.name == self.tap).and_then(|link| link.mac);
        let ports = links.iter().filter(|link| link.bridge == Some(bridge.index));
        let lowest = ports.filter_map(|port| port.mac).min();
        if tap.is_some_and(|tap| lowest.is_none_or(|lowest| tap < lowest)) {
            self.netlink.set_mac(&bridge.name, own)?;
        }
        Ok(())
    }

    fn enter_vlan(&mut self, bridge: &Link) -> Result<(), PlaceError> {
        let Some(vlan) = self.wiring.vlan else { return Ok(()) };
        self.netlink.set_port_vlan(&self.tap, vlan)?;
        let default = bridge.vlans.default_pvid;
        if default != 0 && default != vlan {
            self.netlink.remove_port_vlan(&self.tap, default)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use outlive_machine::Tap;

    use super::*;
    use crate::network::Namespace;

    fn card() -> NetSpec {
        "tap=vm0,bridge=br0".parse().unwrap()
    }

    fn link(name: &str) -> Link {
        Netlink::open().unwrap().link(name).unwrap()
    }

    /// Runs in a network with a bridge.
    fn beside_a_bridge(work: impl FnOnce() + Send) {
        let Ok(namespace) = Namespace::new() else { return println!("skipped: no network namespaces") };
        let ready = || Netlink::open().and_then(|mut netlink| netlink.create_bridge("br0")).unwrap();
        namespace.run(|| (ready(), work())).unwrap();
    }

    #[test]
    fn a_new_tap_takes_the_place_of_one_that_goes_after_the_look() {
        beside_a_bridge(|| {
            let first = TapPlace::look(&card(), Wiring::default()).unwrap();
            let old = Tap::open("vm0").unwrap();
            first.join().unwrap();
            let next = TapPlace::look(&card(), Wiring::default()).unwrap();
            drop(old);
            let _new = Tap::open("vm0").unwrap();
            assert!(!link("vm0").up, "it is another one");
            next.join().unwrap();
            let tap = link("vm0");
            assert!(tap.up);
            assert_eq!(tap.bridge, Some(link("br0").index));
            assert_eq!(tap.mac.unwrap()[0], HIGH);
        });
    }

    #[test]
    fn a_tap_of_somebody_else_keeps_its_address() {
        beside_a_bridge(|| {
            let _theirs = Tap::with_queues("vm0", 2).unwrap();
            let mac = [2, 0, 0, 0, 0, 7];
            Netlink::open().unwrap().set_mac("vm0", mac).unwrap();
            let place = TapPlace::look(&card(), Wiring::default()).unwrap();
            let _ours = Tap::with_queues("vm0", 2).unwrap();
            place.join().unwrap();
            let tap = link("vm0");
            assert!(tap.up && tap.bridge.is_some());
            assert_eq!(tap.mac, Some(mac));
        });
    }
}
