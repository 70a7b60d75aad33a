//! The smallest VM that writes to memory: 64-bit code at CPL3, which runs natively under every KVM (kvm_pvm
//! interprets CPL0 and logs its stores one by one, trap or no trap).
// UNSAFETY: makes a KVM memory slot and reads guest memory whole.
#![allow(unsafe_code)]

use std::hint::black_box;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::{Failure, SelfTestError, Way, median};
use crate::kvm::{self, SignalsBlocked, Vm};
use crate::layout::{Gfn, MemorySlot, PAGE_SIZE};
use crate::words::Words;

/// Pages that the guest writes in a pass: whole words of a bitmap.
pub(super) const PAGES: usize = 192;
/// The first of them, also a whole word.
pub(super) const FIRST: u64 = 256;
/// Entries of the ring. With page modification logging KVM wants at least 1024.
pub(super) const RING_ENTRIES: u32 = 4096;

/// Words of 8 bytes in a page.
const WORDS: usize = PAGE_SIZE as usize / 8;
/// What one large page of the guest maps.
const SLOT_PAGES: usize = 512;
const TOP: usize = 0x1000;
const CODE: usize = 0x1_0000;
/// P, RW, US, A, D: nothing is left to be written in the guest's page tables.
const TABLE: u64 = 0x67;
/// The same and PS.
const LEAF: u64 = 0xe7;
const PORT: u16 = 0x10;
/// A pass takes one KVM_RUN, and one more for each signal.
const MAX_RUNS: u32 = 4096;
const COPIES: usize = 7;

/// `rax` what to write, `rsi` where, `rcx` into how many pages.
#[rustfmt::skip]
pub(super) const PROGRAM: &[u8] = &[
    0x48, 0x89, 0x06,                         // [rsi] = rax
    0x48, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, // rsi += 4096
    0x48, 0xff, 0xc9, 0x75, 0xf1,             // repeat rcx times
    0xe6, PORT as u8, 0xeb, 0xed,             // out PORT, al; from the start
];

pub(super) struct Machine {
    vcpu: VcpuFd,
    vm: VmFd,
    memory: Words,
    /// The value that the last pass wrote.
    stamp: u64,
}

impl Machine {
    /// A VM that is ready to run, without logging.
    pub(super) fn new(kvm: BorrowedFd<'_>, way: Way, program: &[u8]) -> Result<Machine, SelfTestError> {
        // A signal makes KVM_CREATE_VM fail with EINTR.
        let _blocked = SignalsBlocked::now();
        let descriptor = kvm.try_clone_to_owned().map_err(SelfTestError::at("duplicate a descriptor"))?;
        // SAFETY: a descriptor of our own, of /dev/kvm as the caller says; ioctls on anything else just fail.
        let kvm = unsafe { Kvm::from_raw_fd(descriptor.into_raw_fd()) };
        let memory = Words::reserve(SLOT_PAGES * WORDS).map_err(SelfTestError::at("allocate memory"))?;
        memory.populate(0..memory.len());
        write(&memory, TOP, &(0x2000 | TABLE).to_le_bytes());
        write(&memory, 0x2000, &(0x3000 | TABLE).to_le_bytes());
        write(&memory, 0x3000, &LEAF.to_le_bytes());
        write(&memory, CODE, program);

        let vm = kvm.create_vm().map_err(|error| SelfTestError::at("create a VM")(error.into()))?;
        enable(fd(&kvm), fd(&vm), way)?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: SLOT_PAGES as u64 * PAGE_SIZE,
            userspace_addr: memory.as_ptr() as u64,
        };
        // SAFETY: the memory belongs to the same structure as the VM, and is nothing but atomic words.
        unsafe { vm.set_user_memory_region(region) }
            .map_err(|error| SelfTestError::at("map memory")(error.into()))?;
        let vcpu = make_vcpu(&kvm, &vm).map_err(|error| SelfTestError::at("make a vCPU")(error.into()))?;
        Ok(Machine { vcpu, vm, memory, stamp: 0 })
    }

    pub(super) fn slot(&self) -> MemorySlot {
        MemorySlot { id: 0, base: Gfn(0), pages: SLOT_PAGES as u64, host_addr: self.memory.as_ptr() as u64 }
    }

    pub(super) fn vm(&self) -> io::Result<Vm> {
        Vm::new(fd(&self.vm), &[])
    }

    pub(super) fn vcpu(&self) -> BorrowedFd<'_> {
        fd(&self.vcpu)
    }

    /// Makes the guest write into every page, and returns how long that took.
    pub(super) fn write_all(&mut self) -> Result<Duration, Failure> {
        self.stamp += 1;
        let mut regs = self.vcpu.get_regs().map_err(failed)?;
        (regs.rax, regs.rsi, regs.rcx) = (self.stamp, FIRST * PAGE_SIZE, PAGES as u64);
        self.vcpu.set_regs(&regs).map_err(failed)?;
        let time = self.run()?;
        let written = |page: &usize| self.page(*page)[0].load(Ordering::Relaxed) == self.stamp;
        match (0..PAGES).filter(written).count() {
            PAGES => Ok(time),
            some => Err(Failure::Unexpected(format!("the guest wrote {some} pages and not {PAGES}"))),
        }
    }

    fn run(&mut self) -> Result<Duration, Failure> {
        let started = Instant::now();
        for _ in 0..MAX_RUNS {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(PORT, _)) => return Ok(started.elapsed()),
                Ok(other) => return Err(Failure::Unexpected(format!("the guest stopped with {other:?}"))),
                Err(error) if error.errno() == libc::EINTR => (),
                Err(error) => return Err(failed(error)),
            }
        }
        Err(Failure::Unexpected(format!("the guest came to no end in {MAX_RUNS} runs")))
    }

    fn page(&self, page: usize) -> &[AtomicU64] {
        &self.memory[(FIRST as usize + page) * WORDS..][..WORDS]
    }

    /// The cost of copying a page out of the guest to a buffer that is in use: over all of the guest's
    /// memory, which like that of a real VM is more than the nearest caches hold.
    pub(super) fn copy_time(&self) -> Result<Duration, SelfTestError> {
        // Page-aligned: 16 bytes off, as a large Vec is, makes the processor's string move ten times slower.
        let staging = Words::reserve(self.memory.len()).map_err(SelfTestError::at("allocate memory"))?;
        staging.populate(0..staging.len());
        let times = (0..COPIES).map(|_| {
            let started = Instant::now();
            for first in (0..staging.len()).step_by(WORDS) {
                let (from, to) = (&self.memory[first..][..WORDS], &staging[first..][..WORDS]);
                let (from, to) = (black_box(from.as_ptr()), black_box(to.as_ptr().cast_mut()));
                // SAFETY: a page each, of two mappings; nobody stores to the first (the vCPU does not run)
                // and nobody else has the second.
                unsafe { std::ptr::copy_nonoverlapping(from, to, WORDS) };
            }
            started.elapsed() / SLOT_PAGES as u32
        });
        Ok(median(times.collect()))
    }
}

