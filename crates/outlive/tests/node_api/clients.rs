//! Who may use the API does so, and hears in one line what is not for it.

use std::fs::File;
use std::net::TcpListener;
use std::process::Command;
use std::thread;

use outlive::keys::{self, Grant, Vms};
use serde_json::Value;

use crate::support::{PROGRAM, Stage, VM, fails, file, order, said, talk, wait_until};

#[test]
fn an_operator_does_everything_from_another_host() {
    let stage = Stage::new();
    let definition = file(&stage.at("web.toml"), VM);
    assert_eq!(stage.json("alice", &["node", "status"])["host"], "hosta");
    assert_eq!(stage.json("alice", &["vm", "define", "web", &definition])["changed"], true);
    let events = stage.follow("alice", "alice");
    assert!(events.told.lock().unwrap().iter().all(|line| line.starts_with('{')));
    assert!(stage.good("alice", &["vm", "list"]).contains("web"));
    assert_eq!(stage.json("alice", &["vm", "show", "web"])["state"], "stopped");
    let started = stage.from("alice", &["vm", "start", "web"]);
    if File::options().read(true).write(true).open("/dev/kvm").is_ok() {
        assert_eq!(started.status.code(), Some(0), "{}", said(&started));
        assert_eq!(stage.json("alice", &["vm", "show", "web"])["state"], "running");
        assert!(!stage.good("alice", &["vm", "logs", "web"]).is_empty());
    }
    // There is no second host that could have it.
    let refused = stage.from("alice", &["vm", "hand-over", "web"]);
    assert!(refused.status.code() == Some(1) && !said(&refused).contains("may not"), "{}", said(&refused));
    let stopped = stage.json("alice", &["vm", "stop", "web", "--now"]);
    assert_eq!(stopped["state"], "succeeded", "{stopped}");
    stage.good("alice", &["vm", "undefine", "web"]);
    assert_eq!(stage.json("alice", &["node", "drain"])["state"], "succeeded");
    assert_eq!(stage.json("alice", &["node", "status"])["mode"], "drained");
    assert!(stage.good("alice", &["node", "undrain"]).contains("active"));
    let log = stage.log();
    for did in ["PUT /v1/vms/web", "POST /v1/vms/web/start", "DELETE /v1/vms/web", "POST /v1/node/drain"] {
        assert!(log.contains(&format!("operator alice: {did}")), "{did}: {log}");
    }
    assert!(!log.contains("alice: GET"), "{log}");
}

