//! `outlive arbiter serve` as a process.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Killed and reaped when dropped.
pub(crate) struct Server {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Server {
    /// Serves a directory that is an arbiter. It listens when this returns.
    pub(crate) fn start(directory: &Path, address: &str) -> Self {
        let mut child = command(directory, address).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let line = lines.find(|line| line.contains(" listens on ")).expect("it listens");
        let address = line.rsplit(' ').next().unwrap().parse().unwrap();
        // Its log must go somewhere.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, address }
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
pub(crate) fn command(directory: &Path, address: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_outlive"));
    command.args(["arbiter", "serve", "--listen", address, "--directory"]).arg(directory);
    command.env("RUST_LOG", "warn").stdin(Stdio::null()).stdout(Stdio::null());
    command
}
