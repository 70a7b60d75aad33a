//! The system calls of write tracking in this process: userfaultfd and PAGEMAP_SCAN.
//!
//! libc has neither the structures nor the numbers; they are those of include/uapi/linux/userfaultfd.h and
//! include/uapi/linux/fs.h (Linux 6.7 and later), explained in Documentation/admin-guide/mm/pagemap.rst.
// UNSAFETY: ioctls take untyped arguments; each call here pairs a request with its structure. They change how
// memory is tracked, never its contents, so that no address can do harm.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iowr_nr};

use crate::source::uffd_error::UffdError;

/// `USERFAULTFD_IOC` and `UFFDIO`.
const UFFDIO: u32 = 0xaa;
/// `UFFD_API`.
const UFFD_API: u64 = 0xaa;
/// `UFFD_USER_MODE_ONLY`: the descriptor does not handle faults of the kernel, which takes no privilege.
/// Faults on write-protected pages are not *handled* in asynchronous mode: the kernel resolves them itself,
/// including its own.
const USER_MODE_ONLY: libc::c_int = 1;
/// `UFFD_FEATURE_WP_ASYNC` (Linux 6.7): the kernel lets the writer continue and remembers the write.
const WP_ASYNC: u64 = 1 << 15;
/// `UFFD_FEATURE_WP_UNPOPULATED` (6.4): pages that do not exist yet can be protected.
const WP_UNPOPULATED: u64 = 1 << 13;
/// `UFFD_FEATURE_WP_HUGETLBFS_SHMEM` (5.19): memfd and hugetlb memory too.
const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const FEATURES: u64 = WP_ASYNC | WP_UNPOPULATED | WP_HUGETLBFS_SHMEM;
/// `UFFDIO_REGISTER_MODE_WP`.
const MODE_WP: u64 = 1 << 1;
/// `PM_SCAN_WP_MATCHING`: write-protects what it reports, in one step.
const WP_MATCHING: u64 = 1 << 0;
/// `PM_SCAN_CHECK_WPASYNC`: fails on memory that is not registered.
const CHECK_WPASYNC: u64 = 1 << 1;
/// `PAGE_IS_WRITTEN`.
const WRITTEN: u64 = 1 << 1;

/// `struct uffdio_api`.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct Extent {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct Register {
    range: Extent,
    mode: u64,
    ioctls: u64,
}

/// `struct page_region`: a range of addresses with the same properties.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) start: u64,
    /// First address after it; 0 where the kernel has written no region.
    pub(crate) end: u64,
    categories: u64,
}

/// `struct pm_scan_arg`.
#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

ioctl_io_nr!(USERFAULTFD_IOC_NEW, UFFDIO, 0x00);
ioctl_iowr_nr!(UFFDIO_REGISTER, UFFDIO, 0x00, Register);
ioctl_ior_nr!(UFFDIO_UNREGISTER, UFFDIO, 0x01, Extent);
ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
ioctl_iowr_nr!(PAGEMAP_SCAN, b'f' as u32, 16, ScanArg);

/// Tracks writes through mappings of this process.
pub(crate) struct WriteWatch {
    fault: OwnedFd,
    pagemap: File,
}

/// The result of one scan.
pub(crate) struct Found {
    /// Regions written to the front of the buffer. Their pages are protected again, even after an error.
    pub(crate) regions: usize,
    /// Where to continue: the end of the range when all of it was scanned.
    pub(crate) next: u64,
    /// Why the scan ended at `next`, if not for lack of room.
    pub(crate) error: Option<io::Error>,
}

impl WriteWatch {
    pub(crate) fn open() -> Result<WriteWatch, UffdError> {
        let fault = match by_syscall() {
            // A seccomp filter or a security module; the device has permissions of its own.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => by_device().map_err(|_| error),
            other => other,
        };
        let fault = fault.map_err(UffdError::from_open)?;
        shake_hands(&fault)?;
        let pagemap = File::open("/proc/self/pagemap").map_err(UffdError::Pagemap)?;
        let watch = WriteWatch { fault, pagemap };
        match watch.scan(0..0, &mut []) {
            Ok(_) => Ok(watch),
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => {
                Err(UffdError::TooOld("PAGEMAP_SCAN"))
            }
            Err(error) => Err(UffdError::Pagemap(error)),
        }
    }

    /// Begins to track the mappings in the range. Everything in it counts as written until protected.
    ///
    /// Addresses without a mapping are passed over; see [`is_mapped`].
    pub(crate) fn register(&self, range: Range<u64>) -> io::Result<()> {
        let range = Extent { start: range.start, len: range.end - range.start };
        let mut request = Register { range, mode: MODE_WP, ioctls: 0 };
        // SAFETY: the structure of the request, in which the kernel writes `ioctls`.
        checked(unsafe { ioctl_with_mut_ref(&self.fault, UFFDIO_REGISTER(), &mut request) }).map(drop)
    }

