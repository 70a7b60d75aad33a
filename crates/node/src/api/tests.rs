//! The running server, held to its description: every route, and every answer that is told here.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::remote::{Access, Visitor};
use crate::testing::{World, wait};
use crate::view::State;

struct Api {
    world: World,
    node: Arc<Node>,
    server: Option<Server>,
    document: Value,
    seen: std::cell::RefCell<Vec<(String, String, String)>>,
}

impl Api {
    fn new() -> Self {
        let world = World::new();
        let node = world.node();
        let path = world.folder.path().join("node.sock");
        let server = serve(&node, &path, None).unwrap();
        let document = serde_json::from_str(OPENAPI).unwrap();
        Self { world, node, server: Some(server), document, seen: Vec::new().into() }
    }

    fn path(&self) -> PathBuf {
        self.world.folder.path().join("node.sock")
    }

    /// Asks, and checks that the description has this route, this status and this answer.
    fn ask(&self, method: &str, route: &str, body: Option<(&str, &str)>) -> (u16, Value) {
        let (status, kind, body) = ask(&self.path(), method, route, body);
        let (described, operation) = self.operation(method, route);
        let answer = &operation["responses"][status.to_string()];
        assert!(answer.is_object(), "{method} {described} does not say {status}: {body}");
        let value = match kind.as_str() {
            _ if body.is_empty() => Value::Null,
            "application/octet-stream" => body.len().into(),
            _ => serde_json::from_str(&body).unwrap(),
        };
        match answer["content"].as_object() {
            None => assert!(body.is_empty(), "{method} {described} {status}: {body}"),
            Some(kinds) => {
                let schema = &kinds.get(&kind).unwrap_or_else(|| panic!("{kind}"))["schema"];
                fits(&self.document, schema, &value)
                    .unwrap_or_else(|why| panic!("{method} {described} {status}: {why}"));
            }
        }
        self.seen.borrow_mut().push((described, method.to_lowercase(), status.to_string()));
        (status, value)
    }

    fn operation(&self, method: &str, route: &str) -> (String, &Value) {
        let parts: Vec<_> = route.split('?').next().unwrap_or_default().split('/').collect();
        let is = |path: &str| {
            let path: Vec<_> = path.split('/').collect();
            path.len() == parts.len() && path.iter().zip(&parts).all(|(a, b)| a == b || a.starts_with('{'))
        };
        let paths = self.document["paths"].as_object().unwrap();
        let (path, all) =
            paths.iter().find(|(path, _)| is(path)).unwrap_or_else(|| panic!("{route} is not described"));
        let operation = &all[method.to_lowercase()];
        assert!(operation.is_object(), "{method} {path} is not described");
        (path.clone(), operation)
    }

