//! Turns tracking on and off: the only places where memory is taken and given back.

use std::sync::atomic::{Ordering, fence};

use super::{DisableError, EnableError, Token, Tracker};
use crate::lane::{Lane, Owner};
use crate::report;
use crate::source::{Plan, SlotError};

impl Tracker {
    /// Takes the memory of the lists and makes the first write to every page trap; the first epoch begins.
    ///
    /// The guest may run and devices may write its memory meanwhile: nothing waits for them, so this is no
    /// pause, however large the VM is. When this returns, every page counts as clean: copy the present
    /// contents of memory by other means (the base copy), while the guest runs if you like. A write that
    /// overlaps this call may be reported or not; the base copy has it.
    ///
    /// [`TrackerConfig::exact`](crate::TrackerConfig::exact) applies from the second epoch on, because making
    /// rings smaller needs stopped vCPUs: [`Tracker::enable_stopped`] does it at once.
    pub fn enable(&self) -> Result<(), EnableError> {
        self.turn_on(None)
    }

    /// As [`Tracker::enable`], for a VM whose vCPUs are all out of KVM_RUN until this returns: with
    /// [`TrackerConfig::exact`](crate::TrackerConfig::exact) the trigger applies from the first epoch on.
    /// (With a vCPU inside KVM_RUN this would wait for it.)
    pub fn enable_stopped(&self) -> Result<(), EnableError> {
        self.turn_on(self.room())
    }

    /// `room`: pages that the stopped vCPUs may dirty in the first epoch.
    fn turn_on(&self, room: Option<usize>) -> Result<(), EnableError> {
        let _token = Token::take(self).ok_or(EnableError::EpochOpen)?;
        if !self.gate.is_off() {
            return Err(EnableError::Already);
        }
        if self.fetchers.load(Ordering::Acquire) != 0 {
            return Err(EnableError::Fetching);
        }
        if self.failed.load(Ordering::Acquire) != 0 {
            return Err(EnableError::Failed);
        }
        self.populate();
        self.global.enable(self.slots());
        if let Err(error) = self.arm_everything(room) {
            self.source.disarm_all(self.slots()).err();
            self.release_memory().err();
            return Err(error);
        }
        self.all.store(false, Ordering::Relaxed);
        self.doubtful.store(false, Ordering::Relaxed);
        self.gate.open();
        Ok(())
    }

    fn populate(&self) {
        [&self.trapped, &self.seen].into_iter().for_each(|bits| {
            self.slots().slots().iter().for_each(|slot| bits.populate(slot));
        });
        let pages = self.config.max_dirty_pages;
        [&self.flat, &self.marked, &self.to_arm].into_iter().for_each(|list| list.populate(pages));
        self.lanes().iter().for_each(Lane::populate);
        if let Some(hot) = &self.hot {
            hot.populate();
        }
        self.source.populate(self.slots().largest());
    }

    /// Entries that an earlier life of this tracker left in the rings are forgotten while KVM logs nothing.
    /// From then on every entry belongs to the first epoch. If an entry were given back without its page, and
    /// the guest had written that page a moment ago, the page would stay writable and be in no list.
    fn arm_everything(&self, room: Option<usize>) -> Result<(), EnableError> {
        self.discard()?;
        let armed = self.source.arm_all(self.slots());
        armed.map_err(|SlotError { slot, source }| EnableError::Protect { slot, source })?;
        if room.is_some() {
            self.arm_nothing(room)?;
        }
        self.source.begin();
        self.run_time.begins();
        Ok(())
    }

    /// Stops tracking and frees the memory of the lists. Pages not reported yet are forgotten. The guest may
    /// run meanwhile.
    pub fn disable(&self) -> Result<(), DisableError> {
        let _token = Token::take(self).ok_or(DisableError::EpochOpen)?;
        if self.gate.is_off() {
            return Ok(());
        }
        self.gate.turn_off();
        fence(Ordering::SeqCst);
        if self.fetchers.load(Ordering::Acquire) != 0 {
            self.gate.open();
            return Err(DisableError::Fetching);
        }
        if let Err(vcpu) = self.release_memory() {
            self.gate.open();
            return Err(DisableError::Busy(vcpu));
        }
        let disarmed = self.source.disarm_all(self.slots());
        // After KVM has stopped logging, so that no entry comes later. A ring left full would keep its vCPU
        // from running forever. A failed ring cannot be helped.
        if let Err(error) = self.discard() {
            report::warn(format_args!("the dirty log was not cleared: {}", report::Chain(&error)));
        }
        disarmed.map_err(|SlotError { slot, source }| DisableError::Protect { slot, source })
    }

    /// Forgets the entries in the rings, and gives all of them back. KVM logs nothing meanwhile.
    fn discard(&self) -> Result<(), EnableError> {
        for (vcpu, lane) in self.lanes().iter().enumerate() {
            let _owner = lane.own().ok_or(EnableError::Busy(vcpu))?;
            let taken = self.source.take_vcpu(self.slots(), vcpu, &|_| (), &mut |_| true);
            taken.map_err(|error| EnableError::Leftovers(self.noted(error)))?;
        }
        self.arm_nothing(None)?;
        self.unarmed.store(0, Ordering::Relaxed);
        self.fetched.store(0, Ordering::Relaxed);
        self.found.store(0, Ordering::Relaxed);
        self.source.begin();
        Ok(())
    }

    /// Gives back every held entry, except those that make the rings as small as `room` requires.
    fn arm_nothing(&self, room: Option<usize>) -> Result<(), EnableError> {
        let plan = Plan { keep: 0, room, running: false, everything: false };
        let armed = self.source.arm(self.slots(), &[], plan);
        armed.map(drop).map_err(|error| EnableError::LeftoverReset(self.rearm_failed(error)))
    }

    /// Err(vcpu) if that vCPU's thread is using its list.
    fn release_memory(&self) -> Result<(), usize> {
        // All or nothing: a list that is cleared while tracking stays on is lost.
        let mut owners = Vec::new();
        for (vcpu, lane) in self.lanes().iter().enumerate() {
            owners.push(lane.own().ok_or(vcpu)?);
        }
        owners.iter().for_each(Owner::clear_all);
        self.global.disable();
        self.trapped.clear_all();
        self.seen.clear_all();
        [&self.flat, &self.marked, &self.to_arm].into_iter().for_each(|list| list.clear_all());
        self.trapped_len.store(0, Ordering::Relaxed);
        self.written_len.store(0, Ordering::Relaxed);
        if let Some(hot) = &self.hot {
            hot.clear_all();
        }
        Ok(())
    }
}

impl Drop for Tracker {
    fn drop(&mut self) {
        if let Err(error) = self.disable() {
            report::warn(format_args!("dirty tracking stays on: {}", report::Chain(&error)));
        }
        self.global.give_back();
    }
}
