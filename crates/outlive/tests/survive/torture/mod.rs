//! Torture: all kinds of faults of two hosts, drawn from a seed, for any length of time, while clients on
//! shared keys check every answer and each host's cable is watched. `cargo xtask torture` runs it for minutes
//! and hours.
//!
//! * [`play`]: the hosts, round after round; [`faults`]: their faults;
//! * [`auditor`]: the clients; [`history`]: whether their answers can be true;
//! * [`sniffer`]: which host sends; [`report`]: the table, the trace, the JSON file.

mod auditor;
mod faults;
mod history;
mod play;
mod report;
mod sniffer;

use std::time::Duration;

use crate::support::Dice;
use play::Play;
use report::Report;

/// The default.
const SECONDS: u64 = 20;

#[test]
fn the_vm_survives_everything_once_and_again() {
    let wish = std::env::var("OUTLIVE_TORTURE_SECONDS").ok();
    let seconds = wish.map_or(SECONDS, |wish| wish.parse().expect("OUTLIVE_TORTURE_SECONDS is a number"));
    let json = std::env::var_os("OUTLIVE_TORTURE_JSON").map(Into::into);
    let dice = Dice::new();
    let report = Report::new(dice.seed(), json);
    let Some(play) = Play::new(dice, report) else { return };
    let report = play.run(Duration::from_secs(seconds)).expect("a VM could run before");
    assert!(report.rounds > 0 && report.operations > 0 && report.frames > 0, "nothing was tried");
}
