//! The migrated VM, as VMMs of the rust-vmm crates make it: regions of `vm-memory` over one memfd, with a
//! hole below 4 GiB, a slot for each, vCPU threads, and a device model that writes guest memory.
// UNSAFETY: reads and writes guest memory through raw pointers.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

use kvm_ioctls::{Kvm, VmFd};
use vm_memory::bitmap::Bitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
};

use crate::Failure;
use crate::guest::{self, DATA, Job, PAGE, Region, Vcpu};

const HOLE_END: u64 = 4 << 30;

/// The places of memory: all of it, the part below the hole, and the pages that the guest writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) bytes: u64,
    low: u64,
    touched: u64,
    stride: u64,
}

impl Plan {
    pub(crate) fn new(gib: u64, touched: u64) -> Plan {
        let bytes = gib << 30;
        let stride = (bytes - DATA) / touched / PAGE * PAGE;
        Plan { bytes, low: (bytes / 2).min(2 << 30), touched, stride }
    }

    /// Guest addresses and places in the file of the regions.
    pub(crate) fn regions(&self) -> [(u64, Range<u64>); 2] {
        [(0, 0..self.low), (HOLE_END, self.low..self.bytes)]
    }

    /// The place in the file of a guest address.
    pub(crate) fn offset(&self, gpa: u64) -> u64 {
        if gpa < HOLE_END { gpa } else { gpa - HOLE_END + self.low }
    }

    /// The guest address of a place in the file.
    pub(crate) fn gpa(&self, offset: u64) -> u64 {
        if offset < self.low { offset } else { offset - self.low + HOLE_END }
    }

    fn hole(&self) -> (u64, u64) {
        (self.low, HOLE_END - self.low)
    }

    /// A touched page, by its number.
    pub(crate) fn touched_page(&self, index: u64) -> u64 {
        self.gpa(DATA + index % self.touched * self.stride)
    }

    /// Writes every touched page once.
    pub(crate) fn fill_job(&self) -> Job {
        let mut job = Job::ordered(1, DATA, self.stride, self.touched);
        job.hole = self.hole();
        job
    }

    /// Writes this many of the touched pages: half of them always the same, the others drawn at random.
    pub(crate) fn step_job(&self, stamp: u64, index: u64, vcpus: u64, pages: u64) -> Job {
        let share = self.touched / vcpus;
        let start = DATA + index * share * self.stride;
        Job {
            stamp,
            ordered: (start, self.stride, pages / 2),
            random: (start, self.stride, share, pages - pages / 2),
            hole: self.hole(),
        }
    }
}

/// Fields drop in their order: memory goes last.
pub(crate) struct SourceVm<B> {
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) vm: VmFd,
    pub(crate) slots: Vec<Region>,
    pub(crate) memory: GuestMemoryMmap<B>,
    pub(crate) file: File,
    pub(crate) plan: Plan,
}

