//! The standby's copy of the VM: a machine that has never run, memory as of the last committed checkpoint,
//! and that checkpoint's state.

use std::path::PathBuf;
use std::sync::Arc;

use outlive_epoch::{Checkpoint, Hello, RefuseCode, Wiring};
use outlive_machine::{MacAddr, Machine, MachineEvent, NetConfig, OutputMode, Ram, RestoreError, StateShape};

use super::decisions::Equipment;
use super::devices::{self, DisksError, Images, PlanError};
use super::fence::About;
use super::record::RecordSink;
use super::sinks::{CommitSink, DiskSink, MemorySink, StateSink};
use crate::arbiter::Arbiter;
use crate::cli::NetSpec;
use crate::disk::{DiskEvent, Note, Provenance, Replica, ReplicaStartError, is_noted_here_only};
use crate::vm::limits::ACCEPTED_STATE_BYTES;
use crate::vm::{self, CannotResume, Card, CardError, Fitting, Identity, KeptVm, NotHereError, Relay};

/// The copy; see the module. The applier owns it.
pub(super) struct VmCopy {
    machine: Machine,
    memory: MemorySink,
    state: StateSink,
    disks: DiskSink,
    record: Option<RecordSink>,
    hello: Hello,
    /// Keeps the machine's events: it does not run yet, so nobody listens.
    machine_events: Relay<MachineEvent>,
    /// Opened when the primary was accepted, and found to be the primary's, so that a directory that takes
    /// its place later is noticed.
    arbiter: Box<dyn Arbiter>,
}

/// A copy taken apart for the takeover.
pub(super) struct CopyParts {
    pub(super) machine: Machine,
    pub(super) machine_events: Relay<MachineEvent>,
    pub(super) identity: Identity,
    pub(super) arbiter: Box<dyn Arbiter>,
}

/// Checks at the start that the card can be made, so that a wrong name is reported at once and not when the
/// first primary comes.
///
/// # Errors
/// See [`CardError`].
pub(super) fn try_card(net: &NetSpec) -> Result<(), CardError> {
    vm::open_card(net, net.queues.into(), Wiring::default()).map(drop)
}

