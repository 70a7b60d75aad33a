//! A live table of dirty pages per vCPU, and an example of a VMM with `outlive-dirty`: `cargo run --release
//! -p outlive-dirty --example dirty_top -- --help`.
//!
//! `guest.rs` makes the VM and its tracker. This file has the epochs: vCPU threads that run, save their state
//! and harvest their own pages, and one thread that ends each epoch.

mod guest;
mod options;
mod rates;
mod table;

use std::collections::HashMap;
use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use outlive_dirty::{Epoch, Gfn, Rearmed, RegionLog, Tracker};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::signal::register_signal_handler;

use guest::{Guest, Vcpu};
use options::{HELP, Options};
use rates::Rates;
use table::{Measured, Table};

type Failure = Box<dyn Error + Send + Sync>;

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return failed(error.into(), 2),
    };
    match Guest::new(&options) {
        Ok(guest) => run(guest, &options).map_or_else(|error| failed(error, 1), |()| ExitCode::SUCCESS),
        Err(error) => failed(error, 2),
    }
}

/// Prints why in one line, with all causes.
fn failed(error: Failure, code: u8) -> ExitCode {
    let mut line = format!("dirty_top: {error}");
    let mut cause = error.source();
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    eprintln!("{line}");
    ExitCode::from(code)
}

fn run(guest: Guest, options: &Options) -> Result<(), Failure> {
    for signal in [libc::SIGINT, libc::SIGTERM] {
        register_signal_handler(signal, on_signal)?;
    }
    let mut table = Table::new(&guest, options);
    let mut rates = options.rates.as_ref().map(|path| Rates::of(path, &guest)).transpose()?;
    let tracker = &guest.tracker;
    // From here on the first write to every page is noticed. A VMM that replicates now copies all of memory
    // once, while the guest runs; after that it needs only the pages of the epochs.
    tracker.enable()?;
    thread::scope(|scope| {
        let (stopped, all_stopped) = channel();
        let spawn = |(index, vcpu)| {
            let (start, starts) = channel();
            let stopped = stopped.clone();
            scope.spawn(move || vcpu_thread(vcpu, index, tracker, starts, stopped));
            start
        };
        let vcpus: Vec<Sender<()>> = guest.vcpus.into_iter().enumerate().map(spawn).collect();
        let mut copies = Copies { memory: &guest.memory, hot: HashMap::new() };
        epochs(tracker, options, &vcpus, &all_stopped, &mut copies, &mut table, &mut rates)
        // Dropping the senders here ends the threads.
    })?;
    tracker.disable()?;
    Ok(())
}

static SIGNALLED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    SIGNALLED.store(true, Ordering::Relaxed);
}

/// The thread of a vCPU: in each epoch it runs, stops, saves its state, and only then harvests, because KVM
/// may write guest memory for a vCPU whose state is read.
fn vcpu_thread(
    mut vcpu: Vcpu,
    index: usize,
    tracker: &Tracker,
    starts: Receiver<()>,
    stopped: Sender<Result<Stopped, Failure>>,
) {
    let mut epoch = || {
        vcpu.run(index, tracker)?;
        vcpu.save()?;
        let begin = Instant::now();
        let pages = tracker.harvest_vcpu(index)?;
        Ok(Stopped { index, pages, took: begin.elapsed() })
    };
    for () in starts {
        let ended = epoch();
        if stopped.send(ended).is_err() {
            break;
        }
    }
}

struct Stopped {
    index: usize,
    /// Entries in its ring; 0 if the back end has none.
    pages: usize,
    took: Duration,
}

/// The thread that ends the epochs.
fn epochs(
    tracker: &Tracker,
    options: &Options,
    vcpus: &[Sender<()>],
    stopped: &Receiver<Result<Stopped, Failure>>,
    copies: &mut Copies<'_>,
    table: &mut Table,
    rates: &mut Option<Rates>,
) -> Result<(), Failure> {
    let begin = Instant::now();
    let mut next = begin;
    let mut measured = Measured { vcpus: vec![0; vcpus.len()], pages: 0, hot: 0, took: Duration::ZERO };
    while !SIGNALLED.load(Ordering::Relaxed) && options.duration.is_none_or(|most| begin.elapsed() < most) {
        for vcpu in vcpus {
            vcpu.send(())?;
        }
        // A VMM would kick vCPUs that run on; this guest stops when it has written its pages.
        measured.took = Duration::ZERO;
        for _ in vcpus {
            let Stopped { index, pages, took } = stopped.recv()??;
            measured.vcpus[index] = pages;
            // All of them at once, so the slowest counts.
            measured.took = measured.took.max(took);
        }

        let ending = Instant::now();
        let epoch = tracker.stopped().state_saved().harvest()?.rearm()?;
        measured.took += ending.elapsed();
        (measured.pages, measured.hot) = (epoch.pages().len(), epoch.hot().len());
        copies.take(&epoch)?;
        rates.iter_mut().for_each(|rates| rates.note(epoch.pages()));
        epoch.copied().run();
        rates.iter_mut().for_each(|rates| rates.send(&measured));

        if !table.epoch(&measured, &tracker.stats())? {
            break;
        }
        next = (next + options.interval).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    table.end(&tracker.stats())?;
    Ok(())
}

/// The standby's copy of the pages; here only the first word of hot ones.
struct Copies<'g> {
    memory: &'g GuestMemoryMmap<RegionLog>,
    hot: HashMap<Gfn, u64>,
}

impl Copies<'_> {
    /// Copies the pages of an epoch. Hot pages may have been written: a caller that compares them with their
    /// last copy need not send equal ones, and the tracker learns which are no longer hot.
    fn take(&mut self, epoch: &Epoch<'_, Rearmed>) -> Result<(), GuestMemoryError> {
        let first_hot = epoch.written().len();
        for (index, &gfn) in epoch.pages().iter().enumerate() {
            let word = self.memory.read_obj(GuestAddress(gfn.gpa()))?;
            if index >= first_hot && self.hot.insert(gfn, word) == Some(word) {
                epoch.unchanged(index);
            }
        }
        Ok(())
    }
}
