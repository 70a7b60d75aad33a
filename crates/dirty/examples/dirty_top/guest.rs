//! A VM whose guest only writes pages: 64-bit user mode code, one job an epoch.
// UNSAFETY: makes KVM memory slots, lends descriptors and names the guest's code by its symbols.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_EXIT_DIRTY_RING_FULL, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use outlive_dirty::{
    DirtyBackend, Gfn, GlobalLog, HotPages, MemoryLayout, MemorySlot, PAGE_SIZE, RegionLog, RingExit,
    Tracker, TrackerConfig,
};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::Failure;
use crate::options::{DATA, Options};

/// Guest physical addresses: page tables (one page a GiB of memory, after the two upper levels), then the
/// pages that the guest writes.
const CODE: u64 = 0x1000;
const TOP_TABLE: u64 = 0x2000;
const SECOND_TABLE: u64 = 0x3000;
const DIRECTORIES: u64 = 0x1_0000;

// The guest. rbx: stamp to write; r12, r13, r14: address of the first hot page, distance, number of them;
// rcx: pages to draw at random with the state r8 from the r9 pages at rsi. Says by a port write that it is
// done.
std::arch::global_asm!(
    ".globl dirty_top_guest, dirty_top_guest_end",
    "dirty_top_guest:",
    "   test r14, r14",
    "   jz 2f",
    "1: mov [r12], rbx",
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
    "   shl rdx, 12",
    "   mov [rsi + rdx], rbx",
    "   dec rcx",
    "   jnz 3b",
    "4: out 0x10, al",
    "   jmp dirty_top_guest",
    "dirty_top_guest_end:",
);

unsafe extern "C" {
    static dirty_top_guest: u8;
    static dirty_top_guest_end: u8;
}

fn code() -> &'static [u8] {
    let (start, end) = (&raw const dirty_top_guest, &raw const dirty_top_guest_end);
    // SAFETY: the bytes between the two symbols are the code above, which nobody changes.
    unsafe { std::slice::from_raw_parts(start, end.addr() - start.addr()) }
}

/// A VM under tracking.
pub(crate) struct Guest {
    pub(crate) backend: DirtyBackend,
    pub(crate) tracker: Tracker,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) memory: GuestMemoryMmap<RegionLog>,
    _vm: VmFd,
}

impl Guest {
    /// The steps by which a VMM gets a tracker, in the order in which they must be done.
    pub(crate) fn new(options: &Options) -> Result<Guest, Failure> {
        let kvm = Kvm::new().map_err(|error| format!("cannot open /dev/kvm: {error}"))?;
        let vm = kvm.create_vm()?;

        // 1. The back end, before there is a vCPU: a dirty ring is a property of the VM. The self-test shows
        //    whether this kernel can leave hot pages alone, and what that saves.
        let backend =
            DirtyBackend::probe(fd(&kvm), fd(&vm), options.backend, options.vcpus)?.with_self_test(fd(&kvm));

        // 2. Memory, whose regions mark the VMM's own writes in a global list.
        let global = GlobalLog::new(options.memory / PAGE_SIZE, 1024);
        let region = MmapRegionBuilder::new_with_bitmap(
            options.memory as usize,
            RegionLog::new(global.clone(), Gfn(0)),
        )
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()?;
        let host_addr = region.as_ptr() as u64;
        let region =
            GuestRegionMmap::new(region, GuestAddress(0)).ok_or("memory beyond the address space")?;
        let memory = GuestMemoryMmap::from_regions(vec![region])?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0, // the tracker turns logging on
            guest_phys_addr: 0,
            memory_size: options.memory,
            userspace_addr: host_addr,
        };
        // SAFETY: the memory is mapped as long as `memory` lives, which is as long as the VM.
        unsafe { vm.set_user_memory_region(slot)? };
        let slot = MemorySlot { id: 0, base: Gfn(0), pages: options.memory / PAGE_SIZE, host_addr };
        load(&memory, options.memory)?;

        // 3. vCPUs.
        let vcpus = (0..options.vcpus).map(|index| Vcpu::new(&kvm, &vm, index, options));
        let vcpus = vcpus.collect::<Result<Vec<_>, _>>()?;

