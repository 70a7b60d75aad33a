//! What is saved of a disk besides its registers.
//!
//! The contents of the disk are not saved: they are replicated, or shared. The requests in flight are saved:
//! the available ring is already past their chains and the used ring does not have them yet, so this list is
//! the only trace of them. A restored device issues them again, oldest first, before it takes any other.

use thiserror::Error;
use virtio_bindings::virtio_config::{VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_NEEDS_RESET};

use super::SERIAL_BYTES;
use super::table::MAX_IN_FLIGHT;
use crate::devices::virtio::persist::{DecodeError, DeviceState, Fields, SavedState, TransportState};

/// What a driver has been told about a disk, and what it has told the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskFacts {
    /// Length of the disk.
    pub sectors: u64,
    /// Whether its writes are output.
    pub shared: bool,
    /// Whether the driver flushes; otherwise every write is made durable at once.
    pub writeback: bool,
    /// Its serial number.
    pub serial: [u8; SERIAL_BYTES],
}

/// A request in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InFlight {
    /// The queue it came through.
    pub queue: u16,
    /// The descriptor it begins with.
    pub head: u16,
}

/// A disk's own part of its state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskState {
    /// The disk.
    pub facts: DiskFacts,
    /// The requests in flight, oldest first.
    pub in_flight: Vec<InFlight>,
}

/// Everything that a resumed guest expects to find again in its disk.
pub type BlockState = SavedState<DiskState>;

/// Why a saved state does not fit a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Misfit {
    /// The image has another length.
    #[error(
        "the guest's disk has {expected} sectors, but the image here has {found}: synchronise the image first"
    )]
    Length {
        /// What the state says.
        expected: u64,
        /// What this device has.
        found: u64,
    },
    /// One host shares the disk and the other does not.
    #[error("the disk is {}shared in the state, and {}shared here: give it the same options on both hosts", if *.0 { "" } else { "not " }, if *.0 { "not " } else { "" })]
    Shared(bool),
    /// A request in flight is impossible.
    #[error("no request of queue {queue} with head {head} can be in flight, or it is listed twice")]
    InFlight {
        /// The queue of the request.
        queue: u16,
        /// Its first descriptor.
        head: u16,
    },
    /// The list of requests does not match the positions in the rings.
    #[error("queue {queue} has {expected} requests in flight, but {listed} are listed")]
    Count {
        /// Which queue.
        queue: u16,
        /// The number according to the positions in the rings.
        expected: u16,
        /// The number according to the list.
        listed: u16,
    },
}

/// Appends a disk's part of a state to `out`. Does not allocate if `out` has room for [`DiskState::BYTES`]
/// more.
pub(super) fn encode(facts: &DiskFacts, in_flight: impl Iterator<Item = InFlight>, out: &mut Vec<u8>) {
    out.extend_from_slice(&facts.sectors.to_le_bytes());
    out.push(u8::from(facts.shared));
    out.push(u8::from(facts.writeback));
    out.extend_from_slice(&facts.serial);
    let count_at = out.len();
    out.extend_from_slice(&[0; 2]);
    let mut count = 0u16;
    for request in in_flight {
        out.extend_from_slice(&request.queue.to_le_bytes());
        out.extend_from_slice(&request.head.to_le_bytes());
        count += 1;
    }
    out[count_at..count_at + 2].copy_from_slice(&count.to_le_bytes());
}

impl DeviceState for DiskState {
    /// - 1: sectors, shared, writeback, serial number, requests in flight, transport.
    const VERSION: u16 = 1;
    const BYTES: usize = 8 + 1 + 1 + SERIAL_BYTES + 2 + MAX_IN_FLIGHT * 4;

    fn encode(&self, out: &mut Vec<u8>) {
        encode(&self.facts, self.in_flight.iter().copied(), out);
    }

    fn decode(bytes: &mut Fields<'_>) -> Result<Self, DecodeError> {
        let sectors = bytes.u64()?;
        let shared = bytes.flag("shared")?;
        let writeback = bytes.flag("writeback")?;
        let serial = bytes.array()?;
        let count = bytes.u16()?;
        if usize::from(count) > MAX_IN_FLIGHT {
            return Err(DecodeError::Value { field: "requests in flight", value: u64::from(count) });
        }
        let in_flight = (0..count)
            .map(|_| Ok(InFlight { queue: bytes.u16()?, head: bytes.u16()? }))
            .collect::<Result<_, DecodeError>>()?;
        Ok(Self { facts: DiskFacts { sectors, shared, writeback, serial }, in_flight })
    }
}

impl DiskState {
    /// Checks the list of requests against the queues.
    pub(super) fn check_in_flight(&self, transport: &TransportState) -> Result<(), Misfit> {
        let runs = transport.status & VIRTIO_CONFIG_S_DRIVER_OK != 0
            && transport.status & VIRTIO_CONFIG_S_NEEDS_RESET == 0;
        let queues = &transport.queues[..transport.queue_count as usize];
        let mut seen = vec![Vec::new(); queues.len()];
        for &InFlight { queue, head } in &self.in_flight {
            let refused = Misfit::InFlight { queue, head };
            let record = queues.get(usize::from(queue)).ok_or(refused)?;
            let heads = &mut seen[usize::from(queue)];
            if !runs || !record.ready || head >= record.size || heads.contains(&head) {
                return Err(refused);
            }
            heads.push(head);
        }
        for (queue, (record, heads)) in queues.iter().zip(seen).enumerate().filter(|_| runs) {
            let (expected, listed) = (record.next_avail.wrapping_sub(record.next_used), heads.len() as u16);
            if record.ready && expected != listed {
                return Err(Misfit::Count { queue: queue as u16, expected, listed });
            }
        }
        Ok(())
    }
}
