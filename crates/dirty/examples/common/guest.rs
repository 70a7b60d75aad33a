//! A VM for examples, whose guest writes the pages that it is told to: 64-bit code at CPL3, which runs
//! natively under every KVM. It does not use outlive-dirty.
// UNSAFETY: maps guest memory, gives it to KVM, reads and writes it through raw pointers, and names the
// guest's code by its symbols.
#![allow(unsafe_code)]
#![allow(dead_code, reason = "each example uses a part")]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::ptr::NonNull;

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_MAX_CPUID_ENTRIES, kvm_enable_cap, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

pub(crate) const PAGE: u64 = 4096;
/// The first page that a guest may be told to write; the guest's own pages come before it.
pub(crate) const DATA: u64 = 16 << 20;

const CODE: u64 = 0x1000;
const TOP_TABLE: u64 = 0x2000;
/// One page for each 512 GiB.
const SECOND_TABLES: u64 = 0x3000;
/// One page a GiB, of large pages of 2 MiB.
const DIRECTORIES: u64 = 0x1_0000;

// rbx: what to write. r12, r13, r14: first page, distance and number of pages to write in order.
// rcx: how many pages to draw with the state r8, from the r9 pages at rsi at the distance r10.
// r11, r15: addresses from r11 on lie further up by r15. A port write says that all is done.
std::arch::global_asm!(
    ".globl example_guest, example_guest_end",
    "example_guest:",
    "   test r14, r14",
    "   jz 2f",
    "1: mov rdx, r12",
    "   cmp rdx, r11",
    "   jb 5f",
    "   add rdx, r15",
    "5: mov [rdx], rbx",
    "   add r12, r13",
    "   dec r14",
    "   jnz 1b",
    "2: test rcx, rcx",
    "   jz 4f",
    "3: mov rax, r8", // xorshift
    "   shl rax, 13",
    "   xor r8, rax",
    "   mov rax, r8",
    "   shr rax, 7",
    "   xor r8, rax",
    "   mov rax, r8",
    "   shl rax, 17",
    "   xor r8, rax",
    "   mov rax, r8",
    "   mul r9", // rdx: a number below r9
    "   imul rdx, r10",
    "   add rdx, rsi",
    "   cmp rdx, r11",
    "   jb 6f",
    "   add rdx, r15",
    "6: mov [rdx], rbx",
    "   dec rcx",
    "   jnz 3b",
    "4: out 0x10, al",
    "   jmp example_guest",
    "example_guest_end:",
);

unsafe extern "C" {
    static example_guest: u8;
    static example_guest_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const example_guest, &raw const example_guest_end);
    // SAFETY: the bytes between the two symbols are the code above, which nobody changes.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// Address space of this process; a page is there once it has been written.
pub(crate) struct Mapping {
    base: NonNull<u8>,
    bytes: u64,
}

// SAFETY: plain memory; who reads it while others write says so where it does.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Private memory without huge pages, so that each page written costs one page.
    pub(crate) fn private(bytes: u64) -> io::Result<Mapping> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let mapping = Mapping::map(bytes, flags, -1)?;
        // SAFETY: advice on the mapping just made.
        unsafe { libc::madvise(mapping.base.as_ptr().cast(), bytes as usize, libc::MADV_NOHUGEPAGE) };
        Ok(mapping)
    }

    /// All of a file.
    pub(crate) fn of_file(file: &File) -> io::Result<Mapping> {
        Mapping::map(file.metadata()?.len(), libc::MAP_SHARED | libc::MAP_NORESERVE, file.as_raw_fd())
    }

    pub(crate) fn map(bytes: u64, flags: i32, fd: i32) -> io::Result<Mapping> {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), bytes as usize, prot, flags, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapping { base: NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?, bytes })
    }

    pub(crate) fn address(&self) -> u64 {
        self.base.as_ptr().expose_provenance() as u64
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(crate) fn pointer(&self, offset: u64, bytes: usize) -> *mut u8 {
        assert!(offset <= self.bytes && bytes as u64 <= self.bytes - offset, "outside of the mapping");
        self.base.as_ptr().wrapping_add(offset as usize)
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        let to = self.pointer(offset, bytes.len());
        // SAFETY: inside the mapping, which `bytes` is no part of.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// The first word of a page.
    pub(crate) fn word(&self, offset: u64) -> u64 {
        // SAFETY: inside the mapping, and aligned: pages are.
        unsafe { self.pointer(offset / PAGE * PAGE, 8).cast::<u64>().read_volatile() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping that was made, of which no reference is left.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.bytes as usize) };
    }
}

/// Anonymous memory that other mappings can share.
pub(crate) fn memfd(bytes: u64) -> io::Result<File> {
    // SAFETY: a constant name.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a descriptor that the kernel has just made for us.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(bytes)?;
    Ok(file)
}

/// A memory slot.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Region {
    /// Guest physical.
    pub(crate) base: u64,
    pub(crate) bytes: u64,
    /// In this process.
    pub(crate) address: u64,
}

