//! The floor of a pause: what no checkpoint can do without, on bare KVM, without anything of Outlive's.

// UNSAFETY: memory of a VM of its own, and copies that bypass the cache.
#![allow(unsafe_code)]

use std::arch::x86_64::{
    __m128i, __m256i, _mm_load_si128, _mm_sfence, _mm_stream_si128, _mm256_load_si256, _mm256_stream_si256,
};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_bindings::{
    KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, SyncReg, VcpuFd, VmFd};
use outlive_epoch::image::StateKind;
use outlive_machine::{Machine, Outgoing};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};
use zerocopy::FromBytes;

use super::{DATA, PAGE};

/// Fields of a vCPU's section.
const REGS: u16 = 2;
const SREGS: u16 = 3;
/// Where KVM keeps pages of its own: behind all memory.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;

/// Memory that the kernel gives in whole pages.
#[derive(Clone, Copy)]
struct Memory {
    at: *mut u8,
    bytes: usize,
}

// SAFETY: it stays mapped until the process ends; the threads that use it write different parts of it.
unsafe impl Send for Memory {}

impl Memory {
    fn new(bytes: usize) -> Self {
        // SAFETY: a new anonymous mapping.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED, "no memory");
        Self { at: at.cast(), bytes }
    }
}

/// What a vCPU's thread has measured in a round.
struct Part {
    /// When it was out of the guest.
    out: Instant,
    state: Duration,
    copy: Duration,
}

/// The same guest as the machine's, in a VM without dirty tracking and without devices.
pub(crate) struct Floor {
    go: Arc<Barrier>,
    quit: Arc<AtomicBool>,
    parts: Receiver<Part>,
    threads: Vec<JoinHandle<()>>,
    immediate_exits: Vec<ImmediateExit>,
    _vm: VmFd,
    memory: Memory,
}

#[derive(Clone, Copy)]
struct ImmediateExit(*const AtomicU8);

// SAFETY: the byte is in the kvm_run mapping of a vCPU whose thread is joined before it is dropped.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn set(self, value: u8) {
        // SAFETY: see above; KVM reads the byte with READ_ONCE.
        unsafe { &*self.0 }.store(value, Ordering::SeqCst);
    }
}

fn kick() -> libc::c_int {
    SIGRTMIN() + 2
}

impl Floor {
    /// Continues the guest of a stopped machine, whose state is in `staging`. Each vCPU writes `pages` pages.
    pub(crate) fn new(
        machine: &Machine,
        staging: &Outgoing,
        pages: usize,
    ) -> Result<Self, kvm_ioctls::Error> {
        extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(kick(), on_kick).expect("a signal handler");
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        vm.set_identity_map_address(IDENTITY_MAP)?;
        vm.set_tss_address(TSS)?;
        vm.create_irq_chip()?;
        let slot = machine.ram().slots()[0];
        let memory = Memory::new(slot.pages as usize * PAGE);
        for gfn in 0..slot.pages {
            // SAFETY: a page inside the mapping, which nobody else uses yet.
            let page = unsafe { std::slice::from_raw_parts_mut(memory.at.add(gfn as usize * PAGE), PAGE) };
            machine.ram().read_page(outlive_dirty::Gfn(gfn), page.try_into().expect("a page"));
        }
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: memory.bytes as u64,
            userspace_addr: memory.at as u64,
        };
        // SAFETY: the mapping stays until the VM is gone.
        unsafe { vm.set_user_memory_region(region) }?;
        let states: Vec<_> =
            staging.state().sections().filter(|section| section.kind == StateKind::Vcpu).collect();
        let (go, quit) = (Arc::new(Barrier::new(states.len() + 1)), Arc::new(AtomicBool::new(false)));
        let (tell, parts) = channel();
        let (mut threads, mut immediate_exits) = (Vec::new(), Vec::new());
        for (index, state) in states.iter().enumerate() {
            let mut fd = vm.create_vcpu(index as u64)?;
            fd.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?)?;
            fd.set_sregs(&kvm_sregs { interrupt_bitmap: [0; 4], ..plain(state.bytes, SREGS) })?;
            fd.set_regs(&plain::<kvm_regs>(state.bytes, REGS))?;
            fd.set_mp_state(Default::default())?;
            for reg in [SyncReg::Register, SyncReg::SystemRegister, SyncReg::VcpuEvents] {
                fd.set_sync_valid_reg(reg);
            }
            let immediate_exit = std::ptr::from_mut(&mut fd.get_kvm_run().immediate_exit).cast();
            immediate_exits.push(ImmediateExit(immediate_exit));
            let msrs = readable_msrs(&kvm, &fd)?;
            let (go, quit, tell) = (go.clone(), quit.clone(), tell.clone());
            let own = Memory {
                // SAFETY: the guest's own pages are inside its memory.
                at: unsafe { memory.at.add(DATA as usize + index * pages * PAGE) },
                bytes: pages * PAGE,
            };
            threads.push(std::thread::spawn(move || {
                unblock_signal(kick()).expect("a signal mask");
                let mut vcpu = Vcpu { fd, msrs, own, copy: Memory::new(own.bytes) };
                loop {
                    go.wait();
                    if quit.load(Ordering::SeqCst) {
                        return;
                    }
                    let part = vcpu.round();
                    tell.send(part).ok();
                }
            }));
        }
        Ok(Self { go, quit, parts, threads, immediate_exits, _vm: vm, memory })
    }

    /// Lets the guest run for `epoch`, then measures: kick, state, copy.
    pub(crate) fn round(&mut self, epoch: Duration) -> [Duration; 3] {
        self.immediate_exits.iter().for_each(|it| it.set(0));
        self.go.wait();
        std::thread::sleep(epoch);
        let began = Instant::now();
        self.immediate_exits.iter().for_each(|it| it.set(1));
        self.threads.iter().for_each(|thread| thread.kill(kick()).expect("a thread"));
        let parts: Vec<Part> = self.threads.iter().filter_map(|_| self.parts.recv().ok()).collect();
        let longest = |of: fn(&Part) -> Duration| parts.iter().map(of).max().unwrap_or_default();
        let out = parts.iter().map(|part| part.out).max().unwrap_or(began);
        [out - began, longest(|part| part.state), longest(|part| part.copy)]
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.quit.store(true, Ordering::SeqCst);
        self.go.wait();
        self.threads.drain(..).for_each(|thread| thread.join().expect("a thread"));
        // SAFETY: exactly the mapping made in `new`; no vCPU runs any more.
        unsafe { libc::munmap(self.memory.at.cast(), self.memory.bytes) };
    }
}

