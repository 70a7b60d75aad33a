//! `outlive check` as a program: exit codes and output, for root and for a user without rights.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Output};

use outlive_machine::Host;
use serde_json::Value;
use tempfile::TempDir;

const PROGRAM: &str = env!("CARGO_BIN_EXE_outlive");
/// `nobody`, everywhere.
const NOBODY: u32 = 65534;

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

#[test]
fn the_exit_code_and_both_outputs_agree() {
    let table = Command::new(PROGRAM).arg("check").output().unwrap();
    let json = Command::new(PROGRAM).args(["check", "--json"]).output().unwrap();
    let report: Value = serde_json::from_slice(&json.stdout).unwrap();
    let missing = report["result"] == "error";
    for output in [&table, &json] {
        assert_eq!(output.status.code(), Some(if missing { 2 } else { 0 }), "{output:?}");
    }
    let verdict = if missing { "VMs cannot run on this machine" } else { "VMs can run on this machine" };
    assert!(text(&table).contains(verdict), "{}", text(&table));
    for finding in report["findings"].as_array().unwrap() {
        let name = finding["name"].as_str().unwrap();
        assert!(text(&table).contains(name), "{name} is not in the table");
    }
}

#[test]
fn a_machine_with_kvm_passes_its_trial() {
    if let Err(error) = Host::open() {
        println!("skipped: {error}");
        return;
    }
    let output = Command::new(PROGRAM).arg("check").output().unwrap();
    assert!(text(&output).contains("found all 256 written pages"), "{}", text(&output));
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// A copy that every user can start; the build directory may be closed to others.
fn copy_for_everybody() -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let copy = directory.path().join("outlive");
    fs::copy(PROGRAM, &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)).unwrap();
    (directory, copy)
}

#[test]
fn without_permission_it_says_so_and_what_to_do() {
    if !nix::unistd::geteuid().is_root() {
        println!("skipped: only root can become another user");
        return;
    }
    let (_directory, copy) = copy_for_everybody();
    let output = Command::new(copy).arg("check").uid(NOBODY).gid(NOBODY).output().unwrap();
    if fs::metadata("/dev/kvm").is_ok_and(|metadata| metadata.permissions().mode() & 0o006 == 0o006) {
        println!("skipped: everybody may use /dev/kvm here");
        return;
    }
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let text = text(&output);
    let expected =
        if fs::exists("/dev/kvm").unwrap() { "no permission to open /dev/kvm" } else { "does not exist" };
    assert!(text.contains(expected) && text.contains("-> "), "{text}");
}

#[test]
fn unknown_options_are_refused_in_one_line() {
    let output = Command::new(PROGRAM).args(["check", "--colour"]).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(
        error.contains("'--colour'") && error.contains("--help") && error.lines().count() == 1,
        "{error}"
    );
    let help = Command::new(PROGRAM).args(["check", "--help"]).output().unwrap();
    assert!(text(&help).contains("outlive check --json"), "{}", text(&help));
}
