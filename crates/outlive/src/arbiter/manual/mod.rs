//! The arbiter that is a person: each generation but a VM's first is won by an operator's word.
//!
//! A claim is answered with "nobody knows" until an operator says, to this very process, who goes on. So nothing is
//! decided while the operator is asleep, and nothing stands behind the decision but the operator's word: whoever
//! gives the same generation to both hosts has two VMs.
//!
//! What was decided is kept in the memory of the process, and nowhere else. Which generation a VM is in, a standby
//! hears from its primary. A process that is started anew knows nothing, so it does not start a VM from an image that
//! has been one's: it lacks the claims, like every arbiter that has lost them.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::record::printable;
use super::{
    Arbiter, ArbiterError, ArbiterSpecError, Claim, Ending, Initialized, Mode, Prober, VmId, Win, Winner,
    process_token,
};

/// How to write it, for people.
pub(super) const FORM: &str = "manual, where an operator decides";
/// All of them are the same.
const IDENTITY: &str = "manual";

/// The desk of this process.
static DESK: Desk = Desk(Mutex::new(BTreeMap::new()));

/// Opens it.
pub(super) fn open(place: &str) -> Result<Box<dyn Arbiter>, ArbiterSpecError> {
    read(place)?;
    Ok(Box::new(ManualArbiter { desk: &DESK }))
}

/// Whether it is written as one.
pub(super) fn read(place: &str) -> Result<(), ArbiterSpecError> {
    if place.is_empty() { Ok(()) } else { Err(ArbiterSpecError::Form(format!("manual:{place}"))) }
}

/// It is nowhere.
pub(super) fn init(_place: &str) -> Result<(Box<dyn Arbiter>, Initialized), ArbiterSpecError> {
    Err(ArbiterSpecError::NoInit {
        place: IDENTITY.into(),
        remedy: "it is a person; give --arbiter manual on both hosts",
    })
}

/// The desk of this process, where an operator finds what is to be decided.
pub(crate) fn desk() -> &'static Desk {
    &DESK
}

/// What an operator says of a generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    /// It is this process's.
    Here,
    /// It is the other host's.
    There,
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Here => "this host's",
            Self::There => "the other host's",
        })
    }
}

/// What became of a word that is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Taken {
    /// It decides.
    Now(VmId),
    /// The same word was said before.
    Before(VmId),
}

/// Why an operator's word is not taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum NotTaken {
    /// Nobody waits for one.
    #[error("nobody waits for a word: no VM of this process has --arbiter manual and a lost peer")]
    NothingAsked,
    /// A word was said already, and another one.
    #[error("generation {generation} was decided already, and is {whose}: a word cannot be taken back")]
    Decided {
        /// Which it was.
        generation: u64,
        /// Whose it is.
        whose: Word,
    },
    /// It is another generation.
    #[error("generation {asked} is to be decided, not {said}: look at `outlive status` again")]
    OtherGeneration {
        /// Which is.
        asked: u64,
        /// Which was said.
        said: u64,
    },
}

/// What this process knows of one VM.
#[derive(Default)]
struct Line {
    /// The newest generation that was won, anywhere.
    newest: u64,
    /// Those that were won here, with their owners and times.
    ours: BTreeMap<u64, (String, SystemTime)>,
    /// What waits for a word.
    asked: Option<(u64, String)>,
    /// What has got one that gives it to the other host.
    theirs: Option<u64>,
}

/// What is to be decided in this process, and what was.
pub(crate) struct Desk(Mutex<BTreeMap<VmId, Line>>);

impl Desk {
    fn lines(&self) -> MutexGuard<'_, BTreeMap<VmId, Line>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was said of a generation in this process, while nothing waits for a word.
    pub(crate) fn decided(&self, generation: u64) -> Option<(VmId, Word)> {
        // A VM's first generation is nobody's word.
        let said = |line: &Line| match line.theirs {
            Some(theirs) if theirs == generation => Some(Word::There),
            _ => line.ours.contains_key(&generation).then_some(Word::Here),
        };
        let lines = self.lines();
        if lines.values().any(|line| line.asked.is_some()) {
            return None;
        }
        lines.iter().filter(|_| generation > 1).find_map(|(vm, line)| Some((*vm, said(line)?)))
    }

