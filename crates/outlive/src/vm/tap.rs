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
//! switched on if it is not.

use super::no_random;
use crate::cli::NetSpec;
use crate::network::{Link, Netlink, NetlinkError};
use crate::process;
use outlive_epoch::Wiring;

/// The MTU of Ethernet.
const USUAL_MTU: u32 = 1500;
/// The first byte of a tap's address: the highest that is locally administered and not multicast.
const HIGH: u8 = 0xfe;

/// A card's place, which was looked at before its tap was opened; see the module.
pub(crate) struct TapPlace {
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
    /// One line with the remedy.
    pub(crate) fn look(net: &NetSpec, wiring: Wiring) -> Result<Self, String> {
        let mut netlink = Netlink::open().map_err(text)?;
        let before = match netlink.link(&net.tap) {
            Ok(link) => Some(link),
            Err(NetlinkError::NoInterface { .. }) => None,
            Err(other) => return Err(text(other)),
        };
        let bridge = match &net.bridge {
            Some(name) => Some(netlink.bridge(&net.tap, name).map_err(text)?),
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

    fn check_mtu(&self) -> Result<(), String> {
        let (tap, has) = (&self.tap, self.mtu());
        if let Some(bridge) = self.bridge.as_ref().filter(|bridge| !self.is_port_of(bridge))
            && has < bridge.mtu
        {
            return Err(format!(
                "the tap {tap} has an MTU of {has} and would reduce that of the bridge {}, which is {}: set it \
                 first, with `ip link set {tap} mtu {}`",
                bridge.name, bridge.mtu, bridge.mtu
            ));
        }
        match self.wiring.mtu.map(u32::from) {
            Some(told) if told > has => {
                let narrow = self.before.as_ref().or(self.bridge.as_ref()).map_or(tap, |link| &link.name);
                Err(format!(
                    "the VM's card has mtu={told}, but {narrow} carries {has} bytes at most: set it and the network \
                     behind it to {told} (`ip link set {narrow} mtu {told}`), or give outlive run a smaller mtu="
                ))
            }
            _ => Ok(()),
        }
    }

    fn check_vlan(&self) -> Result<(), String> {
        let Some(vlan) = self.wiring.vlan else { return Ok(()) };
        let Some(bridge) = &self.bridge else {
            return Err(format!("the VM's card is in VLAN {vlan} of a bridge: give --net bridge=NAME"));
        };
        let (tap, name) = (&self.tap, &bridge.name);
        if self.before.is_some() {
            return Err(format!(
                "the tap {tap} was there before and stays as it is, so vlan={vlan} cannot be set: delete it, or \
                 set its VLAN yourself (`bridge vlan add dev {tap} vid {vlan} pvid untagged`) and leave vlan= out"
            ));
        }
        if !bridge.vlans.filtering {
            return Err(format!(
                "the VM's card is in VLAN {vlan}, but the bridge {name} does not look at VLANs: switch that on with \
                 `ip link set {name} type bridge vlan_filtering 1`"
            ));
        }
        Ok(())
    }

    fn is_port_of(&self, bridge: &Link) -> bool {
        self.before.as_ref().is_some_and(|tap| tap.bridge == Some(bridge.index))
    }

    /// Puts the tap, which is open now, into its place, and switches it on.
    ///
    /// # Errors
    /// One line with the remedy.
    pub(crate) fn join(mut self) -> Result<(), String> {
        if self.before.is_none() {
            self.prepare()?;
        }
        if let Some(bridge) = self.bridge.take() {
            // What an administrator has set up already needs no rights of ours.
            if !self.is_port_of(&bridge) {
                self.keep_address(&bridge)?;
                self.netlink.attach(&self.tap, &bridge.name).map_err(text)?;
            }
            self.enter_vlan(&bridge)?;
        }
        if self.before.as_ref().is_some_and(|tap| tap.up) {
            return Ok(());
        }
        self.netlink.set_up(&self.tap).map_err(text)
    }

    /// Gives a new tap its MTU and its address.
    fn prepare(&mut self) -> Result<(), String> {
        let mtu = self.mtu();
        let tap = self.netlink.link(&self.tap).map_err(text)?;
        if tap.mtu != mtu {
            self.netlink.set_mtu(&self.tap, mtu).map_err(text)?;
        }
        // Random, because the taps of both hosts are in one network.
        let tail = process::random::<5>().map_err(no_random)?;
        let mut mac = [HIGH; 6];
        mac[1..].copy_from_slice(&tail);
        self.netlink.set_mac(&self.tap, mac).map_err(text)
    }

    /// Keeps a bridge from taking the tap's address, before it is attached.
    fn keep_address(&mut self, bridge: &Link) -> Result<(), String> {
        let (Some(own), links) = (bridge.mac, self.netlink.links().map_err(text)?) else { return Ok(()) };
        let tap = links.iter().find(|link| link.name == self.tap).and_then(|link| link.mac);
        let ports = links.iter().filter(|link| link.bridge == Some(bridge.index));
        let lowest = ports.filter_map(|port| port.mac).min();
        if tap.is_some_and(|tap| lowest.is_none_or(|lowest| tap < lowest)) {
            return self.netlink.set_mac(&bridge.name, own).map_err(text);
        }
        Ok(())
    }

    fn enter_vlan(&mut self, bridge: &Link) -> Result<(), String> {
        let Some(vlan) = self.wiring.vlan else { return Ok(()) };
        self.netlink.set_port_vlan(&self.tap, vlan).map_err(text)?;
        let default = bridge.vlans.default_pvid;
        if default != 0 && default != vlan {
            self.netlink.remove_port_vlan(&self.tap, default).map_err(text)?;
        }
        Ok(())
    }
}

fn text(error: NetlinkError) -> String {
    error.to_string()
}
