//! Saves and restores one vCPU, in the order that KVM requires.

use kvm_bindings::{
    CpuId, KVM_MP_STATE_RUNNABLE, Msrs, Xsave, kvm_cpuid_entry2, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::msrs;
pub(crate) use super::msrs::Unkept;
use crate::kvm::features::{self, Misfit, Missing};
use crate::kvm::msrs::{MSR_IA32_TSC, MSR_IA32_TSC_DEADLINE};
use crate::kvm::{Host, XSAVE_BYTES, XsaveCall};
use crate::state::{FieldReader, FieldWriter, StateError};

/// One part of a vCPU's state. The numbers are field numbers of a [`StateKind::Vcpu`] section.
///
/// [`StateKind::Vcpu`]: outlive_epoch::image::StateKind::Vcpu
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Item {
    /// Whether the vCPU runs, halts or waits for INIT.
    MpState = 1,
    /// General registers.
    Regs = 2,
    /// Segment and control registers.
    Sregs = 3,
    /// FPU and vector state.
    Xsave = 4,
    /// XCR0.
    Xcrs = 5,
    /// Debug registers.
    DebugRegs = 6,
    /// The local APIC.
    Lapic = 7,
    /// Model-specific registers.
    Msrs = 8,
    /// The TSC deadline, after every other MSR.
    TscDeadline = 9,
    /// Pending exceptions, interrupts and NMIs.
    Events = 10,
}

/// The order in which the parts are read, and why.
pub const SAVE_ORDER: [(Item, &str); 9] = [
    (
        Item::MpState,
        "first: the ioctl runs kvm_apic_accept_events, which carries out an INIT or start-up interrupt that has \
         come and so changes registers; the KVM_RUN of the stop follows it",
    ),
    (Item::Regs, "taken from kvm_run (KVM_CAP_SYNC_REGS) at the stop exit, saves an ioctl"),
    (Item::Sregs, "from kvm_run, as above"),
    (
        Item::Events,
        "from kvm_run, as above, where KVM reads them after the registers. Nothing that is read after them turns \
         one event into another: KVM does so in KVM_RUN only",
    ),
    (Item::Xsave, "any place"),
    (Item::Xcrs, "any place"),
    (Item::DebugRegs, "any place"),
    (Item::Lapic, "before the MSRs: a timer that fires in between is then pending in both or in none"),
    (Item::Msrs, "after CPUID was set at creation: since Linux 6.13 MSRs that CPUID hides read 0"),
];

/// The order in which the parts are written back, and why.
pub const RESTORE_ORDER: [(Item, &str); 10] = [
    (Item::MpState, "after CPUID, before everything that depends on the vCPU being runnable"),
    (Item::Regs, "before Events: KVM_SET_REGS clears pending exceptions"),
    (Item::Sregs, "before Lapic: it carries the APIC base; before Events: it clears a pending interrupt"),
    (Item::Xcrs, "before Xsave: XCR0 says which components are valid"),
    (Item::Xsave, "after Xcrs"),
    (Item::DebugRegs, "any place"),
    (Item::Lapic, "before the MSRs: the TSC deadline needs the LVT timer's mode"),
    (Item::Msrs, "TSC among them, before the deadline that is counted in it"),
    (Item::TscDeadline, "last of the MSRs: set before the TSC it would be lost (Firecracker #4099)"),
    (Item::Events, "last: SET_REGS and SET_SREGS overwrite pending events"),
];

/// Why a vCPU's state could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum VcpuStateError {
    /// An ioctl failed.
    #[error("vCPU state {item:?}: {source}")]
    Ioctl {
        /// The part.
        item: Item,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// KVM took or returned fewer MSRs than requested.
    #[error("MSR {index:#x} cannot be {verb}")]
    Msr {
        /// Number of the first MSR that failed.
        index: u32,
        /// "read" or "written".
        verb: &'static str,
    },
    /// After a restore a register does not have the value that the VM had.
    #[error(
        "MSR {index:#x} is {wanted:#x} in the VM, and {}: use hosts of the same model with the same microcode and kernel",
        .here.map_or("this host does not have it".to_owned(), |here| format!("{here:#x} here"))
    )]
    MsrDiffers {
        /// Number of the first such MSR.
        index: u32,
        /// The VM's value.
        wanted: u64,
        /// The value here; `None` if it cannot be read.
        here: Option<u64>,
    },
    /// The guest was told that it is safe from attacks to which this host's processor is open.
    #[error(
        "the VM's processor was said to be safe where this host's is not (bits {bits:#x} of IA32_ARCH_CAPABILITIES {told:#x} there, {here:#x} here): use hosts of the same model with the same microcode and kernel, or start the VM on the weaker host"
    )]
    Vulnerable {
        /// The bits in which this host is weaker.
        bits: u64,
        /// What the guest was told.
        told: u64,
        /// This host's.
        here: u64,
    },
    /// CPUID or TSC frequency.
    #[error("{what}: {source}")]
    Constant {
        /// Which of them.
        what: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// The guest was promised features that this host's processor or kernel does not have.
    #[error(
        "the VM's vCPUs have features that this host lacks ({0}): use hosts of the same model with the same kernel, or start the VM on the host that has fewer"
    )]
    Features(Missing),
    /// The guest's processor is built in another way than this host's.
    #[error("{0}: use hosts of the same model")]
    Misfit(Misfit),
    /// The other host's TSC runs at another speed and this host cannot scale its own.
    #[error(
        "the VM's TSC runs at {wanted} kHz, this host's at {here} kHz and it cannot scale: use hosts of the same model"
    )]
    TscKhz {
        /// The VM's.
        wanted: u32,
        /// This host's.
        here: u32,
    },
    /// The other host's processor or kernel keeps more vector state than this one.
    #[error(
        "the VM's vCPUs have {wanted} bytes of vector state, this host has room for {here}: use a host of the same model with Linux 5.17 or newer"
    )]
    XsaveBytes {
        /// The VM's.
        wanted: usize,
        /// This host's.
        here: usize,
    },
    /// The saved bytes are not a vCPU's state.
    #[error(transparent)]
    State(#[from] StateError),
}

