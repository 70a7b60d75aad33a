//! The interrupt lines of a machine: each an eventfd that KVM turns into an edge at the chips (irqfd).
//!
//! A kernel thread of KVM delivers such an edge, some time after the write (`irqfd_inject` in
//! virt/kvm/eventfd.c). So [disconnect](IrqLines::disconnect) the lines before giving the chips another
//! state: otherwise an old edge would arrive after it.

use std::sync::Arc;

use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::devices::virtio::Interrupt;

/// Why an interrupt line could not be made or moved.
#[derive(Debug, thiserror::Error)]
pub enum IrqLineError {
    /// No eventfd for it.
    #[error("cannot make the eventfd of interrupt line {line}: {source}")]
    EventFd {
        /// The line (GSI).
        line: u32,
        /// Why.
        source: std::io::Error,
    },
    /// KVM refused to send an edge.
    #[error("KVM_IRQ_LINE, line {line}: {source}")]
    Pulse {
        /// The line (GSI).
        line: u32,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
    /// KVM refused it.
    #[error("KVM_IRQFD, line {line}: {source}")]
    Kvm {
        /// The line (GSI).
        line: u32,
        /// What KVM said.
        source: kvm_ioctls::Error,
    },
}

/// Sends an edge on a line that has no irqfd; it has arrived when this returns.
///
/// # Errors
/// [`IrqLineError::Pulse`].
pub(crate) fn pulse(vm: &VmFd, number: u32) -> Result<(), IrqLineError> {
    let level =
        |high| vm.set_irq_line(number, high).map_err(|source| IrqLineError::Pulse { line: number, source });
    level(true)?;
    level(false)
}

/// One line; an edge is sent with each trigger.
struct Line {
    number: u32,
    event: EventFd,
}

impl Interrupt for Line {
    fn trigger(&self) {
        // Can only fail when the counter is full, and then the interrupt is pending anyway.
        self.event.write(1).ok();
    }
}

/// All lines of a machine.
#[derive(Default)]
pub(crate) struct IrqLines(Vec<Arc<Line>>);

impl IrqLines {
    /// Connects a new line with the chips' input `number`.
    ///
    /// # Errors
    /// [`IrqLineError`].
    pub(crate) fn add(&mut self, vm: &VmFd, number: u32) -> Result<Arc<dyn Interrupt>, IrqLineError> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let event = event.map_err(|source| IrqLineError::EventFd { line: number, source })?;
        let line = Arc::new(Line { number, event });
        connect(vm, &line)?;
        self.0.push(line.clone());
        Ok(line)
    }

    /// Disconnects every line from the chips. Edges that were sent before have arrived when this returns
    /// (`kvm_irqfd_deassign` waits for them); [`connect`](Self::connect) forgets those that are sent from now
    /// on.
    ///
    /// # Errors
    /// [`IrqLineError::Kvm`].
    pub(crate) fn disconnect(&self, vm: &VmFd) -> Result<(), IrqLineError> {
        self.0.iter().try_for_each(|line| {
            let refused = |source| IrqLineError::Kvm { line: line.number, source };
            vm.unregister_irqfd(&line.event, line.number).map_err(refused)
        })
    }

    /// Connects every line again, with nothing sent.
    ///
    /// # Errors
    /// [`IrqLineError::Kvm`].
    pub(crate) fn connect(&self, vm: &VmFd) -> Result<(), IrqLineError> {
        self.0.iter().try_for_each(|line| {
            // If it cannot be read, its count is 0.
            line.event.read().ok();
            connect(vm, line)
        })
    }

    /// Sends an edge on every line.
    #[cfg(test)]
    pub(crate) fn trigger_all(&self) {
        self.0.iter().for_each(|line| line.trigger());
    }
}

fn connect(vm: &VmFd, line: &Line) -> Result<(), IrqLineError> {
    let refused = |source| IrqLineError::Kvm { line: line.number, source };
    vm.register_irqfd(&line.event, line.number).map_err(refused)
}
