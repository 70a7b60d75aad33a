//! The kernel itself carries out requests: io_uring.
//!
//! What a ring is asked for passes no filter of system calls. So a ring is restricted before its first request: to the
//! four operations of a disk, and to the one file that was registered with it, the image.

// UNSAFETY: the kernel reads and writes buffers by address until it says that it is done; the one unsafe
// block of this file answers for their staying alive and in place until then.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use tracing::error;
use vmm_sys_util::eventfd::EventFd;

use super::super::image::Image;
use super::super::pool::Buffer;
use super::{Completion, Engine, Operation, Submission, ZERO};
use crate::devices::complaints::{Complaints, complain};
use crate::devices::virtio::worker::event;

/// The image, among the files of its ring.
const IMAGE: types::Fixed = types::Fixed(0);
/// A request is for a registered file.
const FIXED_FILE: u8 = squeue::Flags::FIXED_FILE.bits();
/// IORING_UNREGISTER_FILES, the only thing that may still be done to a ring.
const UNREGISTER_FILES: u8 = 3;

/// The engine: a ring, and the buffers of the operations under way.
pub(in super::super) struct Uring {
    inner: Mutex<Inner>,
    event: EventFd,
}

struct Inner {
    ring: IoUring,
    /// By token: the buffer that the kernel works on. Moving a `Vec` keeps its bytes in place.
    under_way: Vec<Option<Buffer>>,
    count: usize,
    complaints: Complaints,
}

