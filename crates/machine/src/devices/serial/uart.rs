//! The registers of the serial port.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};

use super::persist::{FIFO, SerialState};
use crate::bus::BusDevice;
use crate::devices::port::{PortInput, PortSink};
use crate::devices::virtio::Interrupt;

const DATA: u8 = 0;
const IIR: u8 = 2;
const MCR: u8 = 4;

const IER_RECEIVED: u8 = 0x01;
const IER_SENT: u8 = 0x02;
const IIR_NONE: u8 = 0x01;
const IIR_RECEIVED: u8 = 0x04;
const MCR_LOOP: u8 = 0x10;

/// The registers and what they are connected to.
pub(super) struct Uart {
    serial: Serial<Line, NoEvents, Out>,
    input: Arc<PortInput>,
    pub(super) live: bool,
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

impl Uart {
    /// After power-on.
    pub(super) fn new(interrupt: Arc<dyn Interrupt>, sink: Arc<dyn PortSink>, input: Arc<PortInput>) -> Self {
        let serial = Serial::new(Line(interrupt), Out(sink));
        Self { serial, input, live: false, with_input: None }
    }

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

    /// The state as plain data.
    pub(super) fn state(&self) -> SerialState {
        self.with_input.unwrap_or_else(|| SerialState::of(&self.serial.state()))
    }

    /// Takes over a state.
    pub(super) fn replace(&mut self, state: SerialState) {
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
    pub(super) fn interrupt_again(&mut self) {
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
