//! What is known of this process' part in the protection of a VM.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use outlive_epoch::ArbiterSight;
use outlive_record::Recorder;

use super::answer::Status;
use super::told::{About, report};
use crate::arbiter::{Site, Watch};
use crate::audit::AuditProgress;
use crate::events::{EventWriter, Role, now_us};
use crate::heat::Heat;
use crate::link::{LinkKind, Security};
use crate::metrics::{Histogram, Report, Running, TIMES};
use crate::network::Uplink;
use crate::notify;
use crate::primary::Queue;
use crate::vm::Runs;

/// How far the checkpoints are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Progress {
    /// The newest committed one; 0 for none.
    pub(crate) checkpoint: u64,
    /// Time since its commit.
    pub(crate) since_commit: Option<Duration>,
    /// Those that are sent and not committed.
    pub(crate) in_flight: u64,
    /// Bytes sent since the last commit.
    pub(crate) bytes_in_flight: Option<u64>,
    /// How far the comparison of pages is.
    pub(crate) audit: AuditProgress,
}

/// Why a standby protects nothing at first.
pub(crate) const NO_PRIMARY: &str = "no primary has come yet";

/// Counts checkpoints for whoever asks.
type Counter = Arc<dyn Fn() -> Progress + Send + Sync>;
/// Reads everything that is measured where the VM runs.
type Meter = Arc<dyn Fn() -> Running + Send + Sync>;

/// What a host says of its way to the arbiter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum OtherSight {
    /// Nothing: it has not looked yet, or is of an older release.
    #[default]
    Unknown,
    /// It reaches the arbiter.
    Seen,
    /// It has not reached the arbiter since then.
    Lost(SystemTime),
}

impl OtherSight {
    /// Since when it is lost, if it is.
    pub(super) fn lost(self) -> Option<SystemTime> {
        match self {
            OtherSight::Lost(since) => Some(since),
            OtherSight::Unknown | OtherSight::Seen => None,
        }
    }
}

impl From<ArbiterSight> for OtherSight {
    fn from(sight: ArbiterSight) -> Self {
        match sight {
            ArbiterSight::Unknown => OtherSight::Unknown,
            ArbiterSight::Seen => OtherSight::Seen,
            ArbiterSight::Lost { for_s } => {
                let since = SystemTime::now().checked_sub(Duration::from_secs(for_s.into()));
                OtherSight::Lost(since.unwrap_or(SystemTime::UNIX_EPOCH))
            }
        }
    }
}

/// What the other host says of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct OtherHost {
    pub(super) arbiter: OtherSight,
    /// Whether it reaches the network of the guest's clients, if it knows.
    pub(super) reaches: Option<bool>,
}

/// The facts; see the module.
#[derive(Clone)]
pub(super) struct Facts {
    pub(super) vm: Option<String>,
    /// The VM's id.
    pub(super) id: Option<String>,
    pub(super) role: Role,
    pub(super) protected: bool,
    /// When `protected` became what it is.
    pub(super) since: SystemTime,
    /// Why there is no protection, while there is none.
    pub(super) why: String,
    /// What stands in its way at the moment, if that is known.
    pub(super) now: Option<String>,
    /// The other side is lost, and the arbiter has not said yet who goes on.
    pub(super) asking: bool,
    /// The generation is won, and the VM has been waiting for the fence command since then.
    pub(super) fencing: Option<SystemTime>,
    /// What the other host says of itself.
    pub(super) other: OtherHost,
    pub(super) generation: Option<u64>,
    pub(super) peer: Option<String>,
    pub(super) link: Option<LinkKind>,
    pub(super) watch: Option<Weak<Watch>>,
    pub(super) uplink: Option<Weak<Uplink>>,
    /// This host has less memory left than the VM may come to need here.
    pub(super) memory_is_short: bool,
    /// Writes the VM's past down.
    pub(super) record: Option<Weak<Recorder>>,
    /// On which host the arbiter is.
    pub(super) site: Site,
    /// Who can hand the VM over.
    pub(super) coordinator: Option<Queue>,
    counter: Option<Counter>,
    meter: Option<Meter>,
    /// Where the memory of the VM that runs here is written.
    pub(super) heat: Option<Arc<Heat>>,
    /// Where an operator's decisions are told.
    pub(super) events: Option<EventWriter>,
    /// Where the other host may be found, and with which keys.
    pub(super) others: Option<(Vec<String>, Security)>,
}

impl Facts {
    /// Why there is no protection, and what stands in its way at the moment.
    pub(super) fn reason(&self) -> String {
        self.now.as_ref().map_or_else(|| self.why.clone(), |now| format!("{}; {now}", self.why))
    }

