//! The standby's part of the audit: pages of the copy are compared with the VM's as of the checkpoint that was just
//! applied.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use outlive_dirty::Gfn;
use outlive_epoch::{AuditSpan, Audited};
use outlive_machine::{Ram, TouchedPages, page_sum};

use crate::audit::{AuditShare, Budget, Page, thread_time};

/// Time between two words to the primary.
const TELL: Duration = Duration::from_millis(100);
/// How many differing copies are made anew within this time.
const MOST: usize = 2;
const WITHIN: Duration = Duration::from_secs(3600);

/// The copy is not the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "at checkpoint {checkpoint} the copy differs from the VM in one of the pages from GFN {first:#x} on (mask {mask:#x}): \
     test the memory of both hosts"
)]
pub(super) struct Difference {
    pub(super) checkpoint: u64,
    /// The first of 64 pages.
    pub(super) first: u64,
    /// Which of them were compared.
    pub(super) mask: u64,
}

/// Compares; see the module.
pub(super) struct Comparing {
    ram: Arc<Ram>,
    touched: TouchedPages,
    page: Box<Page>,
    budget: Arc<Budget>,
    so_far: Audited,
    /// When the primary was told, and of how many pages.
    told: (Instant, u64),
}

impl Comparing {
    /// Of a copy, with so much of a core.
    pub(super) fn new(ram: Arc<Ram>, share: AuditShare) -> Self {
        let (touched, page, budget) = (TouchedPages::open(), Page::new(), Budget::start(share));
        Self { ram, touched, page, budget, so_far: Audited::default(), told: (Instant::now(), 0) }
    }

    /// What all comparisons of the copy, those of its disks too, take together.
    pub(super) fn budget(&self) -> &Arc<Budget> {
        &self.budget
    }

    /// Compares pages with these sums of the checkpoint that the copy is at. Nobody writes to the copy meanwhile.
    /// A primary may want more than this host gives; the rest is left out.
    ///
    /// # Errors
    /// They differ.
    pub(super) fn compare(&mut self, checkpoint: u64, spans: &[AuditSpan]) -> Result<(), Difference> {
        if spans.is_empty() || self.budget.is_used_up() {
            return Ok(());
        }
        let began = thread_time();
        let differs = spans.iter().find(|span| self.sum(span) != span.sum);
        let spent = thread_time().saturating_sub(began);
        self.budget.spend(spent);
        self.so_far.checkpoint = checkpoint;
        self.so_far.pages += spans.iter().map(|span| u64::from(span.mask.count_ones())).sum::<u64>();
        self.so_far.spent_ns += spent.as_nanos() as u64;
        let Some(&AuditSpan { first, mask, .. }) = differs else { return Ok(()) };
        self.so_far.differs = Some((first, mask));
        Err(Difference { checkpoint, first, mask })
    }

    fn sum(&mut self, span: &AuditSpan) -> u64 {
        let touched = self.touched.of(&self.ram, Gfn(span.first));
        // Pages that were never touched are zero.
        let there = AuditSpan { mask: span.mask & touched, ..*span };
        let sums = there.gfns().map(|gfn| {
            let read = self.ram.read_page(Gfn(gfn), &mut self.page.0);
            if read { page_sum(Gfn(gfn), &self.page.0) } else { 0 }
        });
        sums.fold(0, u64::wrapping_add)
    }

    /// What to tell the primary, and how many pages it has not heard of, if it is time or cannot wait.
    pub(super) fn due(&mut self, now: bool) -> Option<(Audited, u64)> {
        let (at, pages) = self.told;
        let more = self.so_far.pages - pages;
        if !now && (more == 0 || at.elapsed() < TELL) {
            return None;
        }
        self.told = (Instant::now(), self.so_far.pages);
        Some((self.so_far, more))
    }
}

/// Copies on this host differ from the VM again and again.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "copies of the VM on this host have differed from it {times} times within an hour: test the memory of both hosts; \
     this host takes no copy for another {} min, or until it is started anew",
    .wait.as_secs().div_ceil(60)
)]
pub(super) struct TooOften {
    times: usize,
    wait: Duration,
}

/// When copies on this host were found to differ. A host whose memory is broken would have its copy made anew for
/// ever, and each time nothing would protect the VM.
#[derive(Default)]
pub(super) struct Differences(Mutex<VecDeque<Instant>>);

impl Differences {
    /// One more, now.
    pub(super) fn note(&self) {
        self.note_at(Instant::now());
    }

    /// Whether this host may have another copy.
    ///
    /// # Errors
    /// [`TooOften`].
    pub(super) fn check(&self) -> Result<(), TooOften> {
        self.check_at(Instant::now())
    }

    fn note_at(&self, now: Instant) {
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        times.push_back(now);
        // Only the last ones decide.
        if times.len() > MOST + 1 {
            times.pop_front();
        }
    }

