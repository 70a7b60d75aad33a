//! The code of docs/real-vmms.md, run: how existing VMMs would use the library.
// UNSAFETY: tells a tracker what memory the slots of a VM are; asks KVM from a child process.
#![allow(unsafe_code)]

#[path = "../examples/common/guest.rs"]
mod guest;

use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use guest::{DATA, Job, PAGE, Region, Stop, Vcpu};
use kvm_ioctls::{Kvm, VmFd};
use outlive_dirty::{
    BackendChoice, DirtyBackend, Fetch, Gfn, GlobalLog, KvmFile, MemoryLayout, PAGE_SIZE, RegionLog, Tracker,
    TrackerConfig,
};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap};

type Failure = Box<dyn Error + Send + Sync>;

/// The dirty log of a VM that is migrated: what its memory manager holds.
struct MigrationLog {
    tracker: Arc<Tracker>,
    buffer: Vec<Gfn>,
}

impl MigrationLog {
    /// When the migration starts. The guest runs, and the base copy begins after this.
    fn start(&mut self) -> Result<(), Failure> {
        Ok(self.tracker.enable()?)
    }

    /// A round: address and length of what has changed since the last one, in order. The guest runs; whoever
    /// sends these pages has sent them before it asks for the next round.
    fn dirty_log(&mut self) -> Result<Vec<(u64, u64)>, Failure> {
        let mut pages = Vec::new();
        loop {
            let how = Fetch { rearm: true, ..Fetch::default() };
            let fetched = self.tracker.fetch(&mut self.buffer, how)?.rearm()?;
            pages.extend_from_slice(fetched);
            if fetched.len() < self.buffer.len() {
                break;
            }
        }
        // Pages that are written in each round are not trapped any more, and come with the last one.
        self.tracker.age()?;
        Ok(ranges(&mut pages))
    }

    /// The last round, when vCPUs and devices stand still and their state was read.
    fn last_dirty_log(&mut self) -> Result<Vec<(u64, u64)>, Failure> {
        let epoch = self.tracker.stopped().state_saved().harvest()?.rearm()?;
        let mut pages = epoch.pages().to_vec();
        epoch.copied().run();
        Ok(ranges(&mut pages))
    }

    /// When it is over, or was given up.
    fn stop(&mut self) -> Result<(), Failure> {
        Ok(self.tracker.disable()?)
    }
}

fn ranges(pages: &mut [Gfn]) -> Vec<(u64, u64)> {
    let pages = Gfn::ranges(pages);
    pages.map(|range| (range.start.gpa(), (range.end.0 - range.start.0) * PAGE_SIZE)).collect()
}

/// A diff snapshot: the pages that changed since the last one, each at its place in the file. The VM is
/// paused and its state saved. An error drops the epoch, and its pages are part of the next snapshot.
fn dump_dirty(
    tracker: &Tracker,
    memory: &GuestMemoryMmap<RegionLog>,
    file: &impl FileExt,
    offset_of: impl Fn(u64) -> u64,
) -> Result<usize, Failure> {
    let epoch = tracker.stopped().state_saved().harvest()?.rearm()?;
    let mut pages = epoch.pages().to_vec();
    let mut buffer = vec![0; 1 << 20];
    for range in Gfn::ranges(&mut pages) {
        let (mut at, end) = (range.start.gpa(), range.end.gpa());
        while at < end {
            let part = &mut buffer[..(end - at).min(1 << 20) as usize];
            memory.read_slice(part, GuestAddress(at))?;
            file.write_all_at(part, offset_of(at))?;
            at += part.len() as u64;
        }
    }
    let count = epoch.pages().len();
    epoch.copied().run();
    Ok(count)
}

/// What both begin with: a tracker for the life of the VM, made before the guest runs.
fn tracker(
    kvm: &Kvm,
    vm: &VmFd,
    memory: &GuestMemoryMmap<RegionLog>,
    log: &Arc<GlobalLog>,
    backend: DirtyBackend,
    vcpus: &[Vcpu],
) -> Result<Tracker, Failure> {
    let layout = MemoryLayout::of_memory(memory, 0)?; // slots by address, from number 0, kept mapped
    let backend = backend.with_self_test(kvm.descriptor());
    let vcpus: Vec<_> = vcpus.iter().map(|vcpu| vcpu.fd.descriptor()).collect();
    let config = TrackerConfig::default().with_max_dirty_pages(100_000);
    // SAFETY: the slots are as the layout says, and stay so.
    Ok(unsafe { Tracker::new(layout, config, backend, log.clone(), vm.descriptor(), &vcpus)? })
}

struct Machine {
    tracker: Arc<Tracker>,
    vcpu: Vcpu,
    vm: VmFd,
    memory: GuestMemoryMmap<RegionLog>,
}

const BYTES: u64 = 64 << 20;

impl Machine {
    /// None, after saying why, without KVM.
    fn new(choice: BackendChoice) -> Result<Option<Machine>, Failure> {
        let Ok(kvm) = Kvm::new() else {
            println!("skipped: /dev/kvm cannot be opened");
            return Ok(None);
        };
        let vm = kvm.create_vm()?;
        let backend = match DirtyBackend::probe(kvm.descriptor(), vm.descriptor(), choice, 1) {
            Ok(backend) => backend,
            Err(error) => {
                println!("skipped: {error}");
                return Ok(None);
            }
        };
        let log = GlobalLog::new(BYTES / PAGE, 64);
        let region = MmapRegionBuilder::new_with_bitmap(BYTES as usize, RegionLog::new(log.clone(), Gfn(0)))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
            .build()?;
        let address = region.as_ptr().expose_provenance() as u64;
        let region = GuestRegionMmap::new(region, GuestAddress(0)).ok_or("no region")?;
        let memory = GuestMemoryMmap::from_regions(vec![region])?;
        guest::set_region(&vm, 0, Region { base: 0, bytes: BYTES, address }, 0)?;
        guest::load(BYTES, |at, bytes| memory.write_slice(bytes, GuestAddress(at)).unwrap());
        let mut vcpus = vec![Vcpu::new(&kvm, &vm, 0)?];
        let tracker = Arc::new(tracker(&kvm, &vm, &memory, &log, backend, &vcpus)?);
        let vcpu = vcpus.remove(0);
        let mut machine = Machine { tracker, vcpu, vm, memory };
        // Maps the pages first: otherwise their first reads would count as writes.
        machine.write(1, 0, 600)?;
        Ok(Some(machine))
    }

