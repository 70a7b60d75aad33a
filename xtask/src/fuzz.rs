//! `cargo xtask fuzz`: LLVM's libFuzzer over everything that a guest, a peer or a file gives the program.
//! Works with a stable compiler: plain compiler flags turn the measuring of coverage on.
//!
//! The targets are in `fuzz/`, their bodies in the crates (`fuzz.rs`). Inputs known to be interesting are in
//! `fuzz/corpus/TARGET`; a run puts new ones into `target/fuzz/corpus/TARGET`, and into the former with
//! `--keep`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

use crate::packages;
use crate::run::{StepError, Workspace, collect, niced, step};
use crate::torture::{minutes, seconds};

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask fuzz                             ten seconds of each target
  cargo xtask fuzz --list                      the targets
  cargo xtask fuzz --target net --minutes 30
  cargo xtask fuzz --target net --input FILE   one input once more
  cargo xtask fuzz --minutes 60 --keep         an hour over all; the corpora in fuzz/corpus grow by what is new

The first input that breaks a target ends the run with exit code 1; the file that holds it is named. The build
takes some minutes the first time and needs a C++ compiler, which is fetched if it is missing.";

/// The same as in `fuzz/src/main.rs`.
const TARGETS: [&str; 17] = [
    "wire", "message", "incoming", "state", "sidecar", "journal", "served", "metrics", "disk", "grub",
    "image", "record", "kernel", "console", "rng", "net", "blk",
];

/// Seconds for each target by default.
const SECONDS: u64 = 10;
/// An input that takes this long is a finding.
const LONGEST_SECONDS: u64 = 20;

/// Coverage in the form that libFuzzer needs; without it the fuzzer is blind.
const FLAGS: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
                     -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
                     -Cllvm-args=-sanitizer-coverage-trace-compares";

#[derive(clap::Args, Default)]
pub(crate) struct FuzzOptions {
    /// How long, all targets together; ten seconds of each without it
    #[arg(long, value_name = "M", value_parser = minutes)]
    minutes: Option<f64>,
    /// Only this target (repeat for more)
    #[arg(long, value_name = "T", value_parser = clap::builder::PossibleValuesParser::new(TARGETS))]
    target: Vec<String>,
    /// Run this input once
    #[arg(long, value_name = "FILE", conflicts_with_all = ["minutes", "keep"], requires = "target")]
    input: Option<PathBuf>,
    /// Add new inputs to the corpora of the project
    #[arg(long)]
    keep: bool,
    /// Print the names of the targets and end
    #[arg(long, conflicts_with_all = ["minutes", "target", "input", "keep"])]
    list: bool,
}

/// Runs the chosen targets one after the other.
pub(crate) fn run(workspace: &Workspace, options: &FuzzOptions) -> Result<(), StepError> {
    if options.list {
        TARGETS.iter().for_each(|target| println!("{target}"));
        return Ok(());
    }
    packages::provide(workspace, &[packages::COMPILER], true);
    let fuzzer = Fuzzer::build(workspace)?;
    let all = TARGETS.map(str::to_string);
    let targets = if options.target.is_empty() { &all[..] } else { &options.target };
    if let Some(input) = &options.input {
        let input =
            std::path::absolute(input).map_err(|source| StepError::File { path: input.clone(), source })?;
        return targets.iter().try_for_each(|target| step(fuzzer.command(target).arg(&input)));
    }
    let each = options.minutes.map_or(SECONDS, |minutes| (seconds(minutes) / targets.len() as u64).max(1));
    for target in targets {
        fuzzer.fuzz(target, each)?;
        if options.keep {
            fuzzer.keep(target)?;
        }
    }
    Ok(())
}

/// The part that `cargo xtask test` runs beside other tests, for [`SECONDS`] of each target and with all other
/// work first. The output is in a file, which an error names.
pub(crate) fn in_tests(workspace: &Workspace) -> Result<(), StepError> {
    let fuzzer = Fuzzer::build_with(workspace, |build| collect(&mut niced(build), |_| {}).map(drop))?;
    let fuzz = |target: &&str| {
        let mut lines = Vec::new();
        let mut command = niced(&fuzzer.fuzzing(target, SECONDS)?);
        let status = collect(&mut command, |line| lines.push(line.to_string()))?;
        if status.success() {
            return Ok(());
        }
        let log = fuzzer.found.join(format!("{target}.log"));
        fs::write(&log, lines.join("\n") + "\n").ok();
        Err(StepError::Failed(format!("the fuzz target {target}, see {}; it", log.display())))
    };
    // Two at a time: a target has one thread.
    let (one, other) = TARGETS.split_at(TARGETS.len() / 2);
    thread::scope(|scope| {
        let other = scope.spawn(|| other.iter().try_for_each(fuzz));
        let one = one.iter().try_for_each(fuzz);
        one.and(other.join().unwrap_or_else(|_| Err(StepError::Failed("fuzzing".into()))))
    })
}

