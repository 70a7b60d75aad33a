//! Network plumbing: bridges, virtual cables, addresses and network namespaces, straight from the program.
//!
//! Two parts:
//!
//! * [`Netlink`] speaks rtnetlink to the kernel, one request and one answer at a time. No command of the
//!   system (`ip`, `brctl`) is needed and no runtime is started.
//! * [`namespace`] makes network namespaces that have no name and therefore leave nothing behind: they go
//!   when the last process or handle in them goes.

pub mod namespace;
mod netlink;

pub use namespace::{EnterError, Namespace, enter_own_namespace};
pub use netlink::{Link, Netlink, NetlinkError};
