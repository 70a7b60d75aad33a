//! From a command to its exit code.

use super::{Command, RunOptions, StandbyOptions};
use crate::events::Role;
use crate::standby::{Outcome, Waiting};
use crate::status::{Server, Standing};
use crate::vm::{self, End, Launch};
use crate::{arbiter, check, console, demo, disk, exit, logs, primary, sentinel, status, ui};

impl Command {
    /// Carries the command out. Returns the exit code.
    pub fn execute(&self) -> u8 {
        match self {
            Self::Run(options) => run(options),
            Self::Standby(options) => standby(options),
            Self::Status(options) => status::command(options),
            Self::Console(options) => console::command(options),
            Self::Arbiter(options) => arbiter::command(options),
            Self::Image(options) => disk::command(options),
            Self::Demo(options) => demo::command(options),
            Self::Check(options) => check::command(options),
            Self::Sentinel => sentinel::command(),
        }
    }
}

fn run(options: &RunOptions) -> u8 {
    sentinel::start();
    let standing = Standing::new(Role::Primary, options.name.as_deref(), "the VM is being started");
    let ready = logs::never_wait().and_then(|()| {
        vm::lock_memory(options.active.lock_memory)?;
        // Before the VM, so that a bad place is refused before anything is done.
        let server = Server::open(options.active.status.as_deref(), &standing)?;
        let launch = primary::start(options, standing.clone())?;
        let name = &launch.identity.provenance.name;
        Ok((server.or_else(|| Server::open_usual(name, standing)), launch))
    });
    match ready {
        Ok((_server, launch)) => go_on(launch),
        Err(line) => exit::usage(line),
    }
}

/// Waits as a standby; after a takeover this process is the VM's primary.
fn standby(options: &StandbyOptions) -> u8 {
    sentinel::start();
    let standing = Standing::new(Role::Standby, options.vm.as_deref(), "no primary has come yet");
    let ready = logs::never_wait().and_then(|()| {
        vm::lock_memory(options.active.lock_memory)?;
        options.refuse_itself()?;
        let server = Server::open(options.active.status.as_deref(), &standing)?;
        let waiting = Waiting::prepare(options, standing.clone())?;
        Ok((server.or_else(|| Server::open_usual(&options.status_name(), standing)), waiting))
    });
    let (_server, waiting) = match ready {
        Ok(ready) => ready,
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
