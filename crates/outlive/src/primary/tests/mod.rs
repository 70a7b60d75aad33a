//! The real driver with its real ports, in front of output that does not move.

mod order;
mod pause;
mod rig;
mod versions;

pub(crate) use rig::hello;
