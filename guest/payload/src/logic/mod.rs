//! Everything of the payload that needs no machine: safe code over `core`, `alloc` and the TCP/IP stack.
//!
//! The crate `outlive-guest` compiles this same folder for its tests, so `cargo test -p outlive-guest` runs
//! it on the host.

pub mod clock;
pub mod command;
pub mod resp;
pub mod server;
pub mod store;
pub mod work;
