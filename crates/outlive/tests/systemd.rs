//! The units in `systemd/`, as far as systemd itself can check them without starting anything.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

const UNIT: &str = "outlive@.service";
const ARBITER: &str = "outlive-arbiter.service";
const METRICS: &str = "outlive-metrics.service";
const NODE: &str = "outlive-node.service";
const PROGRAM: &str = "/usr/local/bin/outlive";
const LEAVER: &str = "/usr/local/lib/outlive/leave-to-standby";
const DRAINER: &str = "/usr/local/lib/outlive/drain-to-stop";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../systemd")
}

fn unit() -> String {
    fs::read_to_string(folder().join(UNIT)).unwrap()
}

fn arbiter() -> String {
    fs::read_to_string(folder().join(ARBITER)).unwrap()
}

fn metrics() -> String {
    fs::read_to_string(folder().join(METRICS)).unwrap()
}

fn node() -> String {
    fs::read_to_string(folder().join(NODE)).unwrap()
}

/// What systemd has to say about a unit; nothing if it is right. `None` where systemd is not installed.
fn verify(name: &str, unit: &str) -> Option<String> {
    let away = tempfile::tempdir().unwrap();
    // The program need not be installed on this machine.
    let path = away.path().join(name);
    let leaver = folder().join("leave-to-standby").canonicalize().unwrap();
    let drainer = folder().join("drain-to-stop").canonicalize().unwrap();
    let unit = unit.replace(PROGRAM, env!("CARGO_BIN_EXE_outlive")).replace(LEAVER, leaver.to_str().unwrap());
    let unit = unit.replace(DRAINER, drainer.to_str().unwrap());
    fs::write(&path, unit).unwrap();
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
    for (name, unit) in [(UNIT, unit()), (ARBITER, arbiter()), (METRICS, metrics()), (NODE, node())] {
        let Some(said) = verify(name, &unit) else { return };
        assert_eq!(said, "", "{name}");
        let wrong = unit.replace("RestartSec=", "RestartSek=");
        assert!(verify(name, &wrong).unwrap().contains("RestartSek"), "the check checks nothing");
    }
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
    let example = fs::read_to_string(folder().join("example.conf")).unwrap();
    let options = example.lines().find_map(|line| line.strip_prefix("OUTLIVE_OPTIONS=")).unwrap();
    let options = options.trim_matches('"');
    let line = command.replace("$OUTLIVE_OPTIONS", options).replace("%i", "web");
    // The shell respects quotes as systemd does. Help is shown only if everything else is understood.
    let line = line.replace(PROGRAM, env!("CARGO_BIN_EXE_outlive"));
    let output = Command::new("sh").arg("-c").arg(format!("{line} --arbiter-typo")).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("--arbiter-typo") && said.contains("unexpected argument"), "{said}");
}

/// The arbiter's unit serves the directory that its head says how to make, on an address that it can listen on.
#[test]
fn the_command_of_the_arbiters_unit_serves() {
    let unit = arbiter();
    let command = unit.lines().find_map(|line| line.strip_prefix("ExecStart=")).unwrap();
    assert!(
        unit.contains("outlive arbiter init file:/var/lib/outlive-arbiter ")
            && command.contains(" /var/lib/outlive-arbiter ")
    );
    let calls = unit.lines().find_map(|line| line.strip_prefix("SystemCallFilter=")).unwrap();
    for call in ["landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"] {
        assert!(calls.contains(call), "the server confines itself with {call}, and would be killed for it");
    }
    let there = tempfile::tempdir().unwrap();
    let (directory, keys) = (there.path().join("arbiter"), there.path().join("keys"));
    let run = |words: &str| {
        let words = words.split_whitespace().collect::<Vec<_>>();
        let mut command = Command::new(env!("CARGO_BIN_EXE_outlive"));
        assert!(command.args(&words).output().unwrap().status.success(), "{words:?}");
    };
    fs::create_dir(&directory).unwrap();
    run(&format!("arbiter init file:{}", directory.display()));
    run(&format!("keys init {} --arbiter", keys.display()));
    let line = command
        .replace("/var/lib/outlive-arbiter", directory.to_str().unwrap())
        .replace(PROGRAM, env!("CARGO_BIN_EXE_outlive"))
        .replace(":7010", ":0");
    let (said, code) = serve(&line, ("OUTLIVE_ARBITER_OPTIONS", &format!("--keys {}", keys.display())));
    assert!(said.contains("READY=1"), "{said}");
    assert_eq!(code, Some(0));
}

/// The metrics' unit serves, says that it does, and ends in order. Its user can do nothing.
#[test]
fn the_command_of_the_metrics_unit_serves() {
    let unit = metrics();
    let value = |name: &str| unit.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    assert_eq!(
        value("Environment=OUTLIVE_METRICS_LISTEN="),
        "127.0.0.1:9753",
        "whoever reaches it can read it"
    );
    assert_eq!((value("DynamicUser="), value("CapabilityBoundingSet=")), ("yes", ""));
    let line = value("ExecStart=").replace(PROGRAM, env!("CARGO_BIN_EXE_outlive"));
    let (said, code) = serve(&line, ("OUTLIVE_METRICS_LISTEN", "127.0.0.1:0"));
    assert!(said.contains("READY=1"), "{said}");
    assert_eq!(code, Some(0));
}

