//! How the kernel's scheduler treats the threads of this process: how long each ran, and how long it waited
//! for a core.
//!
//! The kernel counts both (`/proc/PID/task/TID/schedstat`, Documentation/scheduler/sched-stats.rst), so that
//! the hot threads do nothing for it; a thread that has time samples them.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use crate::events::ThreadTime;

/// How many threads are reported: those that waited longest.
const MOST: usize = 64;

/// Samples the threads of this process.
#[derive(Debug, Default)]
pub(crate) struct Sampler {
    /// The name of the main thread.
    main: &'static str,
    before: HashMap<u32, Counters>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counters {
    run_ns: u64,
    wait_ns: u64,
    slices: u64,
}

impl Sampler {
    /// The first sample counts from now on.
    pub(crate) fn new(main: &'static str) -> Self {
        let mut sampler = Self { main, before: HashMap::new() };
        sampler.sample();
        sampler
    }

    /// What each thread did since the last call, by name; threads of one name are added up. Threads that did
    /// nothing are left out, and so is everything on a kernel that does not count.
    pub(crate) fn sample(&mut self) -> BTreeMap<String, ThreadTime> {
        let mut now = HashMap::new();
        let mut times = BTreeMap::<String, ThreadTime>::new();
        for entry in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
            let Some(id) = entry.file_name().to_str().and_then(|id| id.parse().ok()) else { continue };
            let Some(counters) = read(&entry.path()) else { continue };
            now.insert(id, counters);
            let before = self.before.get(&id).copied().unwrap_or_default();
            if counters.slices == before.slices && counters.run_ns == before.run_ns {
                continue;
            }
            let time = times.entry(self.name(id, &entry.path())).or_default();
            time.run_us += counters.run_ns.saturating_sub(before.run_ns) / 1000;
            time.wait_us += counters.wait_ns.saturating_sub(before.wait_ns) / 1000;
            time.switches += counters.slices.saturating_sub(before.slices);
        }
        self.before = now;
        while times.len() > MOST {
            let least = times.iter().min_by_key(|(_, time)| time.wait_us).map(|(name, _)| name.clone());
            least.and_then(|name| times.remove(&name));
        }
        times
    }

    fn name(&self, id: u32, thread: &Path) -> String {
        if id == std::process::id() {
            return self.main.into();
        }
        fs::read_to_string(thread.join("comm")).unwrap_or_default().trim_end().to_owned()
    }
}

fn read(thread: &Path) -> Option<Counters> {
    parse(&fs::read_to_string(thread.join("schedstat")).ok()?)
}

/// Nanoseconds on a core, nanoseconds waiting for one, how often it got one.
fn parse(text: &str) -> Option<Counters> {
    let mut numbers = text.split_whitespace().map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some(Counters { run_ns: next()?, wait_ns: next()?, slices: next()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_numbers_are_read() {
        let counters = Counters { run_ns: 10, wait_ns: 20, slices: 3 };
        assert_eq!(parse("10 20 3\n"), Some(counters));
        assert_eq!((parse("10 20"), parse("a b c"), parse("")), (None, None, None));
    }

    #[test]
    fn a_thread_that_works_is_told_of_and_only_with_what_is_new() {
        let mut sampler = Sampler::new("main");
        if sampler.before.is_empty() {
            return eprintln!("this kernel does not count: nothing to test");
        }
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let thread = outlive_machine::spawn("busy", move || {
            for turn in 0..200 {
                std::hint::black_box((0..10_000u64 + turn).sum::<u64>());
                std::thread::sleep(std::time::Duration::from_micros(50));
            }
            stopped.recv().ok();
        })
        .unwrap();
        while sampler.sample().get("busy").is_none_or(|busy| busy.switches == 0) {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        std::thread::sleep(std::time::Duration::from_millis(300));
        sampler.sample();
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert_eq!(sampler.sample().get("busy"), None, "it waits for the test");
        drop(stop);
        thread.join().unwrap();
    }
}
