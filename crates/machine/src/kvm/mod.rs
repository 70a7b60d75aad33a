//! The host's KVM: opens it, checks what it must offer, and makes VMs and vCPUs.

mod cpuid;
pub(crate) mod features;
pub(crate) mod msrs;

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;

use kvm_bindings::{
    CpuId, KVM_CAP_ENFORCE_PV_FEATURE_CPUID, KVM_CAP_PMU_CAPABILITY, KVM_MAX_CPUID_ENTRIES,
    KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use crate::map::{KVM_IDENTITY_MAP, KVM_TSS};

/// The smallest XSAVE state, in bytes.
pub(crate) const XSAVE_BYTES: usize = size_of::<kvm_bindings::kvm_xsave>();
/// How many vCPUs a VM may have in this version.
pub const MAX_VCPUS: u8 = outlive_epoch::image::limits::MAX_VCPUS;

/// Why KVM cannot be used. The texts name the remedy.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// No KVM on this machine.
    #[error(
        "/dev/kvm does not exist: load the module (modprobe kvm_intel or kvm_amd) or enable virtualisation in the firmware"
    )]
    Missing,
    /// The user may not use it; its group may, if it has one that does.
    #[error("no permission to open /dev/kvm: run as root or {}", join(.0.as_deref()))]
    Permission(Option<String>),
    /// Any other error on opening.
    #[error("cannot open /dev/kvm: {0}")]
    Open(io::Error),
    /// Another device or file has this name.
    #[error("/dev/kvm is not KVM: give this machine or container the real device")]
    NotKvm,
    /// The API version is not 12, which it has been since 2007.
    #[error("KVM API version {0} is not 12: Outlive does not know this KVM")]
    ApiVersion(i32),
    /// Something that every KVM since Linux 5.10 has is missing.
    #[error("this kernel's KVM lacks {0}: use Linux 5.10 or newer")]
    Capability(&'static str),
    /// Too many or too few vCPUs.
    #[error("a VM has 1 to {MAX_VCPUS} vCPUs, not {0}")]
    Vcpus(u8),
    /// An ioctl failed.
    #[error("{what}: {source}")]
    Ioctl {
        /// The ioctl.
        what: &'static str,
        /// KVM's error.
        source: kvm_ioctls::Error,
    },
}

/// The group that may use a device, if that is not root's.
fn group_of(device: &str) -> Option<String> {
    let about = fs::metadata(device).ok()?;
    let id = Some(about.gid()).filter(|id| *id != 0 && about.mode() & 0o060 == 0o060)?;
    let groups = fs::read_to_string("/etc/group").unwrap_or_default();
    let named = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(id)).then(|| name.to_owned())
    });
    Some(named.unwrap_or_else(|| id.to_string()))
}

fn join(group: Option<&str>) -> String {
    match group {
        Some(group) => format!("join its group (usermod -aG {group} $USER, then log in again)"),
        None => {
            "let a group in (chgrp kvm /dev/kvm && chmod 660 /dev/kvm), and join that (usermod -aG kvm $USER)"
                .into()
        }
    }
}

fn ioctl(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> HostError {
    move |source| HostError::Ioctl { what, source }
}

/// KVM on this machine, checked.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    cpuid: CpuId,
    xsave: XsaveCall,
}

/// How a vCPU's XSAVE state is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum XsaveCall {
    /// KVM_GET_XSAVE, whose 4096 bytes are all that kernels before Linux 5.17 keep.
    Legacy,
    /// KVM_GET_XSAVE2, with the size from KVM_CAP_XSAVE2.
    Sized(usize),
}

impl XsaveCall {
    /// The size of the state, in bytes.
    pub(crate) fn bytes(self) -> usize {
        match self {
            Self::Legacy => XSAVE_BYTES,
            Self::Sized(bytes) => bytes,
        }
    }
}

impl Host {
    /// Opens `/dev/kvm` and checks that it has what Outlive needs.
    ///
    /// # Errors
    /// [`HostError`], each with its remedy.
    pub fn open() -> Result<Self, HostError> {
        let kvm = Kvm::new().map_err(|e| match e.errno() {
            libc::ENOENT | libc::ENXIO | libc::ENODEV => HostError::Missing,
            libc::EACCES | libc::EPERM => HostError::Permission(group_of("/dev/kvm")),
            errno => HostError::Open(io::Error::from_raw_os_error(errno)),
        })?;
        match kvm.get_api_version() {
            12 => {}
            // The ioctl fails: another device lies at this path.
            version if version < 0 => return Err(HostError::NotKvm),
            version => return Err(HostError::ApiVersion(version)),
        }
        for (cap, name) in NEEDED {
            if !kvm.check_extension(cap) {
                return Err(HostError::Capability(name));
            }
        }
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(ioctl("KVM_GET_SUPPORTED_CPUID"))?;
        let xsave = match usize::try_from(kvm.check_extension_int(Cap::Xsave2)) {
            Err(_) | Ok(0) => XsaveCall::Legacy,
            Ok(bytes) => XsaveCall::Sized(bytes.max(XSAVE_BYTES)),
        };
        Ok(Self { kvm, cpuid, xsave })
    }

