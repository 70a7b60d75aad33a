//! The console device: virtio-console with one port (`hvc0` in Linux).
//!
//! ```text
//!  guest ── transmit queue ──► thread ──► PortSink
//!        ◄── receive queue ─── thread ◄── PortInput
//! ```
//!
//! It moves bytes in bulk, where the serial port takes one trap per byte. But a kernel has it only after it
//! has found its devices, so early messages and panics are on the serial port.

use std::convert::Infallible;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vm_memory::GuestMemory;

use super::chain::Broken;
use super::persist::{DecodeError, DeviceState, Fields, TransportState};
use super::ring::{Answer, Queues};
use super::slot::{Batch, CONFIG_BYTES, Identity, Model, Outcome, Slot};
use super::{ActivateError, COMMON_FEATURES, DeviceHost};
use crate::devices::port::PortEnd;

#[cfg(test)]
mod tests;

/// Index of the queue with the guest's receive buffers.
const RX: usize = 0;
/// Index of the queue with the guest's output.
const TX: usize = 1;
/// Largest size of the queues.
const QUEUE_SIZES: [u16; 2] = [64; 2];
/// VIRTIO_CONSOLE_F_SIZE: the configuration space holds the size of the screen.
const F_SIZE: u32 = 0;
/// Most bytes that are moved at once.
const PART: usize = 4096;
/// Longest output in one buffer; a checkpoint waits for the current buffer.
const MAX_OUTPUT: usize = 64 << 10;
/// Most buffers that a batch moves in one direction, so that the other direction gets its turn.
const BATCH: usize = 16;

/// Columns and rows of the terminal that shows the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ScreenSize {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// The least that every terminal has.
impl Default for ScreenSize {
    fn default() -> Self {
        Self { columns: 80, rows: 24 }
    }
}

/// What is saved: the size that the driver knows. Input that the guest has not taken yet is not saved: the
/// person who typed it is attached to the old host.
impl DeviceState for ScreenSize {
    const VERSION: u16 = 1;
    const BYTES: usize = 4;

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.columns.to_le_bytes());
        out.extend_from_slice(&self.rows.to_le_bytes());
    }

    fn decode(bytes: &mut Fields<'_>) -> Result<Self, DecodeError> {
        Ok(Self { columns: bytes.u16()?, rows: bytes.u16()? })
    }
}

/// What is special about a console.
pub struct Console {
    end: PortEnd,
}

/// The parts that a console works on.
pub struct Terminal {
    size: ScreenSize,
    buffer: Box<[u8; PART]>,
}

/// A console. It is passive until it goes live: no bytes move before.
pub type ConsoleDevice<M> = Slot<M, Console>;

impl<M: GuestMemory + Send + Sync + 'static> ConsoleDevice<M> {
    /// A console whose port ends at `end`.
    ///
    /// # Errors
    /// The operating system's, when it refuses the thread or its events.
    pub fn new(end: PortEnd, host: DeviceHost<M>) -> io::Result<Self> {
        // Bytes for an earlier machine are not for this one.
        end.input.set_live(false);
        let terminal = Terminal { size: ScreenSize::default(), buffer: Box::new([0; PART]) };
        Self::start(Console { end }, terminal, host)
    }

    /// The size of the screen, as the driver sees it.
    pub fn size(&self) -> ScreenSize {
        self.shared().core().model.size
    }

    /// The screen has another size: tells the driver. Waits while the gate is closed.
    pub fn resize(&self, size: ScreenSize) {
        self.reconfigure(|terminal| std::mem::replace(&mut terminal.size, size) != size);
    }
}

impl<M: GuestMemory> Model<M> for Console {
    type Core = Terminal;
    type State = ScreenSize;
    type Refusal = Infallible;

    const NAME: &'static str = "console";
    const THREAD: &'static str = "outlive-console";

    fn identity(&self) -> Identity {
        Identity {
            device_type: VIRTIO_ID_CONSOLE,
            features: COMMON_FEATURES | 1 << F_SIZE,
            queue_sizes: QUEUE_SIZES.into(),
        }
    }

    /// virtio 1.2, 5.3.4. The size is followed by max_nr_ports and emerg_wr, which belong to features that
    /// are not offered.
    fn config(&self, terminal: &Terminal) -> [u8; CONFIG_BYTES] {
        let mut space = [0; CONFIG_BYTES];
        space[..2].copy_from_slice(&terminal.size.columns.to_le_bytes());
        space[2..4].copy_from_slice(&terminal.size.rows.to_le_bytes());
        space
    }

    fn activate(&self, _terminal: &mut Terminal, queues: &Queues<M>) -> Result<(), ActivateError> {
        queues.need(RX)?;
        queues.need(TX)
    }

    fn batch(&self, terminal: &mut Terminal, batch: Batch<'_, M>) -> Result<Outcome, Broken> {
        let Some(queues) = batch.queues else { return Ok(Outcome::default()) };
        let (PortEnd { sink, input }, buffer) = (&self.end, &mut terminal.buffer);
        let sent = queues.serve(TX, BATCH, batch.pass, |memory, chain| {
            let len = chain.sent(MAX_OUTPUT)?;
            for at in (0..len).step_by(PART) {
                let part = &mut buffer[..PART.min(len - at)];
                chain.read(memory, at, part)?;
                sink.write(part);
            }
            Ok(Answer::Used(0))
        })?;
        let received = queues.serve(RX, BATCH, batch.pass, |memory, chain| {
            let room = chain.room()?.min(PART);
            let len = input.take(&mut buffer[..room]);
            if len == 0 {
                return Ok(Answer::Later);
            }
            chain.write(memory, 0, &buffer[..len])?;
            Ok(Answer::Used(len as u32))
        })?;
        Ok(Outcome { more: sent.more || received.more, wake: sent.done + received.done > 0 })
    }

    fn save(&self, terminal: &Terminal, out: &mut Vec<u8>) {
        terminal.size.encode(out);
    }

    fn check(&self, _size: &ScreenSize, _transport: &TransportState) -> Result<(), Infallible> {
        Ok(())
    }

    fn restore(&self, terminal: &mut Terminal, size: ScreenSize) {
        terminal.size = size;
    }

    fn sources(&self) -> Vec<RawFd> {
        vec![self.end.input.arrived().as_raw_fd()]
    }

    fn ready(&self, _terminal: &mut Terminal, _typed: usize) -> u32 {
        1 << RX
    }

    fn go_live(&self, _terminal: &mut Terminal, _queues: Option<&mut Queues<M>>, _announce: bool) -> bool {
        self.end.input.set_live(true);
        false
    }

    fn ended(&self) {
        self.end.input.set_live(false);
    }
}