    /// The facts in a line, for the service manager.
    fn line(&self) -> String {
        let vm = self.vm.as_deref().unwrap_or("any VM");
        let role = match self.role {
            Role::Primary => format!("{vm} runs here"),
            Role::Standby => format!("standby of {vm}"),
        };
        let peer = self.peer.as_ref().map_or_else(String::new, |peer| format!(" with {peer}"));
        if self.protected {
            format!("{role}, protected{peer}")
        } else {
            format!("{role}, UNPROTECTED: {}", self.reason())
        }
    }
}

/// Keeps the facts. Its lock is held for a few instructions only.
pub(crate) struct Standing {
    facts: Mutex<Facts>,
    /// A standby's newest checkpoint, and when it came ([`now_us`]). A primary has a counter.
    staged: AtomicU64,
    staged_us: AtomicU64,
    /// What a standby has compared. A primary has a counter.
    audit: Mutex<AuditProgress>,
    /// How long a standby took to apply checkpoints.
    apply: Histogram,
    /// When the process began.
    began: SystemTime,
    /// How often a protection has ended.
    losses: AtomicU64,
}

impl Standing {
    /// Of a process that has just begun.
    pub(crate) fn new(role: Role, vm: Option<&str>, why: &str) -> Arc<Self> {
        let facts = Facts {
            vm: vm.map(str::to_owned),
            id: None,
            role,
            protected: false,
            since: SystemTime::now(),
            why: why.to_owned(),
            now: None,
            asking: false,
            fencing: None,
            other: OtherHost::default(),
            generation: None,
            peer: None,
            link: None,
            watch: None,
            uplink: None,
            memory_is_short: false,
            record: None,
            site: Site::default(),
            coordinator: None,
            counter: None,
            meter: None,
            heat: None,
            events: None,
            others: None,
        };
        Arc::new(Self {
            facts: Mutex::new(facts),
            staged: AtomicU64::new(0),
            staged_us: AtomicU64::new(0),
            audit: Mutex::default(),
            apply: Histogram::new(TIMES),
            began: SystemTime::now(),
            losses: AtomicU64::new(0),
        })
    }

    fn change(&self, change: impl FnOnce(&mut Facts)) {
        let line = {
            let mut facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
            change(&mut facts);
            facts.line()
        };
        notify::status(&line);
    }

    /// Looks at the arbiter through this watch from now on, but does not keep it alive.
    pub(crate) fn watch(&self, watch: &Arc<Watch>) {
        self.change(|facts| facts.watch = Some(Arc::downgrade(watch)));
    }

    /// Looks at the clients' network through this from now on, but does not keep it alive.
    pub(crate) fn uplink(&self, uplink: &Arc<Uplink>) {
        self.change(|facts| facts.uplink = Some(Arc::downgrade(uplink)));
    }

    /// Whether this host has less memory left than the VM may come to need here.
    pub(crate) fn memory_is_short(&self, short: bool) {
        self.change(|facts| facts.memory_is_short = short);
    }

    /// Tells how far this record is from now on, but does not keep it alive.
    pub(crate) fn records(&self, record: Option<&Arc<Recorder>>) {
        self.change(|facts| facts.record = record.map(Arc::downgrade));
    }

    /// On which host the arbiter is.
    pub(crate) fn arbiter_at(&self, site: Site) {
        self.change(|facts| facts.site = site);
    }

    /// Tells what an operator decides as events from now on.
    pub(crate) fn tells(&self, events: &EventWriter) {
        self.change(|facts| facts.events = Some(events.clone()));
    }

    /// Where the other host may be found: it is looked for before an operator's word counts.
    pub(crate) fn others(&self, addresses: &[String], security: &Security) {
        self.change(|facts| facts.others = Some((addresses.to_vec(), security.clone())));
    }

    /// What a claim without an answer comes to, for people. An operator who must decide is not out of reach.
    pub(crate) fn no_answer(&self, what: &str, why: &str) -> String {
        let facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        let watch = facts.watch.as_ref().and_then(Weak::upgrade);
        match watch.is_some_and(|watch| watch.sight().is_a_person) {
            true => format!("{what}: {why}"),
            false => format!("the arbiter cannot be reached, {what}: {why}"),
        }
    }

    /// What protects the links of this process.
    pub(crate) fn link(&self, kind: LinkKind) {
        self.change(|facts| facts.link = Some(kind));
    }

