//! Something is broken at the host on which the VM runs, but the VM still runs: whether another host is better
//! for it. An operator may say so, too.

use std::fmt;
use std::time::Duration;

use super::{Action, ExitReason, Guard, Handing, Note, Primary, State};
use crate::Timing;
use crate::claim::Claim;
use crate::planted::planted;

/// What is broken at this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Broken {
    /// A disk: it fails a request of the guest, or does not answer. The guest does not know yet.
    Disk,
    /// The network of the guest's clients: this host is cut off from it.
    Network,
}

/// Why the VM stays on a host where something is broken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kept {
    /// No standby has it.
    Unprotected,
    /// It is not known yet whether a standby has it, or which host.
    Undecided,
    /// It has come only just now, or the same was broken on its last host: two hosts must not hand it to each
    /// other for ever.
    JustTakenOver,
    /// Its operator has asked for its stop, and the standby may not know: the VM would run on there.
    Stopping,
    /// It was left to a standby only just now, and that one did not come for it.
    NotTaken,
    /// The standby's host is cut off from the clients' network, too.
    StandbyCutOff,
    /// The standby does not say whether its host reaches the clients' network.
    StandbySilent,
    /// A disk that both hosts use does not answer: what it was told cannot be recalled, and would land after what the
    /// new host writes.
    SharedDiskHangs,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unprotected => "no standby has this VM",
            Self::Undecided => "it is not known yet which hosts have this VM",
            Self::JustTakenOver => {
                "it has come to this host only just now, or its last host had the same fault"
            }
            Self::Stopping => "its operator has asked for its stop",
            Self::NotTaken => "its standby has not taken it over, only just now",
            Self::StandbyCutOff => "the standby's host is cut off from that network, too",
            Self::StandbySilent => "the standby does not say whether its host reaches that network",
            Self::SharedDiskHangs => {
                "a write that hangs cannot be recalled, and could land on the shared disk after what another host writes"
            }
        })
    }
}

/// What is known to be broken.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub(super) struct Faults {
    /// A disk, whose guest waits for the decision; and whether it was the same on the last host.
    disk: Option<bool>,
    network: bool,
    /// A disk that both hosts use does not answer.
    shared: bool,
    /// Why the VM was last said to stay although its network is broken.
    said: Option<Kept>,
    /// Whether the standby's host reaches the clients, if it says so.
    standby_reaches: Option<bool>,
    /// When the VM came to this host from another.
    came: Option<Duration>,
    /// It is left to its standby, and the arbiter has not answered yet.
    giving: bool,
    /// When it was last known that a standby had not come for it.
    not_taken: Option<Duration>,
}

impl Faults {
    /// Nothing is broken. The VM came to this host then, if it came from another one.
    pub(super) fn none(came: Option<Duration>) -> Self {
        Self {
            disk: None,
            network: false,
            shared: false,
            said: None,
            standby_reaches: None,
            came,
            giving: false,
            not_taken: None,
        }
    }

    /// For the model; see `age.rs`.
    #[cfg(test)]
    pub(super) fn age(&mut self, move_back: &dyn Fn(&mut Duration)) {
        self.came.as_mut().map(move_back);
        self.not_taken.as_mut().map(move_back);
    }

    /// Another standby, or none.
    pub(super) fn forget_standby(&mut self) {
        (self.standby_reaches, self.said) = (None, None);
    }
}

enum Verdict {
    Go,
    /// It will be known soon whether a standby has the VM.
    Later,
    Stay(Kept),
}

impl Primary {
    pub(super) fn broken(&mut self, what: Broken, again: bool) {
        match what {
            Broken::Disk => self.faults.disk = Some(self.faults.disk.unwrap_or(false) || again),
            Broken::Network => self.faults.network = true,
        }
    }

    pub(super) fn mended(&mut self, what: Broken) {
        match what {
            Broken::Disk => self.faults.disk = None,
            Broken::Network => (self.faults.network, self.faults.said) = (false, None),
        }
    }

    pub(super) fn standby_reaches(&mut self, link: crate::Link, reaches: Option<bool>) {
        if self.link() == Some(link) {
            self.faults.standby_reaches = reaches;
        }
    }

