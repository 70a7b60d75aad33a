//! A card that is connected to nothing: what it sends is gone, and nothing ever comes.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::output::FrameSink;
use super::tap::FramePort;

/// The other end of the wire of a VM that must not reach anybody. The guest sees a card with its link up, as before: a
/// link that goes down would be an event that the VM has not had.
#[derive(Debug)]
pub struct Nowhere {
    /// One for each queue. Nobody ever writes to them.
    never: Vec<EventFd>,
}

impl Nowhere {
    /// For a card with this many queue pairs.
    ///
    /// # Errors
    /// The process has too many open files.
    pub fn with_pairs(pairs: u16) -> io::Result<Self> {
        let never =
            (0..pairs).map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)).collect::<io::Result<_>>()?;
        Ok(Self { never })
    }
}

impl FrameSink for Nowhere {
    fn send(&self, _pair: usize, _packet: &[u8]) -> io::Result<()> {
        Ok(())
    }
}

impl FramePort for Nowhere {
    fn pairs(&self) -> usize {
        self.never.len()
    }

    fn fd(&self, pair: usize) -> RawFd {
        self.never[pair].as_raw_fd()
    }

    fn receive(&self, _pair: usize, _buffer: &mut [u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn set_offloads(&self, _offloads: u64) -> io::Result<()> {
        Ok(())
    }

    fn set_pairs(&self, _pairs: usize) -> io::Result<()> {
        Ok(())
    }
}
