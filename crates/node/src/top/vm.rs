//! What is shown of a VM: read from what the node says of it, and cleaned. What a process leaves out, or says in another
//! way, is not known, and is no reason to show nothing.

use serde_json::Value;

use super::text::{bytes, clean, count, moment, span};
use crate::figures::Role;
use crate::jobs::{Job, Kind};
use crate::view::{State, View};

/// A VM.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Vm {
    /// Its name, for the node. It is never shown.
    pub(super) name: String,
    /// Its name, for people.
    pub(super) shown: String,
    pub(super) state: State,
    pub(super) since: Option<i64>,
    pub(super) protected: bool,
    pub(super) has_standby: bool,
    pub(super) why: Option<String>,
    /// What its process says, if there is one that says something.
    pub(super) says: Option<Says>,
    pub(super) notes: Vec<String>,
    /// What is being done with it.
    pub(super) job: Option<String>,
}

/// What a VM's process says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Says {
    pub(super) role: Option<Role>,
    pub(super) since: Option<i64>,
    pub(super) peer: Option<String>,
    pub(super) loss_here: Option<Loss>,
    pub(super) loss_there: Option<Loss>,
    /// How old the last commit is.
    pub(super) committed_ms: Option<u64>,
    /// Checkpoints that are sent and not committed, and their bytes.
    pub(super) in_flight: Option<(u64, u64)>,
}

/// What the loss of a host would mean now.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Loss {
    pub(super) survived: bool,
    pub(super) what: String,
    pub(super) lost_ms: u64,
}

impl Vm {
    /// Of what a node says; `jobs` are those that are under way.
    pub(super) fn new(view: &View, jobs: &[Job]) -> Self {
        let lives = matches!(view.state, State::Running | State::Standby | State::Deciding | State::Starting);
        let status = view.status.as_ref().filter(|it| it.is_object());
        let job = jobs.iter().find(|it| it.vm.as_ref().is_none_or(|vm| *vm == view.name));
        Self {
            name: view.name.clone(),
            shown: clean(&view.name),
            state: view.state,
            since: moment(&view.since),
            protected: view.protected,
            has_standby: view.has_standby,
            why: view.why.as_ref().or(view.definition_error.as_ref()).map(|it| clean(it)),
            says: status.filter(|_| lives).map(Says::new),
            notes: notes(view, status),
            job: job.map(under_way),
        }
    }

    /// Whether a failure of this host now would be survived; `None` if the VM has nothing here that could be lost, or if
    /// nobody knows.
    pub(super) fn survives(&self) -> Option<bool> {
        self.says.as_ref()?.loss_here.as_ref().map(|it| it.survived)
    }

    /// How far the standby is behind.
    pub(super) fn behind(&self) -> Option<String> {
        let says = self.says.as_ref().filter(|_| self.protected)?;
        let commit = format!("commit {} ago", span(says.committed_ms?));
        Some(match says.in_flight {
            Some((checkpoints @ 1.., size)) if size > 0 => {
                format!("{commit}, {} in flight ({})", count(checkpoints), bytes(size))
            }
            Some((checkpoints @ 1.., _)) => format!("{commit}, {} in flight", count(checkpoints)),
            _ => commit,
        })
    }

    /// Who runs it, and who protects it; `host` is this one.
    pub(super) fn hosts(&self, host: &str) -> String {
        let says = self.says.as_ref();
        let peer = says.and_then(|it| it.peer.as_deref()).unwrap_or("another host");
        let here = format!("{host} (here)");
        match (says.and_then(|it| it.role), self.protected) {
            (Some(Role::Primary), true) => format!("{here} runs it ▸ {peer} protects it"),
            (Some(Role::Primary), false) => format!("{here} runs it, nobody protects it"),
            (Some(Role::Standby), true) => format!("{peer} runs it ▸ {here} protects it"),
            (Some(Role::Standby), false) => format!("{here} waits for a primary"),
            (None, _) if self.has_standby => "has a second host".into(),
            (None, _) => "has no second host".into(),
        }
    }