    /// The VM runs here, in this generation. `counter` knows its checkpoints.
    pub(crate) fn runs_here(
        &self,
        vm: &str,
        id: &str,
        generation: u64,
        why: &str,
        counter: impl Fn() -> Progress + Send + Sync + 'static,
    ) {
        self.unprotected(why);
        self.change(|facts| {
            facts.role = Role::Primary;
            (facts.vm, facts.id) = (Some(vm.to_owned()), Some(id.to_owned()));
            facts.generation = Some(generation);
            facts.peer = None;
            facts.counter = Some(Arc::new(counter));
        });
    }

    /// What is measured of the VM that runs here is read by this.
    pub(crate) fn measured_by(&self, meter: impl Fn() -> Running + Send + Sync + 'static) {
        self.change(|facts| facts.meter = Some(Arc::new(meter)));
    }

    /// Where the memory of the VM that runs here is written.
    pub(crate) fn heats(&self, heat: &Arc<Heat>) {
        self.change(|facts| facts.heat = Some(heat.clone()));
    }

    /// Operators who want the VM at its standby ask this coordinator from now on.
    pub(crate) fn hands_over(&self, coordinator: &Queue) {
        self.change(|facts| facts.coordinator = Some(coordinator.clone()));
    }

    /// This host starts the VM.
    pub(crate) fn starts_here(&self, why: &str) {
        self.unprotected(why);
        self.change(|facts| facts.role = Role::Primary);
    }

    /// Another host has the VM: this process waits as its standby.
    pub(crate) fn waits_here(&self, why: &str) {
        self.no_copy(why);
        self.change(|facts| {
            facts.role = Role::Standby;
            facts.peer = None;
            (facts.counter, facts.meter, facts.heat, facts.coordinator) = (None, None, None, None);
        });
    }

    /// Whom this process protects the VM with, or whose VM it protects.
    pub(crate) fn peer(&self, address: &str) {
        self.change(|facts| facts.peer = Some(address.to_owned()));
    }

