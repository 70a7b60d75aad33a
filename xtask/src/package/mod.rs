//! `cargo xtask package`: the Debian package, and its trial on a clean system.

mod stage;
mod trial;

use std::path::PathBuf;
use std::process::Command;

use crate::run::{StepError, Workspace, step};

/// What makes the package of files and metadata (`crates/outlive/Cargo.toml`).
const TOOL: &str = "cargo-deb";
/// Its release, so that the same tree makes the same package.
const RELEASE: &str = "3.8.0";

#[derive(clap::Args)]
pub(crate) struct PackageOptions {
    /// Also install, upgrade, remove and purge it on a clean Debian system in a directory (root)
    #[arg(long)]
    test: bool,
    /// Do not fetch what is missing: cargo-deb, and for --test mmdebstrap and the clean system
    #[arg(long)]
    no_fetch: bool,
}

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask package                  target/package/outlive_VERSION_amd64.deb
  cargo xtask package --test           and what it does on a clean system of this machine's release

Needs dpkg; cargo installs cargo-deb below the target directory.";

/// Makes the package, and tries it if that is asked for.
pub(crate) fn run(workspace: &Workspace, options: &PackageOptions) -> Result<(), StepError> {
    let deb = make(workspace, !options.no_fetch)?;
    println!("{}", deb.display());
    if options.test { trial::run(workspace, &deb, !options.no_fetch) } else { Ok(()) }
}

fn make(workspace: &Workspace, fetch: bool) -> Result<PathBuf, StepError> {
    let tool = tool(workspace, fetch)?;
    step(&mut workspace.cargo(["build", "--release", "--package", "outlive"]))?;
    let place = stage::run(workspace)?;
    let deb = place.join(format!("outlive_{}_amd64.deb", env!("CARGO_PKG_VERSION")));
    let mut make = Command::new(tool);
    make.args([
        "--package",
        "outlive",
        "--no-build",
        "--strip",
        "--quiet",
        "--deb-version",
        &stage::version(),
    ]);
    step(make.arg("--output").arg(&deb).current_dir(&workspace.root))?;
    Ok(deb)
}

/// cargo-deb in its release, from the target directory, where it is installed if it is missing.
fn tool(workspace: &Workspace, fetch: bool) -> Result<PathBuf, StepError> {
    let root = workspace.target.join("tools");
    let program = root.join("bin").join(TOOL);
    let said = Command::new(&program).arg("--version").output();
    let is_there = said.is_ok_and(|it| String::from_utf8_lossy(&it.stdout).contains(RELEASE));
    if !is_there && !fetch {
        return Err(StepError::Unusable(format!(
            "there is no {TOOL} {RELEASE} in {}: leave --no-fetch out, and cargo installs it there",
            root.display()
        )));
    }
    if !is_there {
        let mut install = workspace.cargo(["install", TOOL, "--locked", "--force", "--version"]);
        step(install.arg(format!("={RELEASE}")).arg("--root").arg(&root))?;
    }
    Ok(program)
}
