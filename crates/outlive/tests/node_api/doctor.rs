//! `outlive doctor` asks the node of another host, and compares.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use outlive::keys::Grant;
use outlive_machine::Host;
use serde_json::Value;

use crate::support::{PROGRAM, Stage, fails, said};

/// Host b of a pair, whose other host is a.
fn doctor(stage: &Stage, keys: &str, host: &str, more: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(["doctor", "--peer", &format!("hosta@{}", stage.address()), "--host", host]);
    command.arg("--keys").arg(stage.at(keys)).arg("--vms").arg(stage.at("vms-b")).args(more);
    command
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|why| panic!("{why}: {}", said(output)))
}

fn define(stage: &Stage, vms: &str, host: &str, arbiter: &Path) {
    fs::create_dir_all(stage.at(vms)).unwrap();
    let text = format!(
        "ip = '10.0.0.5/24'\ndisk = ['path=/no/web.img']\narbiter = 'file:{}'\nlisten = '0.0.0.0:7000'\n\
         [host.{host}]\nstandby = ['other:7000']\n",
        arbiter.display()
    );
    fs::write(stage.at(vms).join("web.toml"), text).unwrap();
}

fn arbiter(stage: &Stage, name: &str) -> std::path::PathBuf {
    let place = stage.at(name);
    fs::create_dir(&place).unwrap();
    outlive::arbiter::init(&format!("file:{}", place.display())).unwrap();
    place
}

#[test]
fn two_hosts_are_checked_and_compared() {
    let stage = Stage::new();
    stage.issue("hostb", Grant::ALL);
    let (one, other) = (arbiter(&stage, "one"), arbiter(&stage, "other"));
    define(&stage, "vms", "hosta", &one);
    define(&stage, "vms-b", "hostb", &one);
    let output = doctor(&stage, "hostb", "hostb", &["--json"]).output().unwrap();
    let opinion = json(&output);
    let names = |of: &Value| -> Vec<String> {
        of.as_array().unwrap().iter().map(|it| it["name"].as_str().unwrap().to_owned()).collect()
    };
    let hosts = ["hostb", "hosta"];
    for (at, host) in hosts.into_iter().enumerate() {
        assert_eq!(opinion["hosts"][at]["facts"]["host"], host, "{opinion}");
        let checked = names(&opinion["hosts"][at]["findings"]);
        assert!(checked.contains(&"memory".into()) && checked.contains(&"arbiter".into()), "{checked:?}");
    }
    let between = names(&opinion["between"]);
    for name in ["release", "kernel", "processor", "features", "clocks", "link delay", "link speed", "VMs"] {
        assert!(between.iter().any(|it| it == name), "{name}: {opinion}");
    }
    // Both are this machine, so nothing differs; KVM may be missing.
    let bad = opinion["between"].as_array().unwrap().iter().filter(|it| it["state"] == "error").count();
    assert_eq!(bad, 0, "{opinion}");
    let code = if Host::open().is_ok() { 0 } else { 1 };
    assert_eq!(output.status.code(), Some(code), "{opinion}");
    let table = doctor(&stage, "alice", "hostb", &[]).output().unwrap();
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("  both ") && text.contains("  between "), "{text}");
    // Another arbiter than the other host's.
    define(&stage, "vms-b", "hostb", &other);
    let output = doctor(&stage, "hostb", "hostb", &["--json"]).output().unwrap();
    let opinion = json(&output);
    assert_eq!((output.status.code(), &opinion["result"]), (Some(1), &"error".into()), "{opinion}");
    let arbiter = opinion["between"].as_array().unwrap().iter().find(|it| it["name"] == "arbiter").unwrap();
    assert_eq!(arbiter["state"], "error");
    assert!(arbiter["remedy"].as_str().unwrap().contains("the same one"), "{arbiter}");
}

/// What is here is told all the same.
#[test]
fn a_host_that_cannot_be_asked_is_one_line() {
    let stage = Stage::new();
    stage.issue("hosta-too", Grant::ALL);
    stage.issue("third", Grant::ARBITER);
    let why = fails(&mut doctor(&stage, "third", "hostb", &[]), 2);
    assert!(why.contains("host third may not do this (GET /v1/check)"), "{why}");
    let why = fails(&mut doctor(&stage, "hosta-too", "hosta", &[]), 2);
    assert!(why.contains("this host itself (hosta)"), "{why}");
    let mut nobody = Command::new(PROGRAM);
    nobody.args(["doctor", "--peer", "127.0.0.1:9", "--keys"]).arg(stage.at("hosta-too"));
    let output = nobody.args(["--json", "--vms"]).arg(stage.at("vms")).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{}", said(&output));
    assert_eq!(json(&output)["hosts"].as_array().unwrap().len(), 1);
}
