//! The two hosts of the demo: processes of this same program, and their files. Nothing is left behind.

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::mem;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use nix::unistd::mkdtemp;

use super::arbiter::Arbiter;
use super::events::{Tail, Tenure};
use crate::events::Record;
use crate::keys::{self, Grant, Order};
use crate::link::LinkKind;

/// How long the demo's keys count: longer than any demo.
const KEYS_LIFE: Duration = Duration::from_secs(90 * 24 * 3600);

/// One of the two places where the VM can run. In real use these are two machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Host {
    A,
    B,
}

impl Host {
    pub(super) const BOTH: [Host; 2] = [Host::A, Host::B];

    /// The other one.
    pub(super) fn other(self) -> Host {
        match self {
            Host::A => Host::B,
            Host::B => Host::A,
        }
    }

    /// Where a standby on this host listens. The ports are free: the network namespace is our own.
    fn addr(self) -> &'static str {
        match self {
            Host::A => "127.0.0.1:7001",
            Host::B => "127.0.0.1:7002",
        }
    }

    fn tap(self) -> &'static str {
        match self {
            Host::A => "tap-a",
            Host::B => "tap-b",
        }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Host::A => "a",
            Host::B => "b",
        })
    }
}

/// What all processes of the cluster have in common.
#[derive(Clone, Debug)]
pub(super) struct Shape {
    /// The program to start.
    pub(super) program: PathBuf,
    /// The bridge that joins the VM's taps with the clients.
    pub(super) bridge: String,
    /// The VM's address with its prefix length.
    pub(super) vm_ip: String,
    pub(super) vcpus: u32,
    pub(super) memory: String,
    /// What is to protect the link between the hosts.
    pub(super) link: LinkKind,
    /// Further options of `outlive run` and `outlive standby`.
    pub(super) options: Vec<String>,
    pub(super) seed: u64,
}

/// A directory under the system's temporary one. Dropping it removes everything in it.
#[derive(Debug)]
pub(super) struct WorkDir {
    path: PathBuf,
}