pub(super) fn ioctl<T>(item: Item, result: Result<T, kvm_ioctls::Error>) -> Result<T, VcpuStateError> {
    result.map_err(|source| VcpuStateError::Ioctl { item, source })
}

/// Buffers for one vCPU's state, allocated once, so that saving allocates nothing (invariant 5).
pub(super) struct Saver {
    /// As many in each as KVM reads at once.
    msrs: Vec<Msrs>,
    /// All of them.
    entries: Vec<kvm_msr_entry>,
    xsave: Xsave,
    call: XsaveCall,
}

impl Saver {
    /// Allocates the buffers; `indices` are the MSRs to save, `call` is how this host returns the XSAVE
    /// state.
    pub(super) fn new(indices: &[u32], call: XsaveCall) -> Self {
        let entries: Vec<_> =
            indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        // PANIC: a chunk is no longer than KVM's longest list.
        let list = |chunk: &[kvm_msr_entry]| Msrs::from_entries(chunk).expect("a short list");
        Self {
            msrs: entries.chunks(msrs::MOST_AT_ONCE).map(list).collect(),
            entries,
            xsave: Xsave::new(tail(call.bytes())).unwrap_or_else(|_| Xsave::new(0).expect("empty tail")),
            call,
        }
    }

    /// The most bytes that one saved vCPU takes.
    pub(super) fn capacity(&self) -> usize {
        16 * 1024 + self.call.bytes() + size_of_val(&self.entries[..])
    }

    /// Reads the state of a stopped vCPU. `mp_state` was read before the `KVM_RUN` that filled
    /// `kvm_run.s.regs`.
    pub(super) fn save(
        &mut self,
        fd: &mut VcpuFd,
        mp_state: &kvm_mp_state,
        to: &mut Vec<u8>,
    ) -> Result<(), VcpuStateError> {
        let mut fields = FieldWriter::new(to);
        fields.put_plain(Item::MpState as u16, mp_state);
        let sync = fd.sync_regs();
        for (item, _reason) in SAVE_ORDER {
            self.save_item(fd, item, &sync, &mut fields)?;
        }
        Ok(())
    }

