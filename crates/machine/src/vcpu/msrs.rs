//! Writes the model-specific registers of a saved vCPU and reads them back: KVM may refuse a value, or take it
//! and keep another.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::state::{Item, Tsc, VcpuStateError, ioctl};
use crate::kvm::Host;
use crate::kvm::msrs::{self, MSR_IA32_ARCH_CAPABILITIES, MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE};
use crate::state::StateError;

/// Most registers of one ioctl (MAX_IO_MSRS in arch/x86/kvm/x86.c, which is refused itself).
pub(super) const MOST_AT_ONCE: usize = 255;

/// What becomes of a state with a register that this host does not keep as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unkept {
    /// It is refused: another host can have the VM.
    Refuse,
    /// It is accepted, and an error in the log names the register: no other host has the VM.
    Report,
}

/// Restores all of them but the deadline.
pub(super) fn restore(
    fd: &VcpuFd,
    saved: &[kvm_msr_entry],
    host: &Host,
    tsc: Tsc,
    unkept: Unkept,
) -> Result<(), VcpuStateError> {
    let cpuid = fd
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(|source| VcpuStateError::Constant { what: "KVM_GET_CPUID2", source })?;
    check_promises(cpuid.as_slice(), saved, host.capabilities())?;
    // A release that saved what is no state may have written it.
    let chosen = saved.iter().filter(|it| it.index != MSR_IA32_TSC_DEADLINE && msrs::is_state(it.index));
    let entries: Vec<_> = chosen.filter_map(|it| tsc.apply(*it)).collect();
    write(fd, &entries)?;
    read_back(fd, &entries, cpuid.as_slice(), |differs| match unkept {
        Unkept::Refuse => Err(differs),
        Unkept::Report => {
            tracing::error!("THE VM RUNS ON WITH A REGISTER THAT IS NOT AS IT WAS: {differs}");
            Ok(())
        }
    })
}

/// Restores the deadline. It is not read back: it may be over already.
pub(super) fn restore_deadline(fd: &VcpuFd, saved: &[kvm_msr_entry]) -> Result<(), VcpuStateError> {
    let deadline: Vec<_> = saved.iter().filter(|it| it.index == MSR_IA32_TSC_DEADLINE).copied().collect();
    write(fd, &deadline)
}

/// KVM accepts any value of IA32_ARCH_CAPABILITIES, and a guest does not ask again.
fn check_promises(
    cpuid: &[kvm_cpuid_entry2],
    saved: &[kvm_msr_entry],
    here: u64,
) -> Result<(), VcpuStateError> {
    let Some(told) = saved.iter().find(|it| it.index == MSR_IA32_ARCH_CAPABILITIES) else { return Ok(()) };
    let bits = msrs::false_promises(told.data, here);
    if bits != 0 && cpuid.iter().any(tells_capabilities) {
        return Err(VcpuStateError::Vulnerable { bits, told: told.data, here });
    }
    Ok(())
}

/// CPUID leaf 7, EDX: the guest may read IA32_ARCH_CAPABILITIES.
const HAS_CAPABILITIES: u32 = 1 << 29;

fn tells_capabilities(entry: &kvm_cpuid_entry2) -> bool {
    (entry.function, entry.index) == (7, 0) && entry.edx & HAS_CAPABILITIES != 0
}

/// Writes what KVM takes; [`read_back`] finds the rest.
fn write(fd: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), VcpuStateError> {
    let mut rest = entries;
    while !rest.is_empty() {
        let written = ioctl(Item::Msrs, fd.set_msrs(&list(rest)?))?;
        // KVM stops at the first that it refuses.
        rest = &rest[written.max(1).min(rest.len())..];
    }
    Ok(())
}

