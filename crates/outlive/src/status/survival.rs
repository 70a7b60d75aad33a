//! What the loss of either host would mean now.

use std::fmt;
use std::sync::Weak;

use serde::{Deserialize, Serialize};

use super::answer::{span, time};
use super::standing::{Facts, OtherSight};
use crate::events::Role;

/// What the loss of a host would mean.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Survival {
    /// Whether the VM would go on, without anybody's help.
    pub survived: bool,
    /// How, or why not.
    pub what: String,
    /// How many milliseconds of the guest's work would be lost, about. None of it was answered to anyone.
    pub lost_ms: Option<u64>,
}

impl Survival {
    /// Of this host and the other one, while an operator has not said who goes on.
    pub(super) fn waiting_for_a_person(role: Role) -> [Self; 2] {
        let says = |what: &str| Self { survived: false, what: what.to_owned(), lost_ms: None };
        let word = match role {
            Role::Primary => {
                "it is lost already: an operator must decide; `outlive go-on-alone` lets the VM go on here"
            }
            Role::Standby => {
                "it is lost already: an operator must decide; `outlive take-over` lets the VM go on here"
            }
        };
        [says("an operator must decide first which host goes on"), says(word)]
    }

    /// The same where a person decides who goes on.
    pub(super) fn by_a_person(self) -> Self {
        let what = format!("an operator must decide (--arbiter manual); then {}", self.what);
        Self { survived: false, what, ..self }
    }
}

impl fmt::Display for Survival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", if self.survived { "survived" } else { "NOT SURVIVED" }, self.what)?;
        match self.lost_ms.filter(|&ms| ms > 0) {
            Some(ms) => write!(f, " (about {} of its work is lost, none of it answered)", span(ms)),
            None => Ok(()),
        }
    }
}

/// What the loss of this host, and of the other one, would mean. Whoever goes on asks the arbiter first.
pub(super) fn survivals(facts: &Facts, arbiter_lost: bool, since_commit: Option<u64>) -> [Survival; 2] {
    if let Some(since) = facts.fencing.map(time) {
        let waits = format!(
            "it is lost already: this host has won the VM, which has been waiting for the fence command since {since}"
        );
        return [
            says(false, "this may be the only host that has the VM, and it does not run yet", None),
            says(false, &waits, since_commit),
        ];
    }
    match facts.protected {
        true => while_protected(facts, arbiter_lost, since_commit),
        false => while_unprotected(facts, arbiter_lost, since_commit),
    }
}

fn says(survived: bool, what: &str, lost_ms: Option<u64>) -> Survival {
    Survival { survived, what: what.to_owned(), lost_ms }
}

/// What hinders a host that must ask the arbiter before the VM goes on there.
enum Hindrance {
    /// It has not reached the arbiter, since then if that is known.
    NoArbiter(Option<String>),
    /// The arbiter is on the host that is lost.
    ArbiterWithIt,
    /// It is cut off from the guest's clients.
    NoClients,
    /// It has less memory left than the guest may come to need.
    NoMemory,
}

/// What the loss of this host means is up to the other one, and the other way round: only the host that is left must
/// reach the arbiter, and the guest's clients.
fn while_protected(facts: &Facts, arbiter_lost: bool, since_commit: Option<u64>) -> [Survival; 2] {
    let other_lost = match facts.other.arbiter {
        OtherSight::Seen => None,
        OtherSight::Lost(since) => Some(Some(time(since))),
        // An older release does not say it, and what this host sees is the best guess.
        OtherSight::Unknown => arbiter_lost.then_some(None),
    };
    let own_reach = facts.uplink.as_ref().and_then(Weak::upgrade).and_then(|uplink| uplink.reaches());
    let peer_has_it = facts.peer.as_ref().is_some_and(|peer| facts.site.is_at(peer));
    let hinders = |lost: Option<Option<String>>, with_it: bool, reaches: Option<bool>| match lost {
        Some(since) => Some(Hindrance::NoArbiter(since)),
        None if with_it => Some(Hindrance::ArbiterWithIt),
        None => (reaches == Some(false)).then_some(Hindrance::NoClients),
    };
    let (of_other, of_this) = (
        hinders(other_lost, facts.site.is_here(), facts.other.reaches),
        hinders(arbiter_lost.then_some(None), peer_has_it, own_reach),
    );
    match facts.role {
        Role::Primary => [taken_over("the standby", of_other, since_commit), goes_on("here", of_this)],
        Role::Standby => {
            let of_this = of_this.or(facts.memory_is_short.then_some(Hindrance::NoMemory));
            [goes_on("at its primary", of_other), taken_over("this host", of_this, since_commit)]
        }
    }
}