    fn save_item(
        &mut self,
        fd: &VcpuFd,
        item: Item,
        sync: &kvm_bindings::kvm_sync_regs,
        fields: &mut FieldWriter<'_>,
    ) -> Result<(), VcpuStateError> {
        let field = item as u16;
        match item {
            // The caller has already written it, first.
            Item::MpState => {}
            Item::Regs => fields.put_plain::<kvm_regs>(field, &sync.regs),
            Item::Sregs => fields.put_plain(field, &without_interrupts(sync.sregs)),
            Item::Xsave => self.save_xsave(fd, fields)?,
            Item::Xcrs => fields.put_plain(field, &ioctl(item, fd.get_xcrs())?),
            Item::DebugRegs => fields.put_plain(field, &ioctl(item, fd.get_debug_regs())?),
            Item::Lapic => fields.put_plain(field, &ioctl(item, fd.get_lapic())?),
            Item::Msrs => self.save_msrs(fd, fields)?,
            Item::TscDeadline => {}
            Item::Events => fields.put_plain(field, &sync.events),
        }
        Ok(())
    }

    fn save_msrs(&mut self, fd: &VcpuFd, fields: &mut FieldWriter<'_>) -> Result<(), VcpuStateError> {
        self.entries.clear();
        for chunk in &mut self.msrs {
            let got = ioctl(Item::Msrs, fd.get_msrs(chunk))?;
            let read = chunk.as_slice();
            if let Some(missing) = read.get(got) {
                return Err(VcpuStateError::Msr { index: missing.index, verb: "read" });
            }
            self.entries.extend_from_slice(read);
        }
        fix_deadline(&mut self.entries);
        fields.put_plain(Item::Msrs as u16, &self.entries[..]);
        Ok(())
    }
}

/// For interrupts that are being delivered KVM sets bits in kvm_run and clears none (`__get_sregs` in
/// arch/x86/kvm/x86.c), so bits from earlier stops are still set. [`Item::Events`] has the true ones.
fn without_interrupts(sregs: kvm_sregs) -> kvm_sregs {
    kvm_sregs { interrupt_bitmap: [0; 4], ..sregs }
}

/// KVM returns the deadline as 0 while its interrupt is on the way (Firecracker #4618): a deadline of "now"
/// makes it fire again, a 0 would lose it. A guest that has no timer armed sees one early, masked by its own
/// LVT.
fn fix_deadline(entries: &mut [kvm_msr_entry]) {
    let tsc = entries.iter().find(|e| e.index == MSR_IA32_TSC).map_or(0, |e| e.data);
    if let Some(deadline) = entries.iter_mut().find(|e| e.index == MSR_IA32_TSC_DEADLINE)
        && deadline.data == 0
    {
        deadline.data = tsc;
    }
}

mod xsave {
    // UNSAFETY: KVM_GET_XSAVE2 writes, and KVM_SET_XSAVE reads, as many bytes of our buffer as KVM_CAP_XSAVE2
    // says.
    #![allow(unsafe_code)]

    use super::{
        FieldReader, FieldWriter, Item, Saver, VcpuFd, VcpuStateError, XSAVE_BYTES, Xsave, XsaveCall, ioctl,
        tail,
    };
    use crate::state::StateError;

    impl Saver {
        pub(super) fn save_xsave(
            &mut self,
            fd: &VcpuFd,
            fields: &mut FieldWriter<'_>,
        ) -> Result<(), VcpuStateError> {
            match self.call {
                XsaveCall::Legacy => {
                    let xsave = ioctl(Item::Xsave, fd.get_xsave())?;
                    fields.put_plain(Item::Xsave as u16, &xsave.region);
                }
                XsaveCall::Sized(bytes) => fields.put(Item::Xsave as u16, self.read_sized(fd, bytes)?),
            }
            Ok(())
        }

        fn read_sized(&mut self, fd: &VcpuFd, bytes: usize) -> Result<&[u8], VcpuStateError> {
            // SAFETY: `self.xsave` was allocated with at least the size that KVM_CAP_XSAVE2 gave,
            // and no dynamic XSTATE feature is enabled by this process afterwards.
            ioctl(Item::Xsave, unsafe { fd.get_xsave2(&mut self.xsave) })?;
            // Behind the length with which the wrapper begins.
            let head = std::ptr::from_ref(&self.xsave.as_fam_struct_ref().xsave).cast::<u8>();
            // SAFETY: the area and its tail are part of one allocation, together at least `bytes`
            // long, and all of it was zeroed at creation.
            Ok(unsafe { std::slice::from_raw_parts(head, bytes) })
        }
    }

