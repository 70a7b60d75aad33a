//! For the model, in which no clock moves: instead, every time that a machine remembers moves into the past.

use std::time::Duration;

use super::{Standby, State};

impl Standby {
    /// Moves every time of this host's clock.
    pub(crate) fn age(&mut self, move_back: &dyn Fn(&mut Duration)) {
        match &mut self.state {
            State::Base(attached) => {
                move_back(&mut attached.heard);
                move_back(&mut attached.beat_at);
            }
            State::Committed { attached, releasing, .. } => {
                move_back(&mut attached.heard);
                move_back(&mut attached.beat_at);
                releasing.as_mut().map(move_back);
            }
            State::Settling { claim, .. } | State::Claiming { claim, .. } => claim.age(move_back),
            _ => {}
        }
        move_back(&mut self.ticked);
    }

    /// Moves the stamps of the primary's clock.
    pub(crate) fn age_stamp(&mut self, move_back: &dyn Fn(&mut Duration)) {
        if let State::Base(attached) | State::Committed { attached, .. } = &mut self.state {
            move_back(&mut attached.stamp);
        }
    }
}
