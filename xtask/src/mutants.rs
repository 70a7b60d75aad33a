//! `cargo xtask mutants`: makes one small change after another to the decision code of `pair`. If the tests
//! still pass, they have not noticed the change: either it changes nothing, or a test is missing.
//!
//! It works on a copy of the sources in `target/mutants`, a line at a time: it inverts comparisons, logical
//! operators, sums, negations and truth values, and leaves out single statements.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::run::{StepError, Workspace, output};

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask mutants                         all of them: some hundred, an hour or two
  cargo xtask mutants --file claim.rs         those of one file
  cargo xtask mutants --sample 20 --seed 7    twenty, drawn by a seed
  cargo xtask mutants --list                  only says what would be changed

What nobody noticed is listed at the end.";

/// The files with the decisions.
const FILES: [&str; 11] = [
    "claim.rs",
    "primary.rs",
    "redial.rs",
    "standby.rs",
    "standby/loss.rs",
    "driver/core.rs",
    "driver/primary.rs",
    "driver/standby.rs",
    "policy/interval.rs",
    "policy/mod.rs",
    "policy/trigger.rs",
];
const SOURCES: &str = "crates/pair/src";

/// Replacements. rustfmt puts blanks around operators, so types are left alone.
const CHANGES: [(&str, &[&str]); 15] = [
    (" == ", &[" != "]),
    (" != ", &[" == "]),
    (" < ", &[" <= ", " > "]),
    (" <= ", &[" < ", " > "]),
    (" > ", &[" >= ", " < "]),
    (" >= ", &[" > ", " < "]),
    (" && ", &[" || "]),
    (" || ", &[" && "]),
    (" + ", &[" - "]),
    (" - ", &[" + "]),
    ("if !", &["if "]),
    ("&& !", &["&& "]),
    ("(!", &["("]),
    ("true", &["false"]),
    ("false", &["true"]),
];

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
    /// Only lists the changes
    #[arg(long)]
    list: bool,
}

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Mutant {
    file: &'static str,
    /// From 0.
    line: usize,
    text: String,
}

/// The tests' verdict on one change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    Noticed,
    /// The change does not compile.
    Nothing,
    Unnoticed,
}

pub(crate) fn run(workspace: &Workspace, options: &MutantsOptions) -> Result<(), StepError> {
    let mut mutants = Vec::new();
    for file in
        FILES.into_iter().filter(|file| options.file.as_ref().is_none_or(|end| file.ends_with(&**end)))
    {
        let path = workspace.root.join(SOURCES).join(file);
        mutants.extend(changes(file, &read(&path)?));
    }
    if let Some(count) = options.sample {
        draw(&mut mutants, count, options.seed);
    }
    if options.list {
        mutants
            .iter()
            .for_each(|mutant| println!("{}:{}: {}", mutant.file, mutant.line + 1, mutant.text.trim()));
        println!("{} mutants", mutants.len());
        return Ok(());
    }
    let nursery = Nursery::make(workspace)?;
    let began = Instant::now();
    if nursery.test(Duration::from_secs(3600))? != Verdict::Unnoticed {
        return Err(StepError::Unusable(
            "the tests of outlive-pair fail without any change; mend them first".into(),
        ));
    }
    // The time includes building, and the next builds are shorter.
    let limit = began.elapsed() * 2 + Duration::from_secs(60);
    let (mut noticed, mut nothing, mut unnoticed) = (0, 0, Vec::new());
    for (number, mutant) in mutants.iter().enumerate() {
        let verdict = nursery.judge(mutant, limit)?;
        println!("{:4} of {} {verdict:?}: {}", number + 1, mutants.len(), describe(workspace, mutant)?);
        match verdict {
            Verdict::Noticed => noticed += 1,
            Verdict::Nothing => nothing += 1,
            Verdict::Unnoticed => unnoticed.push(mutant),
        }
    }
    println!("\n{noticed} noticed, {nothing} do not compile, {} unnoticed", unnoticed.len());
    unnoticed.iter().try_for_each(|mutant| describe(workspace, mutant).map(|text| println!("  {text}")))
}

