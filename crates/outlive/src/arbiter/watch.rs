//! The arbiter is probed by writing while all is well, so that its loss is known before it is needed.
//!
//! A probe can hang for as long as a dead file server pleases, so it has a thread of its own, and another one
//! says when it takes too long. Nobody waits for either, and nothing is decided by what they find. A claim that is
//! answered tells as much as a probe.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use outlive_epoch::ArbiterSight;

use super::{Arbiter, ArbiterError, Prober};
use crate::events::{Event, EventWriter};
use crate::link::LinkKind;

/// Time between two probes.
const EVERY: Duration = Duration::from_secs(10);
/// A probe that takes longer is a loss.
const PATIENCE: Duration = Duration::from_secs(5);
/// A loss that lasts is told of again after this time.
const AGAIN: Duration = Duration::from_secs(60);

/// What is known of the arbiter.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sight {
    /// When it was last written to.
    pub(crate) seen: Option<SystemTime>,
    /// Why it is lost, if it is.
    pub(crate) lost: Option<String>,
    /// Since when.
    pub(crate) lost_since: Option<SystemTime>,
    /// It is a person, who must be asked.
    pub(crate) is_a_person: bool,
    /// What protects the way to it, if there is one.
    pub(crate) link: Option<LinkKind>,
}

/// What this host is to the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Here {
    /// It runs here.
    Runs,
    /// It may be taken over here. Whether its primary still lives is unknown.
    Waits,
}

/// A watch over an arbiter. It ends when this is dropped.
pub(crate) struct Watch {
    known: Arc<Known>,
    is_a_person: bool,
    link: Option<LinkKind>,
    _ends: Sender<()>,
}

impl Watch {
    /// Begins, with a probe at once. The loss and the return are told as events and in the log.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn start(arbiter: &dyn Arbiter, events: EventWriter, here: Here) -> io::Result<Self> {
        let watch = Self::with(arbiter.prober(), events, here, (EVERY, PATIENCE))?;
        Ok(Self { is_a_person: arbiter.is_a_person(), link: arbiter.link(), ..watch })
    }

    fn with(
        mut prober: Prober,
        events: EventWriter,
        here: Here,
        (every, patience): (Duration, Duration),
    ) -> io::Result<Self> {
        let ((ask, asked), (answer, answers), (end, ended)) = (channel(), channel(), channel());
        let runs_here = AtomicBool::new(here == Here::Runs);
        let known = Arc::new(Known { state: Mutex::default(), runs_here, events });
        outlive_machine::spawn("arbiter-probe", move || {
            while asked.recv().is_ok() && answer.send(prober()).is_ok() {}
        })?;
        let watched = known.clone();
        outlive_machine::spawn("arbiter-watch", move || {
            watched.run(&ask, &answers, &ended, (every, patience));
        })?;
        Ok(Self { known, is_a_person: false, link: None, _ends: end })
    }

    /// This host has become something else to the VM.
    pub(crate) fn is_now(&self, here: Here) {
        self.known.runs_here.store(here == Here::Runs, Ordering::Relaxed);
    }

    /// What is known now.
    pub(crate) fn sight(&self) -> Sight {
        Sight { is_a_person: self.is_a_person, link: self.link, ..self.known.state().sight.clone() }
    }

    /// What the other host is told.
    pub(crate) fn for_the_peer(&self) -> ArbiterSight {
        let state = self.known.state();
        match (state.lost_at, state.sight.seen) {
            (Some(at), _) => {
                ArbiterSight::Lost { for_s: at.elapsed().as_secs().try_into().unwrap_or(u32::MAX) }
            }
            (None, Some(_)) => ArbiterSight::Seen,
            (None, None) => ArbiterSight::Unknown,
        }
    }

    /// The arbiter has answered a claim: nobody need wait for the next probe to know that it is there.
    pub(crate) fn answered(&self) {
        self.known.seen();
    }
}

/// What is known, and whoever is told of it.
struct Known {
    state: Mutex<State>,
    runs_here: AtomicBool,
    events: EventWriter,
}

#[derive(Default)]
struct State {
    sight: Sight,
    lost_at: Option<Instant>,
    /// When the loss was told of last.
    told: Option<Instant>,
}

