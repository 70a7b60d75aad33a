//! How long the parts of a command took.

use std::fmt;
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

/// A part.
struct Phase {
    name: &'static str,
    time: Duration,
    /// What its programs computed; unknown of a part that ran beside others.
    computed: Option<Duration>,
}

/// The parts so far, in the order of their ends.
#[derive(Default)]
pub(crate) struct Phases(Vec<Phase>);

impl Phases {
    /// Carries a part out.
    pub(crate) fn time<R>(&mut self, name: &'static str, work: impl FnOnce() -> R) -> R {
        let (start, before) = (Instant::now(), computed());
        let result = work();
        let computed = computed().saturating_sub(before);
        self.0.push(Phase { name, time: start.elapsed(), computed: Some(computed) });
        result
    }

    /// Adds a part that ran beside others.
    pub(crate) fn beside(&mut self, name: &'static str, time: Duration) {
        self.0.push(Phase { name, time, computed: None });
    }
}

/// The result of some work and how long it took.
pub(crate) fn timed<R>(work: impl FnOnce() -> R) -> (R, Duration) {
    let start = Instant::now();
    (work(), start.elapsed())
}

/// What all programs that we have started and that have ended computed, on all processors.
fn computed() -> Duration {
    let Ok(usage) = getrusage(UsageWho::RUSAGE_CHILDREN) else { return Duration::ZERO };
    let [user, system] = [usage.user_time(), usage.system_time()]
        .map(|time| Duration::from_secs(time.tv_sec() as u64) + Duration::from_micros(time.tv_usec() as u64));
    user + system
}

impl fmt::Display for Phases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:44}{:>8}{:>12}", "phase", "seconds", "processor s")?;
        for Phase { name, time, computed } in &self.0 {
            let computed = computed.map_or("beside".into(), |it| it.as_secs().to_string());
            write!(f, "\n{name:44}{:>8}{computed:>12}", time.as_secs())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_phase_knows_what_its_programs_computed() {
        let mut phases = Phases::default();
        let busy = "n=0; while [ $n -lt 300000 ]; do n=$((n+1)); done";
        assert!(phases.time("busy", || Command::new("sh").args(["-c", busy]).status()).unwrap().success());
        assert!(phases.0[0].computed > Some(Duration::from_millis(10)));
        assert!(phases.0[0].time > Duration::from_millis(10));
        phases.beside("other", Duration::from_secs(7));
        let table = phases.to_string();
        assert!(table.lines().last().unwrap().ends_with("7      beside"), "{table}");
    }
}
