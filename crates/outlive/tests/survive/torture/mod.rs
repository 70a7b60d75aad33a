//! Torture: all kinds of faults of two hosts, drawn from a seed, for any length of time, while clients on
//! shared keys check every answer and each host's cable is watched. `cargo xtask torture` runs it for minutes
//! and hours.
//!
//! * [`play`]: the hosts, round after round; [`faults`]: their faults;
//! * [`operator`]: starts their processes; [`disk`]: the file systems of their images and of the arbiter; [`third`]: the
//!   arbiter, of which there are three kinds;
//! * [`auditor`]: the clients; [`history`]: whether their answers can be true;
//! * [`sniffer`]: which host sends; [`report`]: the table, the trace, the JSON file.

mod auditor;
mod disk;
mod faults;
mod history;
mod operator;
mod play;
mod report;
mod sniffer;
mod third;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crate::support::Dice;
use play::Play;
use report::{Report, Trace};

/// The defaults.
const SECONDS: u64 = 20;
const PAIRS: u64 = 1;

fn wish(name: &str, default: u64) -> u64 {
    let wish = std::env::var(name).ok();
    wish.map_or(default, |wish| wish.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

#[test]
fn the_vm_survives_everything_once_and_again() {
    let time = Duration::from_secs(wish("OUTLIVE_TORTURE_SECONDS", SECONDS));
    if time.is_zero() {
        // `cargo xtask test` runs it beside the other tests.
        return;
    }
    let pairs = wish("OUTLIVE_TORTURE_PAIRS", PAIRS);
    let json = std::env::var_os("OUTLIVE_TORTURE_JSON").map(Into::into);
    let seed = Dice::new().seed();
    let report = Arc::new(Report::new(seed, pairs, json));
    let play = |pair| {
        let (report, seed) = (report.clone(), seed.wrapping_add(pair));
        move || Play::new(Dice::of(seed), Trace::new(report, seed)).and_then(|play| play.run(time)).is_some()
    };
    let threads: Vec<_> = (0..pairs).map(|pair| thread::spawn(play(pair))).collect();
    let ends: Vec<_> = threads.into_iter().map(thread::JoinHandle::join).collect();
    report.write();
    if ends.iter().any(|end| matches!(end, Ok(false))) {
        return;
    }
    println!("{}", report.table());
    assert!(ends.iter().all(Result::is_ok), "see above");
    let totals = report.totals();
    assert!(totals.rounds > 0 && totals.operations > 0 && totals.frames > 0, "nothing was tried");
}
