//! The recorder against a VM that keeps a copy of itself at every checkpoint.

mod forgetting;
mod game;
mod hostile;
mod torn;
mod vm;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use crate::recorder::Limits;
use crate::{At, Config, Keep, PlayError, Record, Recorder, Told};
use vm::{Machine, Vm};

/// Everything happens a hundred times as often.
const QUICK: Limits = Limits {
    segment_bytes: 200 << 10,
    segment_time: Duration::from_millis(30),
    sync: Duration::from_millis(10),
    forget: Duration::from_millis(10),
    rest: Duration::from_millis(20),
    longest_rest: Duration::from_millis(100),
};

fn spawn(name: &str, body: Box<dyn FnOnce() + Send>) -> std::io::Result<JoinHandle<()>> {
    Builder::new().name(name.into()).spawn(body)
}

/// A recorder in this directory, and what it tells.
fn recorder(directory: &Path, keep: Keep) -> (Recorder, Arc<Mutex<Vec<Told>>>) {
    recorder_with(QUICK, directory, keep)
}

fn recorder_with(limits: Limits, directory: &Path, keep: Keep) -> (Recorder, Arc<Mutex<Vec<Told>>>) {
    let told = Arc::new(Mutex::new(Vec::new()));
    let heard = told.clone();
    let tell = Arc::new(move |it| heard.lock().unwrap_or_else(PoisonError::into_inner).push(it));
    let config = Config { directory: directory.to_owned(), keep, spawn, tell };
    (Recorder::with_limits(config, limits).unwrap(), told)
}

fn wait(what: &str, until: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !until() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Plays a checkpoint, as a new VM would be made of it.
fn play(record: &Record, at: At) -> Result<Machine, PlayError> {
    let found = record.find(&at).unwrap();
    let mut playback = record.play(&found)?;
    let mut machine = Machine::of_base(&playback);
    playback.each::<PlayError>(|incoming| {
        machine.apply(&incoming.checkpoint().unwrap());
        Ok(())
    })?;
    assert_eq!(machine.number, found.checkpoint);
    Ok(machine)
}

/// Plays every `step`th checkpoint that can be had of the newest run, and the first and the last, and compares each with
/// what the VM was then. Returns how many.
fn compare_all(directory: &Path, vm: &Vm, step: usize) -> usize {
    let record = Record::open(directory).unwrap();
    let run = record.runs().last().expect("something can be had");
    let (first, last) = (run.first().unwrap().checkpoint, run.last().unwrap().checkpoint);
    let mut compared = 0;
    for number in (first..=last)
        .filter(|it| it == &first || it == &last || ((it - first) as usize).is_multiple_of(step))
    {
        let at = At::Checkpoint { run: Some(run.number()), number };
        let machine = play(&record, at).unwrap_or_else(|error| panic!("checkpoint {number}: {error}"));
        vm.compare(&machine);
        compared += 1;
    }
    compared
}
