//! Registers that a vCPU takes back, with real KVM where it is there.

use outlive_dirty::Gfn;

use super::*;
use crate::machine::set_slots;
use crate::memory::{PAGE_SIZE, Ram};

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

#[test]
fn the_time_stamp_advances_by_the_time_that_passed_and_stays_in_a_restart() {
    let (time, other) = (msr(MSR_IA32_TSC, 1000), msr(0x277, 7));
    assert_eq!(Tsc::Advance(5).apply(time), Some(msr(MSR_IA32_TSC, 1005)));
    assert_eq!(Tsc::Keep.apply(time), None);
    assert_eq!((Tsc::Advance(5).apply(other), Tsc::Keep.apply(other)), (Some(other), Some(other)));
    assert_eq!(Tsc::Advance(2).apply(msr(MSR_IA32_TSC, u64::MAX)), Some(msr(MSR_IA32_TSC, 1)));
}

#[test]
fn a_deadline_that_is_being_delivered_is_not_lost() {
    let mut entries = [msr(MSR_IA32_TSC, 1000), msr(MSR_IA32_TSC_DEADLINE, 0)];
    fix_deadline(&mut entries);
    assert_eq!(entries[1].data, 1000);
    let mut entries = [msr(MSR_IA32_TSC, 1000), msr(MSR_IA32_TSC_DEADLINE, 1500)];
    fix_deadline(&mut entries);
    assert_eq!(entries[1].data, 1500);
}

/// A separate vCPU; `None` without KVM.
pub(in crate::vcpu) fn vcpu() -> Option<(Host, kvm_ioctls::VmFd, VcpuFd)> {
    let Ok(host) = Host::open() else {
        println!("skipped: no /dev/kvm");
        return None;
    };
    let vm = host.create_vm().unwrap();
    let fd = host.create_vcpu(&vm, 0, 1).unwrap();
    Some((host, vm, fd))
}

fn saved_by(call: XsaveCall, fd: &VcpuFd) -> Vec<u8> {
    let mut bytes = Vec::new();
    Saver::new(&[], call).save_xsave(fd, &mut FieldWriter::new(&mut bytes)).unwrap();
    bytes
}