/// Enables everything that the log needs, before the first vCPU.
fn enable(kvm: BorrowedFd<'_>, vm: BorrowedFd<'_>, way: Way) -> Result<(), SelfTestError> {
    let offered = |capabilities: &[u32], name| {
        let offered = capabilities.iter().find(|&&capability| kvm::check_extension(kvm, capability) > 0);
        offered.copied().ok_or(SelfTestError::Missing(name))
    };
    let (capability, argument) = match way {
        Way::Ring => {
            let rings = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
            (offered(&rings, "KVM dirty ring")?, u64::from(RING_ENTRIES) * 16)
        }
        // Not KVM_DIRTY_LOG_INITIALLY_SET: the first write to a page must trap.
        Way::ClearLog => (
            offered(&[KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2], "KVM_CLEAR_DIRTY_LOG")?,
            KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into(),
        ),
    };
    kvm::enable_cap(vm, capability, argument).map_err(SelfTestError::at("enable the dirty log"))
}

fn make_vcpu(kvm: &Kvm, vm: &VmFd) -> Result<VcpuFd, kvm_ioctls::Error> {
    let vcpu = vm.create_vcpu(0)?;
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
    let mut sregs = vcpu.get_sregs()?;
    let data = kvm_segment {
        limit: u32::MAX,
        selector: 0x23,
        type_: 3,
        present: 1,
        dpl: 3,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.cs = kvm_segment { selector: 0x1b, type_: 11, db: 0, l: 1, ..data };
    sregs.cr0 = 0x8000_0031; // PG, NE, ET, PE
    sregs.cr3 = TOP as u64;
    sregs.cr4 = 0x20; // PAE
    sregs.efer = 0x500; // LMA, LME
    vcpu.set_sregs(&sregs)?;
    // IOPL 3: the guest may write to ports.
    vcpu.set_regs(&kvm_regs { rip: CODE as u64, rflags: 0x3002, ..Default::default() })?;
    Ok(vcpu)
}

fn write(memory: &Words, address: usize, bytes: &[u8]) {
    for (word, bytes) in memory[address / 8..].iter().zip(bytes.chunks(8)) {
        let mut value = [0; 8];
        value[..bytes.len()].copy_from_slice(bytes);
        word.store(u64::from_le_bytes(value), Ordering::Relaxed);
    }
}

fn failed(error: kvm_ioctls::Error) -> Failure {
    SelfTestError::at("run a vCPU")(error.into()).into()
}

fn fd(file: &impl AsRawFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor is open as long as `file` is borrowed.
    unsafe { BorrowedFd::borrow_raw(file.as_raw_fd()) }
}