impl<B: Bitmap + 'static> SourceVm<B> {
    /// A VM whose guest has written every touched page once. `bitmap` makes the bitmap of a region from its
    /// address and size; `before_vcpus` sees the VM before its first vCPU.
    pub(crate) fn new(
        plan: Plan,
        vcpus: u64,
        bitmap: impl Fn(u64, usize) -> B,
        before_vcpus: impl FnOnce(&Kvm, &VmFd) -> Result<(), Failure>,
    ) -> Result<SourceVm<B>, Failure> {
        let kvm = Kvm::new().map_err(|error| format!("cannot open /dev/kvm: {error}"))?;
        let vm = kvm.create_vm()?;
        before_vcpus(&kvm, &vm)?;
        let file = guest::memfd(plan.bytes)?;
        let (mut regions, mut slots) = (Vec::new(), Vec::new());
        for (id, (base, part)) in plan.regions().into_iter().enumerate() {
            let bytes = (part.end - part.start) as usize;
            let region = MmapRegionBuilder::new_with_bitmap(bytes, bitmap(base, bytes))
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .with_file_offset(FileOffset::new(file.try_clone()?, part.start))
                .build()?;
            let slot =
                Region { base, bytes: bytes as u64, address: region.as_ptr().expose_provenance() as u64 };
            guest::set_region(&vm, id as u32, slot, 0)?;
            slots.push(slot);
            regions.push(
                GuestRegionMmap::new(region, GuestAddress(base)).ok_or("a region beyond all addresses")?,
            );
        }
        let memory = GuestMemoryMmap::from_regions(regions)?;
        let end = slots.iter().map(|slot| slot.base + slot.bytes).max().unwrap_or(0);
        let mut written = Ok(());
        guest::load(end, |address, bytes| {
            let done = memory.write_slice(bytes, GuestAddress(address));
            written = std::mem::replace(&mut written, Ok(())).and(done);
        });
        written?;
        let vcpus = (0..vcpus).map(|index| Vcpu::new(&kvm, &vm, index)).collect::<Result<Vec<_>, _>>()?;
        let mut source = SourceVm { vcpus, vm, slots, memory, file, plan };
        source.vcpus[0].set_job(&plan.fill_job())?;
        while source.vcpus[0].run()? != guest::Stop::Done {}
        source.vcpus[0].finish();
        Ok(source)
    }
}

/// Guest memory for threads that send it: pointers, because the guest writes it meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct View {
    low: *const u8,
    high: *const u8,
    plan: Plan,
}

// SAFETY: reads of plain memory; a page that changes while it is read is dirty, and is sent again.
unsafe impl Send for View {}
// SAFETY: as above.
unsafe impl Sync for View {}

impl View {
    /// Over memory that outlives every use of the view: callers keep the VM until their threads have ended.
    pub(crate) fn of<B: Bitmap + 'static>(vm: &SourceVm<B>) -> View {
        let at = |index: usize| std::ptr::with_exposed_provenance(vm.slots[index].address as usize);
        View { low: at(0), high: at(1), plan: vm.plan }
    }

    pub(crate) fn copy_page(&self, gpa: u64, to: &mut [u8]) {
        let offset = self.plan.offset(gpa);
        assert!(to.len() == PAGE as usize && offset + PAGE <= self.plan.bytes, "no page of the VM");
        let from = if gpa < HOLE_END {
            self.low.wrapping_add(gpa as usize)
        } else {
            self.high.wrapping_add((gpa - HOLE_END) as usize)
        };
        // SAFETY: a page of one of the two regions, which stay mapped; see `of`. A vCPU may write it at the
        // same time, which tears it and is made good by sending it again.
        unsafe { from.copy_to_nonoverlapping(to.as_mut_ptr(), to.len()) };
    }
}

/// The parts of a file that hold data, page by page.
pub(crate) fn extents(file: &File) -> io::Result<Vec<Range<u64>>> {
    let seek = |from: u64, whence| {
        // SAFETY: moves a position that nobody uses.
        let at = unsafe { libc::lseek(file.as_raw_fd(), from as i64, whence) };
        u64::try_from(at).map_err(|_| io::Error::last_os_error())
    };
    let (mut found, mut from) = (Vec::new(), 0);
    loop {
        match seek(from, libc::SEEK_DATA) {
            Ok(start) => {
                let end = seek(start, libc::SEEK_HOLE)?;
                found.push(start..end);
                from = end;
            }
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(found),
            Err(error) => return Err(error),
        }
    }
}

/// The work of a device model: it writes a few of the touched pages through `vm-memory`, which marks them.
pub(crate) fn device_writes<M: GuestMemoryBackend>(memory: &M, plan: &Plan, count: u64) -> Result<(), Failure>
where
    M::R: GuestMemoryRegion,
{
    for index in 0..8 {
        // A place where the guest does not write its stamp.
        let at = plan.touched_page((count * 8 + index).wrapping_mul(0x9e37_79b9)) + 2048;
        memory.write_obj(count, GuestAddress(at))?;
    }
    Ok(())
}
