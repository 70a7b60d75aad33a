//! A real VM with the smallest guest that dirties memory: 64-bit code at CPL3 that writes a stamp into
//! randomly drawn pages, a given number of times, and then reports it by a port write.
// UNSAFETY: makes KVM memory slots and reads guest memory whole; test code.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use crate::kvm::Vm;
use crate::source::Rings;
use crate::source::ring::{Mapping, RESERVED, Ring};
use crate::{
    BackendChoice, DirtyBackend, DirtyKind, Gfn, GlobalLog, MemoryLayout, MemorySlot, RegionLog, Tracker,
    TrackerConfig,
};

/// The place for a slot that does not exist at first: after the last one, and mapped by the guest.
pub(super) const PLUG: (u64, u64) = (0x1_0080_0000, 2048);
/// The area that the guest may write: its base, and how many pages (a power of two).
pub(super) const AREAS: [(u64, u64); 2] = [(0x10_0000, 512), (0x1_0000_0000, 2048)];
/// The slots: number, base, bytes. Everything else is below 1 MiB.
const SLOTS: [(u32, u64, usize); 2] = [(0, 0, 3 << 20), (3, 0x1_0000_0000, 8 << 20)];
const CODE: u64 = 0x1_0000;
/// P, RW, US, A, D, PS: KVM has nothing to write in the guest's page tables.
const LEAF: u64 = 0xe7;
const TABLE: u64 = 0x67;

/// `rax` stamp, `rcx` writes left, `r8` state of the xorshift generator, `r9` pages - 1, `rsi` base.
#[rustfmt::skip]
const PROGRAM: &[u8] = &[
    0x4d, 0x89, 0xc2, 0x49, 0xc1, 0xe2, 0x0d, 0x4d, 0x31, 0xd0, // r8 ^= r8 << 13
    0x4d, 0x89, 0xc2, 0x49, 0xc1, 0xea, 0x07, 0x4d, 0x31, 0xd0, // r8 ^= r8 >> 7
    0x4d, 0x89, 0xc2, 0x49, 0xc1, 0xe2, 0x11, 0x4d, 0x31, 0xd0, // r8 ^= r8 << 17
    0x4d, 0x89, 0xc2, 0x4d, 0x21, 0xca,                         // r10 = r8 & r9
    0x49, 0xc1, 0xe2, 0x0c, 0x49, 0x01, 0xf2,                   // r10 = r10 * 4096 + rsi
    0x49, 0x89, 0x02,                                           // [r10] = rax
    0x48, 0xff, 0xc9, 0x75, 0xcd,                               // repeat rcx times
    0xe6, 0x10, 0xeb, 0xc9,                                     // out 0x10, al; from the start
];

/// The place of the program that reads: `rsi` first page, `rcx` pages.
const READING: u64 = CODE + 0x800;
#[rustfmt::skip]
const READ_PROGRAM: &[u8] = &[
    0x48, 0x8b, 0x06,                         // rax = [rsi]
    0x48, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, // rsi += 4096
    0x48, 0xff, 0xc9, 0x75, 0xf1,             // repeat rcx times
    0xe6, 0x10, 0xeb, 0xfc,                   // out 0x10, al; again
];

/// The work of a vCPU in an epoch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Job {
    pub(super) stamp: u64,
    pub(super) writes: u64,
    pub(super) area: usize,
}

pub(super) struct Guest {
    pub(super) memory: GuestMemoryMmap<RegionLog>,
    pub(super) tracker: Arc<Tracker>,
    pub(super) global: Arc<GlobalLog>,
    pub(super) vcpus: Vec<Vcpu>,
    vm: VmFd,
    backend: DirtyBackend,
}

/// A test's requirements for its VM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    pub(super) choice: BackendChoice,
    pub(super) config: TrackerConfig,
    /// vCPUs at the beginning.
    pub(super) vcpus: usize,
    /// Whether signals are blocked while rings are reset.
    pub(super) block_signals: bool,
    /// The back end loses one page in this many.
    pub(super) planted: u64,
    /// After the probe, the VMM turns manual protection on with these flags.
    pub(super) manual: u64,
}

impl Setup {
    pub(super) fn of(choice: BackendChoice, config: TrackerConfig) -> Setup {
        Setup { choice, config, vcpus: config.max_vcpus.max(1), block_signals: true, planted: 0, manual: 0 }
    }
}

