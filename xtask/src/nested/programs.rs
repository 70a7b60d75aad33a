//! Programs of this tree for an emulated host: what builds and finds them, and what runs them.

use std::path::PathBuf;
use std::process::Command;

use super::host::{HostError, Qemu};
use super::kernel::KernelError;
use crate::run::{StepError, Workspace, describe, output};

/// Why a host has no result.
#[derive(Debug, thiserror::Error)]
pub(super) enum RunError {
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Host(#[from] HostError),
}

/// What emulates hosts, fetched first if it is missing.
///
/// # Errors
/// Without it, one that counts as something that the caller can change.
pub(super) fn qemu(workspace: &Workspace, fetch: bool) -> Result<Qemu, StepError> {
    Qemu::get(workspace, fetch).map_err(|error| match error {
        HostError::NoQemu => StepError::Unusable(error.to_string()),
        error => StepError::Failed(format!("finding QEMU ({error})")),
    })
}

/// A word for the shell.
pub(super) fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

/// Builds with cargo, and returns its messages.
pub(super) fn built(cargo: &mut Command) -> Result<String, StepError> {
    cargo.args(["--message-format", "json-render-diagnostics"]);
    eprintln!("==> {}", describe(cargo));
    output(cargo).ok_or_else(|| StepError::Failed(describe(cargo)))
}

/// The program of a target in cargo's messages.
///
/// # Errors
/// It is not there.
pub(super) fn executable(messages: &str, name: &str) -> Result<PathBuf, StepError> {
    find(messages, name).ok_or_else(|| StepError::Failed(format!("finding {name} in what cargo built")))
}

fn find(messages: &str, name: &str) -> Option<PathBuf> {
    let target = |name: &str| name.replace('-', "_");
    messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok()).find_map(
        |message| {
            let found = message["target"]["name"].as_str()?;
            (target(found) == target(name)).then(|| message["executable"].as_str())?.map(PathBuf::from)
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_the_one_of_the_target() {
        let messages = r#"
{"reason":"compiler-artifact","target":{"name":"libc"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"outlive_dirty"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"outlive_dirty"},"executable":"/t/outlive_dirty-1"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(find(messages, "outlive-dirty"), Some("/t/outlive_dirty-1".into()));
        assert_eq!(find(messages, "readme"), None);
    }
}
