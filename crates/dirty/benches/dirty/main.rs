//! The cost of dirty tracking, compared with that of others: `cargo xtask bench dirty`, or `cargo bench -p
//! outlive-dirty --bench dirty -- [--quick] [--json FILE]`.
//!
//! Every number comes with that of a peer that was measured in the same rounds, in turns, because the
//! machine's speed changes from minute to minute. `cargo test` runs only the smallest case, to check that the
//! bench still works.

mod bare;
mod cases;
mod fetch;
mod goals;
mod guest;
mod here;
mod machine;
mod measure;
mod options;
mod peer;
mod quiet;
mod report;
mod workload;

use std::io;
use std::process::ExitCode;
use std::time::Instant;

use kvm_ioctls::Kvm;
use outlive_dirty::SignalsBlocked;

use machine::Host;
use options::Options;
use report::Report;

/// The name that `cargo test` shows.
const TEST: &str = "the_bench_runs";

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(error) => {
            eprintln!("bench: {error}");
            return ExitCode::from(2);
        }
    };
    if options.list {
        println!("{TEST}: test");
        return ExitCode::SUCCESS;
    }
    if options.filter.as_ref().is_some_and(|filter| options.is_test && !TEST.contains(filter.as_str())) {
        return passed(0, 1);
    }
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) if options.is_test => {
            println!("skipped: no /dev/kvm ({error})");
            return passed(1, 0);
        }
        Err(error) => {
            eprintln!("bench: /dev/kvm cannot be opened: {error}");
            return ExitCode::from(2);
        }
    };
    match run(kvm, &options) {
        Ok(()) if options.is_test => passed(1, 0),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::from(2)
        }
    }
}

/// The last line of the usual harness.
fn passed(passed: usize, filtered: usize) -> ExitCode {
    println!(
        "\ntest result: ok. {passed} passed; 0 failed; 0 ignored; 0 measured; {filtered} filtered out; finished"
    );
    ExitCode::SUCCESS
}

fn run(kvm: Kvm, options: &Options) -> io::Result<()> {
    if options.is_test {
        report::check_format();
    }
    let start = Instant::now();
    let mut report = Report::new(options.json.as_deref())?;
    println!("{}", here::describe());
    // As the thread of a VMM that ends epochs does.
    let _quiet = SignalsBlocked::now();
    let host = Host::new(kvm);
    cases::harvest(&host, options, &mut report)?;
    cases::sizes(&host, options, &mut report)?;
    cases::epochs(&host, options, &mut report)?;
    fetch::measure(&host, options, &mut report)?;
    goals::print(report.rows());
    println!("\n{} rows in {} s", report.rows().len(), start.elapsed().as_secs());
    Ok(())
}