/// The VM with tracking off, or None without /dev/kvm.
pub(super) fn start(choice: BackendChoice, config: TrackerConfig) -> Option<Guest> {
    start_with(Setup::of(choice, config))
}

pub(super) fn start_with(setup: Setup) -> Option<Guest> {
    let Setup { choice, config, vcpus, block_signals, planted, manual } = setup;
    if !std::path::Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return None;
    }
    let kvm = Kvm::new().unwrap();
    let vm = kvm.create_vm().unwrap();
    let backend = match DirtyBackend::probe(fd(&kvm), fd(&vm), choice, config.max_vcpus.max(1)) {
        Ok(backend) => backend.with_planted_bug(planted),
        Err(error) => {
            println!("skipped: {error}");
            return None;
        }
    };
    if manual != 0 {
        crate::kvm::set_manual_protect(fd(&vm), manual).unwrap();
    }
    let global = GlobalLog::for_ranges(&[(PLUG.0, PLUG.1 * 4096)], 64);
    let memory = memory(&global);
    let slots = memory.iter().zip(SLOTS).map(|(region, (id, base, bytes))| {
        let slot = MemorySlot {
            id,
            base: Gfn::of(base),
            pages: bytes as u64 / 4096,
            host_addr: region.as_ptr() as u64,
        };
        let region = kvm_userspace_memory_region {
            slot: id,
            flags: 0,
            guest_phys_addr: base,
            memory_size: bytes as u64,
            userspace_addr: slot.host_addr,
        };
        // SAFETY: the memory is that of `memory`, which lives in the same structure as the VM.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        slot
    });
    let layout = MemoryLayout::new(slots.collect()).unwrap();
    let vcpus: Vec<_> = (0..vcpus as u64).map(|index| Vcpu::new(&kvm, &vm, index)).collect();
    let vcpu_fds: Vec<_> = vcpus.iter().map(|vcpu| fd(&vcpu.fd)).collect();
    let tracker = if block_signals {
        // SAFETY: the slots were made so above, of memory that lives in the same structure.
        unsafe { Tracker::new(layout, config, backend.clone(), global.clone(), fd(&vm), &vcpu_fds) }
    } else {
        let map = |vcpu: &BorrowedFd<'_>| Mapping::of_vcpu(*vcpu, backend.ring_entries()).unwrap();
        let kernel = Arc::new(Vm::new(fd(&vm), &[]).unwrap());
        let ring = |vcpu| Ring::new(Arc::new(map(vcpu)), RESERVED);
        let mut rings = Rings::new(kernel, vcpu_fds.iter().map(ring).collect(), 0);
        rings.block_signals = false;
        Tracker::with(layout, config, DirtyKind::Ring, Box::new(rings), None, global.clone(), vcpu_fds.len())
    };
    Some(Guest { memory, tracker: Arc::new(tracker.unwrap()), global, vcpus, vm, backend })
}

fn fd(file: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `file` is borrowed.
    unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) }
}

fn memory(global: &Arc<GlobalLog>) -> GuestMemoryMmap<RegionLog> {
    let regions = SLOTS.map(|(_, base, bytes)| {
        let mapping =
            MmapRegionBuilder::new_with_bitmap(bytes, RegionLog::new(global.clone(), Gfn::of(base)))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
                .build()
                .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(base)).unwrap()
    });
    let memory = GuestMemoryMmap::from_regions(regions.into()).unwrap();
    let write = |gpa: u64, value: u64| memory.write_obj(value, GuestAddress(gpa)).unwrap();
    write(0x1000, 0x2000 | TABLE);
    for (pdpt_index, directory, base) in [(0, 0x3000, 0), (4, 0x4000, AREAS[1].0)] {
        write(0x2000 + pdpt_index * 8, directory | TABLE);
        (0..512).for_each(|index| write(directory + index * 8, (base + (index << 21)) | LEAF));
    }
    memory.write_slice(PROGRAM, GuestAddress(CODE)).unwrap();
    memory.write_slice(READ_PROGRAM, GuestAddress(READING)).unwrap();
    memory
}

pub(super) struct Vcpu {
    fd: VcpuFd,
}

/// Why a vCPU stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    Done,
    Signal,
    RingFull,
}

