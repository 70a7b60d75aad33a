//! The payload guest: a small 64-bit program that runs inside the VM, serves the Redis protocol and needs no kernel.
//!
//! [`abi`] is the contract between the VMM and the payload.
#![forbid(unsafe_code)]

pub mod abi;
