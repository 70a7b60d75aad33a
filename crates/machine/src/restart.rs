//! The start of a Linux guest, and its restart.
//!
//! A restart takes everything back to the moment before the first start, step by step as [`RESET_ORDER`]
//! lists: vCPUs and chips to the state that KVM gave them when the machine was made, devices to power-on, and
//! the kernel from the VM's own memory ([`LinuxBoot`](crate::LinuxBoot)). Nothing comes from files or from
//! another host, so a VM restarts in the same way on a standby that has taken it over. Only time continues:
//! its counters belong to the host.
//!
//! A guest that boots the kernel of its own disk ([`Machine::disk_boot`]) is restarted with what somebody has read
//! from that disk before ([`Machine::reset_with`]); the kernel in memory is for the case that this does not work.
//!
//! A restarted machine equals a new one: the test compares what a checkpoint saves of both, section by
//! section.

use std::sync::Arc;

use outlive_epoch::image::{StateKind, StateVersions};

use crate::acpi::Description;
use crate::boot::linux;
use crate::boot::{DiskBoot, FirmwareError, LinuxBoot, LinuxBootError};
use crate::devices::serial;
use crate::irq::{self, IrqLineError};
use crate::machine::{CreateError, Machine};
use crate::map::{Range, lines};
use crate::vcpu::set::VcpuSet;
use crate::vcpu::{VcpuError, state};
use crate::vm_state::{self, Clock, RestartCount, VmStateError};

/// A step of a restart: one kind of part of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResetStep {
    /// The interrupt lines are disconnected from the chips.
    Disconnect,
    /// Devices and serial port.
    Devices,
    /// vCPUs with their local APICs.
    Vcpus,
    /// PIT and interrupt chips, in the order of a restore.
    Chips,
    /// What the guest has requested through its ports, and which vCPUs idle or have ended.
    Ports,
    /// The interrupt lines are connected again.
    Connect,
    /// Kernel, tables and first registers, as at the first start.
    Boot,
}

/// The order of a restart, and why.
pub const RESET_ORDER: [(ResetStep, &str); 7] = [
    (
        ResetStep::Disconnect,
        "first: what a device has sent and KVM has not delivered belongs to the previous run",
    ),
    (ResetStep::Devices, "while nothing that they send arrives"),
    (ResetStep::Vcpus, "before the chips: what an old chip delivers meanwhile is wiped with the local APIC"),
    (ResetStep::Chips, "after the vCPUs, as in a restore; the PIT ticks until here"),
    (ResetStep::Ports, "any place before the guest runs"),
    (ResetStep::Connect, "after the chips: they would keep an old edge"),
    (ResetStep::Boot, "last: it sets its registers on top of those of power-on"),
];

/// The version of the chips' state that is kept here.
const FRESH_VERSION: u16 = StateVersions::NEWEST.of(StateKind::Vm);

/// The state of vCPUs and chips when the machine was made.
pub(crate) struct FreshState {
    vcpus: Vec<Arc<Vec<u8>>>,
    vm: Vec<u8>,
}

impl FreshState {
    /// Reads it from a machine that has never run.
    pub(crate) fn take(vcpus: &mut VcpuSet, vm: &kvm_ioctls::VmFd) -> Result<Self, CreateError> {
        vcpus.begin_capture();
        vcpus.captured()?;
        let saved = (0..vcpus.len()).map(|index| vcpus.with_saved(index, |bytes| Arc::new(bytes.to_vec())));
        let saved = saved.collect();
        let mut chips = Vec::new();
        vm_state::save(vm, None, RestartCount::default(), FRESH_VERSION, &mut chips)?;
        Ok(Self { vcpus: saved, vm: chips })
    }

    /// Bytes of each vCPU's state.
    pub(crate) fn vcpu_sizes(&self) -> impl Iterator<Item = usize> {
        self.vcpus.iter().map(|state| state.len())
    }

    /// Bytes of the chips' state.
    pub(crate) fn vm_size(&self) -> usize {
        self.vm.len()
    }
}

/// Why a Linux guest could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartLinuxError {
    /// Its boot files.
    #[error(transparent)]
    Boot(#[from] LinuxBootError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
}

