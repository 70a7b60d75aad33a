//! The saved state of a virtio device: plain data and its bytes.
//!
//! ```text
//! version u16 | what is the device's own | transport: registers and queues
//! ```
//!
//! The types here are apart from the ones at work even where they look alike: they change only together with
//! the version of the device state that contains them. All numbers are little-endian.

use thiserror::Error;
use virtio_queue::{Queue, QueueState};

use super::MAX_QUEUES;

/// One queue as the driver set it up, and the device's position in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueRecord {
    /// Number of descriptors the driver chose.
    pub size: u16,
    /// The driver has put the queue into use.
    pub ready: bool,
    /// Position in the available ring.
    pub next_avail: u16,
    /// Position in the used ring.
    pub next_used: u16,
    /// Guest physical address of the descriptor table.
    pub descriptors: u64,
    /// Guest physical address of the available ring ("driver area").
    pub available: u64,
    /// Guest physical address of the used ring ("device area").
    pub used: u64,
}

/// All registers of a transport whose value a guest can observe.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransportState {
    /// The virtio device ID: the state belongs to this kind of device.
    pub device_type: u32,
    /// Status register, with DEVICE_NEEDS_RESET.
    pub status: u32,
    /// Feature bits the driver has written.
    pub driver_features: u64,
    /// DeviceFeaturesSel register.
    pub device_features_select: u32,
    /// DriverFeaturesSel register.
    pub driver_features_select: u32,
    /// QueueSel register.
    pub queue_select: u32,
    /// InterruptStatus register.
    pub interrupt_status: u32,
    /// ConfigGeneration register.
    pub config_generation: u32,
    /// How many of `queues` the device has.
    pub queue_count: u32,
    /// The queues; the ones past `queue_count` are all zero.
    pub queues: [QueueRecord; MAX_QUEUES],
}

/// The part of a saved state that is a device's own.
pub trait DeviceState: Sized {
    /// The version that is written, and the only one read.
    const VERSION: u16;
    /// Most bytes of it.
    const BYTES: usize;

    /// Appends it to `out`.
    fn encode(&self, out: &mut Vec<u8>);

    /// Takes it from the front of `bytes`.
    ///
    /// # Errors
    /// [`DecodeError`] when no device has saved these bytes.
    fn decode(bytes: &mut Fields<'_>) -> Result<Self, DecodeError>;
}

/// Everything that a resumed guest expects to find again in one of its devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedState<S> {
    /// The device's own.
    pub device: S,
    /// Registers and queue positions.
    pub transport: TransportState,
}

impl<S: DeviceState> SavedState<S> {
    /// Most bytes of it.
    pub const BYTES: usize = 2 + S::BYTES + TransportState::BYTES;

    /// Appends the state to `out`.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&S::VERSION.to_le_bytes());
        self.device.encode(out);
        self.transport.encode(out);
    }

    /// Reads a state that a device saved; `bytes` must hold nothing else.
    ///
    /// # Errors
    /// [`DecodeError`] when they are no state of such a device.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new(bytes);
        let (found, known) = (fields.u16()?, S::VERSION);
        if found != known {
            return Err(DecodeError::Version { found, known });
        }
        let device = S::decode(&mut fields)?;
        let transport = TransportState::decode(&mut fields)?;
        fields.finish()?;
        Ok(Self { device, transport })
    }
}

/// Why saved bytes are not a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum DecodeError {
    /// The bytes end in the middle of a field.
    #[error("the device state ends early")]
    Short,
    /// More bytes than the version has fields.
    #[error("{0} unknown bytes follow the device state")]
    Trailing(usize),
    /// Written by a version that this program does not know.
    #[error(
        "its state has version {found}, but this release knows {known}: run the same release on both hosts"
    )]
    Version {
        /// What the state says.
        found: u16,
        /// What is read.
        known: u16,
    },
    /// A field has a value that no device saves.
    #[error("the field `{field}` of the device state cannot be {value:#x}")]
    Value {
        /// Name of the field.
        field: &'static str,
        /// What it was.
        value: u64,
    },
}

impl QueueRecord {
    const BYTES: usize = 2 + 1 + 2 + 2 + 8 + 8 + 8;