struct Vcpu {
    fd: VcpuFd,
    msrs: Msrs,
    own: Memory,
    copy: Memory,
}

impl Vcpu {
    fn round(&mut self) -> Part {
        loop {
            match self.fd.run() {
                Err(error) if error.errno() == libc::EINTR => break,
                Err(error) => panic!("KVM_RUN: {error}"),
                Ok(_) => {}
            }
        }
        let out = Instant::now();
        self.read_state().expect("a vCPU's state");
        let saved = Instant::now();
        // SAFETY: both have that many bytes and do not overlap; the guest is stopped.
        unsafe { copy(self.own.at, self.copy.at, self.own.bytes) };
        Part { out, state: saved - out, copy: saved.elapsed() }
    }

    /// General, system and event registers came with the exit.
    fn read_state(&mut self) -> Result<(), kvm_ioctls::Error> {
        std::hint::black_box(self.fd.get_mp_state()?);
        std::hint::black_box(self.fd.get_xsave()?);
        std::hint::black_box(self.fd.get_xcrs()?);
        std::hint::black_box(self.fd.get_debug_regs()?);
        std::hint::black_box(self.fd.get_lapic()?);
        self.fd.get_msrs(&mut self.msrs)?;
        Ok(())
    }
}

/// The MSRs of KVM's list that the vCPU has.
fn readable_msrs(kvm: &Kvm, fd: &VcpuFd) -> Result<Msrs, kvm_ioctls::Error> {
    let list = kvm.get_msr_index_list()?;
    let entry = |index| kvm_msr_entry { index, ..Default::default() };
    let readable = list.as_slice().iter().map(|&index| entry(index)).filter(|&entry| {
        Msrs::from_entries(&[entry]).is_ok_and(|mut one| fd.get_msrs(&mut one).is_ok_and(|got| got == 1))
    });
    Ok(Msrs::from_entries(&readable.collect::<Vec<_>>()).expect("as many as KVM lists"))
}

/// A field of a state section: fields are {number u16, length u32, bytes}.
fn plain<T: FromBytes>(section: &[u8], field: u16) -> T {
    let mut rest = section;
    loop {
        let (head, behind) = rest.split_at(6);
        let number = u16::from_le_bytes([head[0], head[1]]);
        let (bytes, next) =
            behind.split_at(u32::from_le_bytes([head[2], head[3], head[4], head[5]]) as usize);
        if number == field {
            return T::read_from_bytes(bytes).expect("a field of this release");
        }
        rest = next;
    }
}

/// Copies whole pages with stores that bypass the cache.
///
/// # Safety
/// Both must have so many bytes, be page-aligned and not overlap.
unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    if std::is_x86_feature_detected!("avx") {
        // SAFETY: the processor has AVX; the caller's contract.
        unsafe { copy_avx(from.cast(), to.cast(), bytes / 32) };
    } else {
        for i in 0..bytes / 16 {
            // SAFETY: inside both; SSE2 is part of x86-64.
            unsafe {
                _mm_stream_si128(to.cast::<__m128i>().add(i), _mm_load_si128(from.cast::<__m128i>().add(i)));
            }
        }
    }
    // SAFETY: SSE is part of x86-64. Others must see the copy.
    unsafe { _mm_sfence() };
}

#[target_feature(enable = "avx")]
unsafe fn copy_avx(from: *const __m256i, to: *mut __m256i, count: usize) {
    for i in 0..count {
        // SAFETY: the caller's contract.
        unsafe { _mm256_stream_si256(to.add(i), _mm256_load_si256(from.add(i))) };
    }
}
