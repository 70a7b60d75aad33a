//! vCPUs that come and go while tracking is on.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::slots::TrackerBusy;
use super::{NewError, Token, Tracker};
use crate::backend::DirtyBackend;
use crate::lane::Lane;
use crate::source::ring::{Mapping, Ring};

/// Why a vCPU was not added. Nothing has changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AddVcpuError {
    /// Not now.
    #[error(transparent)]
    Busy(#[from] TrackerBusy),
    /// There are as many vCPUs as [`crate::TrackerConfig::max_vcpus`] allows.
    #[error("there are {0} vCPUs, and that is the most that was configured (max_vcpus)")]
    Full(usize),
    /// Its ring cannot be used.
    #[error(transparent)]
    Ring(NewError),
    /// Its descriptor could not be duplicated.
    #[error("cannot duplicate the descriptor of vCPU {vcpu}")]
    Descriptor {
        /// The number that it would have got.
        vcpu: usize,
        /// The kernel's error.
        source: io::Error,
    },
}

/// The properties of the rings of a VM's vCPUs.
#[derive(Clone, Copy, Debug)]
pub(super) struct RingShape {
    entries: u32,
    reserved: u64,
}

impl RingShape {
    pub(super) fn of(backend: &DirtyBackend) -> RingShape {
        RingShape { entries: backend.ring_entries(), reserved: backend.reserved() }
    }

    /// The rings of the first vCPUs.
    pub(super) fn map_all(self, vcpus: &[BorrowedFd<'_>]) -> Result<Vec<Ring>, NewError> {
        let mut rings: Vec<Ring> = Vec::new();
        for (vcpu, fd) in vcpus.iter().enumerate() {
            let ring = self.map(vcpu, *fd, true)?;
            if let Some(other) = rings.iter().position(|other| ring.is_same(other)) {
                return Err(NewError::SameVcpu { vcpu, other });
            }
            rings.push(ring);
        }
        Ok(rings)
    }

    /// The ring of a vCPU. A ring that KVM has written to is accepted only if nobody has read it; `fresh`
    /// demands one that KVM has not written to at all.
    pub(super) fn map(self, vcpu: usize, fd: BorrowedFd<'_>, fresh: bool) -> Result<Ring, NewError> {
        let mapping = Mapping::of_vcpu(fd, self.entries).map_err(|source| NewError::Map { vcpu, source })?;
        if !mapping.is_backed() {
            return Err(NewError::NotThisVm { vcpu });
        }
        if mapping.is_used() && (fresh || !mapping.is_unread()) {
            return Err(NewError::RingUsed { vcpu });
        }
        Ok(Ring::new(Arc::new(mapping), self.reserved))
    }
}

impl Tracker {
    /// The lists of the present vCPUs.
    pub(super) fn lanes(&self) -> &[Lane] {
        &self.lanes[..self.vcpus()]
    }

    /// vCPUs that the tracker knows, including parked ones.
    pub fn vcpus(&self) -> usize {
        self.vcpus.load(Ordering::Acquire)
    }

    /// Call this when the VMM has made a vCPU (vCPU hotplug): its writes are tracked. Returns its number, the
    /// next one. The other vCPUs may run; this one must not have run yet: its earlier writes are in its ring
    /// and come with the next epoch, but an epoch that ended before did not have them.
    ///
    /// With [`crate::TrackerConfig::exact`] the trigger covers it from the next epoch on.
    /// [`crate::TrackerConfig::max_vcpus`] limits the number of vCPUs, and [`DirtyBackend::probe`] sizes the
    /// rings accordingly. This takes memory; call it outside the pause.
    ///
    /// # Errors
    /// [`AddVcpuError`]: nothing has changed.
    pub fn add_vcpu(&self, vcpu: impl AsFd) -> Result<usize, AddVcpuError> {
        let token = Token::take(self).ok_or(TrackerBusy::EpochOpen)?;
        let number = self.vcpus();
        if number >= self.lanes.len() {
            return Err(AddVcpuError::Full(number));
        }
        let fd = vcpu.as_fd();
        let ring =
            self.ring.map(|ring| ring.map(number, fd, false)).transpose().map_err(AddVcpuError::Ring)?;
        if let Some(other) = ring.as_ref().and_then(|ring| self.source.owner_of(ring)) {
            return Err(AddVcpuError::Ring(NewError::SameVcpu { vcpu: number, other }));
        }
        let descriptor = self.config.exact.then(|| fd.try_clone_to_owned()).transpose();
        let descriptor = descriptor.map_err(|source| AddVcpuError::Descriptor { vcpu: number, source })?;
        self.source.admit(ring, descriptor);
        self.seat(&token);
        Ok(number)
    }

    /// The next vCPU has a list.
    fn seat(&self, _token: &Token<'_>) {
        let number = self.vcpus();
        if self.is_enabled() {
            self.lanes[number].populate();
        }
        self.vcpus.store(number + 1, Ordering::Release);
    }

    /// As [`Tracker::add_vcpu`], with the ring of a naive kernel.
    #[cfg(test)]
    pub(crate) fn add_test_vcpu(&self, ring: Option<Ring>) -> Result<usize, AddVcpuError> {
        let token = Token::take(self).ok_or(TrackerBusy::EpochOpen)?;
        if self.vcpus() >= self.lanes.len() {
            return Err(AddVcpuError::Full(self.vcpus()));
        }
        self.source.admit(ring, None);
        self.seat(&token);
        Ok(self.vcpus() - 1)
    }

    /// Call this when a vCPU no longer runs (it was unplugged; KVM keeps it until the VM ends). Its writes
    /// are not forgotten: they come with the next fetch or epoch. From the next epoch on it has no part of an
    /// exact trigger. Any thread, any time.
    ///
    /// # Panics
    /// If there is no such vCPU.
    pub fn park_vcpu(&self, vcpu: usize) {
        assert!(vcpu < self.vcpus(), "there is no vCPU {vcpu}");
        self.source.park(vcpu, true);
    }

    /// Says that a vCPU that was [parked](Tracker::park_vcpu) runs again.
    ///
    /// # Panics
    /// If there is no such vCPU.
    pub fn unpark_vcpu(&self, vcpu: usize) {
        assert!(vcpu < self.vcpus(), "there is no vCPU {vcpu}");
        self.source.park(vcpu, false);
    }
}