    /// The queue at work that this record describes.
    pub(crate) fn build(&self, max_size: u16, event_idx: bool) -> Result<Queue, virtio_queue::Error> {
        Queue::try_from(QueueState {
            max_size,
            next_avail: self.next_avail,
            next_used: self.next_used,
            event_idx_enabled: event_idx,
            size: self.size,
            ready: self.ready,
            desc_table: self.descriptors,
            avail_ring: self.available,
            used_ring: self.used,
        })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.size.to_le_bytes());
        out.push(u8::from(self.ready));
        out.extend_from_slice(&self.next_avail.to_le_bytes());
        out.extend_from_slice(&self.next_used.to_le_bytes());
        out.extend_from_slice(&self.descriptors.to_le_bytes());
        out.extend_from_slice(&self.available.to_le_bytes());
        out.extend_from_slice(&self.used.to_le_bytes());
    }

    fn decode(bytes: &mut Fields<'_>) -> Result<Self, DecodeError> {
        Ok(Self {
            size: bytes.u16()?,
            ready: bytes.flag("queue ready")?,
            next_avail: bytes.u16()?,
            next_used: bytes.u16()?,
            descriptors: bytes.u64()?,
            available: bytes.u64()?,
            used: bytes.u64()?,
        })
    }
}

impl TransportState {
    /// Length of the encoded state in bytes at most: that of a device with [`MAX_QUEUES`] queues.
    pub const BYTES: usize = 8 * 4 + 8 + MAX_QUEUES * QueueRecord::BYTES;

    /// Appends the state to `out`. Does not allocate if `out` has room for [`Self::BYTES`] more.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.device_type.to_le_bytes());
        out.extend_from_slice(&self.status.to_le_bytes());
        out.extend_from_slice(&self.driver_features.to_le_bytes());
        out.extend_from_slice(&self.device_features_select.to_le_bytes());
        out.extend_from_slice(&self.driver_features_select.to_le_bytes());
        out.extend_from_slice(&self.queue_select.to_le_bytes());
        out.extend_from_slice(&self.interrupt_status.to_le_bytes());
        out.extend_from_slice(&self.config_generation.to_le_bytes());
        out.extend_from_slice(&self.queue_count.to_le_bytes());
        for queue in self.queues.iter().take(self.queue_count as usize) {
            queue.encode(out);
        }
    }

    /// Takes a state from the front of `bytes`. Only its form is checked here; whether it fits the device and
    /// the guest's memory is checked by the transport that takes it over.
    pub fn decode(bytes: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let mut state = Self {
            device_type: bytes.u32()?,
            status: bytes.u32()?,
            driver_features: bytes.u64()?,
            device_features_select: bytes.u32()?,
            driver_features_select: bytes.u32()?,
            queue_select: bytes.u32()?,
            interrupt_status: bytes.u32()?,
            config_generation: bytes.u32()?,
            queue_count: bytes.u32()?,
            queues: Default::default(),
        };
        let count = state.queue_count as usize;
        let value = u64::from(state.queue_count);
        let queues =
            state.queues.get_mut(..count).ok_or(DecodeError::Value { field: "queue count", value })?;
        for queue in queues {
            *queue = QueueRecord::decode(bytes)?;
        }
        Ok(state)
    }
}

/// Takes little-endian numbers from the front of a slice.
#[derive(Clone, Copy, Debug)]
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    /// Starts at the front of `bytes`.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        let (head, rest) = self.0.split_first_chunk::<N>().ok_or(DecodeError::Short)?;
        self.0 = rest;
        Ok(*head)
    }

    /// The next byte, which must be 0 or 1.
    pub fn flag(&mut self, field: &'static str) -> Result<bool, DecodeError> {
        match self.array::<1>()? {
            [0] => Ok(false),
            [1] => Ok(true),
            [value] => Err(DecodeError::Value { field, value: u64::from(value) }),
        }
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> Result<u16, DecodeError> {
        self.array().map(u16::from_le_bytes)
    }

    /// The next four bytes.
    pub fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_le_bytes)
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_le_bytes)
    }

    /// Ends the decoding: nothing may be left.
    pub fn finish(self) -> Result<(), DecodeError> {
        if self.0.is_empty() { Ok(()) } else { Err(DecodeError::Trailing(self.0.len())) }
    }
}
