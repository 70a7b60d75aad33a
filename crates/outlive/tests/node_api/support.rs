//! A node with keys, and ways to ask it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use outlive::keys::{self, Grant, Order};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

#[path = "../common/tls.rs"]
mod tls;

pub(crate) use tls::Tls;

pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_outlive");
/// How long anything may take; far longer than on a host that is not overloaded.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
pub(crate) const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);
/// The node says something of strangers once a second.
pub(crate) const COMPLAINT: Duration = Duration::from_millis(1100);

pub(crate) fn order(name: &str, grant: Grant) -> Order {
    Order { host: name.into(), grant, life: YEAR }
}

pub(crate) fn wait_until(what: &str, is: impl Fn() -> bool) {
    let began = Instant::now();
    while !is() {
        assert!(began.elapsed() < PATIENCE, "in vain: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Host a with its keys and a CA, and perhaps its node.
pub(crate) struct Stage {
    dir: tempfile::TempDir,
    node: Option<Child>,
}

impl Stage {
    /// Without a node.
    pub(crate) fn bare() -> Self {
        let stage = Self { dir: tempfile::tempdir().unwrap(), node: None };
        keys::init(&stage.at("hosta"), &order("hosta", Grant::ALL)).unwrap();
        stage
    }

    /// With a node at a port that the system chooses, and the keys of an operator, alice.
    pub(crate) fn new() -> Self {
        let mut stage = Self::bare();
        stage.issue("alice", Grant::OPERATOR);
        stage.start("hosta", "127.0.0.1:0");
        wait_until("the node listens", || stage.listens().is_some());
        stage
    }

    /// A place of this stage.
    pub(crate) fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Makes keys, in a place of their name.
    pub(crate) fn issue(&self, name: &str, grant: Grant) -> keys::Certificate {
        self.issue_for(name, grant, YEAR)
    }

    pub(crate) fn issue_for(&self, name: &str, grant: Grant, life: Duration) -> keys::Certificate {
        keys::issue(&self.at("hosta"), &Order { life, ..order(name, grant) }, &self.at(name)).unwrap()
    }

    /// Starts the node, with the keys in a place.
    pub(crate) fn start(&mut self, keys: &str, listen: &str) {
        let mut command = Command::new(PROGRAM);
        command.args(["node", "run", "--exit-with-stdin", "--host", "hosta", "--listen", listen]);
        for (option, what) in [
            ("--vms", "vms"),
            ("--state", "state"),
            ("--run", "run"),
            ("--logs", "logs"),
            ("--socket", "api"),
        ] {
            command.arg(option).arg(self.at(what));
        }
        command.arg("--keys").arg(self.at(keys));
        let log = File::options().create(true).append(true).open(self.at("log")).unwrap();
        let node = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        self.node = Some(node);
        wait_until("the node answers here", || self.here(&["node", "status"]).status.success());
    }

    /// What the node has written.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.at("log")).unwrap_or_default()
    }

    /// Waits until the node says something so many times.
    pub(crate) fn wait_says(&self, words: &str, count: usize) {
        wait_until(&format!("the node says '{words}'"), || self.log().matches(words).count() >= count);
    }

    fn listens(&self) -> Option<SocketAddr> {
        let log = self.log();
        let (_, after) = log.rsplit_once("other hosts and operators are answered at ")?;
        after.lines().next()?.trim().parse().ok()
    }

    /// Where the node listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.listens().expect("it listens")
    }

    /// A command at the socket.
    pub(crate) fn here(&self, words: &[&str]) -> Output {
        Command::new(PROGRAM).args(words).arg("--socket").arg(self.at("api")).output().unwrap()
    }

    /// A command from another host, with the keys in a place.
    pub(crate) fn from(&self, keys: &str, words: &[&str]) -> Output {
        self.command(keys, words).output().unwrap()
    }

    pub(crate) fn command(&self, keys: &str, words: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(words).args(["--host", &format!("hosta@{}", self.address())]);
        command.arg("--keys").arg(self.at(keys));
        command
    }

    /// The same for one that must succeed. Returns its output.
    pub(crate) fn good(&self, keys: &str, words: &[&str]) -> String {
        let output = self.from(keys, words);
        assert_eq!(output.status.code(), Some(0), "{words:?} by {keys}: {}\n{}", said(&output), self.log());
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same for one that must fail with this code. Returns its one line.
    pub(crate) fn bad(&self, keys: &str, words: &[&str], code: i32) -> String {
        fails(&mut self.command(keys, words), code)
    }

    pub(crate) fn json(&self, keys: &str, words: &[&str]) -> Value {
        serde_json::from_str(&self.good(keys, &[words, &["--json"]].concat())).unwrap()
    }

    /// The node is alive, and nothing has gone wrong in it.
    pub(crate) fn unharmed(&mut self) {
        let node = self.node.as_mut().expect("it was started");
        assert!(node.try_wait().unwrap().is_none(), "the node has ended: {}", self.log());
        assert!(!self.log().contains("panicked"), "{}", self.log());
    }

    /// Connects from an address of loopback.
    pub(crate) fn knock_from(&self, from: Ipv4Addr) -> TcpStream {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&SocketAddr::from((from, 0)).into()).unwrap();
        socket.connect(&self.address().into()).unwrap();
        let stream = TcpStream::from(std::os::fd::OwnedFd::from(socket));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(stream.local_addr().unwrap().ip(), IpAddr::from(from));
        stream
    }

    pub(crate) fn knock(&self) -> TcpStream {
        self.knock_from(Ipv4Addr::LOCALHOST)
    }

    /// A connection as a client has it that believes everything, with keys or without.
    pub(crate) fn tls(&self, keys: Option<&str>) -> Tls {
        tls::tls(self.knock(), keys.map(|keys| self.at(keys)).as_deref())
    }
}

/// Says something, and returns the whole answer, or how it was refused.
pub(crate) fn talk(stream: &mut Tls, words: &str) -> Result<String, String> {
    let sent = stream.write_all(words.as_bytes()).and_then(|()| stream.flush());
    let mut answer = Vec::new();
    let read = sent.and_then(|()| stream.read_to_end(&mut answer));
    match read {
        // Servers close without a word of TLS.
        Err(error) if answer.is_empty() => Err(error.to_string()),
        _ => Ok(String::from_utf8(answer).unwrap()),
    }
}

pub(crate) fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a command that must fail with this code. Returns its one line.
pub(crate) fn fails(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    let said = said(&output);
    assert_eq!(output.status.code(), Some(code), "{command:?}: {said}");
    let line = said.strip_prefix("outlive: ").unwrap_or_else(|| panic!("{said}"));
    assert_eq!(said.lines().count(), 1, "{said}");
    line.trim().to_owned()
}

impl Drop for Stage {
    fn drop(&mut self) {
        if let Some(mut node) = self.node.take() {
            // Both fail only for a child that was already reaped.
            let _ = node.kill();
            let _ = node.wait();
        }
        for record in fs::read_dir(self.at("state/vms")).into_iter().flatten().flatten() {
            let record: Value =
                serde_json::from_slice(&fs::read(record.path()).unwrap_or_default()).unwrap_or_default();
            let Some(pid) = record["process"]["pid"].as_i64() else { continue };
            let words = fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if words.contains(self.dir.path().to_str().unwrap()) {
                let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
            }
        }
        if thread::panicking() {
            eprintln!("the node's log:\n{}", self.log());
        }
    }
}

/// A process that a test ends.
pub(crate) struct Ends(pub(crate) Child);

impl Drop for Ends {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The certificate that a node shows.
pub(crate) fn shown(stream: &mut Tls) -> Option<keys::Certificate> {
    stream.conn.complete_io(&mut stream.sock).ok()?;
    let all = stream.conn.peer_certificates()?;
    keys::Certificate::of_host(&all[0]).ok()
}

/// Lines of a process, as they come.
pub(crate) fn lines(from: impl Read + Send + 'static) -> Arc<Mutex<Vec<String>>> {
    use std::io::{BufRead, BufReader};
    let all = Arc::new(Mutex::new(Vec::new()));
    let heard = all.clone();
    thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            heard.lock().unwrap().push(line);
        }
    });
    all
}