/// Compares what the vCPU has now with what it should have. A register that cannot be read counts as 0, which
/// is what newer kernels return for one that CPUID hides.
fn read_back(
    fd: &VcpuFd,
    wanted: &[kvm_msr_entry],
    cpuid: &[kvm_cpuid_entry2],
    differs: impl Fn(VcpuStateError) -> Result<(), VcpuStateError>,
) -> Result<(), VcpuStateError> {
    let mut rest = wanted;
    while !rest.is_empty() {
        let mut found = list(rest)?;
        let got = ioctl(Item::Msrs, fd.get_msrs(&mut found))?;
        let read = found.as_slice().iter().take(got).map(|it| Some(it.data));
        // KVM stops at the first that cannot be read.
        let unreadable = (got < found.as_slice().len()).then_some(None);
        let count = got + unreadable.iter().len();
        for (wanted, here) in rest.iter().zip(read.chain(unreadable)) {
            let other = (here.unwrap_or(0) ^ wanted.data) & msrs::used_bits(wanted.index, cpuid);
            // Time goes on.
            if other != 0 && wanted.index != MSR_IA32_TSC {
                differs(VcpuStateError::MsrDiffers { index: wanted.index, wanted: wanted.data, here })?;
            }
        }
        rest = &rest[count..];
    }
    Ok(())
}

