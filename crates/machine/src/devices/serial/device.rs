//! The serial port as the guest and the machine see it.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use super::persist::{RestoreError, SerialState};
use super::uart::{Uart, lock};
use super::worker::Feeder;
use crate::bus::SharedDevice;
use crate::devices::gate::DeviceGate;
use crate::devices::port::{PortEnd, PortInput};
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::worker::Worker;

/// What the machine lends a serial port.
#[derive(Clone)]
pub struct SerialHost {
    /// The gate behind which input arrives.
    pub gate: Arc<DeviceGate>,
    /// Raises the port's interrupt (an edge).
    pub interrupt: Arc<dyn Interrupt>,
}

/// A serial port with its registers and the thread that delivers input.
///
/// It starts passive: input is dropped until [`go_live`](Self::go_live).
pub struct SerialPort {
    uart: Arc<Mutex<Uart>>,
    input: Arc<PortInput>,
    _worker: Worker<Feeder>,
}

impl SerialPort {
    /// A serial port after power-on.
    ///
    /// # Errors
    /// The operating system's, when it refuses the thread or its events.
    pub fn new(host: SerialHost, end: PortEnd) -> io::Result<Self> {
        let PortEnd { sink, input } = end;
        // Bytes for an earlier machine are not for this one.
        input.set_live(false);
        let uart = Arc::new(Mutex::new(Uart::new(host.interrupt, sink, input.clone())));
        let feeder = Feeder::new(host.gate, uart.clone(), input.clone())?;
        let worker = Worker::start(Arc::new(feeder))?;
        Ok(Self { uart, input, _worker: worker })
    }

    /// The registers, for the port bus; 8 bytes long.
    pub fn registers(&self) -> SharedDevice {
        self.uart.clone()
    }

    /// The machine begins to run here: input is taken from now on, and an interrupt that was under way when
    /// the state was saved is raised again. The gate may be closed or open.
    pub fn go_live(&self) {
        self.input.set_live(true);
        let mut uart = self.uart();
        uart.live = true;
        uart.interrupt_again();
    }

    /// Most bytes that [`save`](Self::save) appends.
    pub fn state_bytes(&self) -> usize {
        SerialState::BYTES
    }

    /// Appends the state to `out`. Needs stopped vCPUs and a closed gate; does not allocate if `out` has room
    /// for [`state_bytes`](Self::state_bytes) more.
    pub fn save(&self, out: &mut Vec<u8>) {
        self.state().encode(out);
    }

    /// The state as plain data; needs stopped vCPUs and a closed gate.
    pub fn state(&self) -> SerialState {
        self.uart().state()
    }

    /// Loads a saved state; nothing changes if it is refused. The vCPUs must be stopped and the gate closed
    /// (or the port not live yet). [`go_live`](Self::go_live) must follow before the vCPUs run.
    ///
    /// # Errors
    /// [`RestoreError`] when the bytes are no state of a serial port.
    pub fn restore(&self, bytes: &[u8]) -> Result<(), RestoreError> {
        let state = SerialState::decode(bytes)?;
        self.uart().replace(state);
        Ok(())
    }

    /// Puts the port into the state after power-on: the guest restarts. Input continues.
    pub fn reset(&self) {
        let mut uart = self.uart();
        uart.replace(SerialState::of(&vm_superio::serial::SerialState::default()));
    }

    fn uart(&self) -> MutexGuard<'_, Uart> {
        lock(&self.uart)
    }
}

impl Drop for SerialPort {
    fn drop(&mut self) {
        self.input.set_live(false);
    }
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}
