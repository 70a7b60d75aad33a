//! The core of both drivers.

use std::collections::VecDeque;
use std::time::Duration;

use super::After;
use crate::planted::{Planted, planted};
use crate::{Primary, PrimaryAction, PrimaryEvent, Standby, StandbyAction, StandbyEvent};

/// A state machine that can be driven.
pub(super) trait Machine {
    type Event;
    type Action;
    fn handle(&mut self, now: Duration, event: Self::Event, out: &mut Vec<Self::Action>);
    fn next_deadline(&self) -> Option<Duration>;
}

impl Machine for Primary {
    type Event = PrimaryEvent;
    type Action = PrimaryAction;
    fn handle(&mut self, now: Duration, event: PrimaryEvent, out: &mut Vec<PrimaryAction>) {
        self.handle(now, event, out);
    }
    fn next_deadline(&self) -> Option<Duration> {
        self.next_deadline()
    }
}

impl Machine for Standby {
    type Event = StandbyEvent;
    type Action = StandbyAction;
    fn handle(&mut self, now: Duration, event: StandbyEvent, out: &mut Vec<StandbyAction>) {
        self.handle(now, event, out);
    }
    fn next_deadline(&self) -> Option<Duration> {
        self.next_deadline()
    }
}

/// Carries out the actions of one event.
pub(super) trait Hands<M: Machine> {
    /// An event was handled; its actions follow.
    fn decided(&mut self, machine: &M);

    /// Carries one action out.
    ///
    /// # Errors
    /// The event that reports the failure.
    fn carry_out(&mut self, machine: &M, action: M::Action, after: &mut After) -> Result<(), M::Event>;
}

/// The most actions that one event normally brings: no allocation in a pause.
const ACTIONS: usize = 32;

/// A state machine, its pending actions, and what the waiting thread was told.
pub(super) struct Core<M: Machine> {
    pub(super) machine: M,
    actions: Vec<M::Action>,
    failures: VecDeque<M::Event>,
    /// The deadline that the waiting thread knows.
    waits_until: Option<Duration>,
    pub(super) bug: Planted,
}

impl<M: Machine> Core<M> {
    pub(super) fn new(machine: M, bug: Planted) -> Self {
        let (actions, failures) = (Vec::with_capacity(ACTIONS), VecDeque::new());
        Self { machine, actions, failures, waits_until: None, bug }
    }

    /// Hands an event in, carries out what follows, and what follows from any failures.
    pub(super) fn run(&mut self, now: Duration, event: M::Event, hands: &mut impl Hands<M>) -> After {
        let mut after = After::default();
        self.step(now, event, hands, &mut after);
        // All actions of an event are carried out before a failure of one of them is handed in. So each event
        // meets a state in which everything decided before has been tried.
        while let Some(failure) = self.failures.pop_front() {
            self.step(now, failure, hands, &mut after);
        }
        let deadline = self.machine.next_deadline();
        if is_earlier(deadline, self.waits_until) && !planted!(self.bug, WakeForgotten) {
            self.waits_until = deadline;
            after.wake = true;
        }
        after
    }

    fn step(&mut self, now: Duration, event: M::Event, hands: &mut impl Hands<M>, after: &mut After) {
        self.machine.handle(now, event, &mut self.actions);
        hands.decided(&self.machine);
        if planted!(self.bug, ActionsReversed) {
            self.actions.reverse();
        }
        for action in self.actions.drain(..) {
            if let Err(failure) = hands.carry_out(&self.machine, action, after)
                && !planted!(self.bug, FailureSwallowed)
            {
                self.failures.push_back(failure);
            }
        }
    }

    /// Until when the waiting thread may sleep, if nobody wakes it.
    pub(super) fn wait(&mut self) -> Option<Duration> {
        self.waits_until = self.machine.next_deadline();
        self.waits_until
    }
}

fn is_earlier(deadline: Option<Duration>, known: Option<Duration>) -> bool {
    match (deadline, known) {
        (Some(deadline), Some(known)) => deadline < known,
        (Some(_), None) => true,
        (None, _) => false,
    }
}
