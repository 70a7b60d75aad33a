//! The thread that makes claims.

use std::fmt;
use std::io;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Arbiter, ArbiterError, Claim, VmId, process_token};

/// The answer to one submitted claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClaimResult {
    /// The generation that was claimed.
    pub generation: u64,
    /// The arbiter's answer.
    pub claim: Claim,
    /// How long the arbiter took.
    pub took: Duration,
}

/// An earlier claim has not been answered yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the claim for generation {generation} has not been answered yet")]
pub struct Busy {
    /// The generation of the earlier claim.
    pub generation: u64,
}

/// The thread's orders.
enum Request {
    Claim(u64),
    NoteEnd { why: String, done: Sender<()> },
}

/// A thread that makes claims, one at a time, so that a file server that hangs blocks nothing else.
///
/// Dropping it does not wait: a claim under way continues and may even be won. Its result is still delivered,
/// so `deliver` must cope with a receiver that is gone.
pub struct ClaimWorker {
    requests: Sender<Request>,
    under_way: Arc<Mutex<Option<u64>>>,
}

impl ClaimWorker {
    /// Starts the thread. Every result goes to `deliver`, on that thread; it may send into a channel, write
    /// to an eventfd, or both. A new claim may be submitted as soon as it is called.
    pub fn start(
        arbiter: Box<dyn Arbiter>,
        vm: VmId,
        owner: String,
        deliver: impl FnMut(ClaimResult) + Send + 'static,
    ) -> io::Result<ClaimWorker> {
        Self::start_after(|| {}, arbiter, vm, owner, deliver)
    }

    /// The same, but each claim comes after `ready` has returned: while this host could do nothing with the VM, the other
    /// one may win it.
    ///
    /// # Errors
    /// The operating system's, when it refuses the thread.
    pub fn start_after(
        mut ready: impl FnMut() + Send + 'static,
        mut arbiter: Box<dyn Arbiter>,
        vm: VmId,
        owner: String,
        mut deliver: impl FnMut(ClaimResult) + Send + 'static,
    ) -> io::Result<ClaimWorker> {
        let (requests, inbox) = channel();
        let under_way = Arc::new(Mutex::new(None));
        let shared = Arc::clone(&under_way);
        outlive_machine::spawn("arbiter", move || {
            for request in inbox {
                match request {
                    Request::Claim(generation) => {
                        let start = Instant::now();
                        ready();
                        let claim = arbiter.claim(&vm, generation, &owner);
                        let won = claim == Claim::Won;
                        *lock(&shared) = None;
                        deliver(ClaimResult { generation, claim, took: start.elapsed() });
                        // After the answer, because a VM waits for that.
                        if won {
                            arbiter.tidy(&vm);
                        }
                    }
                    Request::NoteEnd { why, done } => {
                        if let Err(error) = note_end(arbiter.as_mut(), &vm, &why) {
                            tracing::warn!("cannot tell the arbiter that the VM has ended: {error}");
                        }
                        done.send(()).ok();
                    }
                }
            }
        })?;
        Ok(ClaimWorker { requests, under_way })
    }

    /// Claims a generation; never blocks.
    pub fn submit(&self, generation: u64) -> Result<(), Busy> {
        let mut under_way = lock(&self.under_way);
        if let Some(generation) = *under_way {
            return Err(Busy { generation });
        }
        *under_way = Some(generation);
        // This fails only if the thread panicked. Then it stays busy, which is safe: nobody goes on.
        let _ = self.requests.send(Request::Claim(generation));
        Ok(())
    }

    /// The handle by which the arbiter is told of the VM's end.
    pub fn end_notes(&self) -> EndNotes {
        EndNotes(self.requests.clone())
    }

    /// The generation whose claim is under way.
    pub fn under_way(&self) -> Option<u64> {
        *lock(&self.under_way)
    }
}

/// Tells the arbiter through the claim thread that the VM has ended in order.
pub struct EndNotes(Sender<Request>);

impl EndNotes {
    /// Notes the end, and waits at most `patience` until the arbiter has it.
    pub fn note(&self, why: &str, patience: Duration) {
        let (done, answer) = channel();
        if self.0.send(Request::NoteEnd { why: why.to_owned(), done }).is_ok() {
            answer.recv_timeout(patience).ok();
        }
    }
}

