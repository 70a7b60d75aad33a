//! What goes into the package and is in no file of the tree.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{StepError, Workspace, output};

/// A package has its programs elsewhere than an operator who copies them.
const MOVED: [(&str, &str); 2] =
    [("/usr/local/bin/outlive", "/usr/bin/outlive"), ("/usr/local/lib/outlive/", "/usr/lib/outlive/")];

/// Makes everything anew. Returns its directory, which the package's metadata names.
pub(super) fn run(workspace: &Workspace) -> Result<PathBuf, StepError> {
    let place = workspace.root.join("target/package");
    for part in ["man", "systemd"] {
        let part = place.join(part);
        if part.exists() {
            fs::remove_dir_all(&part).map_err(|source| StepError::File { path: part.clone(), source })?;
        }
        fs::create_dir_all(&part).map_err(|source| StepError::File { path: part, source })?;
    }
    let program = workspace.target.join("release/outlive");
    said(&program, &["man", &place.join("man").to_string_lossy()])?;
    for shell in ["bash", "zsh", "fish"] {
        write(&place.join(format!("outlive.{shell}")), &said(&program, &["completions", shell])?)?;
    }
    units(&workspace.root.join("systemd"), &place.join("systemd"))?;
    write(&place.join("changelog"), &changelog(&date(&workspace.root)?))?;
    Ok(place)
}

fn said(program: &Path, words: &[&str]) -> Result<String, StepError> {
    let failed = || StepError::Failed(format!("{} {}", program.display(), words.join(" ")));
    output(Command::new(program).args(words)).ok_or_else(failed)
}

fn write(path: &Path, text: &str) -> Result<(), StepError> {
    fs::write(path, text).map_err(|source| StepError::File { path: path.to_owned(), source })
}

fn units(from: &Path, to: &Path) -> Result<(), StepError> {
    let wrong = |source| StepError::File { path: from.to_owned(), source };
    for file in fs::read_dir(from).map_err(wrong)? {
        let path = file.map_err(wrong)?.path();
        let Some(name) = path.file_name().filter(|_| path.extension().is_some_and(|it| it == "service"))
        else {
            continue;
        };
        let text = fs::read_to_string(&path).map_err(wrong)?;
        write(&to.join(name), &packaged(&text))?;
    }
    Ok(())
}

/// A unit with the places that the package has.
fn packaged(unit: &str) -> String {
    MOVED.iter().fold(unit.to_owned(), |text, (from, to)| text.replace(from, to))
}

/// As Debian counts: what leads to a release is older than the release.
pub(super) fn version() -> String {
    format!("{}-1", env!("CARGO_PKG_VERSION").replace('-', "~"))
}

/// As Debian wants one; what has changed for users is in NEWS.
fn changelog(date: &str) -> String {
    format!(
        "outlive ({}) unstable; urgency=medium\n\n  * /usr/share/doc/outlive/NEWS.gz says what is new.\n\n \
         -- The Outlive authors <outlive@users.noreply.github.com>  {date}\n",
        version()
    )
}

/// Of the last commit, so that the same tree makes the same package; in a copy without history, now.
fn date(root: &Path) -> Result<String, StepError> {
    let git = output(Command::new("git").arg("-C").arg(root).args(["log", "-1", "--format=%aD"]));
    let now = || output(Command::new("date").arg("-R"));
    let date = git.filter(|it| !it.trim().is_empty()).or_else(now);
    Ok(date.ok_or_else(|| StepError::Failed("date -R".into()))?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_of_the_package_name_nothing_that_it_does_not_have() {
        let root = Workspace::find().root;
        let place = std::env::temp_dir().join(format!("outlive-units-{}", std::process::id()));
        fs::create_dir_all(&place).unwrap();
        units(&root.join("systemd"), &place).unwrap();
        let names: Vec<_> = fs::read_dir(&place).unwrap().map(|it| it.unwrap().path()).collect();
        assert_eq!(names.len(), 4, "{names:?}");
        for path in names {
            let unit = fs::read_to_string(&path).unwrap();
            assert!(
                !unit.contains("/usr/local") && unit.contains("ExecStart=/usr/bin/outlive "),
                "{path:?}: {unit}"
            );
        }
        fs::remove_dir_all(&place).unwrap();
    }

    #[test]
    fn scripts_of_the_package_are_good_shell() {
        let root = Workspace::find().root;
        let scripts = ["postinst", "prerm", "postrm"].map(|it| root.join("packaging/scripts").join(it));
        let trial = root.join("xtask/src/package/trial.sh");
        match Command::new("shellcheck").args(scripts).arg(trial).output() {
            Ok(output) => assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout)),
            Err(why) => println!("skipped: no shellcheck: {why}"),
        }
    }
}