    fn check_at(&self, now: Instant) -> Result<(), TooOften> {
        let times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let recent = times.iter().filter(|at| now.saturating_duration_since(**at) < WITHIN);
        let (count, first) = (recent.clone().count(), recent.min());
        match first {
            Some(first) if count > MOST => {
                let wait = WITHIN.saturating_sub(now.saturating_duration_since(*first));
                Err(TooOften { times: count, wait })
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: [u8; 4096] = [7; 4096];

    fn copy() -> (Arc<Ram>, Comparing) {
        let ram = Arc::new(Ram::new(64 << 20, 64).unwrap());
        for gfn in [64, 70, 127] {
            assert!(ram.write_page(Gfn(gfn), &PAGE));
        }
        (ram.clone(), Comparing::new(ram, "100".parse().unwrap()))
    }

    fn span(gfns: &[u64]) -> AuditSpan {
        let sum = gfns.iter().fold(0u64, |sum, gfn| sum.wrapping_add(page_sum(Gfn(*gfn), &PAGE)));
        AuditSpan { first: 64, mask: u64::MAX, sum }
    }

    #[test]
    fn a_page_that_differs_is_found_and_told_of_at_once() {
        let (ram, mut comparing) = copy();
        assert_eq!(comparing.compare(5, &[span(&[64, 70, 127])]), Ok(()));
        assert_eq!(comparing.compare(6, &[]), Ok(()));
        assert_eq!((comparing.so_far.checkpoint, comparing.so_far.pages), (5, 64));
        assert_eq!(comparing.due(false), None, "not yet");
        // In a page that was there, and in one that nobody has touched.
        for (gfn, at) in [(70, 4095), (100, 0)] {
            let (ram, mut comparing) = copy();
            assert!(ram.write_part(Gfn(gfn), at, &[1]));
            let difference = Difference { checkpoint: 9, first: 64, mask: u64::MAX };
            assert_eq!(comparing.compare(9, &[span(&[64, 70, 127])]), Err(difference));
            let (audited, more) = comparing.due(true).unwrap();
            assert_eq!((audited.differs, more), (Some((64, u64::MAX)), 64));
        }
        assert_eq!(comparing.compare(7, &[AuditSpan { mask: 1 << 6, ..span(&[70]) }]), Ok(()));
        assert!(ram.zero_page(Gfn(70)));
        assert!(comparing.compare(8, &[AuditSpan { mask: 1 << 6, ..span(&[70]) }]).is_err());
    }

    #[test]
    fn every_page_is_compared_once_and_what_it_costs_is_printed() {
        let ram = Arc::new(Ram::new(64 << 20, 64).unwrap());
        let gfns: Vec<Gfn> = ram.gfns().collect();
        gfns.iter().for_each(|gfn| assert!(ram.write_page(*gfn, &PAGE)));
        let sum =
            |first: u64| (first..first + 64).map(|gfn| page_sum(Gfn(gfn), &PAGE)).fold(0, u64::wrapping_add);
        let spans = (0..gfns.len() as u64).step_by(64);
        let spans: Vec<_> = spans.map(|first| AuditSpan { first, mask: u64::MAX, sum: sum(first) }).collect();
        let mut comparing = Comparing::new(ram, "100".parse().unwrap());
        assert_eq!(comparing.compare(1, &spans), Ok(()));
        let each = comparing.so_far.spent_ns / comparing.so_far.pages;
        println!("{} pages, {each} ns each", comparing.so_far.pages);
        assert_eq!(comparing.so_far.pages, gfns.len() as u64);
    }

    #[test]
    fn a_host_compares_no_more_than_its_share() {
        let (_, mut comparing) = copy();
        comparing.budget = Budget::start("0.01".parse().unwrap());
        comparing.budget.spend(Duration::from_secs(1));
        let wrong = AuditSpan { first: 0, mask: 1, sum: 1 };
        assert_eq!(comparing.compare(1, &[wrong]), Ok(()), "it was not looked at");
        assert_eq!(comparing.so_far.pages, 0);
        comparing.budget = Budget::start(AuditShare::OFF);
        assert_eq!(comparing.compare(1, &[wrong]), Ok(()));
    }

    #[test]
    fn a_host_that_differs_again_and_again_rests_until_the_first_time_is_an_hour_ago() {
        let differences = Differences::default();
        let began = Instant::now();
        let at = |minutes: u64| began + Duration::from_secs(60 * minutes);
        for minutes in [0, 10] {
            assert_eq!(differences.check_at(at(minutes)), Ok(()));
            differences.note_at(at(minutes));
        }
        assert_eq!(differences.check_at(at(11)), Ok(()));
        differences.note_at(at(20));
        let wait = Duration::from_secs(60 * 38);
        assert_eq!(differences.check_at(at(22)), Err(TooOften { times: 3, wait }));
        assert_eq!(differences.check_at(at(60)), Ok(()));
        differences.note_at(at(61));
        assert!(differences.check_at(at(62)).is_err(), "at 10, 20 and 61");
        assert_eq!(differences.check_at(at(71)), Ok(()));
    }
}
