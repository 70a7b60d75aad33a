//! The standby's copy of the VM: a machine that has never run, memory as of the last committed checkpoint,
//! and that checkpoint's state.

use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_dirty::Gfn;
use outlive_epoch::{
    Checkpoint, Hello, MAX_STATE_SECTIONS, PageData, Pages, RefuseCode, StateBuf, StateKind, StateSection,
};
use outlive_machine::{
    Hashes, Host, MacAddr, Machine, MachineEvent, NetConfig, Options, OutputMode, Ram, Tap,
};

use super::devices;
use crate::arbiter::Arbiter;
use crate::cli::{NetSpec, StandbyOptions};
use crate::console::{Console, Port};
use crate::disk::{DiskEvent, Provenance, Replica};
use crate::process;
use crate::vm::limits::ACCEPTED_STATE_BYTES;
use crate::vm::{self, Identity, Relay};

/// See the module.
pub(super) struct VmCopy {
    machine: Machine,
    ram: Arc<Ram>,
    hello: Hello,
    /// CPUID and TSC frequency, from the base checkpoint.
    constants: Vec<Vec<u8>>,
    state: StateBuf,
    /// When the kept state came, by this host's clock.
    kept_at: Instant,
    disks: Arc<Replica>,
    /// The machine does not run yet, so nobody listens.
    machine_events: Relay<MachineEvent>,
    /// Opened, and found to be the primary's, when the primary was accepted: a directory that takes its place
    /// later is noticed.
    arbiter: Box<dyn Arbiter>,
}

/// A copy taken apart for the takeover.
pub(super) struct CopyParts {
    pub(super) machine: Machine,
    pub(super) machine_events: Relay<MachineEvent>,
    pub(super) identity: Identity,
    pub(super) arbiter: Box<dyn Arbiter>,
}

/// Checks at start that the card can be made, so that a wrong name is told at once and not at the first
/// primary.
pub(super) fn try_card(net: &NetSpec) -> Result<(), String> {
    let tap = Tap::with_queues(&net.tap, net.queues.into()).map_err(|e| e.to_string())?;
    vm::join_bridge(Some(net))?;
    drop(tap);
    Ok(())
}

impl VmCopy {
    /// Makes the machine for the VM that a primary introduced.
    ///
    /// # Errors
    /// The refusal for the primary.
    pub(super) fn new(
        hello: &Hello,
        host: &Arc<Host>,
        options: &StandbyOptions,
        console: &Console,
        mut arbiter: Box<dyn Arbiter>,
        tell: impl Fn(DiskEvent) + Send + 'static,
    ) -> Result<Self, (RefuseCode, String)> {
        let refuse = |text: String| (RefuseCode::Resources, text);
        check(hello).map_err(refuse)?;
        let plan = devices::plan(hello, options).map_err(|text| (RefuseCode::Devices, text))?;
        let machine_events = Relay::new();
        let mac = MacAddr(hello.mac.unwrap_or_default());
        // The guest has found so many queues.
        let card = |(pairs, net)| NetConfig { pairs, ..vm::card(net, mac) };
        let machine_options = Options {
            vcpus: hello.vcpus as u8,
            memory: hello.memory_bytes,
            firmware_bytes: hello.firmware_bytes,
            output: OutputMode::Discard,
            net: plan.pairs.zip(options.net.as_ref()).map(card),
            disks: devices::disk_options(hello, options),
            rng: plan.rng,
            console: plan.console.then(|| console.end(Port::Hvc0)),
            serial: plan.serial.then(|| console.end(Port::Serial)),
            tracker: options.active.tracker.into(),
            trigger: options.active.max_dirty,
            max_dirty: options.active.max_dirty * 2,
            events: Arc::new(machine_events.sender()),
        };
        let machine = Machine::new(host.clone(), &machine_options).map_err(|e| refuse(e.to_string()))?;
        if plan.pairs.is_some() {
            vm::join_bridge(options.net.as_ref()).map_err(refuse)?;
        }
        let provenance = Provenance::introduced(hello, arbiter.identity());
        let disks = devices::replica_disks(&machine, hello, options, &provenance, arbiter.as_mut())?;
        let disks = Replica::start(disks, provenance, hello.generation, tell).map_err(refuse)?;
        let ram = machine.ram().clone();
        let same_layout = ram.slots().iter().map(|s| (s.base.0, s.pages)).eq(hello
            .layout
            .ranges()
            .iter()
            .map(|r| (r.start, r.pages)));
        if !same_layout {
            return Err(refuse(
                "this release lays guest memory out differently: run the same release on both hosts".into(),
            ));
        }
        Ok(Self {
            machine,
            ram,
            hello: hello.clone(),
            constants: Vec::new(),
            state: StateBuf::with_capacity(
                hello.limits.max_state_bytes.min(ACCEPTED_STATE_BYTES) as usize,
                MAX_STATE_SECTIONS,
            ),
            kept_at: Instant::now(),
            disks: Arc::new(disks),
            machine_events,
            arbiter,
        })
    }

