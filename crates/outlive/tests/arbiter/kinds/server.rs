//! `outlive arbiter serve` as a process.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Killed and reaped when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
}

impl Server {
    /// Serves a directory that is an arbiter, with these keys or without. It listens when this returns.
    pub(crate) fn start(directory: &Path, address: &str, keys: Option<&Path>) -> Self {
        let mut child = command(directory, address, keys).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let line = lines.find(|line| line.contains(" listens on ")).expect("it listens");
        let address = line.rsplit(' ').next().unwrap().parse().unwrap();
        let log = Arc::<Mutex<Vec<String>>>::default();
        let kept = log.clone();
        std::thread::spawn(move || lines.for_each(|line| kept.lock().unwrap().push(line)));
        Self { child, address, log }
    }

    /// What it has said since it listens.
    pub(crate) fn log(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// Waits until it says this.
    pub(crate) fn wait_says(&self, words: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.log().iter().any(|line| line.contains(words)) {
            assert!(Instant::now() < deadline, "it does not say '{words}': {:#?}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// SIGKILL, as when the machine loses its power.
    pub(crate) fn kill(mut self) {
        self.end();
    }

    /// Waits for its end and returns the exit code.
    pub(crate) fn wait(mut self) -> Option<i32> {
        self.child.wait().unwrap().code()
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// The command, not started yet.
pub(crate) fn command(directory: &Path, address: &str, keys: Option<&Path>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outlive"));
    command.args(["arbiter", "serve", "--listen", address, "--directory"]).arg(directory);
    match keys {
        Some(keys) => command.arg("--keys").arg(keys),
        None => command.arg("--insecure"),
    };
    command.env("RUST_LOG", "warn").stdin(Stdio::null()).stdout(Stdio::null());
    command
}
