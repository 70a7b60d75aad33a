//! A whole node, with processes that run nothing.

mod drain;
mod orders;
mod processes;

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use crate::asking::{BEING_STARTED, UNDECIDED};
use crate::definition::{AUTOSTART, Definition};
use crate::drain::Mode;
use crate::error::NodeError;
use crate::feed::Feed;
use crate::jobs::{Job, JobState};
use crate::keeper::{Kept, Order};
use crate::node::{Node, Shared};
use crate::records::{Desired, Records};
use crate::testing::{World, wait};
use crate::view::State;

const TWO_HOSTS: &str =
    "arbiter = 'file:/x'\nlisten = '10.0.0.1:70NN'\nstandby = ['hostb:70NN']\ndisk = ['path=/no/NN']";

fn two_hosts(number: u8) -> String {
    TWO_HOSTS.replace("NN", &format!("{number:02}"))
}

fn done(node: &Node, job: Job) -> Job {
    loop {
        let job = node.jobs.get(&job.id).unwrap();
        if job.state != JobState::Running {
            return job;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn kill(pid: u32) {
    let pid = nix::unistd::Pid::from_raw(pid as i32);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
}

/// The record of a VM, as it is on the disk.
fn record(world: &World, vm: &str) -> serde_json::Value {
    let file = world.places().state.join("vms").join(format!("{vm}.json"));
    serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap()
}
