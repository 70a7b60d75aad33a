//! A VM of one vCPU with a dirty ring, and the ring as KVM documents it.
// UNSAFETY: maps the ring, and reads and writes its entries, which KVM writes too.
#![allow(unsafe_code)]

use std::collections::HashSet;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_DIRTY_LOG_PAGE_OFFSET,
    KVM_MEM_LOG_DIRTY_PAGES, KVMIO, kvm_dirty_gfn,
};
use kvm_ioctls::{Kvm, VmFd};
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

use crate::guest::{self, Job, Mapping, PAGE, Region, Stop, Vcpu};

ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);

const DIRTY: u32 = 1;
const RESET: u32 = 2;

/// Fields drop in their order: the memory goes after the VM.
pub(crate) struct RingVm {
    ring: Ring,
    pub(crate) vcpu: Vcpu,
    pub(crate) vm: VmFd,
    pub(crate) memory: Mapping,
}

impl RingVm {
    /// None if there is no KVM, or none with a dirty ring. `before_slots` sees the VM before it has memory.
    pub(crate) fn new(
        bytes: u64,
        entries: u32,
        before_slots: impl FnOnce(&VmFd) -> io::Result<()>,
    ) -> io::Result<Option<RingVm>> {
        let Ok(kvm) = Kvm::new() else { return Ok(None) };
        let vm = kvm.create_vm()?;
        let ring_bytes = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
        let caps = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING];
        if caps.into_iter().all(|cap| guest::enable_cap(&vm, cap, ring_bytes).is_err()) {
            return Ok(None);
        }
        before_slots(&vm)?;
        let memory = Mapping::private(bytes)?;
        guest::load(bytes, |address, bytes| memory.write(address, bytes));
        guest::set_region(&vm, 0, region(&memory), 0)?;
        let vcpu = Vcpu::new(&kvm, &vm, 0)?;
        Ok(Some(RingVm { ring: Ring::map(&vcpu, entries)?, vcpu, vm, memory }))
    }

    pub(crate) fn set_logging(&self, on: bool) -> io::Result<()> {
        guest::set_region(&self.vm, 0, region(&self.memory), if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    /// Runs the job to its end; an exit for a full ring ends it, too.
    pub(crate) fn run(&mut self, job: &Job) -> io::Result<Stop> {
        self.vcpu.set_job(job)?;
        loop {
            match self.vcpu.run()? {
                Stop::Kicked => (),
                stop => {
                    self.vcpu.finish();
                    return Ok(stop);
                }
            }
        }
    }

    /// Takes every entry that KVM has written, marks it for reset, and returns the pages, by number.
    pub(crate) fn harvest(&mut self) -> Vec<u64> {
        let mut pages = Vec::new();
        while let Some(page) = self.ring.take() {
            pages.push(page);
        }
        pages
    }

    /// Marks entries that KVM has not written, which is forbidden.
    pub(crate) fn mark_unseen(&self, entries: u64) {
        (0..entries)
            .for_each(|index| self.ring.flags(self.ring.next + index).store(RESET, Ordering::Release));
    }

    /// KVM_RESET_DIRTY_RINGS.
    pub(crate) fn reset(&self) -> io::Result<u64> {
        // SAFETY: no argument.
        let count = unsafe { ioctl(&self.vm, KVM_RESET_DIRTY_RINGS()) };
        u64::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// Forgets all logged pages, and traps every page anew.
    pub(crate) fn begin_anew(&mut self) -> io::Result<()> {
        self.set_logging(false)?;
        self.set_logging(true)?;
        self.harvest();
        while self.reset()? > 0 {}
        Ok(())
    }
}

/// The pages of the job that hold its stamp, and so were written, but are not in the list.
pub(crate) fn missed(vm: &RingVm, job: &Job, listed: &[u64]) -> usize {
    let listed: HashSet<u64> = listed.iter().copied().collect();
    let (start, stride, count) = job.ordered;
    let addresses = (0..count).map(|index| start + index * stride);
    addresses.filter(|&at| vm.memory.word(at) == job.stamp && !listed.contains(&(at / PAGE))).count()
}

fn region(memory: &Mapping) -> Region {
    Region { base: 0, bytes: memory.bytes(), address: memory.address() }
}

struct Ring {
    entries: *mut kvm_dirty_gfn,
    size: u64,
    /// The entry that KVM writes next, as far as we know.
    next: u64,
}

impl Ring {
    fn map(vcpu: &Vcpu, entries: u32) -> io::Result<Ring> {
        let (bytes, prot) =
            (entries as usize * size_of::<kvm_dirty_gfn>(), libc::PROT_READ | libc::PROT_WRITE);
        let (fd, offset) = (vcpu.fd.as_raw_fd(), i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * PAGE as i64);
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, prot, libc::MAP_SHARED, fd, offset) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Ring { entries: at.cast(), size: entries.into(), next: 0 })
    }

    fn entry(&self, index: u64) -> *mut kvm_dirty_gfn {
        self.entries.wrapping_add((index & (self.size - 1)) as usize)
    }

    fn flags(&self, index: u64) -> &AtomicU32 {
        // SAFETY: an aligned word of the mapping, which lives as long as `self` and is shared with KVM only.
        unsafe { AtomicU32::from_ptr(&raw mut (*self.entry(index)).flags) }
    }

    fn take(&mut self) -> Option<u64> {
        if self.flags(self.next).load(Ordering::Acquire) != DIRTY {
            return None;
        }
        // SAFETY: inside the mapping; KVM has written the entry, and does not again before it is reset.
        let page = unsafe { (&raw const (*self.entry(self.next)).offset).read_volatile() };
        self.flags(self.next).store(RESET, Ordering::Release);
        self.next += 1;
        Some(page)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`.
        unsafe { libc::munmap(self.entries.cast(), self.size as usize * size_of::<kvm_dirty_gfn>()) };
    }
}