/// Why a guest could not be restarted. Its vCPUs stay stopped.
#[derive(Debug, thiserror::Error)]
pub enum ResetError {
    /// The machine has no boot image: its guest is not Linux.
    #[error("this guest has nothing to restart from")]
    NoBootImage,
    /// The start.
    #[error(transparent)]
    Start(#[from] StartLinuxError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// Interrupt chips.
    #[error(transparent)]
    Vm(#[from] VmStateError),
    /// Interrupt lines.
    #[error(transparent)]
    Line(#[from] IrqLineError),
}

/// What a restarted guest runs.
#[derive(Debug)]
pub enum Restarted {
    /// The kernel that was given, which is the one for the next restart, too.
    Given,
    /// The kernel that was given; the VM's memory has no room to keep it, so the one from before stays there.
    NotKept(FirmwareError),
    /// The kernel from before, because the given one cannot be started.
    Before(StartLinuxError),
}

impl Machine {
    /// Loads a kernel into the VM and sets the first vCPU to its entry. [`resume`](Self::resume) starts it.
    /// The machine must have been made with [`firmware_bytes`](LinuxBoot::firmware_bytes) and must not have
    /// run.
    ///
    /// # Errors
    /// [`StartLinuxError`] when the kernel, or what comes with it, does not fit the machine.
    pub fn boot_linux(&mut self, boot: &LinuxBoot) -> Result<(), StartLinuxError> {
        let region = self.ram.firmware();
        let region = region.ok_or(FirmwareError::Room { has: 0, needs: boot.firmware_bytes() });
        let stored = region.and_then(|region| boot.store(self.ram.memory(), region));
        stored.map_err(LinuxBootError::from)?;
        self.start_linux(boot)
    }

    /// Whether [`reset`](Self::reset) can restart the guest.
    pub fn can_reset(&self) -> bool {
        self.ram.firmware().is_some()
    }

    /// The disk from which the guest boots, if it does. The guest can have overwritten it.
    pub fn disk_boot(&self) -> Option<DiskBoot> {
        DiskBoot::read(self.ram.memory(), self.ram.firmware()?)
    }

    /// Restarts the guest, as its [`PowerRequest::Reset`](crate::PowerRequest::Reset) requests. The guest
    /// runs at once if it ran before. All writes are logged, so protection continues.
    ///
    /// # Errors
    /// [`ResetError`]; the guest stays stopped then.
    pub fn reset(&mut self) -> Result<(), ResetError> {
        self.restart(None).map(drop)
    }

    /// The same with another kernel, which was read from the guest's disk. If it cannot be started, the one from
    /// before is.
    ///
    /// # Errors
    /// [`ResetError`]; the guest stays stopped then.
    pub fn reset_with(&mut self, boot: &LinuxBoot) -> Result<Restarted, ResetError> {
        self.restart(Some(boot))
    }

    fn restart(&mut self, given: Option<&LinuxBoot>) -> Result<Restarted, ResetError> {
        let region = self.ram.firmware().ok_or(ResetError::NoBootImage)?;
        let was_running = self.quiesce();
        let mut started = Restarted::Given;
        for (step, _reason) in RESET_ORDER {
            match step {
                ResetStep::Boot => started = self.boot_again(given, region)?,
                step => self.reset_step(step)?,
            }
        }
        self.release(was_running);
        Ok(started)
    }

    fn boot_again(&mut self, given: Option<&LinuxBoot>, region: Range) -> Result<Restarted, ResetError> {
        let kept = LinuxBoot::read(self.ram.memory(), region);
        let mut refused = None;
        if let Some(given) = given {
            match self.start_linux(given) {
                // What is there already need not be sent to a standby once more.
                Ok(()) if kept.as_ref().is_ok_and(|kept| kept == given) => return Ok(Restarted::Given),
                Ok(()) => {
                    let stored = given.store(self.ram.memory(), region);
                    return Ok(stored.map_or_else(Restarted::NotKept, |()| Restarted::Given));
                }
                Err(error) => refused = Some(error),
            }
        }
        let kept = kept.map_err(|error| StartLinuxError::from(LinuxBootError::from(error)))?;
        self.start_linux(&kept)?;
        Ok(refused.map_or(Restarted::Given, Restarted::Before))
    }

    fn reset_step(&mut self, step: ResetStep) -> Result<(), ResetError> {
        match step {
            ResetStep::Disconnect => self.irq_lines.disconnect(&self.vm)?,
            ResetStep::Devices => {
                self.devices.iter().for_each(|device| device.reset());
                self.serial.iter().for_each(serial::SerialPort::reset);
            }
            ResetStep::Vcpus => self.vcpus.on_each(|index| {
                let (host, fresh) = (self.host.clone(), self.fresh.vcpus[index].clone());
                Box::new(move |fd| {
                    // As this host made it.
                    state::restore(fd, &fresh, &host, state::Tsc::Keep, state::Unkept::Refuse)
                })
            })?,
            ResetStep::Chips => {
                vm_state::restore(&self.vm, FRESH_VERSION, &self.fresh.vm, Clock::Keep)?;
            }
            ResetStep::Ports => self.vcpus.restart(),
            ResetStep::Connect => self.irq_lines.connect(&self.vm)?,
            // With what it boots: `boot_again`.
            ResetStep::Boot => {}
        }
        Ok(())
    }

    /// Presses the power button: a guest that listens to it shuts down in order.
    ///
    /// When this returns, the edge is at the interrupt chips, so a press is part of the next checkpoint.
    /// Through an irqfd it would arrive some time later, and a takeover would lose it: unlike a device's
    /// edge, it is not raised again then.
    ///
    /// # Errors
    /// [`IrqLineError::Pulse`].
    pub fn press_power_button(&mut self) -> Result<(), IrqLineError> {
        irq::pulse(&self.vm, lines::POWER_BUTTON)
    }

    fn start_linux(&mut self, boot: &LinuxBoot) -> Result<(), StartLinuxError> {
        let description = Description {
            vcpus: self.vcpus.len() as u8,
            devices: self.devices.len(),
            serial: self.serial.is_some(),
        };
        let entry = linux::load(&self.ram, boot, &description)?;
        self.vcpus.on_each(|index| {
            Box::new(move |fd| {
                linux::prepare_vcpu(fd);
                if index == 0 { linux::start(fd, entry) } else { Ok(()) }
            })
        })?;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
