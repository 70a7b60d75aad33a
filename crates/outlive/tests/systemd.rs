//! The units in `systemd/`, as far as systemd itself can check them without starting anything.

#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;
use std::process::Command;

const UNIT: &str = "outlive@.service";
const PROGRAM: &str = "/usr/local/bin/outlive";

fn unit() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../systemd");
    fs::read_to_string(folder.join(UNIT)).unwrap()
}

/// What systemd has to say about a unit; nothing if it is right. `None` where systemd is not installed.
fn verify(unit: &str) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    // The program need not be installed on this machine.
    let path = folder.path().join(UNIT);
    fs::write(&path, unit.replace(PROGRAM, env!("CARGO_BIN_EXE_outlive"))).unwrap();
    let said = match Command::new("systemd-analyze").arg("verify").arg("--man=no").arg(&path).output() {
        Ok(output) => output.stdout.into_iter().chain(output.stderr),
        Err(error) => {
            println!("skipped: no systemd-analyze: {error}");
            return None;
        }
    };
    let said = String::from_utf8_lossy(&said.collect::<Vec<_>>()).into_owned();
    // Other units of this machine are not ours.
    Some(said.lines().filter(|line| line.contains("outlive")).collect::<Vec<_>>().join("\n"))
}

#[test]
fn systemd_understands_every_line_of_the_unit() {
    let Some(said) = verify(&unit()) else { return };
    assert_eq!(said, "");
    let wrong = unit().replace("RestartSec=", "RestartSek=");
    assert!(verify(&wrong).unwrap().contains("RestartSek"), "the check checks nothing");
}

/// SIGKILL would be a takeover of what an operator wants stopped.
#[test]
fn systemd_waits_for_longer_than_the_guest_may_take() {
    let (unit, seconds) = (unit(), |text: &str| text.trim_end_matches('s').parse::<u32>().unwrap());
    let after = |words: &str| unit.split_once(words).unwrap().1.split_whitespace().next().unwrap();
    assert!(seconds(after("TimeoutStopSec=")) >= seconds(after("--stop-within ")) + 30);
}

/// Both the unit and its example are a command that the program understands.
#[test]
fn the_command_of_the_unit_is_one() {
    let unit = unit();
    let command = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../systemd");
    let example = fs::read_to_string(folder.join("example.conf")).unwrap();
    let options = example.lines().find_map(|line| line.strip_prefix("OUTLIVE_OPTIONS=")).unwrap();
    let options = options.trim_matches('"');
    let line = command.replace("$OUTLIVE_OPTIONS", options).replace("%i", "web");
    // The shell respects quotes as systemd does. Help is shown only if everything else is understood.
    let line = line.replace(PROGRAM, env!("CARGO_BIN_EXE_outlive"));
    let output = Command::new("sh").arg("-c").arg(format!("{line} --arbiter-typo")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("--arbiter-typo") && said.contains("unexpected argument"), "{said}");
}
