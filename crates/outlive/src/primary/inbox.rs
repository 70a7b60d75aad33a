//! Messages to the coordinator. Every other thread has the sending end, and nothing else of the coordinator.
//!
//! Beside messages there is a [`Bell`]: "look again at what you wait for". A device's thread rings it when a
//! client's answer waits for the end of the epoch; that costs an atomic, and a system call if the coordinator
//! sleeps.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use outlive_epoch::{ArbiterSight, Audited, DiskAudited, DiskWant, ProtocolVersion, StrayKey};
use outlive_machine::MachineEvent;
use outlive_pair::{Broken, ExitReason, Kept, Link, Needs, PrimaryNote};

use super::hand_over::Asked;
use super::pool::Pool;
use super::self_check::Hashed;
use crate::disk::SyncReport;
use crate::link::SenderReport;
use crate::network::Sight;
use crate::vm::{BootDiskError, FromDisk};

/// A standby that has accepted.
pub(crate) struct Accepted {
    pub(super) link: Link,
    /// The buffers for its checkpoints.
    pub(super) pool: Arc<Pool>,
    /// Of the stream.
    pub(super) version: ProtocolVersion,
    pub(super) needs: Needs,
    /// Where it takes strays, and with what, if they are wanted.
    pub(super) strays: Option<(String, StrayKey)>,
}

/// Both ends, for messages to the calling thread.
pub(crate) fn inbox() -> (Queue, Messages) {
    let (sender, receiver) = channel();
    let bell = Bell { rung: Arc::default(), thread: thread::current() };
    (Queue { sender, bell: bell.clone() }, Messages { receiver, bell })
}

/// The sending end. Sending never blocks; messages after the coordinator's end are lost, and nobody needs
/// them.
#[derive(Clone)]
pub(crate) struct Queue {
    sender: Sender<Inbox>,
    bell: Bell,
}

/// The coordinator has ended.
#[derive(Debug)]
pub(crate) struct Gone;

impl Queue {
    /// Sends a message.
    ///
    /// # Errors
    /// [`Gone`].
    pub(crate) fn send(&self, message: Inbox) -> Result<(), Gone> {
        self.sender.send(message).map_err(|_| Gone)?;
        self.bell.ring();
        Ok(())
    }

    /// What wakes the coordinator without a message.
    pub(crate) fn bell(&self) -> Bell {
        self.bell.clone()
    }
}

/// Wakes the thread that takes the messages. Takes no lock and allocates nothing.
#[derive(Clone)]
pub(crate) struct Bell {
    rung: Arc<AtomicBool>,
    thread: Thread,
}

impl Bell {
    /// Has the thread look again.
    pub(crate) fn ring(&self) {
        // Release: who finds it rung finds what it was rung for. Whoever rang first wakes.
        if !self.rung.swap(true, Ordering::AcqRel) {
            self.thread.unpark();
        }
    }
}

/// The receiving end; for the thread that has made it.
pub(crate) struct Messages {
    receiver: Receiver<Inbox>,
    bell: Bell,
}

impl Messages {
    /// The next message, if one comes within `timeout`. `None` also when the bell was rung.
    pub(crate) fn next_within(&self, timeout: Duration) -> Option<Inbox> {
        let until = Instant::now() + timeout;
        loop {
            // Before the look at the messages: one that comes after it rings again.
            let rung = self.bell.rung.swap(false, Ordering::AcqRel);
            if let Ok(message) = self.receiver.try_recv() {
                return Some(message);
            }
            let left = until.saturating_duration_since(Instant::now());
            if rung || left.is_zero() {
                return None;
            }
            thread::park_timeout(left);
        }
    }

    /// The messages that are there.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> impl Iterator<Item = Inbox> + '_ {
        self.receiver.try_iter()
    }
}

/// One message.
pub(crate) enum Inbox {
    /// The guest did something.
    Machine(MachineEvent),
    /// The sender thread of a link did something.
    Sender(Link, SenderReport),
    /// The standby wants chunks of a disk.
    DiskWant(Link, DiskWant),
    /// The standby has compared pages.
    Audited(Audited),
    /// The standby says whether it sees the arbiter.
    StandbySees(Link, ArbiterSight),
    /// The standby says whether it reaches the clients' network.
    StandbyReaches(Link, Option<bool>),
    /// The standby has compared chunks of disks.
    DiskAudited(DiskAudited),
    /// The thread that hashes disks for the self-check is done.
    DisksHashed(Hashed),
    /// What the guest's disk boots, for the restart of this number.
    BootRead(u64, Result<Box<FromDisk>, BootDiskError>),
    /// How far the disks are in the base synchronisation.
    DiskSync(Link, SyncReport),
    /// Begin base synchronisation.
    StartBase(Accepted),
    /// The link is no longer useful: end the protection that used it.
    Detached(Link),
    /// Log this.
    Note(PrimaryNote),
    /// Check again: something that the coordinator waits for may have come.
    Wake,
    /// Ask the guest to shut itself down.
    AskGuest,
    /// Stop the vCPUs for good.
    StopGuest,
    /// The VM is left to its standby, because this is broken here.
    GiveAway(Broken),
    /// The way to the guest's clients is lost, and why; or it is there again; or nothing tells.
    Network(Sight),
    /// The VM stays although this is broken.
    Endure(Broken, Kept),
    /// The operator wants the VM at its standby, and waits for the answer.
    HandOver(Asked),
    /// It is being handed over to it.
    HandsOver,
    /// All of it is committed there.
    LetGo,
    /// It stays.
    Keeps(Kept),
    /// End the process.
    Exit(ExitReason),
    /// The operator wants the VM stopped.
    Stop(&'static str),
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Much longer than any test.
    const LONG: Duration = Duration::from_secs(600);

    #[test]
    fn a_ring_ends_a_wait_and_is_not_lost_before_it() {
        let (queue, messages) = inbox();
        queue.bell().ring();
        queue.bell().ring();
        assert!(messages.next_within(LONG).is_none());
        let bell = queue.bell();
        let ringer = thread::spawn(move || bell.ring());
        assert!(messages.next_within(LONG).is_none());
        ringer.join().unwrap();
        assert!(messages.next_within(Duration::ZERO).is_none());
    }

    #[test]
    fn every_message_of_many_threads_comes() {
        const EACH: usize = 2000;
        let (queue, messages) = inbox();
        let senders: Vec<_> = (0..3)
            .map(|_| {
                let queue = queue.clone();
                thread::spawn(move || (0..EACH).for_each(|_| queue.send(Inbox::AskGuest).unwrap()))
            })
            .collect();
        let mut came = 0;
        while came < 3 * EACH {
            // A message that nobody is woken for would be waited for until the test's end.
            came += usize::from(messages.next_within(LONG).is_some());
        }
        senders.into_iter().for_each(|sender| sender.join().unwrap());
        drop(messages);
        assert!(queue.send(Inbox::AskGuest).is_err());
    }
}
