//! placeholder

pub mod arbiter;
pub mod network;
