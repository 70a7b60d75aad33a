//! The platform's ports: those of [`power`] for a Linux guest; idle, wake, power and debug console for the
//! payload guest. Neither guest has the other's ports.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use outlive_guest::abi;

use super::idle::IdleState;
use super::power;
use crate::devices::complaints::{Complaints, complain};
use crate::event::{PowerRequest, ResetWay};

/// What a vCPU does after it wrote to a platform port.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum AfterPort {
    /// Run on.
    Continue,
    /// Idle until the deadline (none: until woken).
    Idle(Option<Instant>),
    /// The guest has ended itself.
    Power(PowerRequest),
    /// The guest reports a panic, and runs on.
    Panicked,
    /// Not a platform port.
    NotOurs,
}

const CONSOLE_LINE: usize = 1024;

/// The state behind the ports, which all vCPUs share.
pub(crate) struct Platform {
    idle: Vec<Arc<IdleState>>,
    console: Mutex<Vec<u8>>,
    guest: GuestKind,
    /// Whether the guest has ended itself; if several vCPUs do so, one counts.
    ended: AtomicBool,
    /// The guest's request that has not been carried out yet ([`PowerRequest::number`]). The access to the
    /// port is over and will not come again, so a checkpoint has to carry the request.
    asked: AtomicU32,
    /// How the guest asked for a reset ([`PowerRequest::way_number`]); written before `asked`.
    asked_by: AtomicU32,
    panicked: AtomicBool,
    complaints: Complaints,
    /// How much the payload may still print.
    printed: Complaints,
}

/// The guest for which a machine is made. It decides which ports there are, and what a triple fault means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuestKind {
    /// The payload. A triple fault breaks it.
    Payload,
    /// Linux, on hardware that looks like a PC: a triple fault is a reset, by which kernels restart when no
    /// other way has helped.
    Linux,
}

impl Platform {
    pub(crate) fn new(vcpus: usize, guest: GuestKind) -> Self {
        Self {
            idle: (0..vcpus).map(|_| Arc::default()).collect(),
            console: Mutex::new(Vec::with_capacity(CONSOLE_LINE)),
            guest,
            ended: AtomicBool::new(false),
            asked: AtomicU32::new(0),
            asked_by: AtomicU32::new(0),
            panicked: AtomicBool::new(false),
            complaints: Complaints::default(),
            printed: Complaints::default(),
        }
    }

    pub(super) fn guest(&self) -> GuestKind {
        self.guest
    }

    /// Whether this is the first end of the guest since its start.
    pub(super) fn first_end(&self) -> bool {
        !self.ended.swap(true, Ordering::AcqRel)
    }

    /// Notes the guest's request, or that it has none.
    pub(super) fn ask(&self, request: Option<PowerRequest>) {
        self.asked_by.store(request.map_or(0, PowerRequest::way_number), Ordering::Relaxed);
        self.asked.store(request.map_or(0, PowerRequest::number), Ordering::Release);
    }

    /// The guest's request that has not been carried out yet.
    pub(super) fn asked(&self) -> Option<PowerRequest> {
        let number = self.asked.load(Ordering::Acquire);
        PowerRequest::from_numbers(number, self.asked_by.load(Ordering::Relaxed))
    }

    /// Whether this is the first panic of the guest since its start.
    pub(super) fn first_panic(&self) -> bool {
        !self.panicked.swap(true, Ordering::AcqRel)
    }

    /// The guest restarts. No vCPU runs.
    pub(super) fn restart(&self) {
        self.console.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.ended.store(false, Ordering::Release);
        self.ask(None);
        self.panicked.store(false, Ordering::Release);
    }

    pub(crate) fn idle(&self, vcpu: usize) -> &Arc<IdleState> {
        &self.idle[vcpu]
    }

    pub(super) fn write(&self, port: u16, data: &[u8]) -> AfterPort {
        match self.guest {
            GuestKind::Payload => self.payload_write(port, data),
            GuestKind::Linux => power::write(port, data),
        }
    }

