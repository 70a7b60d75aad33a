//! `cargo xtask mutants`: makes one small change after another to the decision code of `pair`. If the tests
//! still pass, they have not noticed the change: either it changes nothing that matters, or a test is missing.
//!
//! All changes are built at once, into a copy of the sources in `target/mutants`, each behind a switch; then the tests
//! run once for each. So a change costs a run, and not a build.
//!
//! ```text
//! find.rs      what can be changed in a file
//! weave.rs     the text of a file with all changes and their switches
//! nursery.rs   the copy of the sources: builds it, and runs its tests with one change
//! verdicts.rs  verdicts of a run that was ended, for the next one
//! known.rs     changes that no test needs to notice, with the reasons (docs/mutants.md)
//! ```

mod find;
mod known;
mod nursery;
mod verdicts;
mod weave;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use self::find::{Site, What};
use self::known::Known;
use self::nursery::{Nursery, Round, Verdict};
use self::verdicts::Verdicts;
use crate::run::{StepError, Workspace};

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask mutants                         all of them: some hundred, an hour or two on two cores
  cargo xtask mutants                         the same command once more, after Ctrl-C: goes on from there
  cargo xtask mutants --file claim.rs         those of one file
  cargo xtask mutants --sample 20 --seed 7    twenty, drawn by a seed
  cargo xtask mutants --list                  only says what would be changed

What nobody noticed is listed at the end, apart from what docs/mutants.md says why.";

/// The files with the decisions. What is in `age.rs` is the model's, and in no program.
const FILES: [&str; 21] = [
    "claim.rs",
    "image.rs",
    "primary.rs",
    "primary/broken.rs",
    "primary/capture.rs",
    "primary/loss.rs",
    "redial.rs",
    "since.rs",
    "standby.rs",
    "standby/giving_up.rs",
    "standby/loss.rs",
    "tail.rs",
    "driver/core.rs",
    "driver/primary.rs",
    "driver/standby.rs",
    "policy/interval.rs",
    "policy/latency.rs",
    "policy/longest.rs",
    "policy/mod.rs",
    "policy/output.rs",
    "policy/trigger.rs",
];
const SOURCES: &str = "crates/pair/src";

#[derive(clap::Args)]
pub(crate) struct MutantsOptions {
    /// Only changes in files whose name ends like this
    #[arg(long, value_name = "NAME")]
    file: Option<String>,
    /// Only this many, drawn at random
    #[arg(long, value_name = "N")]
    sample: Option<usize>,
    /// Draws the same changes again
    #[arg(long, value_name = "S", default_value_t = 1)]
    seed: u64,
    /// How many changes are tried at a time [default: one on each core]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// Try again what an earlier run has tried; otherwise its verdicts count, if the tests are the same
    #[arg(long)]
    again: bool,
    /// Only lists the changes
    #[arg(long)]
    list: bool,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mutant {
    /// Its switch.
    number: u32,
    file: &'static str,
    /// From 1.
    line: usize,
    /// What is there, on one line.
    before: String,
    after: String,
}

impl std::fmt::Display for Mutant {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(to, "{SOURCES}/{}:{}: {}  =>  {}", self.file, self.line, self.before, self.after)
    }
}

pub(crate) fn run(workspace: &Workspace, options: &MutantsOptions) -> Result<(), StepError> {
    let sources = Sources::read(&workspace.root)?;
    let mut mutants = sources.mutants();
    if let Some(end) = &options.file {
        mutants.retain(|mutant| mutant.file.ends_with(&**end));
    }
    if let Some(count) = options.sample {
        draw(&mut mutants, count, options.seed);
    }
    if options.list {
        mutants.iter().for_each(|mutant| println!("{mutant}"));
        println!("{} mutants", mutants.len());
        return Ok(());
    }
    let known = Known::read(&workspace.root)?;
    let mut nursery = Nursery::build(workspace, &sources)?;
    nursery.check_without_changes()?;
    let path = workspace.target.join("mutants/verdicts");
    let verdicts = Verdicts::open(&path, &nursery.programs(), options.again)
        .map_err(|source| StepError::File { path, source })?;
    let judge = Judge { nursery: &nursery, verdicts: &verdicts, jobs: options.jobs };
    let before = mutants.len();
    mutants.retain(|mutant| !nursery.does_not_compile(mutant.number));
    let every: Vec<&Mutant> = mutants.iter().collect();
    let suspects = judge.all(&every, Round::Quick)?;
    println!("the whole simulator, for {} of {}", suspects.len(), every.len());
    let unnoticed = judge.all(&suspects, Round::Thorough)?;
    let (accepted, missing): (Vec<_>, Vec<_>) =
        unnoticed.into_iter().partition(|mutant| known.reason(mutant).is_some());
    println!(
        "\n{} noticed, {} do not compile, {} unnoticed for a known reason (docs/mutants.md), {} unnoticed",
        mutants.len() - accepted.len() - missing.len(),
        before - mutants.len(),
        accepted.len(),
        missing.len()
    );
    missing.iter().for_each(|mutant| println!("  {mutant}"));
    if missing.is_empty() {
        Ok(())
    } else {
        Err(StepError::Failed("no test notices some changes; cargo xtask mutants".into()))
    }
}

