//! The devices of a VM, as the primary introduces them: the standby must have the same ones in the same
//! slots.

use crate::error::WireError;
use crate::fields::Fields;

/// Most devices of a VM.
pub const MAX_DEVICES: usize = 32;
/// Most bytes of a disk's serial number.
pub const MAX_SERIAL: usize = 20;

/// What a device is. The numbers are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum DeviceKind {
    /// A network card.
    Net = 1,
    /// A disk.
    Disk = 2,
    /// A source of random numbers.
    Rng = 3,
    /// A console.
    Console = 4,
    /// A serial port of the platform.
    Serial = 5,
}

impl DeviceKind {
    fn from_wire(number: u8) -> Option<Self> {
        [Self::Net, Self::Disk, Self::Rng, Self::Console, Self::Serial]
            .into_iter()
            .find(|kind| *kind as u8 == number)
    }
}

/// How a disk is used. On the wire a `u16`: bit 0 read-only, bit 1 shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceFlags {
    /// The guest cannot write to it.
    pub read_only: bool,
    /// Both hosts see the same disk: a write is output and nothing of it is replicated.
    pub shared: bool,
}

impl DeviceFlags {
    fn to_wire(self) -> u16 {
        u16::from(self.read_only) | u16::from(self.shared) << 1
    }

    fn from_wire(word: u16) -> Option<Self> {
        (word < 4).then_some(Self { read_only: word & 1 != 0, shared: word & 2 != 0 })
    }
}

/// One device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// What it is.
    pub kind: DeviceKind,
    /// How it is used.
    pub flags: DeviceFlags,
    /// Number of its queues; for a network card its queue pairs.
    pub queues: u16,
    /// Bytes of a disk; 0 for others.
    pub size: u64,
    /// A disk's serial number, at most [`MAX_SERIAL`] bytes.
    pub serial: String,
}

impl DeviceInfo {
    /// A device that is nothing but its kind and its queues.
    pub fn new(kind: DeviceKind, queues: u16) -> Self {
        Self { kind, flags: DeviceFlags::default(), queues, size: 0, serial: String::new() }
    }

    /// Bytes of the disk that are replicated: 0 for what is no disk, is shared or is never written.
    pub fn replicated_bytes(&self) -> u64 {
        let replicated = self.kind == DeviceKind::Disk && !self.flags.shared && !self.flags.read_only;
        if replicated { self.size } else { 0 }
    }

    /// Appends everything but the serial number.
    pub(crate) fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[self.kind as u8, 0]);
        out.extend_from_slice(&self.flags.to_wire().to_le_bytes());
        out.extend_from_slice(&self.queues.to_le_bytes());
        out.extend_from_slice(&self.size.to_le_bytes());
    }

    pub(crate) fn parse(fields: &mut Fields<'_>) -> Result<Self, WireError> {
        let number = fields.u8()?;
        let kind = DeviceKind::from_wire(number)
            .ok_or_else(|| fields.malformed("unknown kind of device", number.into()))?;
        fields.reserved(1)?;
        let word = fields.u16()?;
        let flags = DeviceFlags::from_wire(word)
            .ok_or_else(|| fields.malformed("unknown device flags", word.into()))?;
        let (queues, size) = (fields.u16()?, fields.u64()?);
        if size > i64::MAX as u64 {
            return Err(fields.malformed("a disk larger than every disk", size));
        }
        Ok(Self { kind, flags, queues, size, serial: fields.text(MAX_SERIAL)? })
    }
}
