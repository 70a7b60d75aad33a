//! The copy of the sources with all changes in it.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use super::weave::{Numbered, SWITCH, numbers_in, weave};
use super::{SOURCES, Sources, crate_root, read};
use crate::run::{StepError, Workspace, output};

/// Bytes of address space for a program with tests. A change may make a queue grow for ever.
const MEMORY: u64 = 4 << 30;

/// The tests' verdict on one change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Noticed,
    Unnoticed,
}

/// See the module.
pub(super) struct Nursery {
    root: PathBuf,
    target: PathBuf,
    cargo: PathBuf,
    /// Runs of the tests, the quick ones first.
    steps: Vec<Step>,
    /// Changes that do not compile. They are not in the build.
    dropped: BTreeSet<u32>,
}

impl Nursery {
    /// Copies the sources, weaves the changes in, and builds the tests. What does not compile is left out.
    ///
    /// # Errors
    /// Something else does not compile, or files cannot be written.
    pub(super) fn build(workspace: &Workspace, sources: &Sources) -> Result<Self, StepError> {
        let root = workspace.target.join("mutants/tree");
        copy(workspace, &root)?;
        let mut nursery = Self {
            root,
            target: workspace.target.join("mutants/target"),
            cargo: std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()).into(),
            steps: Vec::new(),
            dropped: BTreeSet::new(),
        };
        loop {
            nursery.write(sources)?;
            println!("building the tests with all changes but {}", nursery.dropped.len());
            match nursery.compile()? {
                Compiled::Steps(steps) => nursery.steps = steps,
                Compiled::Not(numbers) => {
                    let before = nursery.dropped.len();
                    nursery.dropped.extend(numbers);
                    if nursery.dropped.len() == before {
                        return Err(StepError::Unusable(
                            "outlive-pair does not compile; mend it first".into(),
                        ));
                    }
                    continue;
                }
            }
            return Ok(nursery);
        }
    }

    /// The programs with the tests.
    pub(super) fn programs(&self) -> Vec<&Path> {
        self.steps.iter().map(|step| &*step.program).collect()
    }

    /// Whether a change could not be built.
    pub(super) fn does_not_compile(&self, number: u32) -> bool {
        self.dropped.contains(&number)
    }

    /// Runs all tests without any change, and notes how long they take.
    ///
    /// # Errors
    /// They fail.
    pub(super) fn check_without_changes(&mut self) -> Result<(), StepError> {
        for number in 0..self.steps.len() {
            let began = Instant::now();
            if !self.passes(&self.steps[number], 0, Duration::from_secs(3600))? {
                return Err(StepError::Unusable(
                    "the tests of outlive-pair fail without any change; mend them first".into(),
                ));
            }
            self.steps[number].limit = began.elapsed() * 4 + Duration::from_secs(10);
        }
        Ok(())
    }

    /// Runs the tests with a change. If they do not finish in time, or want far more memory than they need, they have
    /// noticed something, too.
    ///
    /// # Errors
    /// They cannot be run.
    pub(super) fn judge(&self, number: u32, round: Round) -> Result<Verdict, StepError> {
        for step in self.steps.iter().filter(|step| step.round == round) {
            if !self.passes(step, number, step.limit)? {
                return Ok(Verdict::Noticed);
            }
        }
        Ok(Verdict::Unnoticed)
    }

    fn passes(&self, step: &Step, number: u32, limit: Duration) -> Result<bool, StepError> {
        let failed = |source| StepError::Start { program: step.program.display().to_string(), source };
        let mut command = Command::new("prlimit");
        command.arg(format!("--as={MEMORY}")).arg("--").arg(&step.program);
        // Planted mistakes are for the tests, and these changes are for the code.
        command.args(["--test-threads", "1", "--skip", "planted", "--skip", "a_schedule_that_fails"]);
        command.args(step.words);
        command.current_dir(self.root.join("crates/pair")).env("OUTLIVE_MUTANT", number.to_string());
        command.env("OUTLIVE_SIM_SECONDS", "1").env("OUTLIVE_MODEL_SECONDS", "2");
        command.env("OUTLIVE_SIM_SEEDS", if step.round == Round::Quick { "1500" } else { "10000" });
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
        let mut child = command.spawn().map_err(failed)?;
        let saw_failure = watch_for_failure(&mut child);
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = child.try_wait().map_err(failed)? {
                return Ok(status.success());
            }
            if saw_failure.load(Ordering::Relaxed) || Instant::now() > deadline {
                killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL).ok();
                child.wait().map_err(failed)?;
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn write(&self, sources: &Sources) -> Result<(), StepError> {
        let folder = self.root.join(SOURCES);
        for source in &sources.0 {
            let mine = sources.numbered().filter(|(of, ..)| of.file == source.file);
            let kept = mine.filter(|(_, site, first)| {
                let ways = u32::try_from(site.what.ways()).unwrap_or(u32::MAX);
                !(*first..first + ways).any(|number| self.dropped.contains(&number))
            });
            let changes: Vec<_> = kept.map(|(_, site, number)| Numbered { site, number }).collect();
            write_if_new(&folder.join(source.file), weave(&source.text, &changes).as_bytes())?;
        }
        let root = crate_root(&folder);
        let text = read(&root)?;
        if !text.contains(SWITCH) {
            write_if_new(&root, (text + SWITCH).as_bytes())?;
        }
        Ok(())
    }

    fn compile(&self) -> Result<Compiled, StepError> {
        let mut command = Command::new(&self.cargo);
        command.args(["test", "--no-run", "--package", "outlive-pair", "--lib", "--tests"]);
        command.args(["--message-format", "json"]).current_dir(&self.root);
        command.env("CARGO_TARGET_DIR", &self.target).env("RUSTFLAGS", "-Awarnings");
        command.env("CARGO_PROFILE_DEV_OPT_LEVEL", "2").stdin(Stdio::null()).stderr(Stdio::null());
        let output =
            command.output().map_err(|source| StepError::Start { program: "cargo".into(), source })?;
        let text = String::from_utf8_lossy(&output.stdout);
        let messages = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        if !output.status.success() {
            return Ok(Compiled::Not(messages.flat_map(|message| numbers_of_error(&message)).collect()));
        }
        let programs = messages.filter_map(|message| Some(PathBuf::from(message["executable"].as_str()?)));
        // The crate's own program has the simulator.
        let (own, others): (Vec<PathBuf>, Vec<_>) =
            programs.partition(|program| file_name(program).starts_with("outlive_pair"));
        let step = |program: &PathBuf, round, words| {
            let (program, limit) = (program.clone(), Duration::ZERO);
            Step { program, round, words, limit }
        };
        let quick = others.iter().map(|program| step(program, Round::Quick, &[][..]));
        let of_own = |program| QUICK.iter().map(move |words| step(program, Round::Quick, *words));
        let thorough = own.iter().map(|program| step(program, Round::Thorough, &["sim::"][..]));
        Ok(Compiled::Steps(quick.chain(own.iter().flat_map(of_own)).chain(thorough).collect()))
    }
}

