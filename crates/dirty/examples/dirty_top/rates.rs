//! Sends the dirty pages of every epoch to each client of a socket, as the lines of `outlive_dirty::rate`.

use std::fs;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Instant;

use outlive_dirty::Gfn;
use outlive_dirty::rate::{VmLine, Window};

use crate::Failure;
use crate::guest::Guest;
use crate::table::Measured;

pub(crate) struct Rates {
    path: PathBuf,
    listener: UnixListener,
    vm: VmLine,
    clients: Vec<UnixStream>,
    window: Window,
    since: Instant,
}

impl Rates {
    pub(crate) fn of(path: &Path, guest: &Guest) -> Result<Rates, Failure> {
        let cannot = |error| format!("cannot listen at {}: {error}", path.display());
        let listener = UnixListener::bind(path).map_err(cannot)?;
        listener.set_nonblocking(true)?;
        let gfn_space = guest.tracker.layout().gfn_space();
        let (fault_ns, copy_ns) =
            guest.backend.self_test().map_or((0, 0), |test| (test.fault_ns, test.copy_ns));
        let (path, vm) = (path.to_path_buf(), VmLine { gfn_space, fault_ns, copy_ns });
        let (clients, window) = (Vec::new(), Window::default());
        Ok(Rates { path, listener, vm, clients, window, since: Instant::now() })
    }

    /// Records the pages of an epoch, in the pause: nothing is sent and, after the first large epoch, nothing
    /// allocated.
    pub(crate) fn note(&mut self, pages: &[Gfn]) {
        self.window.pages.clear();
        if !self.clients.is_empty() {
            self.window.pages.extend_from_slice(pages);
        }
    }

    /// Sends it while the guest runs. A client that does not read is dropped: nobody waits for it.
    pub(crate) fn send(&mut self, measured: &Measured) {
        let now = Instant::now();
        self.window.time = now - std::mem::replace(&mut self.since, now);
        self.window.vcpus = measured.vcpus.iter().map(|&pages| pages as u64).collect();
        self.window.hot = measured.hot as u64;
        let others = measured.pages - measured.hot.min(measured.pages);
        self.window.devices = others.saturating_sub(measured.vcpus.iter().sum::<usize>()) as u64;
        if !self.clients.is_empty() {
            let line = format!("{}\n", self.window);
            self.clients.retain_mut(|client| client.write_all(line.as_bytes()).is_ok());
        }
        while let Ok((mut client, _)) = self.listener.accept() {
            let greeted = client.set_nonblocking(true).and_then(|()| writeln!(client, "{}", self.vm));
            if greeted.is_ok() {
                self.clients.push(client);
            }
        }
    }
}

impl Drop for Rates {
    fn drop(&mut self) {
        _ = fs::remove_file(&self.path);
    }
}