/// `outlive node events` of somebody, and what it writes.
pub(crate) struct Follower {
    pub(crate) process: Ends,
    pub(crate) told: Arc<Mutex<Vec<String>>>,
    pub(crate) said: Arc<Mutex<Vec<String>>>,
}

impl Stage {
    /// Follows the events with the keys in a place, once `other` has seen to it that some have come.
    pub(crate) fn follow(&self, keys: &str, other: &str) -> Follower {
        let mut command = self.command(keys, &["node", "events", "--json"]);
        let mut process = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let (told, said) = (lines(process.stdout.take().unwrap()), lines(process.stderr.take().unwrap()));
        let follower = Follower { process: Ends(process), told, said };
        let definition = file(&self.at("before.toml"), VM);
        wait_until("an event comes", || {
            self.good(other, &["vm", "define", "before", &definition]);
            self.good(other, &["vm", "undefine", "before"]);
            !follower.told.lock().unwrap().is_empty()
        });
        follower
    }
}

/// A VM of its own, the built-in guest.
pub(crate) const VM: &str = "memory = '64M'\nip = '10.0.0.5/24'\n";

/// Writes a file in a place, and returns its path as text.
pub(crate) fn file(at: &Path, text: &str) -> String {
    fs::write(at, text).unwrap();
    at.to_str().unwrap().to_owned()
}
