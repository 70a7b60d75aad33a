//! Helpers that the tests of the arbiter share.

use std::fs;
use std::path::{Path, PathBuf};

use outlive::arbiter::{Claim, FileArbiter, VmId};
use tempfile::TempDir;

pub(crate) const VM: VmId = VmId([0x5e; 16]);

pub(crate) const OTHER_VM: VmId = VmId([0x5f; 16]);

/// A directory in memory if there is one: the races need many rounds, not a disk.
pub(crate) fn directory() -> TempDir {
    tempfile::Builder::new().prefix("outlive-arbiter-").tempdir_in(memory_or_temp()).unwrap()
}

pub(crate) fn memory_or_temp() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if tempfile::tempfile_in(memory).is_ok() { memory.to_path_buf() } else { std::env::temp_dir() }
}

/// Opens the arbiter in a directory, and makes it an arbiter first if it is none.
pub(crate) fn open(directory: &Path) -> FileArbiter {
    let made = || FileArbiter::init(directory).map(|(arbiter, _)| arbiter);
    FileArbiter::open(directory).or_else(|_| made()).unwrap()
}

/// All files in a directory and in those below it, and directories without a file.
pub(crate) fn names(directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let below = directory.join(&name);
        if fs::symlink_metadata(&below).unwrap().is_dir() {
            let inner = self::names(&below);
            names.extend(inner.iter().map(|inner| format!("{name}/{inner}")));
            if inner.is_empty() {
                names.push(format!("{name}/"));
            }
        } else {
            names.push(name);
        }
    }
    names.sort();
    names
}

pub(crate) fn empty(directory: &Path, keep: &str) {
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            fs::remove_dir_all(entry.path()).unwrap();
        } else if entry.file_name() != keep {
            fs::remove_file(entry.path()).unwrap();
        }
    }
}

pub(crate) fn why(claim: Claim) -> String {
    match claim {
        Claim::Unreachable { why } => why,
        other => panic!("expected Unreachable, got {other:?}"),
    }
}

pub(crate) fn loser(claim: Claim) -> String {
    match claim {
        Claim::Lost { owner } => owner,
        other => panic!("expected Lost, got {other:?}"),
    }
}

pub(crate) fn claim_path(directory: &Path, generation: u64) -> PathBuf {
    directory.join(VM.to_string()).join(generation.to_string())
}

pub(crate) const KEPT: u64 = 8;
