//! The serial port with a driver of ours: what comes out, what gets in, and what a restore brings back.

mod hostile;
mod lifecycle;
mod traffic;

use std::sync::{Arc, Mutex};

use super::{SerialHost, SerialPort};
use crate::bus::SharedDevice;
use crate::devices::gate::DeviceGate;
use crate::devices::port::{PortEnd, PortSink};
use crate::devices::virtio::hostile::{settle, wait_for};
use crate::devices::virtio::rig::Count;

const DATA: u64 = 0;
const IER: u64 = 1;
const IIR: u64 = 2;
const LCR: u64 = 3;
const MCR: u64 = 4;
const LSR: u64 = 5;
const SCR: u64 = 7;

const RECEIVED: u8 = 1;
const SENT: u8 = 2;

#[derive(Default)]
struct Recorder(Mutex<Vec<u8>>);

impl PortSink for Recorder {
    fn write(&self, bytes: &[u8]) {
        self.0.lock().unwrap().extend_from_slice(bytes);
    }
}

struct Rig {
    port: SerialPort,
    registers: SharedDevice,
    end: PortEnd,
    sink: Arc<Recorder>,
    gate: Arc<DeviceGate>,
    interrupts: Arc<Count>,
}

impl Rig {
    fn new() -> Self {
        let sink = Arc::new(Recorder::default());
        let end = PortEnd::new(sink.clone()).unwrap();
        let (gate, interrupts) = (Arc::new(DeviceGate::new()), Arc::new(Count::default()));
        let host = SerialHost { gate: gate.clone(), interrupt: interrupts.clone() };
        let port = SerialPort::new(host, end.clone()).unwrap();
        let registers = port.registers();
        Self { port, registers, end, sink, gate, interrupts }
    }

    fn live() -> Self {
        let rig = Self::new();
        rig.port.go_live();
        rig
    }

    fn read(&self, register: u64) -> u8 {
        let mut byte = [0];
        self.registers.lock().unwrap().read(register, &mut byte);
        byte[0]
    }

    fn write(&self, register: u64, value: u8) {
        self.registers.lock().unwrap().write(register, &[value]);
    }

    fn ready(&self) -> bool {
        self.read(LSR) & 1 != 0
    }

    /// Has bytes typed and waits until the guest sees the first of them.
    fn type_in(&self, bytes: &[u8]) {
        assert_eq!(self.end.input.push(bytes), bytes.len());
        wait_for("input", || self.ready());
    }

    /// Reads what is there, as a driver does.
    fn drain(&self) -> Vec<u8> {
        let mut got = Vec::new();
        while self.ready() {
            got.push(self.read(DATA));
        }
        got
    }

    fn interrupts(&self) -> usize {
        self.interrupts.get()
    }

    fn output(&self) -> Vec<u8> {
        self.sink.0.lock().unwrap().clone()
    }

    fn saved(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.port.save(&mut bytes);
        bytes
    }
}