/// What becomes of the VM when its primary is lost.
fn taken_over(who: &str, hindrance: Option<Hindrance>, lost_ms: Option<u64>) -> Survival {
    let waits = format!("{who} would wait until the arbiter is back");
    let what = match &hindrance {
        None => format!("{who} takes over from the last checkpoint"),
        Some(Hindrance::NoArbiter(None)) => waits,
        Some(Hindrance::NoArbiter(Some(since))) => {
            format!("{who} has not reached the arbiter since {since}, and would wait until it can")
        }
        Some(Hindrance::ArbiterWithIt) => format!("the arbiter would be lost with it: {waits}"),
        Some(Hindrance::NoClients) => {
            format!("{who} takes over, but is cut off from the clients' network: nobody would reach the VM")
        }
        Some(Hindrance::NoMemory) => format!(
            "{who} takes over, but has less memory left than the guest may come to use: it could be killed for that"
        ),
    };
    says(hindrance.is_none(), &what, lost_ms)
}

/// What becomes of the VM when its standby is lost.
fn goes_on(place: &str, hindrance: Option<Hindrance>) -> Survival {
    let held = format!("the VM's output would be held {place} until the arbiter is back");
    let what = match &hindrance {
        None => format!("the VM goes on {place}, unprotected"),
        Some(Hindrance::NoArbiter(None)) => held,
        Some(Hindrance::NoArbiter(Some(since))) => {
            format!("the arbiter has not been reached there since {since}: {held}")
        }
        Some(Hindrance::ArbiterWithIt) => format!("the arbiter would be lost with it: {held}"),
        Some(Hindrance::NoClients) => {
            format!(
                "the VM goes on {place}, which is cut off from the clients' network: nobody would reach it"
            )
        }
        Some(Hindrance::NoMemory) => format!("the VM goes on {place}, which is short of memory"),
    };
    says(hindrance.is_none(), &what, Some(0))
}

fn while_unprotected(facts: &Facts, arbiter_lost: bool, since_commit: Option<u64>) -> [Survival; 2] {
    let if_asked = |what: &str, waits: &str, lost_ms| {
        says(!arbiter_lost, if arbiter_lost { waits } else { what }, lost_ms)
    };
    match (facts.role, facts.asking) {
        (Role::Primary, true) => [
            says(false, "not known before the arbiter has answered", None),
            if_asked(
                "it is lost already: the VM goes on here once the arbiter has answered",
                "it is lost already: the VM's output is held here until the arbiter is back",
                Some(0),
            ),
        ],
        (Role::Primary, false) => [
            says(false, "all that is in the VM's memory would be lost", None),
            says(true, "the VM runs here and needs no other host", Some(0)),
        ],
        (Role::Standby, true) => [
            says(false, "this may be the only host that has the VM", None),
            if_asked(
                "it is lost already: this host takes over if the arbiter lets it",
                "it is lost already: this host waits until the arbiter is back",
                since_commit,
            ),
        ],
        (Role::Standby, false) => [
            says(true, "no VM depends on this host", Some(0)),
            says(false, "this host has no whole copy of a VM", None),
        ],
    }
}