    /// `xsave_bytes` is this host's number. If the host that saved has fewer, the rest are components that
    /// are not in use, whose bytes are zero.
    pub(super) fn restore(
        fd: &VcpuFd,
        fields: &FieldReader<'_>,
        xsave_bytes: usize,
    ) -> Result<(), VcpuStateError> {
        let item = Item::Xsave;
        let saved = fields.get(item as u16)?;
        if saved.len() < XSAVE_BYTES {
            return Err(StateError::Field { field: item as u16 }.into());
        }
        if saved.len() > xsave_bytes {
            return Err(VcpuStateError::XsaveBytes { wanted: saved.len(), here: xsave_bytes });
        }
        let mut xsave =
            Xsave::new(tail(xsave_bytes)).map_err(|_| StateError::Field { field: item as u16 })?;
        // SAFETY: only bytes of the XSAVE area are written, the FAM length stays.
        let head = std::ptr::from_mut(unsafe { &mut xsave.as_mut_fam_struct().xsave }).cast::<u8>();
        // SAFETY: the area at `head` and its tail have at least `xsave_bytes`, checked to hold `saved`.
        unsafe { std::ptr::copy_nonoverlapping(saved.as_ptr(), head, saved.len()) };
        // SAFETY: the buffer has the size that KVM_CAP_XSAVE2 gave, or the 4096 bytes of kernels without it.
        ioctl(item, unsafe { fd.set_xsave2(&xsave) })
    }
}

/// Elements of the part of an [`Xsave`] that follows its first [`XSAVE_BYTES`].
fn tail(xsave_bytes: usize) -> usize {
    xsave_bytes.saturating_sub(XSAVE_BYTES).div_ceil(4)
}

/// What a restore does with the vCPU's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tsc {
    /// Continues from where it was saved, plus this many ticks for the time that has passed since.
    Advance(u64),
    /// Stays as it is: the guest is restarted, its host runs on.
    Keep,
}

impl Tsc {
    /// `entry` as it must be written, if at all.
    pub(super) fn apply(self, mut entry: kvm_msr_entry) -> Option<kvm_msr_entry> {
        match self {
            _ if entry.index != MSR_IA32_TSC => {}
            Self::Advance(ticks) => entry.data = entry.data.wrapping_add(ticks),
            Self::Keep => return None,
        }
        Some(entry)
    }
}

/// Makes KVM accept the next TSC that is written as it is. If the value is less than a second from what KVM
/// expects, KVM takes it for an attempt to keep the vCPUs together, and leaves the offset as it was
/// (`kvm_synchronize_tsc` in arch/x86/kvm/x86.c). A standby's second restore would then get the time of its
/// first, which was a trial and came late, and the guest's TSC could go back. Call this on one vCPU before
/// all others; they then follow the first that is restored.
pub(crate) fn forget_time(fd: &VcpuFd) -> Result<(), VcpuStateError> {
    const FAR_SECONDS: u64 = 3600;
    let failed = |source| VcpuStateError::Constant { what: "KVM_GET_TSC_KHZ", source };
    let khz = fd.get_tsc_khz().map_err(failed)?;
    let mut now = one_msr(MSR_IA32_TSC, 0)?;
    ioctl(Item::Msrs, fd.get_msrs(&mut now))?;
    let here = now.as_slice().first().map_or(0, |entry| entry.data);
    let far = here.wrapping_add(u64::from(khz) * 1000 * FAR_SECONDS);
    ioctl(Item::Msrs, fd.set_msrs(&one_msr(MSR_IA32_TSC, far)?)).map(drop)
}

fn one_msr(index: u32, data: u64) -> Result<Msrs, VcpuStateError> {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    Ok(Msrs::from_entries(&[entry]).map_err(|_| StateError::Field { field: Item::Msrs as u16 })?)
}