    /// The guest writes pages, from the number `first` on.
    fn write(&mut self, stamp: u64, first: u64, count: u64) -> Result<(), Failure> {
        self.vcpu.set_job(&Job::ordered(stamp, DATA + first * PAGE, PAGE, count))?;
        while self.vcpu.run()? != Stop::Done {}
        self.vcpu.finish();
        Ok(())
    }
}

const CHOICES: [BackendChoice; 3] = [BackendChoice::Ring, BackendChoice::ClearLog, BackendChoice::Bitmap];

#[test]
fn rounds_of_a_migration_are_ranges() {
    for choice in CHOICES {
        let Some(mut machine) = Machine::new(choice).unwrap() else { continue };
        let mut log = MigrationLog { tracker: machine.tracker.clone(), buffer: vec![Gfn(0); 128] };
        log.start().unwrap();
        machine.write(2, 10, 500).unwrap();
        machine.memory.write_obj(7_u64, GuestAddress(DATA + 600 * PAGE)).unwrap();
        let expected = [(DATA + 10 * PAGE, 500 * PAGE), (DATA + 600 * PAGE, PAGE)];
        assert_eq!(log.dirty_log().unwrap(), expected, "{choice:?}");
        assert_eq!(log.dirty_log().unwrap(), [], "{choice:?}");
        machine.write(3, 20, 3).unwrap();
        assert_eq!(log.last_dirty_log().unwrap(), [(DATA + 20 * PAGE, 3 * PAGE)], "{choice:?}");
        log.stop().unwrap();
        log.start().unwrap();
        assert_eq!(log.dirty_log().unwrap(), [], "{choice:?}: anew");
    }
}

/// A file without free space.
struct Full;

impl FileExt for Full {
    fn read_at(&self, _: &mut [u8], _: u64) -> io::Result<usize> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<usize> {
        Err(io::ErrorKind::StorageFull.into())
    }
}

#[test]
fn a_failed_snapshot_loses_no_page() {
    for choice in CHOICES {
        let Some(mut machine) = Machine::new(choice).unwrap() else { continue };
        let file = guest::memfd(BYTES).unwrap();
        machine.tracker.enable_stopped().unwrap();
        copy_all(&machine.memory, &file);
        machine.write(2, 100, 300).unwrap();
        assert!(dump_dirty(&machine.tracker, &machine.memory, &Full, |gpa| gpa).is_err());
        machine.write(3, 50, 10).unwrap();
        let dumped = dump_dirty(&machine.tracker, &machine.memory, &file, |gpa| gpa).unwrap();
        assert_eq!(dumped, 310, "{choice:?}");
        let mut bytes = vec![0; BYTES as usize];
        machine.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        let mut copied = vec![0; BYTES as usize];
        file.read_exact_at(&mut copied, 0).unwrap();
        assert!(bytes == copied, "{choice:?}: the snapshot is not what memory is");
    }
}

fn copy_all(memory: &GuestMemoryMmap<RegionLog>, file: &File) {
    let mut bytes = vec![0; memory.last_addr().0 as usize + 1];
    memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
}

/// Why a program beside the VMM cannot sample by itself, whatever descriptors it gets.
#[test]
fn kvm_answers_only_the_process_that_made_the_vm() {
    let Some(machine) = Machine::new(BackendChoice::Bitmap).unwrap() else { return };
    machine.tracker.enable_stopped().unwrap();
    let (vm, log) = (machine.vm.as_raw_fd(), vec![0_u64; (BYTES / PAGE / 64) as usize]);
    let request = [0, log.as_ptr().expose_provenance() as u64];
    const KVM_GET_DIRTY_LOG: libc::c_ulong = 0x4010_ae42;
    // SAFETY: KVM writes one bit a page of slot 0 to `log`, which is as large.
    let here = unsafe { libc::ioctl(vm, KVM_GET_DIRTY_LOG, request.as_ptr()) };
    // SAFETY: the child has the descriptor and a copy of this memory; it makes two system calls and no more.
    let child = unsafe {
        let child = libc::fork();
        if child == 0 {
            let refused = libc::ioctl(vm, KVM_GET_DIRTY_LOG, request.as_ptr()) < 0;
            libc::_exit(if refused { *libc::__errno_location() } else { 0 });
        }
        child
    };
    let mut status = 0;
    // SAFETY: waits for the child that was just made.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!((here, libc::WEXITSTATUS(status)), (0, libc::EIO));
}

#[test]
fn the_document_shows_this_code() {
    let crate_ = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = fs::read_to_string(crate_.join("../../docs/real-vmms.md")).unwrap();
    let blocks: Vec<_> =
        document.split("```rust\n").skip(1).filter_map(|text| text.split_once("```")).collect();
    assert_eq!(blocks.len(), 3);
    for (code, _) in blocks {
        assert!(include_str!("real_vmms.rs").contains(code), "not in tests/real_vmms.rs:\n{code}");
    }
}