impl Vcpu {
    fn new(kvm: &Kvm, vm: &VmFd, index: u64) -> Vcpu {
        let fd = vm.create_vcpu(index).unwrap();
        fd.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
        let mut sregs = fd.get_sregs().unwrap();
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
        sregs.cr3 = 0x1000;
        sregs.cr4 = 0x20; // PAE
        sregs.efer = 0x500; // LMA, LME
        fd.set_sregs(&sregs).unwrap();
        let regs = kvm_regs {
            rip: CODE,
            rflags: 0x3002, // IOPL 3
            r8: 0x9e37_79b9_7f4a_7c15 ^ (index + 1),
            ..Default::default()
        };
        fd.set_regs(&regs).unwrap();
        Vcpu { fd }
    }

    pub(super) fn set_job(&self, job: Job) {
        self.set_job_at(job, AREAS[job.area]);
    }

    /// The same in another area: its base, and how many pages (a power of two).
    pub(super) fn set_job_at(&self, job: Job, area: (u64, u64)) {
        let mut regs = self.fd.get_regs().unwrap();
        (regs.rax, regs.rcx) = (job.stamp, job.writes);
        (regs.rsi, regs.r9) = (area.0, area.1 - 1);
        self.fd.set_regs(&regs).unwrap();
    }

    /// Reads every page of an area.
    pub(super) fn read_all(&mut self, area: usize) -> Stop {
        let mut regs = self.fd.get_regs().unwrap();
        (regs.rip, regs.rsi, regs.rcx) = (READING, AREAS[area].0, AREAS[area].1);
        self.fd.set_regs(&regs).unwrap();
        self.run()
    }

    pub(super) fn run(&mut self) -> Stop {
        match self.fd.run() {
            Ok(VcpuExit::IoOut(0x10, _)) => Stop::Done,
            Ok(VcpuExit::Unsupported(kvm_bindings::KVM_EXIT_DIRTY_RING_FULL)) => Stop::RingFull,
            Ok(other) => panic!("{other:?}"),
            Err(error) if error.errno() == libc::EINTR => Stop::Signal,
            Err(error) => panic!("{error}"),
        }
    }

    /// Makes KVM write guest memory on behalf of the vCPU, outside KVM_RUN.
    pub(super) fn set_wall_clock(&self, gpa: u64) {
        let clock = kvm_msr_entry { index: 0x4b56_4d00, data: gpa, ..Default::default() };
        assert_eq!(self.fd.set_msrs(&Msrs::from_entries(&[clock]).unwrap()).unwrap(), 1);
    }

    /// Captures a vCPU as a VMM does: lets KVM complete the port write, then reads registers.
    pub(super) fn save(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        assert!(matches!(self.run(), Stop::Signal | Stop::RingFull));
        self.fd.set_kvm_immediate_exit(0);
        self.fd.get_regs().unwrap();
        self.fd.get_sregs().unwrap();
        self.fd.get_vcpu_events().unwrap();
    }
}

impl Guest {
    /// Tries to make a second tracker of the VM, as a wrong VMM would.
    pub(super) fn second_tracker(
        &self,
        vcpu: &Vcpu,
        backend: DirtyBackend,
    ) -> Result<Tracker, crate::NewError> {
        let layout = self.tracker.layout();
        let global = GlobalLog::new(layout.gfn_space(), 64);
        self.tracker_of(layout, &[vcpu], backend, global)
    }

    pub(super) fn tracker_of(
        &self,
        layout: MemoryLayout,
        vcpus: &[&Vcpu],
        backend: DirtyBackend,
        global: Arc<GlobalLog>,
    ) -> Result<Tracker, crate::NewError> {
        let config = TrackerConfig { max_vcpus: vcpus.len(), ..self.tracker.config() };
        let vcpus: Vec<_> = vcpus.iter().map(|vcpu| fd(&vcpu.fd)).collect();
        // SAFETY: the slots of the VM, and their memory, are those of the first one.
        unsafe { Tracker::new(layout, config, backend, global, fd(&self.vm), &vcpus) }
    }

    /// The back end of the tracker.
    pub(super) fn backend(&self) -> DirtyBackend {
        self.backend.clone()
    }

