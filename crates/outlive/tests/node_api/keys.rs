//! Keys that are renewed, revoked, missing or late, while a node runs.

use std::cell::RefCell;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;

use outlive::keys::{self, Grant};
use serde_json::Value;

use crate::support::{Ends, Stage, VM, YEAR, file, shown, wait_until};

#[test]
fn new_keys_count_from_the_next_connection_on() {
    let mut stage = Stage::new();
    let mut events = stage.follow("alice", "alice");
    let first = shown(&mut stage.tls(Some("alice"))).unwrap();
    let second = keys::rotate(&stage.at("hosta"), YEAR, false).unwrap();
    assert_ne!(first.serial, second.serial);
    assert_eq!(shown(&mut stage.tls(Some("alice"))).unwrap(), second);
    stage.good("alice", &["vm", "list"]);
    // A new CA, in the order of the documents.
    keys::rotate_ca(&stage.at("hosta")).unwrap();
    stage.good("alice", &["vm", "list"]);
    let refused = keys::rotate(&stage.at("hosta"), YEAR, false).unwrap_err().to_string();
    assert!(refused.starts_with("alice: ") && refused.contains("outlive keys operator"), "{refused}");
    fs::rename(stage.at("alice"), stage.at("old")).unwrap();
    stage.issue("alice", Grant::OPERATOR);
    keys::rotate(&stage.at("hosta"), YEAR, false).unwrap();
    keys::forget_old_cas(&stage.at("hosta"), false).unwrap();
    stage.good("alice", &["vm", "list"]);
    stage.bad("old", &["vm", "list"], 2);
    // What was open with a certificate of the old CA is ended; its command goes on with the new one.
    stage.wait_says("a connection of operator alice (127.0.0.1) at the API is ended: its certificate", 1);
    assert!(events.process.0.try_wait().unwrap().is_none());
    stage.unharmed();
}

fn wait_for(process: &mut Ends) -> Option<i32> {
    let process = RefCell::new(&mut process.0);
    wait_until("the command ends", || process.borrow_mut().try_wait().unwrap().is_some());
    process.into_inner().wait().unwrap().code()
}

#[test]
fn a_revocation_ends_what_is_open() {
    let mut stage = Stage::new();
    stage.issue("bob", Grant::OPERATOR);
    let mut alice = stage.follow("alice", "bob");
    let mut bob = stage.tls(Some("bob"));
    bob.write_all(b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    bob.flush().unwrap();
    bob.read_exact(&mut [0; 12]).unwrap();
    keys::revoke(&stage.at("hosta"), "alice").unwrap();
    assert_eq!(wait_for(&mut alice.process), Some(2));
    wait_until("the command says why", || {
        alice.said.lock().unwrap().iter().any(|line| line.contains("does not accept these keys"))
    });
    stage.wait_says("operator alice (127.0.0.1) at the API is ended: the certificate", 1);
    // Bob has nothing to do with it: he still hears the node.
    stage.good("bob", &["vm", "define", "after", &file(&stage.at("after.toml"), VM)]);
    let mut heard = Vec::new();
    while !String::from_utf8_lossy(&heard).contains(r#""vm":"after""#) {
        let mut part = [0; 4096];
        let count = bob.read(&mut part).unwrap();
        assert!(count > 0, "bob was ended, too");
        heard.extend_from_slice(&part[..count]);
    }
    stage.unharmed();
}

/// VMs do not wait for the API of other hosts.
#[test]
fn a_node_runs_without_keys_and_without_its_address_until_they_are_there() {
    let mut stage = Stage::bare();
    stage.issue("alice", Grant::OPERATOR);
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    stage.start("later", &taken.local_addr().unwrap().to_string());
    let warnings = |stage: &Stage| {
        let status: Value =
            serde_json::from_slice(&stage.here(&["node", "status", "--json"]).stdout).unwrap();
        let all = status["warnings"].as_array().unwrap();
        all.iter().map(|it| it.as_str().unwrap().to_owned()).collect::<Vec<_>>().join("\n")
    };
    wait_until("the node warns of both", || {
        let warned = warnings(&stage);
        warned.contains("cannot listen on 127.0.0.1") && warned.contains("later has no keys")
    });
    drop(taken);
    stage.wait_says("answered at", 1);
    let why = stage.bad("alice", &["vm", "list"], 2);
    assert!(why.contains("is not trusted") && why.contains("has it no keys"), "{why}");
    fs::rename(stage.at("hosta"), stage.at("later")).unwrap();
    stage.good("alice", &["vm", "list"]);
    wait_until("nothing is warned of any more", || warnings(&stage).is_empty());
    stage.unharmed();
}
