//! What a hostile or mistaken host says of generations that another one has won.

use std::time::SystemTime;

use super::*;
use crate::keys::Grant;

const VM: VmId = VmId([0x5e; 16]);

/// A served directory, and what two hosts of its VMs say to it.
struct Stage {
    server: Server,
    _directory: tempfile::TempDir,
}

impl Stage {
    fn set() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (arbiter, _) = FileArbiter::init(directory.path()).unwrap();
        let (visitors, limit) = (Arc::default(), Arc::default());
        let server = Server { arbiter: Arc::new(arbiter), security: Security::Open, visitors, limit };
        Self { server, _directory: directory }
    }

    /// The answer to a host with these rights.
    fn say(&self, host: &str, grant: Grant, words: &str) -> String {
        let now = SystemTime::now();
        let (name, serial) = (host.to_owned(), "1".to_owned());
        let certificate = Certificate { name, grant, serial, from: now, until: now, ca: "ca".into() };
        let line = format!(r#"{{"version":1,"arbiter":"{}",{words}}}"#, self.server.arbiter.identity());
        let question = serde_json::from_str(&line).unwrap();
        serde_json::to_string(&self.server.reply(question, Some(&certificate))).unwrap()
    }

    fn host(&self, host: &str, words: &str) -> String {
        self.say(host, Grant::ALL, words)
    }
}

/// The process of a host.
fn token(host: &str) -> String {
    host.repeat(32)
}

fn claim(host: &str, generation: u64) -> String {
    let process = token(host);
    format!(
        r#""ask":"claim","vm":"{VM}","generation":{generation},"owner":"host {host}","process":"{process}""#
    )
}

fn note_end(generation: u64, process: Option<&str>) -> String {
    let process = process.map_or(String::new(), |it| format!(r#","process":"{it}""#));
    format!(r#""ask":"note_end","vm":"{VM}","generation":{generation},"why":"x"{process}"#)
}

#[test]
fn no_generation_is_won_twice() {
    let stage = Stage::set();
    for generation in [1, 2] {
        assert_eq!(stage.host("a", &claim("a", generation)), r#"{"answer":"won"}"#);
    }
    stage.host("b", &note_end(2, Some(&token("b"))));
    stage.host("b", &format!(r#""ask":"forget","vm":"{VM}","age_s":0,"remove":true"#));
    stage.host("b", &format!(r#""ask":"prune","vm":"{VM}","remove":true"#));
    for generation in [1, 2] {
        let said = stage.host("b", &claim("b", generation));
        assert_eq!(said, r#"{"answer":"lost","owner":"host a"}"#, "generation {generation}");
    }
}

#[test]
fn only_the_winner_notes_an_end() {
    let stage = Stage::set();
    stage.host("a", &claim("a", 1));
    stage.host("a", &claim("a", 2));
    let thief = token("b");
    for (generation, process) in
        [(2, Some(&*thief)), (2, None), (3, Some(&*thief)), (u64::MAX, Some(&*thief))]
    {
        let said = stage.host("b", &note_end(generation, process));
        assert!(said.contains("forbidden") && said.contains("`outlive arbiter release`"), "{said}");
    }
    let ending = format!(r#""ask":"ending","vm":"{VM}""#);
    assert_eq!(stage.host("a", &ending), r#"{"answer":"ending","ending":null}"#);
    // Nobody learns in whose name he would have to speak.
    let history = stage.host("b", &format!(r#""ask":"history","vm":"{VM}""#));
    assert!(history.contains("host a") && !history.contains(&token("a")), "{history}");
    assert_eq!(stage.host("a", &note_end(2, Some(&token("a")))), r#"{"answer":"noted"}"#);
    assert!(stage.host("a", &ending).contains(r#""generation":2,"why":"x""#));
}

/// Not even a VM that has ended, by its winner's word.
#[test]
fn no_host_has_a_vm_forgotten() {
    let stage = Stage::set();
    stage.host("a", &claim("a", 1));
    stage.host("a", &note_end(1, Some(&token("a"))));
    let forget = |remove| format!(r#""ask":"forget","vm":"{VM}","age_s":0,"remove":{remove}"#);
    for (host, remove) in [("a", true), ("b", true), ("b", false)] {
        let said = stage.host(host, &forget(remove));
        assert!(said.contains("forbidden") && said.contains("prune file:DIR --forget-ended AGE"), "{said}");
    }
    assert_eq!(stage.host("b", &claim("b", 1)), r#"{"answer":"lost","owner":"host a"}"#);
    // The arbiter's own certificate looks after VMs, and wins nothing.
    assert!(stage.say("third", Grant::ARBITER, &claim("c", 2)).contains("forbidden"));
    assert!(stage.say("third", Grant::ARBITER, &note_end(1, Some(&token("a")))).contains("forbidden"));
    assert_eq!(
        stage.say("third", Grant::ARBITER, &forget(true)),
        r#"{"answer":"forgotten","forgotten":true}"#
    );
}