fn read(path: &Path) -> Result<String, StepError> {
    fs::read_to_string(path).map_err(|source| StepError::File { path: path.to_path_buf(), source })
}

fn write(path: &Path, text: &str) -> Result<(), StepError> {
    fs::write(path, text).map_err(|source| StepError::File { path: path.to_path_buf(), source })
}

fn describe(workspace: &Workspace, mutant: &Mutant) -> Result<String, StepError> {
    let text = read(&workspace.root.join(SOURCES).join(mutant.file))?;
    let before = text.lines().nth(mutant.line).unwrap_or_default().trim();
    let after = if mutant.text.trim().is_empty() { "(left out)" } else { mutant.text.trim() };
    Ok(format!("{}:{}: {before}  =>  {after}", mutant.file, mutant.line + 1))
}

/// All changes of a file, up to its tests.
fn changes(file: &'static str, text: &str) -> Vec<Mutant> {
    let mut mutants = Vec::new();
    let lines: Vec<&str> = text.lines().collect();
    for (line, whole) in lines.iter().enumerate().take_while(|(_, text)| text.trim() != "mod tests {") {
        let code = whole.split("//").next().unwrap_or_default();
        let trimmed = code.trim();
        if trimmed.is_empty()
            || ["#", "use ", "pub use ", "mod "].iter().any(|start| trimmed.starts_with(start))
        {
            continue;
        }
        for (from, tos) in CHANGES {
            for (at, _) in code.match_indices(from) {
                for to in tos {
                    let text = format!("{}{to}{}", &code[..at], &code[at + from.len()..]);
                    mutants.push(Mutant { file, line, text });
                }
            }
        }
        // A planted mistake of the simulator is not a decision.
        if is_statement(trimmed) && !trimmed.contains("planted") {
            mutants.push(Mutant { file, line, text: String::new() });
        }
    }
    mutants
}

/// A call or an assignment on a line of its own.
fn is_statement(code: &str) -> bool {
    let first = code.split(['(', ' ', '.', '[']).next().unwrap_or_default();
    let keywords =
        ["let", "return", "break", "continue", "if", "match", "for", "while", "const", "pub", "type"];
    let is_name =
        !first.is_empty() && first.chars().all(|it| it.is_ascii_lowercase() || it == '_' || it == '*');
    let opens = |open, close| code.matches(open).count() == code.matches(close).count();
    code.ends_with(';') && is_name && !keywords.contains(&first) && opens('(', ')') && opens('{', '}')
}

/// Keeps this many (splitmix64).
fn draw(mutants: &mut Vec<Mutant>, count: usize, seed: u64) {
    let mut state = seed;
    let mut below = |end: usize| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) % end as u64) as usize
    };
    while mutants.len() > count {
        let which = below(mutants.len());
        mutants.remove(which);
    }
}

/// The copy of the sources, in which changes are made.
struct Nursery {
    sources: PathBuf,
    root: PathBuf,
    target: PathBuf,
    cargo: PathBuf,
}