/// Has changes judged.
struct Judge<'j> {
    nursery: &'j Nursery,
    verdicts: &'j Verdicts,
    jobs: Option<usize>,
}

impl Judge<'_> {
    /// Runs a round of the tests with each change. Returns those that no test has noticed, in their order.
    fn all<'a>(&self, mutants: &[&'a Mutant], round: Round) -> Result<Vec<&'a Mutant>, StepError> {
        let jobs = self.jobs.unwrap_or_else(|| thread::available_parallelism().map_or(1, usize::from));
        let (next, unnoticed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
        let work = || {
            while let Some(&mutant) = mutants.get(next.fetch_add(1, Ordering::Relaxed)) {
                if self.one(mutant, round)? == Verdict::Unnoticed {
                    unnoticed.lock().unwrap().push(mutant);
                }
            }
            Ok(())
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs).map(|_| scope.spawn(work)).collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("a worker panicked"))
        })?;
        let mut unnoticed = unnoticed.into_inner().unwrap();
        unnoticed.sort_by_key(|mutant| mutant.number);
        Ok(unnoticed)
    }

    fn one(&self, mutant: &Mutant, round: Round) -> Result<Verdict, StepError> {
        let at = mutant.number;
        if let Some(verdict) = self.verdicts.known(at, round) {
            println!("{at:4} {verdict:?} before: {mutant}");
            return Ok(verdict);
        }
        let verdict = self.nursery.judge(at, round)?;
        println!("{at:4} {verdict:?}: {mutant}");
        let kept = self.verdicts.keep(at, round, verdict);
        kept.map_err(|source| StepError::File { path: "target/mutants/verdicts".into(), source })?;
        Ok(verdict)
    }
}

fn read(path: &Path) -> Result<String, StepError> {
    fs::read_to_string(path).map_err(|source| StepError::File { path: path.to_path_buf(), source })
}

/// The files with what can be changed in them.
struct Sources(Vec<Source>);

struct Source {
    file: &'static str,
    text: String,
    sites: Vec<Site>,
}

impl Sources {
    fn read(root: &Path) -> Result<Self, StepError> {
        let source = |file| {
            let path = root.join(SOURCES).join(file);
            let text = read(&path)?;
            let no_rust = |error| StepError::Unusable(format!("{}: {error}", path.display()));
            let sites = find::sites(&text).map_err(no_rust)?;
            Ok(Source { file, text, sites })
        };
        FILES.into_iter().map(source).collect::<Result<_, _>>().map(Self)
    }

    /// Each site with the number of its first change. Switches count from 1 through all files.
    fn numbered(&self) -> impl Iterator<Item = (&Source, &Site, u32)> {
        let mut next = 1;
        self.0.iter().flat_map(|source| source.sites.iter().map(move |site| (source, site))).map(
            move |(source, site)| {
                let first = next;
                next += u32::try_from(site.what.ways()).expect("few ways");
                (source, site, first)
            },
        )
    }

    fn mutants(&self) -> Vec<Mutant> {
        let mut mutants = Vec::new();
        for (source, site, first) in self.numbered() {
            let before = one_line(&source.text[site.whole.clone()]);
            for (number, after) in (first..).zip(source.after(site)) {
                let (file, line, before) = (source.file, site.line, before.clone());
                mutants.push(Mutant { number, file, line, before, after });
            }
        }
        mutants
    }
}

impl Source {
    /// What a site can be changed to, for people.
    fn after(&self, site: &Site) -> Vec<String> {
        let part = |range: &std::ops::Range<usize>| one_line(&self.text[range.clone()]);
        match &site.what {
            What::Operator { left, right, others, .. } => {
                others.iter().map(|other| format!("{} {other} {}", part(left), part(right))).collect()
            }
            What::Not(negated) => vec![part(negated)],
            What::Truth if part(&site.whole) == "true" => vec!["false".into()],
            What::Truth => vec!["true".into()],
            What::Statement => vec!["(left out)".into()],
        }
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Keeps this many.
fn draw(mutants: &mut Vec<Mutant>, count: usize, seed: u64) {
    let mut dice = fastrand::Rng::with_seed(seed);
    while mutants.len() > count {
        mutants.remove(dice.usize(..mutants.len()));
    }
}

/// Where the switches are defined.
fn crate_root(sources: &Path) -> PathBuf {
    sources.join("lib.rs")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources() -> Sources {
        Sources::read(&Workspace::find().root).unwrap()
    }

    #[test]
    fn the_files_are_there_and_have_something_to_change() {
        for source in &sources().0 {
            assert!(!source.sites.is_empty(), "{}", source.file);
        }
    }

    #[test]
    fn each_change_has_a_number_of_its_own() {
        let mutants = sources().mutants();
        assert!(mutants.len() > 300);
        for (mutant, number) in mutants.iter().zip(1..) {
            assert_eq!(mutant.number, number);
            assert_ne!(mutant.before, mutant.after);
        }
    }

    #[test]
    fn a_sample_is_the_same_each_time() {
        let all = sources().mutants();
        let sample = |seed| {
            let mut some = all.clone();
            draw(&mut some, 5, seed);
            some
        };
        assert_eq!((sample(1).len(), sample(1)), (5, sample(1)));
        assert_ne!(sample(1), sample(2));
    }
}
