//! Walking the driver's descriptor chains: once, with bounds on descriptors and bytes, through a bounce
//! buffer.

use thiserror::Error;
use virtio_queue::DescriptorChain;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestMemory, GuestMemoryError};

use super::offload::HEADER;
use super::output::MAX_FRAME;

/// Smallest receive buffer where buffers are not merged: header and a frame of 1514 bytes (virtio 1.2,
/// 5.1.6.3.1).
pub(super) const MIN_RX_BUFFER: usize = 1526;

/// How the driver broke the rules; the device stops until it is reset.
#[derive(Debug, Error)]
pub(super) enum Broken {
    #[error("the queue cannot be used: {0}")]
    Queue(#[from] virtio_queue::Error),
    #[error("a buffer lies outside guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    #[error("the available ring cannot be read")]
    Ring,
    #[error("a descriptor chain is empty, is cut off or has more descriptors than the queue")]
    Chain,
    #[error("a buffer to {0} has the wrong direction")]
    Direction(&'static str),
    #[error("a receive buffer has {0} bytes, fewer than the least allowed")]
    SmallBuffer(usize),
    #[error("a frame of {0} bytes with its header is shorter than the header")]
    NoHeader(usize),
    #[error("a frame is longer than {MAX_FRAME} bytes")]
    LongFrame,
    #[error("a command has no room for the answer")]
    NoAnswer,
}

/// Room for one frame with its header on its way through; one more byte shows a frame that is too long.
pub(super) type Bounce = Box<[u8; HEADER + MAX_FRAME + 1]>;

pub(super) fn bounce() -> Bounce {
    // Not made on the stack first.
    let zeroed = vec![0; HEADER + MAX_FRAME + 1].into_boxed_slice();
    match zeroed.try_into() {
        Ok(bounce) => bounce,
        Err(_) => unreachable!("the vector has the length of the array"),
    }
}

/// Copies a chain of the driver's buffers together; says how long they are. At most header and longest frame.
pub(super) fn gather<M: GuestMemory>(
    chain: DescriptorChain<&M>,
    memory: &M,
    limit: u16,
    buffer: &mut Bounce,
) -> Result<usize, Broken> {
    let mut len = 0;
    walk(chain, limit, |descriptor| {
        if descriptor.is_write_only() {
            return Err(Broken::Direction("send"));
        }
        len += copy_in(descriptor, memory, &mut buffer[len..HEADER + MAX_FRAME])?;
        Ok(())
    })?;
    if len < HEADER { Err(Broken::NoHeader(len)) } else { Ok(len) }
}

/// Copies the command in a chain together and hands it to `answer`; the answer goes into the chain's first
/// byte for the device.
pub(super) fn converse<M: GuestMemory>(
    chain: DescriptorChain<&M>,
    memory: &M,
    limit: u16,
    buffer: &mut Bounce,
    answer: impl FnOnce(&[u8]) -> u8,
) -> Result<(), Broken> {
    let mut len = 0;
    let mut room = None;
    walk(chain, limit, |descriptor| {
        if descriptor.is_write_only() {
            if room.is_none() && descriptor.len() > 0 {
                room = Some(descriptor.addr());
            }
        } else if room.is_some() {
            return Err(Broken::Direction("answer"));
        } else {
            len += copy_in(descriptor, memory, &mut buffer[len..HEADER + MAX_FRAME])?;
        }
        Ok(())
    })?;
    let room = room.ok_or(Broken::NoAnswer)?;
    memory.write_slice(&[answer(&buffer[..len])], room)?;
    Ok(())
}

/// Copies a buffer of the driver to the front of `to`.
fn copy_in<M: GuestMemory>(descriptor: Descriptor, memory: &M, to: &mut [u8]) -> Result<usize, Broken> {
    let len = descriptor.len() as usize;
    let to = to.get_mut(..len).ok_or(Broken::LongFrame)?;
    memory.read_slice(to, descriptor.addr())?;
    Ok(len)
}

/// Copies `bytes` into a chain of buffers, as much as there is room for; says how much room there is.
pub(super) fn scatter<M: GuestMemory>(
    chain: DescriptorChain<&M>,
    memory: &M,
    limit: u16,
    bytes: &[u8],
) -> Result<usize, Broken> {
    let mut room = 0usize;
    walk(chain, limit, |descriptor| {
        if !descriptor.is_write_only() {
            return Err(Broken::Direction("receive"));
        }
        let rest = &bytes[room.min(bytes.len())..];
        let part = rest.len().min(descriptor.len() as usize);
        if part > 0 {
            memory.write_slice(&rest[..part], descriptor.addr())?;
        }
        // The iterator ends a chain of 4 GiB or more.
        room += descriptor.len() as usize;
        Ok(())
    })?;
    Ok(room)
}

/// Visits the descriptors of a chain. The iterator simply stops where a chain is broken (an index or an
/// indirect table out of range, a loop, 4 GiB); it can be told by the last descriptor, which then still
/// points to a next one.
fn walk<M: GuestMemory>(
    chain: DescriptorChain<&M>,
    limit: u16,
    mut visit: impl FnMut(Descriptor) -> Result<(), Broken>,
) -> Result<(), Broken> {
    let mut count = 0;
    let mut cut_off = true;
    for descriptor in chain {
        count += 1;
        if count > limit {
            return Err(Broken::Chain);
        }
        visit(descriptor)?;
        cut_off = descriptor.has_next();
    }
    if cut_off { Err(Broken::Chain) } else { Ok(()) }
}