/// Why this host cannot have a copy of the VM.
#[derive(Debug, thiserror::Error)]
pub(super) enum CopyError {
    /// This host cannot run it.
    #[error(transparent)]
    NotHere(#[from] NotHereError),
    /// An operator has set a bound.
    #[error(
        "the VM has {} MiB of memory, and this standby was started with --max-memory for {} MiB: start it with more",
        .bytes >> 20, .most >> 20
    )]
    TooLarge { bytes: u64, most: u64 },
    /// It cannot have its devices here.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// It has no card here.
    #[error(transparent)]
    Card(#[from] CardError),
    /// The images cannot be its disks.
    #[error(transparent)]
    Disks(#[from] DisksError),
    /// The thread of the disks cannot begin.
    #[error(transparent)]
    Replica(#[from] ReplicaStartError),
}

impl CopyError {
    /// The code for the primary's program.
    pub(super) fn code(&self) -> RefuseCode {
        match self {
            Self::Disks(DisksError::Overwrite(_)) => RefuseCode::Overwrite,
            Self::Disks(DisksError::Held(_)) => RefuseCode::Resources,
            Self::Plan(_) | Self::Disks(_) => RefuseCode::Devices,
            _ => RefuseCode::Resources,
        }
    }
}

impl VmCopy {
    /// Makes the machine for the VM that a primary introduced, with the memory that was kept of it, if any was.
    ///
    /// # Errors
    /// See [`CopyError`].
    pub(super) fn new(
        hello: &Hello,
        equipment: &Equipment,
        mut arbiter: Box<dyn Arbiter>,
        kept: Option<KeptVm>,
        tell: impl Fn(DiskEvent) + Send + 'static,
    ) -> Result<Self, CopyError> {
        let Equipment { host, options, console, books, .. } = equipment;
        check(hello, options.max_memory)?;
        let board = devices::plan(hello, options)?;
        let provenance = Provenance::introduced(hello, arbiter.identity());
        let images = Images::check(hello, options, &provenance, arbiter.as_mut())?;
        let machine_events = Relay::new();
        let mac = MacAddr(hello.mac.unwrap_or_default());
        // The guest has seen this number of queues.
        let card = board.card.zip(options.net.as_ref());
        let (ram, tap) = kept.map_or((None, None), |KeptVm { ram, tap }| (Some(ram), tap));
        let open = |(Card { pairs, wiring }, net): (Card, &NetSpec)| -> Result<NetConfig, CardError> {
            // The same VM, so it is wired as it must be. One with several queues is made anew: a card begins with all of them
            // in use.
            let tap = match tap.filter(|tap| pairs == 1 && tap.name() == net.tap) {
                Some(tap) => Arc::new(tap),
                None => vm::open_card(net, pairs, wiring)?,
            };
            Ok(NetConfig { pairs, mtu: wiring.mtu, ..vm::card(net, tap, mac) })
        };
        let card = card.map(open).transpose()?;
        let fitting = Fitting {
            output: OutputMode::Discard,
            card,
            disks: images.options(hello, options),
            console,
            active: &options.active,
            events: Arc::new(machine_events.sender()),
        };
        let machine = vm::machine(host.clone(), hello, board, fitting, ram)?;
        let disks = images.replicas(&machine, hello, options, books)?;
        let shared = vm::shared(&machine);
        note_shared(&shared, hello, &provenance);
        vm::warn_unfenced(!shared.is_empty(), &options.active);
        let disks = Replica::with_shared(disks, shared, provenance, hello.generation, tell)?;
        let ram = machine.ram().clone();
        vm::check_layout(&ram, hello)?;
        let state_bytes = hello.limits.max_state_bytes.min(ACCEPTED_STATE_BYTES) as usize;
        let disks = Arc::new(disks);
        let recorder = equipment.record.as_deref();
        let record = recorder.and_then(|it| RecordSink::new(it, hello, ram.clone(), disks.clone()));
        Ok(Self {
            machine,
            memory: MemorySink(ram),
            state: StateSink::new(state_bytes),
            disks: DiskSink(disks),
            record,
            hello: hello.clone(),
            machine_events,
            arbiter,
        })
    }

    /// The memory, for the reader, which writes the base's pages.
    pub(super) fn ram(&self) -> Arc<Ram> {
        self.memory.0.clone()
    }

    /// The disks.
    pub(super) fn disks(&self) -> Arc<Replica> {
        self.disks.0.clone()
    }

    /// The parts that a checkpoint's state must have to be resumed here.
    pub(super) fn shape(&self) -> StateShape {
        self.machine.shape()
    }

    /// Restores a checkpoint's state into the machine as a trial, before it is acknowledged: CPUID, TSC
    /// frequency, MSRs and devices that this host lacks must be found while the primary still lives, not
    /// after the generation is won. The machine does not run, and the takeover restores it again.
    ///
    /// # Errors
    /// What this host cannot do.
    pub(super) fn try_restore(&mut self, base: &Checkpoint<'_>) -> Result<(), CannotResume> {
        Ok(StateSink::try_restore(&mut self.machine, base)?)
    }

    /// Where committed checkpoints go, in this order.
    pub(super) fn sinks(&mut self) -> impl Iterator<Item = &mut dyn CommitSink> {
        let record = self.record.as_mut().map(|it| it as &mut dyn CommitSink);
        let others: [&mut dyn CommitSink; 3] = [&mut self.memory, &mut self.state, &mut self.disks];
        record.into_iter().chain(others)
    }

    /// Takes the record away, because no commit follows.
    pub(super) fn end_record(&mut self) -> Option<RecordSink> {
        self.record.take()
    }

    /// Restores the state of the last commit into the machine. The guest's time continues from the moment
    /// when that commit came.
    ///
    /// # Errors
    /// What failed.
    pub(super) fn restore(&mut self) -> Result<(), RestoreError> {
        self.state.restore(&mut self.machine)
    }

    /// The machine.
    pub(super) fn machine(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// What a fence command is told of the VM that has been won in this generation.
    pub(super) fn about(&self, generation: u64, peer: String) -> About {
        About { name: self.hello.name.clone(), vm: self.hello.vm.to_string(), generation, peer }
    }

    /// Takes the copy apart.
    pub(super) fn into_parts(self, generation: u64, checkpoint: u64) -> CopyParts {
        let identity = Identity {
            provenance: Provenance::introduced(&self.hello, self.arbiter.identity()),
            vcpus: self.hello.vcpus as u8,
            mac: self.hello.mac.map(MacAddr),
            devices: self.hello.devices.clone(),
            generation,
            checkpoint,
        };
        let Self { machine, machine_events, arbiter, .. } = self;
        CopyParts { machine, machine_events, identity, arbiter }
    }
}

/// Writes down which host has the VM of shared disks whose notes that host does not write for this one. What cannot be
/// written only makes a start of a second VM here less likely to be refused.
fn note_shared(disks: &[PathBuf], hello: &Hello, provenance: &Provenance) {
    let note = Note::at(&hello.host, provenance, hello.generation);
    for disk in disks.iter().filter(|disk| is_noted_here_only(disk)) {
        if let Err(error) = note.write(disk) {
            tracing::warn!(disk = %disk.display(), %error, "cannot write down that another host uses this shared disk");
        }
    }
}

/// Whether this host can run the VM.
fn check(hello: &Hello, max_memory: Option<u64>) -> Result<(), CopyError> {
    let bytes = hello.memory_bytes.saturating_add(hello.firmware_bytes);
    match max_memory.filter(|most| bytes > *most) {
        Some(most) => Err(CopyError::TooLarge { bytes, most }),
        None => Ok(vm::check_host(hello)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_larger_than_the_operators_bound_is_refused() {
        let hello = Hello { memory_bytes: 64 << 20, ..crate::primary::test_hello() };
        let too_large = |most| matches!(check(&hello, most), Err(CopyError::TooLarge { .. }));
        assert!(too_large(Some((64 << 20) - 1)));
        assert!(!too_large(Some(64 << 20)) && !too_large(None));
        let with_kernel = Hello { firmware_bytes: 1, ..hello };
        assert!(matches!(check(&with_kernel, Some(64 << 20)), Err(CopyError::TooLarge { .. })));
    }
}