impl Known {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(
        &self,
        ask: &Sender<()>,
        answers: &Receiver<Result<(), ArbiterError>>,
        ended: &Receiver<()>,
        (every, patience): (Duration, Duration),
    ) {
        while ask.send(()).is_ok() {
            let answer = loop {
                match answers.recv_timeout(patience) {
                    Ok(answer) => break answer,
                    Err(RecvTimeoutError::Timeout) => {
                        self.lost(format!("it has not answered for {} s", patience.as_secs()));
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                }
                if ended.try_recv() == Err(std::sync::mpsc::TryRecvError::Disconnected) {
                    return;
                }
            };
            match answer {
                Ok(()) => self.seen(),
                Err(error) => self.lost(error.to_string()),
            }
            if ended.recv_timeout(every) != Err(RecvTimeoutError::Timeout) {
                return;
            }
        }
    }

    fn seen(&self) {
        let sight = Sight { seen: Some(SystemTime::now()), ..Sight::default() };
        let before = std::mem::replace(&mut *self.state(), State { sight, ..State::default() });
        if let Some(since) = before.lost_at {
            let lost_ms = since.elapsed().as_millis() as u64;
            tracing::warn!(lost_ms, "the arbiter is back");
            self.events.emit(Event::ArbiterBack { lost_ms });
        }
    }

    fn lost(&self, why: String) {
        let (first, again) = {
            let mut state = self.state();
            state.sight.lost = Some(why.clone());
            state.sight.lost_since.get_or_insert_with(SystemTime::now);
            let first = state.lost_at.is_none();
            state.lost_at.get_or_insert_with(Instant::now);
            let again = state.told.is_none_or(|told| told.elapsed() >= AGAIN);
            if again {
                state.told = Some(Instant::now());
            }
            (first, again)
        };
        if again {
            tracing::warn!("THE ARBITER IS LOST: {}: {why}", consequence(here(&self.runs_here)));
        }
        if first {
            self.events.emit(Event::ArbiterLost { why });
        }
    }
}

fn here(runs_here: &AtomicBool) -> Here {
    if runs_here.load(Ordering::Relaxed) { Here::Runs } else { Here::Waits }
}

/// What the loss means to this host.
fn consequence(here: Here) -> &'static str {
    match here {
        Here::Runs => "the VM runs on, but could not go on alone here now",
        Here::Waits => "this standby cannot take the VM over now",
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::arbiter::{DirectoryFault, FileArbiter};

    const SOON: Duration = Duration::from_millis(2);
    const BOUND: Duration = Duration::from_secs(60);

    fn wait_for(what: &str, until: impl Fn() -> bool) {
        let deadline = Instant::now() + BOUND;
        while !until() {
            assert!(Instant::now() < deadline, "waited in vain for {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Events as they come.
    fn observed() -> (EventWriter, Receiver<Event>) {
        let (events, (told, heard)) = (EventWriter::disabled(), channel());
        let told = Mutex::new(told);
        events.observe(move |event| drop(lock_sender(&told).send(event.clone())));
        (events, heard)
    }

    fn lock_sender(told: &Mutex<Sender<Event>>) -> MutexGuard<'_, Sender<Event>> {
        told.lock().unwrap()
    }

    #[test]
    fn a_directory_that_goes_away_and_comes_back_is_told_of() {
        let directory = tempfile::tempdir().unwrap();
        let (place, away) = (directory.path().join("arbiter"), directory.path().join("away"));
        std::fs::create_dir(&place).unwrap();
        let (arbiter, _) = FileArbiter::init(&place).unwrap();
        let (events, heard) = observed();
        let watch = Watch::with(arbiter.prober(), events, Here::Waits, (SOON, BOUND)).unwrap();
        wait_for("the first probe", || watch.sight().seen.is_some());
        assert!(heard.try_recv().is_err(), "while all is well nothing is said");
        std::fs::rename(&place, &away).unwrap();
        assert!(matches!(heard.recv_timeout(BOUND).unwrap(), Event::ArbiterLost { why } if !why.is_empty()));
        // Another directory in its place is not the arbiter.
        std::fs::create_dir(&place).unwrap();
        std::thread::sleep(SOON * 10);
        assert!(watch.sight().lost.is_some());
        std::fs::remove_dir(&place).unwrap();
        // The marker, and the file of a probe if the directory went away between its two steps.
        let files = |place: &Path| std::fs::read_dir(place).unwrap().count();
        let before = files(&away);
        std::fs::rename(&away, &place).unwrap();
        assert!(matches!(heard.recv_timeout(BOUND).unwrap(), Event::ArbiterBack { .. }), "told once each");
        assert_eq!(watch.sight().lost, None);
        drop(watch);
        wait_for("probes leave nothing behind", || files(&place) == before);
    }

    #[test]
    fn a_probe_that_hangs_is_a_loss_and_holds_nobody_up() {
        let (go, gate) = channel::<()>();
        let gone =
            |_| ArbiterError::Directory { directory: "/arbiter".into(), fault: DirectoryFault::ClaimGone };
        let prober: Prober = Box::new(move || gate.recv().map_err(gone));
        let (events, heard) = observed();
        let watch = Watch::with(prober, events, Here::Waits, (SOON, SOON * 5)).unwrap();
        assert!(
            matches!(heard.recv_timeout(BOUND).unwrap(), Event::ArbiterLost { why } if why.contains("answered"))
        );
        go.send(()).unwrap();
        assert!(matches!(heard.recv_timeout(BOUND).unwrap(), Event::ArbiterBack { .. }));
        // With a probe under way: no waiting.
        drop(watch);
    }

    /// The next probe may be seconds away.
    #[test]
    fn a_claim_that_is_answered_ends_a_loss() {
        let prober: Prober = Box::new(|| {
            Err(ArbiterError::Directory { directory: "/arbiter".into(), fault: DirectoryFault::ClaimGone })
        });
        let (events, heard) = observed();
        let watch = Watch::with(prober, events, Here::Runs, (BOUND, BOUND)).unwrap();
        assert!(matches!(heard.recv_timeout(BOUND).unwrap(), Event::ArbiterLost { .. }));
        assert!(matches!(watch.for_the_peer(), ArbiterSight::Lost { for_s: 0..=60 }));
        assert!(watch.sight().lost_since.is_some());
        watch.answered();
        assert!(matches!(heard.recv_timeout(BOUND).unwrap(), Event::ArbiterBack { .. }));
        let sight = watch.sight();
        assert!(sight.lost.is_none() && sight.lost_since.is_none() && sight.seen.is_some());
        assert_eq!(watch.for_the_peer(), ArbiterSight::Seen);
    }

    /// A standby does not know whether its primary lives, so it says nothing of the VM until it runs it.
    #[test]
    fn a_loss_means_something_else_to_each_host() {
        let prober: Prober = Box::new(|| Ok(()));
        let watch = Watch::with(prober, EventWriter::disabled(), Here::Waits, (SOON, BOUND)).unwrap();
        assert!(!consequence(here(&watch.known.runs_here)).contains("runs on"));
        watch.is_now(Here::Runs);
        assert!(consequence(here(&watch.known.runs_here)).contains("the VM runs on"));
    }
}
