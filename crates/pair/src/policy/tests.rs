//! Properties that hold for every course of pauses and facts.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

fn us(time: u64) -> Duration {
    Duration::from_micros(time)
}

fn all(interval: Duration, pages: u64) -> Policy {
    Policy::new(vec![
        Box::new(DirtyLogFull),
        Box::new(DiskLogFull),
        Box::new(DirtyTrigger::new(pages)),
        Box::new(Interval::new(interval)),
    ])
}

/// A separate policy with the rules that every VM has.
fn with(rules: Vec<Box<dyn Rule>>) -> Policy {
    let common: [Box<dyn Rule>; 3] =
        [Box::new(DirtyLogFull), Box::new(DiskLogFull), Box::new(DirtyTrigger::new(2000))];
    Policy::new(common.into_iter().chain(rules).collect())
}

/// One epoch: what the guest does, how late the coordinator wakes up, how long the pause is.
#[derive(Debug, Clone, Copy)]
struct Course {
    pages_per_us: u64,
    log_full_after: Option<u64>,
    disk_full_after: Option<u64>,
    /// When the guest sends something.
    held_after: Option<u64>,
    /// When it changes something.
    changes_after: Option<u64>,
    late: u64,
    pause: u64,
}

/// A guest that does nothing.
const QUIET: Course = Course {
    pages_per_us: 0,
    log_full_after: None,
    disk_full_after: None,
    held_after: None,
    changes_after: None,
    late: 0,
    pause: 50,
};

fn course() -> impl Strategy<Value = Course> {
    let sometimes = || prop::option::weighted(0.2, 0u64..3000);
    let often = || prop::option::of(0u64..3000);
    (0u64..8, sometimes(), sometimes(), often(), often(), 0u64..200, 20u64..4000).prop_map(
        |(pages_per_us, log_full_after, disk_full_after, held_after, changes_after, late, pause)| Course {
            pages_per_us,
            log_full_after,
            disk_full_after,
            held_after,
            changes_after,
            late,
            pause,
        },
    )
}

/// How one epoch went.
#[derive(Debug)]
struct Epoch {
    why: Why,
    ran: Duration,
    looks: u32,
}

/// Acts as a coordinator: asks, sleeps until the answer, until a log is full or until output is held, and
/// asks again.
fn run(policy: &mut Policy, resumed: Duration, course: Course) -> (Epoch, Pause) {
    let full = |after: Option<u64>, now: Duration| after.is_some_and(|after| now >= resumed + us(after));
    let mut now = resumed;
    let mut looks = 0;
    let why = loop {
        looks += 1;
        let facts = Facts {
            now,
            dirty_pages: (now - resumed).as_micros() as u64 * course.pages_per_us,
            dirty_log_full: full(course.log_full_after, now),
            disk_log_full: full(course.disk_full_after, now),
            changed: course.pages_per_us > 0 || full(course.changes_after, now),
            held_since: course.held_after.map(|after| resumed + us(after)).filter(|at| *at <= now),
            acknowledged_in: Some(us(course.pause)),
        };
        let until = match policy.next(&facts) {
            Next::Now(why) => break why,
            Next::At(at) => at,
            Next::Nothing => panic!("an interval always comes"),
        };
        assert!(until > now, "it is asked again at once: {now:?} {until:?} {facts:?}");
        let woken = [course.log_full_after, course.disk_full_after, course.held_after];
        let woken = woken.into_iter().flatten().map(|after| resumed + us(after)).filter(|at| *at > now).min();
        now = match woken {
            Some(at) if at < until => at,
            _ => until + us(course.late),
        };
    };
    let pause = Pause { began: now, ended: now + us(course.pause), pages: 1 };
    policy.ended(&pause);
    (Epoch { why, ran: now - resumed, looks }, pause)
}