/// The node's unit serves, and ends in order; its VMs are not ended with it.
#[test]
fn the_command_of_the_nodes_unit_serves() {
    let unit = node();
    let value = |name: &str| unit.lines().find_map(|line| line.strip_prefix(name)).unwrap();
    assert_eq!((value("KillMode="), value("RuntimeDirectoryPreserve=")), ("process", "yes"));
    let there = tempfile::tempdir().unwrap();
    let at = |name: &str| there.path().join(name).display().to_string();
    let options = format!(
        "--vms {} --state {} --run {} --logs {} --socket {}",
        at("vms"),
        at("state"),
        at("run"),
        at("logs"),
        at("node.sock")
    );
    let line = value("ExecStart=").replace(PROGRAM, env!("CARGO_BIN_EXE_outlive"));
    let (said, code) = serve(&line, ("OUTLIVE_NODE_OPTIONS", &options));
    assert!(said.contains("READY=1"), "{said}");
    assert_eq!(code, Some(0));
    assert!(!Path::new(&at("node.sock")).exists());
}

/// A stop of the node alone disturbs no VM.
#[test]
fn vms_leave_a_host_only_while_it_stops() {
    for (system, orders) in [("stopping", "node drain --stop --wait 10\n"), ("running", ""), ("degraded", "")]
    {
        let there = tempfile::tempdir().unwrap();
        let fake = |name: &str, script: &str| {
            let path = there.path().join(name);
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        };
        fake("systemctl", &format!("echo {system}; test {system} = running"));
        fake("outlive", &format!("echo \"$@\" >> {}/orders", there.path().display()));
        let path = format!("{}:{}", there.path().display(), std::env::var("PATH").unwrap());
        let status = Command::new(folder().join("drain-to-stop")).env("PATH", path).status().unwrap();
        assert!(status.success());
        assert_eq!(fs::read_to_string(there.path().join("orders")).unwrap_or_default(), orders, "{system}");
    }
}

/// Starts the command of a unit, and tells it to stop once it has told the manager something. Returns that, and its exit
/// code.
fn serve(line: &str, variable: (&str, &str)) -> (String, Option<i32>) {
    let there = tempfile::tempdir().unwrap();
    let manager = there.path().join("manager");
    let socket = std::os::unix::net::UnixDatagram::bind(&manager).unwrap();
    socket.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    let mut server = Command::new("sh")
        .arg("-c")
        .arg(format!("exec {line}"))
        .env(variable.0, variable.1)
        .env("NOTIFY_SOCKET", &manager)
        .spawn()
        .unwrap();
    let mut said = [0; 256];
    let length = socket.recv(&mut said);
    let status = nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(server.id() as i32),
        nix::sys::signal::Signal::SIGTERM,
    );
    let ended = server.wait().unwrap();
    status.unwrap();
    (String::from_utf8_lossy(&said[..length.unwrap()]).into_owned(), ended.code())
}

/// Whether `ExecStop=` hands the VM over when systemd and the process say this. The process is another one here, and
/// stays.
fn leaves(system: &str, role: &str, protected: bool, survived: bool) -> bool {
    let there = tempfile::tempdir().unwrap();
    let mut process = Command::new("sleep").arg("600").spawn().unwrap();
    // A second process on this host, of another VM, says the opposite.
    let answer = |pid: u32, role: &str, protected: bool, survived: bool| {
        let loss = format!(r#""loss_of_this_host": {{ "survived": {survived}, "what": "words" }}"#);
        let arbiter = r#""arbiter": { "place": "file:/x" }"#;
        format!(
            r#"{{ "socket": "/x/{pid}.sock", "vm": "web", "pid": {pid}, "role": "{role}", "protected": {protected}, {arbiter}, {loss} }}"#
        )
    };
    let other = |pid| answer(pid, "primary", !protected, !survived);
    let answers = [other(1), answer(process.id(), role, protected, survived), other(process.id() * 10)];
    let answers = format!("[\n{}\n]", answers.join(",\n").replace(", ", ",\n    "));
    fs::write(there.path().join("answers"), answers).unwrap();
    let fake = |name: &str, script: String| {
        let path = there.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    // It fails for every state but `running`.
    fake("systemctl", format!("echo {system}; test {system} = running"));
    let folder_of_fakes = there.path().display();
    let orders = format!("if [ $1 = hand-over ]; then echo \"$@\" >> {folder_of_fakes}/orders; exit 2; fi");
    fake("outlive", format!("{orders}\ncat {folder_of_fakes}/answers; exit 1"));
    let path = format!("{}:{}", there.path().display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(folder().join("leave-to-standby"));
    let status = command.env("PATH", path).env("MAINPID", process.id().to_string()).status().unwrap();
    assert!(status.success());
    assert!(process.try_wait().unwrap().is_none(), "systemd ends it in order");
    process.kill().unwrap();
    process.wait().unwrap();
    let orders = fs::read_to_string(there.path().join("orders")).unwrap_or_default();
    let own = format!("hand-over --socket /x/{}.sock\n", process.id());
    assert!(orders.is_empty() || orders == own, "{orders}");
    !orders.is_empty()
}

#[test]
fn only_a_system_that_stops_leaves_its_vm_and_only_to_a_standby_that_can_have_it() {
    assert!(leaves("stopping", "primary", true, true));
    assert!(!leaves("running", "primary", true, true), "an operator wants the VM stopped");
    assert!(!leaves("degraded", "primary", true, true));
    assert!(!leaves("stopping", "standby", true, true), "a standby leaves in order");
    assert!(!leaves("stopping", "primary", false, false), "nobody else has the VM");
    assert!(!leaves("stopping", "primary", true, false), "nobody could take it over now");
    let exec = format!("ExecStop=-{LEAVER}");
    assert!(unit().lines().any(|line| line == exec));
}
