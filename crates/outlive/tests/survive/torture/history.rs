//! Whether the clients' answers can have happened in one order: linearizability of single keys.
//!
//! A *register* is written and read, and no value is written twice. Then each value and its reads form a
//! cluster, and the first end and the last start of a cluster's operations decide the question (P. Gibbons,
//! E. Korach: Testing Shared Memories, 1997; in the form of W. Golab, X. Li, M. Shah: Analyzing Consistency
//! Properties for Fun and Profit, 2011). A *counter* returns its new value to each client that adds to it;
//! that value is the place of the operation in the order.
//!
//! An operation without an answer may have happened at any time after it was sent, or never.

use std::collections::BTreeMap;
use std::fmt;

/// One operation of a client on a key. Times are of one clock, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Operation {
    pub(super) what: What,
    /// When it was sent.
    pub(super) start: u64,
    /// When its answer came, if it did.
    pub(super) end: Option<u64>,
}

/// The request and, for reads and additions, the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum What {
    Write(u64),
    /// 0 for a key that nobody has written.
    Read(u64),
    /// The counter's new value. Without an answer it has no meaning.
    Add(u64),
}

/// What is wrong with a history.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Something acknowledged is gone.
    Lost(String),
    /// Something happened that nobody asked for, or twice.
    Doubled(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Lost(what) => write!(f, "lost: {what}"),
            Fault::Doubled(what) => write!(f, "doubled: {what}"),
        }
    }
}

/// A value with its operations.
#[derive(Clone, Copy, Debug)]
struct Cluster {
    written: (u64, u64),
    answered: bool,
    /// The first end and the last start of its operations.
    first_end: u64,
    last_start: u64,
}

/// Judges a register.
pub(super) fn judge_register(operations: &[Operation]) -> Result<(), Fault> {
    let clusters = clusters(operations)?;
    // If one operation with a value ended before another one began, the value lasted from that end to that
    // start: the register cannot have held anything else in this time.
    let mut lasting: Vec<(u64, u64, u64)> = Vec::new();
    let mut passing = Vec::new();
    for (&value, cluster) in clusters.iter().filter(|(_, cluster)| cluster.answered) {
        let (end, start) = (cluster.first_end, cluster.last_start);
        if end < start { lasting.push((end, start, value)) } else { passing.push((start, end, value)) }
    }
    lasting.sort_unstable();
    for pair in lasting.windows(2) {
        let ((_, until, one), (from, _, other)) = (pair[0], pair[1]);
        if from < until {
            return Err(Fault::Lost(format!("{one} was there until {until}, but {other} from {from} on")));
        }
    }
    for (from, until, value) in passing {
        let next = lasting.partition_point(|&(start, _, _)| start < from);
        if let Some(&(_, end, other)) = next.checked_sub(1).map(|at| &lasting[at])
            && until < end
        {
            return Err(Fault::Lost(format!("{value} was there while {other} was, from {from} to {until}")));
        }
    }
    Ok(())
}

fn clusters(operations: &[Operation]) -> Result<BTreeMap<u64, Cluster>, Fault> {
    let begin = Cluster { written: (0, 0), answered: true, first_end: 0, last_start: 0 };
    let mut clusters = BTreeMap::from([(0, begin)]);
    for operation in operations {
        if let What::Write(value) = operation.what {
            let (start, end) = (operation.start, operation.end.unwrap_or(u64::MAX));
            let answered = operation.end.is_some();
            let new = Cluster { written: (start, end), answered, first_end: end, last_start: start };
            assert!(clusters.insert(value, new).is_none(), "{value} is written twice");
        }
    }
    for operation in operations {
        let (What::Read(value), Some(end)) = (operation.what, operation.end) else { continue };
        let Some(cluster) = clusters.get_mut(&value) else {
            return Err(Fault::Doubled(format!("{value} was read, and nobody wrote it: {operation:?}")));
        };
        if end < cluster.written.0 {
            return Err(Fault::Doubled(format!("{value} was read before it was written: {operation:?}")));
        }
        cluster.answered = true;
        cluster.first_end = cluster.first_end.min(end);
        cluster.last_start = cluster.last_start.max(operation.start);
    }
    Ok(clusters)
}

