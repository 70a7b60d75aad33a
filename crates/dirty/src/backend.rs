//! Which back end a VM gets, and why.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE,
};

use crate::hot::HotRule;
use crate::kvm;
use crate::layout::PAGE_SIZE;
use crate::report;
#[cfg(feature = "self-test")]
use crate::selftest::{SelfTest, Way};
use crate::source::ring::{RESERVED, RESERVED_FOR_PML};

/// Bytes of a ring entry.
const ENTRY: u64 = 16;
/// KVM_DIRTY_RING_MAX_ENTRIES.
const MAX_ENTRIES: u64 = 65536;
/// Below this a ring fills up within an ordinary epoch.
const MIN_ENTRIES: u64 = 8192;

/// Which back end the caller wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackendChoice {
    /// The ring if the kernel has it, else the clear-log, else the bitmap.
    #[default]
    Auto,
    /// The ring or an error.
    Ring,
    /// The bitmap that is cleared page by page, or an error. Right for guests whose kernel code is emulated
    /// (kvm_pvm), which can overrun a ring.
    ClearLog,
    /// The bitmap, which every KVM has.
    Bitmap,
}

/// The back end in use. `Display` gives "ring", "clear-log", "bitmap" and "uffd".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DirtyKind {
    /// KVM dirty ring, Linux 5.11 and later: the cost of a harvest grows with the dirty pages.
    Ring,
    /// KVM_GET_DIRTY_LOG and KVM_CLEAR_DIRTY_LOG, Linux 5.2 and later: the cost of a harvest grows with the
    /// size of the VM, and hot pages can be left out.
    ClearLog,
    /// KVM_GET_DIRTY_LOG: the cost of a harvest grows with the size of the VM.
    Bitmap,
    /// userfaultfd with asynchronous write-protection, Linux 6.7 and later: memory that this process writes
    /// itself, without KVM (`Tracker::of_memory`, feature `uffd`). The cost of a harvest grows with the
    /// memory.
    Uffd,
}

impl fmt::Display for DirtyKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DirtyKind::Ring => "ring",
            DirtyKind::ClearLog => "clear-log",
            DirtyKind::Uffd => "uffd",
            DirtyKind::Bitmap => "bitmap",
        })
    }
}

/// Why there is no back end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// The caller demanded the ring, and this kernel has none.
    #[error("this kernel has no KVM dirty ring (Linux 5.11 or later, KVM_CAP_DIRTY_LOG_RING)")]
    NoRing,
    /// The caller demanded the clear-log, and this kernel has none.
    #[error("this kernel has no KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (Linux 5.2 or later)")]
    NoClearLog(#[source] io::Error),
    /// The caller demanded the ring, and KVM refused it.
    #[error(
        "KVM refuses a dirty ring of {entries} entries; the ring is enabled before the first vCPU is made"
    )]
    Refused {
        /// The requested size.
        entries: u64,
        /// The kernel's error: EINVAL if there is a vCPU already or the ring was enabled before.
        source: io::Error,
    },
    /// On 64-bit Arm a bitmap is needed beside the ring, and KVM refused it. The VM has a ring now and can
    /// have no other log: make a new VM, and probe it before its first memory slot.
    #[error("KVM refuses a bitmap beside the dirty ring: it is enabled before the first memory slot is made")]
    NoBackup(#[source] io::Error),
    /// KVM logs by pages of the host, but everything here works by pages of 4 KiB.
    #[error("the pages of this host have {0} bytes, not 4096")]
    PageSize(u64),
}

/// The back end of a VM, for one tracker at a time: its clones know of each other.
///
/// Two probes of one VM do not. KVM refuses a second ring, but not a second clear-log or bitmap, nor one in
/// another process: two trackers then take each other's pages, unnoticed. So probe a VM once.
#[derive(Clone, Debug)]
pub struct DirtyBackend {
    kind: DirtyKind,
    reason: String,
    ring_entries: u32,
    /// A tracker uses it; shared by all clones.
    taken: Arc<AtomicBool>,
    /// There is a bitmap beside the rings.
    backup: bool,
    #[cfg(feature = "self-test")]
    self_test: Option<SelfTest>,
    #[cfg(any(test, feature = "planted-bug"))]
    planted: u64,
}

/// A tracker's right to the back end, until it is dropped.
pub(crate) struct BackendClaim(Arc<AtomicBool>);

