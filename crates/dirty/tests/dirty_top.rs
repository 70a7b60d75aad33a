//! The example program, used as a user would. Cargo builds examples before it runs tests, if it runs all
//! tests.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// The example, if it has been built.
fn dirty_top() -> Option<Command> {
    let program = std::env::current_exe().ok()?.parent()?.parent()?.join("examples/dirty_top");
    let built = program.exists().then(|| Command::new(program));
    if built.is_none() {
        println!("skipped: the example is not built");
    }
    built
}

fn output(options: &[&str]) -> Option<Output> {
    Some(dirty_top()?.args(options).output().unwrap())
}

fn has_kvm() -> bool {
    let there = PathBuf::from("/dev/kvm").exists();
    if !there {
        println!("skipped: no /dev/kvm");
    }
    there
}

#[test]
fn help_names_every_option() {
    let Some(output) = output(&["--help"]) else { return };
    let help = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success());
    for option in ["--vcpus", "--memory", "--pages", "--hot", "--interval", "--backend", "--seconds"] {
        assert!(help.contains(option), "{help}");
    }
}

#[test]
fn a_wrong_option_is_one_line_and_code_2() {
    for options in [
        &["--bogus"][..],
        &["--vcpus"],
        &["--vcpus", "0"],
        &["--memory", "12"],
        &["--hot", "101"],
        &["--backend", "uffd"],
        &["--memory", "16M", "--pages", "4000"],
    ] {
        let Some(output) = output(options) else { return };
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{options:?}");
        assert!(message.starts_with("dirty_top: ") && message.lines().count() == 1, "{message}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn every_back_end_shows_its_pages() {
    if !has_kvm() {
        return;
    }
    for backend in ["ring", "clear-log", "bitmap"] {
        let options =
            ["--seconds", "1", "--hot", "100", "--pages", "50", "--interval", "1", "--backend", backend];
        let Some(output) = output(&options) else { return };
        if output.status.code() == Some(2) {
            println!("skipped: {}", String::from_utf8_lossy(&output.stderr));
            continue;
        }
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        println!("{text}");
        assert!(text.contains(&format!("back end:  {backend}")) && text.contains("epochs/s"), "{text}");
        if backend == "bitmap" {
            assert!(text.contains("hot pages: off") && text.contains(" 0 traps/s avoided"), "{text}");
        }
    }
}

#[test]
fn ctrl_c_ends_it_well() {
    if !has_kvm() {
        return;
    }
    let Some(mut command) = dirty_top() else { return };
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    lines.next().unwrap().unwrap();
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success() && child.wait().unwrap().success());
}
