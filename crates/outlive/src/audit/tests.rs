//! Auditor, sender and standby, with a guest that writes at any moment and epochs that end at any moment, against
//! both memories.

use std::collections::{BTreeSet, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use outlive_dirty::Gfn;
use outlive_epoch::{AuditSpan, Audited};
use outlive_machine::{PAGE_SIZE, Ram, page_sum};

use super::auditor::Auditor;
use super::{Audit, Picked, Source, Taking};

/// The guest writes to the first pages only.
const PAGES: u64 = 200;

/// A mistake that must be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    None,
    /// What the checkpoint has itself is not looked at.
    IgnoresTheDirtyList,
    /// Sums are compared with the checkpoint after theirs.
    ComparesOneLate,
    /// Sums are those of the epoch before.
    ComparesOneEarly,
    /// A page of the copy changes.
    Flipped,
}

struct Checkpoint {
    pages: Vec<(u64, [u8; PAGE_SIZE])>,
    spans: Vec<AuditSpan>,
}

struct World {
    dice: fastrand::Rng,
    mistake: Mistake,
    here: Arc<Ram>,
    there: Ram,
    epoch: u64,
    /// Written in this epoch.
    dirty: BTreeSet<u64>,
    /// Pages that every checkpoint has, written or not.
    hot: BTreeSet<u64>,
    taking: Taking,
    on_their_way: VecDeque<Checkpoint>,
    late: Vec<AuditSpan>,
    compared: u64,
    difference: Option<u64>,
}

impl World {
    /// Something happens, between any two reads of the auditor.
    fn step(&mut self) {
        match self.dice.u32(0..100) {
            0..40 => self.write(),
            40..43 => self.end_epoch(),
            43..50 => self.apply(),
            _ => {}
        }
    }

    fn write(&mut self) {
        let gfn = self.dice.u64(0..PAGES);
        self.dirty.insert(gfn);
        // A page of zeroes, another one, or a part.
        match self.dice.u32(0..4) {
            0 => assert!(self.here.zero_page(Gfn(gfn))),
            1 => assert!(self.here.write_page(Gfn(gfn), &[self.dice.u8(..); PAGE_SIZE])),
            _ => assert!(self.here.write_part(Gfn(gfn), self.dice.usize(0..4000), &[self.dice.u8(..)])),
        }
    }

    fn end_epoch(&mut self) {
        let mut gfns: Vec<Gfn> = self.dirty.union(&self.hot).copied().map(Gfn).collect();
        self.dice.shuffle(&mut gfns);
        let mut contents = vec![0; gfns.len() * PAGE_SIZE];
        let (pages, _) = contents.as_chunks_mut::<PAGE_SIZE>();
        gfns.iter().zip(pages).for_each(|(gfn, page)| assert!(self.here.read_page(*gfn, page)));
        let of = self.epoch - u64::from(self.mistake == Mistake::ComparesOneEarly);
        let mut picked = Picked::new();
        self.taking.take(of, &mut picked);
        if self.mistake != Mistake::IgnoresTheDirtyList {
            // In two parts.
            let cut = self.dice.usize(0..=gfns.len());
            picked.captured(&gfns[..cut], &contents[..cut * PAGE_SIZE]);
            picked.captured(&gfns[cut..], &contents[cut * PAGE_SIZE..]);
        }
        let mut spans = picked.spans().to_vec();
        if self.mistake == Mistake::ComparesOneLate {
            std::mem::swap(&mut spans, &mut self.late);
        }
        let (contents, _) = contents.as_chunks::<PAGE_SIZE>();
        let pages = gfns.iter().map(|gfn| gfn.0).zip(contents.iter().copied()).collect();
        self.on_their_way.push_back(Checkpoint { pages, spans });
        self.dirty.clear();
        self.hot = (0..self.dice.u64(0..8)).map(|_| self.dice.u64(0..PAGES)).collect();
        self.epoch += 1;
        if self.on_their_way.len() > 3 {
            self.apply();
        }
    }

    fn apply(&mut self) {
        let Some(Checkpoint { pages, spans }) = self.on_their_way.pop_front() else { return };
        pages.iter().for_each(|(gfn, page)| assert!(self.there.write_page(Gfn(*gfn), page)));
        if self.mistake == Mistake::Flipped && self.epoch >= 20 {
            assert!(self.there.write_page(Gfn(PAGES + 1), &[1; PAGE_SIZE]));
        }
        for span in spans {
            let sum = span.gfns().fold(0u64, |sum, gfn| {
                let mut page = [0; PAGE_SIZE];
                assert!(self.there.read_page(Gfn(gfn), &mut page));
                sum.wrapping_add(page_sum(Gfn(gfn), &page))
            });
            self.compared += u64::from(span.mask.count_ones());
            if sum != span.sum {
                self.difference.get_or_insert(span.first);
            }
        }
    }
}