/// Writes a saved state into a vCPU that has never run or is stopped.
pub(crate) fn restore(
    fd: &VcpuFd,
    bytes: &[u8],
    host: &Host,
    tsc: Tsc,
    unkept: Unkept,
) -> Result<(), VcpuStateError> {
    let fields = FieldReader::new(bytes)?;
    for (item, _reason) in RESTORE_ORDER {
        let field = item as u16;
        match item {
            Item::MpState => ioctl(item, fd.set_mp_state(fields.get_plain::<kvm_mp_state>(field)?))?,
            Item::Regs => ioctl(item, fd.set_regs(&fields.get_plain(field)?))?,
            Item::Sregs => ioctl(item, fd.set_sregs(&fields.get_plain(field)?))?,
            Item::Xsave => xsave::restore(fd, &fields, host.xsave_bytes())?,
            Item::Xcrs => {
                let xcrs: kvm_xcrs = fields.get_plain(field)?;
                // A processor without XSAVE has none, and KVM_SET_XCRS takes no empty list there.
                if xcrs.nr_xcrs > 0 {
                    ioctl(item, fd.set_xcrs(&xcrs))?;
                }
            }
            Item::DebugRegs => ioctl(item, fd.set_debug_regs(&fields.get_plain(field)?))?,
            Item::Lapic => ioctl(item, fd.set_lapic(&fields.get_plain::<kvm_lapic_state>(field)?))?,
            Item::Msrs => msrs::restore(fd, &saved_msrs(&fields)?, host, tsc, unkept)?,
            Item::TscDeadline => msrs::restore_deadline(fd, &saved_msrs(&fields)?)?,
            Item::Events => ioctl(item, fd.set_vcpu_events(&fields.get_plain(field)?))?,
        }
    }
    Ok(())
}

fn saved_msrs(fields: &FieldReader<'_>) -> Result<Vec<kvm_msr_entry>, VcpuStateError> {
    Ok(fields.get_array(Item::Msrs as u16)?)
}

/// Fields of a [`StateKind::VcpuConstant`](outlive_epoch::image::StateKind::VcpuConstant) section.
const FIELD_CPUID: u16 = 1;
const FIELD_TSC_KHZ: u16 = 2;

/// Reads what never changes after boot: CPUID and TSC frequency.
pub(crate) fn save_constant(fd: &VcpuFd, to: &mut Vec<u8>) -> Result<(), VcpuStateError> {
    let constant = |what| move |source| VcpuStateError::Constant { what, source };
    let cpuid = fd.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(constant("KVM_GET_CPUID2"))?;
    let khz = fd.get_tsc_khz().map_err(constant("KVM_GET_TSC_KHZ"))?;
    let mut fields = FieldWriter::new(to);
    fields.put_plain(FIELD_CPUID, cpuid.as_slice());
    fields.put_plain(FIELD_TSC_KHZ, &khz);
    Ok(())
}

/// Gives a vCPU that has never run the CPUID and TSC frequency of the VM that it continues. Returns the
/// frequency in kHz.
pub(crate) fn restore_constant(fd: &VcpuFd, bytes: &[u8], host: &Host) -> Result<u32, VcpuStateError> {
    let constant = |what| move |source| VcpuStateError::Constant { what, source };
    let fields = FieldReader::new(bytes)?;
    let entries: Vec<kvm_cpuid_entry2> = fields.get_array(FIELD_CPUID)?;
    let cpuid = CpuId::from_entries(&entries).map_err(|_| StateError::Field { field: FIELD_CPUID })?;
    // The second time these are the VM's own, because this vCPU has them already.
    let here = fd.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(constant("KVM_GET_CPUID2"))?;
    if let Some(missing) = features::missing(&entries, here.as_slice()) {
        return Err(VcpuStateError::Features(missing));
    }
    if let Some(misfit) = features::misfit(&entries, host.offer().as_slice()) {
        return Err(VcpuStateError::Misfit(misfit));
    }
    fd.set_cpuid2(&cpuid).map_err(constant("KVM_SET_CPUID2"))?;
    let wanted: u32 = fields.get_plain(FIELD_TSC_KHZ)?;
    let here = fd.get_tsc_khz().map_err(constant("KVM_GET_TSC_KHZ"))?;
    // 250 ppm is what an NTP-disciplined guest corrects by itself.
    if u64::from(wanted.abs_diff(here)) * 4000 > u64::from(wanted) && fd.set_tsc_khz(wanted).is_err() {
        return Err(VcpuStateError::TscKhz { wanted, here });
    }
    Ok(wanted)
}

/// Makes a secondary vCPU runnable without INIT/SIPI, for guests that are started by registers.
pub(crate) fn make_runnable(fd: &VcpuFd) -> Result<(), VcpuStateError> {
    ioctl(Item::MpState, fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }))
}

#[cfg(test)]
#[path = "state_tests.rs"]
pub(super) mod tests;
