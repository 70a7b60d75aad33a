//! Format, clippy, documentation, rules for dependencies, and the last release.

use std::process::{Command, Stdio};

use crate::run::{StepError, Workspace, describe, step};
use crate::{dependencies, releases};

/// The payload is not a member of the workspace, so cargo does not check it with the rest.
const PAYLOAD: &str = "guest/payload/Cargo.toml";
/// Nor are the fuzz targets.
const FUZZ: &str = "fuzz/Cargo.toml";

/// Each feature of outlive-dirty by itself, none, and all: other VMMs take some of them. `self-test` brings
/// `kvm-ioctls`.
const DIRTY_FEATURES: [&str; 9] = [
    "",
    "vm-memory",
    "kvm-ioctls",
    "self-test",
    "tracing",
    "log",
    "uffd",
    "planted-bug",
    "vm-memory,self-test,tracing,log,uffd,planted-bug",
];

/// Runs all checks that need no tests. All of them run, so that one run shows everything to repair.
pub(crate) fn run(workspace: &Workspace) -> Result<(), StepError> {
    let steps = checks(workspace).into_iter().map(|mut check| step(&mut check));
    eprintln!("==> licences, bans and sources of dependencies; the last release");
    let own = [dependencies::check(workspace), releases::check(workspace)];
    let failed: Vec<String> =
        own.into_iter().chain(steps).filter_map(Result::err).map(|error| error.to_string()).collect();
    match failed.len() {
        0 => Ok(()),
        count => Err(StepError::Checks { count, failed: failed.join("\n  ") }),
    }
}

fn checks(workspace: &Workspace) -> Vec<Command> {
    let mut payload_clippy = workspace.cargo(["clippy", "--release", "--manifest-path", PAYLOAD]);
    payload_clippy.arg("--target-dir").arg(workspace.target.join("payload")).args(["--", "-D", "warnings"]);
    let mut checks = vec![
        workspace.cargo(["fmt", "--all", "--check"]),
        workspace.cargo(["fmt", "--manifest-path", PAYLOAD, "--check"]),
        // The release profile shares build scripts and procedural macros with the tests.
        workspace.cargo(["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"]),
        payload_clippy,
        documentation(workspace),
    ];
    checks.extend([PAYLOAD, FUZZ].map(|manifest| lock(workspace, manifest)));
    checks.extend(DIRTY_FEATURES.map(|features| dirty_with(workspace, features)));
    checks.extend(deny(workspace));
    checks
}

/// cargo-deny, which has rules that [`dependencies`] does not know, and a list of known flaws.
fn deny(workspace: &Workspace) -> Vec<Command> {
    if !has_deny() {
        println!(
            "skipped: known flaws of dependencies (`cargo install cargo-deny --locked` brings what looks for them)"
        );
        return Vec::new();
    }
    let deny = |words: &[&str]| workspace.cargo([&["deny"], words].concat());
    let mut checks = vec![deny(&["--offline", "check", "licenses", "bans", "sources"])];
    let mut fetch = deny(&["fetch", "db"]);
    eprintln!("==> {}", describe(&fetch));
    if fetch.stdin(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success()) {
        checks.push(deny(&["check", "--disable-fetch", "advisories"]));
    } else {
        println!(
            "skipped: known flaws of dependencies (their list cannot be fetched: `cargo deny fetch db` says why)"
        );
    }
    checks
}

/// outlive-dirty with these features and no others; a warning is an error.
fn dirty_with(workspace: &Workspace, features: &str) -> Command {
    let mut check =
        workspace.cargo(["clippy", "--release", "-p", "outlive-dirty", "--lib", "--no-default-features"]);
    check.args(["--features", features, "--", "-D", "warnings"]);
    check
}

/// Fails if the next build would change this manifest's lock file, which leaves every checkout changed.
fn lock(workspace: &Workspace, manifest: &str) -> Command {
    let mut check = workspace.cargo(["metadata", "--locked", "--format-version", "1", "--quiet"]);
    check.args(["--filter-platform", "x86_64-unknown-linux-gnu", "--manifest-path", manifest]);
    check.stdout(Stdio::null());
    check
}

fn has_deny() -> bool {
    let version =
        Command::new("cargo-deny").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    version.is_ok_and(|status| status.success())
}

/// Builds the documentation; a broken link or a missing text is an error.
pub(crate) fn docs(workspace: &Workspace, open: bool) -> Result<(), StepError> {
    let mut doc = documentation(workspace);
    if open {
        doc.arg("--open");
    }
    step(&mut doc)
}

fn documentation(workspace: &Workspace) -> Command {
    let mut doc = workspace.cargo(["doc", "--release", "--workspace", "--no-deps"]);
    doc.env("RUSTDOCFLAGS", "-D warnings");
    doc
}