    /// Lets a VM's process count some checkpoints, and waits for the point with them.
    fn figures(&self, vm: &str, count: u64) -> Value {
        let told = |count: u64| {
            let pause =
                json!({ "bounds": [100_000, 200_000], "counts": [0, count, 0], "sum": count * 150_000 });
            let text = json!({ "format": 1, "role": "primary", "started": 1.5, "protected": true, "active": true,
                "protection_losses": 0, "counted": { "takeovers": count },
                "running": { "checkpoints": count, "pause": pause } });
            self.world.tell(vm, "figures", &text.to_string());
        };
        told(0);
        let mut place = String::new();
        loop {
            let (_, said) = self.ask("GET", &format!("/v1/figures{place}"), None);
            assert_eq!(said["reset"], place.is_empty());
            place = format!("?after={}", said["next"].as_str().unwrap());
            let points = said["vms"][vm].as_array().into_iter().flatten();
            // The first point says that it is heard from now on.
            for point in points {
                if point["checkpoints"] == count {
                    return point.clone();
                }
                told(count);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Begins a job and waits for its end.
    fn job(&self, route: &str, body: Option<&str>) -> Value {
        let (status, mut job) = self.ask("POST", route, body.map(|it| ("application/json", it)));
        assert_eq!(status, 202, "{job}");
        while job["state"] == "running" {
            std::thread::sleep(Duration::from_millis(10));
            job = self.ask("GET", &format!("/v1/jobs/{}", job["id"].as_str().unwrap()), None).1;
        }
        job
    }
}

/// One request, by hand.
fn ask(path: &Path, method: &str, route: &str, body: Option<(&str, &str)>) -> (u16, String, String) {
    let mut stream = UnixStream::connect(path).unwrap();
    let (kind, body) = body.unwrap_or(("text/plain", ""));
    let length = body.len();
    let head = format!(
        "{method} {route} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).unwrap();
    // A body that is too long is not read to its end.
    let _ = stream.write_all(body.as_bytes());
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{method} {route}: {answer}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    let kind = head.lines().find_map(|it| it.strip_prefix("content-type: ")).unwrap_or_default();
    (status, kind.to_owned(), body.to_owned())
}

/// Whether a value fits a schema: the part of JSON Schema that the description uses. A word that is not known here
/// fails, so that nothing is left unchecked.
fn fits(document: &Value, schema: &Value, value: &Value) -> Result<(), String> {
    let wrong = |what: &str| Err(format!("{what}: {value} is not {schema}"));
    for (word, wanted) in schema.as_object().ok_or("no schema")? {
        match word.as_str() {
            "$ref" => {
                let at = wanted.as_str().unwrap().trim_start_matches('#');
                fits(document, document.pointer(at).ok_or("a reference leads nowhere")?, value)?;
            }
            "anyOf" => {
                let all = wanted.as_array().unwrap();
                if all.iter().all(|it| fits(document, it, value).is_err()) {
                    let whys: Vec<_> = all.iter().filter_map(|it| fits(document, it, value).err()).collect();
                    return Err(whys.join("; "));
                }
            }
            "type" => {
                let is = match wanted.as_str().unwrap() {
                    "object" => value.is_object(),
                    "array" => value.is_array(),
                    "string" => value.is_string(),
                    "boolean" => value.is_boolean(),
                    "integer" => value.is_i64() || value.is_u64(),
                    "null" => value.is_null(),
                    other => return Err(format!("the type {other} is not known")),
                };
                if !is {
                    return wrong("type");
                }
            }
            "enum" if !wanted.as_array().unwrap().contains(value) => return wrong("enum"),
            "minimum" if value.as_f64().is_some_and(|it| it < wanted.as_f64().unwrap()) => {
                return wrong("minimum");
            }
            "items" => {
                value.as_array().into_iter().flatten().try_for_each(|it| fits(document, wanted, it))?
            }
            "required" => {
                for name in wanted.as_array().unwrap() {
                    if value.get(name.as_str().unwrap()).is_none() {
                        return Err(format!("{name} is missing in {value}"));
                    }
                }
            }
            "properties" => {
                for (name, it) in value.as_object().into_iter().flatten() {
                    match wanted.get(name) {
                        Some(schema) => fits(document, schema, it)?,
                        None if schema["additionalProperties"] == false => {
                            return Err(format!("{name} is not described"));
                        }
                        None => {}
                    }
                }
            }
            "additionalProperties" if wanted.is_object() => {
                value.as_object().into_iter().flatten().try_for_each(|(_, it)| fits(document, wanted, it))?;
            }
            "enum"
            | "minimum"
            | "maximum"
            | "additionalProperties"
            | "description"
            | "default"
            | "pattern" => {}
            other => return Err(format!("{other} is not known to this test")),
        }
    }
    Ok(())
}

/// Whether a VM's process says something of this name.
fn says(vm: &crate::view::View, name: &str) -> bool {
    vm.status.as_ref().is_some_and(|it| !it[name].is_null())
}

const TWO_HOSTS: &str = "arbiter = 'file:/x'\nlisten = ':7001'\nstandby = ['b:7001']\ndisk = ['path=/no/1']";

/// Every route of the description is asked, and the server has no answer that the description has not.
#[test]
fn the_server_is_as_its_description_says() {
    let api = Api::new();
    let code = |answer: &(u16, Value)| answer.1["code"].as_str().unwrap_or_default().to_owned();
    let toml = |text| Some(("application/toml", text));
    let json = |text| Some(("application/json", text));
    assert_eq!(api.ask("GET", "/v1/node", None).1["host"], "hosta");
    assert_eq!(api.ask("GET", "/v1/check", None).1["facts"]["host"], "hosta");
    assert_eq!(api.ask("GET", "/v1/check/link?bytes=100000", None), (200, 100_000.into()));
    for bad in ["", "?bytes=0", "?bytes=67108865", "?bits=8"] {
        assert_eq!(code(&api.ask("GET", &format!("/v1/check/link{bad}"), None)), "bad_request", "{bad}");
    }
    assert_eq!(api.ask("GET", "/v1/vms/web", None).1["code"], "no_such_vm");
    assert_eq!(code(&api.ask("PUT", "/v1/vms/web", toml("memory = "))), "bad_definition");
    assert_eq!(code(&api.ask("PUT", "/v1/vms/we%20b", toml(""))), "bad_name");
    assert_eq!(code(&api.ask("PUT", "/v1/vms/web", json("[1]"))), "bad_request");
    let long = "#".repeat(crate::definition::LONGEST * 3);
    assert_eq!(code(&api.ask("PUT", "/v1/vms/web", toml(&long))), "bad_request");
    // The text is in no file of the node's.
    let said = api.ask("PUT", "/v1/vms/web", toml("memory = 256")).1;
    assert_eq!(
        (&said["message"], &said["remedy"]),
        (&"memory: 256 bytes are too little: give more".into(), &"".into())
    );
    let (status, vm) = api.ask("PUT", "/v1/vms/web", toml(TWO_HOSTS));
    assert_eq!((status, &vm["state"], &vm["changed"]), (200, &"stopped".into(), &true.into()));
    assert_eq!(api.ask("PUT", "/v1/vms/web", toml(TWO_HOSTS)).1["changed"], false);
    let lacks = api.ask("PUT", "/v1/vms/lacks", toml("kernel = '/no/kernel'")).1;
    assert_eq!(
        (&lacks["changed"], &lacks["warnings"][0]),
        (&true.into(), &"kernel: there is no file /no/kernel".into())
    );
    assert_eq!(api.ask("DELETE", "/v1/vms/lacks", None).0, 204);
    let other = r#"{"memory":"1G","host":{"hosta":{"vcpus":2}}}"#;
    assert_eq!(api.ask("PUT", "/v1/vms/other", json(other)).0, 200);
    assert_eq!(
        code(&api.ask("PUT", "/v1/vms/third", toml(TWO_HOSTS))),
        "bad_definition",
        "an image of two VMs"
    );
    assert_eq!(api.ask("GET", "/v1/vms", None).1["vms"].as_array().unwrap().len(), 2);
    assert_eq!(code(&api.ask("POST", "/v1/vms/web/hand-over", None)), "not_running");
    assert_eq!(code(&api.ask("POST", "/v1/vms/no/start", None)), "no_such_vm");
    assert_eq!(api.job("/v1/vms/web/start", None)["result"]["state"], "running");
    assert_eq!(code(&api.ask("DELETE", "/v1/vms/web", None)), "has_process");
    wait(&api.node, "web", |it| it.protected);
    assert_eq!(api.ask("GET", "/v1/vms/web", None).1["status"]["role"], "primary");
    let log = api.ask("GET", "/v1/vms/web/log", None).1;
    assert!(log["log"].as_str().unwrap().contains("the fake process begins"), "{log}");
    let next = api.ask("GET", &format!("/v1/vms/web/log?after={}", log["next"]), None).1;
    assert_eq!((&next["log"], &next["next"]), (&"".into(), &log["next"]));
    assert_eq!(code(&api.ask("GET", "/v1/vms/web/log?lines=7", None)), "bad_request");
    let figures = api.figures("web", 3);
    assert_eq!(
        (&figures["role"], &figures["pause_us"]),
        (&"primary".into(), &json!({ "mean": 150, "most": 200 }))
    );
    assert_eq!(figures["marks"], json!(["takeover"]));
    assert_eq!(code(&api.ask("GET", "/v1/figures?before=7", None)), "bad_request");
    // The map of the memory is told there, and only there.
    let map =
        json!({ "cell_bytes": 4096, "ranges": [{ "first": 8192, "bytes": 8192 }], "pages_per_s": [0, 7] });
    api.world.tell("web", "says", &json!({ "heat": map, "told": 1 }).to_string());
    assert_eq!(wait(&api.node, "web", |it| says(it, "told")).status.unwrap()["heat"], Value::Null);
    assert_eq!(api.ask("GET", "/v1/figures", None).1["heat"], json!({ "web": map }));
    api.world.tell("web", "says", r#"{ "heat": { "cell_bytes": 1e300 }, "tells": 1 }"#);
    wait(&api.node, "web", |it| says(it, "tells"));
    assert_eq!(api.ask("GET", "/v1/figures", None).1["heat"], json!({}));
    assert_eq!(api.job("/v1/vms/web/hand-over", None)["result"]["said"], "the standby has the VM");
    wait(&api.node, "web", |it| it.state == State::Standby);
    assert_eq!(code(&api.ask("POST", "/v1/vms/web/stop", None)), "is_standby");
    assert_eq!(code(&api.ask("POST", "/v1/vms/web/stop", json(r#"{"nwo":true}"#))), "bad_request");
    assert_eq!(code(&api.ask("GET", "/v1/jobs/7", None)), "no_such_job");
    assert_eq!(code(&api.ask("POST", "/v1/node/drain", json("{"))), "bad_request");
    let drain = api.job("/v1/node/drain", Some(r#"{"wait_s":1}"#));
    assert_eq!((&drain["state"], &drain["result"]["moved"]), (&"succeeded".into(), &json!([])));
    let id = drain["id"].as_str().unwrap();
    assert_eq!(code(&api.ask("POST", &format!("/v1/jobs/{id}/cancel"), None)), "cannot_cancel");
    assert_eq!(code(&api.ask("POST", "/v1/vms/other/start", None)), "drained");
    assert_eq!(api.ask("POST", "/v1/node/undrain", None).1["mode"], "active");
    // A drain that waits for a VM that is not protected is cancelled.
    api.world.tell("web", "bare", "");
    api.world.tell("web", "role", "primary");
    wait(&api.node, "web", |it| it.state == State::Running && !it.protected);
    let (_, job) = api.ask("POST", "/v1/node/drain", None);
    let id = job["id"].as_str().unwrap();
    let refused = code(&api.ask("POST", "/v1/vms/other/start", None));
    assert!(["drained", "busy"].contains(&&*refused), "{refused}");
    assert_eq!(code(&api.ask("POST", "/v1/vms/web/stop", None)), "busy");
    assert_eq!(code(&api.ask("POST", "/v1/node/undrain", None)), "busy");
    assert_eq!(api.ask("POST", &format!("/v1/jobs/{id}/cancel"), None).0, 202);
    while api.ask("GET", &format!("/v1/jobs/{id}"), None).1["state"] != "cancelled" {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(api.job("/v1/vms/web/stop", Some(r#"{"now":true}"#))["state"], "succeeded");
    assert_eq!(api.ask("DELETE", "/v1/vms/web", None).0, 204);
    assert!(api.ask("GET", "/v1/jobs", None).1["jobs"].as_array().unwrap().len() >= 4);
    assert_eq!(api.ask("GET", "/v1/openapi.json", None).1["openapi"], "3.1.0");

    let seen = api.seen.borrow();
    for (path, operations) in api.document["paths"].as_object().unwrap() {
        for (method, operation) in operations.as_object().unwrap().iter().filter(|_| path != "/v1/events") {
            let good =
                operation["responses"].as_object().unwrap().keys().find(|it| it.starts_with('2')).unwrap();
            let was = seen.iter().any(|it| (&it.0, &it.1, &it.2) == (path, method, good));
            assert!(was, "{method} {path} never said {good}");
        }
    }
}

#[test]
fn what_is_not_there_is_said_as_everything_else_is() {
    let api = Api::new();
    for (method, route, status, code) in [
        ("GET", "/v2", 404, "no_route"),
        ("PATCH", "/v1/vms/web", 405, "no_method"),
        ("GET", "/v1", 404, "no_route"),
        ("GET", "/picture.wasm", 404, "no_route"),
    ] {
        let (said, _, body) = ask(&api.path(), method, route, None);
        let body: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((said, body["code"].as_str().unwrap()), (status, code));
        let schema = json!({ "$ref": "#/components/schemas/Error" });
        fits(&api.document, &schema, &body).unwrap();
    }
}

/// A browser sends its certificate with whatever any page asks.
#[test]
fn a_page_of_another_origin_gives_no_orders() {
    let api = Api::new();
    api.node.define("web", "memory = '1G'").unwrap();
    let say_as = |host: &str, method: &str, origin: &str| {
        let mut stream = UnixStream::connect(api.path()).unwrap();
        let head = format!(
            "{method} /v1/vms/web/start HTTP/1.1\r\nhost: {host}\r\norigin: {origin}\r\nconnection: close\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let say = |method: &str, origin: &str| say_as("localhost:8443", method, origin);
    // The socket, forwarded to a port, and a page whose name leads there: also what it only reads.
    for method in ["POST", "GET"] {
        let answer = say_as("evil.example:8443", method, "http://evil.example:8443");
        assert!(answer.contains(" 403 ") && answer.contains("foreign_page"), "{answer}");
    }
    for method in ["POST", "PUT", "DELETE"] {
        let answer = say(method, "https://evil.example");
        assert!(answer.contains(" 403 ") && answer.contains("foreign_page"), "{answer}");
    }
    assert_eq!(api.node.get("web").unwrap().state, State::Stopped);
    assert!(say("POST", "https://localhost:8443").contains(" 202 "));
    let (status, kind, page) = ask(&api.path(), "GET", "/", None);
    assert_eq!((status, kind.as_str()), (200, "text/html; charset=utf-8"));
    assert!(page.contains("picture.js"));
}

/// The events after a place, as a client reads them: id, kind and data.
fn follow(path: &Path, last: Option<&str>) -> impl Iterator<Item = (String, String, Value)> + use<> {
    let mut stream = UnixStream::connect(path).unwrap();
    let last = last.map(|it| format!("last-event-id: {it}\r\n")).unwrap_or_default();
    stream.write_all(format!("GET /v1/events HTTP/1.1\r\nhost: x\r\n{last}\r\n").as_bytes()).unwrap();
    let mut lines = BufReader::new(stream).lines().map(Result::unwrap);
    assert!(lines.next().unwrap().ends_with("200 OK"));
    let (mut id, mut kind) = (String::new(), String::new());
    lines.filter_map(move |line| {
        if let Some(it) = line.strip_prefix("id: ") {
            id = it.to_owned();
        } else if let Some(it) = line.strip_prefix("event: ") {
            kind = it.to_owned();
        } else if let Some(it) = line.strip_prefix("data: ") {
            return Some((id.clone(), kind.clone(), serde_json::from_str(it).unwrap()));
        } else if line.starts_with(": from here on") {
            return Some((id.clone(), "here".into(), Value::Null));
        }
        None
    })
}

#[test]
fn events_are_told_once_from_where_a_client_was() {
    let api = Api::new();
    let mut first = follow(&api.path(), None);
    let (start, kind, _) = first.next().unwrap();
    assert_eq!(kind, "here");
    api.node.define("web", "memory = '1G'").unwrap();
    // The keeper says first that there is no process.
    let (id, kind, data) = first.by_ref().find(|it| it.1 != "vm_state").unwrap();
    assert_eq!((kind.as_str(), &data["vm"]), ("vm_defined", &"web".into()));
    fits(&api.document, &json!({ "$ref": "#/components/schemas/Event" }), &data).unwrap();
    drop(first);
    api.job("/v1/vms/web/start", None);
    // It comes back, from its last event and from the one before.
    let mut again = follow(&api.path(), Some(&id)).skip(1);
    assert_eq!(again.next().unwrap().1, "vm_state");
    assert_eq!(again.next().unwrap().1, "process_started");
    let mut earlier = follow(&api.path(), Some(&start)).skip(1);
    assert_eq!(earlier.find(|it| it.1 != "vm_state").unwrap().0, id);
    let schema = json!({ "$ref": "#/components/schemas/Event" });
    for (_, kind, data) in again.by_ref() {
        fits(&api.document, &schema, &data).unwrap();
        if kind == "job" {
            break;
        }
    }
    // Of another node's life, and one that is too old.
    assert_eq!(follow(&api.path(), Some("1-1")).nth(1).unwrap().1, "reset");
    for number in 0..=crate::feed::KEPT {
        api.node.feed().tell("vm_state", None, number.to_string(), json!({}));
    }
    let mut late = follow(&api.path(), Some(&start)).skip(1);
    assert_eq!(late.next().unwrap().1, "reset");
    assert_eq!(late.next().unwrap().2["text"], "1");
}

/// As `outlive node events` does.
#[test]
fn a_client_goes_on_with_the_events_where_it_was() {
    let api = Api::new();
    let client = crate::client::Client::here(&api.path()).unwrap();
    let events = |last: Option<&str>, count: usize| {
        let mut seen = Vec::new();
        client
            .events(last, |event| {
                if event.kind.is_none() && seen.is_empty() && last.is_none() {
                    api.node.define("web", "memory = '1G'").unwrap();
                }
                seen.extend(event.kind.map(|kind| (event.id, kind)));
                seen.len() < count
            })
            .unwrap();
        seen
    };
    let (id, kind) = events(None, 2).remove(1);
    assert_eq!(kind, "vm_defined");
    api.job("/v1/vms/web/start", None);
    let kinds: Vec<_> = events(Some(&id), 2).into_iter().map(|it| it.1).collect();
    assert_eq!(kinds, ["vm_state", "process_started"]);
    assert_eq!(events(Some("1-1"), 1)[0].1, "reset");
}

#[test]
fn clients_that_only_stay_leave_room_and_the_socket_is_private() {
    let mut api = Api::new();
    let mode = std::fs::metadata(api.path()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // More than have room: they say nothing, and go.
    let silent: Vec<_> = (0..CONNECTIONS + 5).map(|_| UnixStream::connect(api.path()).unwrap()).collect();
    drop(silent);
    api.ask("GET", "/v1/node", None);
    // Followers have less room than clients.
    let mut followers = Vec::new();
    let full = loop {
        let mut stream = UnixStream::connect(api.path()).unwrap();
        stream.write_all(b"GET /v1/events HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
        let mut line = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut line).unwrap();
        if !line.contains("200") {
            break line;
        }
        followers.push(stream);
    };
    assert!(full.contains("429") && followers.len() < CONNECTIONS, "{full}");
    api.ask("GET", "/v1/node", None);
    let again = serve(&api.node, &api.path(), None).unwrap_err();
    assert!(matches!(again, ServeError::Taken(_)), "{again}");
    let refused = serve(&api.node, &api.world.folder.path().join("x"), Some("no-such-group")).unwrap_err();
    assert!(refused.to_string().contains("no group"), "{refused}");
    api.server = None;
    assert!(!api.path().exists());
}

/// Somebody else may write to the directory, and is quick.
#[test]
fn only_the_socket_itself_is_given_to_a_group() {
    let folder = tempfile::tempdir().unwrap();
    let (secret, link) = (folder.path().join("secret"), folder.path().join("link"));
    std::fs::write(&secret, "x").unwrap();
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::symlink(&secret, &link).unwrap();
    let own = nix::unistd::getgid();
    for place in [&secret, &link] {
        give_to(own, place).unwrap_err();
    }
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&secret), 0o600);
    let socket = folder.path().join("socket");
    let _listener = bind(&socket).unwrap();
    assert_eq!(mode(&socket), 0o600);
    give_to(own, &socket).unwrap();
    assert_eq!(mode(&socket), 0o660);
}

/// Each has a connection, and none keeps it for long.
#[test]
fn clients_that_never_end_their_words_are_sent_away() {
    let api = Api::new();
    let head = "PUT /v1/vms/web HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nmemory";
    let stalled: Vec<_> = (0..CONNECTIONS)
        .map(|_| {
            let mut stream = UnixStream::connect(api.path()).unwrap();
            stream.write_all(head.as_bytes()).unwrap();
            stream
        })
        .collect();
    let began = std::time::Instant::now();
    api.ask("GET", "/v1/node", None);
    assert!(began.elapsed() < 3 * HEAD, "{:?}", began.elapsed());
    let mut answer = String::new();
    let _ = (&stalled[0]).read_to_string(&mut answer);
    assert!(answer.contains(" 400 ") && answer.contains("has not come within"), "{answer}");
}

/// The operation of every route at which nothing else can be wrong, asked by somebody.
async fn ask_as(routes: &axum::Router, caller: Option<Caller>, method: &str, route: &str) -> (u16, Value) {
    let request = axum::extract::Request::builder().method(method).uri(route);
    let mut request = request.body(axum::body::Body::empty()).unwrap();
    if let Some(caller) = caller {
        request.extensions_mut().insert(caller);
    }
    let answer = TowerToHyperService::new(routes.clone()).call(request).await.unwrap();
    let status = answer.status().as_u16();
    // Events never end.
    let body = match answer.headers()["content-type"].to_str() {
        Ok("application/json") => axum::body::to_bytes(answer.into_body(), 1 << 20).await.unwrap(),
        _ => Default::default(),
    };
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

/// Every operation that is described, and what its description says who may ask for it.
#[tokio::test]
async fn each_route_is_for_whom_its_description_says() {
    let api = Api::new();
    let routes = routes::routes(api.node.clone());
    let visitor = |access| Visitor { name: "host hostb".into(), access };
    let levels = [Access::Nothing, Access::Read, Access::HandOver, Access::Everything];
    let schema = json!({ "$ref": "#/components/schemas/Error" });
    for (path, operations) in api.document["paths"].as_object().unwrap() {
        let route = path.replace("{name}", "no-vm").replace("{id}", "no-job");
        for (method, operation) in operations.as_object().unwrap() {
            let needs = match operation["x-outlive-access"].as_str().unwrap() {
                "read" => Access::Read,
                "hand-over" => Access::HandOver,
                "everything" => Access::Everything,
                other => panic!("{method} {path}: {other}"),
            };
            let method = method.to_uppercase();
            for access in levels {
                let there = Some(Caller::There(visitor(access)));
                let (status, said) = ask_as(&routes, there, &method, &route).await;
                let refused = status == 403;
                assert_eq!(refused, access < needs, "{method} {path} by {access:?}: {status} {said}");
                if refused {
                    fits(&api.document, &schema, &said).unwrap();
                    let operator = said["remedy"].as_str().unwrap().contains("`outlive keys operator");
                    assert!(said["code"] == "forbidden" && operator, "{said}");
                }
            }
            let (here, nobody) = (Some(Caller::Here), None);
            assert_ne!(ask_as(&routes, here, &method, &route).await.0, 403, "{method} {path}");
            assert_eq!(ask_as(&routes, nobody, &method, &route).await.0, 403, "{method} {path}");
        }
    }
    // What is not there is not told to everybody either.
    let nothing = Some(Caller::There(visitor(Access::Nothing)));
    assert_eq!(ask_as(&routes, nothing, "GET", "/v2").await.0, 403);
}
