//! What an all-knowing observer sees, and the invariants that it checks after every step.

use std::collections::{BTreeMap, BTreeSet};

use super::world::Base;
use crate::Won;

/// A state of the VM: everything that it has done so far, as a node in the tree of all histories. Two hosts
/// that ran the VM from the same checkpoint have different nodes with one common ancestor.
pub(super) type Node = usize;

/// The generations of the first VM begin at 0, those of a VM that begins with an older image of it at this, and so on.
pub(super) const LINE: u64 = 1_000;

/// One life of a process on a host.
pub(super) type Life = (usize, u32);

struct Step {
    parent: Node,
    depth: u32,
}

pub(super) struct Truth {
    steps: Vec<Step>,
    /// The newest state whose output the world has seen.
    pub(super) tip: Node,
    /// Who won which generation, and the state from which the VM continues in it.
    won: BTreeMap<u64, (Life, Node)>,
    /// Whether the newest generation was won although its loser could not know: a third party reset the
    /// connection.
    excused: bool,
    /// Those that had the VM when an operator started it elsewhere: nothing tells them but their own questions.
    unaware: BTreeSet<Life>,
    /// Whether the VM has ended in order.
    pub(super) ended: bool,
    pub(super) violation: Option<String>,
}

impl Truth {
    pub(super) fn new(first: Life) -> Self {
        let root = Step { parent: 0, depth: 0 };
        let won = BTreeMap::from([(1, (first, 0))]);
        Self {
            steps: vec![root],
            tip: 0,
            won,
            excused: false,
            unaware: BTreeSet::new(),
            ended: false,
            violation: None,
        }
    }

    pub(super) fn fail(&mut self, what: String) {
        self.violation.get_or_insert(what);
    }

    pub(super) fn depth(&self, node: Node) -> u32 {
        self.steps[node].depth
    }

    /// The VM does something new.
    pub(super) fn step(&mut self, from: Node) -> Node {
        self.steps.push(Step { parent: from, depth: self.steps[from].depth + 1 });
        self.steps.len() - 1
    }

    pub(super) fn is_past_of(&self, past: Node, mut node: Node) -> bool {
        while self.steps[node].depth > self.steps[past].depth {
            node = self.steps[node].parent;
        }
        node == past
    }

    pub(super) fn newest(&self) -> (u64, Life) {
        self.won.last_key_value().map_or((0, (0, 0)), |(generation, (life, _))| (*generation, *life))
    }

    /// What the arbiter knows of the VM that has this generation.
    pub(super) fn history(&self, generation: u64) -> Vec<Won<Life>> {
        let line = generation / LINE * LINE;
        let won = self.won.range(line..line + LINE);
        won.map(|(&generation, (life, _))| Won { generation, winner: Some((*life, format!("{life:?}"))) })
            .collect()
    }

    /// For a planted mistake: the arbiter no longer knows who won this generation.
    pub(super) fn forget(&mut self, generation: u64) {
        self.won.remove(&generation);
    }

    /// The arbiter's test-and-set. `base` is the state from which the claimer would continue.
    pub(super) fn claim(
        &mut self,
        generation: u64,
        life: Life,
        Base { node: base, excused, word }: Base,
    ) -> Result<(), Life> {
        if let Some((owner, _)) = self.won.get(&generation) {
            return if *owner == life { Ok(()) } else { Err(*owner) };
        }
        let newest =
            self.history(generation).last().map_or(generation / LINE * LINE, |newest| newest.generation);
        if newest + 1 != generation {
            self.fail(format!("{life:?} claims generation {generation}, the newest is {newest}"));
        }
        // The owner itself may have let more out since it asked.
        let own = self.newest().1 == life;
        if word && !own {
            self.unaware.insert(self.newest().1);
            // What the world has seen beyond this is given up.
            self.tip = if self.is_past_of(self.tip, base) { self.tip } else { base };
        }
        let base = if own && self.is_past_of(base, self.tip) { self.tip } else { base };
        if !self.is_past_of(self.tip, base) {
            self.fail(format!(
                "invariant 1: {life:?} wins {generation} without a state whose output was released"
            ));
        }
        self.won.insert(generation, (life, base));
        self.excused = excused;
        Ok(())
    }

    /// A side goes live, or lets its output through again.
    pub(super) fn goes_on(&mut self, generation: u64, life: Life) {
        if self.won.get(&generation).map(|(owner, _)| *owner) != Some(life) {
            self.fail(format!("invariant 3: {life:?} goes on in generation {generation} without owning it"));
        }
    }

    /// A frame leaves a host and reaches the world. `may_not_know` says whether that host had no chance yet to learn
    /// that the VM was started elsewhere.
    pub(super) fn output(&mut self, node: Node, generation: u64, life: Life, may_not_know: bool) {
        if may_not_know && self.unaware.contains(&life) {
            return;
        }
        let (newest, owner) = self.newest();
        if self.won.get(&generation).map(|(owner, _)| *owner) != Some(life) {
            self.fail(format!(
                "invariant 3: {life:?} lets output out in generation {generation} without owning it"
            ));
        }
        if owner != life {
            let next = self.won.range(generation + 1..).next().map_or(newest, |(next, _)| *next);
            let base = self.won[if self.unaware.is_empty() { &newest } else { &next }].1;
            if !self.is_past_of(node, base) {
                self.fail(format!(
                    "invariant 1: {life:?} releases what {owner:?}, owner of {newest}, does not know"
                ));
            }
            if !self.excused {
                self.fail(format!("two sides: {life:?} releases although {owner:?} has won {newest}"));
            }
        } else if self.is_past_of(self.tip, node) {
            self.tip = node;
        } else if !self.is_past_of(node, self.tip) {
            self.fail(format!("invariant 1: {life:?} releases output of a second history"));
        }
    }

    pub(super) fn ends(&mut self, life: Life, may_not_know: bool) {
        if may_not_know && self.unaware.contains(&life) {
            return;
        }
        if self.newest().1 != life {
            self.fail(format!("{life:?} ends the VM in order although it does not own it"));
        }
        self.ended = true;
    }
}
