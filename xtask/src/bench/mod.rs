//! `cargo xtask bench`.

mod dirty;
mod last;
mod migrate;
mod plot;
mod rows;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{StepError, Workspace, step};
use rows::Row;

#[derive(clap::Args, Debug)]
pub(crate) struct BenchOptions {
    /// What to measure [default: with --quick dirty, wire, pause and guest, in less than five minutes]
    #[arg(required_unless_present = "quick")]
    what: Option<Bench>,
    /// Also write every row to FILE, one JSON object a line
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// How many hand-overs [default: 200; with --quick 20]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    count: Option<u32>,
    /// Fewer cases, in less than a minute; draws no plots
    #[arg(long)]
    quick: bool,
    /// Make these the last figures of the tree, in docs/bench: later runs are shown beside them
    #[arg(long)]
    keep: bool,
    /// Leave the plots in docs/bench as they are
    #[arg(long)]
    no_plot: bool,
}

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask bench dirty                      all cases, in about four minutes, and new plots in docs/bench
  cargo xtask bench --quick                    a look at everything, beside the last figures (docs/bench); as root
  cargo xtask bench dirty --quick              a first look
  cargo xtask bench dirty --json dirty.jsonl   the rows for a program
  cargo xtask bench migrate                    a live migration with outlive-dirty beside one with bitmaps
  cargo xtask bench wire --quick               how fast pages are written down for the standby
  cargo xtask bench guest                      what a guest that writes much notices; as root, in network namespaces
  cargo xtask bench clients                    what clients of a protected VM wait for, also when its host is killed
  cargo xtask bench hand-over --count 50       what clients notice of hand-overs; as root, in network namespaces
  cargo xtask bench rate                       how many checkpoints a second are held; as root, in network namespaces
  cargo xtask bench link                       what TLS costs, beside a plain link; as root, in network namespaces
  cargo xtask bench record                     what recording a VM costs it; as root, in network namespaces
  cargo xtask bench pause --quick              the pause of a checkpoint beside what KVM alone needs for it

Every row is a ratio: the value beside that of a peer, both measured in turns in one run. A goal that is missed is
printed as missed and is no error. The exit code is 2 if the bench cannot run here (no /dev/kvm) or FILE cannot be
written.

A row of FILE:
  {\"bench\":\"dirty.harvest\",\"case\":{\"backend\":\"ring\",\"vm_gib\":8,\"dirty\":300,\"pattern\":\"scattered\",\"hot\":0},
   \"value\":43.1,\"unit\":\"us\",\"peer\":\"bitmap\",\"peer_value\":165.0}     (in one line)";

#[derive(clap::ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Bench {
    /// Dirty tracking: harvest and rearm, whole epochs, fetch, each compared with the bitmap
    Dirty,
    /// Live migration of VMs of 1, 64 and 512 GiB with outlive-dirty and with bitmaps; in two minutes
    Migrate,
    /// The speed of a guest under write loads, compared with the same guest unprotected, and the bytes of its
    /// checkpoints, compared with raw pages
    Guest,
    /// Encoding of pages for the standby: time compared with a copy, bytes compared with raw pages
    Wire,
    /// The pause of a checkpoint as a vCPU sees it, compared with its floor: kick, state and copy on bare KVM
    Pause,
    /// Checkpoints a second at short intervals, and what they leave of the guest's time
    Rate,
    /// Checkpoints and the base over TLS, compared with a plain link and with a copy over the same one
    Link,
    /// What recording a VM costs it: its writes, checkpoints and requests, compared with a standby that does not record
    Record,
    /// The time of a request, the requests of many clients, and the longest wait around a kill, compared with the same
    /// guest unprotected
    Clients,
    /// Downtime of hand-overs under load, the wait of clients, and the time without protection, compared with the goals
    HandOver,
}