    /// Decides about what is broken, if there is anything to decide. A disk's failure is decided once; a
    /// network that is broken is looked at again after every event, until it is mended.
    pub(super) fn look_at_faults(&mut self, out: &mut Vec<Action>) {
        if let Some(again) = self.faults.disk {
            match self.judge(Broken::Disk, again) {
                Verdict::Go => return self.give_away(Broken::Disk, out),
                Verdict::Later => {}
                Verdict::Stay(why) => {
                    self.faults.disk = None;
                    out.push(Action::Endure { what: Broken::Disk, why });
                }
            }
        }
        if self.faults.network {
            match self.judge(Broken::Network, false) {
                Verdict::Go => self.give_away(Broken::Network, out),
                Verdict::Stay(why) if self.faults.said.replace(why) != Some(why) => {
                    out.push(Action::Endure { what: Broken::Network, why });
                }
                Verdict::Stay(_) | Verdict::Later => {}
            }
        }
    }

    /// Whether the VM goes. It goes only to a standby that is known to hold all of it and that was heard
    /// within the lease: a VM that is given to nobody is lost.
    fn judge(&self, what: Broken, again: bool) -> Verdict {
        match &self.state {
            State::Over { .. } => return Verdict::Later,
            _ if self.end.is_some() => return Verdict::Later,
            _ if planted!(self.bug, GivenToNobody) => {}
            // Whether a standby has the base, or who wins, is known soon.
            State::Arbitrating { .. } => return Verdict::Later,
            State::Guarding(_, Guard { acked, base, last, handing, dismissed, .. })
                if acked < base || *last || handing.is_some() || dismissed.is_some() =>
            {
                return Verdict::Later;
            }
            State::Guarding(..) => {}
            _ => return Verdict::Stay(Kept::Unprotected),
        }
        if self.guest_asked && !planted!(self.bug, GivenAwayWhileEnding) {
            return Verdict::Stay(Kept::Stopping);
        }
        if self.faults.shared {
            return Verdict::Stay(Kept::SharedDiskHangs);
        }
        let rest = match what {
            Broken::Disk => self.config.timing.handback,
            Broken::Network => self.config.timing.handback * Timing::NETWORK_RESTS,
        };
        let just_came = self.faults.came.is_some_and(|came| self.now < came + rest);
        let again = again && !planted!(self.bug, SameFaultHandedBack);
        if (just_came || again) && !planted!(self.bug, HandedBackAtOnce) {
            return Verdict::Stay(Kept::JustTakenOver);
        }
        if self.faults.not_taken.is_some_and(|at| self.now < at + rest) {
            return Verdict::Stay(Kept::NotTaken);
        }
        match self.faults.standby_reaches {
            _ if what == Broken::Disk || planted!(self.bug, GivenToTheCutOff) => Verdict::Go,
            Some(true) => Verdict::Go,
            Some(false) => Verdict::Stay(Kept::StandbyCutOff),
            None => Verdict::Stay(Kept::StandbySilent),
        }
    }

    /// The VM is left to its standby: the link closes, and nothing leaves any more. Whether anybody comes for it
    /// is not known. The standby may be leaving, may have died within the lease, or its disk may be broken, too.
    /// So the VM and all that is held are kept until the arbiter has answered. It is asked late, so that this
    /// side does not win against its own standby. If it says that nobody came, the VM goes on here.
    fn give_away(&mut self, what: Broken, out: &mut Vec<Action>) {
        out.push(Action::GiveAway { what });
        out.push(Action::Note(Note::GivenAway { what }));
        self.leave_to_standby(out);
    }

    /// The operator's wish is decided at once. Unlike a fault it may come again and again: two hosts hand the VM to
    /// each other only as often as somebody says so. It goes once the standby has all of it.
    pub(super) fn hand_over(&mut self, out: &mut Vec<Action>) {
        match self.may_hand_over() {
            Ok(()) => {
                out.push(Action::HandOver);
                if let State::Guarding(_, guard) = &mut self.state {
                    guard.handing = Some(Handing::Asked);
                }
            }
            Err(why) => out.push(Action::Keep { why }),
        }
    }

