//! `cargo xtask nested dirty`: the tests of outlive-dirty that need a kernel, on the kernel of each Debian
//! release.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::host::{Host, HostError, Machine, Qemu};
use super::kernel::{Kernel, Series};
use super::programs::{RunError, built, executable, qemu, quoted};
use crate::run::{StepError, Workspace};
use crate::summary::Summary;

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask nested dirty                            all four kernels
  cargo xtask nested dirty --kernel 6.12              one of them
  cargo xtask nested dirty --kernel 5.10 --kernel newest --filter hot
  cargo xtask nested dirty --epochs 2000              as long as on a real host: hours
  cargo xtask nested dirty --findings                 docs/kernel-findings.md: which of them each kernel shows

Fetches the kernels (30 MB each) and, if it is missing, QEMU; the kernels are kept in target/nested and nothing of them
is installed. To fetch a newer kernel of the same release: rm -r target/nested/kernel-6.12

A host takes 2 GiB and a core. Every line of a host comes with its kernel and the seconds since it
was started. Tests whose back end a kernel does not have are skipped and counted: 5.10 has no dirty ring, and
PAGEMAP_SCAN begins with 6.7.

The exit code is 1 if a test failed, a host did not come up, or a kernel did not get the back end that it should; 2 for
wrong options, or if there is no QEMU and it cannot be fetched.";

const PACKAGE: &str = "outlive-dirty";
/// Prints which back end a kernel gets.
const EXAMPLE: &str = "readme";
/// Shows the faults of kernels.
const FINDINGS: &str = "kernel_findings";
/// Tests that depend on the kernel. The others are the same everywhere.
const TESTS: [&str; 8] = [
    "audit::tests",
    "backend::tests",
    "selftest::tests",
    "source::pagemap::tests",
    "tests::alloc",
    "tests::stamps",
    "tests::traps",
    "tests::uffd",
];

#[derive(clap::Args, Debug)]
pub(crate) struct DirtyOptions {
    /// The host's kernel; can be given several times [default: all]
    #[arg(long, value_enum, value_name = "SERIES")]
    kernel: Vec<Series>,
    /// Most epochs of a test: on a real host there are 2000
    #[arg(long, value_name = "NUMBER", default_value_t = 100, value_parser = clap::value_parser!(u64).range(20..))]
    epochs: u64,
    /// Processors of a host. With one, the steps of several vCPUs are interleaved and never at the same time
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    cpus: u32,
    /// Run only tests whose name contains this; can be given several times
    #[arg(long, value_name = "TEXT")]
    filter: Vec<String>,
    /// Run no test, but the programs of docs/kernel-findings.md
    #[arg(long, conflicts_with_all = ["filter", "epochs"])]
    findings: bool,
    /// Minutes for the tests of one host
    #[arg(long, value_name = "MINUTES", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    limit: u64,
    /// Use only what has been fetched before
    #[arg(long)]
    no_fetch: bool,
}

impl DirtyOptions {
    fn kernels(&self) -> Vec<Series> {
        let wanted = |series: &Series| self.kernel.is_empty() || self.kernel.contains(series);
        Series::ALL.into_iter().filter(wanted).collect()
    }

    /// The line of shell that runs the tests.
    fn command(&self) -> String {
        if self.findings {
            return "/findings all".to_string();
        }
        let tests: Vec<String> = if self.filter.is_empty() {
            TESTS.map(str::to_string).to_vec()
        } else {
            self.filter.iter().map(|text| quoted(text)).collect()
        };
        format!(
            "OUTLIVE_TEST_EPOCHS={} RUST_BACKTRACE=1 /tests --test-threads 1 --show-output {}",
            self.epochs,
            tests.join(" ")
        )
    }
}

/// The back end that a kernel should get.
fn expected(series: Series) -> &'static str {
    if series == Series::Bullseye { "clear-log" } else { "ring" }
}

/// The result on a host.
struct Row {
    series: Series,
    release: String,
    backend: String,
    counts: [usize; 3],
    took: Duration,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Row { series, release, backend, counts: [passed, failed, skipped], took } = self;
        let seconds = took.as_secs();
        write!(f, "{:8}{release:32}{backend:12}{passed:>6}{failed:>8}{skipped:>9}", series.name())?;
        write!(f, "{:>6} min {:02} s", seconds / 60, seconds % 60)
    }
}

const HEAD: &str =
    "kernel  release                         back end    passed  failed  skipped           time";

/// Runs the tests on every kernel, prints the results, and fails if a test failed.
pub(crate) fn run(workspace: &Workspace, options: &DirtyOptions) -> Result<(), StepError> {
    let qemu = qemu(workspace, !options.no_fetch)?;
    let package = ["--package", PACKAGE];
    let test = built(workspace.cargo(["test", "--release", "--lib", "--no-run"]).args(package))?;
    let examples = ["build", "--release", "--example", EXAMPLE, "--example", FINDINGS];
    let example = built(workspace.cargo(examples).args(package))?;
    let programs = programs(&(test + &example))?;
    let mut rows = Vec::new();
    let mut summaries = Vec::new();
    for series in options.kernels() {
        let mut summary = Summary::default();
        summary.start_program(series.name());
        match on_host(workspace, &qemu, series, &programs, options, &mut summary) {
            Ok(row) => rows.push(row),
            Err(error) => {
                println!("{:6} {error}", series.name());
                summary.ended_badly(&format!(
                    "{}: {}",
                    series.name(),
                    error.to_string().lines().next().unwrap_or("")
                ));
            }
        }
        summaries.push(summary);
    }
    println!();
    summaries.iter().for_each(|summary| println!("{summary}"));
    println!("\n{HEAD}");
    rows.iter().for_each(|row| println!("{row}"));
    if summaries.iter().all(Summary::is_good) { Ok(()) } else { Err(StepError::TestsFailed) }
}

