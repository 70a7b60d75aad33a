//! What the schedules have reached.

/// Counts; a simulator that never reaches a takeover proves nothing.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Stats {
    pub(super) events: u64,
    pub(super) takeovers: u64,
    pub(super) alone: u64,
    pub(super) fenced: u64,
    /// Questions of standbys, and those that came earlier because a primary came back.
    pub(super) standby_asked: u64,
    pub(super) hurried: u64,
    pub(super) standby_lost: u64,
    pub(super) protected: u64,
    pub(super) released: u64,
    pub(super) late_frames: u64,
    pub(super) unreachable: u64,
    pub(super) ended: u64,
    pub(super) followed: u64,
    pub(super) left: u64,
    pub(super) unsettled: u64,
    /// Copies that were found not to be the VM.
    pub(super) differed: u64,
    pub(super) vm_lost: u64,
    /// VMs that were started again from an image.
    pub(super) restarted: u64,
    /// The longest time in µs that output was held, less what announced slowness explains.
    pub(super) longest_held: u64,
    /// Actions that failed.
    pub(super) failed: u64,
    pub(super) tried: u64,
    pub(super) slow_applies: u64,
    pub(super) links_lost: u64,
    pub(super) wedged: u64,
    pub(super) long_works: u64,
    pub(super) long_pauses: u64,
    /// Standbys that left and handed their right over.
    pub(super) handed_over: u64,
    /// VMs that were left to their standby because something was broken, and that stayed nevertheless.
    pub(super) given_away: u64,
    pub(super) endured: u64,
    pub(super) handed: u64,
    pub(super) kept: u64,
    /// Bases that consisted of what was written since the hand-over.
    pub(super) rests: u64,
    /// Frames of the tail: given to the guest, and sent again, at takeovers.
    pub(super) given: u64,
    pub(super) repeated: u64,
    /// Copies of images that were started, or refused, and VMs that began with one.
    pub(super) copies_started: u64,
    pub(super) copies_refused: u64,
    pub(super) forks: u64,
    /// Primaries that learned from the arbiter that another process has the VM.
    pub(super) superseded: u64,
    /// By kind.
    pub(super) faults: [u64; 32],
}

impl Stats {
    pub(super) fn add(&mut self, other: &Self) {
        self.events += other.events;
        self.takeovers += other.takeovers;
        self.alone += other.alone;
        self.fenced += other.fenced;
        self.standby_asked += other.standby_asked;
        self.hurried += other.hurried;
        self.standby_lost += other.standby_lost;
        self.protected += other.protected;
        self.released += other.released;
        self.late_frames += other.late_frames;
        self.given += other.given;
        self.repeated += other.repeated;
        self.unreachable += other.unreachable;
        self.ended += other.ended;
        self.followed += other.followed;
        self.left += other.left;
        self.unsettled += other.unsettled;
        self.differed += other.differed;
        self.vm_lost += other.vm_lost;
        self.restarted += other.restarted;
        self.longest_held = self.longest_held.max(other.longest_held);
        self.failed += other.failed;
        self.tried += other.tried;
        self.slow_applies += other.slow_applies;
        self.links_lost += other.links_lost;
        self.wedged += other.wedged;
        self.long_works += other.long_works;
        self.long_pauses += other.long_pauses;
        self.handed_over += other.handed_over;
        self.given_away += other.given_away;
        self.endured += other.endured;
        self.handed += other.handed;
        self.kept += other.kept;
        self.rests += other.rests;
        self.copies_started += other.copies_started;
        self.copies_refused += other.copies_refused;
        self.forks += other.forks;
        self.superseded += other.superseded;
        self.faults.iter_mut().zip(&other.faults).for_each(|(sum, one)| *sum += one);
    }
}
