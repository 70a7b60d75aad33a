//! Format, clippy, documentation, and rules for dependencies.

use std::process::{Command, Stdio};

use crate::run::{StepError, Workspace, step};

/// The payload is not a member of the workspace, so cargo does not check it with the rest.
const PAYLOAD: &str = "guest/payload/Cargo.toml";

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
    let failed: Vec<String> = checks(workspace)
        .iter_mut()
        .filter_map(|check| step(check).err())
        .map(|error| error.to_string())
        .collect();
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
    checks.extend(DIRTY_FEATURES.map(|features| dirty_with(workspace, features)));
    if has_deny() {
        checks.push(workspace.cargo(["deny", "--offline", "check", "licenses", "bans", "sources"]));
    } else {
        println!(
            "skipped: licences and sources of dependencies (`cargo install cargo-deny --locked` brings what checks them)"
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
