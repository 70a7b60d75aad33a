//! Live migration of a small VM over a socket, in the manner of the rust-vmm crates: `ours.rs` with
//! outlive-dirty, `plain.rs` with KVM_GET_DIRTY_LOG and vm-memory's bitmap. Both memories are compared byte
//! for byte after each.
//!
//! `cargo run --release -p outlive-dirty --example migrate -- --help`. Copy from `ours.rs`.

#[path = "../common/guest.rs"]
mod guest;
mod options;
mod ours;
mod plain;
mod report;
mod run;
mod vm;
mod wire;

use std::error::Error;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use options::{HELP, Options};
use report::Report;
use run::Gate;

type Failure = Box<dyn Error + Send + Sync>;

/// What to migrate, and how.
#[derive(Clone, Debug)]
struct Case {
    gib: u64,
    touched: u64,
    /// Thousandths of the touched pages that are written in a round.
    permille: u64,
    rounds: usize,
    round: Duration,
    streams: u32,
    vcpus: u64,
    /// KVM stops the vCPUs at the trigger.
    exact: bool,
}

impl Case {
    /// Dirty pages in outlive-dirty at which to stop the guest.
    fn trigger(&self) -> usize {
        (2 * self.dirty_pages() as usize).clamp(1024, 16_384)
    }

    fn dirty_pages(&self) -> u64 {
        (self.touched * self.permille / 1000).max(1)
    }
}

/// Times of a round. The next writes to the found pages are caught.
#[derive(Clone, Copy, Debug, Default)]
struct Round {
    pages: usize,
    /// Finding the dirty pages and arming the trap for their next write.
    find: Duration,
    send: Duration,
}

impl Round {
    /// Another thread's part of the same round: the slower one counts.
    fn beside(&mut self, other: Round) {
        self.pages += other.pages;
        self.find = self.find.max(other.find);
        self.send = self.send.max(other.send);
    }
}

/// The result of a migration.
#[derive(Debug)]
struct Outcome {
    method: String,
    turn_on: Duration,
    base: Duration,
    rounds: Vec<Round>,
    /// Pages that were left when the guest stopped.
    last_pages: usize,
    /// From the request to stop until the other side has everything.
    downtime: Duration,
    total: Duration,
    turn_off: Duration,
    /// The guest's time for each page that it writes.
    guest_us: f64,
    /// Pages that differ between both ends: none, or the migration has failed.
    different: u64,
}

impl Outcome {
    fn new(method: &str) -> Outcome {
        Outcome {
            method: method.into(),
            turn_on: Duration::ZERO,
            base: Duration::ZERO,
            rounds: Vec::new(),
            last_pages: 0,
            downtime: Duration::ZERO,
            total: Duration::ZERO,
            turn_off: Duration::ZERO,
            guest_us: 0.0,
            different: 0,
        }
    }

    fn guest(&mut self, gate: &Gate) {
        let (ns, pages) = (gate.guest_ns.load(Ordering::Relaxed), gate.guest_pages.load(Ordering::Relaxed));
        self.guest_us = ns as f64 / 1e3 / pages.max(1) as f64;
    }

    /// The middle one of the rounds.
    fn round(&self) -> Round {
        let mut rounds = self.rounds.clone();
        rounds.sort_by_key(|round| round.find);
        rounds.get(rounds.len() / 2).copied().unwrap_or_default()
    }
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(Some(options)) => options,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(error) => return failed(&error, 2),
    };
    if let Err(error) = kvm_ioctls::Kvm::new() {
        return failed(&format!("cannot open /dev/kvm: {error}"), 2);
    }
    match run(&options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => failed("the memories at both ends are not the same", 1),
        Err(error) => failed(&chain(&*error), 1),
    }
}

/// An error with all its causes, in one line.
fn chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line += &format!(": {error}");
        cause = error.source();
    }
    line
}

fn failed(message: &str, code: u8) -> ExitCode {
    eprintln!("migrate: {message}");
    ExitCode::from(code)
}

/// False if a migration has lost a page.
fn run(options: &Options) -> Result<bool, Failure> {
    let mut report = Report::new(options)?;
    let mut same = true;
    for &gib in &options.gib {
        for &permille in &options.permille {
            let case = Case {
                gib,
                permille,
                touched: options.touched,
                rounds: options.rounds,
                round: Duration::from_millis(options.round_ms),
                streams: options.streams,
                vcpus: options.vcpus,
                exact: options.exact,
            };
            let (plain, ours) = (plain::migrate(&case)?, ours::migrate(&case)?);
            same &= plain.different == 0 && ours.different == 0;
            report.case(&case, &plain, &ours)?;
        }
    }
    Ok(same)
}