impl Bench {
    fn name(self) -> &'static str {
        match self {
            Bench::Dirty => "dirty",
            Bench::Migrate => "migrate",
            Bench::Guest => "guest",
            Bench::Wire => "wire",
            Bench::Pause => "pause",
            Bench::Rate => "rate",
            Bench::Link => "link",
            Bench::Record => "record",
            Bench::Clients => "clients",
            Bench::HandOver => "hand-over",
        }
    }

    fn package(self) -> &'static str {
        match self {
            Bench::Dirty | Bench::Migrate => "outlive-dirty",
            Bench::Guest | Bench::Rate | Bench::Link | Bench::Record | Bench::Clients | Bench::HandOver => {
                "outlive"
            }
            Bench::Wire => "outlive-epoch",
            Bench::Pause => "outlive-machine",
        }
    }

    fn runs_vms(self) -> bool {
        self != Bench::Wire
    }

    /// File names and contents of the plots.
    fn plots(self, rows: &[Row]) -> Vec<(&'static str, String)> {
        match self {
            Bench::Dirty => dirty::plots(rows),
            Bench::Migrate => migrate::plots(rows),
            Bench::Guest
            | Bench::Wire
            | Bench::Pause
            | Bench::Rate
            | Bench::Link
            | Bench::Record
            | Bench::Clients
            | Bench::HandOver => Vec::new(),
        }
    }
}

/// Runs the bench, or several, then writes the results.
pub(crate) fn run(workspace: &Workspace, options: &BenchOptions) -> Result<(), StepError> {
    let all = [Bench::Dirty, Bench::Wire, Bench::Pause, Bench::Guest];
    let chosen = options.what.as_ref().map_or(&all[..], std::slice::from_ref);
    if options.count.is_some() && options.what != Some(Bench::HandOver) {
        return Err(StepError::Unusable(
            "--count goes with hand-over: cargo xtask bench hand-over --count N".into(),
        ));
    }
    // Problems are reported before the minutes of measuring, not after them.
    if chosen.iter().any(|what| what.runs_vms()) {
        kvm(Path::new("/dev/kvm"))?;
    }
    options.json.as_deref().map(writable).transpose()?;
    let mut texts = String::new();
    let mut tables = String::new();
    for &what in chosen {
        let text = measure(workspace, options, what)?;
        let rows = rows::parse(&text).map_err(|error| StepError::Failed(format!("the bench ({error})")))?;
        let last = last::place(&workspace.root, what.name(), options.quick);
        tables += &last::beside(&last, &rows);
        if options.keep {
            fs::write(&last, &text).map_err(|error| cannot_write(&last, &error))?;
        }
        if !options.no_plot && !options.quick {
            draw(&workspace.root.join("docs/bench"), what.plots(&rows))?;
        }
        texts += &text;
    }
    println!("\n{tables}");
    if let Some(file) = &options.json {
        fs::write(file, &texts).map_err(|error| cannot_write(file, &error))?;
        println!("{} rows in {}", texts.lines().count(), file.display());
    }
    Ok(())
}

/// Runs one bench. Returns its rows as text.
fn measure(workspace: &Workspace, options: &BenchOptions, what: Bench) -> Result<String, StepError> {
    let found = workspace.target.join("bench").join(format!("{}.jsonl", what.name()));
    let directory = found.parent().expect("a file in a directory");
    fs::create_dir_all(directory).map_err(|source| StepError::File { path: directory.into(), source })?;
    step(&mut command(workspace, options, what, &found))?;
    fs::read_to_string(&found).map_err(|source| StepError::File { path: found, source })
}

fn kvm(device: &Path) -> Result<(), StepError> {
    let opened = File::options().read(true).write(true).open(device);
    opened.map(drop).map_err(|error| {
        StepError::Unusable(format!("no {} here, and the bench runs VMs: {error}", device.display()))
    })
}

/// Leaves an existing file as it is.
fn writable(file: &Path) -> Result<(), StepError> {
    let opened = File::options().write(true).create(true).truncate(false).open(file);
    opened.map(drop).map_err(|error| cannot_write(file, &error))
}

fn cannot_write(file: &Path, error: &std::io::Error) -> StepError {
    StepError::Unusable(format!("cannot write {}: {error}", file.display()))
}

