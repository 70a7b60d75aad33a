//! The serial port as the guest and the machine see it.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};

use super::persist::{FIFO, RestoreError, SerialState};
use super::worker::Feeder;
use crate::bus::{BusDevice, SharedDevice};
use crate::devices::gate::DeviceGate;
use crate::devices::port::{PortEnd, PortInput, PortSink};
use crate::devices::virtio::Interrupt;
use crate::devices::virtio::worker::Worker;

const DATA: u8 = 0;
const IIR: u8 = 2;
const MCR: u8 = 4;

const IER_RECEIVED: u8 = 0x01;
const IER_SENT: u8 = 0x02;
const IIR_NONE: u8 = 0x01;
const IIR_RECEIVED: u8 = 0x04;
const MCR_LOOP: u8 = 0x10;

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

/// The registers and what they are connected to.
pub(super) struct Uart {
    serial: Serial<Line, NoEvents, Out>,
    input: Arc<PortInput>,
    live: bool,
    /// The state while bytes wait in the FIFO. Reading it from the registers allocates then, which must not
    /// happen in a pause; so it is read after each access that leaves bytes there.
    with_input: Option<SerialState>,
}

/// The interrupt as the registers see it.
#[derive(Clone)]
struct Line(Arc<dyn Interrupt>);

impl Trigger for Line {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.trigger();
        Ok(())
    }
}

/// The sink as the registers see it.
#[derive(Clone)]
struct Out(Arc<dyn PortSink>);

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
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
        let uart = Arc::new(Mutex::new(Uart {
            serial: Serial::new(Line(host.interrupt), Out(sink)),
            input: input.clone(),
            live: false,
            with_input: None,
        }));
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

impl Uart {
    /// Fills the empty FIFO with what was typed. Filling it byte by byte would interrupt the guest for each.
    pub(super) fn refill(&mut self) {
        let looped = self.serial.read(MCR) & MCR_LOOP != 0;
        if self.live && !looped && self.serial.fifo_capacity() == FIFO {
            let mut bytes = [0; FIFO];
            let count = self.input.take(&mut bytes);
            // Fails for a full FIFO or a failing interrupt: neither can be here.
            let _ = self.serial.enqueue_raw_bytes(&bytes[..count]);
        }
        self.note();
    }

    fn note(&mut self) {
        let waits = self.serial.fifo_capacity() < FIFO;
        self.with_input = waits.then(|| SerialState::of(&self.serial.state()));
    }

    fn state(&self) -> SerialState {
        self.with_input.unwrap_or_else(|| SerialState::of(&self.serial.state()))
    }

    fn replace(&mut self, state: SerialState) {
        let (line, out) = (self.serial.interrupt_evt().clone(), self.serial.writer().clone());
        // Fails for a full FIFO or a failing interrupt: neither can be here.
        if let Ok(serial) = Serial::from_state(&state.to_uart(), line, NoEvents, out) {
            self.serial = serial;
        }
        self.note();
    }

    /// Whether the FIFO holds bytes and the driver wants an interrupt for them.
    fn has_news(&self) -> bool {
        self.with_input.is_some_and(|state| state.interrupt_enable & IER_RECEIVED != 0)
    }

    /// Raises the interrupt if the driver uses interrupts at all: no register holds one that was under way
    /// when the state was saved.
    fn interrupt_again(&mut self) {
        if self.state().interrupt_enable & (IER_RECEIVED | IER_SENT) != 0 {
            let _ = self.serial.interrupt_evt().trigger();
        }
    }

    fn read_register(&mut self, register: u8) -> u8 {
        let value = self.serial.read(register);
        // A driver that stops before it has read all bytes gets another interrupt. The registers forget that
        // when a byte is read.
        let told = if register == IIR && value & IIR_NONE != 0 && self.has_news() {
            value & !IIR_NONE | IIR_RECEIVED
        } else {
            value
        };
        if matches!(register, DATA | IIR) {
            self.refill();
        }
        told
    }

    fn write_register(&mut self, register: u8, value: u8) {
        // Neither the sink nor the interrupt fails.
        let _ = self.serial.write(register, value);
        // Looped back, a written byte comes into the FIFO.
        if register != DATA || self.serial.fifo_capacity() < FIFO {
            self.refill();
        }
    }
}

/// Accesses wider than a byte reach the registers one after the other, as on a PC's bus.
impl BusDevice for Uart {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset as u8..).zip(data) {
            *byte = self.read_register(register);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, &byte) in (offset as u8..).zip(data) {
            self.write_register(register, byte);
        }
    }
}

pub(super) fn lock(uart: &Mutex<Uart>) -> MutexGuard<'_, Uart> {
    uart.lock().unwrap_or_else(PoisonError::into_inner)
}