    /// Why it cannot be handed over now.
    pub(super) fn stays_because(&self) -> Option<String> {
        let why = match self.state {
            State::Running if !self.has_standby => "has no second host",
            State::Running if !self.protected => "is not protected, so nobody could take it",
            State::Running => {
                return self.job.as_ref().map(|job| format!("{}: {job}; wait for its end", self.shown));
            }
            State::Standby => "runs at the other host: hand it over there",
            _ => "does not run here",
        };
        Some(format!("{} {why}", self.shown))
    }
}

impl Says {
    fn new(status: &Value) -> Self {
        let text = |key: &str| status[key].as_str();
        let number = |key: &str| status[key].as_u64();
        let role = |role: &str| match role {
            "primary" => Some(Role::Primary),
            "standby" => Some(Role::Standby),
            _ => None,
        };
        Self {
            role: text("role").and_then(role),
            since: text("since").and_then(moment),
            peer: text("peer").map(clean),
            loss_here: Loss::new(&status["loss_of_this_host"]),
            loss_there: Loss::new(&status["loss_of_other_host"]),
            committed_ms: number("committed_ms_ago"),
            in_flight: number("in_flight").map(|it| (it, number("bytes_in_flight").unwrap_or(0))),
        }
    }
}

impl Loss {
    fn new(said: &Value) -> Option<Self> {
        Some(Self {
            survived: said["survived"].as_bool()?,
            what: clean(said["what"].as_str().unwrap_or_default()),
            lost_ms: said["lost_ms"].as_u64().unwrap_or(0),
        })
    }

    /// In a sentence.
    pub(super) fn text(&self) -> String {
        let survived = if self.survived { "survived" } else { "NOT SURVIVED" };
        let what = if self.what.is_empty() { String::new() } else { format!(", {}", self.what) };
        let lost = match self.lost_ms {
            0 => String::new(),
            ms => format!("; about {} of its work is lost, none of it answered", span(ms)),
        };
        format!("{survived}{what}{lost}")
    }
}

/// What an operator should know without asking.
fn notes(view: &View, status: Option<&Value>) -> Vec<String> {
    let mut notes = Vec::new();
    let mut note = |text: String| notes.push(clean(&text));
    if let Some(why) = view.definition_error.as_ref().filter(|_| view.state != State::Misdefined) {
        note(format!("The definition cannot be used: {why}"));
    }
    if view.definition_changed {
        note("The definition has changed, which counts from the next start.".into());
    }
    match view.failures {
        0 => {}
        1 => note("Its process has failed once.".into()),
        times => note(format!("Its process has failed {times} times in a row.")),
    }
    let Some(status) = status else {
        view.warnings.iter().for_each(|it| note(it.clone()));
        return notes;
    };
    if status["link"] == "plain" {
        note("THE LINK IS INSECURE: neither encrypted nor authenticated.".into());
    }
    if let Some(why) = status["arbiter"]["lost"].as_str() {
        note(format!("THE ARBITER IS LOST: {why}"));
    }
    if let Some(since) = status["standby_lost_arbiter_since"].as_str() {
        note(format!("The standby cannot reach the arbiter since {since}."));
    }
    if let Some(times @ 1..) = status["audit"]["differences"].as_u64() {
        note(format!("THE STANDBY'S COPY HAS DIFFERED {times} TIMES."));
    }
    view.warnings.iter().for_each(|it| note(it.clone()));
    notes
}

/// What a job does.
pub(super) fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::Start => "start",
        Kind::Stop => "stop",
        Kind::HandOver => "hand-over",
        Kind::Drain => "drain",
    }
}

fn under_way(job: &Job) -> String {
    let step = clean(&job.progress.now);
    let rest = if step.is_empty() { step } else { format!(": {step}") };
    format!("{} is under way{rest}", kind(job.kind))
}
