//! Tests of the valve, and helpers for tests of its outputs.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use super::*;

/// How many more times a lease holds.
pub(crate) struct Times {
    left: AtomicUsize,
    asked: AtomicUsize,
}

impl Times {
    /// A lease that holds as many times as [`set`](Self::set) says; at first always.
    pub(crate) fn lease() -> (Arc<Self>, Lease) {
        let times = Arc::new(Self { left: AtomicUsize::new(usize::MAX), asked: AtomicUsize::new(0) });
        let asked = times.clone();
        let lease =
            Lease::with_clock(move || if asked.ask() { Duration::ZERO } else { Duration::from_secs(2) });
        lease.set(Some(Duration::from_secs(1)));
        (times, lease)
    }

    /// From now on it holds this many times.
    pub(crate) fn set(&self, times: usize) {
        self.left.store(times, Ordering::SeqCst);
        self.asked.store(0, Ordering::SeqCst);
    }

    /// How often it was asked since then.
    pub(crate) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    fn ask(&self) -> bool {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok()
    }
}

fn permit(mode: OutputMode) -> (Permit, Arc<Times>) {
    let (times, lease) = Times::lease();
    (Permit::new(mode, lease), times)
}

fn fate(permit: &Permit, tag: Tag) -> Fate {
    permit.fate(permit.order(), tag)
}

#[test]
fn output_waits_for_the_commit_of_its_epoch() {
    let (permit, _) = permit(OutputMode::Hold);
    permit.hold(5);
    let five = permit.tag();
    permit.commit(u64::MAX);
    assert_eq!(fate(&permit, five), Fate::Waits, "an epoch that runs cannot be committed");
    permit.begin(6);
    assert_eq!(fate(&permit, five), Fate::Waits, "such a commit is not remembered either");
    let six = permit.tag();
    permit.commit(4);
    assert_eq!(fate(&permit, five), Fate::Waits);
    permit.commit(5);
    permit.commit(3);
    assert_eq!([five, six].map(|tag| fate(&permit, tag)), [Fate::Leaves, Fate::Waits]);
    permit.begin(5);
    assert_eq!(fate(&permit, permit.tag()), Fate::Waits, "an epoch that begins again is not committed");
}

#[test]
fn what_was_let_out_before_a_hold_still_leaves_and_nothing_else() {
    let (permit, _) = permit(OutputMode::PassThrough);
    let passed = permit.tag();
    permit.hold(7);
    assert_eq!([passed, permit.tag()].map(|tag| fate(&permit, tag)), [Fate::Leaves, Fate::Waits]);
    permit.begin(8);
    permit.commit(7);
    permit.hold(8);
    assert_eq!(fate(&permit, passed), Fate::Waits, "a hold that follows a hold begins anew");
}

#[test]
fn what_a_discard_has_caught_never_leaves() {
    let (permit, _) = permit(OutputMode::Hold);
    permit.hold(1);
    let before = permit.tag();
    permit.discard();
    let during = permit.tag();
    for again in [Permit::open, |permit: &Permit| permit.hold(2), Permit::discard, Permit::open] {
        again(&permit);
        permit.begin(3);
        permit.commit(u64::MAX);
        assert_eq!([before, during].map(|tag| fate(&permit, tag)), [Fate::Dropped; 2]);
        assert!(![before, during].iter().any(|tag| permit.allows(*tag)));
    }
    assert_eq!(fate(&permit, permit.tag()), Fate::Leaves);
}

/// A thread that drains has seen the end of the lease, but whoever decides has heard from the standby in
/// time.
#[test]
fn a_lease_that_is_renewed_takes_the_refusal_back() {
    let (permit, times) = permit(OutputMode::Hold);
    permit.hold(1);
    let tag = permit.tag();
    permit.begin(2);
    permit.commit(1);
    times.set(0);
    assert!(!permit.confirms(permit.order()));
    permit.renew(Some(Duration::from_secs(1)));
    assert_eq!(fate(&permit, tag), Fate::Waits, "a lease that has ended already renews nothing");
    times.set(usize::MAX);
    permit.renew(Some(Duration::from_secs(1)));
    assert_eq!(fate(&permit, tag), Fate::Leaves);
    assert!(permit.confirms(permit.order()));
}

#[test]
fn a_lease_that_has_ended_refuses_all_until_the_next_order() {
    let (permit, times) = permit(OutputMode::Hold);
    permit.hold(1);
    let tag = permit.tag();
    permit.begin(2);
    permit.commit(1);
    times.set(1);
    let order = permit.order();
    assert!(permit.confirms(order));
    assert!(!permit.confirms(order) && permit.order().is_refused());
    times.set(usize::MAX);
    assert_eq!(fate(&permit, tag), Fate::Waits);
    permit.open();
    assert_eq!(fate(&permit, tag), Fate::Leaves);
    times.set(0);
    assert!(permit.confirms(permit.order()) && permit.allows(tag), "what passes through has no lease");
    assert_eq!(times.asked(), 0);
    // A late refusal does not apply to an order that was given meanwhile.
    permit.hold(2);
    let stale = permit.order();
    permit.hold(2);
    assert!(!permit.confirms(stale) && !permit.order().is_refused());
}

#[test]
fn an_order_that_comes_between_two_looks_is_noticed() {
    let (permit, _) = permit(OutputMode::PassThrough);
    let order = permit.order();
    assert!(permit.confirms(order));
    permit.discard();
    permit.open();
    assert!(!permit.confirms(order), "the same mode, and another order");
}

#[test]
fn the_first_output_of_an_epoch_is_noted_and_told_once() {
    let clock = Arc::new(AtomicUsize::new(10));
    let lease = {
        let clock = clock.clone();
        Lease::with_clock(move || Duration::from_nanos(clock.fetch_add(1, Ordering::SeqCst) as u64))
    };
    let permit = Permit::new(OutputMode::PassThrough, lease);
    let told = Arc::new(AtomicUsize::new(0));
    let counts = told.clone();
    permit.on_held(move || {
        counts.fetch_add(1, Ordering::SeqCst);
    });
    let take = || {
        permit.note_held(permit.tag());
        permit.tell_held();
        (permit.held_since(), told.load(Ordering::SeqCst))
    };
    assert_eq!(take(), (None, 0), "it does not wait");
    permit.hold(1);
    permit.tag();
    permit.tell_held();
    assert_eq!((permit.held_since(), told.load(Ordering::SeqCst)), (None, 0), "nothing was taken");
    let at = |nanos| Some(Duration::from_nanos(nanos));
    assert_eq!([take(), take()], [(at(10), 1); 2]);
    permit.begin(2);
    assert_eq!((permit.held_since(), told.load(Ordering::SeqCst)), (None, 1));
    assert_eq!(take(), (at(11), 2));
    permit.discard();
    assert_eq!(take().1, 2, "it is dropped");
}

#[test]
fn an_epoch_does_not_begin_under_output_of_a_later_one() {
    struct Holds(u64);
    impl HeldOutput for Holds {
        fn newest_held(&self) -> Option<u64> {
            Some(self.0)
        }

        fn drain(&self) {}
    }
    let (permit, _) = permit(OutputMode::Hold);
    let valve =
        Valve::new(Arc::new(permit), vec![Arc::new(Holds(3)), Arc::new(Holds(7)), Arc::new(Holds(5))]);
    let error = EpochError { asked: 6, held: 7 };
    assert_eq!((valve.begin(6), valve.hold(6)), (Err(error), Err(error)));
    assert_eq!(valve.begin(7), Ok(()));
    valve.discard();
    assert_eq!(valve.hold(1), Ok(()), "what is discarded is not held");
}