impl Drop for BackendClaim {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl DirtyBackend {
    /// Chooses the back end and, for the ring, enables it in KVM. Call it once, **before the first vCPU**,
    /// and on 64-bit Arm before the first memory slot.
    ///
    /// `kvm` is `/dev/kvm`, `vm` the VM, `max_vcpus` the number of vCPUs that it will ever have. With kvm-ioctls
    /// `KvmFile::descriptor` borrows the descriptors.
    ///
    /// Each vCPU's ring gets 65536 / `max_vcpus` entries, rounded up to a power of two, at least 8192 and at most
    /// what KVM allows (65536): large enough that the dirty trigger and not a full ring ends the epoch. The
    /// VM must not use `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: with `KVM_DIRTY_LOG_INITIALLY_SET` a ring loses
    /// the first writes to every page, and KVM does not say so. [`crate::Tracker::enable`] turns it off for a
    /// ring, and this sets it without `INITIALLY_SET` for the clear-log.
    pub fn probe(
        kvm: impl AsFd,
        vm: impl AsFd,
        choice: BackendChoice,
        max_vcpus: usize,
    ) -> Result<DirtyBackend, ProbeError> {
        let (kvm, vm) = (kvm.as_fd(), vm.as_fd());
        if kvm::page_size() != PAGE_SIZE {
            return Err(ProbeError::PageSize(kvm::page_size()));
        }
        let chosen = match choice {
            BackendChoice::Bitmap => DirtyBackend::bitmap(vm, "the caller asked for it".into()),
            BackendChoice::ClearLog => DirtyBackend::clear_log(vm, "the caller asked for it".into())?,
            BackendChoice::Ring => DirtyBackend::ring(kvm, vm, max_vcpus)?,
            BackendChoice::Auto => DirtyBackend::ring(kvm, vm, max_vcpus).or_else(|no_ring| {
                if matches!(no_ring, ProbeError::NoBackup(_)) {
                    return Err(no_ring);
                }
                let why = format!("no ring: {no_ring}");
                DirtyBackend::clear_log(vm, why.clone())
                    .or_else(|_| Ok(DirtyBackend::bitmap(vm, format!("no clear-log; {why}"))))
            })?,
        };
        // Not info: at this point later steps can still fail, and their error should stand alone.
        report::debug(format_args!("dirty tracking by {}: {}", chosen.kind, chosen.reason));
        Ok(chosen)
    }

    fn of(kind: DirtyKind, reason: String, ring_entries: u32) -> DirtyBackend {
        DirtyBackend {
            kind,
            reason,
            ring_entries,
            taken: Arc::default(),
            backup: false,
            #[cfg(feature = "self-test")]
            self_test: None,
            #[cfg(any(test, feature = "planted-bug"))]
            planted: 0,
        }
    }

    fn bitmap(vm: BorrowedFd<'_>, reason: String) -> DirtyBackend {
        // With manual protection KVM_GET_DIRTY_LOG would neither clear nor arm. Without the capability it
        // fails.
        kvm::set_manual_protect(vm, 0).ok();
        DirtyBackend::of(DirtyKind::Bitmap, reason, 0)
    }

    fn clear_log(vm: BorrowedFd<'_>, reason: String) -> Result<DirtyBackend, ProbeError> {
        // Without INITIALLY_SET: with it everything is reported as dirty once.
        kvm::set_manual_protect(vm, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into())
            .map_err(ProbeError::NoClearLog)?;
        Ok(DirtyBackend::of(DirtyKind::ClearLog, reason, 0))
    }

    fn ring(kvm: BorrowedFd<'_>, vm: BorrowedFd<'_>, vcpus: usize) -> Result<DirtyBackend, ProbeError> {
        // ACQ_REL (6.1) names the same ring on x86; either gives its largest size in bytes.
        let (capability, largest) = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
            .into_iter()
            .map(|capability| (capability, kvm::check_extension(kvm, capability)))
            .find(|&(_, bytes)| bytes > 0)
            .ok_or(ProbeError::NoRing)?;
        let entries = ring_entries(vcpus, largest / ENTRY);
        kvm::enable_ring(vm, capability, entries * ENTRY)
            .map_err(|source| ProbeError::Refused { entries, source })?;
        let name =
            if capability == KVM_CAP_DIRTY_LOG_RING { "DIRTY_LOG_RING" } else { "DIRTY_LOG_RING_ACQ_REL" };
        let mut reason = format!("KVM_CAP_{name}, {entries} entries a vCPU");
        // Where KVM writes guest memory without a vCPU (arm64), those pages are in no ring.
        let backup = kvm::check_extension(kvm, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP) > 0;
        if backup {
            kvm::enable_cap(vm, KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP, 0).map_err(ProbeError::NoBackup)?;
            reason += ", with a bitmap";
        }
        Ok(DirtyBackend { backup, ..DirtyBackend::of(DirtyKind::Ring, reason, entries as u32) })
    }

    /// The right to track with it. None while another tracker has it.
    pub(crate) fn claim(&self) -> Option<BackendClaim> {
        (!self.taken.swap(true, Ordering::AcqRel)).then(|| BackendClaim(self.taken.clone()))
    }

    /// What a second probe of the same VM gives.
    #[cfg(test)]
    pub(crate) fn probed_again(&self) -> DirtyBackend {
        DirtyBackend { taken: Arc::default(), ..self.clone() }
    }

    /// Whether a bitmap beside the rings has the pages that KVM writes without a vCPU.
    pub(crate) fn has_backup(&self) -> bool {
        self.backup
    }