/// The crate's own quick tests: without the simulator, then a little of it.
const QUICK: [&[&str]; 2] = [&["--skip", "sim::"], &["sim::the_invariants_hold_in_every_schedule"]];

/// Which tests run with a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Round {
    /// Those that take seconds. They notice nearly everything.
    Quick,
    /// The whole simulator, for changes that the others have not noticed.
    Thorough,
}

/// A run of a program with tests, and how long it may take.
struct Step {
    program: PathBuf,
    round: Round,
    words: &'static [&'static str],
    limit: Duration,
}

enum Compiled {
    Steps(Vec<Step>),
    /// The changes that the compiler complains of.
    Not(BTreeSet<u32>),
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The changes on the lines of a compiler's error.
fn numbers_of_error(message: &Value) -> BTreeSet<u32> {
    let message = &message["message"];
    if message["level"] != "error" {
        return BTreeSet::new();
    }
    let spans = message["spans"].as_array().into_iter().flatten().filter(|span| span["is_primary"] == true);
    let lines = spans.flat_map(|span| span["text"].as_array().into_iter().flatten());
    lines.filter_map(|line| line["text"].as_str()).flat_map(numbers_in).collect()
}

/// Tells when a test has failed; the others then need not run.
fn watch_for_failure(child: &mut Child) -> Arc<AtomicBool> {
    let saw = Arc::new(AtomicBool::new(false));
    if let Some(stdout) = child.stdout.take() {
        let saw = saw.clone();
        thread::spawn(move || {
            let lines = BufReader::new(stdout).lines().map_while(Result::ok);
            for line in lines {
                if line.starts_with("test ") && line.ends_with("FAILED") {
                    saw.store(true, Ordering::Relaxed);
                }
            }
        });
    }
    saw
}

/// Copies what git knows, apart from what is there already.
fn copy(workspace: &Workspace, root: &Path) -> Result<(), StepError> {
    let mut list = Command::new("git");
    list.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(&workspace.root);
    let files = output(&mut list).ok_or_else(|| StepError::Failed("git ls-files".into()))?;
    for file in files.split('\0').filter(|file| !file.is_empty()) {
        // What is deleted and not committed cannot be read.
        if let Ok(bytes) = fs::read(workspace.root.join(file)) {
            write_if_new(&root.join(file), &bytes)?;
        }
    }
    Ok(())
}

/// A file that does not change is not built again.
fn write_if_new(path: &Path, bytes: &[u8]) -> Result<(), StepError> {
    if fs::read(path).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder)
        .and_then(|()| fs::write(path, bytes))
        .map_err(|source| StepError::File { path: path.to_path_buf(), source })
}