    /// Takes an operator's word about the generation that is to be decided. The same word may be said again.
    ///
    /// # Errors
    /// See [`NotTaken`].
    pub(crate) fn decide(&self, generation: u64, word: Word) -> Result<Taken, NotTaken> {
        match self.decided(generation) {
            Some((vm, said)) if said == word => return Ok(Taken::Before(vm)),
            Some((_, whose)) => return Err(NotTaken::Decided { generation, whose }),
            None => {}
        }
        let mut lines = self.lines();
        // A process has one VM.
        let asked = lines.iter_mut().find(|(_, line)| line.asked.is_some()).ok_or(NotTaken::NothingAsked)?;
        let (vm, line) = asked;
        let Some((asked, owner)) = line.asked.take_if(|(asked, _)| *asked == generation) else {
            let asked = line.asked.as_ref().map_or(0, |(asked, _)| *asked);
            return Err(NotTaken::OtherGeneration { asked, said: generation });
        };
        line.newest = asked;
        match word {
            Word::Here => drop(line.ours.insert(asked, (owner, SystemTime::now()))),
            Word::There => line.theirs = Some(asked),
        }
        Ok(Taken::Now(*vm))
    }

    fn claim(&self, vm: &VmId, generation: u64, owner: &str) -> Claim {
        let owner = printable(owner);
        let mut lines = self.lines();
        let line = lines.entry(*vm).or_default();
        if let Some((winner, _)) = line.ours.get(&generation) {
            return if *winner == owner { Claim::Won } else { Claim::Lost { owner: winner.clone() } };
        }
        if line.theirs == Some(generation) {
            return Claim::Lost { owner: "the other host, by an operator's word".into() };
        }
        if line.newest >= generation {
            let owner = format!("the other host, which has had generation {} since", line.newest);
            return Claim::Lost { owner };
        }
        if generation == 1 {
            // A new VM's id is random: nobody else can have it.
            line.ours.insert(1, (owner, SystemTime::now()));
            line.newest = 1;
            return Claim::Won;
        }
        if line.newest + 1 != generation {
            let why = format!(
                "--arbiter manual: this process does not know generation {} of this VM",
                generation - 1
            );
            return Claim::Unreachable { why };
        }
        line.asked = Some((generation, owner));
        Claim::Unreachable { why: question(generation) }
    }

    fn introduced(&self, vm: &VmId, generation: u64) {
        let mut lines = self.lines();
        let line = lines.entry(*vm).or_default();
        line.newest = line.newest.max(generation);
    }
}

/// What an operator is asked.
fn question(generation: u64) -> String {
    format!(
        "--arbiter manual: AN OPERATOR MUST DECIDE who has generation {generation}. Make sure that the VM does not run \
         on the other host, best by switching that host off; then say `outlive take-over --generation {generation}` \
         at the standby, or `outlive go-on-alone --generation {generation}` where the VM ran"
    )
}

/// The arbiter that is a person.
struct ManualArbiter {
    desk: &'static Desk,
}

impl Arbiter for ManualArbiter {
    fn claim(&mut self, vm: &VmId, generation: u64, owner: &str) -> Claim {
        self.desk.claim(vm, generation, owner)
    }

    fn introduced(&mut self, vm: &VmId, generation: u64) {
        self.desk.introduced(vm, generation);
    }

    fn highest(&mut self, vm: &VmId) -> Result<Option<u64>, ArbiterError> {
        Ok(self.desk.lines().get(vm).map(|line| line.newest).filter(|newest| *newest > 0))
    }

    fn history(&mut self, vm: &VmId) -> Result<Vec<Win>, ArbiterError> {
        let process = process_token().unwrap_or_default();
        let win = |(generation, (owner, at)): (&u64, &(String, SystemTime))| Win {
            generation: *generation,
            winner: Some(Winner { owner: owner.clone(), process: process.to_owned() }),
            at: Some(*at),
        };
        Ok(self.desk.lines().get(vm).map(|line| line.ours.iter().map(win).collect()).unwrap_or_default())
    }

    fn ending(&mut self, _: &VmId) -> Result<Option<Ending>, ArbiterError> {
        Ok(None)
    }

    fn note_end(&mut self, _: &VmId, _: u64, _: &str) -> Result<(), ArbiterError> {
        Ok(())
    }

