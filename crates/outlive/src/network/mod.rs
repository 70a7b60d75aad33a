//! Network plumbing: bridges, virtual cables, addresses and network namespaces, made by the program itself.
//!
//! Four parts:
//!
//! * [`Netlink`] speaks rtnetlink to the kernel, one request and one answer at a time. No command of the
//!   system (`ip`, `brctl`) is needed and no runtime is started.
//! * [`namespace`] makes network namespaces without a name, which leave nothing behind: they end with the
//!   last process or handle in them.
//! * `here` knows this host's own addresses.
//! * [`UplinkSpec`] names what is watched to know whether the guest's clients can be reached.

pub(crate) mod here;
pub mod namespace;
mod netlink;
mod uplink;

pub use namespace::{EnterError, Namespace, enter_own_namespace};
pub use netlink::{BridgeVlans, Link, Netlink, NetlinkError};
pub use uplink::UplinkSpec;
pub(crate) use uplink::{Place, Sight, Uplink};
