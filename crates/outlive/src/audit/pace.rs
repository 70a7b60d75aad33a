//! How much of a core an audit may take.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::time::{ClockId, clock_gettime};
use outlive_epoch::DISK_CHUNK;

/// The time that this thread has had a core.
pub(crate) fn thread_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

/// A share of one core, or nothing at all.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AuditShare {
    /// From 0 to 1.
    of_a_core: f64,
}

impl AuditShare {
    /// Nothing at all.
    pub const OFF: Self = Self { of_a_core: 0.0 };

    /// Whether it is nothing at all.
    pub fn is_off(self) -> bool {
        self.of_a_core == 0.0
    }

    /// How long a time must be in which this share of it is `spent`.
    pub(crate) fn time_for(self, spent: Duration) -> Duration {
        if self.is_off() { Duration::MAX } else { spent.div_f64(self.of_a_core) }
    }
}

impl FromStr for AuditShare {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "off" {
            return Ok(Self::OFF);
        }
        let percent = text.strip_suffix('%').unwrap_or(text).parse::<f64>().ok();
        match percent.filter(|percent| (0.01..=100.0).contains(percent)) {
            Some(percent) => Ok(Self { of_a_core: percent / 100.0 }),
            None => Err(format!("'{text}' is no share of a core: give 0.01 to 100 (percent), or off")),
        }
    }
}

impl fmt::Display for AuditShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_off() { f.write_str("off") } else { write!(f, "{}", self.of_a_core * 100.0) }
    }
}

/// Keeps one thread to its share.
pub(crate) struct Pace {
    share: AuditShare,
    spent: Duration,
    since: Instant,
}

impl Pace {
    /// From now on, for the thread that calls it.
    pub(crate) fn start(share: AuditShare) -> Self {
        Self { share, spent: thread_time(), since: Instant::now() }
    }

    /// How long this thread must rest now. `theirs` is what its work since the last call costs the other host, which
    /// has the same share.
    pub(crate) fn rest(&mut self, theirs: Duration) -> Duration {
        let (spent, now) = (thread_time(), Instant::now());
        let cost = spent.saturating_sub(std::mem::replace(&mut self.spent, spent)).max(theirs);
        let took = now.saturating_duration_since(std::mem::replace(&mut self.since, now));
        let rest = self.share.time_for(cost).saturating_sub(took);
        // The rest is no part of what the next work takes.
        self.since += rest;
        rest
    }
}

/// What the comparisons of a host may take together, whichever thread makes them.
#[derive(Debug)]
pub(crate) struct Budget {
    share: AuditShare,
    began: Instant,
    spent_ns: AtomicU64,
}

impl Budget {
    /// How much more than its share a comparison may take at a time.
    const AHEAD: Duration = Duration::from_millis(20);

    /// From now on.
    pub(crate) fn start(share: AuditShare) -> Arc<Self> {
        Arc::new(Self { share, began: Instant::now(), spent_ns: AtomicU64::new(0) })
    }

    /// Whether there is anything to compare here at all.
    pub(crate) fn is_off(&self) -> bool {
        self.share.is_off()
    }

    /// Whether the next comparison would be too much now.
    pub(crate) fn is_used_up(&self) -> bool {
        let spent = Duration::from_nanos(self.spent_ns.load(Ordering::Relaxed));
        self.share.time_for(spent) > self.began.elapsed().saturating_add(Self::AHEAD)
    }

    /// So much was taken.
    pub(crate) fn spend(&self, time: Duration) {
        self.spent_ns.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }
}

/// Keeps the reading of disks to so many bytes per second, and to a part of the time, whatever the share of a core: the
/// guest needs them too, and one that is slow or busy takes long for a read.
pub(crate) struct DiskRate {
    /// When what was read is paid for.
    paid: Instant,
}

impl DiskRate {
    /// Bytes per second.
    pub(crate) const BYTES: u64 = 4 << 20;

    /// How many times as long as a read takes the next one waits, so that a tenth of the time is spent reading.
    const RESTS: u32 = 9;

    /// From now on.
    pub(crate) fn start() -> Self {
        Self { paid: Instant::now() }
    }

    /// How long the next read must wait.
    pub(crate) fn wait(&self) -> Duration {
        self.paid.saturating_duration_since(Instant::now())
    }

    /// So many chunks were read, and that took so long.
    pub(crate) fn charge(&mut self, chunks: u32, took: Duration) {
        const CHUNK: Duration = Duration::from_nanos(1_000_000_000 * DISK_CHUNK as u64 / DiskRate::BYTES);
        let rest = (CHUNK * chunks).max(took.saturating_mul(Self::RESTS));
        self.paid = self.paid.max(Instant::now()) + rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_and_written() {
        for (text, shown) in [("0.5", "0.5"), ("100", "100"), ("2%", "2"), ("off", "off"), ("0.01", "0.01")] {
            assert_eq!(text.parse::<AuditShare>().unwrap().to_string(), shown);
        }
        for wrong in ["", "0", "101", "-1", "nan", "much", "0.001", "%"] {
            assert!(wrong.parse::<AuditShare>().unwrap_err().contains("give 0.01 to 100"), "{wrong}");
        }
    }

    #[test]
    fn the_slower_of_both_hosts_sets_the_pace() {
        let mut pace = Pace::start("10".parse().unwrap());
        let rest = pace.rest(Duration::from_millis(50));
        assert!((Duration::from_millis(400)..=Duration::from_millis(500)).contains(&rest), "{rest:?}");
        // This thread's own work.
        let began = thread_time();
        while thread_time() - began < Duration::from_millis(20) {
            std::hint::spin_loop();
        }
        let mut pace = Pace { since: Instant::now(), spent: began, ..pace };
        let rest = pace.rest(Duration::ZERO);
        assert!(rest >= Duration::from_millis(150), "{rest:?}");
    }

    #[test]
    fn a_hosts_comparisons_share_what_it_gives() {
        let budget = Budget::start("1".parse().unwrap());
        assert!(!budget.is_used_up() && !budget.is_off());
        budget.spend(Duration::from_millis(100));
        budget.spend(Duration::from_millis(100));
        assert!(budget.is_used_up(), "it takes 20 s");
        let off = Budget::start(AuditShare::OFF);
        assert!(off.is_off() && off.is_used_up());
    }

    #[test]
    fn disks_are_read_at_the_stated_rate() {
        let mut rate = DiskRate::start();
        assert_eq!(rate.wait(), Duration::ZERO);
        // 16 chunks are a mebibyte.
        rate.charge(16 * 4 * 10, Duration::from_millis(2));
        let wait = rate.wait();
        assert!((Duration::from_secs(9)..=Duration::from_secs(10)).contains(&wait), "{wait:?}");
        // Time without a read is not saved up.
        rate.paid = Instant::now().checked_sub(Duration::from_secs(60)).unwrap();
        rate.charge(64, Duration::ZERO);
        assert!(rate.wait() > Duration::from_millis(900));
        // A disk that is slow, or that others need.
        let mut rate = DiskRate::start();
        rate.charge(1, Duration::from_secs(2));
        let wait = rate.wait();
        assert!((Duration::from_secs(17)..=Duration::from_secs(18)).contains(&wait), "{wait:?}");
    }
}
