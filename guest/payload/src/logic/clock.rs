//! Time that only goes forward, from a time stamp counter that may jump.
//!
//! A takeover resumes the VM on another host with another counter. The guest must neither see time run
//! backwards nor have all its timers expire at once because the other host was booted earlier. So a step that
//! no running guest can have made does not count at all.

/// Largest step that counts: twice the longest time that a vCPU sleeps.
const MAX_STEP_US: u64 = 2_000_000;

/// Longest sleep; a vCPU that idles longer would mistake the sleep for a jump.
pub const MAX_SLEEP_US: u32 = 1_000_000;

/// Microseconds since boot, as one vCPU sees them.
#[derive(Debug)]
pub struct Clock {
    tsc_khz: u64,
    last_tsc: u64,
    now_us: u64,
    /// Counter ticks times 1000 that have not made up a whole microsecond yet.
    rest: u64,
}

impl Clock {
    /// Starts at zero.
    pub fn new(tsc_khz: u64, tsc: u64) -> Self {
        Self { tsc_khz: tsc_khz.max(1), last_tsc: tsc, now_us: 0, rest: 0 }
    }

    /// Reads the clock: `tsc` is the counter now.
    pub fn update(&mut self, tsc: u64) -> u64 {
        let ticks = tsc.wrapping_sub(self.last_tsc);
        self.last_tsc = tsc;
        // A counter that went back appears as a huge step here.
        if ticks <= self.tsc_khz.saturating_mul(MAX_STEP_US / 1000) {
            let scaled = ticks.saturating_mul(1000).saturating_add(self.rest);
            self.now_us += scaled / self.tsc_khz;
            self.rest = scaled % self.tsc_khz;
        }
        self.now_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_steps_add_up_without_loss() {
        let mut clock = Clock::new(2_600_000, 77);
        let mut tsc = 77;
        for _ in 0..2_600_000 {
            tsc += 1001;
            clock.update(tsc);
        }
        assert_eq!(clock.update(tsc), 1_001_000);
    }

    #[test]
    fn jumps_do_not_count() {
        let mut clock = Clock::new(1_000_000, 5_000_000_000);
        assert_eq!(clock.update(5_001_000_000), 1000);
        assert_eq!(clock.update(1_000_000), 1000, "backwards");
        assert_eq!(clock.update(2_000_000), 2000, "goes on from the new counter");
        assert_eq!(clock.update(u64::MAX / 2), 2000, "years forward");
        assert_eq!(clock.update(u64::MAX / 2 + 1_999_000_000), 2_001_000, "the longest believable step");
    }
}