impl Nursery {
    fn make(workspace: &Workspace) -> Result<Nursery, StepError> {
        let root = workspace.target.join("mutants/tree");
        let mut list = Command::new("git");
        list.args(["ls-files", "-z"]).current_dir(&workspace.root);
        let files = output(&mut list).ok_or_else(|| StepError::Failed("git ls-files".into()))?;
        for file in files.split('\0').filter(|file| !file.is_empty()) {
            let (from, to) = (workspace.root.join(file), root.join(file));
            // Deleted and not committed.
            let Ok(bytes) = fs::read(&from) else { continue };
            if fs::read(&to).is_ok_and(|present| present == bytes) {
                continue;
            }
            let folder = to.parent().unwrap_or(&root);
            fs::create_dir_all(folder)
                .map_err(|source| StepError::File { path: folder.to_path_buf(), source })?;
            fs::write(&to, bytes).map_err(|source| StepError::File { path: to.clone(), source })?;
        }
        Ok(Nursery {
            sources: root.join(SOURCES),
            root,
            target: workspace.target.join("mutants/target"),
            cargo: std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()).into(),
        })
    }

    fn judge(&self, mutant: &Mutant, limit: Duration) -> Result<Verdict, StepError> {
        let path = self.sources.join(mutant.file);
        let text = read(&path)?;
        let mut lines: Vec<&str> = text.lines().collect();
        lines[mutant.line] = &mutant.text;
        write(&path, &(lines.join("\n") + "\n"))?;
        let verdict = self.test(limit);
        write(&path, &text)?;
        verdict
    }

    fn test(&self, limit: Duration) -> Result<Verdict, StepError> {
        if !self.cargo(&["--no-run"], limit)? {
            return Ok(Verdict::Nothing);
        }
        Ok(if self.cargo(&[], limit)? { Verdict::Unnoticed } else { Verdict::Noticed })
    }

    /// Runs the tests. If they do not finish in time, they have noticed something, too.
    fn cargo(&self, more: &[&str], limit: Duration) -> Result<bool, StepError> {
        let mut command = Command::new(&self.cargo);
        command.args(["test", "--quiet", "--package", "outlive-pair", "--lib", "--tests"]).args(more);
        // Planted mistakes are for the tests, and these changes are for the code.
        command.args(["--", "--skip", "planted", "--skip", "a_schedule_that_fails"]);
        command.current_dir(&self.root).env("CARGO_TARGET_DIR", &self.target);
        command.env("RUSTFLAGS", "-Awarnings").env("OUTLIVE_SIM_SECONDS", "1");
        command.env("OUTLIVE_SIM_SEEDS", "4000").env("OUTLIVE_MODEL_SECONDS", "2");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
        let failed = |source| StepError::Start { program: "cargo".into(), source };
        let mut child = command.spawn().map_err(failed)?;
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = child.try_wait().map_err(failed)? {
                return Ok(status.success());
            }
            if Instant::now() > deadline {
                // The tests are processes of their own, in the same group.
                killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL).ok();
                child.wait().map_err(failed)?;
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(code: &str) -> Vec<String> {
        changes("claim.rs", code).into_iter().map(|mutant| mutant.text.trim().to_string()).collect()
    }

    #[test]
    fn operators_are_turned_and_statements_left_out() {
        assert_eq!(texts("    if !a && b { // not == this"), ["if !a || b {", "if a && b {"]);
        assert_eq!(texts("x < y"), ["x <= y", "x > y"]);
        assert_eq!(texts("self.at = now;"), [""]);
        assert_eq!(texts("self.out.push(Action::Claim { generation });"), [""]);
    }

    #[test]
    fn types_comments_and_tests_are_left_alone() {
        let code = "use a::b;\n/// a == b\nfn f(x: Vec<u8>) -> Option<u8> {\nlet x = f();\n}\nmod tests {\na == b\n}";
        assert_eq!(texts(code), [""; 0]);
    }

    #[test]
    fn the_files_are_there_and_have_something_to_change() {
        let root = Workspace::find().root.join(SOURCES);
        for file in FILES {
            assert!(!changes(file, &read(&root.join(file)).unwrap()).is_empty(), "{file}");
        }
    }

    #[test]
    fn a_sample_is_the_same_each_time() {
        let all = changes("claim.rs", &"a == b;\n".repeat(50));
        let sample = |seed| {
            let mut some = all.clone();
            draw(&mut some, 5, seed);
            some
        };
        assert_eq!((sample(1).len(), sample(1)), (5, sample(1)));
        assert_ne!(sample(1), sample(2));
    }
}