impl Uring {
    /// A ring for at most `depth` operations at a time, with tokens below `depth`.
    pub(in super::super) fn start(image: &Image, depth: u16) -> io::Result<Self> {
        let ring = IoUring::builder().setup_r_disabled().build(u32::from(depth))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Read::CODE, opcode::Write::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if !needed.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "this kernel's io_uring cannot do files"));
        }
        let event = event()?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        ring.submitter().register_files(&[image.file().as_raw_fd()])?;
        let operations = needed.map(Restriction::sqe_op);
        let others = [
            Restriction::sqe_flags_allowed(FIXED_FILE),
            Restriction::sqe_flags_required(FIXED_FILE),
            Restriction::register_op(UNREGISTER_FILES),
        ];
        ring.submitter()
            .register_restrictions(&mut operations.into_iter().chain(others).collect::<Vec<_>>())?;
        ring.submitter().register_enable_rings()?;
        let under_way = (0..depth).map(|_| None).collect();
        Ok(Self {
            inner: Mutex::new(Inner { ring, under_way, count: 0, complaints: Complaints::default() }),
            event,
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Engine for Uring {
    fn submit(&self, submissions: &mut Vec<Submission>) {
        if submissions.is_empty() {
            return;
        }
        let mut inner = self.inner();
        for submission in submissions.drain(..) {
            inner.push(submission);
        }
        inner.enter();
    }

    fn reap(&self, completions: &mut Vec<Completion>) {
        self.inner().reap(completions);
    }

    fn try_reap(&self, completions: &mut Vec<Completion>) {
        match self.inner.try_lock() {
            Ok(mut inner) => inner.reap(completions),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().reap(completions),
            Err(TryLockError::WouldBlock) => {}
        }
    }

    fn event(&self) -> &EventFd {
        &self.event
    }

    fn name(&self) -> &'static str {
        "io_uring"
    }
}

impl Inner {
    fn push(&mut self, Submission { token, operation, buffer, .. }: Submission) {
        let slot = &mut self.under_way[usize::from(token)];
        assert!(slot.is_none(), "a token is used once at a time");
        let buffer = slot.insert(buffer);
        self.count += 1;
        let entry = build(operation, buffer).user_data(u64::from(token));
        loop {
            // SAFETY: the entry works on the image, which is registered with the ring, and on a part of `buffer`
            // (`build` slices it, so it is inside) or of the static zeroes. The buffer is in `under_way` until the
            // completion of this token is reaped, and nobody touches it there; moving the `Vec` does not move its
            // bytes. Dropping waits for all completions; should that fail, the buffers are leaked.
            let pushed = unsafe { self.ring.submission().push(&entry) };
            match pushed {
                Ok(()) => return,
                // Cannot happen with one entry per token, except for entries left over from a kernel that was
                // short of memory.
                Err(_) => self.enter(),
            }
        }
    }

    /// Makes the kernel take what was pushed.
    fn enter(&mut self) {
        loop {
            match self.ring.submit() {
                Ok(_) if self.ring.submission().is_empty() => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    // The kernel is short of memory for the moment; the requests stay in the ring.
                    complain!(warn, self.complaints, %error, "io_uring takes no requests now; trying again");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }

    fn reap(&mut self, completions: &mut Vec<Completion>) {
        for entry in self.ring.completion() {
            let token = entry.user_data() as u16;
            let Some(buffer) = self.under_way.get_mut(usize::from(token)).and_then(Option::take) else {
                error!(token, "io_uring completed what was not under way");
                continue;
            };
            self.count -= 1;
            let result = usize::try_from(entry.result()).map_err(|_| -entry.result());
            completions.push(Completion { token, buffer, result: Some(result) });
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.count > 0 {
            match self.ring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    error!(%error, "cannot wait for the disk; its buffers are given up");
                    std::mem::forget(std::mem::take(&mut self.under_way));
                    return;
                }
                _ => self.reap(&mut done),
            }
        }
        // The kernel takes a ring apart some time later, and until then it would keep the image and its lock.
        if let Err(error) = self.ring.submitter().unregister_files() {
            error!(%error, "the disk's image may stay locked for a while");
        }
    }
}

fn build(operation: Operation, buffer: &mut Buffer) -> squeue::Entry {
    let fd = IMAGE;
    match operation {
        Operation::Read { offset, from, len } => {
            let to = &mut buffer[from..from + len];
            opcode::Read::new(fd, to.as_mut_ptr(), len as u32).offset(offset).build()
        }
        Operation::Write { offset, from, len } => {
            let data = &buffer[from..from + len];
            opcode::Write::new(fd, data.as_ptr(), len as u32).offset(offset).build()
        }
        Operation::Zeroes { offset, len } => {
            let data = &ZERO[..len];
            opcode::Write::new(fd, data.as_ptr(), len as u32).offset(offset).build()
        }
        Operation::Sync => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        Operation::PunchHole { offset, len } => fallocate(fd, libc::FALLOC_FL_PUNCH_HOLE, offset, len),
        Operation::ZeroRange { offset, len } => fallocate(fd, libc::FALLOC_FL_ZERO_RANGE, offset, len),
    }
}

fn fallocate(fd: types::Fixed, mode: i32, offset: u64, len: u64) -> squeue::Entry {
    opcode::Fallocate::new(fd, len).offset(offset).mode(mode | libc::FALLOC_FL_KEEP_SIZE).build()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use vmm_sys_util::tempfile::TempFile;

    use super::*;

    #[test]
    fn a_ring_reaches_nothing_but_its_image() {
        let (image, other) = (TempFile::new().unwrap(), TempFile::new().unwrap());
        image.as_file().set_len(4096).unwrap();
        other.as_file().set_len(4096).unwrap();
        let image = Image::open(image.as_path(), false, false, None).unwrap();
        let engine = match Uring::start(&image, 4) {
            Ok(engine) => engine,
            Err(error) => return println!("skipped: no io_uring: {error}"),
        };
        let mut byte = [0_u8; 1];
        let to = byte.as_mut_ptr();
        let forbidden = [
            opcode::Read::new(types::Fd(other.as_file().as_raw_fd()), to, 1).build(),
            opcode::Nop::new().build(),
            opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/etc/passwd".as_ptr()).build(),
            opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
        ];
        for entry in forbidden {
            assert_eq!(result(&engine, &entry), -libc::EACCES, "{entry:?}");
        }
        let allowed = opcode::Read::new(IMAGE, to, 1).build();
        assert_eq!(result(&engine, &allowed), 1);
        let own = File::open("/dev/null").unwrap();
        assert!(engine.inner().ring.submitter().register_files_update(0, &[own.as_raw_fd()]).is_err());
    }

    fn result(engine: &Uring, entry: &squeue::Entry) -> i32 {
        let mut inner = engine.inner();
        // SAFETY: the buffer and the path of every entry live until its completion, which is waited for here.
        unsafe { inner.ring.submission().push(entry) }.unwrap();
        inner.ring.submit_and_wait(1).unwrap();
        inner.ring.completion().next().unwrap().result()
    }
}
