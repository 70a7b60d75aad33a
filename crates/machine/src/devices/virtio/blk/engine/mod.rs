//! How requests reach the host's disk: io_uring, or plain threads where that is missing.
//!
//! An engine is given single operations with the buffer they work on, and hands both back when it is done. It
//! knows nothing of guests, queues and order.

#[cfg(any(test, feature = "fuzzing"))]
pub(super) mod manual;
pub(super) mod threads;
pub(super) mod uring;

use std::io;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use super::image::Image;
use super::pool::Buffer;
use crate::devices::valve::{Permit, Tag};

/// The engine that carries requests to the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineKind {
    /// io_uring where the kernel has it and lets this process use it, threads elsewhere.
    #[default]
    Auto,
    /// io_uring, or an error.
    Uring,
    /// Threads that read and write.
    Threads,
}

/// One operation on the disk. Offsets and lengths are in bytes; `from` is where in the buffer the data
/// begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read {
        offset: u64,
        from: usize,
        len: usize,
    },
    Write {
        offset: u64,
        from: usize,
        len: usize,
    },
    /// Writes zeroes, at most [`ZEROES`] of them; needs no buffer.
    Zeroes {
        offset: u64,
        len: usize,
    },
    /// Makes the range read as zeroes and gives its space back.
    PunchHole {
        offset: u64,
        len: u64,
    },
    /// Makes the range read as zeroes and keeps its space.
    ZeroRange {
        offset: u64,
        len: u64,
    },
    /// Makes everything written durable.
    Sync,
}

impl Operation {
    /// Whether it changes the disk's contents.
    pub(super) fn changes(&self) -> bool {
        !matches!(self, Self::Read { .. } | Self::Sync)
    }
}

/// Most bytes one operation writes from the engines' own zeroes.
pub(super) const ZEROES: usize = 64 << 10;
static ZERO: [u8; ZEROES] = [0; ZEROES];

/// An operation to carry out. No two with the same token are under way.
#[derive(Debug)]
pub(super) struct Submission {
    pub(super) token: u16,
    pub(super) operation: Operation,
    pub(super) buffer: Buffer,
    /// Tells whether a change of a shared disk may still be carried out.
    pub(super) tag: Tag,
}

/// An operation that is done, or never will be.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) token: u16,
    pub(super) buffer: Buffer,
    /// Bytes transferred (0 where the operation transfers none), or the error number. `None`: it was not
    /// carried out, because the shared disk may not be changed.
    pub(super) result: Option<Result<usize, i32>>,
}

/// Carries operations out.
pub(super) trait Engine: Send + Sync {
    /// Begins all of them and empties the list. Call it outside the gate: the kernel may take as long as it
    /// pleases.
    ///
    /// An engine may tie an operation to the thread that submits it, so all but those of a shared disk come
    /// from the device's own thread.
    fn submit(&self, submissions: &mut Vec<Submission>);

    /// Adds finished operations to the list. Waits for a thread that submits, so only the device's own thread calls it.
    fn reap(&self, completions: &mut Vec<Completion>);

    /// The same for any thread: it never waits for the disk. While another thread submits, which may take as long as
    /// the kernel pleases, it may add nothing.
    fn try_reap(&self, completions: &mut Vec<Completion>);

    /// Readable when an operation is done.
    fn event(&self) -> &EventFd;

    /// The engine's name.
    fn name(&self) -> &'static str;
}

/// An engine for `image` with at most `depth` operations under way.
///
/// For a shared disk there is a permission, which the engine asks before each change. Such a disk gets
/// threads: its writes are submitted by whoever commits an epoch, and io_uring cancels the operations of a
/// thread when that thread ends.
pub(super) fn start(
    kind: EngineKind,
    image: &Arc<Image>,
    depth: u16,
    permit: Option<Arc<Permit>>,
) -> io::Result<Box<dyn Engine>> {
    let shared = permit.is_some();
    let threads = || threads::Threads::start(image.clone(), permit).map(|engine| Box::new(engine) as _);
    match kind {
        EngineKind::Threads => threads(),
        _ if shared => threads(),
        EngineKind::Uring => Ok(Box::new(uring::Uring::start(image, depth)?)),
        EngineKind::Auto => match uring::Uring::start(image, depth) {
            Ok(engine) => Ok(Box::new(engine)),
            Err(error) => {
                tracing::info!(%error, "no io_uring here: threads carry the requests to the disk");
                threads()
            }
        },
    }
}
