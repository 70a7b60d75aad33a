//! The arbiter that Outlive serves.

use std::cell::RefCell;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use outlive::arbiter::{self, Claim, FileArbiter};
use outlive::keys::{Grant, Order};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use super::keys::{self, Keys};
use super::proxy::Proxy;
use super::server::{Server, command};
use crate::conformance::{Place, Reach, all, answer};
use crate::stop;
use crate::support::{VM, directory, empty, why};

/// A server behind a proxy, with keys.
struct Served {
    keys: Keys,
    directory: TempDir,
    proxy: Proxy,
    /// All that were started: the newest serves.
    servers: Mutex<Vec<(Server, Option<TempDir>)>>,
}

fn made() -> TempDir {
    let directory = directory();
    FileArbiter::init(directory.path()).unwrap();
    directory
}

impl Served {
    fn make() -> Self {
        let directory = made();
        let keys = Keys::make();
        let server = Server::start(directory.path(), "127.0.0.1:0", Some(&keys.arbiter()));
        let proxy = Proxy::before_tls(server.address);
        Self { keys, directory, proxy, servers: Mutex::new(vec![(server, None)]) }
    }
}

impl Place for Served {
    fn text(&self) -> String {
        keys::place(self.proxy.address, &self.keys.host())
    }

    fn steward(&self) -> Box<dyn arbiter::Arbiter> {
        arbiter::parse(&keys::place(self.proxy.address, &self.keys.arbiter())).unwrap()
    }

    fn reach(&self, reach: Reach) -> bool {
        self.proxy.reach(reach);
        true
    }

    fn empty(&self) {
        empty(self.directory.path(), "outlive-arbiter");
    }

    fn swap(&self) {
        let other = made();
        let server = Server::start(other.path(), "127.0.0.1:0", Some(&self.keys.arbiter()));
        self.proxy.target(server.address);
        self.servers.lock().unwrap().push((server, Some(other)));
    }
}

#[test]
fn a_served_arbiter_conforms() {
    all(&|| Box::new(Served::make()), 60);
}

/// A server that stands still is out of reach, and nobody waits for it for long.
#[test]
fn a_frozen_server_is_out_of_reach_within_seconds() {
    let directory = made();
    let keys = Keys::make();
    let server = Server::start(directory.path(), "127.0.0.1:0", Some(&keys.arbiter()));
    let mut arbiter = arbiter::parse(&keys::place(server.address, &keys.host())).unwrap();
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    stop::signal(server.pid() as u32, Signal::SIGSTOP);
    let start = Instant::now();
    assert!(why(arbiter.claim(&VM, 2, "primary")).contains("does not answer"));
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    kill(Pid::from_raw(server.pid()), Signal::SIGCONT).unwrap();
    assert_eq!(answer(arbiter.as_mut(), 2, "primary"), Claim::Won);
    kill(Pid::from_raw(server.pid()), Signal::SIGTERM).unwrap();
    assert_eq!(server.wait(), Some(0), "SIGTERM ends it in order");
}

/// A connection from another address of this machine.
fn stranger(to: SocketAddr) -> Option<TcpStream> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.bind(&SocketAddr::from(([127, 0, 0, 2], 0)).into()).unwrap();
    socket.connect(&to.into()).ok()?;
    let socket = TcpStream::from(socket);
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    Some(socket)
}

/// Strangers who send nonsense, too much, or nothing at all, in numbers, where no keys keep them out.
#[test]
fn strangers_get_nothing_and_hold_nobody_up() {
    let directory = made();
    let server = Server::start(directory.path(), "127.0.0.1:0", None);
    let mut arbiter = arbiter::parse(&format!("outlive:{}?insecure", server.address)).unwrap();
    let idle: Vec<_> = (0..100).filter_map(|_| stranger(server.address)).collect();
    for generation in 1..=20 {
        assert_eq!(arbiter.claim(&VM, generation, "primary"), Claim::Won, "beside {} idle ones", idle.len());
    }
    drop(idle);
    let long = "x".repeat(1 << 20);
    let (known, vm) = (arbiter.identity().to_owned(), VM.to_string());
    let token = "a".repeat(32);
    let claim = |arbiter: &str, generation: u64, process: &str, vm: &str| {
        format!(
            r#"{{"version":1,"arbiter":"{arbiter}","ask":"claim","vm":"{vm}","generation":{generation},"owner":"x","process":"{process}"}}"#
        )
    };
    let lines = [
        "".to_owned(),
        "GET / HTTP/1.1".to_owned(),
        "{}".to_owned(),
        long,
        r#"{"version":2,"ask":"open"}"#.to_owned(),
        r#"{"version":1,"ask":"vms"}"#.to_owned(),
        claim("another", 21, &token, &vm),
        claim(&known, 0, &token, &vm),
        claim(&known, 21, "a\\nowner me", &vm),
        claim(&known, 21, &token, "../../etc"),
        claim(&known, u64::MAX, &token, &vm),
    ];
    for line in lines {
        let said = RefCell::new(String::new());
        let Some(mut socket) = stranger(server.address) else { panic!("nobody listens") };
        // It may hang up before it has read all.
        let _ = socket.write_all(format!("{line}\n").as_bytes());
        let _ = socket.read_to_string(&mut said.borrow_mut());
        let said = said.into_inner();
        assert!(!said.contains("won"), "{line}: {said}");
    }
    assert_eq!(arbiter.highest(&VM).unwrap(), Some(20));
}

