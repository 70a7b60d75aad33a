//! Events of the node: numbered, the last of them kept, so that a client that comes back misses none.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// How many events are kept.
pub(crate) const KEPT: usize = 1024;

/// From where a client follows. Each has room of its own: those from elsewhere keep nobody out who is here, and hosts keep no
/// operator out. Other clients of the API still find a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Follower {
    /// The socket of this host.
    Here,
    /// Another host.
    Host,
    /// An operator, from elsewhere.
    Operator,
}

impl Follower {
    /// The most that follow at a time.
    pub(crate) fn most(self) -> usize {
        match self {
            Self::Here => 32,
            Self::Host | Self::Operator => 16,
        }
    }
}

/// One event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// Its number, after the life of the node that it is of.
    pub(crate) id: String,
    /// When: RFC 3339, UTC.
    pub(crate) time: String,
    /// What kind of event, for programs.
    pub(crate) kind: String,
    /// The VM that it is about.
    pub(crate) vm: Option<String>,
    /// What happened, for people.
    pub(crate) text: String,
    /// More, for programs.
    pub(crate) data: Value,
}

/// All events.
#[derive(Debug)]
pub(crate) struct Feed {
    /// The life of this node. A later one counts anew.
    life: String,
    kept: Mutex<VecDeque<Arc<Entry>>>,
    newest: watch::Sender<u64>,
    /// For those here, of hosts and of operators.
    rooms: [Arc<Semaphore>; 3],
}

/// Events after a place in the feed.
#[derive(Debug)]
pub(crate) struct After {
    /// They follow each other from the place on; else some are lost.
    pub(crate) whole: bool,
    /// The events.
    pub(crate) entries: Vec<Arc<Entry>>,
    /// The number of the last one.
    pub(crate) last: u64,
}

impl Feed {
    pub(crate) fn new() -> Self {
        // Two lives of a node begin at different times.
        let began = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self {
            life: format!("{:x}", began.as_millis()),
            kept: Mutex::default(),
            newest: watch::Sender::new(0),
            rooms: [Follower::Here, Follower::Host, Follower::Operator]
                .map(|it| Arc::new(Semaphore::new(it.most()))),
        }
    }

    /// The life of this node.
    pub(crate) fn life(&self) -> &str {
        &self.life
    }

    /// A place for one who follows, if there is one.
    pub(crate) fn followers(&self, from: Follower) -> Option<OwnedSemaphorePermit> {
        self.rooms[from as usize].clone().try_acquire_owned().ok()
    }

    /// Tells everybody.
    pub(crate) fn tell(&self, kind: &str, vm: Option<&str>, text: String, data: Value) {
        tracing::info!(vm, "{text}");
        let mut kept = self.kept();
        let number = *self.newest.borrow() + 1;
        let (vm, kind) = (vm.map(str::to_owned), kind.to_owned());
        kept.push_back(Arc::new(Entry {
            id: self.id(number),
            time: crate::view::now(),
            kind,
            vm,
            text,
            data,
        }));
        if kept.len() > KEPT {
            kept.pop_front();
        }
        // Under the lock, so that whoever sees the number finds the event.
        self.newest.send_replace(number);
    }

    /// How an event of this number is called.
    pub(crate) fn id(&self, number: u64) -> String {
        format!("{}-{number}", self.life)
    }

    /// The number in an event's name; `None` if it is of another life, or no name.
    pub(crate) fn number(&self, id: &str) -> Option<u64> {
        let (life, number) = id.rsplit_once('-')?;
        let number = number.parse().ok()?;
        (life == self.life && number <= *self.newest.borrow()).then_some(number)
    }

    /// The newest number, and a way to wait for the next.
    pub(crate) fn follow(&self) -> watch::Receiver<u64> {
        self.newest.subscribe()
    }

    /// The events after this number.
    pub(crate) fn after(&self, number: u64) -> After {
        let kept = self.kept();
        let last = *self.newest.borrow();
        let wanted = last.saturating_sub(number) as usize;
        let entries: Vec<_> = kept.iter().skip(kept.len().saturating_sub(wanted)).cloned().collect();
        After { whole: entries.len() == wanted, entries, last }
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<Arc<Entry>>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_from_elsewhere_keep_nobody_out_who_is_here() {
        let feed = Feed::new();
        let all = |from| std::iter::from_fn(|| feed.followers(from)).take(100).collect::<Vec<_>>();
        let hosts = all(Follower::Host);
        let operators = all(Follower::Operator);
        assert_eq!((hosts.len(), operators.len()), (Follower::Host.most(), Follower::Operator.most()));
        assert_eq!(all(Follower::Here).len(), Follower::Here.most());
        drop(hosts);
        assert!(feed.followers(Follower::Operator).is_none() && feed.followers(Follower::Host).is_some());
    }

    #[test]
    fn a_place_is_found_again_or_known_to_be_lost() {
        let feed = Feed::new();
        let tell = |count: usize| (0..count).for_each(|it| feed.tell("k", None, it.to_string(), Value::Null));
        tell(3);
        let after = feed.after(1);
        assert!(after.whole && after.last == 3);
        assert_eq!(after.entries.iter().map(|it| it.text.as_str()).collect::<Vec<_>>(), ["1", "2"]);
        assert_eq!(feed.number(&feed.id(2)), Some(2));
        assert_eq!((feed.number("0-2"), feed.number("x"), feed.number(&feed.id(4))), (None, None, None));
        assert!(feed.after(3).entries.is_empty() && feed.after(3).whole);
        tell(KEPT);
        assert!(!feed.after(2).whole && feed.after(3).whole);
        assert_eq!(feed.after(0).entries.len(), KEPT);
    }
}
