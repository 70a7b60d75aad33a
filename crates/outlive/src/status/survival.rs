//! What the loss of either host would mean now.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::answer::{span, time};
use super::standing::Facts;
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

fn while_protected(facts: &Facts, arbiter_lost: bool, since_commit: Option<u64>) -> [Survival; 2] {
    // The arbiter may be on one of the two hosts.
    let if_asked = |with_arbiter: bool, what: &str, waits: &str, lost_ms| match (arbiter_lost, with_arbiter) {
        (true, _) => says(false, waits, lost_ms),
        (false, true) => says(false, &format!("the arbiter would be lost with it: {waits}"), lost_ms),
        (false, false) => says(true, what, lost_ms),
    };
    let has_arbiter = facts.site.is_here();
    let other_has_arbiter = facts.peer.as_ref().is_some_and(|peer| facts.site.is_at(peer));
    match facts.role {
        Role::Primary if !arbiter_lost && facts.other_lost_arbiter.is_some() => {
            let since = facts.other_lost_arbiter.map(time).unwrap_or_default();
            let waits =
                format!("the standby has not reached the arbiter since {since}, and would wait until it can");
            [says(false, &waits, since_commit), says(true, "the VM goes on here, unprotected", Some(0))]
        }
        Role::Primary => [
            if_asked(
                has_arbiter,
                "the standby takes over from the last checkpoint",
                "the standby would wait until the arbiter is back",
                since_commit,
            ),
            if_asked(
                other_has_arbiter,
                "the VM goes on here, unprotected",
                "the VM's output would be held here until the arbiter is back",
                Some(0),
            ),
        ],
        Role::Standby => [
            if_asked(
                has_arbiter,
                "the VM goes on at its primary, unprotected",
                "the VM's output would be held at its primary until the arbiter is back",
                Some(0),
            ),
            if_asked(
                other_has_arbiter,
                "this host takes over from the last checkpoint",
                "this host would wait until the arbiter is back",
                since_commit,
            ),
        ],
    }
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
