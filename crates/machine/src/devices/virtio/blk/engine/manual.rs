//! An engine for tests: operations wait until the test carries them out, in the order and with the outcome
//! that it chooses.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::super::image::Image;
use super::threads::carry_out;
use super::{Completion, Engine, Operation, Submission};
use crate::devices::virtio::worker::event;

/// The test's handle on the engine; clones are the same engine.
#[derive(Clone)]
pub(in super::super) struct Manual {
    shared: Arc<Shared>,
}

struct Shared {
    image: Arc<Image>,
    waiting: Mutex<Vec<Submission>>,
    done: Mutex<Vec<Completion>>,
    event: EventFd,
}

#[allow(dead_code, reason = "the fuzz entry uses a part of it")]
impl Manual {
    pub(in super::super) fn new(image: Arc<Image>) -> io::Result<Self> {
        let shared = Shared { image, waiting: Mutex::default(), done: Mutex::default(), event: event()? };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// The operations that wait, oldest first.
    pub(in super::super) fn waiting(&self) -> Vec<Operation> {
        lock(&self.shared.waiting).iter().map(|it| it.operation).collect()
    }

    /// Carries out the operation at `position`. `outcome` may replace its true result; with an error the disk
    /// does not change.
    pub(in super::super) fn complete(&self, position: usize, outcome: Option<Result<usize, i32>>) {
        let Submission { token, operation, mut buffer, .. } = lock(&self.shared.waiting).remove(position);
        let result = match (outcome, operation) {
            (Some(Err(number)), _) => Some(Err(number)),
            (Some(Ok(part)), Operation::Read { offset, from, .. }) => {
                self.carry_out(Operation::Read { offset, from, len: part }, &mut buffer)
            }
            (Some(Ok(part)), Operation::Write { offset, from, .. }) => {
                self.carry_out(Operation::Write { offset, from, len: part }, &mut buffer)
            }
            _ => self.carry_out(operation, &mut buffer),
        };
        lock(&self.shared.done).push(Completion { token, buffer, result });
        self.shared.event.write(1).expect("the counter of the event is far from full");
    }

    /// Carries out everything that waits, oldest first. Returns how many operations that was.
    pub(in super::super) fn complete_all(&self) -> usize {
        let count = self.waiting().len();
        for _ in 0..count {
            self.complete(0, None);
        }
        count
    }

    fn carry_out(&self, operation: Operation, buffer: &mut [u8]) -> Option<Result<usize, i32>> {
        carry_out(&self.shared.image, operation, buffer, || true)
    }
}

impl Engine for Manual {
    fn submit(&self, submissions: &mut Vec<Submission>) {
        lock(&self.shared.waiting).append(submissions);
    }

    fn reap(&self, completions: &mut Vec<Completion>) {
        completions.append(&mut lock(&self.shared.done));
    }

    fn try_reap(&self, completions: &mut Vec<Completion>) {
        self.reap(completions);
    }

    fn event(&self) -> &EventFd {
        &self.shared.event
    }

    fn name(&self) -> &'static str {
        "manual"
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