    /// The standby has all of the VM, and nothing of it is left to do here.
    pub(super) fn output_left(&mut self, out: &mut Vec<Action>) {
        match &self.state {
            State::Guarding(_, Guard { handing: Some(Handing::Captured), acked, shipped, .. })
                if acked == shipped =>
            {
                self.leave_to_standby(out);
            }
            _ => {}
        }
    }

    /// Not all of the output has left, and what is still at a shared disk cannot be recalled. The guest goes on here, without
    /// the standby, which has been told that nothing more would come.
    pub(super) fn output_stays(&mut self, out: &mut Vec<Action>) {
        let State::Guarding(attached, guard) = &mut self.state else { return };
        let link = attached.link;
        if guard.handing.take_if(|handing| *handing == Handing::Captured).is_some() {
            out.push(Action::Keep { why: Kept::SharedDiskHangs });
            self.dismiss(link, Kept::SharedDiskHangs.to_string(), out);
        }
    }

    pub(super) fn shared_disks(&mut self, hang: bool) {
        self.faults.shared = hang;
    }

    /// The operator wants an end, and no hand-over any more. If the guest stands still already, its end waits until it
    /// is known who has it.
    pub(super) fn ends_instead(&mut self, out: &mut Vec<Action>) {
        if let State::Guarding(_, guard) = &mut self.state
            && guard.handing.take_if(|handing| *handing == Handing::Asked).is_some()
        {
            out.push(Action::Keep { why: Kept::Stopping });
        }
    }

    fn may_hand_over(&self) -> Result<(), Kept> {
        let ends = self.end.is_some() || self.guest_asked;
        if ends && !planted!(self.bug, GivenAwayWhileEnding) {
            return Err(Kept::Stopping);
        }
        match &self.state {
            State::Over { .. } => return Err(Kept::Stopping),
            _ if planted!(self.bug, GivenToNobody) => {}
            State::Arbitrating { .. } => return Err(Kept::Undecided),
            State::Guarding(_, Guard { acked, base, .. }) if acked < base => return Err(Kept::Undecided),
            State::Guarding(_, Guard { handing: Some(_), .. } | Guard { dismissed: Some(_), .. }) => {
                return Err(Kept::Undecided);
            }
            State::Guarding(..) if self.faults.shared => return Err(Kept::SharedDiskHangs),
            State::Guarding(..) => {}
            _ => return Err(Kept::Unprotected),
        }
        if self.faults.standby_reaches == Some(false) && !planted!(self.bug, GivenToTheCutOff) {
            return Err(Kept::StandbyCutOff);
        }
        Ok(())
    }

    fn leave_to_standby(&mut self, out: &mut Vec<Action>) {
        let State::Guarding(attached, _) = &self.state else { return };
        let link = attached.link;
        out.push(Action::Hangup { link });
        if planted!(self.bug, GivenToAStandbyThatLeaves) {
            self.state = State::Over { fenced: true };
            let reason = ExitReason::Fenced { generation: self.generation + 1, owner: String::new() };
            return out.push(Action::Exit { reason });
        }
        self.faults.giving = true;
        let claim = Claim::new(self.generation + 1, self.now + self.way(), self.timing.retry);
        self.state = State::Arbitrating { link, claim };
    }

    /// For how long the standby is let ahead at the arbiter.
    fn way(&self) -> Duration {
        self.timing.dead_after * Timing::GIVES_WAY
    }

    /// When this side may ask the arbiter after the loss of the link. Where something is broken the other host
    /// is the better one, unless that is known to be cut off as well.
    pub(super) fn may_ask_from(&self) -> Duration {
        let broken = self.faults.disk.is_some() || self.faults.network;
        let better = broken && self.faults.standby_reaches != Some(false);
        self.now + if better { self.way() } else { Duration::ZERO }
    }

    /// The VM goes on here, without a standby.
    pub(super) fn nobody_came(&mut self) {
        if std::mem::take(&mut self.faults.giving) {
            self.faults.not_taken = Some(self.now);
        }
    }
}
