//! Something is broken at the host on which the VM runs, but the VM still runs: whether another host is better
//! for it.

use std::fmt;
use std::time::Duration;

use super::{Action, Guard, Note, Primary, State};
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
    /// It has come only just now, or the same was broken on its last host: two hosts must not hand it to each
    /// other for ever.
    JustTakenOver,
    /// The standby's host is cut off from the clients' network, too.
    StandbyCutOff,
    /// The standby does not say whether its host reaches the clients' network.
    StandbySilent,
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unprotected => "no standby has this VM",
            Self::JustTakenOver => "this host has taken the VM over only just now",
            Self::StandbyCutOff => "the standby's host is cut off from that network, too",
            Self::StandbySilent => "the standby does not say whether its host reaches that network",
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
    /// Why the VM was last said to stay although its network is broken.
    said: Option<Kept>,
    /// Whether the standby's host reaches the clients, if it says so.
    standby_reaches: Option<bool>,
    /// When the VM came to this host from another.
    came: Option<Duration>,
}

impl Faults {
    /// Nothing is broken. The VM came to this host then, if it came from another one.
    pub(super) fn none(came: Option<Duration>) -> Self {
        Self { disk: None, network: false, said: None, standby_reaches: None, came }
    }

    /// For the model; see `age.rs`.
    #[cfg(test)]
    pub(super) fn age(&mut self, move_back: &dyn Fn(&mut Duration)) {
        self.came.as_mut().map(move_back);
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
            State::Guarding(_, Guard { acked, base, last, .. }) if acked < base || *last => {
                return Verdict::Later;
            }
            State::Guarding(..) => {}
            _ => return Verdict::Stay(Kept::Unprotected),
        }
        let rest = match what {
            Broken::Disk => self.config.timing.handback,
            Broken::Network => self.config.timing.handback * crate::Timing::NETWORK_RESTS,
        };
        let just_came = self.faults.came.is_some_and(|came| self.now < came + rest);
        if (just_came || again) && !planted!(self.bug, HandedBackAtOnce) {
            return Verdict::Stay(Kept::JustTakenOver);
        }
        match self.faults.standby_reaches {
            _ if what == Broken::Disk || planted!(self.bug, GivenToTheCutOff) => Verdict::Go,
            Some(true) => Verdict::Go,
            Some(false) => Verdict::Stay(Kept::StandbyCutOff),
            None => Verdict::Stay(Kept::StandbySilent),
        }
    }

    /// The VM goes to its standby: this side ends without a word, as if its host had died. Nothing it has
    /// held leaves any more, and it asks the arbiter nothing, or it could win against its own standby.
    fn give_away(&mut self, what: Broken, out: &mut Vec<Action>) {
        self.state = State::Over { fenced: true };
        out.push(Action::GiveAway { what });
        out.push(Action::Note(Note::GivenAway { what }));
    }
}