/// The built program and its folders.
struct Fuzzer {
    program: PathBuf,
    /// The project's corpus.
    corpora: PathBuf,
    /// The corpus of this checkout only.
    found: PathBuf,
}

impl Fuzzer {
    fn build(workspace: &Workspace) -> Result<Fuzzer, StepError> {
        let began = Instant::now();
        let fuzzer = Fuzzer::build_with(workspace, step)?;
        eprintln!("the fuzz targets were built in {} s", began.elapsed().as_secs());
        Ok(fuzzer)
    }

    fn build_with(
        workspace: &Workspace,
        run: impl FnOnce(&mut Command) -> Result<(), StepError>,
    ) -> Result<Fuzzer, StepError> {
        let target = workspace.target.join("fuzz");
        let flags = std::env::var("RUSTFLAGS").unwrap_or_default();
        let mut build = workspace.cargo(["build", "--release", "--manifest-path", "fuzz/Cargo.toml"]);
        // With a target triple given, the flags do not apply to build scripts, which have no libFuzzer.
        build.args(["--target", HOST]).arg("--target-dir").arg(&target);
        build.env("RUSTFLAGS", format!("{flags} {FLAGS}").trim_start());
        run(&mut build)?;
        Ok(Fuzzer {
            program: target.join(HOST).join("release/outlive-fuzz"),
            corpora: workspace.root.join("fuzz/corpus"),
            found: target,
        })
    }

    fn command(&self, target: &str) -> Command {
        let mut command = Command::new(&self.program);
        command.env("OUTLIVE_FUZZ_TARGET", target);
        command
    }

    fn fuzzing(&self, target: &str, seconds: u64) -> Result<Command, StepError> {
        let (known, found) = (self.corpora.join(target), self.found.join("corpus").join(target));
        let artifacts = self.found.join("artifacts").join(target);
        for folder in [&known, &found, &artifacts] {
            make(folder)?;
        }
        let mut command = self.command(target);
        command.args([format!("-max_total_time={seconds}"), format!("-timeout={LONGEST_SECONDS}")]);
        command.args(["-print_final_stats=1", "-close_fd_mask=1", "-verbosity=0", "-max_len=16384"]);
        command.arg(format!("-artifact_prefix={}/", artifacts.display()));
        // New inputs go to the first.
        command.arg(found).arg(known);
        Ok(command)
    }

    fn fuzz(&self, target: &str, seconds: u64) -> Result<(), StepError> {
        let artifacts = self.found.join("artifacts").join(target);
        step(&mut self.fuzzing(target, seconds)?).map_err(|_| {
            StepError::Failed(format!(
                "the fuzz target {target}; its input is in {}, and cargo xtask fuzz --target {target} --input FILE \
                 runs it again. It",
                artifacts.display()
            ))
        })
    }

    /// Adds inputs to the project's corpus that reach code that it does not reach.
    fn keep(&self, target: &str) -> Result<(), StepError> {
        let mut merge = self.command(target);
        merge.args(["-set_cover_merge=1", "-close_fd_mask=1", "-verbosity=0"]);
        merge.arg(self.corpora.join(target)).arg(self.found.join("corpus").join(target));
        step(&mut merge)
    }
}

/// Targets run here, as tests do.
const HOST: &str = "x86_64-unknown-linux-gnu";

fn make(folder: &Path) -> Result<(), StepError> {
    fs::create_dir_all(folder).map_err(|source| StepError::File { path: folder.to_path_buf(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_has_these_targets() {
        let sources = Workspace::find().root.join("fuzz/src/main.rs");
        let sources = fs::read_to_string(sources).unwrap();
        let lines = sources.lines().filter_map(|line| line.trim().strip_prefix("(\"")?.split('"').next());
        assert_eq!(lines.collect::<Vec<_>>(), TARGETS);
    }

    #[test]
    fn the_page_about_proofs_has_them_all() {
        let page = fs::read_to_string(Workspace::find().root.join("docs/proofs.md")).unwrap();
        let table = page.split("\n# Fuzzing\n").nth(1).and_then(|rest| rest.split("\n# ").next()).unwrap();
        // The first column of its rows.
        let rows = table.lines().filter_map(|line| line.strip_prefix("| `")?.split(" |").next());
        let mut named: Vec<_> =
            rows.flat_map(|row| row.split('`').step_by(2)).filter(|it| !it.is_empty()).collect();
        let mut targets = TARGETS.to_vec();
        named.sort_unstable();
        targets.sort_unstable();
        assert_eq!(named, targets);
    }
}
