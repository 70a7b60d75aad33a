//! `outlive hand-over`: an operator moves the VM to its standby, for example to empty this host.
//!
//! The VM runs until its last checkpoint here, and stands still from then on. Once the standby has committed that and the
//! output before it has left, the link closes, and the standby takes the VM over; this process keeps it until the arbiter
//! has said who has it. If the standby does not come, the VM goes on here, where it stood still. If it does, the memory
//! stays here for the standby that this process is next (`vm/kept.rs`). This file asks them, and tells the operator what became of it.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use outlive_pair::{Kept, PrimaryEvent};

use super::coordinator::Coordinator;
use super::inbox::{Inbox, Queue};
use crate::events::Event;
use crate::strays::Following;

/// How long a process that ends next waits until its answer is written.
const LAST_WORD: Duration = Duration::from_millis(500);

/// Why the VM was not handed over.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HandOverError {
    /// It stays, and nothing was changed.
    #[error("the VM stays here: {0}")]
    Keeps(Kept),
    /// Somebody else has asked.
    #[error("another hand-over is under way")]
    UnderWay,
    /// Nobody came.
    #[error(
        "the standby did not take the VM over, so it goes on here; it is unprotected until a standby has a new copy"
    )]
    NotTaken,
    /// The VM has ended meanwhile.
    #[error("the VM has ended meanwhile")]
    Ended,
    /// There is no answer yet.
    #[error(
        "it is not known yet which host has the VM: the arbiter does not answer; `outlive status` shows it"
    )]
    NoAnswer,
}

/// What an operator is told: who has the VM, or why it stays.
type Answer = Result<String, HandOverError>;

/// An operator who waits.
pub(crate) struct Asked {
    answer: Sender<Answer>,
    /// Ends when the answer is written.
    written: Receiver<()>,
}

/// The other end. While it exists, the process that has answered does not end at once.
pub(crate) struct Waiting {
    answer: Receiver<Answer>,
    _writing: Sender<()>,
}

/// Asks the coordinator to hand the VM over.
///
/// # Errors
/// [`HandOverError::Ended`].
pub(crate) fn ask(coordinator: &Queue) -> Result<Waiting, HandOverError> {
    let (answer, answers) = channel();
    let (writing, written) = channel();
    coordinator.send(Inbox::HandOver(Asked { answer, written })).map_err(|_| HandOverError::Ended)?;
    Ok(Waiting { answer: answers, _writing: writing })
}

impl Waiting {
    /// What became of it, if that is known in time.
    ///
    /// # Errors
    /// See [`HandOverError`].
    pub(crate) fn answer(&self, patience: Duration) -> Answer {
        match self.answer.recv_timeout(patience) {
            Ok(answer) => answer,
            Err(RecvTimeoutError::Timeout) => Err(HandOverError::NoAnswer),
            Err(RecvTimeoutError::Disconnected) => Err(HandOverError::Ended),
        }
    }
}

/// A hand-over that is under way.
pub(super) struct UnderWay {
    asked: Asked,
    began: Instant,
    /// Frames that come too late for this host follow the guest.
    strays: Option<Following>,
}

/// One that is over; somebody has won.
pub(super) struct Over {
    asked: Asked,
    took: Duration,
}

impl UnderWay {
    /// It is known who has the VM.
    pub(super) fn ended(self) -> Over {
        Over { asked: self.asked, took: self.began.elapsed() }
    }
}

impl Over {
    /// Tells the operator. The last that this process does with its VM.
    pub(super) fn to(self, generation: u64, owner: &str) {
        let ms = self.took.as_millis();
        let text = format!("handed over: {owner} has the VM in generation {generation}, after {ms} ms");
        // The process may end next. Whoever has asked may be gone, and may read slowly.
        if self.asked.answer.send(Ok(text)).is_ok() {
            let _ = self.asked.written.recv_timeout(LAST_WORD);
        }
    }
}

impl Coordinator {
    /// The operator wants the VM at its standby.
    pub(super) fn hand_over(&mut self, asked: Asked) {
        if self.hand_over.is_some() {
            // This thread waits for nobody who asks.
            let _ = asked.answer.send(Err(HandOverError::UnderWay));
            return;
        }
        self.hand_over = Some(UnderWay { asked, began: Instant::now(), strays: None });
        self.look_at_shared_now();
        self.with.driver.handle(PrimaryEvent::HandOver);
    }

    /// It is left to it. This process keeps it until the arbiter has said who has it.
    pub(super) fn hands_over(&mut self) {
        tracing::info!(
            "an operator hands the VM over: it stands still after its next checkpoint, and is kept until its standby has it"
        );
        self.with.events.emit(Event::HandOver { kept: None });
        // Its standby is let ahead for seconds, and usually has it within milliseconds.
        self.with.rivals.iter().for_each(|rivals| rivals.hurry(true));
    }

    /// The standby has all of it. What is committed leaves first: it would be lost with the VM here.
    pub(super) fn let_vm_go(&mut self) {
        self.with.driver.finish_output();
        self.output_leaves();
    }

    /// All of it has left.
    pub(super) fn vm_has_left(&mut self) {
        // From here on frames for the guest come too late for this host, and its queues are nobody's.
        let strays = self.send_strays_after();
        if let Some(under_way) = &mut self.hand_over {
            under_way.strays = strays;
        }
        self.with.driver.handle(PrimaryEvent::OutputLeft);
    }

    /// It stays.
    pub(super) fn keeps(&mut self, why: Kept) {
        tracing::warn!("an operator wants to hand the VM over, and it stays here: {why}");
        self.with.events.emit(Event::HandOver { kept: Some(why.to_string()) });
        if let Some(under_way) = self.hand_over.take() {
            let _ = self.undo(under_way).answer.send(Err(HandOverError::Keeps(why)));
        }
    }

    /// The VM goes on here.
    pub(super) fn not_handed_over(&mut self) {
        let Some(under_way) = self.hand_over.take() else { return };
        let asked = self.undo(under_way);
        let why = HandOverError::NotTaken;
        tracing::warn!("{why}");
        self.with.events.emit(Event::HandOver { kept: Some(why.to_string()) });
        let _ = asked.answer.send(Err(why));
    }

    /// What was begun for a hand-over that is not taken.
    fn undo(&mut self, under_way: UnderWay) -> Asked {
        // What has followed is lost, and this host's own card has the queues again.
        under_way.strays.iter().for_each(Following::stop);
        self.shared.forget_hand_over();
        self.with.rivals.iter().for_each(|rivals| rivals.hurry(false));
        under_way.asked
    }
}