    /// Makes a slot, with its dirty log on or off.
    pub(super) fn make_slot(&self, slot: MemorySlot, logged: bool) {
        let region = kvm_userspace_memory_region {
            slot: slot.id,
            flags: if logged { kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: slot.base.gpa(),
            memory_size: slot.pages * 4096,
            userspace_addr: slot.host_addr,
        };
        // SAFETY: the test keeps the memory until the slot is unmade, or the VM is gone.
        unsafe { self.vm.set_user_memory_region(region) }.unwrap();
    }

    /// Removes it again.
    pub(super) fn unmake_slot(&self, slot: MemorySlot) {
        self.make_slot(MemorySlot { pages: 0, ..slot }, false);
    }

    /// A further vCPU of the VM.
    pub(super) fn new_vcpu(&self, index: u64) -> Vcpu {
        Vcpu::new(&Kvm::new().unwrap(), &self.vm, index)
    }

    /// Adds it to the tracker.
    pub(super) fn add_vcpu(&self, vcpu: &Vcpu) -> Result<usize, crate::AddVcpuError> {
        self.tracker.add_vcpu(fd(&vcpu.fd))
    }

    /// Takes the slot that holds area 1 away from the guest.
    pub(super) fn remove_slot(&self) {
        let (slot, guest_phys_addr, _) = SLOTS[1];
        let gone = kvm_userspace_memory_region { slot, guest_phys_addr, ..Default::default() };
        // SAFETY: no memory is given to the guest.
        unsafe { self.vm.set_user_memory_region(gone) }.unwrap();
    }

    /// The bytes of a region. The VM is stopped.
    fn region(&self, index: usize) -> &[u8] {
        let region = self.memory.iter().nth(index).unwrap();
        // SAFETY: mapped for its length; nobody writes while the VM is stopped.
        unsafe { std::slice::from_raw_parts(region.as_ptr(), region.len() as usize) }
    }

    /// The bytes of a page, which may change meanwhile.
    pub(super) fn page(&self, gfn: Gfn) -> &[u8] {
        let (index, range) = place(gfn);
        &self.region(index)[range]
    }

    /// A copy of all memory, as a standby has it after the base copy.
    pub(super) fn shadow(&self) -> Shadow {
        Shadow((0..SLOTS.len()).map(|index| self.region(index).to_vec()).collect())
    }
}

/// A standby's copy, made only of reported pages.
pub(super) struct Shadow(Vec<Vec<u8>>);

/// The slot of a page and its place in the slot.
fn place(gfn: Gfn) -> (usize, std::ops::Range<usize>) {
    let index = SLOTS
        .iter()
        .position(|&(_, base, bytes)| (base..base + bytes as u64).contains(&gfn.gpa()))
        .unwrap_or_else(|| panic!("page {gfn} is not in the VM"));
    let start = (gfn.gpa() - SLOTS[index].1) as usize;
    (index, start..start + 4096)
}

impl Shadow {
    pub(super) fn copy(&mut self, guest: &Guest, pages: &[Gfn]) {
        pages.iter().for_each(|&gfn| self.store(gfn, guest.page(gfn)));
    }

    pub(super) fn store(&mut self, gfn: Gfn, bytes: &[u8]) {
        let (index, range) = place(gfn);
        self.0[index][range].copy_from_slice(bytes);
    }

    /// Pages in which guest memory differs.
    pub(super) fn differences(&self, guest: &Guest) -> Vec<Gfn> {
        let mut differences = Vec::new();
        for (index, copy) in self.0.iter().enumerate() {
            let memory = guest.region(index);
            if memory == copy.as_slice() {
                continue;
            }
            let pages = memory.chunks(4096).zip(copy.chunks(4096)).enumerate();
            let different = pages.filter(|(_, (memory, copy))| memory != copy);
            differences.extend(different.map(|(page, _)| Gfn(SLOTS[index].1 / 4096 + page as u64)));
        }
        differences
    }
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Signals that rain on threads of the test.
pub(super) struct Rain {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Rain {
    /// Sends a signal to each of the threads in every period. They must outlive the rain.
    pub(super) fn on(threads: Vec<libc::pthread_t>, period: Duration) -> Rain {
        register_signal_handler(SIGRTMIN(), on_signal).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for &thread in &threads {
                    // SAFETY: the thread lives; its handler does nothing.
                    unsafe { libc::pthread_kill(thread, SIGRTMIN()) };
                }
                std::thread::sleep(period);
            }
        });
        Rain { stop, thread: Some(thread) }
    }
}

impl Drop for Rain {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

pub(super) fn this_thread() -> libc::pthread_t {
    // SAFETY: has no preconditions.
    unsafe { libc::pthread_self() }
}