proptest! {
    #[test]
    fn the_guest_runs_as_long_as_the_pause_before(
        interval in 50u64..3000,
        pages in 1u64..5000,
        courses in prop::collection::vec(course(), 1..60),
    ) {
        let mut policy = all(us(interval), pages);
        let (mut resumed, mut last) = (us(1_000_000), us(0));
        for course in courses {
            let (epoch, pause) = run(&mut policy, resumed, course);
            prop_assert!(
                epoch.ran >= last || epoch.why == Why::DirtyLogFull,
                "ran {:?} after a pause of {last:?}, ended by {}", epoch.ran, epoch.why
            );
            // And the guest does not run for long: at most the interval, or as long as the pause, plus the
            // coordinator's lateness.
            let longest = us(interval).max(last) + us(course.late) + us(interval);
            prop_assert!(epoch.ran <= longest, "ran {:?}, {longest:?} at most", epoch.ran);
            (resumed, last) = (pause.ended, pause.length());
        }
    }

    #[test]
    fn a_guest_that_its_ring_has_stopped_waits_for_nobody(
        interval in 50u64..3000,
        pause in 0u64..100_000,
        stopped in 0u64..3000,
    ) {
        let mut policy = all(us(interval), 1);
        policy.ended(&Pause { began: us(0), ended: us(pause), pages: 1 });
        let facts = Facts {
            now: us(pause + stopped),
            dirty_pages: 9,
            dirty_log_full: true,
            disk_log_full: true,
            ..Facts::default()
        };
        prop_assert_eq!(policy.next(&facts), Next::Now(Why::DirtyLogFull));
    }

    /// Late wake-ups do not lower the configured rate.
    #[test]
    fn short_pauses_keep_the_rhythm(interval in 500u64..3000, late in 0u64..200, pause in 10u64..100) {
        let mut policy = all(us(interval), u64::MAX);
        let course = Course { late, pause, ..QUIET };
        let mut resumed = us(1_000_000);
        for _ in 0..5 {
            resumed = run(&mut policy, resumed, course).1.ended;
        }
        let began = resumed;
        for _ in 0..100 {
            resumed = run(&mut policy, resumed, course).1.ended;
        }
        let (took, wanted) = ((resumed - began).as_micros() as u64, 100 * interval);
        prop_assert!(took.abs_diff(wanted) <= interval + 250, "{took} instead of {wanted}");
    }
}

#[test]
fn dirty_pages_end_an_epoch_early_and_are_counted_often() {
    let mut policy = all(us(10_000), 500);
    let course = Course { pages_per_us: 1, ..QUIET };
    let (_, pause) = run(&mut policy, us(1_000_000), course);
    let (epoch, _) = run(&mut policy, pause.ended, course);
    assert_eq!((epoch.why, epoch.ran), (Why::DirtyPages, us(500)));
    assert!(epoch.looks <= 4, "{} looks", epoch.looks);
    // And an idle guest is left alone.
    let (epoch, _) = run(&mut policy, pause.ended, QUIET);
    assert!(epoch.looks <= 8, "{} looks in 10 ms", epoch.looks);
}

#[test]
fn a_full_disk_log_ends_an_epoch_as_soon_as_the_guest_has_had_its_time() {
    let mut policy = all(us(10_000), u64::MAX);
    policy.ended(&Pause { began: us(1000), ended: us(3000), pages: 1 });
    let mut facts = Facts { now: us(3100), disk_log_full: true, ..Facts::default() };
    assert_eq!(policy.next(&facts), Next::At(us(5000)));
    facts.now = us(5000);
    assert_eq!(policy.next(&facts), Next::Now(Why::DiskLogFull));
}

