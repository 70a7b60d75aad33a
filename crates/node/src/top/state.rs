//! What is known of the node, what the operator looks at, and what a key means.

use std::collections::BTreeMap;

use super::ask::Heard;
use super::draw::Tone;
use super::lanes::{BEGUN, ENDED, Lanes};
use super::text::{clean, moment};
use super::verdict::{hosts, verdict};
use super::vm::{Vm, kind};
use crate::drain::Mode;
use crate::feed::Entry;
use crate::figures::{Figures, Heat};
use crate::jobs::{Job, JobState};

/// The most VMs that are shown; a node has no more.
const MOST_VMS: usize = 1000;
/// The most events that are kept.
const MOST_EVENTS: usize = 100;
/// How long a node may be silent before it is said.
const SILENCE_MS: i64 = 5_000;
/// A smaller difference of two clocks is one of two answers.
const SKEW_MS: i64 = 3_000;
/// By how much `PageUp` and `PageDown` move.
const PAGE: isize = 10;

/// The host whose node this is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Host {
    pub(super) name: String,
    pub(super) mode: Mode,
    pub(super) release: String,
    pub(super) warnings: Vec<String>,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Happened {
    pub(super) at: Option<i64>,
    pub(super) text: String,
    pub(super) bad: bool,
}

/// What lies over the picture.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Over {
    /// Nothing.
    #[default]
    Nothing,
    /// What keys and signs mean.
    Help,
    /// Whether this VM shall be handed over.
    Question { vm: String, text: String },
    /// Something that was not done.
    Refusal(String),
}

/// All of it.
#[derive(Clone, Debug)]
pub(crate) struct State {
    pub(super) host: Host,
    pub(super) vms: Vec<Vm>,
    pub(super) chosen: usize,
    pub(super) over: Over,
    /// What became of the last order.
    pub(super) note: Option<String>,
    pub(super) events: Vec<Happened>,
    /// Why the node is not heard.
    lost: Option<String>,
    lanes: BTreeMap<String, Lanes>,
    heat: BTreeMap<String, Heat>,
    /// The time of this host when the node was last heard, and now.
    heard: i64,
    pub(super) now: i64,
    /// By how much this host's clock is ahead of the node's.
    ahead: i64,
    /// The job that the operator has begun here.
    job: Option<String>,
}

/// A key, whatever it is called on a keyboard.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    Up,
    Down,
    PageUp,
    PageDown,
    First,
    Last,
    /// Something that is written.
    Letter(char),
    /// Leave what lies over the picture.
    Back,
    /// End, in any case.
    End,
    /// Paint everything anew.
    Redraw,
    Other,
}

/// What a key asks for beyond the picture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Wish {
    Nothing,
    /// Hand this VM over.
    HandOver(String),
    Redraw,
    End,
}

impl State {
    /// From the first answer of the node; `vm` is looked at first.
    pub(crate) fn new(heard: &Heard, vm: Option<&str>, now: i64) -> Self {
        let mut state = Self {
            host: Host::new(heard),
            vms: Vec::new(),
            chosen: 0,
            over: Over::Nothing,
            note: None,
            events: Vec::new(),
            lost: None,
            lanes: BTreeMap::new(),
            heat: BTreeMap::new(),
            heard: now,
            now,
            ahead: 0,
            job: None,
        };
        state.take(heard, now);
        state.chosen = state.vms.iter().position(|it| Some(&*it.name) == vm).unwrap_or(0);
        state
    }