/// Judges a counter.
pub(super) fn judge_counter(operations: &[Operation]) -> Result<(), Fault> {
    // A read returns what the next addition would have returned, had it added nothing.
    let mut told: Vec<(u64, bool, u64, u64)> = Vec::new();
    let mut open = Vec::new();
    for operation in operations {
        match (operation.what, operation.end) {
            (What::Add(value), Some(end)) => told.push((value, false, operation.start, end)),
            (What::Add(_), None) => open.push(operation.start),
            (What::Read(value), Some(end)) => told.push((value, true, operation.start, end)),
            _ => {}
        }
    }
    told.sort_unstable();
    open.sort_unstable();
    // From the last to the first: an operation later in the order cannot have ended earlier.
    let mut soonest = u64::MAX;
    let mut gaps = Vec::new();
    for (at, &(value, read, start, end)) in told.iter().enumerate().rev() {
        if soonest < start {
            return Err(Fault::Lost(format!("{value} was told after a larger one had been")));
        }
        let before = at.checked_sub(1).map(|at| told[at]);
        let known = before.map_or(0, |it| it.0);
        if !read && before.is_some_and(|it| it.0 == value && !it.1) {
            return Err(Fault::Lost(format!("{value} was told twice")));
        }
        soonest = soonest.min(end);
        let top = if read { value } else { value.saturating_sub(1) };
        gaps.extend((known + 1..=top).rev().map(|gap| (gap, soonest)));
    }
    // Each value that no client was told belongs to an operation without an answer that was requested before
    // the next value was returned. The earliest request takes the first.
    let mut open = open.into_iter();
    for (gap, until) in gaps.into_iter().rev() {
        if open.next().is_none_or(|start| until < start) {
            return Err(Fault::Doubled(format!("{gap} was left out, and nobody waits for its answer")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn told(what: What, start: u64, end: u64) -> Operation {
        Operation { what, start, end: Some(end) }
    }

    fn open(what: What, start: u64) -> Operation {
        Operation { what, start, end: None }
    }

    use What::{Add, Read, Write};

    #[test]
    fn what_overlaps_may_be_seen_in_any_order_but_only_once() {
        let one = [told(Write(1), 1, 9), told(Write(2), 2, 8), told(Read(1), 10, 11)];
        assert_eq!(judge_register(&one), Ok(()));
        let both = [one[0], one[1], one[2], told(Read(2), 12, 13)];
        assert!(matches!(judge_register(&both), Err(Fault::Lost(_))));
    }

    #[test]
    fn a_lost_write_is_found_by_a_read_of_the_one_before() {
        let history = [told(Write(1), 1, 2), told(Write(2), 3, 4), told(Read(1), 5, 6)];
        assert!(matches!(judge_register(&history), Err(Fault::Lost(_))));
        assert!(matches!(judge_register(&[told(Write(1), 1, 2), told(Read(0), 3, 4)]), Err(Fault::Lost(_))));
    }

    #[test]
    fn an_open_write_may_appear_late_or_never_but_not_vanish_again() {
        let before = [told(Write(1), 1, 2), open(Write(2), 3), told(Read(1), 5, 6)];
        assert_eq!(judge_register(&before), Ok(()));
        let after = [before[0], before[1], before[2], told(Read(2), 7, 8)];
        assert_eq!(judge_register(&after), Ok(()));
        let gone = [after[0], after[1], after[2], after[3], told(Read(1), 9, 10)];
        assert!(judge_register(&gone).is_err());
        assert!(matches!(judge_register(&[told(Read(7), 1, 2)]), Err(Fault::Doubled(_))));
        assert!(matches!(judge_register(&[told(Read(2), 1, 2), open(Write(2), 3)]), Err(Fault::Doubled(_))));
    }

    #[test]
    fn a_counter_tells_each_number_once_and_in_order() {
        assert_eq!(judge_counter(&[told(Add(2), 1, 9), told(Add(1), 2, 8), told(Read(2), 10, 11)]), Ok(()));
        let twice = [told(Add(1), 1, 2), told(Add(1), 3, 4)];
        assert!(matches!(judge_counter(&twice), Err(Fault::Lost(_))));
        let backwards = [told(Add(2), 1, 2), told(Add(1), 3, 4)];
        assert!(matches!(judge_counter(&backwards), Err(Fault::Lost(_))));
        let gap = [told(Add(1), 1, 2), told(Add(3), 3, 4)];
        assert!(matches!(judge_counter(&gap), Err(Fault::Doubled(_))));
        let explained = [gap[0], gap[1], open(Add(0), 2)];
        assert_eq!(judge_counter(&explained), Ok(()));
        let too_late = [gap[0], gap[1], open(Add(0), 5)];
        assert!(matches!(judge_counter(&too_late), Err(Fault::Doubled(_))));
        let read = [told(Add(1), 1, 2), told(Read(2), 3, 4)];
        assert!(matches!(judge_counter(&read), Err(Fault::Doubled(_))));
        assert!(matches!(judge_counter(&[told(Add(1), 1, 2), told(Read(0), 3, 4)]), Err(Fault::Lost(_))));
    }

    /// Tries every order.
    fn possible(left: &[Operation], state: u64) -> bool {
        if left.iter().all(|it| it.end.is_none()) {
            return true;
        }
        let soonest = left.iter().filter_map(|it| it.end).min().unwrap_or(u64::MAX);
        (0..left.len()).any(|at| {
            let first = left[at];
            let next = match first.what {
                Write(value) => Some(value),
                Read(value) => (first.end.is_none() || value == state).then_some(state),
                Add(value) => (first.end.is_none() || value == state + 1).then_some(state + 1),
            };
            let rest: Vec<Operation> = [&left[..at], &left[at + 1..]].concat();
            first.start <= soonest && next.is_some_and(|next| possible(&rest, next))
        })
    }

    fn history(of_register: bool) -> impl Strategy<Value = Vec<Operation>> {
        let operation = (0..3u64, 0..5u64, 1..12u64, 1..8u64, prop::bool::weighted(0.2));
        prop::collection::vec(operation, 0..7).prop_map(move |drawn| {
            let make = |(at, (kind, value, start, length, open)): (usize, (u64, u64, u64, u64, bool))| {
                let what = match kind {
                    0 => Read(value),
                    _ if of_register => Write(at as u64 + 1),
                    _ => Add(value.max(1)),
                };
                Operation { what, start, end: (!open).then_some(start + length) }
            };
            drawn.into_iter().enumerate().map(make).collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, cases: 4000, ..ProptestConfig::default() })]

        #[test]
        fn a_register_is_judged_as_by_trying_every_order(history in history(true)) {
            prop_assert_eq!(judge_register(&history).is_ok(), possible(&history, 0), "{:?}", history);
        }

        #[test]
        fn a_counter_is_judged_as_by_trying_every_order(history in history(false)) {
            prop_assert_eq!(judge_counter(&history).is_ok(), possible(&history, 0), "{:?}", history);
        }
    }
}
