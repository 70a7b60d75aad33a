//! The events that a running machine reports to its controller.

use std::sync::Arc;

/// How the guest ended itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// It has shut down in order.
    Off,
    /// It asks for a reset.
    Reset(ResetWay),
    /// Its kernel panicked.
    Panic,
}

impl PowerRequest {
    /// Its number in a saved state, not 0.
    pub(crate) fn number(self) -> u32 {
        match self {
            PowerRequest::Off => 1,
            PowerRequest::Reset(_) => 2,
            PowerRequest::Panic => 3,
        }
    }

    /// The number of a reset's way in a saved state; 0 for what is none.
    pub(crate) fn way_number(self) -> u32 {
        match self {
            PowerRequest::Reset(way) => way as u32,
            PowerRequest::Off | PowerRequest::Panic => 0,
        }
    }

    /// The request with these numbers; 0 and unknown numbers are no request. A reset by an unknown way still
    /// is a reset.
    pub(crate) fn from_numbers(number: u32, way: u32) -> Option<Self> {
        match number {
            1 => Some(PowerRequest::Off),
            2 => Some(PowerRequest::Reset(ResetWay::from_number(way))),
            3 => Some(PowerRequest::Panic),
            _ => None,
        }
    }
}

/// By which of a PC's ways the guest asked for a reset. The numbers are part of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ResetWay {
    /// ACPI's reset register: how a kernel restarts in order.
    Acpi = 1,
    /// The keyboard controller's command 0xfe: what kernels try next.
    Keyboard = 2,
    /// Port 0xcf9.
    ResetControl = 3,
    /// A triple fault: a kernel's last way, or a kernel that broke before it could report anything.
    TripleFault = 4,
    /// The payload guest's power port.
    PowerPort = 5,
}

impl ResetWay {
    fn from_number(number: u32) -> Self {
        let all = [Self::Acpi, Self::Keyboard, Self::ResetControl, Self::TripleFault, Self::PowerPort];
        all.into_iter().find(|way| *way as u32 == number).unwrap_or(Self::Acpi)
    }
}

impl std::fmt::Display for ResetWay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Acpi => "ACPI's reset register",
            Self::Keyboard => "the keyboard controller (port 0x64)",
            Self::ResetControl => "port 0xcf9",
            Self::TripleFault => "a triple fault",
            Self::PowerPort => "its power port",
        })
    }
}

/// An event of a machine's guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest used its power port. The vCPU stays stopped.
    Power(PowerRequest),
    /// The guest has broken a vCPU beyond repair: a triple fault that does not restart it. It stays stopped.
    Crashed {
        /// Which vCPU.
        vcpu: u8,
        /// What KVM said.
        why: String,
    },
    /// This host cannot run a vCPU any more: an error of KVM_RUN, an entry that the processor refuses, an
    /// internal error of KVM. It stays stopped. The guest is well as far as anybody knows, and can go on
    /// elsewhere from its last checkpoint; no later one can be taken here.
    HostFault {
        /// Which vCPU.
        vcpu: u8,
        /// What KVM said.
        why: String,
    },
    /// This host's disk has failed a request of the guest, which has done nothing wrong. The guest does not
    /// know yet: the request stays in flight until [`Machine::tell_disk_errors`](crate::Machine), so that a
    /// VM that goes on elsewhere issues it again.
    DiskFault {
        /// Which disk of the machine.
        disk: u16,
        /// What the host said.
        why: String,
        /// Whether the request was in flight on another host before: what is broken there may be the same.
        again: bool,
    },
    /// KVM's own limit of dirty pages is reached; the vCPU waits for the next checkpoint.
    DirtyLogFull,
    /// The log of disk writes is full in this epoch; further writes wait for the next checkpoint.
    DiskLogFull,
    /// The guest's kernel reports a panic (pvpanic). It keeps running: it may write a dump and restart.
    GuestPanicked,
}

/// Receives the events of a machine; called on vCPU and device threads, so it must not block for long.
pub type EventSink = Arc<dyn Fn(MachineEvent) + Send + Sync>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_comes_back_from_its_numbers() {
        use ResetWay::{Acpi, Keyboard, PowerPort, ResetControl, TripleFault};
        let resets = [Acpi, Keyboard, ResetControl, TripleFault, PowerPort].map(PowerRequest::Reset);
        for request in [PowerRequest::Off, PowerRequest::Panic].into_iter().chain(resets) {
            let (number, way) = (request.number(), request.way_number());
            assert_eq!(PowerRequest::from_numbers(number, way), Some(request));
        }
        assert_eq!(PowerRequest::from_numbers(0, 0), None);
        assert_eq!(PowerRequest::from_numbers(9, 1), None);
        assert!(matches!(PowerRequest::from_numbers(2, 0), Some(PowerRequest::Reset(_))));
    }
}