    /// The node has answered.
    pub(crate) fn take(&mut self, heard: &Heard, now: i64) {
        (self.heard, self.now, self.lost) = (now, now, None);
        self.host = Host::new(heard);
        let running: Vec<_> = heard.jobs.iter().filter(|it| it.state == JobState::Running).cloned().collect();
        let chosen = self.chosen().map(|it| it.name.clone());
        self.vms = heard.vms.iter().take(MOST_VMS).map(|it| Vm::new(it, &running)).collect();
        let place = self.vms.iter().position(|it| Some(&it.name) == chosen.as_ref());
        self.chosen = place.unwrap_or(self.chosen).min(self.vms.len().saturating_sub(1));
        let vms = &self.vms;
        self.lanes.retain(|name, _| vms.iter().any(|it| it.name == *name));
        if let Some(figures) = &heard.figures {
            for vm in &self.vms {
                let points = figures.vms.get(&vm.name).map_or(&[][..], Vec::as_slice);
                self.lanes.entry(vm.name.clone()).or_default().take(points, figures.reset);
            }
            // A node may be of another release, or hostile.
            let is_shown =
                |name: &String, heat: &Heat| vms.iter().any(|it| it.name == *name) && heat.is_sound();
            self.heat = figures.heat.clone();
            self.heat.retain(|name, heat| is_shown(name, heat));
            self.set_clocks(figures);
        }
        self.follow(&heard.jobs);
    }

    /// The newest point was just made, by the node's clock. In the first answer all of them may be old.
    fn set_clocks(&mut self, figures: &Figures) {
        let newest = figures.vms.values().filter_map(|points| moment(&points.last()?.time)).max();
        let Some(ahead) = newest.map(|it| self.now.saturating_sub(it)) else { return };
        if !figures.reset || ahead < 0 {
            self.ahead = if ahead.abs() > SKEW_MS { ahead } else { 0 };
        }
    }

    /// The node was not heard.
    pub(crate) fn lose(&mut self, why: &str) {
        self.lost = Some(clean(why));
    }

    /// It is this time now, by the clock of this host.
    pub(crate) fn at(&mut self, now: i64) {
        self.now = now;
    }

    /// The time at the node.
    pub(super) fn there(&self) -> i64 {
        self.now.saturating_sub(self.ahead)
    }

    /// Why what is shown may be old, and of when it is.
    pub(super) fn is_old(&self) -> Option<(String, i64)> {
        let silent = self.now.saturating_sub(self.heard) > SILENCE_MS;
        let why = self.lost.clone().or_else(|| silent.then(|| "the node does not answer".to_owned()))?;
        Some((why, self.heard))
    }

    /// Something has happened.
    pub(crate) fn happened(&mut self, event: &Entry) {
        let at = moment(&event.time);
        let sign = match event.kind.as_str() {
            "process_started" => Some(BEGUN),
            "process_ended" => Some(ENDED),
            _ => None,
        };
        if let (Some(vm), Some(at), Some(sign)) = (&event.vm, at, sign)
            && let Some(lanes) = self.lanes.get_mut(vm)
        {
            lanes.mark(at, sign);
        }
        let vm = event.vm.as_ref().map_or_else(String::new, |vm| format!("{vm}: "));
        let text = clean(&format!("{vm}{}", event.text));
        let bad = ["unprotected", "failed", "not succeeded", "has ended"].iter().any(|it| text.contains(it));
        self.tell(Happened { at, text, bad });
    }

    /// Some events were missed.
    pub(crate) fn missed(&mut self) {
        let text = "the node has begun anew, or events are lost".to_owned();
        self.tell(Happened { at: None, text, bad: false });
    }

    fn tell(&mut self, event: Happened) {
        self.events.push(event);
        let surplus = self.events.len().saturating_sub(MOST_EVENTS);
        self.events.drain(..surplus);
    }

    /// An order was given, and is a job.
    pub(crate) fn begun(&mut self, job: &Job) {
        let vm = job.vm.as_deref().unwrap_or_default();
        self.note = Some(clean(&format!("{vm}: the order was given ({})", kind(job.kind))));
        self.job = Some(job.id.clone());
    }

    /// An order was not given.
    pub(crate) fn refused(&mut self, why: &str) {
        self.over = Over::Refusal(clean(why));
    }