/// Returns the pages compared, and where the first difference was.
fn play(seed: u64, mistake: Mistake) -> (u64, Option<u64>) {
    let audit = Arc::<Audit>::default();
    let here = Arc::new(Ram::new(32 << 20, 64).unwrap());
    let world = Arc::new(Mutex::new(World {
        dice: fastrand::Rng::with_seed(seed),
        mistake,
        here: here.clone(),
        there: Ram::new(32 << 20, 64).unwrap(),
        epoch: 7,
        dirty: BTreeSet::new(),
        hot: BTreeSet::new(),
        taking: Taking::start(audit.clone()),
        on_their_way: VecDeque::new(),
        late: Vec::new(),
        compared: 0,
        difference: None,
    }));
    let looked_at = world.clone();
    let epoch = move || {
        let mut world = looked_at.lock().unwrap();
        world.step();
        Some(world.epoch)
    };
    let mut auditor = Auditor::new(audit.clone(), Source { ram: here, epoch: Box::new(epoch) }, seed);
    for turn in 0..40 {
        if turn % 4 == 3 {
            auditor.sample_next();
        } else {
            auditor.sample(turn % 5 * 64, u64::MAX);
        }
    }
    let mut world = world.lock().unwrap();
    world.end_epoch();
    while !world.on_their_way.is_empty() {
        world.apply();
    }
    (world.compared, world.difference)
}

#[test]
fn pages_are_compared_as_of_one_checkpoint_whatever_happens_meanwhile() {
    let mut compared = 0;
    for seed in 0..60 {
        let (pages, difference) = play(seed, Mistake::None);
        assert_eq!(difference, None, "seed {seed}");
        compared += pages;
    }
    // Epochs are as short as the reading of a span, so that most come too late for theirs.
    assert!(compared > 60 * 40 * 64 / 4, "{compared}");
}

#[test]
fn every_mistake_of_the_order_is_noticed() {
    for mistake in [Mistake::IgnoresTheDirtyList, Mistake::ComparesOneLate, Mistake::ComparesOneEarly] {
        let noticed = (0..20).filter(|seed| play(*seed, mistake).1.is_some()).count();
        assert!(noticed >= 15, "{mistake:?}: {noticed} of 20");
    }
    // The pages around it are read a few times after the flip, and most readings come too late for their epoch.
    let found: Vec<u64> = (0..20).filter_map(|seed| play(seed, Mistake::Flipped).1).collect();
    assert!(found.len() >= 8, "{} of 20", found.len());
    assert!(found.iter().all(|first| *first == PAGES / 64 * 64), "{found:?}");
}

fn spans_of(taking: &Taking, epoch: u64) -> Vec<AuditSpan> {
    let mut picked = Picked::new();
    taking.take(epoch, &mut picked);
    picked.spans().to_vec()
}

#[test]
fn all_pages_have_their_turn_and_what_came_too_late_has_another() {
    let audit = Arc::<Audit>::default();
    let ram = Arc::new(Ram::new(32 << 20, 64).unwrap());
    let source = Source { ram, epoch: Box::new(|| Some(5)) };
    let mut auditor = Auditor::new(audit.clone(), source, 12_345);
    let mut seen = BTreeSet::new();
    let taking = Taking::start(audit.clone());
    for _ in 0..(32 << 20) / PAGE_SIZE / 64 {
        assert_eq!(audit.progress().rounds, 0);
        assert_eq!(auditor.sample_next(), 64);
        seen.extend(spans_of(&taking, 5).iter().flat_map(AuditSpan::gfns));
    }
    assert_eq!((seen.len(), audit.progress().rounds), (8192, 1));
    auditor.sample(64, 0b101);
    assert_eq!(spans_of(&taking, 6), [], "the checkpoint has gone");
    let again = [auditor.sample_next(), auditor.sample_next()];
    assert_eq!(again, [1, 1]);
    let spans = spans_of(&taking, 5);
    assert_eq!(spans, [AuditSpan { first: 64, mask: 0b101, sum: 0 }]);
    auditor.sample(64, 1);
    taking.forget();
    assert_eq!(spans_of(&taking, 5), [], "a base begins");
}

/// The share of a core is kept whatever a page costs; what this prints says how long a round is. See docs/audit.md.
#[test]
fn every_page_is_read_once_in_a_round_and_what_it_costs_is_printed() {
    const MIB: u64 = 64;
    let audit = Arc::<Audit>::default();
    let ram = Arc::new(Ram::new(MIB << 20, 64).unwrap());
    let gfns: Vec<Gfn> = ram.gfns().collect();
    gfns.iter().for_each(|gfn| assert!(ram.write_page(*gfn, &[gfn.0 as u8 | 1; PAGE_SIZE])));
    let mut auditor = Auditor::new(audit.clone(), Source { ram, epoch: Box::new(|| Some(5)) }, 0);
    let taking = Taking::start(audit.clone());
    let (began, mut pages) = (super::thread_time(), 0);
    while audit.progress().rounds == 0 {
        pages += auditor.sample_next();
        spans_of(&taking, 5);
    }
    let each = (super::thread_time() - began) / pages;
    println!("{pages} pages, {each:?} each");
    assert_eq!(u64::from(pages), MIB << 8);
}

/// What the other host counts goes into this one's figures and its pace, and may be nonsense.
#[test]
fn a_standby_that_counts_wrongly_neither_ends_nor_stops_the_audit() {
    let audit = Audit::default();
    for (pages, spent_ns) in [(u64::MAX, u64::MAX), (5, 0), (6, u64::MAX), (u64::MAX, 7)] {
        audit.heard(&Audited { checkpoint: 1, pages, spent_ns, differs: None });
    }
    assert_eq!(audit.progress().pages, u64::MAX);
    assert!(audit.theirs_ns.load(Ordering::Relaxed) <= super::LONGEST_COMPARISON_NS);
}
