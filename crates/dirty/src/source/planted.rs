//! A planted bug: a back end that loses one page in this many. Tests run with it to show that they would
//! notice.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::layout::{Gfn, MemoryLayout, MemorySlot};
use crate::source::ring::{Fullness, Ring};
use crate::source::{Armed, HarvestError, Hint, Plan, RearmError, Sink, SlotError, Source};

/// Plants the bug, unless `every` is 0.
pub(crate) fn wrap(source: Box<dyn Source>, every: u64) -> Box<dyn Source> {
    if every == 0 { source } else { Box::new(Leaky { source, every, seen: AtomicU64::new(0) }) }
}

struct Leaky {
    source: Box<dyn Source>,
    every: u64,
    seen: AtomicU64,
}

impl Leaky {
    fn loses(&self, page: Option<Gfn>) -> bool {
        page.is_some() && (self.seen.fetch_add(1, Ordering::Relaxed) + 1) % self.every == 0
    }
}

impl Source for Leaky {
    fn populate(&self, largest: u64) {
        self.source.populate(largest);
    }

    fn arm_slot(&self, slot: &MemorySlot) -> io::Result<()> {
        self.source.arm_slot(slot)
    }

    fn owner_of(&self, ring: &Ring) -> Option<usize> {
        self.source.owner_of(ring)
    }

    fn admit(&self, ring: Option<Ring>, vcpu: Option<OwnedFd>) {
        self.source.admit(ring, vcpu);
    }

    fn park(&self, vcpu: usize, parked: bool) {
        self.source.park(vcpu, parked);
    }

    fn arm_all(&self, layout: &MemoryLayout) -> Result<(), SlotError> {
        self.source.arm_all(layout)
    }

    fn disarm_all(&self, layout: &MemoryLayout) -> Result<(), SlotError> {
        self.source.disarm_all(layout)
    }

    fn take_vcpu(
        &self,
        layout: &MemoryLayout,
        vcpu: usize,
        hint: Hint<'_>,
        sink: Sink<'_>,
    ) -> Result<usize, HarvestError> {
        self.source.take_vcpu(layout, vcpu, hint, &mut |page| self.loses(page) || sink(page))
    }

    fn take_shared(&self, layout: &MemoryLayout, sink: Sink<'_>) -> Result<usize, HarvestError> {
        self.source.take_shared(layout, &mut |page| self.loses(page) || sink(page))
    }

    fn take_armed(&self, layout: &MemoryLayout, ending: bool, sink: Sink<'_>) -> Result<usize, HarvestError> {
        self.source.take_armed(layout, ending, &mut |page| self.loses(page) || sink(page))
    }

    fn arm(&self, layout: &MemoryLayout, pages: &[Gfn], plan: Plan) -> Result<Armed, RearmError> {
        self.source.arm(layout, pages, plan)
    }

    fn pending(&self) -> usize {
        self.source.pending()
    }

    fn counts(&self) -> bool {
        self.source.counts()
    }

    fn has_room(&self, vcpu: usize) -> bool {
        self.source.has_room(vcpu)
    }

    fn fullness(&self, vcpu: usize) -> Fullness {
        self.source.fullness(vcpu)
    }

    fn top_up(&self, vcpu: usize) -> Result<bool, RearmError> {
        self.source.top_up(vcpu)
    }

    fn credits(&self) -> u64 {
        self.source.credits()
    }

    fn is_exact(&self) -> bool {
        self.source.is_exact()
    }

    fn begin(&self) {
        self.source.begin();
    }
}
