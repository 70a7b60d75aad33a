//! Which back end a VM gets, and why.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;

use kvm_bindings::{KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL};

use crate::kvm;

/// Bytes of a ring entry.
const ENTRY: u64 = 16;
/// KVM_DIRTY_RING_MAX_ENTRIES.
const MAX_ENTRIES: u64 = 65536;
/// Below this a ring fills up within an ordinary epoch.
const MIN_ENTRIES: u64 = 8192;

/// Which back end the caller wants.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// The ring if the kernel has it, else the bitmap.
    #[default]
    Auto,
    /// The ring or an error.
    Ring,
    /// The bitmap. Right for guests whose kernel code is emulated (kvm_pvm), which can overrun a ring.
    Bitmap,
}

/// Which back end it is. `Display` gives "ring" and "bitmap".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// KVM dirty ring, Linux 5.11 and later: the cost of a harvest is by dirty page.
    Ring,
    /// KVM_GET_DIRTY_LOG: the cost of a harvest is by page of the VM.
    Bitmap,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Ring => "ring",
            Kind::Bitmap => "bitmap",
        })
    }
}

/// Why there is no back end.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The ring was demanded and this kernel has none.
    #[error("this kernel has no KVM dirty ring (Linux 5.11 or later, KVM_CAP_DIRTY_LOG_RING)")]
    NoRing,
    /// The ring was demanded and KVM refused it.
    #[error(
        "KVM refuses a dirty ring of {entries} entries; the ring is enabled before the first vCPU is made"
    )]
    Refused {
        /// The size asked for.
        entries: u64,
        /// What the kernel said: EINVAL if there is a vCPU already or the ring was enabled before.
        source: io::Error,
    },
}

/// The back end that a VM has been given.
#[derive(Clone, Debug)]
pub struct Backend {
    kind: Kind,
    reason: String,
    ring_entries: u32,
}

impl Backend {
    /// Chooses the back end and, for the ring, enables it in KVM. Call it once, **before the first vCPU**.
    ///
    /// Each vCPU's ring gets 65536 / `vcpus` entries, rounded up to a power of two, at least 8192 and at most what
    /// KVM allows (65536): large enough that the dirty trigger and not a full ring ends the epoch. The VM must
    /// not use `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`: with `KVM_DIRTY_LOG_INITIALLY_SET` a ring loses the first
    /// writes to every page, and KVM does not say so.
    pub fn probe(
        kvm: BorrowedFd<'_>,
        vm: BorrowedFd<'_>,
        choice: Choice,
        vcpus: usize,
    ) -> Result<Backend, ProbeError> {
        let chosen = match choice {
            Choice::Bitmap => Backend::bitmap("the caller asked for it".into()),
            Choice::Ring => Backend::ring(kvm, vm, vcpus)?,
            Choice::Auto => match Backend::ring(kvm, vm, vcpus) {
                Ok(ring) => ring,
                Err(error) => Backend::bitmap(format!("no ring: {error}")),
            },
        };
        // Not info: it comes before everything is known to be there, and an error then is to stand alone.
        tracing::debug!(backend = %chosen.kind, reason = chosen.reason, "dirty tracking");
        Ok(chosen)
    }

    fn bitmap(reason: String) -> Backend {
        Backend { kind: Kind::Bitmap, reason, ring_entries: 0 }
    }

    fn ring(kvm: BorrowedFd<'_>, vm: BorrowedFd<'_>, vcpus: usize) -> Result<Backend, ProbeError> {
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
        let reason = format!("KVM_CAP_{name}, {entries} entries a vCPU");
        Ok(Backend { kind: Kind::Ring, reason, ring_entries: entries as u32 })
    }

    /// Which back end it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Why this one, in words for a log.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Entries in the ring of each vCPU, 0 for the bitmap. KVM stops a vCPU 64 entries earlier; on Intel
    /// processors with page modification logging 576 earlier.
    pub fn ring_entries(&self) -> u32 {
        self.ring_entries
    }
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
