//! Format, clippy, documentation.

use crate::run::{StepError, Workspace, step};

/// The payload is no member of the workspace, so cargo does not come to it by itself.
const PAYLOAD: &str = "guest/payload/Cargo.toml";

/// Checks everything that needs no tests.
pub(crate) fn run(workspace: &Workspace) -> Result<(), StepError> {
    step(&mut workspace.cargo(["fmt", "--all", "--check"]))?;
    if workspace.root.join(PAYLOAD).exists() {
        step(&mut workspace.cargo(["fmt", "--manifest-path", PAYLOAD, "--check"]))?;
    }
    // The release profile shares build scripts and procedural macros with the tests.
    let clippy = ["clippy", "--release", "--workspace", "--all-targets", "--", "-D", "warnings"];
    step(&mut workspace.cargo(clippy))?;
    docs(workspace, false)
}

/// Builds the documentation; a broken link or a missing text is an error.
pub(crate) fn docs(workspace: &Workspace, open: bool) -> Result<(), StepError> {
    let mut doc = workspace.cargo(["doc", "--release", "--workspace", "--no-deps"]);
    if open {
        doc.arg("--open");
    }
    step(doc.env("RUSTDOCFLAGS", "-D warnings"))
}
