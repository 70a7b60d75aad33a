//! Developer commands: `cargo xtask test`, `cargo xtask lint`, `cargo xtask ci`, `cargo xtask docs`,
//! `cargo xtask bench`, `cargo xtask torture`, `cargo xtask soak`, `cargo xtask sim`, `cargo xtask model`,
//! `cargo xtask mutants`, `cargo xtask fuzz`, `cargo xtask upgrade`, `cargo xtask package`, `cargo xtask nested`.
//!
//! # Tests that cannot run
//!
//! A test that cannot run on this machine (no `/dev/kvm`, no right to make network namespaces, a program
//! missing) prints exactly one line `skipped: <what is missing>` to standard output and returns. The harness
//! counts it as passed and hides what passed tests print, so `cargo xtask test` runs the tests with
//! `--show-output`, finds these lines, and takes those tests out of the passed ones. Nothing is skipped
//! silently: the summary names each with its reason. Under plain `cargo test` such a test shows as passed.

#![forbid(unsafe_code)]

mod bench;
mod dependencies;
mod fuzz;
mod lint;
mod model;
mod models;
mod mutants;
mod nested;
mod package;
mod packages;
mod phases;
mod releases;
mod run;
mod sim;
mod soak;
mod summary;
mod test;
mod torture;
mod upgrade;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use run::{StepError, Workspace};

/// Developer commands of Outlive
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  cargo xtask test                     all tests
  cargo xtask test --filter arbiter    the tests with 'arbiter' in their name
  cargo xtask ci                       what CI runs: format, clippy, docs, tests
  cargo xtask docs --open              the documentation, in the browser
  cargo xtask bench dirty              what dirty tracking costs, beside the bitmap of other VMMs
  cargo xtask torture --minutes 60     two hosts and everything that hosts do to a VM, by a seed
  cargo xtask soak --minutes 120       two nodes with eight VMs, and everything that operators do
  cargo xtask fuzz --minutes 60        libFuzzer over all that guests, peers and files can bring
  cargo xtask sim --minutes 60         the simulator of the protocol, with new seeds
  cargo xtask upgrade                  the last release and this tree on one pair of hosts
  cargo xtask package --test           the Debian package, and its life on a clean system
  cargo xtask nested dirty             dirty tracking on the kernels of four Debian releases, emulated
  cargo xtask nested shell             two emulated hosts with Linux guests to protect, and a prompt on each";

#[derive(Subcommand)]
enum Command {
    /// Run all tests: fetches missing Debian packages, then the workspace, torture, fuzzing, the loom models,
    /// nested hosts
    #[command(after_help = TEST_EXAMPLES)]
    Test(test::TestOptions),
    /// Check format, clippy, documentation, dependencies and the last release, without changing anything
    Lint,
    /// Run what CI runs: lint, then test
    Ci,
    /// Build the documentation of all crates; warnings are errors
    Docs {
        /// Open it in the browser
        #[arg(long)]
        open: bool,
    },
    /// Measure, print a table, and draw plots in docs/bench
    #[command(after_help = bench::EXAMPLES)]
    Bench(bench::BenchOptions),
    /// Torture real hosts in network namespaces: kill, stop, cut off and starve them, and check every answer
    #[command(after_help = torture::EXAMPLES)]
    Torture(torture::TortureOptions),
    /// Let two nodes keep some VMs for long, while operators give orders and processes die
    #[command(after_help = soak::EXAMPLES)]
    Soak(soak::SoakOptions),
    /// Fuzz the parsers, loaders and devices, guided by coverage
    #[command(after_help = fuzz::EXAMPLES)]
    Fuzz(fuzz::FuzzOptions),
    /// Simulate the protocol of two hosts with new seeds
    #[command(after_help = sim::EXAMPLES)]
    Sim(sim::SimOptions),
    /// Check every order of events in the arbitration of two or three hosts, within bounds
    #[command(after_help = model::EXAMPLES)]
    Model(model::ModelOptions),
    /// Change the decision code of the protocol in many small ways, and list the changes that no test notices
    #[command(after_help = mutants::EXAMPLES)]
    Mutants(mutants::MutantsOptions),
    /// Run the last release and this tree on one pair of hosts, and upgrade a protected pair
    #[command(after_help = upgrade::EXAMPLES)]
    Upgrade(upgrade::UpgradeOptions),
    /// Make the Debian package, and try it on a clean system
    #[command(after_help = package::EXAMPLES)]
    Package(package::PackageOptions),
    /// Test on hosts with other kernels, in QEMU's software emulation
    Nested(nested::NestedOptions),
}

const TEST_EXAMPLES: &str = "\
Examples:
  cargo xtask test
  cargo xtask test --filter takeover
  cargo xtask test --no-fetch          does not fetch missing packages; tests that need them are skipped

The last line is 'N passed, N failed, N skipped'. The exit code is 0 if nothing failed.";

fn main() -> ExitCode {
    let cli = Cli::parse();
    let workspace = Workspace::find();
    let result = match cli.command {
        Command::Test(options) => test::run(&workspace, &options),
        Command::Lint => lint::run(&workspace),
        Command::Ci => {
            lint::run(&workspace).and_then(|()| test::run(&workspace, &test::TestOptions::default()))
        }
        Command::Docs { open } => lint::docs(&workspace, open),
        Command::Bench(options) => bench::run(&workspace, &options),
        Command::Torture(options) => torture::run(&workspace, &options),
        Command::Soak(options) => soak::run(&workspace, &options),
        Command::Fuzz(options) => fuzz::run(&workspace, &options),
        Command::Sim(options) => sim::run(&workspace, &options),
        Command::Model(options) => model::run(&workspace, &options),
        Command::Mutants(options) => mutants::run(&workspace, &options),
        Command::Upgrade(options) => upgrade::run(&workspace, &options),
        Command::Package(options) => package::run(&workspace, &options),
        Command::Nested(options) => nested::run(&workspace, &options),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(StepError::TestsFailed) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::from(error.exit_code())
        }
    }
}