impl WorkDir {
    pub(super) fn create() -> io::Result<Self> {
        let path = mkdtemp(&std::env::temp_dir().join("outlive-demo-XXXXXX")).map_err(io::Error::from)?;
        let dir = Self { path };
        let order = |host: &str, grant| Order { host: host.to_owned(), grant, life: KEYS_LIFE };
        let ca = dir.keys(Host::A);
        keys::init(&ca, &order("host-a", Grant::ALL)).map_err(io::Error::other)?;
        let others =
            [("host-b", Grant::ALL, dir.keys(Host::B)), ("third", Grant::ARBITER, dir.arbiter_keys())];
        for (host, grant, to) in others {
            keys::issue(&ca, &order(host, grant), &to).map_err(io::Error::other)?;
        }
        fs::create_dir(dir.sockets())?;
        Ok(dir)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn keys(&self, host: Host) -> PathBuf {
        self.path.join(format!("keys-{host}"))
    }

    /// Where sockets are. The CA is beside it: a directory of sockets is a host's as a whole.
    fn sockets(&self) -> PathBuf {
        self.path.join("run")
    }

    pub(super) fn arbiter_keys(&self) -> PathBuf {
        self.path.join("keys-arbiter")
    }

    /// Keeps the directory.
    pub(super) fn keep(mut self) -> PathBuf {
        mem::take(&mut self.path)
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if !self.path.as_os_str().is_empty() {
            // There is nothing better to do about an error now.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// A child process that never outlives its owner.
///
/// Dropping it kills and reaps the process. The process has its own process group, so Ctrl-C at the terminal
/// reaches only us, and it ends when its standard input is closed, so even a SIGKILL of the demo leaves
/// nothing.
#[derive(Debug)]
pub(super) struct Guard {
    child: Child,
}

impl Guard {
    pub(super) fn spawn(command: &mut Command) -> io::Result<Self> {
        use std::os::unix::process::CommandExt;
        command.stdin(Stdio::piped()).process_group(0).spawn().map(|child| Self { child })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The exit status, if it has ended.
    fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Both fail only for a child that was reaped already. SIGKILL cannot be refused, so the wait is
        // short.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A process of the cluster, alive or not, and its output.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) host: Host,
    guard: Option<Guard>,
    pid: u32,
    tail: Tail,
    /// Whether it is dead and all its output was read.
    silent: bool,
    log: PathBuf,
    /// The time during which it ran the VM.
    pub(super) tenure: Tenure,
}

impl Node {
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// The last lines of its log, each indented.
    pub(super) fn last_words(&self, lines: usize) -> String {
        let text = fs::read(&self.log).map(|t| String::from_utf8_lossy(&t).into_owned()).unwrap_or_default();
        let all: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
        all[all.len().saturating_sub(lines)..].iter().map(|line| format!("\n    {line}")).collect()
    }
}

/// All processes that were ever started; at most one is alive on each host.
#[derive(Debug)]
pub(super) struct Cluster {
    shape: Shape,
    /// Dropped after the processes: fields are dropped in this order.
    nodes: Vec<Node>,
    arbiter: Arbiter,
    dir: WorkDir,
}

impl Cluster {
    pub(super) fn new(shape: Shape, arbiter: Arbiter, dir: WorkDir) -> Self {
        Self { shape, nodes: Vec::new(), arbiter, dir }
    }

    /// The kind of the arbiter.
    pub(super) fn arbiter(&self) -> &'static str {
        self.arbiter.kind()
    }

    /// Starts the process that boots the VM.
    pub(super) fn start_primary(&mut self, host: Host) -> io::Result<()> {
        let shape = &self.shape;
        let mut command = Command::new(&shape.program);
        command.args([
            "run",
            "--name",
            "demo",
            "--vcpus",
            &shape.vcpus.to_string(),
            "--memory",
            &shape.memory,
        ]);
        command.args(["--ip", &shape.vm_ip, "--seed", &shape.seed.to_string()]);
        self.start(host, command)
    }

    /// Starts a process that waits for a VM to protect.
    pub(super) fn start_standby(&mut self, host: Host) -> io::Result<()> {
        let mut command = Command::new(&self.shape.program);
        command.args(["standby", "--once", "--listen", host.addr()]);
        self.start(host, command)
    }

    /// Adds the options of both kinds of process. The other host is the standby, now or after a takeover.
    fn start(&mut self, host: Host, mut command: Command) -> io::Result<()> {
        let name = format!("{}-{host}", self.nodes.len());
        let events = self.dir.path().join(format!("{name}.events"));
        let log = self.dir.path().join(format!("{name}.log"));
        let tail = Tail::create(&events)?;
        command
            .args(["--standby", host.other().addr()])
            .args(&self.shape.options)
            .args(["--net", &format!("tap={},bridge={}", host.tap(), self.shape.bridge)])
            .arg("--arbiter")
            .arg(self.arbiter.place())
            .arg("--events")
            .arg(&events)
            .arg("--exit-with-stdin")
            .stdout(Stdio::null())
            .stderr(File::create(&log)?);
        match self.shape.link {
            LinkKind::Tls13 => command.arg("--keys").arg(self.dir.keys(host)),
            LinkKind::Plain => command.arg("--insecure"),
        };
        // A killed process leaves its socket: better here than in the host's folder. The path of a socket has
        // little room.
        let status = self.dir.sockets().join(format!("{name}.sock"));
        if socket2::SockAddr::unix(&status).is_ok() {
            command.arg("--status").arg(status);
        }
        let guard = Guard::spawn(&mut command)?;
        let pid = guard.pid();
        self.nodes.push(Node {
            host,
            guard: Some(guard),
            pid,
            tail,
            silent: false,
            log,
            tenure: Tenure::default(),
        });
        Ok(())
    }

    /// The latest process on a host, alive or not.
    pub(super) fn node(&self, host: Host) -> Option<&Node> {
        self.nodes.iter().rev().find(|n| n.host == host)
    }

    /// Whether a process is alive on a host (as far as [`Cluster::reap`] has seen).
    pub(super) fn alive(&self, host: Host) -> bool {
        self.node(host).is_some_and(|n| n.guard.is_some())
    }

    /// All processes that were ever started.
    pub(super) fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// SIGKILL to the process on a host, as a power cut would end it.
    pub(super) fn kill(&mut self, host: Host) {
        if let Some(node) = self.nodes.iter_mut().rev().find(|n| n.host == host) {
            node.guard = None;
        }
    }

    /// New events of all processes, in the order of their time.
    pub(super) fn poll(&mut self) -> io::Result<Vec<(Host, Record)>> {
        let mut news = Vec::new();
        for node in self.nodes.iter_mut().filter(|n| !n.silent) {
            // Ask before reading: what is read after its death is complete.
            node.silent = node.guard.is_none();
            for record in node.tail.poll()? {
                node.tenure.note(&record);
                news.push((node.host, record));
            }
        }
        news.sort_by_key(|(_, record)| record.t_us);
        Ok(news)
    }

    /// Processes that ended by themselves since the last call.
    pub(super) fn reap(&mut self) -> io::Result<Vec<(Host, ExitStatus)>> {
        let mut ended = Vec::new();
        for node in &mut self.nodes {
            let Some(guard) = &mut node.guard else { continue };
            if let Some(status) = guard.ended()? {
                node.guard = None;
                ended.push((node.host, status));
            }
        }
        Ok(ended)
    }

    /// Where the logs and event files are.
    #[cfg(test)]
    pub(super) fn folder(&self) -> &Path {
        self.dir.path()
    }

    /// Ends everything but keeps the directory with logs and events, and returns its path.
    pub(super) fn end_and_keep(self) -> PathBuf {
        let Self { nodes, arbiter, dir, .. } = self;
        drop((nodes, arbiter));
        dir.keep()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn exists(pid: u32) -> bool {
        Path::new(&format!("/proc/{pid}")).exists()
    }

    #[test]
    fn a_dropped_guard_leaves_no_process_not_even_a_zombie() {
        let guard = Guard::spawn(Command::new("sleep").arg("1000")).unwrap();
        let pid = guard.pid();
        assert!(exists(pid));
        drop(guard);
        assert!(!exists(pid));
    }

    #[test]
    fn a_panic_leaves_no_process() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let panicked = std::thread::spawn(move || {
            let guard = Guard::spawn(Command::new("sleep").arg("1000")).unwrap();
            sender.send(guard.pid()).unwrap();
            panic!("on purpose");
        });
        let pid = receiver.recv().unwrap();
        panicked.join().unwrap_err();
        assert!(!exists(pid));
    }

    #[test]
    fn the_end_of_the_owner_ends_the_childs_input() {
        // What a SIGKILL of the demo looks like to a child that watches its standard input.
        let mut guard = Guard::spawn(Command::new("cat").stdout(Stdio::null())).unwrap();
        assert!(guard.ended().unwrap().is_none());
        drop(guard.child.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(5);
        while guard.ended().unwrap().is_none() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn the_directory_goes_unless_it_is_kept() {
        let dir = WorkDir::create().unwrap();
        let path = dir.path().to_owned();
        assert!(path.is_dir());
        drop(dir);
        assert!(!path.exists());
        let path = WorkDir::create().unwrap().keep();
        assert!(path.is_dir());
        fs::remove_dir_all(path).unwrap();
    }
}
