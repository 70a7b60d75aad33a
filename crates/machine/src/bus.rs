//! Address maps: which device answers at which MMIO or port address.
//!
//! A [`Bus`] is filled while the machine is built and then only read, by all vCPU threads at once. A lookup
//! is a binary search in a sorted array: no allocation and no lock but the device's own.
//!
//! If no device answers, a read gives all ones and a write has no effect, as on a PC; both are counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use thiserror::Error;

/// A device that answers at a range of addresses.
///
/// `offset` is relative to the start of the range and `offset + data.len()` never exceeds its length. `data`
/// is as long as the access of the guest: 1, 2, 4 or 8 bytes, string I/O element by element.
pub trait BusDevice: Send {
    /// Answers a read by filling all of `data`.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes a write.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as the bus holds it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a device could not be put on the bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum BusError {
    /// The range has no addresses.
    #[error("the range at {base:#x} is empty")]
    Empty {
        /// First address asked for.
        base: u64,
    },
    /// The range goes past the last address.
    #[error("the range at {base:#x} of {len:#x} bytes goes past the end of the address space")]
    PastTheEnd {
        /// First address asked for.
        base: u64,
        /// Length asked for, in bytes.
        len: u64,
    },
    /// Another device already answers in the range.
    #[error("the range at {base:#x} of {len:#x} bytes overlaps the device at {other:#x}")]
    Overlap {
        /// First address asked for.
        base: u64,
        /// Length asked for, in bytes.
        len: u64,
        /// First address of the device in the way.
        other: u64,
    },
}

struct Entry {
    base: u64,
    /// Last address of the range (inclusive, so that a range may end at `u64::MAX`).
    last: u64,
    device: SharedDevice,
}

/// Accesses that no device answered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unanswered {
    /// Reads answered with all ones.
    pub reads: u64,
    /// Writes without effect.
    pub writes: u64,
}

/// One address space of devices: the machine has one for MMIO and one for ports.
#[derive(Default)]
pub struct Bus {
    entries: Vec<Entry>,
    unanswered_reads: AtomicU64,
    unanswered_writes: AtomicU64,
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + len`.
    pub fn insert(&mut self, base: u64, len: u64, device: SharedDevice) -> Result<(), BusError> {
        if len == 0 {
            return Err(BusError::Empty { base });
        }
        let last = base.checked_add(len - 1).ok_or(BusError::PastTheEnd { base, len })?;
        let at = self.entries.partition_point(|e| e.base < base);
        let before = at.checked_sub(1).and_then(|i| self.entries.get(i)).filter(|e| e.last >= base);
        let after = self.entries.get(at).filter(|e| e.base <= last);
        if let Some(other) = before.or(after) {
            return Err(BusError::Overlap { base, len, other: other.base });
        }
        self.entries.insert(at, Entry { base, last, device });
        Ok(())
    }

    /// Reads from the device that answers at `address`; all ones (and `false`) if none does.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((entry, offset)) => {
                entry.device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                self.unanswered_reads.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }

    /// Writes to the device that answers at `address`; `false` if none does.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((entry, offset)) => {
                entry.device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
                true
            }
            None => {
                self.unanswered_writes.fetch_add(1, Ordering::Relaxed);
                false
            }
        }
    }

    /// How many accesses no device answered since the start.
    pub fn unanswered(&self) -> Unanswered {
        Unanswered {
            reads: self.unanswered_reads.load(Ordering::Relaxed),
            writes: self.unanswered_writes.load(Ordering::Relaxed),
        }
    }

    /// The device that all of `address..address + len` belongs to. An access across the edge of a device
    /// belongs to none.
    fn find(&self, address: u64, len: usize) -> Option<(&Entry, u64)> {
        let last = address.checked_add((len as u64).checked_sub(1)?)?;
        let at = self.entries.partition_point(|e| e.base <= address);
        let entry = self.entries.get(at.checked_sub(1)?)?;
        (last <= entry.last).then(|| (entry, address - entry.base))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder {
        writes: Vec<(u64, Vec<u8>)>,
    }

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.writes.push((offset, data.to_vec()));
        }
    }

    fn device() -> Arc<Mutex<Recorder>> {
        Arc::new(Mutex::new(Recorder::default()))
    }

    #[test]
    fn finds_the_device_of_an_address() {
        let (low, high) = (device(), device());
        let mut bus = Bus::new();
        bus.insert(0x2000, 0x1000, high.clone()).unwrap();
        bus.insert(0x1000, 0x1000, low.clone()).unwrap();

        let mut data = [0; 2];
        assert!(bus.read(0x1004, &mut data));
        assert_eq!(data, [4, 4]);
        assert!(bus.write(0x2ffc, &[1, 2, 3, 4]));
        assert_eq!(high.lock().unwrap().writes, [(0xffc, vec![1, 2, 3, 4])]);
        assert!(low.lock().unwrap().writes.is_empty());
        assert_eq!(bus.unanswered(), Unanswered::default());
    }

    #[test]
    fn nobody_home_reads_all_ones_and_is_counted() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, device()).unwrap();
        for address in [0, 0xfff, 0x1010, u64::MAX] {
            let mut data = [0; 4];
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(address, &data));
        }
        assert_eq!(bus.unanswered(), Unanswered { reads: 4, writes: 4 });
    }

    #[test]
    fn an_access_over_the_edge_reaches_no_device() {
        let device = device();
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        let mut data = [0; 4];
        assert!(!bus.read(0x100d, &mut data));
        assert!(!bus.write(0x100d, &data));
        assert!(!bus.write(0x1000, &[]));
        assert!(device.lock().unwrap().writes.is_empty());
    }

    #[test]
    fn refuses_overlap_empty_and_overflowing_ranges() {
        let mut bus = Bus::new();
        bus.insert(0x1000, 0x1000, device()).unwrap();
        for (base, len) in [(0x1000, 0x1000), (0x1fff, 1), (0xfff, 2), (0, 0x10_000), (0x1800, 8)] {
            let refused = bus.insert(base, len, device()).unwrap_err();
            assert_eq!(refused, BusError::Overlap { base, len, other: 0x1000 });
        }
        assert_eq!(bus.insert(0x5000, 0, device()), Err(BusError::Empty { base: 0x5000 }));
        let past = Err(BusError::PastTheEnd { base: u64::MAX, len: 2 });
        assert_eq!(bus.insert(u64::MAX, 2, device()), past);
        bus.insert(u64::MAX, 1, device()).unwrap();
        assert!(bus.write(u64::MAX, &[0]));
        bus.insert(0xfff, 1, device()).unwrap();
        bus.insert(0x2000, 1, device()).unwrap();
    }
}
