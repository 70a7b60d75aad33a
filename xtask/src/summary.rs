//! The results of the tests, from the output of `cargo test -- --show-output`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

/// Counts and names over all test programs of a run.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    passed: usize,
    failed: Vec<String>,
    /// Tests that failed beside others and passed alone.
    unsteady: Vec<String>,
    /// Test and reason.
    skipped: BTreeMap<String, String>,
    ignored: usize,
    /// Additions of the summary to failures without a test's name.
    broken: Vec<String>,
    /// The running test program, so that names are unique over all programs.
    program: String,
    /// The next line may be the name of a failed test.
    listing: bool,
    /// The test whose output follows.
    test: Option<String>,
    /// Tests that have run for long and have not ended.
    slow: BTreeSet<String>,
}

impl Summary {
    /// Reads one line of output.
    pub(crate) fn line(&mut self, line: &str) {
        let listed = std::mem::take(&mut self.listing);
        if let Some(reason) = line.strip_prefix("skipped: ") {
            let name = self.test.clone().unwrap_or_else(|| format!("#{}", self.skipped.len() + 1));
            self.skipped.entry(self.full_name(&name)).or_insert_with(|| reason.to_string());
        } else if let Some(program) = program(line) {
            self.program = program;
            self.test = None;
            self.slow.clear();
        } else if let Some(name) = slow(line) {
            self.slow.insert(name.to_string());
        } else if let Some((name, _)) = line.strip_prefix("test ").and_then(|it| it.split_once(" ... ")) {
            self.slow.remove(name);
        } else if let Some(name) = output_header(line) {
            self.test = Some(name.to_string());
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            self.passed += count(counts, "passed");
            self.ignored += count(counts, "ignored");
            self.test = None;
        } else if line == "successes:" || line == "failures:" {
            self.test = None;
            // The harness prints it twice, once before the output and once before the names.
            self.listing = line == "failures:";
        } else if let Some(name) = line.strip_prefix("    ").filter(|_| listed) {
            self.failed.push(self.full_name(name));
            self.listing = true;
        }
    }

    /// The following lines belong to this test program, which cargo has not started.
    pub(crate) fn start_program(&mut self, name: &str) {
        self.program = name.to_string();
        self.test = None;
    }

    /// Passed, failed and skipped tests.
    pub(crate) fn counts(&self) -> [usize; 3] {
        // For the harness, a skipped test has passed.
        let passed = self.passed.saturating_sub(self.skipped.len());
        [passed, self.failed.len() + self.broken.len(), self.skipped.len() + self.ignored]
    }

    /// Records that a test program or cargo itself failed although no test failed by name.
    pub(crate) fn ended_badly(&mut self, what: &str) {
        self.broken.push(what.to_string());
    }

    /// Records that the running test program hung, with the tests that had not ended.
    pub(crate) fn hung(&mut self, silence: Duration) {
        let tests = self.slow.iter().cloned().collect::<Vec<_>>().join(", ");
        let minutes = silence.as_secs() / 60;
        let what = format!(
            "{}: ended after {minutes} minutes without a word from it; running: {tests}",
            self.program
        );
        println!("{what}");
        self.ended_badly(&what);
    }

    /// The names of the failed tests, without those of their programs.
    pub(crate) fn failed_tests(&self) -> Vec<String> {
        let own_name = |full: &String| full.split_once(": ").map_or(full.as_str(), |it| it.1).to_string();
        self.failed.iter().map(own_name).collect()
    }

    /// Records that a failed test has passed whenever it ran alone.
    pub(crate) fn passes_alone(&mut self, test: &str) {
        let is_it = |full: &String| full.split_once(": ").map_or(full.as_str(), |it| it.1) == test;
        let (passing, failed) = std::mem::take(&mut self.failed).into_iter().partition(is_it);
        self.failed = failed;
        self.unsteady.extend::<Vec<String>>(passing);
    }

    /// Tests that failed beside others and passed alone.
    pub(crate) fn unsteady(&self) -> usize {
        self.unsteady.len()
    }

    /// Failures so far.
    pub(crate) fn failures(&self) -> usize {
        self.failed.len() + self.broken.len()
    }

    pub(crate) fn is_good(&self) -> bool {
        self.failed.is_empty() && self.broken.is_empty()
    }

    fn full_name(&self, name: &str) -> String {
        if self.program.is_empty() { name.to_string() } else { format!("{}: {name}", self.program) }
    }
}

/// The test program that cargo starts, by the name of its file without the hash:
/// `     Running tests/network.rs (target/release/deps/network-0123456789abcdef)` gives `network`.
fn program(line: &str) -> Option<String> {
    let line = line.trim_start();
    if let Some(package) = line.strip_prefix("Doc-tests ") {
        return Some(format!("{package} (documentation)"));
    }
    let file = line.strip_prefix("Running ")?.strip_suffix(')')?.rsplit_once("/deps/")?.1;
    Some(file.rsplit_once('-')?.0.to_string())
}

/// The test's name in the line that says that it takes long.
fn slow(line: &str) -> Option<&str> {
    let name = line.strip_prefix("test ")?;
    Some(name.split_once(" has been running for over ")?.0)
}