/// Makes the slot, or changes what KVM logs for it.
pub(crate) fn set_region(vm: &VmFd, slot: u32, region: Region, flags: u32) -> io::Result<()> {
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: region.base,
        memory_size: region.bytes,
        userspace_addr: region.address,
    };
    // SAFETY: callers keep the memory mapped for as long as the VM lives.
    Ok(unsafe { vm.set_user_memory_region(region) }?)
}

pub(crate) fn enable_cap(vm: &VmFd, cap: u32, argument: u64) -> io::Result<()> {
    let mut request = kvm_enable_cap { cap, ..Default::default() };
    request.args[0] = argument;
    Ok(vm.enable_cap(&request)?)
}

/// Writes the guest's code, and page tables that map all of it one to one for user mode. Their accessed and
/// dirty bits are set, so that nothing is ever written to them and they never are dirty pages. `end` is the
/// highest guest physical address, `write` puts bytes at one of them.
pub(crate) fn load(end: u64, mut write: impl FnMut(u64, &[u8])) {
    const TABLE: u64 = 0x67; // present, writable, user, accessed, dirty
    const LEAF: u64 = TABLE | 0x80;
    let gibs = end.div_ceil(1 << 30);
    assert!(DIRECTORIES + gibs * PAGE <= DATA, "too much memory for these page tables");
    write(CODE, code());
    for gib in 0..gibs {
        let (second, directory) = (SECOND_TABLES + gib / 512 * PAGE, DIRECTORIES + gib * PAGE);
        write(TOP_TABLE + gib / 512 * 8, &(second | TABLE).to_le_bytes());
        write(second + gib % 512 * 8, &(directory | TABLE).to_le_bytes());
        let entries = (0..512).flat_map(|entry| (gib << 30 | entry << 21 | LEAF).to_le_bytes());
        write(directory, &entries.collect::<Vec<u8>>());
    }
}

/// The pages for the guest to write.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job {
    pub(crate) stamp: u64,
    /// First address, distance and number of pages that are written in order.
    pub(crate) ordered: (u64, u64, u64),
    /// First address, distance, number of pages, and how many of them are drawn.
    pub(crate) random: (u64, u64, u64, u64),
    /// Addresses from the first on are further up by the second.
    pub(crate) hole: (u64, u64),
}

impl Job {
    pub(crate) fn ordered(stamp: u64, start: u64, stride: u64, count: u64) -> Job {
        Job { stamp, ordered: (start, stride, count), random: (0, 0, 0, 0), hole: (u64::MAX, 0) }
    }
}

/// Why KVM_RUN has returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    Done,
    RingFull,
    Kicked,
}

pub(crate) struct Vcpu {
    pub(crate) fd: VcpuFd,
    seed: u64,
}

impl Vcpu {
    pub(crate) fn new(kvm: &Kvm, vm: &VmFd, index: u64) -> io::Result<Vcpu> {
        let fd = vm.create_vcpu(index)?;
        fd.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
        let mut sregs = fd.get_sregs()?;
        let segment = |selector, type_| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            dpl: 3,
            db: (type_ == 3).into(),
            s: 1,
            l: (type_ == 11).into(),
            g: 1,
            ..Default::default()
        };
        sregs.cs = segment(0x1b, 11);
        let data = segment(0x23, 3);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.cr0 = 0x8000_0031; // paging, protected mode
        sregs.cr3 = TOP_TABLE;
        sregs.cr4 = 0x20; // physical address extension
        sregs.efer = 0x500; // long mode
        fd.set_sregs(&sregs)?;
        Ok(Vcpu { fd, seed: 0x9e37_79b9_7f4a_7c15 ^ (index + 1) })
    }

    /// The registers at the start of the next run.
    pub(crate) fn set_job(&mut self, job: &Job) -> io::Result<()> {
        let seed = self.fd.get_regs()?.r8;
        let regs = kvm_regs {
            rip: CODE,
            rflags: 0x3002, // user mode may write ports
            rbx: job.stamp,
            r12: job.ordered.0,
            r13: job.ordered.1,
            r14: job.ordered.2,
            rsi: job.random.0,
            r10: job.random.1,
            r9: job.random.2,
            rcx: job.random.3,
            r11: job.hole.0,
            r15: job.hole.1,
            r8: if seed == 0 { self.seed } else { seed },
            ..Default::default()
        };
        Ok(self.fd.set_regs(&regs)?)
    }

    /// Runs until the job is done or something else wants attention.
    pub(crate) fn run(&mut self) -> io::Result<Stop> {
        match self.fd.run() {
            Ok(VcpuExit::IoOut(0x10, _)) => Ok(Stop::Done),
            Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Ok(Stop::RingFull),
            Ok(other) => Err(io::Error::other(format!("the guest stopped: {other:?}"))),
            Err(error) if error.errno() == libc::EINTR => Ok(Stop::Kicked),
            Err(error) => Err(error.into()),
        }
    }

    /// Lets KVM finish the port write, so that the registers can be read.
    pub(crate) fn finish(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        let _interrupted = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
    }
}
