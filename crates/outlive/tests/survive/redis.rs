//! Clients that people use: `redis-cli` and `redis-benchmark`, and requests of unusual size.

use std::process::Command;

use crate::support::{Client, Side, Value, World};

/// Runs a Redis tool in the clients' network; `None`, after saying so, if it is not installed.
fn tool(world: &World, name: &str, arguments: &[&str]) -> Option<String> {
    let server = world.server();
    let mut command = Command::new(name);
    command.args(["-h", &server.ip().to_string(), "-p", &server.port().to_string()]).args(arguments);
    let output = match world.lan(|| command.output()) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            println!("skipped: {name} is missing (Debian: apt-get install redis-tools)");
            return None;
        }
        other => other.unwrap(),
    };
    let said = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
    assert!(
        output.status.success(),
        "{name} {arguments:?}: {said} {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Some(said)
}

/// Commands and what `redis-cli` prints for them.
const TALK: [(&str, &str); 14] = [
    ("PING", "PONG"),
    ("ECHO hello", "hello"),
    ("SET fruit apple", "OK"),
    ("GET fruit", "apple"),
    ("INCR n", "1"),
    ("INCRBY n 41", "42"),
    ("APPEND fruit s", "6"),
    ("STRLEN fruit", "6"),
    ("MSET a 1 b 2", "OK"),
    ("MGET a b none", "1\n2\n"),
    ("EXISTS a none", "1"),
    ("DEL a b", "2"),
    ("DBSIZE", "2"),
    ("GET none", ""),
];

fn speaks_redis(world: &World) {
    let mut client = Client::connect(world);
    assert_eq!(client.ask("FLUSHALL"), Ok(Value::Status("OK".into())));
    for (line, reply) in TALK {
        let words: Vec<&str> = line.split(' ').collect();
        let Some(said) = tool(world, "redis-cli", &words) else { return };
        assert_eq!(said, reply.trim_end(), "{line}");
    }
    let info = tool(world, "redis-cli", &["INFO"]).unwrap();
    assert!(info.contains("redis_version:") && info.contains("db0:keys=2"), "{info}");
    let wrong = tool(world, "redis-cli", &["NONSENSE"]).unwrap();
    assert!(wrong.starts_with("ERR unknown command"), "{wrong}");
    let load = ["-t", "ping,set,get,incr,mset", "-n", "5000", "-c", "50", "-P", "16", "-q"];
    let Some(said) = tool(world, "redis-benchmark", &load) else { return };
    let lines = ["PING_INLINE", "SET", "GET", "INCR", "MSET"];
    assert!(lines.iter().all(|line| said.contains(line)) && !said.contains("rror"), "{said}");
}

#[test]
fn redis_tools_work_unprotected() {
    let Some(world) = World::new() else { return };
    let _primary = world.run_with(Side::A, &[]);
    speaks_redis(&world);
}

#[test]
fn redis_tools_work_protected_and_after_a_takeover() {
    let Some(world) = World::new() else { return };
    let (primary, mut standby) = world.protected(Side::A);
    speaks_redis(&world);
    primary.kill();
    standby.wait_takeover();
    speaks_redis(&world);
}

/// Values far larger than a frame, a socket buffer and an epoch, across a takeover.
#[test]
fn large_values_are_whole_before_and_after_a_takeover() {
    let Some(world) = World::new() else { return };
    let (primary, mut standby) = world.protected(Side::A);
    let mut client = Client::connect(&world);
    let values: Vec<Vec<u8>> = (0..4)
        .map(|n| (0..1_000_000u32).map(|at| (at.wrapping_mul(2_654_435_761 + n) >> 13) as u8).collect())
        .collect();
    for (n, value) in values.iter().enumerate() {
        assert_eq!(client.call(&[b"SET", &[b'0' + n as u8], value]), Ok(Value::Status("OK".into())));
    }
    // One reply is on its way when the host dies.
    client.send(&[b"GET", b"0"]).unwrap();
    primary.kill();
    assert!(client.reply() == Ok(Value::Bulk(Some(values[0].clone()))), "the reply under way is damaged");
    standby.wait_takeover();
    for (n, value) in values.iter().enumerate() {
        let back = client.call(&[b"GET", &[b'0' + n as u8]]);
        assert!(back == Ok(Value::Bulk(Some(value.clone()))), "value {n} is damaged");
    }
}

#[test]
fn running_out_of_memory_is_an_error_reply_and_nothing_more() {
    let Some(world) = World::new() else { return };
    let (mut primary, _standby) = world.protected(Side::A);
    let mut client = Client::connect(&world);
    assert_eq!(client.ask("SET small here"), Ok(Value::Status("OK".into())));
    let value = vec![b'x'; 1_000_000];
    let mut stored = 0;
    let refusal = loop {
        match client.call(&[b"SET", format!("big{stored}").as_bytes(), &value]).unwrap() {
            Value::Status(_) => stored += 1,
            other => break other,
        }
        assert!(stored < 64, "more than the VM's memory was stored");
    };
    assert!(matches!(&refusal, Value::Error(text) if text.starts_with("OOM")), "{refusal:?}");
    assert!(stored >= 10, "only {stored} MB fit");
    assert_eq!(client.ask("GET small"), Ok(Value::Bulk(Some(b"here".to_vec()))));
    assert_eq!(client.ask("DEL big0"), Ok(Value::Integer(1)));
    assert_eq!(client.call(&[b"SET", b"again", &value[..500_000]]), Ok(Value::Status("OK".into())));
    assert!(!primary.ended());
}
