//! `outlive demo` as a user runs it. What it says of its link, its sandbox and its arbiter is what its hosts had.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::{PROGRAM, has_kvm};

/// Runs it to its end. Returns what it has found, or `None`, after saying why, where it cannot run.
fn demo(options: &[&str]) -> Option<Value> {
    if !has_kvm() {
        return None;
    }
    if !Path::new("/dev/net/tun").exists() {
        println!("skipped: no /dev/net/tun");
        return None;
    }
    let dir = tempfile::Builder::new().prefix("outlive-demo-test-").tempdir().unwrap();
    let (json, work) = (dir.path().join("result.json"), dir.path().join("work"));
    fs::create_dir(&work).unwrap();
    let mut command = Command::new(PROGRAM);
    command.args(["demo", "--memory", "64M", "--json"]).arg(&json).args(options);
    let output = command.env("TMPDIR", &work).output().unwrap();
    let said = [output.stderr, output.stdout].concat();
    let said = String::from_utf8_lossy(&said);
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert_eq!(fs::read_dir(&work).unwrap().count(), 0, "something is left\n{said}");
    Some(serde_json::from_slice(&fs::read(&json).unwrap()).unwrap())
}

/// The VM survives a kill, and these were its link, its sandbox and its arbiter.
fn survives_with(options: &[&str], link: &str, sandbox: bool, arbiter: &str) {
    let Some(found) = demo(&[&["--kills", "1", "--seconds", "5"], options].concat()) else { return };
    let field = |name: &str| &found[name];
    assert_eq!((field("result"), field("kills")), (&Value::from("ok"), &Value::from(1)), "{found}");
    for none in ["lost", "duplicated", "broken_connections"] {
        assert_eq!(field(none), 0, "{none}: {found}");
    }
    assert!(field("acked").as_u64() > Some(100), "{found}");
    assert_eq!(field("link"), link, "{found}");
    assert_eq!(field("sandbox"), sandbox, "{found}");
    assert_eq!(field("arbiter"), arbiter, "{found}");
}

#[test]
fn over_tls_in_the_sandbox_with_a_directory_as_arbiter() {
    survives_with(&[], "tls1.3", true, "file");
}

#[test]
fn over_tls_in_the_sandbox_with_the_arbiter_that_outlive_serves() {
    survives_with(&["--arbiter", "own"], "tls1.3", true, "own");
}

#[test]
fn over_tls_in_the_sandbox_with_an_etcd_cluster_as_arbiter() {
    if !Command::new("etcd").arg("--version").output().is_ok_and(|it| it.status.success()) {
        println!("skipped: no etcd (apt-get install etcd-server)");
        return;
    }
    survives_with(&["--arbiter", "etcd"], "tls1.3", true, "etcd");
}

/// Without them it says so.
#[test]
fn over_a_plain_link_without_a_sandbox() {
    survives_with(&["--insecure", "--sandbox", "off", "--arbiter", "own"], "plain", false, "own");
}

#[test]
fn a_guest_that_has_filled_its_memory_survives_as_well() {
    let options = ["--fill-memory", "--kills", "1", "--seconds", "5"];
    let Some(found) = demo(&options) else { return };
    // The guest's program, its heap and its tables are left out.
    assert!(found["filled_bytes"].as_u64() > Some(24 << 20), "{found}");
    assert_eq!((&found["result"], &found["lost"]), (&Value::from("ok"), &Value::from(0)), "{found}");
}
