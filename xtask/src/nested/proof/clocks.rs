//! The guest's clocks through takeovers.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::stage::{SHORT, Stage};
use super::{ProofError, ensure};

/// Samples both clocks every 10 ms and records every step back. Ends with the number of samples.
const WATCH: &str = "perl -MTime::HiRes=clock_gettime,CLOCK_MONOTONIC,CLOCK_REALTIME,usleep -e '\
    open F, q(>), q(/run/clocks); F->autoflush; my ($m, $r, $n) = (0, 0, 0); \
    $SIG{TERM} = sub { print F qq(samples $n\\n); exit }; \
    while (1) { my ($a, $b) = (clock_gettime(CLOCK_MONOTONIC), clock_gettime(CLOCK_REALTIME)); \
    print F qq(monotonic back from $m to $a\\n) if $a < $m; print F qq(realtime back from $r to $b\\n) if $b < $r; \
    ($m, $r) = ($a, $b); $n++; usleep 10000 }' </dev/null >/dev/null 2>&1 & echo $!";
const SOURCE: &str = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource";
/// Messages of a kernel that has lost time or a processor.
const COMPLAINTS: &str = "dmesg | grep -i -E 'soft lockup|hard lockup|unstable|rcu.*stall|blocked for more|Call Trace|BUG:|\
                          WARNING:|time.*backward' || true";
/// The most that the guest's date may shift relative to ours at a takeover: the time that the last checkpoint
/// was under way, on hosts that share two processors. Far less than the gap.
const TOLERANCE: Duration = Duration::from_secs(2);
/// How often the guest is asked for its date.
const TRIES: u32 = 4;

/// Watches the clocks of a guest, from now on.
pub(super) struct Clocks {
    /// An emulated guest loses ticks while it boots, and its kernel counts them until it has found its clock.
    ahead: Ahead,
    source: String,
    watch: String,
}

impl Clocks {
    pub(super) fn watch(stage: &Stage) -> Result<Clocks, ProofError> {
        let watch = stage.in_guest(WATCH, SHORT)?;
        let ahead = ahead(stage)?;
        Ok(Clocks { ahead, source: stage.in_guest(SOURCE, SHORT)?, watch: watch.trim().to_string() })
    }

    /// Checks that no clock went back, that the wall clock is right, and that the kernel has noticed nothing.
    pub(super) fn check(&self, stage: &Stage, takeovers: u32) -> Result<(), ProofError> {
        let ahead = ahead(stage)?;
        ensure(ahead.moved_at_least(&self.ahead) < (TOLERANCE * takeovers).as_secs_f64(), || {
            format!("against ours, the guest's date was at {} and is at {ahead}", self.ahead)
        })?;
        let source = stage.in_guest(SOURCE, SHORT)?;
        ensure(source == self.source, || format!("the clocksource was {} and is {source}", self.source))?;
        let complaints = stage.in_guest(COMPLAINTS, SHORT)?;
        ensure(complaints.is_empty(), || format!("the guest's kernel has noticed something:\n{complaints}"))?;
        let seen = stage.in_guest(&format!("kill {}; sleep 1; cat /run/clocks", self.watch), SHORT)?;
        let samples: u64 = seen.trim().strip_prefix("samples ").and_then(|it| it.parse().ok()).unwrap_or(0);
        ensure(samples > 100, || format!("clocks of the guest:\n{seen}"))?;
        stage.say(&format!(
            "clocks: {samples} samples and none goes back, the date moved from {} to {ahead} against ours, {source} still",
            self.ahead
        ));
        Ok(())
    }
}

/// Limits, in seconds, of how far the guest's date is ahead of ours. An answer waits for a checkpoint and so
/// takes seconds: the date was read at some moment in between.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ahead {
    least: f64,
    most: f64,
}

impl Ahead {
    /// The common range of both. They contradict each other only if the date moved between them.
    fn and(self, other: Ahead) -> Ahead {
        Ahead { least: self.least.max(other.least), most: self.most.min(other.most) }
    }

    fn moved_at_least(&self, before: &Ahead) -> f64 {
        (self.least - before.most).max(before.least - self.most).max(0.0)
    }
}

impl fmt::Display for Ahead {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:+.1} to {:+.1} s", self.least, self.most)
    }
}

fn ahead(stage: &Stage) -> Result<Ahead, ProofError> {
    let mut all = Ahead { least: f64::NEG_INFINITY, most: f64::INFINITY };
    for _ in 0..TRIES {
        let before = now();
        let date = stage.in_guest("date +%s.%N", SHORT)?;
        let after = now();
        let date: f64 = date.trim().parse().map_err(|_| ProofError::Wrong(format!("the date is {date}")))?;
        all = all.and(Ahead { least: date - after, most: date - before });
    }
    Ok(all)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |it| it.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_cannot_be_the_answers_time_is_a_move() {
        let of = |least, most| Ahead { least, most };
        assert_eq!(of(-4.0, 0.5).and(of(-1.0, 2.0)), of(-1.0, 0.5));
        assert_eq!(of(-3.0, 0.0).moved_at_least(&of(-1.0, 1.0)), 0.0);
        assert_eq!(of(-3.0, -2.0).moved_at_least(&of(1.0, 2.0)), 3.0);
        assert_eq!(of(1.0, 2.0).moved_at_least(&of(-3.0, -2.0)), 3.0);
    }
}
