//! From a command to its exit code.

use super::{Command, RunOptions, StandbyOptions};
use crate::standby::{Outcome, Waiting};
use crate::vm::{End, Launch};
use crate::{arbiter, check, console, demo, disk, exit, logs, primary, ui};

impl Command {
    /// Carries the command out. Returns the exit code.
    pub fn execute(&self) -> u8 {
        match self {
            Self::Run(options) => run(options),
            Self::Standby(options) => standby(options),
            Self::Console(options) => console::command(options),
            Self::Arbiter(options) => arbiter::command(options),
            Self::Image(options) => disk::command(options),
            Self::Demo(options) => demo::command(options),
            Self::Check(options) => check::command(options),
        }
    }
}

fn run(options: &RunOptions) -> u8 {
    match logs::never_wait().and_then(|()| primary::start(options)) {
        Ok(launch) => go_on(launch),
        Err(line) => exit::usage(line),
    }
}

/// Waits as a standby; after a takeover this process is the VM's primary.
fn standby(options: &StandbyOptions) -> u8 {
    let waiting = match logs::never_wait().and_then(|()| Waiting::prepare(options)) {
        Ok(waiting) => waiting,
        Err(line) => return exit::usage(line),
    };
    let events = waiting.events().clone();
    match waiting.run() {
        Outcome::TakenOver(launch) => go_on(*launch),
        Outcome::Ended(reason) => exit::conclude(&End::Standby(reason), &events),
        Outcome::Failed(why) => exit::conclude(&End::Failed(why), &events),
    }
}

/// Runs a VM on this host to its end.
fn go_on(launch: Launch) -> u8 {
    let events = launch.events.clone();
    ui::show_progress(&events);
    exit::conclude(&primary::run(launch), &events)
}
