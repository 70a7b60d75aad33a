//! The saved state of a serial port: its registers and the bytes in its FIFO.

use thiserror::Error;
use vm_superio::serial::SerialState as UartState;

use crate::devices::virtio::persist::{DecodeError, Fields};

/// The version written.
///
/// - 1: divisor, IER, IIR, LCR, LSR, MCR, MSR, SCR, number of bytes in the FIFO, the FIFO.
pub const VERSION: u16 = 1;

/// Size of the receive FIFO in bytes.
pub const FIFO: usize = 64;

const IER_BITS: u8 = 0x0f;
const IIR_NONE: u8 = 0x01;
const IIR_PENDING: u8 = 0x06;
const LSR_DATA_READY: u8 = 0x01;
const LSR_EMPTY: u8 = 0x60;
const MSR_BITS: u8 = 0xf0;

/// Everything that a resumed guest expects to find again in its serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SerialState {
    /// Divisor latch, low and high byte.
    pub divisor: [u8; 2],
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// How many of the bytes in `fifo` wait to be read.
    pub waiting: u8,
    /// The bytes that wait, oldest first; the rest is zero.
    pub fifo: [u8; FIFO],
}

/// Why a saved state cannot be loaded. The port is then as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("cannot read the state of the serial port: {0}")]
pub struct RestoreError(#[from] pub DecodeError);

impl SerialState {
    /// Length of the encoded state in bytes.
    pub const BYTES: usize = 2 + 2 + 7 + 1 + FIFO;

    /// Appends the state to `out`. Does not allocate if `out` has room for [`Self::BYTES`] more.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&self.divisor);
        out.extend_from_slice(&[
            self.interrupt_enable,
            self.interrupt_identification,
            self.line_control,
            self.line_status,
            self.modem_control,
            self.modem_status,
            self.scratch,
            self.waiting,
        ]);
        out.extend_from_slice(&self.fifo);
    }

    /// Reads a state that [`encode`](Self::encode) wrote; `bytes` must hold nothing else. Refuses a state
    /// that no port can have saved.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new(bytes);
        let version = fields.u16()?;
        if version != VERSION {
            return Err(DecodeError::Version { found: version, known: VERSION });
        }
        let divisor = fields.array()?;
        let [ier, iir, lcr, lsr, mcr, msr, scratch, waiting] = fields.array()?;
        let fifo = fields.array()?;
        fields.finish()?;
        let state = Self {
            divisor,
            interrupt_enable: ier,
            interrupt_identification: iir,
            line_control: lcr,
            line_status: lsr,
            modem_control: mcr,
            modem_status: msr,
            scratch,
            waiting,
            fifo,
        };
        state.check()?;
        Ok(state)
    }

    fn check(&self) -> Result<(), DecodeError> {
        let count = usize::from(self.waiting);
        let ready = if count > 0 { LSR_DATA_READY } else { 0 };
        let iir = self.interrupt_identification;
        let pending = iir != 0 && iir & !IIR_PENDING == 0;
        let checks = [
            ("waiting", self.waiting, count <= FIFO),
            ("fifo", self.waiting, self.fifo.iter().skip(count).all(|&byte| byte == 0)),
            ("interrupt enable", self.interrupt_enable, self.interrupt_enable & !IER_BITS == 0),
            ("interrupt identification", iir, iir == IIR_NONE || pending),
            ("line status", self.line_status, self.line_status == LSR_EMPTY | ready),
            ("modem status", self.modem_status, self.modem_status & !MSR_BITS == 0),
        ];
        match checks.into_iter().find(|(_, _, good)| !good) {
            Some((field, value, _)) => Err(DecodeError::Value { field, value: value.into() }),
            None => Ok(()),
        }
    }

    pub(super) fn of(uart: &UartState) -> Self {
        let mut fifo = [0; FIFO];
        let count = uart.in_buffer.len().min(FIFO);
        fifo[..count].copy_from_slice(&uart.in_buffer[..count]);
        Self {
            divisor: [uart.baud_divisor_low, uart.baud_divisor_high],
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            waiting: count as u8,
            fifo,
        }
    }

    pub(super) fn to_uart(self) -> UartState {
        UartState {
            baud_divisor_low: self.divisor[0],
            baud_divisor_high: self.divisor[1],
            interrupt_enable: self.interrupt_enable,
            interrupt_identification: self.interrupt_identification,
            line_control: self.line_control,
            line_status: self.line_status,
            modem_control: self.modem_control,
            modem_status: self.modem_status,
            scratch: self.scratch,
            in_buffer: self.fifo[..usize::from(self.waiting)].to_vec(),
        }
    }
}
