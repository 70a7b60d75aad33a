//! The thread that delivers input to the serial port.
//!
//! It only starts: it fills an empty FIFO when input arrives. From then on the vCPU's thread refills the FIFO
//! when the guest has emptied it.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex};

use super::uart::{Uart, lock};
use crate::devices::gate::{DeviceGate, Pass};
use crate::devices::port::PortInput;
use crate::devices::virtio::worker::{Wake, Work};

/// What the thread works with.
pub(super) struct Feeder {
    gate: Arc<DeviceGate>,
    wake: Wake,
    uart: Arc<Mutex<Uart>>,
    input: Arc<PortInput>,
}

impl Feeder {
    pub(super) fn new(
        gate: Arc<DeviceGate>,
        uart: Arc<Mutex<Uart>>,
        input: Arc<PortInput>,
    ) -> io::Result<Self> {
        Ok(Self { gate, wake: Wake::new()?, uart, input })
    }
}

impl Work for Feeder {
    fn name(&self) -> &'static str {
        "outlive-serial"
    }

    fn gate(&self) -> &DeviceGate {
        &self.gate
    }

    fn wake(&self) -> &Wake {
        &self.wake
    }

    fn sources(&self) -> Vec<RawFd> {
        vec![self.input.arrived().as_raw_fd()]
    }

    fn batch(&self, _ready: &[usize], _pass: &Pass<'_>) -> bool {
        if !self.input.is_empty() {
            lock(&self.uart).refill();
        }
        false
    }
}
