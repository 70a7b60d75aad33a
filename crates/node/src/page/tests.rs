//! Who comes in, and who does not: over real connections, with a node behind.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::Value;

use super::*;
use crate::testing::{World, wait};
use crate::view::State;

struct Site {
    world: World,
    node: Arc<crate::node::Node>,
    _api: crate::api::Server,
    page: Option<Page>,
    at: String,
}

/// What a browser hears.
#[derive(Debug)]
struct Heard {
    status: u16,
    head: String,
    body: String,
}

impl Heard {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|it| it.strip_prefix(name)?.strip_prefix(": "))
    }
}

impl Site {
    fn new() -> Self {
        let world = World::new();
        let node = world.node();
        let socket = world.folder.path().join("node.api");
        let api = crate::api::serve(&node, &socket, None).unwrap();
        let page = serve("127.0.0.1:0".parse().unwrap(), &socket).unwrap();
        let at = page.link.strip_prefix("http://").unwrap().split('/').next().unwrap().to_owned();
        Self { world, node, _api: api, page: Some(page), at }
    }

    /// Path and query of the link.
    fn link(&self) -> String {
        format!("/open?{}", self.page.as_ref().unwrap().link.split_once('?').unwrap().1)
    }

    fn ask(&self, method: &str, path: &str, headers: &[&str]) -> Heard {
        let host = format!("host: {}", self.at);
        self.ask_as(method, path, &[&[host.as_str()], headers].concat(), "")
    }

    fn ask_as(&self, method: &str, path: &str, headers: &[&str], body: &str) -> Heard {
        let mut stream = TcpStream::connect(&self.at).unwrap();
        let mut head = format!("{method} {path} HTTP/1.1\r\nconnection: close\r\n");
        headers.iter().for_each(|it| head += &format!("{it}\r\n"));
        head += &format!("content-length: {}\r\n\r\n", body.len());
        stream.write_all(head.as_bytes()).unwrap();
        // A body that is too long is not read to its end.
        let _ = stream.write_all(body.as_bytes());
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{method} {path}: {text}"));
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Heard { status, head: head.to_owned(), body: body.to_owned() }
    }

    /// Comes in: the cookie, as a header, and the folder.
    fn come_in(&self) -> (String, String) {
        let heard = self.ask("GET", &self.link(), &[]);
        assert_eq!(heard.status, 200);
        let cookie = heard.header("set-cookie").unwrap();
        let (value, rest) = cookie.split_once("; ").unwrap();
        let folder = rest.split("; ").find_map(|it| it.strip_prefix("Path=")).unwrap();
        assert!(rest.contains("HttpOnly") && rest.contains("SameSite=Strict"), "{cookie}");
        assert!(heard.body.contains(&format!("url={folder}\"")), "{}", heard.body);
        (format!("cookie: other=1; {value}"), folder.to_owned())
    }
}

#[test]
fn a_link_counts_once_and_the_cookie_is_for_one_folder() {
    let site = Site::new();
    // A browser that only looks ahead, and whoever guesses, use nothing up.
    assert_eq!(site.ask("HEAD", &site.link(), &[]).status, 401);
    assert_eq!(site.ask("GET", "/open?token=", &[]).status, 401);
    let short = site.link();
    assert_eq!(site.ask("GET", &short[..short.len() - 1], &[]).status, 401);
    let (cookie, folder) = site.come_in();
    assert!(folder.len() > 30, "{folder}");
    let again = site.ask("GET", &site.link(), &[]);
    assert_eq!((again.status, again.header("set-cookie")), (401, None));
    assert!(again.body.contains("`outlive node page`"), "{}", again.body);

    let page = site.ask("GET", &folder, &[&cookie]);
    assert!(page.status == 200 && page.body.contains("picture.js"), "{page:?}");
    assert!(page.header("content-security-policy").unwrap().starts_with("default-src 'none'"));
    assert_eq!(page.header("cache-control"), Some("no-store"));
    let vms = site.ask("GET", &format!("{folder}v1/vms"), &[&cookie]);
    assert_eq!((vms.status, vms.header("content-type")), (200, Some("application/json")));
    let wrong = "cookie: outlive=00";
    for (path, headers, status) in [
        (folder.clone(), &[][..], 401),
        (folder.clone(), &[wrong], 401),
        (format!("{folder}v1/vms"), &[], 401),
        (format!("{folder}v1/vms"), &["cookie: outlive"], 401),
        ("/".to_owned(), &[&*cookie], 404),
        ("/v1/vms".to_owned(), &[&*cookie], 404),
        (format!("{folder}v2"), &[&*cookie], 404),
        (format!("{folder}../v1/vms"), &[&*cookie], 404),
    ] {
        assert_eq!(site.ask("GET", &path, headers).status, status, "{path} {headers:?}");
    }
}