    fn payload_write(&self, port: u16, data: &[u8]) -> AfterPort {
        match (port, data) {
            (abi::PORT_IDLE, &[a, b, c, d]) => AfterPort::Idle(deadline(u32::from_le_bytes([a, b, c, d]))),
            (abi::PORT_WAKE, &[a, b, c, d]) => {
                let mask = u32::from_le_bytes([a, b, c, d]);
                let chosen = |(i, idle): (usize, &Arc<IdleState>)| {
                    if i < 32 && mask >> i & 1 == 1 {
                        idle.wake();
                    }
                };
                self.idle.iter().enumerate().for_each(chosen);
                AfterPort::Continue
            }
            (abi::PORT_POWER, &[a, b, c, d]) => match u32::from_le_bytes([a, b, c, d]) {
                abi::POWER_OFF => AfterPort::Power(PowerRequest::Off),
                abi::POWER_RESET => AfterPort::Power(PowerRequest::Reset(ResetWay::PowerPort)),
                abi::POWER_PANIC => AfterPort::Power(PowerRequest::Panic),
                other => {
                    complain!(
                        warn,
                        self.complaints,
                        value = other,
                        "the guest wrote an unknown value to its power port"
                    );
                    AfterPort::Continue
                }
            },
            (abi::PORT_DEBUG, &[byte]) => {
                self.print(byte);
                AfterPort::Continue
            }
            _ => AfterPort::NotOurs,
        }
    }

    /// Answers a read from a platform port. Returns false for any other.
    pub(super) fn read(&self, port: u16, data: &mut [u8]) -> bool {
        self.guest == GuestKind::Linux && power::read(port, data)
    }

    fn print(&self, byte: u8) {
        let mut line = self.console.lock().unwrap_or_else(PoisonError::into_inner);
        if byte != b'\n' && line.len() < CONSOLE_LINE {
            line.push(byte);
        }
        if byte == b'\n' || line.len() == CONSOLE_LINE {
            let text = String::from_utf8_lossy(&line);
            if let Some(unsaid) = self.printed.next() {
                tracing::info!(target: "guest", unsaid, "{}", text.escape_debug());
            }
            line.clear();
        }
    }
}

fn deadline(timeout_us: u32) -> Option<Instant> {
    (timeout_us != abi::IDLE_FOREVER).then(|| Instant::now() + Duration::from_micros(timeout_us.into()))
}

#[cfg(test)]
mod tests {
    use super::super::idle::Idle;
    use super::*;

    #[test]
    fn a_wake_reaches_the_vcpus_of_its_mask_alone() {
        let platform = Platform::new(3, GuestKind::Payload);
        assert_eq!(platform.write(abi::PORT_WAKE, &0b1101u32.to_le_bytes()), AfterPort::Continue);
        let now = Some(Instant::now());
        assert_eq!(platform.idle(0).wait(None), Idle::Over);
        platform.idle(1).interrupt();
        assert_eq!(platform.idle(1).wait(None), Idle::Interrupted);
        assert_eq!(platform.idle(2).wait(now), Idle::Over);
    }

    #[test]
    fn one_end_and_one_panic_count_until_the_guest_starts_anew() {
        let platform = Platform::new(2, GuestKind::Linux);
        for _ in 0..2 {
            assert!(platform.first_end() && !platform.first_end());
            assert!(platform.first_panic() && !platform.first_panic());
            platform.restart();
        }
    }

    /// A program in a Linux guest that may use ports must not idle a vCPU past all interrupts, end the VM
    /// behind its kernel's back or fill the host's log.
    #[test]
    fn a_linux_guest_has_no_port_of_the_payload() {
        let platform = Platform::new(1, GuestKind::Linux);
        for port in [abi::PORT_IDLE, abi::PORT_WAKE, abi::PORT_POWER] {
            assert_eq!(platform.write(port, &[1, 0, 0, 0]), AfterPort::NotOurs, "{port:#x}");
        }
        assert_eq!(platform.write(abi::PORT_DEBUG, b"\n"), AfterPort::NotOurs);
        let reset = AfterPort::Power(PowerRequest::Reset(ResetWay::Keyboard));
        assert_eq!(platform.write(0x64, &[0xfe]), reset);
        assert!(platform.read(0x64, &mut [0]));

        let payload = Platform::new(1, GuestKind::Payload);
        assert_eq!(payload.write(0x64, &[0xfe]), AfterPort::NotOurs);
        assert!(!payload.read(0x64, &mut [0]));
    }

    #[test]
    fn writes_of_odd_size_or_value_do_nothing() {
        let platform = Platform::new(1, GuestKind::Payload);
        assert_eq!(platform.write(abi::PORT_POWER, &[1]), AfterPort::NotOurs);
        assert_eq!(platform.write(abi::PORT_POWER, &99u32.to_le_bytes()), AfterPort::Continue);
        assert_eq!(platform.write(abi::PORT_IDLE, &abi::IDLE_FOREVER.to_le_bytes()), AfterPort::Idle(None));
        assert_eq!(platform.write(0x80, &[0]), AfterPort::NotOurs);
    }
}
