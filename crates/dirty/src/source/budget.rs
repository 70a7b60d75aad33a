//! How many pages each vCPU may dirty before KVM stops it.
//!
//! A ring has a power of two of entries; holding entries back leaves a vCPU any smaller number. For one vCPU
//! that is the trigger. Several vCPUs share it: each begins with a part, the rest is a pool, and a vCPU that
//! has used up its part gets another one, smaller each time, until the pool is empty. So the VM never dirties
//! more pages than the trigger. What remains of it when the pool is empty is the unused rest of the other
//! vCPUs' small parts.

/// Parts do not get smaller than this: each costs an exit of KVM and a reset.
const LEAST_GRANT: u64 = 16;

/// The trigger of an epoch, divided.
#[derive(Debug)]
pub(super) struct Budget {
    vcpus: u64,
    /// The first part of each vCPU; None if there is no exact trigger.
    part: Option<u64>,
    pool: u64,
    /// KVM cannot do it.
    off: bool,
}

impl Budget {
    pub(super) fn new(vcpus: usize) -> Budget {
        Budget { vcpus: vcpus as u64, part: None, pool: 0, off: false }
    }

    /// Plans the next epoch: this many pages for all vCPUs, whose rings have room for this many.
    pub(super) fn plan(&mut self, room: Option<usize>, most: u64) {
        let Some(room) = room.filter(|_| !self.off) else {
            self.part = None;
            return;
        };
        // A vCPU that may write nothing never comes out of KVM_RUN.
        let room = (room as u64).min(most).max(self.vcpus);
        let part = if self.vcpus == 1 { room } else { (room / (2 * self.vcpus)).max(1) };
        self.part = Some(part);
        self.pool = room - part * self.vcpus;
    }

    /// This many vCPUs share the next plan.
    pub(super) fn set_vcpus(&mut self, vcpus: usize) {
        self.vcpus = vcpus.max(1) as u64;
    }

    pub(super) fn is_on(&self) -> bool {
        self.part.is_some()
    }

    pub(super) fn give_up(&mut self) {
        self.off = true;
        self.part = None;
    }

    /// Entries that a ring must hold so that its vCPU has only its part left.
    pub(super) fn share(&self, soft_limit: u64) -> u64 {
        self.part.map_or(0, |part| soft_limit.saturating_sub(part))
    }

    /// A vCPU has used up its part and its ring holds this many entries: returns how many it may give back.
    pub(super) fn grant(&mut self, held: u64) -> u64 {
        if self.part.is_none() {
            return 0;
        }
        let grant = (self.pool / (2 * self.vcpus)).max(LEAST_GRANT).min(self.pool).min(held);
        self.pool -= grant;
        grant
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_vcpu_has_it_all() {
        let mut budget = Budget::new(1);
        assert_eq!((budget.share(192), budget.grant(100)), (0, 0));
        budget.plan(Some(41), 192);
        assert_eq!(budget.share(192), 151);
        assert_eq!(budget.grant(100), 0);
        budget.plan(Some(1000), 150);
        assert_eq!(budget.share(192), 42, "a ring is not larger than it is");
    }

    #[test]
    fn several_never_get_more_than_there_is() {
        for (vcpus, room) in [(2, 1000), (4, 300), (3, 5), (8, 8)] {
            let mut budget = Budget::new(vcpus);
            budget.plan(Some(room), 10_000);
            let part = 4096 - budget.share(4096);
            let mut given = part * vcpus as u64;
            let mut grants = 0;
            while let grant @ 1.. = budget.grant(4096) {
                given += grant;
                grants += 1;
            }
            assert_eq!(given, room as u64);
            assert!(grants < 40);
        }
    }

    #[test]
    fn what_cannot_be_done_is_given_up() {
        let mut budget = Budget::new(1);
        budget.plan(Some(10), 100);
        budget.give_up();
        budget.plan(Some(10), 100);
        assert!(!budget.is_on() && budget.share(192) == 0);
    }
}