    /// Ends tracking. The memory stays unchanged and writers continue.
    pub(crate) fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        let request = Extent { start: range.start, len: range.end - range.start };
        // SAFETY: the structure of the request, read only (the kernel's `_IOR` notwithstanding).
        checked(unsafe { ioctl_with_ref(&self.fault, UFFDIO_UNREGISTER(), &request) }).map(drop)
    }

    /// Write-protects every page of the range.
    pub(crate) fn protect(&self, range: Range<u64>) -> io::Result<()> {
        match (0..=MAX_RETRIES).map(|_| self.scan(range.clone(), &mut [])).find(|done| !is_passing(done)) {
            Some(done) => done.map(drop),
            None => Err(io::ErrorKind::Interrupted.into()),
        }
    }

    /// Takes the written pages of the range, in order of address, and write-protects them in the same step.
    ///
    /// Set every `end` in `regions` to 0 before: an error of the kernel hides how many regions it has
    /// written, and their pages are already protected.
    pub(crate) fn take(&self, range: Range<u64>, regions: &mut [Region]) -> Found {
        let mut retries = 0;
        loop {
            let scanned = self.scan(range.clone(), regions);
            let count = match scanned {
                Ok(count) => count,
                Err(_) => regions.iter().take_while(|region| region.end != 0).count(),
            };
            let passing = is_passing(&scanned);
            if passing && count == 0 && retries < MAX_RETRIES {
                retries += 1;
                continue;
            }
            // Everything before the last region has been scanned. `walk_end` is no better: it has an old
            // value when the kernel has flushed its own buffer of 512 regions on the way.
            let last = regions[..count].last().map_or(range.start, |region| region.end);
            let complete = scanned.is_ok() && count < regions.len();
            return Found {
                regions: count,
                next: if complete { range.end } else { last },
                error: scanned.err().filter(|_| count == 0 || !passing),
            };
        }
    }

    /// Without a buffer it protects and reports nothing.
    fn scan(&self, range: Range<u64>, regions: &mut [Region]) -> io::Result<usize> {
        let vec = if regions.is_empty() { 0 } else { regions.as_mut_ptr() as u64 };
        let mut request = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: WP_MATCHING | CHECK_WPASYNC,
            start: range.start,
            end: range.end,
            vec,
            vec_len: regions.len() as u64,
            category_mask: WRITTEN,
            return_mask: WRITTEN,
            ..ScanArg::default()
        };
        // SAFETY: the structure of the request; the kernel writes `walk_end` and at most `vec_len` regions,
        // plain numbers, to `vec`, which is borrowed exclusively.
        let count = checked(unsafe { ioctl_with_mut_ref(&self.pagemap, PAGEMAP_SCAN(), &mut request) })?;
        Ok((count as usize).min(regions.len()))
    }
}

/// Whether every page of the range belongs to some mapping; the scan skips pages that do not. The cost grows
/// with the number of mappings, not of pages.
pub(crate) fn is_mapped(range: Range<u64>) -> bool {
    // Since Linux 2.6.19 MS_ASYNC does nothing but look for holes (mm/msync.c).
    // SAFETY: reads and changes no memory.
    let result = unsafe {
        libc::msync(range.start as *mut libc::c_void, (range.end - range.start) as usize, libc::MS_ASYNC)
    };
    result == 0
}

fn checked(result: libc::c_int) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Whether a scan can simply be started again.
fn is_passing<T>(scanned: &io::Result<T>) -> bool {
    let passing = [io::ErrorKind::Interrupted, io::ErrorKind::WouldBlock];
    scanned.as_ref().is_err_and(|error| passing.contains(&error.kind()))
}

/// How often a scan is started again without having found anything.
const MAX_RETRIES: u32 = 1000;

fn by_syscall() -> io::Result<OwnedFd> {
    // SAFETY: takes flags only.
    let fd =
        unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY) };
    owned(fd as RawFd)
}

fn by_device() -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK | USER_MODE_ONLY;
    // SAFETY: the argument is a number.
    owned(unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), flags as libc::c_ulong) })
}

fn owned(fd: RawFd) -> io::Result<OwnedFd> {
    checked(fd)?;
    // SAFETY: a descriptor that the kernel has just made for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn shake_hands(fault: &OwnedFd) -> Result<(), UffdError> {
    let mut request = Api { api: UFFD_API, features: FEATURES, ioctls: 0 };
    // SAFETY: the structure of the request, in which the kernel writes `features` and `ioctls`.
    match checked(unsafe { ioctl_with_mut_ref(fault, UFFDIO_API(), &mut request) }) {
        Ok(_) if request.features & FEATURES == FEATURES => Ok(()),
        Err(error) if error.raw_os_error() != Some(libc::EINVAL) => Err(UffdError::Open(error)),
        _ => Err(UffdError::TooOld("UFFD_FEATURE_WP_ASYNC")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_the_requests() {
        // As a C compiler has them.
        assert_eq!(UFFDIO_API(), 0xc018_aa3f);
        assert_eq!(UFFDIO_REGISTER(), 0xc020_aa00);
        assert_eq!(UFFDIO_UNREGISTER(), 0x8010_aa01);
        assert_eq!(USERFAULTFD_IOC_NEW(), 0xaa00);
        assert_eq!(PAGEMAP_SCAN(), 0xc060_6610);
    }

    #[test]
    fn the_device_is_as_good_as_the_call() {
        match by_device() {
            Ok(fault) => match shake_hands(&fault) {
                Err(error @ UffdError::TooOld(_)) => println!("skipped: {error}"),
                other => other.unwrap(),
            },
            Err(error) => println!("skipped: /dev/userfaultfd: {error}"),
        }
    }
}