#[test]
fn vector_state_goes_from_kernels_with_a_sized_xsave_to_those_without_and_back() {
    let Some((host, _vm, fd)) = vcpu() else { return };
    let here = XsaveCall::Sized(host.xsave_bytes());
    let area = |saved: &[u8]| {
        FieldReader::new(saved).unwrap().get(Item::Xsave as u16).unwrap()[..XSAVE_BYTES].to_vec()
    };
    let restore = |fd: &VcpuFd, saved: &[u8], room| {
        xsave::restore(fd, &FieldReader::new(saved).unwrap(), room).unwrap();
    };
    // What kernels expect: x87 control word, MXCSR, XMM3, and that they are marked as in use.
    let mut wanted = area(&saved_by(XsaveCall::Legacy, &fd));
    wanted[..2].copy_from_slice(&0x027fu16.to_le_bytes());
    wanted[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
    wanted[160 + 3 * 16..160 + 4 * 16].fill(0xa5);
    wanted[512] |= 3;
    let mut saved = Vec::new();
    FieldWriter::new(&mut saved).put(Item::Xsave as u16, &wanted);
    restore(&fd, &saved, XSAVE_BYTES);
    let (old, new) = (saved_by(XsaveCall::Legacy, &fd), saved_by(here, &fd));
    assert!(area(&old) == wanted && area(&new) == wanted, "the same layout by both");

    for (saved, room) in [(&old, here.bytes()), (&old, XSAVE_BYTES), (&new, here.bytes())] {
        let Some((_, _vm, fresh)) = vcpu() else { return };
        assert!(area(&saved_by(here, &fresh)) != wanted);
        restore(&fresh, saved, room);
        assert!(area(&saved_by(XsaveCall::Legacy, &fresh)) == wanted);
        assert!(area(&saved_by(here, &fresh)) == wanted);
    }
}

#[test]
fn vector_state_that_does_not_fit_is_refused() {
    let Some((_, _vm, fd)) = vcpu() else { return };
    let mut saved = Vec::new();
    FieldWriter::new(&mut saved).put(Item::Xsave as u16, &[0; XSAVE_BYTES + 4]);
    let error = xsave::restore(&fd, &FieldReader::new(&saved).unwrap(), XSAVE_BYTES).unwrap_err();
    assert!(error.to_string().contains("4100 bytes of vector state, this host has room for 4096"));
    FieldWriter::new(&mut saved).put(Item::Xsave as u16, &[0; XSAVE_BYTES - 4]);
    let error = xsave::restore(&fd, &FieldReader::new(&saved).unwrap(), XSAVE_BYTES).unwrap_err();
    assert!(matches!(error, VcpuStateError::State(StateError::Field { .. })), "{error}");
}

/// The standby restores a state on trial and then takes more pages: if KVM wrote into guest memory
/// meanwhile, the copy would differ from the VM.
#[test]
fn a_restore_leaves_guest_memory_as_it_is() {
    let Some((host, vm, fd)) = vcpu() else { return };
    let ram = Ram::new(64 << 20, 64).unwrap();
    set_slots(&vm, &ram).unwrap();
    let page = || {
        let mut page = [0; PAGE_SIZE];
        assert!(ram.read_page(Gfn(1), &mut page));
        page
    };
    // The guest's wall clock, clock and stolen time, as Linux sets them
    // (Documentation/virt/kvm/x86/msr.rst).
    let clocks = [msr(0x4b56_4d00, 0x1000), msr(0x4b56_4d01, 0x2001), msr(0x4b56_4d03, 0x3001)];
    let set = fd.set_msrs(&Msrs::from_entries(&clocks).unwrap()).unwrap();
    assert!(page() != [0; PAGE_SIZE], "KVM writes the wall clock; {set} of 3 are set");
    (1..4).for_each(|gfn| assert!(ram.write_page(Gfn(gfn), &[0xee; PAGE_SIZE])));
    let before = ram.hash();
    let mut saver = Saver::new(&host.readable_msrs(&fd).unwrap(), XsaveCall::Legacy);
    let mut saved = Vec::new();
    saver.save_msrs(&fd, &mut FieldWriter::new(&mut saved)).unwrap();
    let saved = saved_msrs(&FieldReader::new(&saved).unwrap()).unwrap();
    msrs::restore(&fd, &saved, &host, Tsc::Advance(0), Unkept::Refuse).unwrap();
    assert_eq!(ram.hash(), before, "the first bytes of the page: {:?}", &page()[..16]);
}

#[test]
fn a_processor_with_fewer_features_is_refused_and_the_same_is_not() {
    let Some((host, vm, fd)) = vcpu() else { return };
    let mut saved = Vec::new();
    save_constant(&fd, &mut saved).unwrap();
    let other = host.create_vcpu(&vm, 1, 2).unwrap();
    restore_constant(&other, &saved, &host).unwrap();
    restore_constant(&other, &saved, &host).unwrap();

    let mut entries = fd.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).unwrap();
    let first = entries.as_mut_slice().iter_mut().find(|entry| entry.function == 1).unwrap();
    assert_eq!(first.ecx & 1 << 5, 0, "no guest has VMX");
    first.ecx |= 1 << 5;
    let mut fields = FieldWriter::new(&mut saved);
    fields.put_plain(FIELD_CPUID, entries.as_slice());
    fields.put_plain(FIELD_TSC_KHZ, &fd.get_tsc_khz().unwrap());
    let third = host.create_vcpu(&vm, 2, 3).unwrap();
    let error = restore_constant(&third, &saved, &host).unwrap_err().to_string();
    assert!(error.contains("lacks (CPUID leaf 0x1.0 ECX 0x20)"), "{error}");
}
