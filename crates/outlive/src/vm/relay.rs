//! A channel whose receiver comes later, or changes.
//!
//! From the moment when it is made, a machine reports events and an operator may want it stopped. The
//! coordinator that listens to both comes later, and at a takeover it is a different one.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Messages that are sent while no receiver is connected wait; the next receiver gets them first, in their
/// order. They are few: events of a machine that does not run yet, or an operator's stops.
pub(crate) struct Relay<T> {
    target: Arc<Mutex<Target<T>>>,
    used: Arc<AtomicBool>,
}

/// An operator's orders to stop, with the reason.
pub(crate) type Stops = Relay<&'static str>;

enum Target<T> {
    Waiting(VecDeque<T>),
    Connected(Box<dyn Fn(T) + Send>),
}

impl<T: Send + 'static> Relay<T> {
    /// A relay without a receiver.
    pub(crate) fn new() -> Self {
        Self { target: Arc::new(Mutex::new(Target::Waiting(VecDeque::new()))), used: Arc::default() }
    }

    /// Hands a message to the receiver, or keeps it until there is one. Blocks no longer than the receiver
    /// does.
    pub(crate) fn send(&self, message: T) {
        self.used.store(true, Ordering::Release);
        match &mut *self.lock() {
            Target::Waiting(waiting) => waiting.push_back(message),
            // Under the lock, so that a message does not overtake one that waited.
            Target::Connected(to) => to(message),
        }
    }

    /// Hands everything to `to` from now on, waiting messages first. The previous receiver gets nothing more.
    pub(crate) fn connect(&self, to: impl Fn(T) + Send + 'static) {
        let mut target = self.lock();
        if let Target::Waiting(waiting) = &mut *target {
            waiting.drain(..).for_each(&to);
        }
        *target = Target::Connected(Box::new(to));
    }

    /// From now on messages wait for the next receiver.
    pub(crate) fn disconnect(&self) {
        *self.lock() = Target::Waiting(VecDeque::new());
    }

    /// Whether anything was ever sent.
    pub(crate) fn was_used(&self) -> bool {
        self.used.load(Ordering::Acquire)
    }

    /// [`send`](Self::send) as a function, for a sender.
    pub(crate) fn sender(&self) -> impl Fn(T) + Send + Sync + Clone + use<T> {
        let relay = self.clone();
        move |message| relay.send(message)
    }

    fn lock(&self) -> MutexGuard<'_, Target<T>> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Clone for Relay<T> {
    fn clone(&self) -> Self {
        Self { target: self.target.clone(), used: self.used.clone() }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use super::*;

    fn listen(relay: &Relay<u8>) -> Receiver<u8> {
        let (to, from) = channel();
        relay.connect(move |number| to.send(number).unwrap());
        from
    }

    fn heard(from: &Receiver<u8>) -> Vec<u8> {
        from.try_iter().collect()
    }

    #[test]
    fn what_comes_early_waits_and_keeps_its_order() {
        let relay = Relay::new();
        relay.send(1);
        relay.sender()(2);
        let first = listen(&relay);
        relay.send(3);
        assert_eq!(heard(&first), [1, 2, 3]);
    }

    #[test]
    fn nothing_is_lost_between_two_who_listen() {
        let relay = Relay::new();
        let first = listen(&relay);
        relay.send(1);
        relay.disconnect();
        relay.send(2);
        let second = listen(&relay);
        relay.send(3);
        assert_eq!(heard(&first), [1]);
        assert_eq!(heard(&second), [2, 3]);
    }

    #[test]
    fn who_connects_takes_over_from_the_one_before() {
        let relay = Relay::new();
        // The first receiver's function is dropped, and with it the other end of its channel.
        let (first, second) = (listen(&relay), listen(&relay));
        relay.send(7);
        assert!(first.recv().is_err());
        assert_eq!(heard(&second), [7]);
    }
}