/// The owner of the newest generation may say that the VM has ended in it. A process without a token owns none.
fn note_end(arbiter: &mut dyn Arbiter, vm: &VmId, why: &str) -> Result<(), ArbiterError> {
    let Ok(process) = process_token() else { return Ok(()) };
    let newest = arbiter.history(vm)?.pop();
    let own = newest.filter(|win| win.winner.as_ref().is_some_and(|winner| winner.is(process)));
    own.map_or(Ok(()), |win| arbiter.note_end(vm, win.generation, why))
}

impl fmt::Debug for ClaimWorker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClaimWorker").field("under_way", &self.under_way()).finish()
    }
}

fn lock(under_way: &Mutex<Option<u64>>) -> MutexGuard<'_, Option<u64>> {
    under_way.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::{Ending, Mode, Win};
    use super::*;
    use std::sync::mpsc::Receiver;

    /// An arbiter that answers when the test tells it to.
    struct Slow(Receiver<Claim>);

    impl Arbiter for Slow {
        fn claim(&mut self, _: &VmId, _: u64, _: &str) -> Claim {
            self.0.recv().unwrap()
        }
        fn highest(&mut self, _: &VmId) -> Result<Option<u64>, ArbiterError> {
            Ok(None)
        }
        fn history(&mut self, _: &VmId) -> Result<Vec<Win>, ArbiterError> {
            Ok(Vec::new())
        }
        fn ending(&mut self, _: &VmId) -> Result<Option<Ending>, ArbiterError> {
            Ok(None)
        }
        fn note_end(&mut self, _: &VmId, _: u64, _: &str) -> Result<(), ArbiterError> {
            Ok(())
        }
        fn vms(&mut self) -> Result<Vec<VmId>, ArbiterError> {
            Ok(Vec::new())
        }
        fn prune(&mut self, _: &VmId, _: Mode) -> Result<Vec<u64>, ArbiterError> {
            Ok(Vec::new())
        }
        fn forget(&mut self, _: &VmId, _: Duration, _: Mode) -> Result<bool, ArbiterError> {
            Ok(false)
        }
        fn prober(&self) -> super::super::Prober {
            Box::new(|| Ok(()))
        }
        fn identity(&self) -> &str {
            "slow"
        }
    }

    #[test]
    fn nothing_is_claimed_for_a_host_that_is_not_ready() {
        let (let_go, gate) = channel();
        let (answer, answers) = channel();
        let (results, received) = channel();
        let deliver = move |result| results.send(result).unwrap();
        let ready = move || gate.recv().unwrap();
        let arbiter = Box::new(Slow(answers));
        let worker = ClaimWorker::start_after(ready, arbiter, VmId([1; 16]), "test".into(), deliver).unwrap();
        answer.send(Claim::Won).unwrap();
        worker.submit(7).unwrap();
        let patience = Duration::from_millis(50);
        assert!(received.recv_timeout(patience).is_err(), "the arbiter was asked");
        let_go.send(()).unwrap();
        assert_eq!(received.recv().unwrap().claim, Claim::Won);
    }

    #[test]
    fn one_claim_at_a_time_and_a_hung_one_blocks_nobody() {
        let (answer, answers) = channel();
        let (results, received) = channel();
        let deliver = move |result| results.send(result).unwrap();
        let worker =
            ClaimWorker::start(Box::new(Slow(answers)), VmId([1; 16]), "test".into(), deliver).unwrap();
        worker.submit(7).unwrap();
        assert_eq!(worker.submit(8), Err(Busy { generation: 7 }));
        assert_eq!(worker.under_way(), Some(7));
        assert!(received.try_recv().is_err());
        answer.send(Claim::Unreachable { why: "hung".into() }).unwrap();
        let result = received.recv().unwrap();
        assert_eq!((result.generation, result.claim), (7, Claim::Unreachable { why: "hung".into() }));
        // The receiver of a result may claim again at once.
        worker.submit(7).unwrap();
        answer.send(Claim::Won).unwrap();
        assert_eq!(received.recv().unwrap().claim, Claim::Won);
        worker.submit(8).unwrap();
        // Dropping it with a claim under way does not wait.
        drop(worker);
        drop(answer);
    }
}