/// The test's name in the line before its output, `---- NAME stdout ----`.
fn output_header(line: &str) -> Option<&str> {
    line.strip_prefix("---- ")?.strip_suffix(" stdout ----")
}

/// The number before a word: `12 passed; 0 failed` and `passed` give 12.
fn count(counts: &str, word: &str) -> usize {
    let words: Vec<&str> = counts.split([' ', ';', '.']).filter(|it| !it.is_empty()).collect();
    words.windows(2).find(|pair| pair[1] == word).and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, reason) in &self.skipped {
            writeln!(f, "skipped  {name}: {reason}")?;
        }
        for name in &self.unsteady {
            writeln!(f, "UNSTEADY {name}: it failed beside the others, and passed whenever it ran alone")?;
        }
        for name in self.failed.iter().chain(&self.broken) {
            writeln!(f, "failed   {name}")?;
        }
        let [passed, failed, skipped] = self.counts();
        write!(f, "{passed} passed, {failed} failed, {skipped} skipped")?;
        match self.unsteady.len() {
            0 => Ok(()),
            unsteady => write!(f, ", {unsteady} UNSTEADY: each is a defect, of the test or of what it tests"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(program: &str, text: &str) -> Summary {
        let mut summary = Summary::default();
        summary.line(&running(program));
        text.lines().for_each(|line| summary.line(line));
        summary
    }

    fn running(program: &str) -> String {
        format!("     Running tests/x.rs (/some/where/release/deps/{program}-0123456789abcdef)")
    }

    const GOOD: &str = "
running 4 tests
test a ... ok
test b ... ok
test c ... ignored, takes an hour
test d ... ok

successes:

---- a stdout ----
skipped: no /dev/kvm
skipped: said twice

---- d stdout ----
seed 17
this line says that nothing was skipped: right


successes:
    a
    b
    d

test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s
";

    #[test]
    fn a_skipped_test_is_counted_once_and_not_as_passed() {
        let summary = read("network", GOOD);
        assert!(summary.is_good());
        assert_eq!(summary.to_string(), "skipped  network: a: no /dev/kvm\n2 passed, 0 failed, 2 skipped");
    }

    #[test]
    fn failures_are_named() {
        let text = "
running 2 tests
test good ... ok
test module::bad ... FAILED

failures:

---- module::bad stdout ----

thread 'module::bad' panicked at src/lib.rs:1:1:

failures:
    module::bad

test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        let summary = read("outlive-pair", text);
        assert!(!summary.is_good());
        assert_eq!(summary.to_string(), "failed   outlive-pair: module::bad\n1 passed, 1 failed, 0 skipped");
    }

    #[test]
    fn a_test_that_passes_alone_is_told_and_no_failure() {
        let text = "\nfailures:\n\nfailures:\n    module::bad\n    module::worse\n
test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let mut summary = read("outlive-pair", text);
        assert_eq!(summary.failed_tests(), ["module::bad", "module::worse"]);
        summary.passes_alone("module::bad");
        assert!(!summary.is_good());
        let told = summary.to_string();
        assert!(told.contains("UNSTEADY outlive-pair: module::bad: it failed beside the others"), "{told}");
        assert!(told.contains("1 passed, 1 failed, 0 skipped, 1 UNSTEADY"), "{told}");
        summary.passes_alone("module::worse");
        assert_eq!((summary.is_good(), summary.unsteady()), (true, 2));
    }

    #[test]
    fn a_program_that_crashed_is_a_failure() {
        let mut summary = read("x", "running 1 test\n");
        summary.ended_badly("cargo test");
        assert_eq!(summary.to_string(), "failed   cargo test\n0 passed, 1 failed, 0 skipped");
        assert!(!summary.is_good());
    }

    #[test]
    fn programs_are_known_by_the_names_of_their_files() {
        assert_eq!(program(&running("my-tests")).as_deref(), Some("my-tests"));
        assert_eq!(program("   Doc-tests outlive_dirty").as_deref(), Some("outlive_dirty (documentation)"));
        assert_eq!(program("Running fast"), None);
    }

    #[test]
    fn programs_add_up_and_equal_names_do_not_collide() {
        let mut summary = read("one", GOOD);
        summary.line(&running("two"));
        GOOD.lines().for_each(|line| summary.line(line));
        assert!(summary.to_string().ends_with("4 passed, 0 failed, 4 skipped"));
    }

    #[test]
    fn a_harness_of_its_own_counts_too() {
        let text = "skipped: with_rights needs root\ntest with_rights ... ok\ntest other ... ok\n
test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!(
            read("enter", text).to_string(),
            "skipped  enter: #1: with_rights needs root\n1 passed, 0 failed, 1 skipped"
        );
    }

    #[test]
    fn what_hung_is_named_with_the_tests_that_had_not_ended() {
        let text = "test a has been running for over 60 seconds\ntest b has been running for over 60 seconds\ntest a ... ok";
        let mut summary = read("console", text);
        summary.hung(Duration::from_mins(8));
        assert!(!summary.is_good());
        let text = summary.to_string();
        assert!(
            text.contains("failed   console: ended after 8 minutes without a word from it; running: b\n"),
            "{text}"
        );
    }
}
