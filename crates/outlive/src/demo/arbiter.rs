//! The arbiter of the demo: a directory, this program that serves one, or an etcd cluster of three. Processes of it end
//! with the demo, and its files go with the demo's directory.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::DemoError;
use super::cluster::{Guard, Host, WorkDir};
use crate::arbiter::{self, ArbiterSpecError, FileArbiter};
use crate::cli::DemoArbiter;
use crate::link::LinkKind;

/// Where it is served. The ports are free: the network namespace is the demo's own.
const SERVED: &str = "127.0.0.1:7010";
const ETCD: &str = "127.0.0.1:2379";
const MEMBERS: u16 = 3;
/// How long a cluster may take to begin.
const PATIENCE: Duration = Duration::from_secs(30);

/// The arbiter, until it is dropped.
#[derive(Debug)]
pub(super) struct Arbiter {
    place: OsString,
    _processes: Vec<Guard>,
}

impl Arbiter {
    /// Finds out whether there can be one.
    ///
    /// # Errors
    /// [`DemoError::NoEtcd`].
    pub(super) fn check(kind: DemoArbiter) -> Result<(), DemoError> {
        let missing = || {
            let mut etcd = Command::new("etcd");
            etcd.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            !etcd.status().is_ok_and(|status| status.success())
        };
        if kind == DemoArbiter::Etcd && missing() { Err(DemoError::NoEtcd) } else { Ok(()) }
    }

    /// Starts it; its files are in `dir`. With TLS it is served with these keys; the hosts have others.
    ///
    /// # Errors
    /// It does not start.
    pub(super) fn start(
        kind: DemoArbiter,
        program: &Path,
        dir: &WorkDir,
        link: LinkKind,
    ) -> Result<Self, DemoError> {
        let (keys, host) = (dir.arbiter_keys(), dir.keys(Host::A));
        let dir = dir.path();
        let (place, processes) = match kind {
            DemoArbiter::File => (directory(dir)?, Vec::new()),
            DemoArbiter::Own => {
                let (end, keys) = match link {
                    LinkKind::Tls13 => ("", Some(&*keys)),
                    LinkKind::Plain => ("?insecure", None),
                };
                (format!("outlive:{SERVED}{end}").into(), vec![serve(program, dir, keys)?])
            }
            DemoArbiter::Etcd => (format!("etcd:http://{ETCD}").into(), members(dir)?),
        };
        let arbiter = Self { place, _processes: processes };
        arbiter.wait(kind, &host)?;
        Ok(arbiter)
    }

    /// Its kind, as in the option: that of the place which the hosts are told to ask.
    pub(super) fn kind(&self) -> &'static str {
        let place = self.place.to_string_lossy();
        match place.split(':').next() {
            Some("file") => DemoArbiter::File.name(),
            Some("outlive") => DemoArbiter::Own.name(),
            Some("etcd") => DemoArbiter::Etcd.name(),
            _ => "unknown",
        }
    }

    /// As in `--arbiter`.
    pub(super) fn place(&self) -> &OsString {
        &self.place
    }

    /// Waits until it answers a host with these keys.
    fn wait(&self, kind: DemoArbiter, keys: &Path) -> Result<(), DemoError> {
        let place = arbiter::with_keys(&self.place.to_string_lossy(), Some(keys));
        let ask: fn(&str) -> Result<(), ArbiterSpecError> = match kind {
            DemoArbiter::File => return Ok(()),
            DemoArbiter::Own => |place| arbiter::parse(place).map(drop),
            DemoArbiter::Etcd => |place| arbiter::init(place).map(drop),
        };
        let deadline = Instant::now() + PATIENCE;
        loop {
            match ask(&place) {
                Ok(()) => return Ok(()),
                Err(why) if Instant::now() > deadline => return Err(DemoError::Arbiter(why.to_string())),
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

fn directory(dir: &Path) -> Result<OsString, DemoError> {
    let path = dir.join("arbiter");
    fs::create_dir(&path)?;
    FileArbiter::init(&path).map_err(io::Error::other)?;
    let mut place = OsString::from("file:");
    place.push(path);
    Ok(place)
}

fn serve(program: &Path, dir: &Path, keys: Option<&Path>) -> Result<Guard, DemoError> {
    directory(dir)?;
    let mut command = Command::new(program);
    command.args(["arbiter", "serve", "--exit-with-stdin", "--listen", SERVED, "--directory"]);
    command.arg(dir.join("arbiter"));
    match keys {
        Some(keys) => command.arg("--keys").arg(keys),
        None => command.arg("--insecure"),
    };
    start(&mut command, dir, "arbiter")
}

fn members(dir: &Path) -> Result<Vec<Guard>, DemoError> {
    let client = |number: u16| format!("http://127.0.0.1:{}", 2379 + number);
    let peer = |number: u16| format!("http://127.0.0.1:{}", 2389 + number);
    let all: Vec<String> = (0..MEMBERS).map(|number| format!("m{number}={}", peer(number))).collect();
    let member = |number: u16| {
        let name = format!("etcd-{number}");
        // It is killed when this thread ends, which is the demo's main one, however it ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "etcd", "--name", &format!("m{number}")]);
        command.args(["--initial-cluster", &all.join(","), "--listen-client-urls", &client(number)]);
        command.args(["--advertise-client-urls", &client(number), "--listen-peer-urls", &peer(number)]);
        command.args(["--initial-advertise-peer-urls", &peer(number), "--data-dir"]).arg(dir.join(&name));
        start(&mut command, dir, &name)
    };
    (0..MEMBERS).map(member).collect()
}

fn start(command: &mut Command, dir: &Path, name: &str) -> Result<Guard, DemoError> {
    let log = File::create(dir.join(format!("{name}.log")))?;
    Ok(Guard::spawn(command.stdout(Stdio::null()).stderr(log))?)
}
