//! The machine's network card: the virtio-net device, wired to KVM and to the idle vCPU.

use std::sync::Arc;

use kvm_ioctls::{IoEventAddress, VmFd};
use outlive_guest::abi;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::bus::{Bus, BusError};
use crate::devices::gate::DeviceGate;
use crate::devices::virtio::mmio::QUEUE_NOTIFY;
use crate::devices::virtio::net::{self as virtio_net, NetConfig, NetDevice, NetHost, NetStats};
use crate::devices::virtio::{Interrupt, Waker};
use crate::memory::{GuestMemory, Ram};
use crate::vcpu::idle::IdleState;
use crate::vcpu::platform::Platform;

pub use crate::devices::virtio::net::{MacAddr, Output, OutputLimits, OutputMode, Tap};

/// The network card of a machine: see [`NetConfig`].
pub type NetOptions = NetConfig;

/// Why the network card could not be made or restored.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The device or its tap.
    #[error(transparent)]
    Device(#[from] virtio_net::NetError),
    /// Its registers do not fit on the bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// KVM refused its interrupt or its doorbell.
    #[error("{what}: {source}")]
    Kvm {
        /// The ioctl.
        what: &'static str,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// No eventfd for the interrupt.
    #[error("cannot make the interrupt's eventfd: {0}")]
    EventFd(std::io::Error),
    /// The saved state is not one of a network card.
    #[error("network card: {0}")]
    Restore(#[from] virtio_net::RestoreError),
}

/// The card's interrupt: an edge on its line, by irqfd.
struct Line(EventFd);

impl Interrupt for Line {
    fn trigger(&self) {
        // Can only fail when the counter is full, and then the interrupt is pending anyway.
        self.0.write(1).ok();
    }
}

struct WakeVcpu(Arc<IdleState>);

impl Waker for WakeVcpu {
    fn wake(&self) {
        self.0.wake();
    }
}

/// The network card of a running machine.
pub struct Net {
    device: NetDevice<GuestMemory>,
}

impl Net {
    pub(crate) fn new(
        options: &NetOptions,
        vm: &VmFd,
        ram: &Ram,
        gate: &Arc<DeviceGate>,
        platform: &Platform,
        mmio: &mut Bus,
    ) -> Result<Self, NetError> {
        let kvm = |what| move |source| NetError::Kvm { what, source };
        let line = EventFd::new(EFD_NONBLOCK).map_err(NetError::EventFd)?;
        vm.register_irqfd(&line, abi::NET_IRQ).map_err(kvm("KVM_IRQFD"))?;
        let host = NetHost {
            memory: Arc::new(ram.memory().clone()),
            gate: gate.clone(),
            interrupt: Arc::new(Line(line)),
            waker: Arc::new(WakeVcpu(platform.idle(0).clone())),
        };
        let device = NetDevice::new(options, host)?;
        mmio.insert(abi::NET_MMIO_ADDR, abi::NET_MMIO_SIZE, device.registers())?;
        let doorbell = IoEventAddress::Mmio(abi::NET_MMIO_ADDR + QUEUE_NOTIFY);
        for (queue, kick) in device.kicks().iter().enumerate() {
            vm.register_ioevent(kick, &doorbell, queue as u32).map_err(kvm("KVM_IOEVENTFD"))?;
        }
        Ok(Self { device })
    }

    /// The guest's output: held, passed on or dropped.
    pub fn output(&self) -> &Arc<Output> {
        self.device.output()
    }

    /// The counters.
    pub fn stats(&self) -> NetStats {
        self.device.stats()
    }

    /// The VM begins to run on this host: frames move from now on, queues are looked at, and with
    /// `announce` the network is told where the guest went.
    pub fn go_live(&self, announce: bool) {
        self.device.go_live(announce);
    }

    pub(crate) fn save(&self, to: &mut Vec<u8>) {
        to.clear();
        self.device.save(to);
    }

    pub(crate) fn restore(&self, bytes: &[u8]) -> Result<(), NetError> {
        Ok(self.device.restore(bytes)?)
    }
}

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Net").field("stats", &self.stats()).finish_non_exhaustive()
    }
}
