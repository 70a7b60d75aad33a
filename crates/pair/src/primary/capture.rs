//! A checkpoint, from its capture to its commit.

use std::time::Duration;

use outlive_epoch::CheckpointFlags;

use super::{Action, Attached, Guard, Handing, Note, Primary, State};
use crate::planted::planted;
use crate::{Link, LossReason, Ticket};

impl Primary {
    /// A checkpoint was captured. This is called inside the pause, so its answer holds for every frame after
    /// it.
    pub(super) fn captured(&mut self, wanted: Link, base: bool, stays: bool, out: &mut Vec<Action>) {
        let any = planted!(self.bug, CaptureForAnyLink);
        let (number, end, generation) = (self.checkpoint + 1, self.end, self.generation);
        let (link, flags) = match &mut self.state {
            State::BaseSync(attached) if (attached.link == wanted && base) || any => {
                // The standby can only take over after it has heard of this capture: the lease starts now.
                let guard = Guard {
                    base: number,
                    shipped: number,
                    acked: number - 1,
                    contact: self.now,
                    last: end.is_some(),
                    handing: None,
                    dismissed: None,
                };
                let attached =
                    Attached { link: attached.link, beat_at: attached.beat_at, heard: attached.heard };
                let link = attached.link;
                self.state = State::Guarding(attached, guard);
                if !planted!(self.bug, NoHoldAtBaseFinal) {
                    out.push(Action::HoldOutput { link, epoch: number + 1 });
                }
                (link, CheckpointFlags { base_final: true, end, hand_over: false })
            }
            State::Guarding(_, guard) if guard.dismissed.is_some() => {
                out.push(Action::DropCapture);
                return;
            }
            State::Guarding(attached, guard)
                if guard.shipped - guard.acked >= self.config.slots
                    || guard.last
                    || attached.link != wanted
                    || base =>
            {
                // The pages of this epoch have been harvested and cannot be harvested again, so this standby
                // can never receive them.
                let (link, why) = (attached.link, "a checkpoint was captured that was not due");
                self.link_lost(link, LossReason::Local(why.into()), out);
                out.push(Action::DropCapture);
                return;
            }
            State::Guarding(attached, guard) => {
                guard.shipped = number;
                guard.last = end.is_some();
                let hand_over = stays && !guard.last && guard.handing == Some(Handing::Asked);
                if hand_over {
                    guard.handing = Some(Handing::Captured);
                    self.still = Some(number);
                }
                out.push(Action::BeginEpoch { link: attached.link, epoch: number + 1 });
                (attached.link, CheckpointFlags { base_final: false, end, hand_over })
            }
            _ => {
                out.push(Action::DropCapture);
                return;
            }
        };
        self.checkpoint = number;
        out.push(Action::Ship(Ticket { link, generation, number, flags }));
        if planted!(self.bug, ReleaseBeforeAck) {
            out.push(Action::Release { through: number });
        }
    }

    /// The base was captured and output is not held. Nobody was given its ticket, so no standby has the base
    /// and there is nothing to decide: the VM continues, unprotected.
    pub(super) fn hold_failed(&mut self, link: Link, why: String, out: &mut Vec<Action>) {
        match &self.state {
            State::Guarding(attached, guard)
                if attached.link == link && guard.acked < guard.base && guard.shipped == guard.base => {}
            _ => return,
        }
        self.no_base(link, LossReason::Local(why), out);
    }

    pub(super) fn ack(
        &mut self,
        link: Link,
        generation: u64,
        checkpoint: u64,
        stamp: Duration,
        out: &mut Vec<Action>,
    ) {
        if planted!(self.bug, StaleAckReleases) {
            out.push(Action::Release { through: checkpoint });
        }
        if !self.contact(link, stamp, out) {
            return;
        }
        let State::Guarding(_, guard) = &mut self.state else {
            let why = format!("it acknowledged checkpoint {checkpoint} before there was one");
            return self.link_lost(link, LossReason::Protocol(why), out);
        };
        if generation != self.generation || checkpoint > guard.shipped || checkpoint <= guard.acked {
            let why = format!(
                "it acknowledged checkpoint {checkpoint} of generation {generation}; {}..={} of generation {} are due",
                guard.acked + 1,
                guard.shipped,
                self.generation
            );
            return self.link_lost(link, LossReason::Protocol(why), out);
        }
        let first = guard.acked < guard.base;
        guard.acked = checkpoint;
        out.push(Action::Release { through: checkpoint });
        if guard.handing == Some(Handing::Captured) && guard.acked == guard.shipped {
            out.push(Action::LetGo);
        }
        if first && guard.dismissed.is_none() {
            out.push(Action::Note(Note::Protected { generation, checkpoint }));
        }
    }
}
