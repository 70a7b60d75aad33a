//! Signals to the processes of a test.

use std::fs;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Sends a signal. A process that gets SIGSTOP stands still when this returns: one of its threads hears of it, and the
/// others run until that one has had its turn.
pub(crate) fn signal(process: u32, signal: Signal) {
    kill(Pid::from_raw(process as i32), signal).unwrap();
    if signal == Signal::SIGSTOP {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !stands_still(process) {
            assert!(Instant::now() < deadline, "process {process} does not stand still");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn stands_still(process: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).unwrap();
    tasks.flatten().all(|task| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit_once(") ").is_none_or(|(_, state)| state.starts_with(['T', 'Z']))
    })
}