proptest! {
    /// Output waits for the end of its epoch no longer than stated, and no epoch ends for output alone before
    /// it has run for the moment in which more output may come.
    #[test]
    fn output_ends_its_epoch(
        coalesce in 0u64..500,
        longest in 1000u64..20_000,
        courses in prop::collection::vec(course(), 1..60),
    ) {
        let mut policy = with(vec![Box::new(Output::new(us(coalesce))), Box::new(Longest::new(us(longest)))]);
        let (mut resumed, mut last) = (us(1_000_000), us(0));
        policy.ended(&Pause { began: resumed, ended: resumed, pages: 1 });
        for course in courses {
            let (epoch, pause) = run(&mut policy, resumed, course);
            if let Some(held) = course.held_after {
                let due = us(held.max(coalesce)).max(last) + us(course.late);
                prop_assert!(epoch.ran <= due, "ran {:?}, {due:?} at most, ended by {}", epoch.ran, epoch.why);
            }
            if epoch.why == Why::Output {
                prop_assert!(course.held_after.is_some() && epoch.ran >= us(coalesce));
            }
            (resumed, last) = (pause.ended, pause.length());
        }
    }

    /// If pause and commit leave room for a target, it is met, except for the coordinator's lateness. It is
    /// also used up, so that epochs are no shorter than they need to be. There is room for a pause, a commit that takes
    /// as long, and an epoch, which is never shorter than the pause before it.
    #[test]
    fn a_target_for_output_is_met(
        target in 500u64..5000,
        pause in 10u64..=500 / 3,
        held in 0u64..3000,
        late in 0u64..20,
    ) {
        let mut policy = with(vec![Box::new(Latency::new(us(target))), Box::new(Longest::new(us(20_000)))]);
        let course = Course { held_after: Some(held), late, pause, ..QUIET };
        let mut resumed = run(&mut policy, us(1_000_000), course).1.ended;
        for _ in 0..5 {
            let (epoch, ended) = run(&mut policy, resumed, course);
            // The pause, and a commit that takes as long.
            let waited = epoch.ran + us(2 * pause) - us(held);
            prop_assert!(waited <= us(target + late), "{waited:?} instead of {target} us");
            prop_assert!(waited >= us(target), "{waited:?} of {target} us, ended by {}", epoch.why);
            resumed = ended.ended;
        }
    }

    /// Nobody looks for changes all the time, and still they are in a checkpoint in time. Without a change an
    /// epoch lasts as long as it may.
    #[test]
    fn what_changes_is_in_a_checkpoint_in_time(
        length in 1000u64..20_000,
        courses in prop::collection::vec(course(), 1..60),
    ) {
        let unchanged = us(100_000);
        let longest = Longest::unless_unchanged(us(length), unchanged);
        let mut policy = with(vec![Box::new(longest)]);
        let (mut resumed, mut last) = (us(1_000_000), us(0));
        policy.ended(&Pause { began: resumed, ended: resumed, pages: 1 });
        for course in courses {
            let (epoch, pause) = run(&mut policy, resumed, course);
            let changed = if course.pages_per_us > 0 { Some(0) } else { course.changes_after };
            let most = match changed {
                Some(at) => (us(at + length)).min(unchanged),
                None => unchanged,
            };
            let most = most.max(last) + us(2 * course.late);
            prop_assert!(epoch.ran <= most, "ran {:?}, {most:?} at most, ended by {}", epoch.ran, epoch.why);
            if epoch.why == Why::Longest && changed.is_none() {
                prop_assert!(epoch.ran >= unchanged, "ran {:?}", epoch.ran);
            }
            (resumed, last) = (pause.ended, pause.length());
        }
    }
}

/// A rule that nobody has thought of yet needs only one more file.
#[test]
fn a_rule_of_its_own_takes_part() {
    #[derive(Debug)]
    struct Slow;
    impl Rule for Slow {
        fn next(&self, facts: &Facts) -> Next {
            let slow = facts.acknowledged_in.is_some_and(|time| time > us(100));
            if slow { Next::Now(Why::Interval) } else { Next::Nothing }
        }
    }
    let policy = Policy::new(vec![Box::new(Slow)]);
    let mut facts = Facts { now: us(500), ..Facts::default() };
    assert_eq!(policy.next(&facts), Next::Nothing);
    facts.acknowledged_in = Some(us(450));
    assert!(matches!(policy.next(&facts), Next::Now(_)));
}

proptest! {
    /// One self-check or one stall of the host costs its own time, and not as much again.
    #[test]
    fn a_long_pause_is_copied_only_if_it_is_no_exception(
        pauses in prop::collection::vec(1u64..5_000_000, 2..20),
        held_after in 0u64..20_000,
    ) {
        let mut policy = all(us(1000), 1000);
        let (mut resumed, mut before, mut last) = (us(1_000_000), us(0), us(0));
        for pause in pauses {
            let course = Course {
                pages_per_us: 1,
                log_full_after: None,
                disk_full_after: None,
                held_after: Some(held_after),
                changes_after: None,
                late: 0,
                pause,
            };
            let (epoch, pause) = run(&mut policy, resumed, course);
            let least = last.min(before.max(us(100_000)));
            prop_assert!(epoch.ran >= least, "ran {:?} after pauses of {before:?}, {last:?}", epoch.ran);
            prop_assert!(
                epoch.ran <= least.max(us(2_000)),
                "ran {:?} after pauses of {before:?}, {last:?}", epoch.ran
            );
            (resumed, before, last) = (pause.ended, last, pause.length());
        }
    }
}
