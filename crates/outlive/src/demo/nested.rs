//! `outlive demo --nested`: the same with a Linux guest and two emulated hosts, for machines without KVM.
//! This project's developer commands make the emulated hosts, from its sources.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::DemoError;

/// The command that makes them.
const COMMAND: [&str; 3] = ["xtask", "nested", "demo"];

/// Replaces this process by that command. Returns only on an error.
pub(super) fn become_it() -> DemoError {
    let sources = sources();
    if !sources.join("xtask/Cargo.toml").is_file() {
        return DemoError::NoSources(sources);
    }
    DemoError::NoCargo(Command::new("cargo").args(COMMAND).current_dir(sources).exec())
}

/// Where this program was built.
fn sources() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_path_buf()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sources_have_the_command() {
        assert!(sources().join("xtask/src/nested/mod.rs").is_file());
    }
}
