//! The loom models: exhaustive runs of the lock-free parts under every order of the threads' steps.

use std::fs;
use std::path::Path;
use std::process::Command;

use crate::run::{StepError, Workspace};

/// The test command for the models of each crate that has some.
///
/// They need the whole crate compiled with `--cfg loom`, so they have a target directory of their own: in the
/// common one each would throw away the results of the other.
pub(crate) fn commands(workspace: &Workspace) -> Result<Vec<Command>, StepError> {
    let mut commands = Vec::new();
    for package in packages(&workspace.root.join("crates"))? {
        let mut command = workspace.cargo(["test", "--release", "--lib", "--package", &package]);
        command.env("RUSTFLAGS", rustflags()).env("CARGO_TARGET_DIR", workspace.target.join("loom"));
        commands.push(command);
    }
    Ok(commands)
}

fn rustflags() -> String {
    let present = std::env::var("RUSTFLAGS").unwrap_or_default();
    format!("{present} --cfg loom").trim_start().to_string()
}

/// Names of the packages whose manifest asks for loom.
fn packages(crates: &Path) -> Result<Vec<String>, StepError> {
    let error = |source| StepError::File { path: crates.to_path_buf(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(crates).map_err(error)? {
        let manifest =
            fs::read_to_string(entry.map_err(error)?.path().join("Cargo.toml")).unwrap_or_default();
        names.extend(loom_package(&manifest).map(str::to_string));
    }
    names.sort();
    Ok(names)
}

/// The package name, if the package has dependencies for `cfg(loom)`.
fn loom_package(manifest: &str) -> Option<&str> {
    let asks = manifest.lines().any(|line| line.starts_with("[target.'cfg(loom)'."));
    let name = manifest.lines().find_map(|line| line.strip_prefix("name = "))?;
    asks.then(|| name.trim_matches('"'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packages_that_ask_for_loom_have_models() {
        let with =
            "[package]\nname = \"outlive-dirty\"\n\n[target.'cfg(loom)'.dev-dependencies]\nloom = \"1\"\n";
        assert_eq!(loom_package(with), Some("outlive-dirty"));
        assert_eq!(loom_package("[package]\nname = \"outlive-pair\"\n# loom\n"), None);
        assert_eq!(loom_package(""), None);
    }
}
