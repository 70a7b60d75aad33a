//! The self-check of the side where the VM runs: every N-th checkpoint tells the standby what its copy should
//! be.
//!
//! Memory is hashed in the pause. A disk is far too large for that, so a thread does it while the VM runs and
//! checkpoints go on, in this order:
//!
//! 1. The disks rest: requests in flight are completed and logged, and no new ones begin.
//! 2. Their images are hashed.
//! 3. The next checkpoint swaps the log and carries the hashes. Nothing was written since 1, so what the
//!    standby has when it has applied the logs up to this one is what was hashed.
//! 4. The disks continue.
//!
//! The guest's requests wait from 1 to 4; nothing else waits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use outlive_machine::{DiskHash, Machine};

use super::inbox::{Inbox, Queue};
use crate::disk;
use crate::vm::Disk;

/// How long a disk may take to complete what is in flight. With a full log it needs a checkpoint first.
const REST: Duration = Duration::from_secs(5);

/// How long the end of the machine waits for the thread, which has the disks and with them their last writes:
/// until they rest, and for the read of an image that is under way.
const LAST: Duration = Duration::from_secs(10);
/// Time between two looks at the thread.
const LOOK: Duration = Duration::from_millis(2);

/// Disks that rest. They continue when this is dropped.
struct Resting(Vec<Disk>);

impl Drop for Resting {
    fn drop(&mut self) {
        self.0.iter().for_each(|disk| disk.resume());
    }
}

/// The thread's result.
pub(crate) struct Hashed {
    /// Whether anybody still waits for it.
    wanted: Arc<AtomicBool>,
    found: Option<(Resting, Vec<DiskHash>)>,
}

enum State {
    Idle,
    Hashing(Arc<AtomicBool>),
    /// The result is no longer wanted, but the thread still keeps the disks at rest. If another check began
    /// now, this one's end would set the disks going while the other hashes them.
    Abandoned,
    /// The hashes are ready for the next checkpoint.
    Ready(Resting, Vec<DiskHash>),
    /// The hashes are in the checkpoint that is being taken.
    Taking(#[expect(dead_code, reason = "dropped when the checkpoint is taken")] Resting),
}

/// The self-check; see the module.
pub(super) struct SelfCheck {
    every: Option<u64>,
    disks: Vec<Disk>,
    inbox: Queue,
    state: State,
    /// Ends with the check that it does.
    thread: Option<JoinHandle<()>>,
}

/// A machine whose process goes on, as a standby with the same images, is gone with all of its disks.
impl Drop for SelfCheck {
    fn drop(&mut self) {
        self.cancel();
        let Some(thread) = self.thread.take() else { return };
        let until = Instant::now() + LAST;
        while !thread.is_finished() {
            if Instant::now() >= until {
                return tracing::warn!("a disk does not end the self-check's last read");
            }
            std::thread::sleep(LOOK);
        }
        // What it has of the disks goes with it, also if it panicked.
        thread.join().ok();
    }
}

impl SelfCheck {
    /// A check of the machine every so many checkpoints.
    pub(super) fn new(every: Option<u64>, machine: &Machine, inbox: Queue) -> Self {
        let replicated = machine.disks().iter().filter(|disk| !disk.is_shared() && !disk.is_readonly());
        Self { every, disks: replicated.cloned().collect(), inbox, state: State::Idle, thread: None }
    }

    /// The checkpoint of this number is about to be taken. Returns the hashes of the disks if it should carry
    /// a check.
    pub(super) fn before(&mut self, number: u64) -> Option<Vec<DiskHash>> {
        let due = number.is_multiple_of(self.every?);
        match std::mem::replace(&mut self.state, State::Idle) {
            State::Ready(resting, hashes) => {
                self.state = State::Taking(resting);
                return Some(hashes);
            }
            State::Abandoned => self.state = State::Abandoned,
            State::Idle if due && self.disks.is_empty() => return Some(Vec::new()),
            State::Idle | State::Taking(_) if due => self.start(),
            other => self.state = other,
        }
        None
    }

    /// The checkpoint is taken.
    pub(super) fn after(&mut self) {
        if matches!(self.state, State::Taking(_)) {
            self.state = State::Idle;
        }
    }

    /// The thread is done.
    pub(super) fn hashed(&mut self, Hashed { wanted, found }: Hashed) {
        let found = found.filter(|_| wanted.load(Ordering::Relaxed));
        self.state = found.map_or(State::Idle, |(resting, hashes)| State::Ready(resting, hashes));
    }

    /// Protection ends, and with it the check.
    pub(super) fn cancel(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Idle) {
            State::Hashing(wanted) => {
                wanted.store(false, Ordering::Relaxed);
                State::Abandoned
            }
            State::Abandoned => State::Abandoned,
            State::Idle | State::Ready(..) | State::Taking(_) => State::Idle,
        };
    }

    fn start(&mut self) {
        let wanted = Arc::new(AtomicBool::new(true));
        let (disks, inbox, asked) = (self.disks.clone(), self.inbox.clone(), wanted.clone());
        let thread = outlive_machine::spawn("self-check", move || {
            let found = hash(disks, &asked);
            inbox.send(Inbox::DisksHashed(Hashed { wanted: asked, found })).ok();
        });
        match thread {
            // The one before has sent its result.
            Ok(thread) => (self.state, self.thread) = (State::Hashing(wanted), Some(thread)),
            Err(error) => tracing::warn!(%error, "no self-check: cannot start a thread"),
        }
    }
}

/// Drains and hashes. `None` if that failed or the result is no longer wanted.
fn hash(disks: Vec<Disk>, wanted: &AtomicBool) -> Option<(Resting, Vec<DiskHash>)> {
    let mut resting = Resting(Vec::new());
    for disk in disks {
        if !disk.rest_within(REST) {
            tracing::warn!(disk = disk.index(), "no self-check: the disk's requests did not end in time");
            return None;
        }
        resting.0.push(disk);
    }
    let mut hashes = Vec::new();
    for disk in &resting.0 {
        let (index, image) = (disk.index(), disk.image());
        let hash = disk::hash_contents(image.file(), image.bytes(), || wanted.load(Ordering::Relaxed));
        let hash = hash.inspect_err(|error| {
            tracing::warn!(path = %image.path().display(), %error, "no self-check: the disk cannot be read");
        });
        hashes.push(DiskHash { disk: index, hash: hash.ok()?? });
    }
    Some((resting, hashes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::primary::inbox::inbox;

    #[test]
    fn the_check_is_gone_only_when_its_thread_has_let_the_disks_go() {
        let (disk, wanted) = (Arc::new(()), Arc::new(AtomicBool::new(true)));
        let (kept, asked) = (disk.clone(), wanted.clone());
        let thread = std::thread::spawn(move || {
            while asked.load(Ordering::Relaxed) {
                std::thread::sleep(LOOK);
            }
            // A last write.
            std::thread::sleep(Duration::from_millis(100));
            drop(kept);
        });
        let (state, thread) = (State::Hashing(wanted), Some(thread));
        let check = SelfCheck { every: Some(1), disks: Vec::new(), inbox: inbox().0, state, thread };
        drop(check);
        assert_eq!(Arc::strong_count(&disk), 1);
    }
}