    /// The kind of back end.
    pub fn kind(&self) -> DirtyKind {
        self.kind
    }

    /// Why this back end was chosen, in words for a log.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Proves, in a small VM of its own that is gone when this returns (about 20 ms), that this kernel leaves
    /// pages out of a re-arm when told to, and measures the costs of a trap and a copy.
    /// [`crate::HotPages::Auto`] needs both. A kernel that fails gets no hot pages; the result is logged.
    /// Each kind of back end is tested once in a process.
    #[cfg(feature = "self-test")]
    #[must_use]
    pub fn with_self_test(mut self, kvm: impl AsFd) -> DirtyBackend {
        let way = match self.kind {
            DirtyKind::Ring => Way::Ring,
            DirtyKind::ClearLog => Way::ClearLog,
            DirtyKind::Bitmap | DirtyKind::Uffd => return self,
        };
        match SelfTest::once(kvm.as_fd(), way) {
            Ok(test) => self.self_test = Some(test),
            Err(error) => report::warn(format_args!(
                "no self-test of selective re-arm, so no hot pages: {}",
                report::Chain(&error)
            )),
        }
        self
    }

    /// The result of [`DirtyBackend::with_self_test`].
    #[cfg(feature = "self-test")]
    pub fn self_test(&self) -> Option<&SelfTest> {
        self.self_test.as_ref()
    }

    /// The rule that follows from the measured costs, or why no page can be hot.
    pub(crate) fn hot_rule(&self, max_dirty_pages: usize) -> Result<HotRule, NoHotRule> {
        #[cfg(not(feature = "self-test"))]
        return Err(NoHotRule::Off { max_dirty_pages });
        #[cfg(feature = "self-test")]
        {
            let test = self.self_test.as_ref().ok_or(NoHotRule::NotTested)?;
            test.selective.clone().map_err(NoHotRule::NotSelective)?;
            Ok(HotRule::for_costs(test.fault_ns, test.copy_ns, max_dirty_pages))
        }
    }

    /// Pages that may stay unarmed. Each holds an entry of a ring, and all may be in the ring of one vCPU; at
    /// least three quarters of that ring stay free.
    pub(crate) fn most_hot_pages(&self) -> usize {
        match self.kind {
            DirtyKind::Ring => self.ring_entries as usize / 4,
            DirtyKind::ClearLog => usize::MAX,
            DirtyKind::Bitmap | DirtyKind::Uffd => 0,
        }
    }

    /// Entries of a ring that KVM keeps free.
    pub(crate) fn reserved(&self) -> u64 {
        let pml = std::fs::read_to_string("/sys/module/kvm_intel/parameters/pml");
        // Without /sys (a jail) this cannot be found out: then the smaller ring is the safe guess.
        let unknown = || !std::path::Path::new("/sys/module").exists();
        let has_pml = pml.map_or_else(|_| unknown(), |value| value.trim() == "Y");
        if has_pml { RESERVED + RESERVED_FOR_PML } else { RESERVED }
    }

    /// Plants a bug: one page in this many is lost. For tests that must notice it.
    #[cfg(any(test, feature = "planted-bug"))]
    #[must_use]
    pub fn with_planted_bug(mut self, every: u64) -> DirtyBackend {
        self.planted = every;
        self
    }

    #[cfg(any(test, feature = "planted-bug"))]
    pub(crate) fn planted(&self) -> u64 {
        self.planted
    }

    /// Entries in the ring of each vCPU, 0 for the bitmap. KVM stops a vCPU 64 entries earlier; on Intel
    /// processors with page modification logging 576 earlier.
    pub fn ring_entries(&self) -> u32 {
        self.ring_entries
    }
}

/// Why no page can be hot.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoHotRule {
    /// Nothing is measured in this build.
    #[cfg(not(feature = "self-test"))]
    #[error("the feature self-test is off ({max_dirty_pages} pages an epoch at most)")]
    Off { max_dirty_pages: usize },
    /// Nothing was measured.
    #[cfg(feature = "self-test")]
    #[error("there was no self-test")]
    NotTested,
    /// This kernel leaves no page out. The text is the test's.
    #[cfg(feature = "self-test")]
    #[error("{0}")]
    NotSelective(String),
}

fn ring_entries(vcpus: usize, largest: u64) -> u64 {
    let share = (MAX_ENTRIES / vcpus.max(1) as u64).max(MIN_ENTRIES).next_power_of_two();
    let largest = largest.clamp(1, MAX_ENTRIES);
    share.min(1 << largest.ilog2())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_of_rings() {
        let of = |vcpus| ring_entries(vcpus, 65536);
        assert_eq!([of(0), of(1), of(2), of(3), of(8), of(64)], [65536, 65536, 32768, 32768, 8192, 8192]);
        assert_eq!(ring_entries(1, 5000), 4096);
        assert_eq!(ring_entries(1, 1 << 20), 65536);
    }
}
