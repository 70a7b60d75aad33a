//! vCPU threads: they run the guest, stop without losing an I/O, save their own state, harvest their
//! own dirty ring and copy their share of the pages.
//!
//! Ordering rules of a stop, each with its reason:
//! 1. `immediate_exit` is set before the kick signal is sent: otherwise a signal that arrives between the
//!    thread's last look at its order and `KVM_RUN` is lost.
//! 2. A thread never clears `immediate_exit`; the controller does, before it publishes [`Command::Run`],
//!    when every thread is parked. Otherwise a thread could erase the next stop. The thread that ends a pause in
//!    the controller's place ([`lent`]) does it in the controller's place, while the controller waits for it.
//! 3. After an exit with a port or MMIO access there is one more `KVM_RUN` with `immediate_exit` set: only
//!    that completes the access, so that the state is saved after the access, not in the middle of it.
//! 4. State is read before the ring is harvested: vCPU ioctls can write guest memory
//!    (KVM_SET_MSRS of the wall clock, for example).

mod copying;
pub(crate) mod idle;
pub(crate) mod lent;
mod msrs;
pub(crate) mod platform;
mod port_io;
mod power;
mod rendezvous;
#[cfg(test)]
mod rendezvous_model;
#[cfg(test)]
mod rendezvous_tests;
mod run;
pub(crate) mod set;
pub(crate) mod state;
mod times;

/// The primitives of the meeting point. The model test replaces them with those of its checker.
mod sync {
    pub(super) use std::hint::spin_loop;
    pub(super) use std::sync::atomic::{AtomicU32, Ordering};

    pub(super) use crate::futex;
}

pub use run::VcpuError;
