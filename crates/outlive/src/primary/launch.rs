//! From a machine that runs to its coordinator: the same for a first start and after a takeover.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender};

use outlive_epoch::{DeviceInfo, EndReason, GfnRange, Hello, Layout, Limits, VmId};
use outlive_machine::{MacAddr, Machine};
use outlive_pair::{Primary, PrimaryConfig, PrimaryEvent, Timing};

use super::active::{Active, SLOTS};
use super::control::{Control, Facts, Inbox};
use super::disks::{self, SharedDisks};
use super::self_check::SelfCheck;
use super::stats::{Reporter, Totals};
use crate::arbiter::{self, Arbiter, ClaimWorker};
use crate::cli::ActiveOptions;
use crate::clock::Clock;
use crate::console::Console;
use crate::events::EventWriter;
use crate::{exit, process};

/// State bytes of a checkpoint at most: 32 vCPUs with CPUID and 16 KiB each, the VM, the devices.
const MAX_STATE_BYTES: u32 = 4 << 20;

/// Who the VM is, and how far it has come.
pub(crate) struct Identity {
    /// Its identity over all hosts and generations.
    pub(crate) vm: VmId,
    /// Its name.
    pub(crate) name: String,
    /// Its vCPUs.
    pub(crate) vcpus: u8,
    /// Its network card's address.
    pub(crate) mac: Option<MacAddr>,
    /// Its devices, in the order of their slots.
    pub(crate) devices: Vec<DeviceInfo>,
    /// The generation that this host has won.
    pub(crate) generation: u64,
    /// The checkpoint that it was resumed from; 0 for a new VM.
    pub(crate) checkpoint: u64,
}

/// A running machine and all that its coordinator needs.
pub(crate) struct Launch {
    /// The machine, resumed.
    pub(crate) machine: Machine,
    /// Where every other thread sends to.
    pub(crate) queue: Sender<Inbox>,
    /// The other end.
    pub(crate) inbox: Receiver<Inbox>,
    /// Who it is.
    pub(crate) identity: Identity,
    /// Where generations are won.
    pub(crate) arbiter: Option<Box<dyn Arbiter>>,
    /// Options.
    pub(crate) options: ActiveOptions,
    /// Events.
    pub(crate) events: EventWriter,
    /// The VM is to end at once.
    pub(crate) stop: Option<EndReason>,
    /// The other ends of its ports; it goes after the machine.
    pub(crate) console: Arc<Console>,
}

/// Runs the VM until it ends here. Returns the exit code.
pub(crate) fn launch(launch: Launch) -> u8 {
    let Launch { machine, queue, inbox, identity, arbiter, options, events, stop, console } = launch;
    let clock = Clock::start();
    let timing = Timing::new(options.dead_after);
    let config = PrimaryConfig {
        generation: identity.generation,
        checkpoint: identity.checkpoint,
        standbys: options.standbys.len(),
        slots: SLOTS,
        timing,
    };
    let hello = match hello(&machine, &identity, &options) {
        Ok(hello) => hello,
        Err(why) => {
            tracing::error!("{why}");
            return exit::FAILED;
        }
    };
    let facts = Facts { standbys: options.standbys.clone(), hello, heartbeat: timing.heartbeat() };
    let output = machine.net().map(|net| net.output().clone());
    let totals = Totals::new(identity.checkpoint);
    let pair = Primary::new(config, clock.now());
    let outputs = (output.clone(), SharedDisks::of(&machine));
    let control = Control::new(pair, clock, facts, outputs, queue, events.clone(), totals.clone());
    if let Some(arbiter) = arbiter {
        let told = control.clone();
        let owner = arbiter::owner("primary");
        let claims = ClaimWorker::start(arbiter, arbiter::VmId(identity.vm.0), owner, move |result| {
            told.claimed(result.generation, result.claim);
        });
        match claims {
            Ok(claims) => control.set_claims(claims),
            Err(error) => {
                tracing::error!(%error, "cannot start the arbiter's thread");
                return exit::FAILED;
            }
        }
    }
    let reporter = Reporter::start(totals.clone(), output, events.clone())
        .inspect_err(|error| tracing::warn!(%error, "no statistics"))
        .ok();
    if let Some(reason) = stop {
        control.handle(PrimaryEvent::End { reason });
    }
    let code = Active {
        vm: identity.vm,
        replicated: disks::replicated(&machine),
        self_check: SelfCheck::new(options.self_check, &machine, &control),
        machine,
        control,
        inbox,
        interval: options.interval,
        staging_pages: options.max_dirty * 2,
        totals,
        events,
        reporter,
    }
    .run();
    drop(console);
    code
}

fn hello(machine: &Machine, identity: &Identity, options: &ActiveOptions) -> Result<Hello, String> {
    let ram = machine.ram();
    let ranges = ram.slots().iter().map(|s| GfnRange { start: s.base.0, pages: s.pages }).collect();
    let layout = Layout::new(ranges).map_err(|e| format!("guest memory has an impossible layout: {e}"))?;
    let firmware_bytes = (layout.pages() * outlive_machine::PAGE_SIZE as u64).saturating_sub(ram.bytes());
    let max_pages = u32::try_from(ram.pages()).map_err(|_| "the VM has too much memory to be protected")?;
    Ok(Hello {
        vm: identity.vm,
        generation: identity.generation,
        vcpus: identity.vcpus.into(),
        memory_bytes: ram.bytes(),
        layout,
        mac: identity.mac.map(|mac| mac.0),
        limits: Limits {
            max_pages,
            max_state_bytes: MAX_STATE_BYTES,
            slots: SLOTS as u32,
            max_disk_bytes: disks::max_disk_bytes(&identity.devices),
        },
        // What is not RAM of the guest's own keeps what it boots from.
        firmware_bytes,
        devices: identity.devices.clone(),
        interval_us: options.interval.as_micros() as u64,
        dead_after_us: options.dead_after.as_micros() as u64,
        name: identity.name.clone(),
        host: process::host_name(),
        tracker: machine.tracker().kind().to_string(),
        vendor: process::vendor(),
    })
}