    /// The system file descriptor.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Bytes of a vCPU's XSAVE state (KVM_CAP_XSAVE2, at least 4096).
    pub fn xsave_bytes(&self) -> usize {
        self.xsave.bytes()
    }

    /// How a vCPU's XSAVE state is read.
    pub(crate) fn xsave(&self) -> XsaveCall {
        self.xsave
    }

    /// A new VM with interrupt chips and PIT, no memory and no vCPU.
    pub(crate) fn create_vm(&self) -> Result<VmFd, HostError> {
        let vm = self.kvm.create_vm().map_err(ioctl("KVM_CREATE_VM"))?;
        vm.set_identity_map_address(KVM_IDENTITY_MAP.base).map_err(ioctl("KVM_SET_IDENTITY_MAP_ADDR"))?;
        vm.set_tss_address(KVM_TSS.base as usize).map_err(ioctl("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(ioctl("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: kvm_bindings::KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(ioctl("KVM_CREATE_PIT2"))?;
        // CPUID shows no performance counters; this also removes those that AMD's processors have without
        // saying so.
        let mut no_counters = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
        no_counters.args[0] = KVM_PMU_CAP_DISABLE.into();
        if vm.enable_cap(&no_counters).is_err() {
            tracing::debug!("this kernel cannot switch performance counters off (before Linux 5.18)");
        }
        Ok(vm)
    }

    /// A new vCPU with this host's CPUID. Its MSRs can be listed only after this.
    pub(crate) fn create_vcpu(&self, vm: &VmFd, index: u8, vcpus: u8) -> Result<VcpuFd, HostError> {
        let vcpu = vm.create_vcpu(u64::from(index)).map_err(ioctl("KVM_CREATE_VCPU"))?;
        let entries =
            cpuid::of_vcpu(&self.cpuid, index, vcpus, self.kvm.check_extension(Cap::TscDeadlineTimer));
        // PANIC: it has at most two entries more than KVM's own list, which is far below the limit.
        let cpuid = CpuId::from_entries(&entries).expect("a few dozen entries");
        vcpu.set_cpuid2(&cpuid).map_err(ioctl("KVM_SET_CPUID2"))?;
        self.enforce_hidden_features(&vcpu);
        Ok(vcpu)
    }

    /// Makes KVM refuse its own features to a guest that CPUID does not tell of them. Otherwise a guest could
    /// still switch asynchronous page faults on, and wait for ever after a takeover.
    fn enforce_hidden_features(&self, vcpu: &VcpuFd) {
        let mut enforce = kvm_enable_cap { cap: KVM_CAP_ENFORCE_PV_FEATURE_CPUID, ..Default::default() };
        enforce.args[0] = 1;
        if vcpu.enable_cap(&enforce).is_err() {
            tracing::debug!(
                "this kernel cannot keep a guest from hidden features of KVM (before Linux 5.10)"
            );
        }
    }

    /// The MSRs of a vCPU's state.
    pub(crate) fn readable_msrs(&self, vcpu: &VcpuFd) -> Result<Vec<u32>, HostError> {
        msrs::of_vcpu(&self.kvm, vcpu)
    }

    /// IA32_ARCH_CAPABILITIES as this host can promise it to a guest.
    pub(crate) fn capabilities(&self) -> u64 {
        msrs::capabilities(&self.kvm)
    }

    /// What KVM can give to guests on this host.
    pub(crate) fn offer(&self) -> &CpuId {
        &self.cpuid
    }
}

const NEEDED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "an in-kernel interrupt chip (KVM_CAP_IRQCHIP)"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SyncRegs, "KVM_CAP_SYNC_REGS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
];

#[cfg(test)]
mod tests {
    use kvm_bindings::{Msrs, kvm_msr_entry};

    use super::*;

    /// Switching asynchronous page faults on, for which KVM would need the guest's memory, is not tried: the
    /// address of their tokens is enough to see whether KVM answers.
    #[test]
    fn a_feature_of_kvm_that_is_hidden_cannot_be_used() {
        const ASYNC_PF: u32 = 0x4b56_4d02;
        const STEAL_TIME: u32 = 0x4b56_4d03;
        let Ok(host) = Host::open() else { return println!("skipped: no /dev/kvm") };
        if host.kvm.check_extension_raw(KVM_CAP_ENFORCE_PV_FEATURE_CPUID.into()) == 0 {
            return println!("skipped: this kernel does not enforce features");
        }
        let vm = host.create_vm().unwrap();
        let vcpu = host.create_vcpu(&vm, 0, 1).unwrap();
        let taken = |index, data| {
            let entry = kvm_msr_entry { index, data, ..Default::default() };
            vcpu.set_msrs(&Msrs::from_entries(&[entry]).unwrap()).unwrap()
        };
        assert_eq!(taken(ASYNC_PF, 0x1000), 0);
        assert_eq!(taken(STEAL_TIME, 0), 1, "a feature that guests have");
        // The CPUID that a checkpoint brings is enforced too.
        vcpu.set_cpuid2(&vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap()).unwrap();
        assert_eq!(taken(ASYNC_PF, 0x1000), 0);
    }
}