#[test]
fn variables_stand_for_the_options_and_the_socket_goes_before_them() {
    let stage = Stage::new();
    let ask = |words: &[&str]| {
        let mut command = Command::new(PROGRAM);
        command.args(words).env("OUTLIVE_HOST", format!("hosta@{}", stage.address()));
        command.env("OUTLIVE_KEYS", stage.at("alice"));
        command
    };
    assert!(ask(&["node", "status"]).output().unwrap().status.success());
    let socket = stage.at("api");
    let socket = socket.to_str().unwrap();
    let away =
        ask(&["node", "status", "--socket", socket]).env("OUTLIVE_HOST", "no.such.host.invalid").output();
    assert!(away.unwrap().status.success(), "a socket is this host's");
    let why = fails(ask(&["node", "status"]).env("OUTLIVE_HOST", "::1"), 2);
    assert!(why.contains("OUTLIVE_HOST: ") && why.contains("[::1]"), "{why}");
    let both = ask(&["node", "status", "--socket", socket, "--host", "hosta"]).output().unwrap();
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn a_certificate_says_what_is_allowed() {
    let mut stage = Stage::new();
    let one = Vms::Only(vec![outlive::arbiter::VmId([7; 16])]);
    stage.issue("hostb", Grant::ALL);
    stage.issue("narrow", Grant { send: one.clone(), hold: one, ..Grant::NONE });
    stage.issue("third", Grant::ARBITER);
    let definition = file(&stage.at("web.toml"), VM);
    stage.good("alice", &["vm", "define", "web", &definition]);
    // A host looks, and has VMs handed over.
    assert!(stage.good("hostb", &["vm", "list"]).contains("web"));
    stage.good("hostb", &["node", "status"]);
    let why = stage.bad("hostb", &["vm", "hand-over", "web"], 1);
    assert!(why.contains("does not run on this host"), "{why}");
    for words in [
        &["vm", "start", "web"][..],
        &["vm", "stop", "web", "--now"],
        &["vm", "undefine", "web"],
        &["vm", "define", "web", &definition],
        &["node", "drain"],
        &["node", "undrain"],
    ] {
        let why = stage.bad("hostb", words, 1);
        assert!(
            why.starts_with("host hostb may not do this (") && why.contains("`outlive keys operator NAME`"),
            "{why}"
        );
    }
    for keys in ["narrow", "third"] {
        let why = stage.bad(keys, &["vm", "list"], 1);
        assert!(why.contains(&format!("host {keys} may not do this (GET /v1/vms)")), "{why}");
    }
    assert_eq!(stage.json("alice", &["vm", "show", "web"])["desired"], "stopped");
    // The answer comes though its client is still saying something long.
    let body = "#".repeat(100 << 10);
    let length = body.len();
    let head = format!(
        "PUT /v1/vms/web HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n"
    );
    let answer = talk(&mut stage.tls(Some("hostb")), &(head + &body)).unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains(r#""code":"forbidden""#), "{answer}");
    // A browser with an operator's keys, on somebody else's page.
    let evil = "POST /v1/node/drain HTTP/1.1\r\nhost: hosta\r\norigin: https://evil.example\r\nconnection: close\r\n\
                content-length: 0\r\n\r\n";
    let answer = talk(&mut stage.tls(Some("alice")), evil).unwrap();
    assert!(answer.starts_with("HTTP/1.1 403 ") && answer.contains("foreign_page"), "{answer}");
    assert_eq!(stage.json("alice", &["node", "status"])["mode"], "active");
    stage.unharmed();
}

#[test]
fn a_client_tells_nobody_else_and_says_what_is_wrong() {
    let mut stage = Stage::new();
    let address = stage.address();
    let ask = |host: &str, keys: &str| {
        let mut command = Command::new(PROGRAM);
        command.args(["vm", "list", "--host", host, "--keys"]).arg(stage.at(keys));
        fails(&mut command, 2)
    };
    let why = ask(&format!("hostb@{address}"), "alice");
    assert!(
        why.contains("is host hosta by its certificate") && why.contains(&format!("--host hosta@{address}")),
        "{why}"
    );
    let why = ask(&format!("localhost:{}", address.port()), "alice");
    assert!(why.contains("is host hosta by its certificate"), "{why}");
    let why = ask(&address.to_string(), "none");
    assert!(why.contains("`outlive keys operator NAME`") && why.contains("OUTLIVE_KEYS"), "{why}");
    // Of another CA, a node is a stranger.
    keys::init(&stage.at("foreign"), &order("hosta", Grant::OPERATOR)).unwrap();
    let why = ask(&address.to_string(), "foreign");
    assert!(why.contains("is not trusted") && why.contains("of another CA"), "{why}");
    stage.issue_for("late", Grant::OPERATOR, std::time::Duration::ZERO);
    let why = ask(&address.to_string(), "late");
    assert!(why.contains("EXPIRED") && why.contains("`outlive keys operator late`"), "{why}");
    // Nobody, and somebody who speaks something else.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let why = ask(&nobody.to_string(), "alice");
    assert!(why.contains("no node answers") && why.contains("outlive node run --listen"), "{why}");
    let why = ask("no.such.host.invalid", "alice");
    assert!(why.contains("no node answers at no.such.host.invalid:7020"), "{why}");
    let other = TcpListener::bind("127.0.0.1:0").unwrap();
    let at = other.local_addr().unwrap().to_string();
    let server = thread::spawn(move || {
        let mut client = other.accept().unwrap().0;
        std::io::Write::write_all(&mut client, b"SSH-2.0-OpenSSH_9.2\r\n").unwrap();
        // Until it goes.
        let _ = std::io::copy(&mut client, &mut std::io::sink());
    });
    let why = ask(&at, "alice");
    assert!(why.contains("is not trusted") && why.contains("does not speak TLS 1.3"), "{why}");
    server.join().unwrap();
    stage.unharmed();
}

/// An arbiter's machine has certificates of the same CA, and so has an operator.
#[test]
fn only_a_host_of_vms_is_taken_for_a_node() {
    let mut stage = Stage::bare();
    stage.issue("alice", Grant::OPERATOR);
    stage.issue("third", Grant::ARBITER);
    stage.start("third", "127.0.0.1:0");
    stage.wait_says("answered at", 1);
    let warned = |stage: &Stage| {
        let status: Value =
            serde_json::from_slice(&stage.here(&["node", "status", "--json"]).stdout).unwrap();
        status["warnings"].as_array().unwrap().iter().any(|it| it.as_str().unwrap().contains("is no host's"))
    };
    wait_until("the node warns", || warned(&stage));
    let mut command = Command::new(PROGRAM);
    command.args(["vm", "list", "--host", &stage.address().to_string(), "--keys"]).arg(stage.at("alice"));
    let why = fails(&mut command, 2);
    assert!(why.contains("certificate of third, which is no host of VMs"), "{why}");
    stage.unharmed();
}