    /// What has become of the operator's job.
    fn follow(&mut self, jobs: &[Job]) {
        let Some(job) = jobs.iter().find(|it| Some(&it.id) == self.job.as_ref()) else { return };
        let of = format!("{} of {}", kind(job.kind), job.vm.as_deref().unwrap_or("this host"));
        match job.state {
            JobState::Running => return,
            JobState::Succeeded => {
                let took = job.result.as_ref().and_then(|it| it["took_ms"].as_u64());
                let took = took.map_or_else(String::new, |ms| format!(" ({ms} ms)"));
                self.note = Some(clean(&format!("{of}: done{took}")));
            }
            JobState::Failed | JobState::Cancelled => {
                let why =
                    job.error.as_ref().map_or_else(|| "it was cancelled".to_owned(), ToString::to_string);
                self.refused(&format!("{of}: {why}"));
            }
        }
        self.job = None;
    }

    /// The VM that is looked at.
    pub(super) fn chosen(&self) -> Option<&Vm> {
        self.vms.get(self.chosen)
    }

    /// The time line of the VM that is looked at.
    pub(super) fn lanes(&self) -> Option<&Lanes> {
        self.lanes.get(&self.chosen()?.name)
    }

    /// Where the memory of the VM that is looked at is written.
    pub(super) fn heat(&self) -> Option<&Heat> {
        self.heat.get(&self.chosen()?.name)
    }

    /// The one look.
    pub(super) fn verdict(&self) -> Vec<(Tone, String)> {
        verdict(&self.host, &self.vms)
    }

    /// Which hosts have a part in it.
    pub(super) fn hosts(&self) -> String {
        hosts(&self.host, &self.vms)
    }

    /// A key was pressed.
    pub(crate) fn press(&mut self, key: Key) -> Wish {
        match key {
            Key::End => return Wish::End,
            Key::Redraw => return Wish::Redraw,
            _ => {}
        }
        match std::mem::take(&mut self.over) {
            Over::Nothing => self.press_in_picture(key),
            Over::Question { vm, .. } if matches!(key, Key::Letter('y' | 'Y')) => Wish::HandOver(vm),
            Over::Question { .. } => {
                self.note = Some("nothing was done".into());
                Wish::Nothing
            }
            Over::Help | Over::Refusal(_) => Wish::Nothing,
        }
    }

    fn press_in_picture(&mut self, key: Key) -> Wish {
        self.note = None;
        match key {
            Key::Up | Key::Letter('k') => self.choose(-1),
            Key::Down | Key::Letter('j') => self.choose(1),
            Key::PageUp => self.choose(-PAGE),
            Key::PageDown => self.choose(PAGE),
            Key::First => self.choose(isize::MIN),
            Key::Last => self.choose(isize::MAX),
            Key::Letter('?') => self.over = Over::Help,
            Key::Letter('h') => self.ask(),
            Key::Letter('q') => return Wish::End,
            _ => {}
        }
        Wish::Nothing
    }

    fn choose(&mut self, by: isize) {
        self.chosen = self.chosen.saturating_add_signed(by).min(self.vms.len().saturating_sub(1));
    }

    /// Asks before a VM is handed over, or says why it cannot be.
    fn ask(&mut self) {
        let Some(vm) = self.chosen() else { return };
        self.over = match vm.stays_because() {
            Some(why) => Over::Refusal(why),
            None => {
                let peer = vm.says.as_ref().and_then(|it| it.peer.as_deref()).unwrap_or("the other host");
                let text = format!(
                    "Hand {} over to {peer}? It moves to its standby: no reboot, no lost connection. This host becomes its \
                     standby then.",
                    vm.shown
                );
                Over::Question { vm: vm.name.clone(), text }
            }
        };
    }
}

impl Host {
    fn new(heard: &Heard) -> Self {
        let node = &heard.node;
        Self {
            name: clean(&node.host),
            mode: node.mode,
            release: clean(&node.version),
            warnings: node.warnings.iter().map(|it| clean(it)).collect(),
        }
    }
}
