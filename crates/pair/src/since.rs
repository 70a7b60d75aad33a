//! Whether a base may consist of what was written since the hand-over alone.
//!
//! A VM that is handed over stands still at its last checkpoint. The host that it leaves keeps its memory, which is
//! exactly what the VM runs on from at its new host, and comes back as the standby. If the new host knows each page
//! that was written since, nothing else has to be sent. A page that is left out by mistake is lost in silence, so
//! both sides must be sure, each of its own part:
//!
//! * the old host, that no byte of what it keeps has changed since that checkpoint ([`KeptMemory`]);
//! * the new host, that it has known of every write from before the first one on, without a gap ([`Since`]);
//!
//! and both name the moment by the generation and the number of the checkpoint, which no other state of the VM has.

use outlive_epoch::{Moment, VmId};

use crate::planted::{Planted, planted};
use crate::{Introduction, Link};

/// The memory that a host has kept of a VM which it has handed over. Whoever has it takes it out to use it, and never
/// puts it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptMemory {
    /// The VM.
    pub vm: VmId,
    /// What its memory is.
    pub moment: Moment,
}

impl KeptMemory {
    /// Whether a primary that introduces itself like this, and says since when it knows what was written, needs to
    /// send only that.
    pub fn serves(&self, hello: &Introduction, since: Option<Moment>) -> bool {
        self.serves_with(hello, since, Planted::default())
    }

    pub(crate) fn serves_with(&self, hello: &Introduction, since: Option<Moment>, bug: Planted) -> bool {
        let same = since == Some(self.moment) || planted!(bug, KeepsAnotherMoment) && since.is_some();
        // The host that has won the very next generation: nobody else has run the VM since.
        let next = self.moment.generation.checked_add(1) == Some(hello.generation);
        hello.vm == self.vm && same && (next || planted!(bug, KeepsAnotherMoment))
    }
}

/// What the base of a new standby consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// All memory: the standby's is zero.
    Everything,
    /// What was written since the moment that both sides know.
    Rest,
}

/// The standby relies on an offer that does not hold any more: the connection is useless.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("what was written since the hand-over is not known any more")]
pub struct Forgotten;

/// Since when a primary knows each page that was written, and to whom it has said so.
#[derive(Debug, Default)]
pub struct Since {
    moment: Option<Moment>,
    offered: Option<Link>,
    bug: Planted,
}

impl Since {
    /// The VM runs on from this moment, and each write after it is known.
    pub fn began(moment: Option<Moment>) -> Self {
        Self { moment, offered: None, bug: Planted::default() }
    }

    #[cfg(test)]
    pub(crate) fn with(self, bug: Planted) -> Self {
        Self { bug, ..self }
    }

    /// What to say in the introduction over this connection.
    pub fn offer(&mut self, link: Link) -> Option<Moment> {
        self.offered = self.moment.map(|_| link);
        self.moment
    }

    /// From now on writes may be missed.
    pub fn is_lost(&mut self) {
        if !planted!(self.bug, OffersWhatIsLost) {
            self.moment = None;
        }
    }

    /// The standby has accepted over this connection, and says whether it `holds` what was offered there. A base
    /// begins, and with it what is known counts for this base alone.
    ///
    /// # Errors
    /// [`Forgotten`].
    pub fn answer(&mut self, link: Link, holds: bool) -> Result<Needs, Forgotten> {
        let offered = self.offered.take() == Some(link);
        let known = self.moment.is_some();
        self.is_lost();
        match (holds, offered && known) {
            (false, _) => Ok(Needs::Everything),
            (true, true) => Ok(Needs::Rest),
            (true, false) => Err(Forgotten),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MOMENT: Moment = Moment { generation: 4, checkpoint: 90 };
    const VM: VmId = VmId([1; 16]);

    fn hello(vm: VmId, generation: u64) -> Introduction {
        let dead_after = Duration::from_secs(1);
        Introduction { vm, generation, slots: 1, dead_after, shared_storage: false }
    }

    #[test]
    fn only_the_very_next_run_of_the_same_vm_from_the_same_moment_is_served() {
        let kept = KeptMemory { vm: VM, moment: MOMENT };
        assert!(kept.serves(&hello(VM, 5), Some(MOMENT)));
        assert!(!kept.serves(&hello(VM, 5), None), "whoever does not know what was written");
        assert!(!kept.serves(&hello(VmId([2; 16]), 5), Some(MOMENT)), "another VM");
        assert!(!kept.serves(&hello(VM, 6), Some(MOMENT)), "another host has run it meanwhile");
        assert!(!kept.serves(&hello(VM, 4), Some(MOMENT)));
        let later = Moment { checkpoint: 91, ..MOMENT };
        assert!(!kept.serves(&hello(VM, 5), Some(later)), "it was taken over from another checkpoint");
        let other = Moment { generation: 3, ..MOMENT };
        assert!(!kept.serves(&hello(VM, 5), Some(other)), "numbers of another generation");
    }

    #[test]
    fn an_offer_counts_once_and_on_its_own_connection() {
        let mut since = Since::began(Some(MOMENT));
        assert_eq!(since.offer(Link(1)), Some(MOMENT));
        // The first connection was lost before its answer.
        assert_eq!(since.offer(Link(2)), Some(MOMENT));
        assert_eq!(since.answer(Link(2), true), Ok(Needs::Rest));
        // That base was not completed.
        assert_eq!(since.offer(Link(3)), None);
        assert_eq!(since.answer(Link(3), true), Err(Forgotten));
        assert_eq!(since.answer(Link(3), false), Ok(Needs::Everything));

        let mut since = Since::began(Some(MOMENT));
        since.offer(Link(1));
        assert_eq!(since.answer(Link(2), true), Err(Forgotten), "it was not said there");
    }

    #[test]
    fn who_does_not_hold_it_gets_everything_and_nobody_is_offered_it_again() {
        let mut since = Since::began(Some(MOMENT));
        since.offer(Link(1));
        assert_eq!(since.answer(Link(1), false), Ok(Needs::Everything));
        assert_eq!(since.offer(Link(2)), None);
    }

    #[test]
    fn what_was_lost_after_the_offer_is_not_relied_on() {
        let mut since = Since::began(Some(MOMENT));
        since.offer(Link(1));
        since.is_lost();
        assert_eq!(since.answer(Link(1), true), Err(Forgotten));
        assert_eq!(Since::began(None).offer(Link(1)), None);
    }
}