/// As many of the entries as KVM takes at once.
fn list(entries: &[kvm_msr_entry]) -> Result<Msrs, VcpuStateError> {
    let chunk = &entries[..entries.len().min(MOST_AT_ONCE)];
    Ok(Msrs::from_entries(chunk).map_err(|_| StateError::Field { field: Item::Msrs as u16 })?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vcpu::state::tests::vcpu;

    const PAT: u32 = 0x277;
    const KERNEL_GS_BASE: u32 = 0xc000_0102;
    /// No address is like this, so KVM refuses it.
    const NOT_CANONICAL: u64 = 1 << 63;
    /// A register that KVM takes and then ignores some bits of.
    const HWCR: u32 = 0xc001_0015;

    fn msr(index: u32, data: u64) -> kvm_msr_entry {
        kvm_msr_entry { index, data, ..Default::default() }
    }

    fn saved(host: &Host, fd: &VcpuFd) -> Vec<kvm_msr_entry> {
        let indices = host.readable_msrs(fd).unwrap();
        let entries: Vec<_> = indices.into_iter().map(|index| msr(index, 0)).collect();
        let mut found = Msrs::from_entries(&entries).unwrap();
        assert_eq!(fd.get_msrs(&mut found).unwrap(), entries.len());
        found.as_slice().to_vec()
    }

    /// As it is on a takeover: the other vCPU has run, so its registers differ from a new one's.
    #[test]
    fn every_register_of_a_vcpu_is_kept_by_another() {
        let Some((host, _vm, fd)) = vcpu() else { return };
        let mut entries = saved(&host, &fd);
        let set = |entries: &mut Vec<kvm_msr_entry>, index: u32, data: u64| {
            entries.iter_mut().filter(|it| it.index == index).for_each(|it| it.data = data);
        };
        set(&mut entries, PAT, 0x0000_0106_0007_0406);
        set(&mut entries, 0xc000_0082, 0xffff_ffff_8100_0000);
        let Some((host, _vm, other)) = vcpu() else { return };
        restore(&other, &entries, &host, Tsc::Keep, Unkept::Refuse).unwrap();
        restore_deadline(&other, &entries).unwrap();
        let found = saved(&host, &other);
        for entry in entries.iter().filter(|it| it.index != MSR_IA32_TSC) {
            let here = found.iter().find(|it| it.index == entry.index).unwrap();
            assert_eq!(here.data, entry.data, "{:#x}", entry.index);
        }
    }

    #[test]
    fn a_register_that_this_host_does_not_keep_is_refused_by_name() {
        let Some((host, _vm, fd)) = vcpu() else { return };
        let refused = |entry: kvm_msr_entry| {
            let entries = [msr(PAT, 6), entry, msr(0xc000_0082, 9)];
            restore(&fd, &entries, &host, Tsc::Keep, Unkept::Refuse).unwrap_err().to_string()
        };
        let text = refused(msr(KERNEL_GS_BASE, NOT_CANONICAL));
        assert!(text.contains("MSR 0xc0000102 is 0x8000000000000000 in the VM, and 0x0 here"), "{text}");
        let text = refused(msr(0x1234_5678, 7));
        assert!(text.contains("MSR 0x12345678 is 0x7 in the VM, and this host does not have it"), "{text}");
        let text = refused(msr(HWCR, 1 << 6));
        assert!(text.contains("MSR 0xc0010015 is 0x40 in the VM, and 0x0 here"), "{text}");
    }

    /// Whoever has won the VM has the only one: it runs with what this host can keep.
    #[test]
    fn a_takeover_goes_on_without_a_register_that_this_host_does_not_keep() {
        let Some((host, _vm, fd)) = vcpu() else { return };
        let entries =
            [msr(PAT, 6), msr(KERNEL_GS_BASE, NOT_CANONICAL), msr(0x1234_5678, 7), msr(0xc000_0082, 9)];
        assert!(restore(&fd, &entries, &host, Tsc::Keep, Unkept::Refuse).is_err());
        restore(&fd, &entries, &host, Tsc::Keep, Unkept::Report).unwrap();
        let mut found = list(&[msr(PAT, 0), msr(0xc000_0082, 0)]).unwrap();
        assert_eq!(fd.get_msrs(&mut found).unwrap(), 2);
        let found: Vec<_> = found.as_slice().iter().map(|it| it.data).collect();
        assert_eq!(found, [6, 9], "all others are there");
    }

    /// Some registers can only be read, and others are not there at all on one of the hosts.
    #[test]
    fn a_refusal_that_changes_nothing_is_accepted() {
        let Some((host, _vm, fd)) = vcpu() else { return };
        // No state, whatever another release saved of it.
        let nobodys = [0x4000_0020, 0x480, 0x345].map(|index| msr(index, 77));
        let unknown = [msr(0x1234_5678, 0), msr(KERNEL_GS_BASE, 5), msr(0x1234_5679, 0)];
        restore(&fd, &[&nobodys[..], &unknown[..]].concat(), &host, Tsc::Keep, Unkept::Refuse).unwrap();
        let mut found = list(&[msr(KERNEL_GS_BASE, 0)]).unwrap();
        fd.get_msrs(&mut found).unwrap();
        assert_eq!(found.as_slice()[0].data, 5, "those behind a refused one are written");
    }

    #[test]
    fn more_registers_than_kvm_takes_at_once_are_all_compared() {
        let Some((host, _vm, fd)) = vcpu() else { return };
        let mut entries = vec![msr(KERNEL_GS_BASE, 5); 2 * MOST_AT_ONCE + 3];
        restore(&fd, &entries, &host, Tsc::Keep, Unkept::Refuse).unwrap();
        entries[MOST_AT_ONCE + 1] = msr(KERNEL_GS_BASE, NOT_CANONICAL);
        assert!(restore(&fd, &entries, &host, Tsc::Keep, Unkept::Refuse).is_err());
    }

    #[test]
    fn a_guest_that_was_told_it_is_safe_does_not_go_to_a_host_that_is_not() {
        const ANY: u64 = 1 << 0 | 1 << 5;
        let Some((host, _vm, fd)) = vcpu() else { return };
        let told = [msr(MSR_IA32_ARCH_CAPABILITIES, ANY)];
        let leaf = |edx| kvm_cpuid_entry2 { function: 7, edx, ..Default::default() };
        let check = |cpuid: &[kvm_cpuid_entry2], here| check_promises(cpuid, &told, here);
        check(&[leaf(HAS_CAPABILITIES)], ANY).unwrap();
        let text = check(&[leaf(HAS_CAPABILITIES)], 1).unwrap_err().to_string();
        assert!(text.contains("IA32_ARCH_CAPABILITIES 0x21 there, 0x1 here"), "{text}");
        check(&[leaf(0)], 1).unwrap();
        check(&[], 1).unwrap();

        let offer = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
        if !offer.as_slice().iter().any(tells_capabilities) {
            return println!("skipped: no guest of this host reads IA32_ARCH_CAPABILITIES");
        }
        let claims = !host.capabilities() & !(1 << 2 | 1 << 19);
        let error =
            restore(&fd, &[msr(MSR_IA32_ARCH_CAPABILITIES, claims)], &host, Tsc::Keep, Unkept::Refuse)
                .unwrap_err();
        assert!(matches!(error, VcpuStateError::Vulnerable { .. }), "{error}");
    }
}
