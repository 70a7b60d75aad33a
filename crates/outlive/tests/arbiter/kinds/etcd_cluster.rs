//! A real etcd cluster in a temporary directory: Debian's `etcd-server`.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::stop;
use crate::support::directory;

/// How long a cluster may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether the program is installed; prints a message if not.
pub(crate) fn has_etcd() -> bool {
    let there = Command::new("etcd").arg("--version").output().is_ok_and(|out| out.status.success());
    if !there {
        println!("skipped: no etcd (apt-get install etcd-server)");
    }
    there
}

/// One member.
pub(crate) struct Member {
    name: String,
    pub(crate) client: SocketAddr,
    peer: SocketAddr,
    child: Option<Child>,
}

/// A cluster. Its members are killed and its files removed when it is dropped.
pub(crate) struct Cluster {
    pub(crate) members: Vec<Member>,
    options: Vec<String>,
    scheme: &'static str,
    directory: TempDir,
}

impl Cluster {
    /// A cluster of so many members on free ports of this machine. It answers when this returns.
    pub(crate) fn start(members: usize) -> Self {
        let cluster = Self::begin(members, "http", &[]);
        cluster.wait();
        cluster
    }

    /// The same with options for TLS. It may not answer yet.
    pub(crate) fn begin(members: usize, scheme: &'static str, options: &[String]) -> Self {
        // All are held until all are known, so that no port is given twice.
        let free: Vec<TcpListener> =
            (0..2 * members).map(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).collect();
        let address = |at: usize| free[at].local_addr().unwrap();
        let member = |number: usize| Member {
            name: format!("m{number}"),
            client: address(2 * number),
            peer: address(2 * number + 1),
            child: None,
        };
        let members = (0..members).map(member).collect();
        drop(free);
        let mut cluster = Self { members, options: options.to_vec(), scheme, directory: directory() };
        (0..cluster.members.len()).for_each(|number| cluster.run(number));
        cluster
    }

    /// Starts a member that does not run.
    pub(crate) fn run(&mut self, number: usize) {
        let all: Vec<String> =
            self.members.iter().map(|it| format!("{}=http://{}", it.name, it.peer)).collect();
        let Member { name, client, peer, .. } = &self.members[number];
        let log = File::create(self.directory.path().join(format!("{name}.log"))).unwrap();
        let client = format!("{}://{client}", self.scheme);
        // It is killed when this thread ends: nothing outlives a test, however it ends.
        let child = Command::new("setpriv")
            .args([
                "--pdeathsig",
                "KILL",
                "etcd",
                "--name",
                name,
                "--initial-cluster",
                &all.join(","),
                "--initial-cluster-state",
                "new",
            ])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &format!("http://{peer}")])
            .args(["--initial-advertise-peer-urls", &format!("http://{peer}")])
            .args(&self.options)
            .arg("--data-dir")
            .arg(self.directory.path().join(name))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.members[number].child = Some(child);
    }

    fn wait(&self) {
        let deadline = Instant::now() + PATIENCE;
        for member in &self.members {
            // A question that needs a majority.
            while ask(member.client, "/v3/kv/range", &json!({ "key": STANDARD.encode("x") })).is_none() {
                assert!(Instant::now() < deadline, "the cluster does not answer: {}", self.log(&member.name));
                std::thread::sleep(Duration::from_millis(50));
            }
        }
    }

    fn log(&self, name: &str) -> String {
        std::fs::read_to_string(self.directory.path().join(format!("{name}.log"))).unwrap_or_default()
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// The members as an option names them.
    pub(crate) fn urls(&self) -> String {
        let urls: Vec<String> =
            self.members.iter().map(|member| format!("{}://{}", self.scheme, member.client)).collect();
        urls.join(",")
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self, number: usize) {
        if let Some(mut child) = self.members[number].child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// SIGSTOP or SIGCONT.
    pub(crate) fn signal(&self, number: usize, signal: Signal) {
        let child = self.members[number].child.as_ref().expect("it runs");
        stop::signal(child.id(), signal);
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        (0..self.members.len()).for_each(|number| self.kill(number));
        if std::thread::panicking() {
            for member in &self.members {
                let log = self.log(&member.name);
                let last: Vec<&str> = log.lines().rev().take(5).collect();
                eprintln!("etcd {}: {last:#?}", member.name);
            }
        }
    }
}

/// Asks a member; `None` if it gives no good answer.
pub(crate) fn ask(member: SocketAddr, path: &str, question: &Value) -> Option<Value> {
    TcpStream::connect_timeout(&member, Duration::from_secs(1)).ok()?;
    let config =
        ureq::Agent::config_builder().timeout_global(Some(Duration::from_secs(5))).proxy(None).build();
    let agent: ureq::Agent = config.into();
    agent.post(format!("http://{member}{path}")).send_json(question).ok()?.body_mut().read_json().ok()
}

/// Removes all keys that begin with this.
pub(crate) fn remove(member: SocketAddr, prefix: &str) {
    let end = {
        let mut end = prefix.as_bytes().to_vec();
        *end.last_mut().unwrap() += 1;
        end
    };
    let range = json!({ "key": STANDARD.encode(prefix), "range_end": STANDARD.encode(end) });
    ask(member, "/v3/kv/deleterange", &range).expect("etcd removes keys");
}

/// Writes a key.
pub(crate) fn put(member: SocketAddr, key: &str, value: &str) {
    let pair = json!({ "key": STANDARD.encode(key), "value": STANDARD.encode(value) });
    ask(member, "/v3/kv/put", &pair).expect("etcd writes a key");
}