/// The part for `cargo xtask test`: one kernel and few epochs, about two minutes.
pub(crate) fn in_tests(workspace: &Workspace, fetch: bool, summary: &mut Summary) -> Result<(), StepError> {
    let series = Series::Bookworm;
    let options = DirtyOptions {
        kernel: vec![series],
        epochs: 30,
        cpus: 1,
        filter: Vec::new(),
        findings: false,
        limit: 15,
        no_fetch: !fetch,
    };
    // With the same options as the tests, so that it is already built.
    let built = built(&mut workspace.cargo(["test", "--release", "--workspace", "--no-run"]))?;
    let programs = programs(&built)?;
    summary.start_program(&format!("outlive-dirty on {}", series.name()));
    let ran = Qemu::get(workspace, fetch)
        .map_err(RunError::from)
        .and_then(|qemu| on_host(workspace, &qemu, series, &programs, &options, summary));
    match ran {
        Ok(_) => (),
        Err(error @ (RunError::Kernel(_) | RunError::Host(HostError::NoQemu))) => {
            println!("skipped: {error}");
            summary.line(&format!("skipped: {error}"));
        }
        Err(error) => {
            println!("{:6} {error}", series.name());
            summary.ended_badly(&format!("outlive-dirty on {}", series.name()));
        }
    }
    Ok(())
}

fn on_host(
    workspace: &Workspace,
    qemu: &Qemu,
    series: Series,
    programs: &[(&str, PathBuf)],
    options: &DirtyOptions,
    summary: &mut Summary,
) -> Result<Row, RunError> {
    let kernel = Kernel::get(workspace, series, !options.no_fetch)?;
    let start = Instant::now();
    let say = |line: &str| println!("{:6} {:4} s  {line}", series.name(), start.elapsed().as_secs());
    say(&format!("starting a host with {}", kernel.release));
    let machine = Machine {
        kernel: &kernel,
        cpus: options.cpus,
        lacks: None,
        memory_mib: 2048,
        modules: &["kvm_amd"],
        programs,
        devices: &[],
        network: None,
    };
    let mut host = Host::start(workspace, qemu, &machine)?;
    let mut backend = String::from("none");
    let status = host.run("/example", Duration::from_secs(120), |line| {
        say(line);
        if let Some(rest) = line.strip_prefix("back end: ") {
            backend = rest.split(' ').next().unwrap_or_default().to_string();
        }
    })?;
    if status != 0 || backend != expected(series) {
        summary.ended_badly(&format!(
            "{}: the back end is {backend} and should be {}; the example ended with {status}",
            series.name(),
            expected(series)
        ));
    }
    let limit = Duration::from_secs(options.limit * 60);
    let status = host.run(&options.command(), limit, |line| {
        say(line);
        summary.line(line);
    })?;
    if status != 0 && summary.is_good() {
        summary.ended_badly(&format!("{}: the tests ended with {status}", series.name()));
    } else if summary.counts() == [0; 3] && !options.findings {
        summary.ended_badly(&format!("{}: no test has such a name", series.name()));
    }
    let row = Row {
        series,
        release: kernel.release.clone(),
        backend,
        counts: summary.counts(),
        took: start.elapsed(),
    };
    host.power_off()?;
    Ok(row)
}

/// The programs that the host runs, by their paths there.
fn programs(messages: &str) -> Result<[(&'static str, PathBuf); 3], StepError> {
    let find = |name: &str| executable(messages, name);
    Ok([("/tests", find(PACKAGE)?), ("/example", find(EXAMPLE)?), ("/findings", find(FINDINGS)?)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: DirtyOptions,
    }

    fn parse(words: &[&str]) -> Result<DirtyOptions, clap::Error> {
        Cli::try_parse_from([&["dirty"], words].concat()).map(|cli| cli.options)
    }

    #[test]
    fn options() {
        let options = parse(&[]).unwrap();
        assert_eq!(options.kernels(), Series::ALL);
        assert!(
            options.command().contains("OUTLIVE_TEST_EPOCHS=100 ")
                && options.command().contains("tests::stamps")
        );
        let options =
            parse(&["--kernel", "6.1", "--kernel", "newest", "--epochs", "20", "--filter", "it's"]).unwrap();
        assert_eq!(options.kernels(), [Series::Bookworm, Series::Sid]);
        assert_eq!(parse(&["--findings"]).unwrap().command(), "/findings all");
        assert!(options.command().ends_with(r"--show-output 'it'\''s'"), "{}", options.command());
    }

    #[test]
    fn wrong_options_are_refused_with_2() {
        for words in [
            &["--kernel", "4.19"][..],
            &["--epochs", "1"],
            &["--limit", "0"],
            &["--epochs", "x"],
            &["more"],
            &["--findings", "--filter", "x"],
        ] {
            assert_eq!(parse(words).unwrap_err().exit_code(), 2, "{words:?}");
        }
    }

    #[test]
    fn rows_stand_under_their_heads() {
        let row = Row {
            series: Series::Sid,
            release: "7.2.13+deb14-cloud-amd64".into(),
            backend: "ring".into(),
            counts: [51, 0, 2],
            took: Duration::from_secs(125),
        };
        let row = row.to_string();
        assert_eq!(row.find("ring"), HEAD.find("back end"));
        assert_eq!(row.find("51").map(|at| at + 2), HEAD.find("passed").map(|at| at + 6));
        assert_eq!(row.len(), HEAD.len());
    }
}
