//! `cargo xtask nested survive`: the tests with whole VMs that are killed and taken over, on an emulated host. So they
//! can be run on a machine without `/dev/kvm`, and on a kernel and a kind of KVM that the machine does not have.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::host::{Host, Machine, Qemu};
use super::kernel::{Kernel, Series};
use super::programs::{RunError, built, executable, qemu, quoted};
use crate::run::{StepError, Workspace};
use crate::summary::Summary;

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask nested survive rejoin                  the tests whose names contain this
  cargo xtask nested survive takeover fence::        those of several
  cargo xtask nested survive --kernel newest kills   on Debian's newest kernel
  cargo xtask nested survive --release known         with the programs as users have them
  cargo xtask nested survive upgrade:: --before target/upgrade/outlive-39733737c750
                                                     with the release before on one host

An emulated host is ten to thirty times as slow as this machine. Tests about time fail there, and the machine must have
little else to do. Fetches the kernel and QEMU if they are missing.

The exit code is 1 if a test failed or the host did not come up; 2 for wrong options, or if there is no QEMU.";

const PACKAGE: &str = "outlive";
const TESTS: &str = "survive";
/// Where the host has the program of the release before.
const BEFORE: &str = "/before";
/// What the tests' hosts and networks are made of.
const MODULES: [&str; 6] = ["kvm_amd", "tun", "bridge", "veth", "fuse", "loop"];

#[derive(clap::Args, Debug)]
pub(crate) struct SurviveOptions {
    /// Run only tests whose name contains one of these
    #[arg(value_name = "TEXT", required = true)]
    filter: Vec<String>,
    /// The host's kernel
    #[arg(long, value_enum, value_name = "SERIES", default_value = "6.12")]
    kernel: Series,
    /// Its memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 3072, value_parser = clap::value_parser!(u32).range(1024..))]
    memory: u32,
    /// Minutes for the tests
    #[arg(long, value_name = "MINUTES", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// With every host outside of its sandbox
    #[arg(long)]
    no_sandbox: bool,
    /// A program of the release before, for the tests of upgrade:: (`cargo xtask upgrade --build-only` builds it)
    #[arg(long, value_name = "FILE")]
    before: Option<PathBuf>,
    /// Build with optimisations
    #[arg(long)]
    release: bool,
    /// Use only what has been fetched before
    #[arg(long)]
    no_fetch: bool,
}

pub(crate) fn run(workspace: &Workspace, options: &SurviveOptions) -> Result<(), StepError> {
    let qemu = qemu(workspace, !options.no_fetch)?;
    let profile: &[&str] = if options.release { &["--release"] } else { &[] };
    let cargo = ["test", "--package", PACKAGE, "--test", TESTS, "--no-run"];
    let messages = built(workspace.cargo(cargo).args(profile))?;
    let (tests, program) = (executable(&messages, TESTS)?, executable(&messages, PACKAGE)?);
    let mut summary = Summary::default();
    summary.start_program(options.kernel.name());
    if let Err(error) = on_host(workspace, &qemu, [tests, program], options, &mut summary) {
        println!("{error}");
        summary.ended_badly(error.to_string().lines().next().unwrap_or_default());
    }
    println!("\n{summary}");
    if summary.is_good() { Ok(()) } else { Err(StepError::TestsFailed) }
}

fn on_host(
    workspace: &Workspace,
    qemu: &Qemu,
    [tests, program]: [PathBuf; 2],
    options: &SurviveOptions,
    summary: &mut Summary,
) -> Result<(), RunError> {
    let kernel = Kernel::get(workspace, options.kernel, !options.no_fetch)?;
    let start = Instant::now();
    let say = |line: &str| println!("{:6} {:4} s  {line}", options.kernel.name(), start.elapsed().as_secs());
    say(&format!("starting a host with {}", kernel.release));
    // The tests look for the program where cargo has built it.
    let place = program.display().to_string();
    let mut programs = vec![("/tests", tests), (&*place, program)];
    programs.extend(options.before.iter().map(|before| (BEFORE, before.clone())));
    let machine = Machine {
        kernel: &kernel,
        cpus: 1,
        lacks: None,
        memory_mib: options.memory,
        modules: &MODULES,
        programs: &programs,
        devices: &[],
        network: None,
    };
    let mut host = Host::start(workspace, qemu, &machine)?;
    let filter: Vec<String> = options.filter.iter().map(|text| quoted(text)).collect();
    // A host there is silent for seconds without being dead.
    let sandbox = u8::from(!options.no_sandbox);
    let before = options.before.as_ref().map_or_else(String::new, |_| format!("OUTLIVE_BEFORE={BEFORE} "));
    let tests = format!("/tests --test-threads 1 --show-output {}", filter.join(" "));
    // The kernel tells which system call ended a process.
    let killed = "dmesg | grep type=1326";
    let command = format!(
        "{before}OUTLIVE_TEST_SANDBOX={sandbox} OUTLIVE_DEAD_AFTER=8s {tests}; status=$?; {killed}; exit $status"
    );
    let status = host.run(&command, Duration::from_secs(options.limit * 60), |line| {
        say(line);
        summary.line(line);
    })?;
    if status != 0 && summary.is_good() {
        summary.ended_badly(&format!("the tests ended with {status}"));
    } else if summary.counts() == [0; 3] {
        summary.ended_badly("no test has such a name");
    }
    host.power_off()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: SurviveOptions,
    }

    #[test]
    fn options() {
        let parse = |words: &[&str]| Cli::try_parse_from([&["survive"], words].concat());
        let options = parse(&["kills", "fence::", "--kernel", "newest"]).unwrap().options;
        assert_eq!((options.filter.len(), options.kernel), (2, Series::Sid));
        for wrong in [&[][..], &["kills", "--memory", "100"], &["kills", "--kernel", "4.19"]] {
            assert_eq!(parse(wrong).map(|_| ()).unwrap_err().exit_code(), 2, "{wrong:?}");
        }
    }
}
