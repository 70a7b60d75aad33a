//! Brings a machine to a saved state: the heart of a takeover.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use outlive_epoch::image::{StateKind, StateSection, StateVersions, VcpuConstant};

use crate::devices::{DeviceRestoreError, serial};
use crate::machine::Machine;
use crate::state::StateError;
use crate::tsc;
use crate::vcpu::state::Unkept;
use crate::vcpu::{VcpuError, state};
use crate::vm_state::{self, Clock, Restored, VmStateError};

/// Why a machine could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The sections do not fit this machine. Nothing was changed.
    #[error(transparent)]
    State(#[from] StateError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Clock, PIT or interrupt chips.
    #[error(transparent)]
    Vm(#[from] VmStateError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceRestoreError),
    /// The serial port.
    #[error("serial port: {0}")]
    Serial(#[from] serial::RestoreError),
}

impl Machine {
    /// What the first vCPU is restored with, and the others as well, but for their numbers.
    pub fn constant(&self) -> VcpuConstant {
        let version = StateVersions::NEWEST.of(StateKind::VcpuConstant);
        VcpuConstant { version, bytes: self.constants.first().cloned().unwrap_or_default() }
    }

    /// Checks whether the vCPUs of this machine, which has not run yet, can go on with this state of another
    /// one's. A restore checks it again, with everything else.
    ///
    /// # Errors
    /// What this host lacks.
    pub fn try_constant(&mut self, constant: VcpuConstant) -> Result<(), RestoreError> {
        let VcpuConstant { version, bytes } = constant;
        if !StateKind::VcpuConstant.versions().contains(&version) {
            // The checkpoints come in a version that both sides have.
            return Ok(());
        }
        let bytes = Arc::new(bytes);
        self.vcpus.on_each(|index| {
            let (bytes, host) = (bytes.clone(), self.host.clone());
            Box::new(move |fd| {
                // One is enough: they are all on this host.
                if index == 0 { state::restore_constant(fd, &bytes, &host).map(drop) } else { Ok(()) }
            })
        })?;
        Ok(())
    }

    /// Sets a machine that has never run to a checkpoint's state. Memory must already match the checkpoint.
    /// `elapsed` is the time since the checkpoint arrived, by this host's own clock. The guest's time stamp
    /// counter and kvmclock advance by it, so its time never goes back and its wall clock stays right; the
    /// two hosts' clocks are never compared. The order, and why:
    /// 0. KVM forgets its time, so that it accepts the one that is written.
    /// 1. vCPUs (each on its own thread, all at once): the LAPICs must exist before the I/O APIC
    ///    delivers to them.
    /// 2. One TSC offset for all: they were restored a few microseconds apart.
    /// 3. Clock, PIT, chips: before any vCPU runs.
    /// 4. Devices: after the chips, whose state would overwrite an interrupt that the devices raise.
    ///
    /// A vCPU's register that this host does not keep is an error in the log only: the checkpoint may be all that
    /// is left of the VM. [`try_restore`](Self::try_restore) has refused what could be known before.
    ///
    /// # Errors
    /// [`RestoreError`]. The machine must not be run then.
    pub fn restore(
        &mut self,
        constants: &[Vec<u8>],
        sections: &[StateSection<'_>],
        elapsed: Duration,
    ) -> Result<(), RestoreError> {
        self.restore_or(Unkept::Report, constants, sections, elapsed)
    }

    /// The same as a trial, as long as another host has the VM: a register that this host does not keep is an
    /// error. The machine can be restored again.
    ///
    /// # Errors
    /// [`RestoreError`]. The machine must not be run then.
    pub fn try_restore(
        &mut self,
        constants: &[Vec<u8>],
        sections: &[StateSection<'_>],
    ) -> Result<(), RestoreError> {
        self.restore_or(Unkept::Refuse, constants, sections, Duration::ZERO)
    }

    fn restore_or(
        &mut self,
        unkept: Unkept,
        constants: &[Vec<u8>],
        sections: &[StateSection<'_>],
        elapsed: Duration,
    ) -> Result<(), RestoreError> {
        let from = Instant::now();
        self.shape().check(constants.len(), sections.iter().copied())?;
        let vcpus = self.vcpus.len();
        let mut saved = Vec::with_capacity(vcpus);
        for index in 0..vcpus {
            saved.push(Arc::new(find(sections, StateKind::Vcpu, index as u16)?.bytes.to_vec()));
        }
        self.vcpus
            .on_each(|index| Box::new(move |fd| if index == 0 { state::forget_time(fd) } else { Ok(()) }))?;
        let first_offset = Arc::new(AtomicU64::new(0));
        self.vcpus.on_each(|index| {
            let (host, saved, constant) = (self.host.clone(), saved[index].clone(), constants[index].clone());
            let first_offset = first_offset.clone();
            Box::new(move |fd| {
                let khz = state::restore_constant(fd, &constant, &host)?;
                let ticks = tsc::ticks(elapsed + from.elapsed(), khz);
                state::restore(fd, &saved, &host, state::Tsc::Advance(ticks), unkept)?;
                if index == 0
                    && let Some(offset) = tsc::offset(fd)
                {
                    first_offset.store(offset, Ordering::Release);
                }
                Ok(())
            })
        })?;
        self.vcpus.on_each(|index| {
            let offset = first_offset.load(Ordering::Acquire);
            Box::new(move |fd| {
                if index > 0 && !tsc::set_offset(fd, offset) {
                    tracing::debug!(vcpu = index, "this kernel cannot set a TSC offset");
                }
                // Tells the guest's watchdog that the guest was stopped. Fails with EINVAL for guests without
                // kvmclock.
                fd.kvmclock_ctrl().ok();
                Ok(())
            })
        })?;
        let clock = Clock::Advance { elapsed, from };
        let saved = find(sections, StateKind::Vm, 0)?;
        let Restored { asked, restarts } = vm_state::restore(&self.vm, saved.version, saved.bytes, clock)?;
        self.vcpus.set_asked(asked);
        self.restarts = restarts;
        for (slot, device) in self.devices.iter().enumerate() {
            device.restore(find(sections, StateKind::Device, slot as u16)?.bytes)?;
        }
        if let Some(serial) = &self.serial {
            serial.restore(find(sections, StateKind::Serial, 0)?.bytes)?;
        }
        self.constants = constants.to_vec();
        Ok(())
    }
}

fn find<'a>(
    sections: &[StateSection<'a>],
    kind: StateKind,
    index: u16,
) -> Result<StateSection<'a>, StateError> {
    sections
        .iter()
        .find(|s| s.kind == kind && s.index == index)
        .copied()
        .ok_or(StateError::Section { kind, index })
}
