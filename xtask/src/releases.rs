//! The file `RELEASES`: which commits of this tree are releases.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::run::{StepError, Workspace, output};

/// Where they are named.
const FILE: &str = "RELEASES";

/// A release that this tree comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Release {
    pub(crate) version: String,
    /// All 40 digits.
    pub(crate) commit: String,
}

impl Release {
    /// The newest release.
    pub(crate) fn last(workspace: &Workspace) -> Result<Release, StepError> {
        let path = workspace.root.join(FILE);
        let text = fs::read_to_string(&path).map_err(|source| StepError::File { path, source })?;
        let releases = parse(&text).map_err(StepError::Unusable)?;
        releases.into_iter().next().ok_or_else(|| StepError::Unusable(format!("{FILE} names no release")))
    }
}

/// Reads the file. An error is a line for people.
fn parse(text: &str) -> Result<Vec<Release>, String> {
    let lines = text.lines().enumerate().filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let mut releases: Vec<(Vec<u64>, Release)> = Vec::new();
    for (index, line) in lines {
        let wrong = |what: &str| format!("{FILE} line {}: {what}", index + 1);
        let [version, commit, _date] = line.split(' ').collect::<Vec<_>>()[..] else {
            return Err(wrong("a line has a version, a commit and a date"));
        };
        let numbers: Option<Vec<u64>> = version.split('.').map(|it| it.parse().ok()).collect();
        let numbers =
            numbers.filter(|it| it.len() == 3).ok_or_else(|| wrong("a version is three numbers"))?;
        if commit.len() != 40 || !commit.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(wrong("a commit has 40 hexadecimal digits"));
        }
        if releases.last().is_some_and(|(newer, _)| *newer <= numbers) {
            return Err(wrong("the newest release comes first"));
        }
        releases.push((numbers, Release { version: version.into(), commit: commit.into() }));
    }
    Ok(releases.into_iter().map(|(_, release)| release).collect())
}

/// Checks that the last release is a commit of this history, with the version that the file says, and that the
/// changelog has it.
pub(crate) fn check(workspace: &Workspace) -> Result<(), StepError> {
    let Release { version, commit } = Release::last(workspace)?;
    let wrong = |what: String| Err(StepError::Failed(format!("{FILE}: {what}")));
    let path = workspace.root.join("CHANGELOG.md");
    let changes = fs::read_to_string(&path).map_err(|source| StepError::File { path, source })?;
    if !changes.lines().any(|line| line.starts_with(&format!("## {version} - "))) {
        return wrong(format!("CHANGELOG.md has no heading '## {version} - DATE'"));
    }
    // A copy of this tree may have another history, and none of what was released.
    if !has_history(&workspace.root) || !git(&workspace.root, &["cat-file", "-e", &commit]) {
        println!("skipped: whether the last release is in the history (it is not here)");
        return Ok(());
    }
    if !git(&workspace.root, &["merge-base", "--is-ancestor", &commit, "HEAD"]) {
        return wrong(format!(
            "{commit} is not in the history of this tree: name the commit that was released as {version} \
             (`git log --grep '^release: {version}'`)"
        ));
    }
    let mut show = Command::new("git");
    show.arg("-C").arg(&workspace.root).args(["show", &format!("{commit}:Cargo.toml")]);
    let said = output(&mut show).unwrap_or_default();
    if !said.lines().any(|line| line == format!("version = \"{version}\"")) {
        return wrong(format!("Cargo.toml of {commit} does not have version {version}"));
    }
    Ok(())
}

/// Whether this is a git checkout with all commits.
fn has_history(root: &Path) -> bool {
    git(root, &["rev-parse", "HEAD"]) && !root.join(".git/shallow").exists()
}

fn git(root: &Path, words: &[&str]) -> bool {
    let output = Command::new("git").arg("-C").arg(root).args(words).output();
    output.is_ok_and(|output| output.status.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_release_comes_first() {
        let [one, two] = ["1", "2"].map(|digit| digit.repeat(40));
        let text = format!("# words\n\n0.10.0 {two} 2027-01-01\n0.9.3 {one} 2026-12-01\n");
        let releases = parse(&text).unwrap();
        assert_eq!(releases[0], Release { version: "0.10.0".into(), commit: two.clone() });
        assert_eq!(releases.len(), 2);
        for (from, to, why) in [
            ("0.10.0", "0.9.3", "line 4: the newest release"),
            ("0.10.0", "0.10", "line 3: a version is three numbers"),
            (&two[..], &two[1..], "line 3: a commit has 40"),
            (" 2026-12-01", "", "line 4: a line has"),
        ] {
            let error = parse(&text.replace(from, to)).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn this_tree_names_its_last_release() {
        let last = Release::last(&Workspace::find()).unwrap();
        assert!(last.version != env!("CARGO_PKG_VERSION"), "the tree is on its way to the next one");
    }
}
