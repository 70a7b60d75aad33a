//! The devices of a VM, as the primary introduces them: the standby must have the same ones in the same
//! slots.

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
    pub(crate) fn from_wire(number: u8) -> Option<Self> {
        [Self::Net, Self::Disk, Self::Rng, Self::Console, Self::Serial]
            .into_iter()
            .find(|kind| *kind as u8 == number)
    }
}

/// How a disk is used. On the wire a `u16`: bit 0 read-only, bit 1 shared, bit 2 sectors of 4096 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DeviceFlags {
    /// The guest cannot write to it.
    pub read_only: bool,
    /// Both hosts see the same disk: a write is output and is not replicated.
    pub shared: bool,
    /// Its sectors have 4096 bytes, and not 512. A guest finds its partitions by the size of a sector, so
    /// both hosts must show the same. A standby of a release that does not know the flag refuses it.
    pub large_sectors: bool,
}

impl DeviceFlags {
    pub(crate) fn to_wire(self) -> u16 {
        u16::from(self.read_only) | u16::from(self.shared) << 1 | u16::from(self.large_sectors) << 2
    }

    pub(crate) fn from_wire(word: u16) -> Option<Self> {
        (word < 8).then_some(Self {
            read_only: word & 1 != 0,
            shared: word & 2 != 0,
            large_sectors: word & 4 != 0,
        })
    }
}

/// How a network card is connected. The same on both hosts, because the guest relies on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wiring {
    /// The largest packet in bytes that the guest was told it may send (MTU); `None`: it was told nothing.
    pub mtu: Option<u16>,
    /// The VLAN that the card's frames belong to on the host's bridge, 1 to [`Wiring::MAX_VLAN`].
    pub vlan: Option<u16>,
}

impl Wiring {
    /// The smallest MTU: that of IPv4.
    pub const MIN_MTU: u16 = 68;
    /// The largest VLAN.
    pub const MAX_VLAN: u16 = 4094;
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
    /// A disk's serial number, at most [`MAX_SERIAL`](super::limits::MAX_SERIAL) bytes.
    pub serial: String,
    /// Of a network card: how it is connected. On the wire, bit 3 of the flags says that it follows. A release
    /// that does not know it refuses the flag.
    pub wiring: Wiring,
}

impl DeviceInfo {
    /// A device with nothing but a kind and queues.
    pub fn new(kind: DeviceKind, queues: u16) -> Self {
        Self {
            kind,
            flags: DeviceFlags::default(),
            queues,
            size: 0,
            serial: String::new(),
            wiring: Wiring::default(),
        }
    }

    /// Bytes of the disk that are replicated: 0 for a device that is no disk, is shared or is read-only.
    pub fn replicated_bytes(&self) -> u64 {
        let replicated = self.kind == DeviceKind::Disk && !self.flags.shared && !self.flags.read_only;
        if replicated { self.size } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_flag_of_a_disk_comes_back_and_others_are_unknown() {
        for word in 0..8 {
            assert_eq!(DeviceFlags::from_wire(word).map(DeviceFlags::to_wire), Some(word));
        }
        let large = DeviceFlags { large_sectors: true, ..DeviceFlags::default() };
        assert_eq!((large.to_wire(), DeviceFlags::from_wire(8)), (4, None));
    }
}
