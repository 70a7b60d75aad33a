//! The measured VM: 64-bit code at CPL3 that writes the pages that it is told to, and then reports it by a
//! port write. Its memory is reserved and not populated, so a VM of 1 TiB costs only what its guest touches.
// UNSAFETY: maps guest memory, gives it to KVM and reads and writes it through raw pointers.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVMIO, Xsave, kvm_regs, kvm_segment, kvm_sregs2,
    kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use outlive_dirty::{Gfn, PAGE_SIZE};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_ior_nr;

use crate::workload::{Job, Run};

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);

const PML4: u64 = 0x1000;
/// One table for each 512 GiB.
const DIRECTORIES: u64 = 0x2000;
const CODE: u64 = 0x1_0000;
/// One page a vCPU.
const PARAMETERS: u64 = 0x2_0000;
/// Tables of 2 MiB pages, one a GiB, where the processor has no pages of 1 GiB.
const TABLES: u64 = 0x10_0000;
const GIB: u64 = 1 << 30;
const LARGEST: u64 = 1 << 40;
const MAX_VCPUS: u64 = 8;
/// P, RW, US, A, D, PS: KVM has nothing to write in the guest's page tables.
const LEAF: u64 = 0xe7;
const TABLE: u64 = 0x67;

/// `rdi` parameters: stamp, then count, start, stride of the hot pages, then of the cold ones.
#[rustfmt::skip]
const PROGRAM: &[u8] = &[
    0x48, 0x8b, 0x07,                   // start: mov rax, [rdi]
    0x48, 0x8b, 0x4f, 0x08,             // mov rcx, [rdi+8]
    0x48, 0x8b, 0x77, 0x10,             // mov rsi, [rdi+16]
    0x48, 0x8b, 0x57, 0x18,             // mov rdx, [rdi+24]
    0x48, 0x85, 0xc9, 0x74, 0x0b,       // no hot pages: over the loop
    0x48, 0x89, 0x06, 0x48, 0x01, 0xd6, // hot: mov [rsi], rax; add rsi, rdx
    0x48, 0xff, 0xc9, 0x75, 0xf5,       // dec rcx; jnz hot
    0x48, 0x8b, 0x4f, 0x20,             // mov rcx, [rdi+32]
    0x48, 0x8b, 0x77, 0x28,             // mov rsi, [rdi+40]
    0x48, 0x8b, 0x57, 0x30,             // mov rdx, [rdi+48]
    0x48, 0x85, 0xc9, 0x74, 0x0b,       // no cold pages: over the loop
    0x48, 0x89, 0x06, 0x48, 0x01, 0xd6, // cold: mov [rsi], rax; add rsi, rdx
    0x48, 0xff, 0xc9, 0x75, 0xf5,       // dec rcx; jnz cold
    0xe6, 0x10, 0xeb, 0xc1,             // out 0x10, al; jmp start
];

/// Fields drop in their order: the memory goes after the VM that uses it.
pub(crate) struct Vm {
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) fd: VmFd,
    pub(crate) memory: Memory,
    large_pages: bool,
    mapped: Vec<bool>,
}

/// A descriptor, for the library.
pub(crate) fn borrow(file: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `file` is borrowed.
    unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) }
}

impl Vm {
    /// A VM with one slot of memory; `before_vcpus` sees it before its first vCPU is made.
    pub(crate) fn new(kvm: &Kvm, gib: u64, vcpus: u64, before_vcpus: impl FnOnce(&VmFd)) -> io::Result<Vm> {
        assert!(gib * GIB <= LARGEST && vcpus <= MAX_VCPUS);
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let memory = Memory::reserve(gib * GIB)?;
        let fd = kvm.create_vm()?;
        before_vcpus(&fd);
        let mut vm = Vm {
            vcpus: Vec::new(),
            memory,
            fd,
            large_pages: has_large_pages(&cpuid),
            mapped: vec![false; gib as usize],
        };
        vm.set_logging(false)?;
        vm.memory.write(CODE, PROGRAM);
        for index in 0..gib.div_ceil(512) {
            vm.memory.write(PML4 + index * 8, &((DIRECTORIES + index * PAGE_SIZE) | TABLE).to_le_bytes());
        }
        vm.map(0);
        vm.vcpus = (0..vcpus).map(|index| Vcpu::new(&vm.fd, &cpuid, index)).collect::<io::Result<_>>()?;
        Ok(vm)
    }

    pub(crate) fn pages(&self) -> u64 {
        self.memory.len / PAGE_SIZE
    }

    /// Makes the memory slot, or changes whether KVM logs writes to it.
    pub(crate) fn set_logging(&self, on: bool) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: if on { kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: 0,
            memory_size: self.memory.len,
            userspace_addr: self.memory.base.as_ptr() as u64,
        };
        // SAFETY: the memory lives in the same structure as the VM and goes after it.
        Ok(unsafe { self.fd.set_user_memory_region(region) }?)
    }

    /// Tells a vCPU what to write in its next run, and maps it in the vCPU's page tables.
    pub(crate) fn set_job(&mut self, vcpu: usize, stamp: u64, job: &Job) {
        job.runs().into_iter().for_each(|run| self.map_run(run));
        let words = [
            stamp,
            job.hot.count,
            job.hot.start,
            job.hot.stride,
            job.cold.count,
            job.cold.start,
            job.cold.stride,
        ];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.memory.write(PARAMETERS + vcpu as u64 * PAGE_SIZE, &bytes);
    }

    fn map_run(&mut self, run: Run) {
        let mut page = 0;
        while page < run.count {
            let gib = (run.start + page * run.stride) / GIB;
            self.map(gib);
            // On to the first page of another GiB.
            page = ((gib + 1) * GIB - run.start).div_ceil(run.stride);
        }
    }

    fn map(&mut self, gib: u64) {
        if std::mem::replace(&mut self.mapped[gib as usize], true) {
            return;
        }
        let entry = if self.large_pages {
            (gib * GIB) | LEAF
        } else {
            let table = TABLES + gib * PAGE_SIZE;
            for index in 0..512 {
                self.memory.write(table + index * 8, &((gib * GIB + (index << 21)) | LEAF).to_le_bytes());
            }
            table | TABLE
        };
        self.memory.write(DIRECTORIES + gib * 8, &entry.to_le_bytes());
    }
}

