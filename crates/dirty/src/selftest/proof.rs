//! Leaves pages out of the re-arm in one pattern after another, and checks the kernel's answer.

use std::time::Duration;

use super::guest::{Machine, PAGES};
use super::log::{Log, Pages};
use super::{Failure, SelfTestError, Way, median};

/// The page really given back instead of the right one: here tests plant their mistakes.
pub(super) type Twist = fn(usize, Option<usize>) -> Option<usize>;

const ROUNDS: usize = 3;
/// Pages are told apart by their number modulo this.
const CLASSES: usize = 16;
const _: () = assert!(PAGES % CLASSES == 0);
/// Pages that are armed when most are left out: two classes.
const FEW: usize = PAGES / CLASSES * 2;
/// Below this cost of a fault, the noise exceeds the cost of a few faults.
const MEASURABLE: Duration = Duration::from_nanos(500);

pub(super) struct Proof<'a> {
    machine: &'a mut Machine,
    log: Log,
    twist: Twist,
    /// Pages whose next write traps.
    armed: Pages,
    /// Pages whose write trapped and that have not been given back.
    trapped: Pages,
    passes: Vec<Pass>,
}

/// A pass of the guest over its pages.
struct Pass {
    /// How many of them trapped.
    traps: usize,
    time: Duration,
}

impl<'a> Proof<'a> {
    pub(super) fn new(machine: &'a mut Machine, way: Way, twist: Twist) -> Result<Self, SelfTestError> {
        let log = Log::new(machine, way)?;
        let none = [false; PAGES];
        Ok(Proof { machine, log, twist, armed: none, trapped: none, passes: Vec::new() })
    }

    pub(super) fn run(&mut self) -> Result<(), Failure> {
        // So that every page is mapped: the test measures faults on protected pages.
        self.machine.write_all()?;
        (0..ROUNDS).try_for_each(|round| self.round(round))?;
        quiet(&self.passes, self.fault_time()).map_err(Failure::Unexpected)
    }

    fn round(&mut self, round: usize) -> Result<(), Failure> {
        let class = |page: usize| (page + round) % CLASSES;
        let at = |page: usize, distance: usize| Some((page + distance) % PAGES);
        self.log.arm_all()?;
        self.armed = [true; PAGES];
        self.check("after arming all")?;

        self.pass("all armed")?;
        self.pass("nothing given back")?;
        // Entries of their own, entries of others, and none.
        self.give_back("with an eighth armed", |page| match class(page) {
            1 => at(page, 1),
            15 => at(page, 0),
            _ => None,
        })?;
        self.pass("an eighth armed")?;
        // Pages that were left out come back by the entries of others, whose own pages are left out now.
        self.give_back("with another eighth armed", |page| match class(page) {
            2 | 15 => at(page, PAGES - 2),
            _ => None,
        })?;
        self.pass("another eighth armed")?;
        self.give_back("with nothing armed", |_| None)?;
        self.pass("nothing armed")
    }

    /// Makes the guest write to every page: the armed ones are logged, and no others.
    fn pass(&mut self, what: &str) -> Result<(), Failure> {
        let time = self.machine.write_all()?;
        let new = std::mem::replace(&mut self.armed, [false; PAGES]);
        self.compare(&new, what)?;
        self.trapped.iter_mut().zip(new).for_each(|(trapped, new)| *trapped |= new);
        self.passes.push(Pass { traps: new.into_iter().filter(|&new| new).count(), time });
        Ok(())
    }

    fn give_back(&mut self, what: &str, target: impl Fn(usize) -> Option<usize>) -> Result<(), Failure> {
        let from = std::mem::replace(&mut self.trapped, [false; PAGES]);
        if !self.log.give_back(&from, |page| (self.twist)(page, target(page)))? {
            return Err(Failure::Unexpected(format!("{what}: KVM did not take back all ring entries")));
        }
        for page in (0..PAGES).filter(|&page| from[page]).filter_map(target) {
            self.armed[page] = true;
        }
        self.check(what)
    }

    /// Nothing was written: the log must not have changed by itself.
    fn check(&mut self, what: &str) -> Result<(), Failure> {
        self.compare(&[false; PAGES], what)
    }

    fn compare(&mut self, new: &Pages, what: &str) -> Result<(), Failure> {
        let (expected, dirty) = (self.log.expected(new, &self.armed), self.log.dirty()?);
        let count = |wrong: fn(bool, bool) -> bool| {
            expected.iter().zip(&dirty).filter(|&(&expected, &dirty)| wrong(expected, dirty)).count()
        };
        match (count(|expected, dirty| expected && !dirty), count(|expected, dirty| !expected && dirty)) {
            (0, 0) => Ok(()),
            (missing, extra) => {
                let of = expected.iter().filter(|&&expected| expected).count();
                let reason = format!("{what}: {missing} of {of} pages not logged, {extra} others logged");
                Err(Failure::Unexpected(reason))
            }
        }
    }

    /// The cost of a fault: every pass with faults, minus the median of those without.
    pub(super) fn fault_time(&self) -> Duration {
        let without =
            median(self.passes.iter().filter(|pass| pass.traps == 0).map(|pass| pass.time).collect());
        let with = self.passes.iter().filter(|pass| pass.traps > 0);
        median(with.map(|pass| pass.time.saturating_sub(without) / pass.traps as u32).collect())
    }
}

/// Whether the pages left out were really written without a fault. A log that is a bitmap does not show it: a
/// page may trap and be logged again without a difference. So time decides, if a fault can be told from
/// noise; noise only adds, so the shortest pass is the one to believe.
fn quiet(passes: &[Pass], fault: Duration) -> Result<(), String> {
    let shortest = |traps| {
        passes.iter().filter(|pass| pass.traps == traps).map(|pass| pass.time).min().unwrap_or_default()
    };
    let (all, few) = (shortest(PAGES), shortest(FEW));
    if fault < MEASURABLE || few * 2 < all {
        return Ok(());
    }
    Err(format!("writing all pages takes {few:?} with {FEW} of them armed, {all:?} with all {PAGES} armed"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_left_out_must_not_cost_what_faults_cost() {
        let pass = |traps, micros| Pass { traps, time: Duration::from_micros(micros) };
        let of = |few: u64, all: u64, fault| {
            let passes =
                [pass(PAGES, all + 300), pass(PAGES, all), pass(FEW, few), pass(FEW, few + 500), pass(0, 20)];
            quiet(&passes, Duration::from_nanos(fault)).is_ok()
        };
        assert!(of(300, 1200, 6000));
        assert!(!of(1200, 1200, 6000));
        assert!(of(1200, 1200, 100), "too cheap to be measured");
    }
}