        // 4. The tracker, which borrows nothing: descriptors are duplicated or mapped.
        let pages = options.pages as usize * options.vcpus;
        let config = TrackerConfig::default()
            .with_max_dirty_pages(4 * pages)
            .with_trigger(2 * pages)
            .with_hot(if options.rearm_all { HotPages::Off } else { HotPages::Auto });
        let fds: Vec<_> = vcpus.iter().map(|vcpu| fd(&vcpu.fd)).collect();
        let layout = MemoryLayout::new(vec![slot])?;
        // SAFETY: the slot that was just made, of memory that lives as long as the VM.
        let tracker = unsafe { Tracker::new(layout, config, backend.clone(), global, fd(&vm), &fds)? };
        Ok(Guest { backend, tracker, vcpus, memory, _vm: vm })
    }
}

fn fd(file: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `file` is borrowed.
    unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) }
}

/// The code, and page tables that map all memory one to one in pages of 2 MiB for user mode. Their accessed
/// and dirty bits are set, so that nothing is written in them and they never are dirty pages.
fn load(memory: &GuestMemoryMmap<RegionLog>, bytes: u64) -> Result<(), Failure> {
    const TABLE: u64 = 0x67; // present, writable, user, accessed, dirty
    const LEAF: u64 = TABLE | 0x80;
    memory.write_slice(code(), GuestAddress(CODE))?;
    memory.write_obj(SECOND_TABLE | TABLE, GuestAddress(TOP_TABLE))?;
    for gib in 0..bytes.div_ceil(1 << 30) {
        let directory = DIRECTORIES + gib * PAGE_SIZE;
        memory.write_obj(directory | TABLE, GuestAddress(SECOND_TABLE + gib * 8))?;
        for entry in 0..512 {
            memory.write_obj(gib << 30 | entry << 21 | LEAF, GuestAddress(directory + entry * 8))?;
        }
    }
    Ok(())
}

pub(crate) struct Vcpu {
    fd: VcpuFd,
    job: kvm_regs,
    /// The job is done, and `run` begins it anew.
    done: bool,
}

impl Vcpu {
    fn new(kvm: &Kvm, vm: &VmFd, index: usize, options: &Options) -> Result<Vcpu, Failure> {
        let fd = vm.create_vcpu(index as u64)?;
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

        let data_pages = (options.memory - DATA) / PAGE_SIZE;
        let hot = options.pages * options.hot / 100;
        // The hot pages of all vCPUs alternate, evenly spread over memory.
        let step = (data_pages / (options.pages * options.vcpus as u64)).max(1) * PAGE_SIZE;
        let job = kvm_regs {
            rip: CODE,
            rflags: 0x3002, // user mode may write ports
            r12: DATA + index as u64 * step,
            r13: options.vcpus as u64 * step,
            r14: hot,
            rcx: options.pages - hot,
            r8: 0x9e37_79b9_7f4a_7c15 ^ (index as u64 + 1),
            r9: data_pages,
            rsi: DATA,
            ..Default::default()
        };
        Ok(Vcpu { fd, job, done: true })
    }

    /// Runs to the end of the job, or until the tracker wants the epoch to end.
    pub(crate) fn run(&mut self, index: usize, tracker: &Tracker) -> Result<(), Failure> {
        if self.done {
            let regs = self.fd.get_regs()?;
            let (r8, rbx) = (if regs.r8 == 0 { self.job.r8 } else { regs.r8 }, regs.rbx + 1);
            self.fd.set_regs(&kvm_regs { r8, rbx, ..self.job })?;
            self.done = false;
        }
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoOut(0x10, _)) => {
                    self.done = true;
                    return Ok(());
                }
                Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => match tracker.ring_full(index)? {
                    RingExit::DirtyLogFull => return Ok(()),
                    RingExit::Resume => (),
                },
                Ok(other) => return Err(format!("vCPU {index} stopped: {other:?}").into()),
                Err(error) if error.errno() == libc::EINTR => (),
                Err(error) => return Err(format!("KVM_RUN of vCPU {index}: {error}").into()),
            }
        }
    }

    /// Reads the vCPU state that a checkpoint needs (here only the registers), after letting KVM finish the
    /// port write.
    pub(crate) fn save(&mut self) -> Result<kvm_regs, Failure> {
        self.fd.set_kvm_immediate_exit(1);
        let _interrupted = self.fd.run();
        self.fd.set_kvm_immediate_exit(0);
        Ok(self.fd.get_regs()?)
    }
}