fn command(workspace: &Workspace, options: &BenchOptions, what: Bench, found: &Path) -> Command {
    if what == Bench::Migrate {
        return example(workspace, options, what, found);
    }
    let mut command = workspace.cargo(["bench", "--package", what.package(), "--bench"]);
    match what.package() {
        // One program has them all.
        "outlive" => command.args(["hosts", "--", what.name()]),
        _ => command.args([what.name(), "--"]),
    };
    // Absolute, because cargo runs a bench in the directory of its package.
    command.arg("--json").arg(found);
    if options.quick {
        command.arg("--quick");
    }
    if let Some(count) = options.count {
        command.args(["--count", &count.to_string()]);
    }
    command
}

/// A bench that is also an example for users.
fn example(workspace: &Workspace, options: &BenchOptions, what: Bench, found: &Path) -> Command {
    let mut command = workspace.cargo(["run", "--release", "--package", what.package(), "--example"]);
    let cases =
        if options.quick { ["--gib", "1", "--rounds", "2"] } else { ["--gib", "1,64,512", "--rounds", "8"] };
    command.arg(what.name()).arg("--").args(cases).arg("--json").arg(found);
    command
}

fn draw(directory: &Path, plots: Vec<(&'static str, String)>) -> Result<(), StepError> {
    fs::create_dir_all(directory).map_err(|source| StepError::File { path: directory.into(), source })?;
    for (name, text) in plots {
        let path = directory.join(name);
        fs::write(&path, text).map_err(|source| StepError::File { path: path.clone(), source })?;
        println!("drawn: {}", path.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        options: BenchOptions,
    }

    fn parse(words: &[&str]) -> Result<BenchOptions, clap::Error> {
        Cli::try_parse_from([&["bench"], words].concat()).map(|cli| cli.options)
    }

    #[test]
    fn options() {
        let options = parse(&["dirty", "--quick", "--json", "x.jsonl", "--no-plot"]).unwrap();
        assert_eq!(
            (options.what, options.quick, options.no_plot, options.json),
            (Some(Bench::Dirty), true, true, Some("x.jsonl".into()))
        );
        let options = parse(&["dirty"]).unwrap();
        assert!(!options.quick && !options.no_plot && options.json.is_none());
        assert!(parse(&[]).is_err());
        assert_eq!(parse(&["--quick"]).unwrap().what, None);
        assert!(parse(&["nothing"]).is_err());
        assert!(parse(&["dirty", "--json"]).is_err());
    }

    #[test]
    fn the_bench_is_started_with_the_options() {
        let workspace = Workspace { root: "/w".into(), target: "/w/target".into() };
        let words = |options: &BenchOptions| {
            let what = options.what.unwrap();
            crate::run::describe(&command(&workspace, options, what, Path::new("/f")))
        };
        let full = words(&parse(&["dirty"]).unwrap());
        assert!(full.ends_with(" bench --package outlive-dirty --bench dirty -- --json /f"), "{full}");
        assert!(words(&parse(&["dirty", "--quick"]).unwrap()).ends_with("--json /f --quick"));
        let handed = words(&parse(&["hand-over", "--count", "50"]).unwrap());
        assert!(
            handed.ends_with(" --package outlive --bench hosts -- hand-over --json /f --count 50"),
            "{handed}"
        );
        assert!(parse(&["hand-over", "--count", "0"]).is_err());
        let full = words(&parse(&["migrate"]).unwrap());
        assert!(full.ends_with("--example migrate -- --gib 1,64,512 --rounds 8 --json /f"), "{full}");
        let wire = words(&parse(&["wire"]).unwrap());
        assert!(wire.ends_with(" bench --package outlive-epoch --bench wire -- --json /f"), "{wire}");
        let pause = words(&parse(&["pause", "--quick"]).unwrap());
        assert!(
            pause.ends_with(" bench --package outlive-machine --bench pause -- --json /f --quick"),
            "{pause}"
        );
    }

    #[test]
    fn what_cannot_work_is_said_in_one_line() {
        let no_kvm = kvm(Path::new("/nowhere/kvm")).unwrap_err();
        let no_file = writable(Path::new("/nowhere/rows")).unwrap_err();
        for error in [no_kvm, no_file] {
            assert_eq!(error.exit_code(), 2);
            assert!(!error.to_string().contains('\n') && error.to_string().contains("/nowhere/"), "{error}");
        }
    }
}