    /// The memory, for the session thread.
    pub(super) fn ram(&self) -> Arc<Ram> {
        self.ram.clone()
    }

    /// The disks.
    pub(super) fn disks(&self) -> Arc<Replica> {
        self.disks.clone()
    }

    /// Checks that a checkpoint's state could be resumed here. To be asked before it is acknowledged: an
    /// acknowledged checkpoint must be one that this side can run.
    ///
    /// # Errors
    /// What does not fit.
    pub(super) fn check_state(&self, checkpoint: &Checkpoint<'_>) -> Result<(), String> {
        let (sections, constants) = split(checkpoint);
        let known = if constants.is_empty() { &self.constants } else { &constants };
        self.machine.check_sections(known, &sections).map_err(|e| e.to_string())
    }

    /// Puts the machine into a checkpoint's state for trial, before it is acknowledged: CPUID, TSC frequency,
    /// MSRs and devices that this host cannot give must be found while the primary still lives, not after the
    /// generation is won. The machine does not run, and the takeover restores it again.
    ///
    /// # Errors
    /// What this host cannot do.
    pub(super) fn try_restore(&mut self, checkpoint: &Checkpoint<'_>) -> Result<(), String> {
        let (sections, constants) = split(checkpoint);
        self.machine
            .restore(&constants, &sections, Duration::ZERO)
            .map_err(|e| format!("this host cannot resume the VM: {e}"))
    }

    /// Keeps the state of a committed checkpoint. Its pages are applied with [`apply_pages`].
    pub(super) fn keep_state(&mut self, checkpoint: &Checkpoint<'_>) {
        self.kept_at = Instant::now();
        self.state.clear();
        let mut constants = Vec::new();
        for section in checkpoint.state().sections() {
            match section.kind {
                StateKind::VcpuConstant => constants.push(section.bytes.to_vec()),
                StateKind::Check => {}
                _ => self.state.push(section),
            }
        }
        if !constants.is_empty() {
            self.constants = constants;
        }
    }

    /// Puts the machine into the kept state. The guest's time goes on from when it came.
    ///
    /// # Errors
    /// What failed.
    pub(super) fn restore(&mut self) -> Result<(), String> {
        let sections: Vec<_> = self.state.sections().collect();
        self.machine.restore(&self.constants, &sections, self.kept_at.elapsed()).map_err(|e| e.to_string())
    }

    /// The machine.
    pub(super) fn machine(&mut self) -> &mut Machine {
        &mut self.machine
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

/// What the checkpoint says of the VM, for a copy to be compared with; `None` when it says nothing.
pub(super) fn hashes(checkpoint: &Checkpoint<'_>) -> Option<Result<Hashes, String>> {
    let section = checkpoint.state().find(StateKind::Check, 0)?;
    Some(Hashes::decode(section.bytes).map_err(|e| e.to_string()))
}

/// State sections of a checkpoint, and its constants if it carries any.
type Split<'a> = (Vec<StateSection<'a>>, Vec<Vec<u8>>);

fn split<'a>(checkpoint: &Checkpoint<'a>) -> Split<'a> {
    let (constants, sections) =
        checkpoint.state().sections().partition::<Vec<_>, _>(|it| it.kind == StateKind::VcpuConstant);
    (sections, constants.into_iter().map(|it| it.bytes.to_vec()).collect())
}

/// Whether this host can run the VM.
fn check(hello: &Hello) -> Result<(), String> {
    if hello.vcpus == 0 || hello.vcpus > u32::from(outlive_machine::MAX_VCPUS) {
        return Err(format!("a VM with {} vCPUs cannot run here", hello.vcpus));
    }
    vm::check_memory(hello.memory_bytes)?;
    let vendor = process::vendor();
    if vendor != hello.vendor {
        return Err(format!(
            "the VM runs on {}, this host is {vendor}: the state of one does not load on the other",
            hello.vendor
        ));
    }
    Ok(())
}

/// Writes the pages of a committed checkpoint, or of base synchronisation, to memory.
pub(super) fn apply_pages<'a>(
    ram: &Ram,
    pages: impl Iterator<Item = (u64, PageData<'a>)>,
) -> Result<(), u64> {
    for (gfn, page) in pages {
        let written = match page {
            PageData::Zero => ram.zero_page(Gfn(gfn)),
            PageData::Raw(bytes) => ram.write_page(Gfn(gfn), bytes),
        };
        if !written {
            return Err(gfn);
        }
    }
    Ok(())
}

/// As [`apply_pages`], for a section of base pages.
pub(super) fn apply_base(ram: &Ram, pages: &Pages<'_>) -> Result<(), u64> {
    apply_pages(ram, pages.iter())
}
