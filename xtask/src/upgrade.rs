//! `cargo xtask upgrade`: the last release and this tree on one pair of hosts. The tests are those of the program
//! (`crates/outlive/tests/survive/upgrade.rs`); this command builds the older release that they need.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::packages;
use crate::releases::Release;
use crate::run::{StepError, Workspace, describe, step};

pub(crate) const EXAMPLES: &str = "\
Examples:
  cargo xtask upgrade                       builds the last release (RELEASES), then runs it with this tree
  cargo xtask upgrade --filter upgraded     only the rolling upgrade
  cargo xtask upgrade --commit HEAD~20      another commit as the older release
  cargo xtask upgrade --program /usr/bin/outlive
                                            a program that is there already

Old primary with new standby and the other way round, with disk, network and takeovers each way; the rolling upgrade
of a protected pair and the way back, with clients that notice a lost connection or a lost write; images, sidecars and
journals that the other release has left. The older program is built once, into target/upgrade. Needs root, /dev/kvm
and the history of the repository.";

/// Where the tests look for the older program.
pub(crate) const BEFORE: &str = "OUTLIVE_BEFORE";

#[derive(clap::Args)]
pub(crate) struct UpgradeOptions {
    /// Build this commit instead of the last release
    #[arg(long, value_name = "COMMIT", conflicts_with = "program")]
    commit: Option<String>,
    /// Take this program instead of building one
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Build both with the dev profile: sooner ready to run, and slower
    #[arg(long)]
    dev: bool,
    /// Run only the tests whose name contains this
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// Only build the older program, and print where it is
    #[arg(long, conflicts_with = "program")]
    build_only: bool,
}

pub(crate) fn run(workspace: &Workspace, options: &UpgradeOptions) -> Result<(), StepError> {
    let program = match (&options.program, &options.commit) {
        (Some(program), _) => given(program)?,
        (None, Some(commit)) => build(workspace, commit, options.profile())?,
        (None, None) => last_release(workspace, options.profile())?,
    };
    if options.build_only {
        println!("{}", program.display());
        return Ok(());
    }
    let environment = packages::provide(workspace, &[packages::IPROUTE], true);
    let mut command = workspace.cargo(["test", "--profile", options.profile(), "--workspace"]);
    // The whole workspace, so that cargo takes what it has built for other tests. Each test has two hosts and their
    // clients on the processors.
    command
        .args(["--test", "survive", "--", "--show-output", "--test-threads", "2"])
        .arg(format!("upgrade::{}", options.filter));
    step(command.envs(environment).env(BEFORE, program))
}

impl UpgradeOptions {
    fn profile(&self) -> &'static str {
        if self.dev { "dev" } else { "release" }
    }
}

/// The program of the last release, built if it is not there yet.
fn last_release(workspace: &Workspace, profile: &str) -> Result<PathBuf, StepError> {
    let Release { version, commit } = Release::last(workspace)?;
    eprintln!("==> the release before: {version}, commit {}", &commit[..12]);
    build(workspace, &commit, profile)
}

fn given(program: &Path) -> Result<PathBuf, StepError> {
    // The tests run in the directory of their crate.
    program.canonicalize().map_err(|source| StepError::File { path: program.to_path_buf(), source })
}

/// Builds the program of a commit, once.
fn build(workspace: &Workspace, commit: &str, profile: &str) -> Result<PathBuf, StepError> {
    let commit = whole(workspace, commit)?;
    let place = workspace.target.join("upgrade");
    let program = place.join(format!("outlive-{}-{profile}", &commit[..12]));
    if program.exists() {
        return Ok(program);
    }
    let sources = place.join("sources");
    extract(workspace, &commit, &sources)?;
    let mut cargo = workspace.cargo(["build", "--profile", profile, "--locked", "--package", "outlive"]);
    let built = place.join("build");
    step(cargo.args(["--bin", "outlive"]).current_dir(&sources).env("CARGO_TARGET_DIR", &built))?;
    // Whole or not there.
    let half = program.with_extension("new");
    let file = |source| StepError::File { path: program.clone(), source };
    let directory = if profile == "dev" { "debug" } else { profile };
    fs::copy(built.join(directory).join("outlive"), &half).map_err(file)?;
    fs::rename(&half, &program).map_err(file)?;
    Ok(program)
}

/// All digits of a commit.
fn whole(workspace: &Workspace, commit: &str) -> Result<String, StepError> {
    let mut git = Command::new("git");
    git.arg("-C").arg(&workspace.root).args(["rev-parse", "--verify", "--quiet"]);
    git.arg(format!("{commit}^{{commit}}")).stdin(Stdio::null());
    let output = git.output().map_err(|source| StepError::Start { program: "git".into(), source })?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    Err(StepError::Unusable(format!(
        "commit {commit} is not here: fetch the whole history (`git fetch --unshallow`), or give the older program \
         with --program"
    )))
}

/// The sources of a commit, in a directory without history.
fn extract(workspace: &Workspace, commit: &str, to: &Path) -> Result<(), StepError> {
    let file = |source| StepError::File { path: to.to_path_buf(), source };
    if to.exists() {
        fs::remove_dir_all(to).map_err(file)?;
    }
    fs::create_dir_all(to).map_err(file)?;
    let mut git = Command::new("git");
    git.arg("-C").arg(&workspace.root).args(["archive", "--format=tar", commit]).stdout(Stdio::piped());
    eprintln!("==> {}", describe(&git));
    let start = |program: &str| {
        let program = program.to_owned();
        move |source| StepError::Start { program, source }
    };
    let mut git = git.spawn().map_err(start("git"))?;
    let archive = git.stdout.take().expect("it is a pipe");
    let unpacked =
        Command::new("tar").arg("-x").arg("-C").arg(to).stdin(archive).status().map_err(start("tar"));
    let packed = git.wait().map_err(start("git"))?;
    if packed.success() && unpacked?.success() {
        return Ok(());
    }
    Err(StepError::Failed(format!("the copy of the sources of {commit}")))
}
