//! userfaultfd and PAGEMAP_SCAN, from include/uapi/linux/userfaultfd.h and include/uapi/linux/fs.h.
// UNSAFETY: ioctls take untyped arguments; each call pairs a request with its structure.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::FromRawFd;

use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_val};
use vmm_sys_util::{ioctl_io_nr, ioctl_iowr_nr};

use crate::guest::{Mapping, PAGE};

const UFFDIO: u32 = 0xaa;
const WP_ASYNC: u64 = 1 << 15;
const WP_UNPOPULATED: u64 = 1 << 13;
const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;
const WP_MATCHING: u64 = 1;
const CHECK_WPASYNC: u64 = 2;
const WRITTEN: u64 = 1 << 1;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyIn {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct Extent {
    pub(crate) start: u64,
    pub(crate) end: u64,
    pub(crate) categories: u64,
}

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
ioctl_iowr_nr!(UFFDIO_COPY, UFFDIO, 0x03, CopyIn);
ioctl_iowr_nr!(UFFDIO_API, UFFDIO, 0x3f, Api);
ioctl_iowr_nr!(PAGEMAP_SCAN, b'f' as u32, 16, ScanArg);

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// A userfaultfd that handles the kernel's own faults, too: that takes CAP_SYS_PTRACE or the device.
pub(crate) struct Faults(File);

impl Faults {
    fn open(features: u64) -> io::Result<Faults> {
        // SAFETY: takes flags only.
        let mut fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) } as libc::c_int;
        if fd < 0 {
            let device = File::options().read(true).write(true).open("/dev/userfaultfd")?;
            // SAFETY: the argument is a number.
            fd = unsafe { ioctl_with_val(&device, USERFAULTFD_IOC_NEW(), libc::O_CLOEXEC as libc::c_ulong) };
        }
        // SAFETY: a descriptor that the kernel has just made for us.
        let faults = Faults(unsafe { File::from_raw_fd(checked(fd)?) });
        let mut request = Api { api: 0xaa, features, ioctls: 0 };
        // SAFETY: the structure of the request.
        checked(unsafe { ioctl_with_mut_ref(&faults.0, UFFDIO_API(), &mut request) })?;
        Ok(faults)
    }

    fn register(&self, memory: &Mapping, mode: u64) -> io::Result<()> {
        let mut request = Register { start: memory.address(), len: memory.bytes(), mode, ioctls: 0 };
        // SAFETY: the structure of the request.
        checked(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_REGISTER(), &mut request) }).map(drop)
    }

    /// Memory whose pages are missing until [`Faults::fill`].
    pub(crate) fn missing(memory: &Mapping) -> io::Result<Faults> {
        let faults = Faults::open(0)?;
        faults.register(memory, MODE_MISSING)?;
        Ok(faults)
    }

    /// Waits until somebody wants a page.
    pub(crate) fn wait(&self) -> io::Result<()> {
        (&self.0).read_exact(&mut [0; 32])
    }

    /// Gives the first page these contents; a thread that waited for it continues.
    pub(crate) fn fill(&self, memory: &Mapping, contents: &Mapping) -> io::Result<()> {
        let (to, from) = (memory.address(), contents.address());
        let mut request = CopyIn { to, from, len: PAGE, mode: 0, copied: 0 };
        // SAFETY: the structure of the request; the kernel copies a page of one mapping to one of another.
        checked(unsafe { ioctl_with_mut_ref(&self.0, UFFDIO_COPY(), &mut request) }).map(drop)
    }
}

/// Write tracking of one mapping.
pub(crate) struct Watch<'m> {
    memory: &'m Mapping,
    pagemap: File,
    _faults: Faults,
}

/// The result of a scan.
pub(crate) struct Scanned {
    pub(crate) extents: Vec<Extent>,
    pub(crate) walk_end: u64,
    pub(crate) end: u64,
}

impl Scanned {
    pub(crate) fn pages(&self) -> u64 {
        self.extents.iter().map(|extent| (extent.end - extent.start) / PAGE).sum()
    }
}

impl<'m> Watch<'m> {
    pub(crate) fn new(memory: &'m Mapping) -> io::Result<Watch<'m>> {
        let faults = Faults::open(WP_ASYNC | WP_UNPOPULATED | WP_HUGETLBFS_SHMEM)?;
        faults.register(memory, MODE_WP)?;
        let watch = Watch { memory, pagemap: File::open("/proc/self/pagemap")?, _faults: faults };
        watch.scan(0)?;
        Ok(watch)
    }

    /// The pages written since the last take, which are write-protected anew in the same step.
    pub(crate) fn take(&self) -> io::Result<Scanned> {
        self.scan(65_536)
    }

    /// At most this many extents; none: only protect.
    fn scan(&self, extents: usize) -> io::Result<Scanned> {
        let mut found = vec![Extent::default(); extents];
        let end = self.memory.address() + self.memory.bytes();
        let mut request = ScanArg {
            size: size_of::<ScanArg>() as u64,
            flags: WP_MATCHING | CHECK_WPASYNC,
            start: self.memory.address(),
            end,
            vec: if extents == 0 { 0 } else { found.as_mut_ptr().expose_provenance() as u64 },
            vec_len: extents as u64,
            category_mask: WRITTEN,
            return_mask: WRITTEN,
            ..ScanArg::default()
        };
        // SAFETY: the structure of the request; the kernel writes at most `vec_len` plain structures to
        // `vec`.
        let count = checked(unsafe { ioctl_with_mut_ref(&self.pagemap, PAGEMAP_SCAN(), &mut request) })?;
        found.truncate(count as usize);
        Ok(Scanned { extents: found, walk_end: request.walk_end, end })
    }
}