/// What is wrong is said in one line, with exit code 2, and nothing is left behind.
#[test]
fn what_cannot_be_served_is_refused() {
    let (bare, made) = (directory(), made());
    let keys = Keys::make();
    let (ours, hosts, none) = (keys.arbiter(), keys.host(), keys.of("none"));
    keys.issue(&Order { life: Duration::ZERO, ..keys::order("late", Grant::ARBITER) });
    let late = keys.of("late");
    let away = std::path::Path::new("/no/such/directory");
    for (directory, address, keys, remedy) in [
        (bare.path(), "127.0.0.1:0", None, "outlive arbiter init file:"),
        (made.path(), "0.0.0.0:0", None, "outlive keys issue --arbiter"),
        (made.path(), "192.0.2.1:1", None, "outlive keys issue --arbiter"),
        (away, "127.0.0.1:0", None, "create it"),
        (made.path(), "nonsense", None, "--help"),
        (made.path(), "no.such.host.invalid:7010", Some(&ours), "--listen an address of this machine"),
        (made.path(), "192.0.2.1:1", Some(&ours), "--listen an address of this machine"),
        (made.path(), "127.0.0.1:0", Some(&none), "outlive keys init"),
        (made.path(), "127.0.0.1:0", Some(&late), "outlive keys rotate"),
        (made.path(), "127.0.0.1:0", Some(&hosts), "`outlive keys issue --host NAME --arbiter`"),
    ] {
        let out = command(directory, address, keys.map(|it| it.as_path())).output().unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(2), "{said}");
        assert!(said.contains(remedy) && said.trim().lines().count() == 1, "{said}");
    }
    assert_eq!(fs::read_dir(bare.path()).unwrap().count(), 0);
    // Two at one address.
    let server = Server::start(made.path(), "localhost:0", Some(&ours));
    let out = command(made.path(), &server.address.to_string(), Some(&ours)).output().unwrap();
    assert_eq!(out.status.code(), Some(2));
    // Nobody listens there.
    let address = server.address;
    server.kill();
    let error = arbiter::parse(&keys::place(address, &hosts)).map(drop).unwrap_err().to_string();
    assert!(error.contains("outlive arbiter serve"), "{error}");
}

/// By hand, too: without a unit of systemd around it. Only its directory and its keys are in reach.
#[test]
fn a_server_has_no_right_and_reaches_only_its_directory_and_its_keys() {
    let (keys, directory) = (Keys::make(), made());
    // Every program that is started from here on has it.
    let secret = directory.path().join("../outlive-secret-").with_extension(std::process::id().to_string());
    fs::write(&secret, "of whoever starts it").unwrap();
    let secret = secret.canonicalize().unwrap();
    let none = nix::sys::stat::Mode::empty();
    let left_open = nix::fcntl::open(&secret, nix::fcntl::OFlag::O_RDONLY, none).unwrap();
    let server = Server::start(directory.path(), "127.0.0.1:0", Some(&keys.arbiter()));
    drop(left_open);
    fs::remove_file(&secret).unwrap();
    let files = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
    let links: Vec<_> = files.map(|file| fs::read_link(file.unwrap().path()).unwrap()).collect();
    let name = secret.to_str().unwrap();
    assert!(!links.iter().any(|to| to.to_string_lossy().starts_with(name)), "{links:?}");
    for task in fs::read_dir(format!("/proc/{}/task", server.pid())).unwrap() {
        let words = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        for word in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"] {
            assert!(words.contains(word), "{word}: {words}");
        }
    }
    let mut host = arbiter::parse(&keys::place(server.address, &keys.host())).unwrap();
    assert_eq!(host.claim(&VM, 1, "primary"), Claim::Won);
    // Another directory under the name of the first is a file of others.
    let (own, away) = (keys.arbiter(), keys.of("away"));
    fs::rename(&own, &away).unwrap();
    fs::create_dir(&own).unwrap();
    for file in fs::read_dir(&away).unwrap().map(Result::unwrap) {
        fs::copy(file.path(), own.join(file.file_name())).unwrap();
    }
    fs::set_permissions(&own, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    if !server.log().iter().any(|line| line.contains("no Landlock")) {
        why(host.claim(&VM, 2, "primary"));
        server.wait_says("has no permission to read it");
    }
    fs::remove_dir_all(&own).unwrap();
    fs::rename(&away, &own).unwrap();
    assert_eq!(answer(host.as_mut(), 2, "primary"), Claim::Won);
}
