//! A running machine on its way to its coordinator: the same from a first start and from a takeover.

use std::sync::Arc;

use outlive_epoch::{DeviceInfo, Moment};
use outlive_machine::{MacAddr, Machine, MachineEvent};
use outlive_pair::{ExitReason, StandbyExit};

use super::{Relay, Shelf, Stops};
use crate::arbiter::{Arbiter, Watch};
use crate::cli::ActiveOptions;
use crate::console::Console;
use crate::disk::{Books, Provenance, Sidecars};
use crate::events::EventWriter;
use crate::network::Uplink;
use crate::status::Standing;

/// Who the VM is, and how far it has come.
pub(crate) struct Identity {
    /// Its identity over all hosts and generations, its name, its arbiter and its ancestors.
    pub(crate) provenance: Provenance,
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

/// A running machine and everything that its coordinator needs.
pub(crate) struct Launch {
    /// The machine, resumed.
    pub(crate) machine: Machine,
    /// What the machine reports.
    pub(crate) machine_events: Relay<MachineEvent>,
    /// The operator's orders to stop the VM, and why.
    pub(crate) stops: Stops,
    /// Who it is.
    pub(crate) identity: Identity,
    /// The arbiter that gives generations.
    pub(crate) arbiter: Option<Box<dyn Arbiter>>,
    /// Where the arbiter is, as in `--arbiter`.
    pub(crate) place: Option<String>,
    /// Who looks whether it is there.
    pub(crate) watch: Option<Arc<Watch>>,
    /// Options.
    pub(crate) options: ActiveOptions,
    /// The keeper of the sidecars of the VM's images, if there already is one.
    pub(crate) sidecars: Option<Arc<Sidecars>>,
    /// Events.
    pub(crate) events: EventWriter,
    /// The operator has ordered a stop already.
    pub(crate) stop: bool,
    /// The host's ends of its ports; closed after the machine is gone.
    pub(crate) console: Arc<Console>,
    /// Watches this host's way to the guest's clients.
    pub(crate) uplink: Option<Arc<Uplink>>,
    /// What `outlive status` tells.
    pub(crate) standing: Arc<Standing>,
    /// What is known of the images on this host.
    pub(crate) books: Books,
    /// The moment from which the VM runs on here, if each write to its memory since is known.
    pub(crate) since: Option<Moment>,
    /// It was taken over from a process that ended, perhaps because its host could not run the guest.
    pub(crate) last_host_ended: bool,
    /// Where its memory stays when it is handed over.
    pub(crate) shelf: Shelf,
}

/// How the work of a side ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// The VM ended here, or another host has it.
    Primary(ExitReason),
    /// The standby is no longer useful.
    Standby(StandbyExit),
    /// This host failed. The text is for a person.
    Failed(String),
}
