//! Held output of a simulated host: what the program's valve does, in the simplest way.

use std::collections::VecDeque;
use std::time::Duration;

use super::truth::Node;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Open,
    Hold,
    Discard,
}

pub(super) struct Valve {
    mode: Mode,
    epoch: u64,
    committed: u64,
    lease: Option<Duration>,
    /// Epoch, output, and when it was held, less slowness that explains the wait.
    held: VecDeque<(u64, Node, u64)>,
}

impl Valve {
    pub(super) fn new() -> Self {
        Self { mode: Mode::Open, epoch: 0, committed: 0, lease: None, held: VecDeque::new() }
    }

    pub(super) fn set_lease(&mut self, until: Option<Duration>) {
        self.lease = until;
    }

    pub(super) fn hold(&mut self, epoch: u64) {
        (self.mode, self.epoch) = (Mode::Hold, epoch);
    }

    pub(super) fn begin_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
    }

    pub(super) fn holds(&self) -> bool {
        self.mode == Mode::Hold
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What is held for this epoch.
    pub(super) fn held_for(&self, epoch: u64) -> Vec<Node> {
        self.held.iter().filter(|it| it.0 == epoch).map(|it| it.1).collect()
    }

    /// Through which epoch everything that was held has left.
    pub(super) fn released_through(&self) -> u64 {
        let oldest = self.held.front().map_or(self.epoch, |it| it.0);
        if self.holds() { oldest.min(self.epoch).saturating_sub(1) } else { 0 }
    }

    pub(super) fn commit(&mut self, through: u64) {
        self.committed = self.committed.max(through);
    }

    pub(super) fn open(&mut self) {
        self.mode = Mode::Open;
    }

    pub(super) fn discard(&mut self) {
        self.mode = Mode::Discard;
        self.held.clear();
    }

    /// The guest sends something; returns what leaves at once.
    pub(super) fn push(&mut self, node: Node, at: u64) -> Option<Node> {
        match self.mode {
            // Nothing overtakes output that is still to be drained.
            Mode::Open if self.held.is_empty() => return Some(node),
            Mode::Open | Mode::Hold => self.held.push_back((self.epoch, node, at)),
            Mode::Discard => {}
        }
        None
    }

    fn is_let_out(&self) -> bool {
        let front = self.held.front();
        front.is_some_and(|(epoch, ..)| self.mode == Mode::Open || *epoch <= self.committed)
    }

    fn lease_lasts(&self, now: Duration) -> bool {
        self.lease.is_none_or(|until| now < until)
    }

    /// Whether something should leave now.
    pub(super) fn is_ready(&self, now: Duration) -> bool {
        self.is_let_out() && self.lease_lasts(now)
    }

    /// Takes out the next output that leaves, at this true time.
    ///
    /// # Errors
    /// The lease has ended.
    pub(super) fn drain(&mut self, now: Duration) -> Result<Option<(Node, u64)>, ()> {
        match self.is_let_out() {
            false => Ok(None),
            true if !self.lease_lasts(now) => Err(()),
            true => Ok(self.held.pop_front().map(|(_, node, at)| (node, at))),
        }
    }
}