    fn vms(&mut self) -> Result<Vec<VmId>, ArbiterError> {
        Ok(self.desk.lines().keys().copied().collect())
    }

    fn prune(&mut self, _: &VmId, _: Mode) -> Result<Vec<u64>, ArbiterError> {
        Ok(Vec::new())
    }

    fn forget(&mut self, _: &VmId, _: Duration, _: Mode) -> Result<bool, ArbiterError> {
        Ok(false)
    }

    fn is_a_person(&self) -> bool {
        true
    }

    fn identity(&self) -> &str {
        IDENTITY
    }

    fn prober(&self) -> Prober {
        Box::new(|| Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmId = VmId([3; 16]);

    fn arbiter() -> ManualArbiter {
        ManualArbiter { desk: Box::leak(Box::new(Desk(Mutex::default()))) }
    }

    #[test]
    fn nothing_is_won_without_the_operators_word() {
        let (mut primary, mut standby) = (arbiter(), arbiter());
        assert_eq!(primary.claim(&VM, 1, "primary"), Claim::Won);
        assert_eq!(primary.claim(&VM, 1, "primary"), Claim::Won);
        assert_eq!(standby.highest(&VM).unwrap(), None);
        standby.introduced(&VM, 1);
        assert_eq!(standby.highest(&VM).unwrap(), Some(1));
        assert_eq!(standby.desk.decide(2, Word::Here), Err(NotTaken::NothingAsked));
        for _ in 0..3 {
            for side in [&mut primary, &mut standby] {
                let claim = side.claim(&VM, 2, "somebody");
                assert!(
                    matches!(&claim, Claim::Unreachable { why } if why.contains("outlive take-over --generation 2"))
                );
            }
        }
        assert_eq!(standby.desk.decide(1, Word::Here), Err(NotTaken::OtherGeneration { asked: 2, said: 1 }));
        assert_eq!(standby.desk.decided(2), None);
        assert_eq!(standby.desk.decide(2, Word::Here), Ok(Taken::Now(VM)));
        // An operator who is not sure says it again, before and after the claim.
        assert_eq!(standby.desk.decide(2, Word::Here), Ok(Taken::Before(VM)));
        let taken_back = Err(NotTaken::Decided { generation: 2, whose: Word::Here });
        assert_eq!(standby.desk.decide(2, Word::There), taken_back);
        assert_eq!(standby.claim(&VM, 2, "somebody"), Claim::Won);
        assert!(matches!(standby.claim(&VM, 2, "somebody else"), Claim::Lost { .. }));
        assert_eq!(primary.desk.decide(2, Word::There), Ok(Taken::Now(VM)));
        for _ in 0..2 {
            assert_eq!(primary.desk.decide(2, Word::There), Ok(Taken::Before(VM)));
            let owner = "the other host, by an operator's word".to_owned();
            assert_eq!(primary.claim(&VM, 2, "somebody"), Claim::Lost { owner });
        }
        // Nobody has said a word about a VM's first generation.
        assert_eq!(primary.desk.decided(1), None);
        // A word is for one question only, and one about an older question is no answer to this.
        assert!(matches!(standby.claim(&VM, 3, "somebody"), Claim::Unreachable { .. }));
        assert_eq!(primary.desk.decide(3, Word::Here), Err(NotTaken::NothingAsked));
        let other = Err(NotTaken::OtherGeneration { asked: 3, said: 2 });
        assert_eq!(standby.desk.decide(2, Word::Here), other);
    }

    /// A process that has missed a generation must not be given a later one.
    #[test]
    fn what_is_not_known_cannot_go_on() {
        let mut arbiter = arbiter();
        assert!(
            matches!(arbiter.claim(&VM, 2, "x"), Claim::Unreachable { why } if why.contains("does not know"))
        );
        assert_eq!(arbiter.desk.decide(2, Word::Here), Err(NotTaken::NothingAsked));
        arbiter.introduced(&VM, 5);
        assert!(matches!(arbiter.claim(&VM, 5, "x"), Claim::Lost { .. }));
        arbiter.introduced(&VM, 4);
        assert_eq!(arbiter.highest(&VM).unwrap(), Some(5));
    }

    #[test]
    fn it_has_no_place() {
        assert!(open("x").is_err() && open("").is_ok() && init("").is_err());
    }
}