/// A name of somebody else's that leads here is somebody else's page.
#[test]
fn only_names_of_this_host_are_heard() {
    let site = Site::new();
    let (cookie, folder) = site.come_in();
    for (host, status) in [
        ("localhost:7080", 200),
        ("LOCALHOST", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:7080", 200),
        ("evil.example:7080", 421),
        ("127.0.0.1.evil.example", 421),
        ("localhost.evil.example:80", 421),
        ("127.0.0.1:80@evil.example", 421),
        ("", 421),
    ] {
        let host = format!("host: {host}");
        assert_eq!(site.ask_as("GET", &folder, &[&host, &cookie], "").status, status, "{host}");
    }
    let two = ["host: localhost", "host: evil.example", &cookie];
    assert_ne!(site.ask_as("GET", &folder, &two, "").status, 200);
    assert_ne!(site.ask_as("GET", &folder, &[&cookie], "").status, 200, "no host");
}

#[test]
fn orders_come_from_the_page_and_reach_the_node() {
    let site = Site::new();
    let (cookie, folder) = site.come_in();
    site.node.define("web", "memory = '1G'").unwrap();
    let order = "x-outlive-page: 1";
    let (origin, foreign) = (format!("origin: http://{}", site.at), "origin: http://evil.example");
    let start = format!("{folder}v1/vms/web/start");
    for headers in [
        &[&*cookie][..],
        &[order],
        &[&cookie, order, foreign],
        &[&cookie, order, "origin: null"],
        &[&cookie, order, "sec-fetch-site: cross-site"],
        // Another port is another origin.
        &[&cookie, order, "origin: http://127.0.0.1:1"],
    ] {
        assert!([401, 403].contains(&site.ask("POST", &start, headers).status), "{headers:?}");
    }
    assert_eq!(site.node.get("web").unwrap().state, State::Stopped);
    for method in ["PUT", "DELETE", "PATCH"] {
        assert_eq!(
            site.ask(method, &format!("{folder}v1/vms/web"), &[&cookie, order]).status,
            405,
            "{method}"
        );
    }
    let heard = site.ask("POST", &start, &[&cookie, order, &origin, "sec-fetch-site: same-origin"]);
    let job: Value = serde_json::from_str(&heard.body).unwrap();
    assert_eq!((heard.status, &job["vm"]), (202, &"web".into()));
    wait(&site.node, "web", |it| it.state == State::Running);
    while site.node.jobs.list().iter().any(|it| it.ended.is_none()) {
        std::thread::sleep(Duration::from_millis(5));
    }
    let host = format!("host: {}", site.at);
    let stop = |body: &str| {
        let headers = [&*host, &*cookie, order, "content-type: application/json"];
        site.ask_as("POST", &format!("{folder}v1/vms/web/stop"), &headers, body)
    };
    let heard = stop(r#"{"nwo":true}"#);
    assert!(heard.status == 400 && heard.body.contains("nwo"), "the node's own answer: {heard:?}");
    let heard = stop(&"x".repeat(20_000));
    assert!(heard.status == 400 && heard.body.contains("too long"), "{heard:?}");
    assert_eq!(stop(r#"{"now":true}"#).status, 202);
}

/// The stream of events comes as it is written, and goes on from where a browser was.
#[test]
fn events_pass_as_they_come() {
    let site = Site::new();
    let (cookie, folder) = site.come_in();
    let follow = |last: &str| {
        let mut stream = TcpStream::connect(&site.at).unwrap();
        let head = format!("GET {folder}v1/events HTTP/1.1\r\nhost: {}\r\n{cookie}\r\n{last}\r\n", site.at);
        stream.write_all(head.as_bytes()).unwrap();
        stream
    };
    let until = |stream: &mut TcpStream, word: &str| {
        let (mut text, mut part) = (String::new(), [0; 1024]);
        while !text.contains(word) {
            let count = stream.read(&mut part).unwrap();
            assert!(count > 0, "{text}");
            text += std::str::from_utf8(&part[..count]).unwrap();
        }
        text
    };
    let mut stream = follow("");
    let text = until(&mut stream, "from here on");
    let place = text.lines().find_map(|it| it.strip_prefix("id: ")).unwrap().to_owned();
    site.node.define("web", "memory = '1G'").unwrap();
    until(&mut stream, "vm_defined");
    drop(stream);
    until(&mut follow(&format!("last-event-id: {place}\r\n")), "vm_defined");
}

#[test]
fn it_listens_here_only_and_says_what_is_wrong() {
    let mut site = Site::new();
    let socket = site.world.folder.path().join("node.api");
    for at in ["0.0.0.0:0", "[::]:0", "192.0.2.1:80"] {
        let why = serve(at.parse().unwrap(), &socket).unwrap_err().to_string();
        assert!(why.contains("ssh -L"), "{why}");
    }
    let why = serve(site.at.parse().unwrap(), &socket).unwrap_err().to_string();
    assert!(why.contains("--listen"), "{why}");
    // A node that has gone is a gateway that has: the page says so.
    let (cookie, folder) = site.come_in();
    std::fs::remove_file(&socket).unwrap();
    let heard = site.ask("GET", &format!("{folder}v1/vms"), &[&cookie]);
    assert!(heard.status == 502 && heard.body.contains("no node answers"), "{heard:?}");
    // It ends at once, whoever is connected.
    let _silent = TcpStream::connect(&site.at).unwrap();
    let began = std::time::Instant::now();
    site.page = None;
    assert!(began.elapsed() < Duration::from_secs(30));
    TcpStream::connect(&site.at).unwrap_err();
}