    /// Why there is no protection, and what stands in its way at the moment.
    pub(crate) fn why(&self) -> String {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).reason()
    }

    /// Whom it is or was, or nothing.
    pub(crate) fn peer_address(&self) -> String {
        let facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        facts.peer.clone().unwrap_or_default()
    }

    /// Which VM it is, as its primary says.
    pub(crate) fn vm(&self, name: &str, id: &str, generation: u64) {
        self.change(|facts| {
            (facts.vm, facts.id) = (Some(name.to_owned()), Some(id.to_owned()));
            facts.generation = Some(generation);
        });
    }

    /// The VM that this process has, as it is told to other hosts.
    pub(crate) fn runs(&self) -> Option<Runs> {
        let facts = self.facts();
        Some(Runs { name: facts.vm?, id: facts.id?, generation: facts.generation? })
    }

    /// Where the other host may be found, for people.
    pub(crate) fn other_hosts(&self) -> String {
        self.facts().others.map_or_else(String::new, |(addresses, _)| addresses.join(" or "))
    }

    /// A base is committed.
    pub(crate) fn protected(&self, generation: u64) {
        self.change(|facts| {
            if !std::mem::replace(&mut facts.protected, true) {
                facts.since = SystemTime::now();
            }
            facts.generation = Some(generation);
            (facts.now, facts.asking) = (None, false);
        });
    }

    /// There is no protection, or no longer.
    pub(crate) fn unprotected(&self, why: &str) {
        self.change(|facts| {
            if std::mem::replace(&mut facts.protected, false) {
                facts.since = SystemTime::now();
                self.losses.fetch_add(1, Ordering::Relaxed);
            }
            why.clone_into(&mut facts.why);
            (facts.now, facts.asking, facts.fencing) = (None, false, None);
            facts.other = OtherHost::default();
        });
    }

    /// A standby has thrown its copy away.
    pub(crate) fn no_copy(&self, why: &str) {
        self.staged.store(0, Ordering::Relaxed);
        self.unprotected(why);
    }

    /// What stands in the way of a protection at the moment, or that it is on its way.
    pub(crate) fn now(&self, now: &str) {
        self.change(|facts| facts.now = Some(now.to_owned()));
    }

    /// The arbiter is asked who goes on, or does not answer.
    pub(crate) fn asking(&self, now: &str) {
        self.change(|facts| (facts.now, facts.asking) = (Some(now.to_owned()), true));
    }

    /// The generation is won, and the VM has been waiting for the fence command since then. `failed`: what the last run said.
    pub(crate) fn fencing(&self, since: SystemTime, failed: Option<&str>) {
        let at = humantime::format_rfc3339_seconds(since);
        let why = failed.map_or_else(String::new, |why| format!(": {why}"));
        let now = format!("the VM has been waiting for the fence command since {at}{why}");
        self.change(|facts| (facts.now, facts.asking, facts.fencing) = (Some(now), true, Some(since)));
    }

    /// The command has succeeded.
    pub(crate) fn fenced(&self) {
        self.change(|facts| (facts.now, facts.fencing) = (None, None));
    }

    /// The other host says whether it sees the arbiter.
    pub(crate) fn other_sees(&self, sight: OtherSight) {
        self.change(|facts| facts.other.arbiter = sight);
    }

    /// The other host says whether it reaches the clients' network, if it knows.
    pub(crate) fn other_reaches(&self, reaches: Option<bool>) {
        self.change(|facts| facts.other.reaches = reaches);
    }

    /// A standby has refused a primary, and has no other one. It asks again and again.
    pub(crate) fn refused(&self, text: &str) {
        let now = format!("a primary was refused: {text}");
        if self.facts().now.as_ref() == Some(&now) {
            return;
        }
        self.change(|facts| {
            if facts.why == NO_PRIMARY {
                "no primary has been accepted yet".clone_into(&mut facts.why);
            }
            facts.now = Some(now);
        });
    }

    /// The VM goes on here, whatever the arbiter says.
    pub(crate) fn goes_on(&self, now: &str) {
        self.change(|facts| (facts.now, facts.asking) = (Some(now.to_owned()), false));
    }

    /// The arbiter has given this generation to this host.
    pub(crate) fn won(&self, generation: u64) {
        self.change(|facts| {
            facts.generation = Some(generation);
            // A standby does not run the VM before its last commit is applied.
            facts.asking = facts.role == Role::Standby;
            facts.now = None;
        });
    }

    /// A standby has the whole of a checkpoint.
    pub(crate) fn staged(&self, checkpoint: u64) {
        self.staged.store(checkpoint, Ordering::Relaxed);
        self.staged_us.store(now_us(), Ordering::Relaxed);
    }

    /// A standby has applied a checkpoint, and that took so long.
    pub(crate) fn applied(&self, took: Duration) {
        self.apply.record_time(took);
    }

    /// A standby has compared so many pages more.
    pub(crate) fn audited(&self, pages: u64, differs: bool) {
        let mut audit = self.compared();
        audit.pages += pages;
        audit.differences += u64::from(differs);
    }

    /// A standby has compared so many chunks of its disks more.
    pub(crate) fn disks_audited(&self, chunks: u64, differs: bool) {
        let mut audit = self.compared();
        audit.disk_bytes += chunks * outlive_epoch::DISK_CHUNK as u64;
        audit.differences += u64::from(differs);
    }

    fn compared(&self) -> MutexGuard<'_, AuditProgress> {
        self.audit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What all this says.
    pub(crate) fn status(&self) -> Status {
        let facts = self.facts.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let sight = facts.watch.as_ref().and_then(Weak::upgrade).map(|watch| watch.sight());
        let progress = facts.counter.as_ref().map_or_else(|| self.of_standby(), |counter| counter());
        Status::new(&facts, sight.as_ref(), progress, SystemTime::now())
    }

    /// What metrics are made of. `certificate_until`: until when this host's certificate counts.
    pub(crate) fn report(&self, certificate_until: Option<SystemTime>) -> Report {
        let facts = self.facts();
        let sight = facts.watch.as_ref().and_then(Weak::upgrade).map(|watch| watch.sight());
        let progress = facts.counter.as_ref().map_or_else(|| self.of_standby(), |counter| counter());
        let about = About {
            began: self.began,
            losses: self.losses.load(Ordering::Relaxed),
            running: facts.meter.as_ref().map(|meter| meter()),
            apply: self.apply.read(),
            certificate_until,
        };
        report(&facts, sight.as_ref(), progress, about, SystemTime::now())
    }

    /// The keys of this process' links, if it has any.
    pub(crate) fn keys(&self) -> Option<PathBuf> {
        let facts = self.facts();
        match (facts.link, facts.others) {
            (Some(LinkKind::Tls13), Some((_, Security::Keys(directory)))) => Some(directory),
            _ => None,
        }
    }

    /// The facts at this moment.
    pub(super) fn facts(&self) -> Facts {
        self.facts.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn of_standby(&self) -> Progress {
        let checkpoint = self.staged.load(Ordering::Relaxed);
        let since = now_us().saturating_sub(self.staged_us.load(Ordering::Relaxed));
        Progress {
            checkpoint,
            since_commit: (checkpoint > 0).then_some(Duration::from_micros(since)),
            audit: *self.compared(),
            ..Progress::default()
        }
    }
}
