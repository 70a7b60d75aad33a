//! For the model, in which no clock moves: instead, every time that a machine remembers moves into the past.

use std::time::Duration;

use super::{Primary, State};
use crate::Link;

impl Primary {
    /// Moves every time that is remembered.
    pub(crate) fn age(&mut self, move_back: &dyn Fn(&mut Duration)) {
        match &mut self.state {
            State::Alone { dial_at: at } | State::Greeting { until: at, .. } => move_back(at),
            State::BaseSync(attached) => {
                move_back(&mut attached.beat_at);
                move_back(&mut attached.heard);
            }
            State::Guarding(attached, guard) => {
                move_back(&mut attached.beat_at);
                move_back(&mut attached.heard);
                move_back(&mut guard.contact);
            }
            State::Arbitrating { claim, .. } | State::Unrivalled(claim) => claim.age(move_back),
            State::Dialling { .. } | State::Over { .. } => {}
        }
        self.redial.age(move_back);
        self.faults.age(move_back);
        move_back(&mut self.alive_until);
    }

    /// The link whose loss is being decided about: what comes over it may still be heard.
    pub(crate) fn lost_link(&self) -> Option<Link> {
        match &self.state {
            State::Arbitrating { link, .. } => Some(*link),
            _ => None,
        }
    }

    /// Numbers links from here on: those below are still known to somebody, the others are forgotten.
    pub(crate) fn number_links_from(&mut self, next: u64) {
        self.next_link = next;
    }
}
