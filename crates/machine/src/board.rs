//! The board: a row of slots, each with a register window, an interrupt and a device.
//!
//! [`crate::map`] says where the slots are; irqfds carry their interrupts as edges. Guests find the slots
//! through the DSDT; the payload guest knows the first one. The devices of a machine and their order belong
//! to its state: a standby's board has the same.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};

use crate::bus::{Bus, BusError};
use crate::devices::Device;
use crate::devices::gate::DeviceGate;
use crate::devices::virtio::blk::BlockError;
use crate::devices::virtio::mmio::{QUEUE_NOTIFY, WINDOW};
use crate::devices::virtio::net::NetError;
use crate::devices::virtio::{DeviceHost, Interrupt, Waker};
use crate::irq::{IrqLineError, IrqLines};
use crate::map::{SLOTS, slot_address};
use crate::memory::{GuestMemory, Ram};
use crate::vcpu::idle::IdleState;
use crate::vcpu::platform::Platform;

const _: () = assert!(slot_address(0).len == WINDOW);

/// Why a device could not be made or put on the board.
#[derive(Debug, thiserror::Error)]
pub enum BoardError {
    /// The network card or its tap.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A disk or its image.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// The serial port's thread.
    #[error("cannot start the serial port: {0}")]
    Serial(std::io::Error),
    /// The entropy device or the console.
    #[error("cannot start a device: {0}")]
    Start(std::io::Error),
    /// Its registers do not fit on the bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// KVM refused its doorbell.
    #[error("{what}: {source}")]
    Kvm {
        /// The ioctl.
        what: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// Its interrupt.
    #[error(transparent)]
    Line(#[from] IrqLineError),
    /// More devices than slots.
    #[error("a VM has at most {SLOTS} devices: give it fewer disks")]
    Full,
}

struct WakeVcpu(Arc<IdleState>);

impl Waker for WakeVcpu {
    fn wake(&self) {
        self.0.wake();
    }
}

/// The board while the machine is being built.
pub(crate) struct Board<'a> {
    vm: &'a VmFd,
    memory: Arc<GuestMemory>,
    gate: Arc<DeviceGate>,
    waker: Arc<dyn Waker>,
    mmio: &'a mut Bus,
    lines: IrqLines,
    devices: Vec<Arc<dyn Device>>,
}

impl<'a> Board<'a> {
    pub(crate) fn new(
        vm: &'a VmFd,
        ram: &Ram,
        gate: &Arc<DeviceGate>,
        platform: &Platform,
        mmio: &'a mut Bus,
    ) -> Self {
        let waker = Arc::new(WakeVcpu(platform.idle(0).clone()));
        let memory = Arc::new(ram.memory().clone());
        Self { vm, memory, gate: gate.clone(), waker, mmio, lines: IrqLines::default(), devices: Vec::new() }
    }

    /// Puts a device into the next slot; `make` borrows what it needs.
    pub(crate) fn add<D: Device + 'static, E>(
        &mut self,
        make: impl FnOnce(DeviceHost<GuestMemory>) -> Result<D, E>,
    ) -> Result<Arc<D>, BoardError>
    where
        BoardError: From<E>,
    {
        let kvm = |what| move |source| BoardError::Kvm { what, source };
        if self.devices.len() == SLOTS {
            return Err(BoardError::Full);
        }
        let at = slot_address(self.devices.len());
        let interrupt = self.interrupt(at.line)?;
        let host = DeviceHost {
            memory: self.memory.clone(),
            gate: self.gate.clone(),
            interrupt,
            waker: self.waker.clone(),
        };
        let device = Arc::new(make(host)?);
        self.mmio.insert(at.mmio, at.len, device.registers())?;
        let doorbell = IoEventAddress::Mmio(at.mmio + QUEUE_NOTIFY);
        for (queue, kick) in device.kicks().iter().enumerate() {
            self.vm.register_ioevent(kick, &doorbell, queue as u32).map_err(kvm("KVM_IOEVENTFD"))?;
        }
        self.devices.push(device.clone());
        Ok(device)
    }

    /// An interrupt that arrives on this line of the I/O APIC.
    pub(crate) fn interrupt(&mut self, line: u32) -> Result<Arc<dyn Interrupt>, BoardError> {
        Ok(self.lines.add(self.vm, line)?)
    }

    /// The devices by slot, and the interrupt lines of all.
    pub(crate) fn finish(self) -> (Vec<Arc<dyn Device>>, IrqLines) {
        (self.devices, self.lines)
    }
}
