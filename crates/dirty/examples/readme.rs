//! The example of README.md: a VM of its own, whose guest writes some pages in each of two epochs.
// UNSAFETY: gives memory to KVM and writes it as a device model does.
#![allow(unsafe_code)]

use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use outlive_dirty::{
    BackendChoice, DirtyBackend, Gfn, GlobalLog, HotPages, KVM_EXIT_DIRTY_RING_FULL, KvmFile, MemoryLayout,
    MemorySlot, PAGE_SIZE, RingExit, Tracker, TrackerConfig,
};

/// 16-bit code: mov [bx], al; add bx, 4096; dec cx; jnz to the first; hlt.
const GUEST: [u8; 10] = [0x88, 0x07, 0x81, 0xc3, 0x00, 0x10, 0x49, 0x75, 0xf7, 0xf4];

#[repr(align(4096))]
struct Memory<const BYTES: usize>([u8; BYTES]);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Ok(kvm) = Kvm::new() else {
        println!("skipped: /dev/kvm cannot be opened");
        return Ok(());
    };
    let vm = kvm.create_vm()?;

    // Before the first vCPU: a dirty ring is a property of the VM. The self-test is for hot pages.
    let backend = DirtyBackend::probe(kvm.descriptor(), vm.descriptor(), BackendChoice::Auto, 1)?
        .with_self_test(kvm.descriptor());
    println!("back end: {} ({})", backend.kind(), backend.reason());

    // 1 MiB of memory, leaked so that it outlives the VM, with the guest's code in page 1.
    let mut memory = Box::new(Memory([0; 1 << 20]));
    memory.0[0x1000..][..GUEST.len()].copy_from_slice(&GUEST);
    let memory = Box::into_raw(memory).cast::<u8>();
    let slot = MemorySlot { id: 0, base: Gfn(0), pages: 256, host_addr: memory as u64 };
    let region = kvm_userspace_memory_region {
        memory_size: slot.pages * PAGE_SIZE,
        userspace_addr: slot.host_addr,
        ..Default::default() // slot 0 at address 0; the tracker turns its log on
    };
    // SAFETY: that memory is of this size and is never freed.
    unsafe { vm.set_user_memory_region(region)? };
    let mut vcpu = vm.create_vcpu(0)?;
    let mut sregs = vcpu.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs)?;

    let layout = MemoryLayout::new(vec![slot])?;
    let global = GlobalLog::new(layout.gfn_space(), 64);
    let config = TrackerConfig::default().with_hot(HotPages::Auto);
    // SAFETY: the one slot is as it was made, and its memory is never freed.
    let tracker = unsafe {
        Tracker::new(layout, config, backend, global.clone(), vm.descriptor(), &[vcpu.descriptor()])?
    };
    tracker.enable()?; // from here on nothing is missed: a VMM now copies all of memory once

    for (epoch_number, first, count) in [(1, 3, 4), (2, 5, 2)] {
        // The guest writes `count` pages. Meanwhile a device model writes page 9, and says so.
        let (rax, rbx, rcx) = (epoch_number, first * PAGE_SIZE, count);
        vcpu.set_regs(&kvm_regs { rip: 0x1000, rflags: 2, rax, rbx, rcx, ..Default::default() })?;
        loop {
            match vcpu.run()? {
                VcpuExit::Hlt => break,
                // Otherwise the epoch ends here, before `Hlt`; this guest writes too little for that.
                VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)
                    if tracker.ring_full(0)? == RingExit::Resume => {}
                exit => return Err(format!("{exit:?}").into()),
            }
        }
        // SAFETY: a byte of the memory above.
        unsafe { memory.add(9 * 4096).write_volatile(7) };
        global.mark_range(9 * PAGE_SIZE, 1);

        // The guest stands still. First its state, as reading it can make KVM write guest memory; then its
        // pages.
        let _state = vcpu.get_regs()?;
        let epoch = tracker.stopped().state_saved().harvest()?.rearm()?;
        println!("epoch {epoch_number}: {} pages", epoch.pages().len());
        for gfn in epoch.pages() {
            // SAFETY: the tracker lists no page that is not in its layout.
            let byte = unsafe { memory.add(gfn.gpa() as usize).read_volatile() };
            println!("  page {gfn} begins with {byte}");
        }
        epoch.copied().run();
    }
    Ok(())
}