/// CPUID 8000_0001h, EDX bit 26.
fn has_large_pages(cpuid: &CpuId) -> bool {
    cpuid.as_slice().iter().any(|leaf| leaf.function == 0x8000_0001 && leaf.edx & 1 << 26 != 0)
}

pub(crate) struct Vcpu {
    pub(crate) fd: VcpuFd,
    xsave: Option<Xsave>,
}

impl Vcpu {
    fn new(vm: &VmFd, cpuid: &CpuId, index: u64) -> io::Result<Vcpu> {
        let fd = vm.create_vcpu(index)?;
        fd.set_cpuid2(cpuid)?;
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
        sregs.cr0 = 0x8000_0031; // PG, NE, ET, PE
        sregs.cr3 = PML4;
        sregs.cr4 = 0x20; // PAE
        sregs.efer = 0x500; // LMA, LME
        fd.set_sregs(&sregs)?;
        fd.set_regs(&kvm_regs {
            rip: CODE,
            rflags: 0x3002, // IOPL 3
            rdi: PARAMETERS + index * PAGE_SIZE,
            ..Default::default()
        })?;
        let size = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let beyond = size.checked_sub(size_of::<kvm_xsave>()).map(|bytes| bytes.div_ceil(4));
        let xsave = beyond.map(|words| Xsave::new(words).expect("memory for the state of a vCPU"));
        Ok(Vcpu { fd, xsave })
    }

    /// Runs until the guest has written its pages.
    pub(crate) fn run(&mut self) {
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoOut(0x10, _)) => return,
                Ok(other) => panic!("the guest stopped by {other:?}"),
                Err(error) if error.errno() == libc::EINTR => (),
                Err(error) => panic!("KVM_RUN: {error}"),
            }
        }
    }

    /// Reads the vCPU state of a checkpoint, by seven ioctls.
    pub(crate) fn read_state(&mut self) {
        let fd = &self.fd;
        black_box(fd.get_regs().expect("KVM_GET_REGS"));
        let mut sregs = kvm_sregs2::default();
        // SAFETY: the structure of the request.
        let read = unsafe { ioctl_with_mut_ref(fd, KVM_GET_SREGS2(), &mut sregs) };
        assert_eq!(read, 0, "KVM_GET_SREGS2");
        black_box(sregs);
        match &mut self.xsave {
            // SAFETY: as large as KVM_CAP_XSAVE2 says.
            Some(xsave) => unsafe { fd.get_xsave2(xsave) }.expect("KVM_GET_XSAVE2"),
            None => drop(black_box(fd.get_xsave().expect("KVM_GET_XSAVE"))),
        }
        black_box(fd.get_xcrs().expect("KVM_GET_XCRS"));
        black_box(fd.get_vcpu_events().expect("KVM_GET_VCPU_EVENTS"));
        black_box(fd.get_debug_regs().expect("KVM_GET_DEBUGREGS"));
        black_box(fd.get_mp_state().expect("KVM_GET_MP_STATE"));
    }
}

/// Address space for guest memory; a page is there once it has been written.
pub(crate) struct Memory {
    base: NonNull<u8>,
    len: u64,
}

impl Memory {
    pub(crate) fn reserve(len: u64) -> io::Result<Memory> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len as usize, prot, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let memory = Memory { base: NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?, len };
        // Otherwise each scattered page would take 2 MiB.
        // SAFETY: advice on the mapping just made.
        unsafe { libc::madvise(base, len as usize, libc::MADV_NOHUGEPAGE) };
        Ok(memory)
    }

    /// The address of the memory.
    pub(crate) fn host_addr(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) {
        assert!(gpa + bytes.len() as u64 <= self.len);
        // SAFETY: inside the mapping; the vCPUs do not run while `Vm` is written.
        unsafe { self.base.add(gpa as usize).copy_from(NonNull::from(bytes).cast(), bytes.len()) };
    }

    /// Copies a page to a page of other memory.
    pub(crate) fn copy_page(&self, gfn: Gfn, to: &Memory, place: Gfn) {
        assert!(gfn.gpa() < self.len && place.gpa() < to.len);
        // SAFETY: inside two mappings; the vCPUs do not run.
        unsafe {
            let from = self.base.add(gfn.gpa() as usize);
            to.base.add(place.gpa() as usize).copy_from_nonoverlapping(from, PAGE_SIZE as usize);
        }
    }

    /// The first word of a page: the stamp of its last writer.
    pub(crate) fn stamp(&self, gfn: Gfn) -> u64 {
        assert!(gfn.gpa() < self.len);
        // SAFETY: aligned and inside the mapping; the vCPUs do not run.
        unsafe { self.base.add(gfn.gpa() as usize).cast::<u64>().read_volatile() }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `reserve`; no reference outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len as usize) };
    }
}
