//! What a running machine tells its controller.

use std::sync::Arc;

/// How the guest ended itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// It has shut down in order.
    Off,
    /// It asks for a reset.
    Reset,
    /// Its kernel panicked.
    Panic,
}

impl PowerRequest {
    /// Its number in a saved state, not 0.
    pub(crate) fn number(self) -> u32 {
        match self {
            PowerRequest::Off => 1,
            PowerRequest::Reset => 2,
            PowerRequest::Panic => 3,
        }
    }

    /// The request of a number; 0 and what is unknown are none.
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        [PowerRequest::Off, PowerRequest::Reset, PowerRequest::Panic]
            .into_iter()
            .find(|it| it.number() == number)
    }
}

/// What happens to a machine's guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest used its power port. The vCPU stays stopped.
    Power(PowerRequest),
    /// A vCPU cannot go on: triple fault, failed entry, internal error. It stays stopped.
    Crashed {
        /// Which vCPU.
        vcpu: u8,
        /// What KVM said.
        why: String,
    },
    /// KVM's own limit of dirty pages is reached; the vCPU waits for the next checkpoint.
    DirtyLogFull,
    /// What the guest writes to its disks finds no more room in this epoch; the writes wait for the next
    /// checkpoint.
    DiskLogFull,
    /// The guest's kernel says that it panics (pvpanic). It goes on: it may write a dump and restart.
    GuestPanicked,
}

/// Receives the events of a machine; called on vCPU and device threads, so it must not block for long.
pub type EventSink = Arc<dyn Fn(MachineEvent) + Send + Sync>;
