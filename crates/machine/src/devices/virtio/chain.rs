//! The buffers that a driver hands over. The driver may be hostile.
//!
//! A chain is walked once, with a bound on its descriptors, and every buffer of it is checked to lie in guest
//! memory. `virtio_queue::DescriptorChain` is not used for that: it takes an indirect table that also has a
//! next descriptor, and cannot begin at a head that no available ring names (a request of a saved state).
//! Guest memory is touched with vm-memory's methods only, so its bitmap has every page that a device dirties.

use thiserror::Error;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, Permissions};

/// Length of a descriptor.
const DESCRIPTOR: u32 = 16;

/// How the driver broke the rules; the device stops until it is reset.
#[derive(Debug, Error)]
pub enum Broken {
    /// The queue's memory.
    #[error("the queue cannot be used: {0}")]
    Queue(#[from] virtio_queue::Error),
    /// A buffer that was in guest memory before.
    #[error("guest memory cannot be used: {0}")]
    Memory(#[from] GuestMemoryError),
    /// A buffer or a table of descriptors is outside guest memory.
    #[error("a buffer or a descriptor lies outside guest memory")]
    Outside,
    /// The index is out of range.
    #[error("the available ring cannot be read")]
    Available,
    /// The descriptors form no chain.
    #[error("a descriptor chain leads nowhere or has more descriptors than the queue")]
    Chain,
    /// The indirect table has a wrong length, is within another one, or a descriptor follows it.
    #[error("an indirect descriptor table is invalid")]
    Indirect,
    /// Buffers for the device must come first.
    #[error("a buffer to read from follows one to write to")]
    Order,
    /// A buffer has the wrong direction for its place.
    #[error("a buffer to {0} has the wrong direction")]
    Direction(&'static str),
    /// A buffer is longer than the device takes at once.
    #[error("a buffer is longer than {0} bytes")]
    Long(usize),
    /// No buffer at all, or one of no bytes.
    #[error("a buffer has no bytes")]
    Empty,
    /// A rule of one kind of device.
    #[error("{0}")]
    Rule(&'static str),
}

/// A piece of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    at: GuestAddress,
    len: u32,
}

/// The buffers of one chain, in order. It is reused, so that walking does not allocate.
#[derive(Debug, Default)]
pub struct Chain {
    for_device: Vec<Piece>,
    for_driver: Vec<Piece>,
    device_bytes: u64,
    driver_bytes: u64,
}

impl Chain {
    /// Reads the buffers of the chain that begins at descriptor `head`.
    ///
    /// # Errors
    /// [`Broken`] when they form no chain, are more than the queue has descriptors, or are not all in guest
    /// memory.
    pub fn walk<M: GuestMemory>(&mut self, memory: &M, queue: &Queue, head: u16) -> Result<(), Broken> {
        self.for_device.clear();
        self.for_driver.clear();
        (self.device_bytes, self.driver_bytes) = (0, 0);
        let mut table = GuestAddress(queue.desc_table());
        let (mut size, mut index, mut indirect) = (u32::from(queue.size()), u32::from(head), false);
        // One step more than there may be descriptors: the one that leads to an indirect table does not
        // count.
        for _ in 0..=queue.size() {
            if index >= size {
                return Err(Broken::Chain);
            }
            let at = table.checked_add(u64::from(index * DESCRIPTOR)).ok_or(Broken::Outside)?;
            let descriptor: Descriptor = memory.read_obj(at)?;
            if descriptor.refers_to_indirect_table() {
                let len = descriptor.len();
                let fits = len.is_multiple_of(DESCRIPTOR) && (1..=0xffff).contains(&(len / DESCRIPTOR));
                if indirect || descriptor.has_next() || !fits {
                    return Err(Broken::Indirect);
                }
                (table, size, index, indirect) = (descriptor.addr(), len / DESCRIPTOR, 0, true);
                continue;
            }
            self.add(memory, &descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = u32::from(descriptor.next());
        }
        Err(Broken::Chain)
    }

    fn add<M: GuestMemory>(&mut self, memory: &M, descriptor: &Descriptor) -> Result<(), Broken> {
        let piece = Piece { at: descriptor.addr(), len: descriptor.len() };
        let (pieces, bytes, access) = if descriptor.is_write_only() {
            (&mut self.for_driver, &mut self.driver_bytes, Permissions::Write)
        } else if self.for_driver.is_empty() {
            (&mut self.for_device, &mut self.device_bytes, Permissions::Read)
        } else {
            return Err(Broken::Order);
        };
        if piece.len > 0 && !memory.check_range(piece.at, piece.len as usize, access) {
            return Err(Broken::Outside);
        }
        *bytes += u64::from(piece.len);
        pieces.push(piece);
        Ok(())
    }

    /// How many descriptors it has.
    pub fn descriptors(&self) -> usize {
        self.for_device.len() + self.for_driver.len()
    }

    /// How many bytes the driver gives the device to read.
    pub fn device_bytes(&self) -> u64 {
        self.device_bytes
    }

    /// How many bytes the driver wants the device to write.
    pub fn driver_bytes(&self) -> u64 {
        self.driver_bytes
    }

    /// Length of what the driver sends, at most `limit` bytes.
    ///
    /// # Errors
    /// [`Broken`] when it is longer, or a buffer is for the driver.
    pub fn sent(&self, limit: usize) -> Result<usize, Broken> {
        if !self.for_driver.is_empty() {
            return Err(Broken::Direction("send"));
        }
        usize::try_from(self.device_bytes).ok().filter(|&len| len <= limit).ok_or(Broken::Long(limit))
    }

    /// Room for what the driver receives; never 0.
    ///
    /// # Errors
    /// [`Broken`] when there is none, or a buffer is for the device.
    pub fn room(&self) -> Result<usize, Broken> {
        if !self.for_device.is_empty() {
            return Err(Broken::Direction("receive"));
        }
        if self.driver_bytes == 0 { Err(Broken::Empty) } else { Ok(self.driver_bytes as usize) }
    }

    /// Copies the driver's bytes from number `skip` on to `to`. The caller has checked that there are enough.
    ///
    /// # Errors
    /// vm-memory's; not for buffers that were walked.
    pub fn read<M: GuestMemory>(
        &self,
        memory: &M,
        skip: usize,
        mut to: &mut [u8],
    ) -> Result<(), GuestMemoryError> {
        for (at, len) in pieces(&self.for_device, skip) {
            let (now, rest) = to.split_at_mut(len.min(to.len()));
            if now.is_empty() {
                break;
            }
            memory.read_slice(now, at)?;
            to = rest;
        }
        Ok(())
    }

    /// Copies `from` to the bytes for the driver from number `skip` on. The caller has checked that there is
    /// room.
    ///
    /// # Errors
    /// vm-memory's; not for buffers that were walked.
    pub fn write<M: GuestMemory>(
        &self,
        memory: &M,
        skip: usize,
        mut from: &[u8],
    ) -> Result<(), GuestMemoryError> {
        for (at, len) in pieces(&self.for_driver, skip) {
            let (now, rest) = from.split_at(len.min(from.len()));
            if now.is_empty() {
                break;
            }
            memory.write_slice(now, at)?;
            from = rest;
        }
        Ok(())
    }
}

/// The pieces of guest memory from byte `skip` on.
fn pieces(pieces: &[Piece], mut skip: usize) -> impl Iterator<Item = (GuestAddress, usize)> + '_ {
    pieces.iter().filter_map(move |piece| {
        let len = piece.len as usize;
        let from = skip.min(len);
        skip -= from;
        (from < len).then(|| (piece.at.unchecked_add(from as u64), len - from))
    })
}
