//! What the service manager is told (sd_notify(3)): that the process is ready, what it does, and that it lives.
//!
//! A message is a datagram that does not wait. Without a service manager nothing is sent.

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The manager that started this process, if one did.
static MANAGER: OnceLock<Option<Manager>> = OnceLock::new();

struct Manager {
    socket: UnixDatagram,
    to: SocketAddr,
    /// Time between two signs of life, if it wants any.
    every: Option<Duration>,
    lately: Mutex<Lately>,
}

#[derive(Default)]
struct Lately {
    alive: Option<Instant>,
    status: String,
}

impl Manager {
    fn from_environment() -> Option<Self> {
        let address = std::env::var_os("NOTIFY_SOCKET")?;
        let watchdog = std::env::var("WATCHDOG_USEC").ok();
        let mine = std::env::var("WATCHDOG_PID").ok().is_none_or(|pid| pid == std::process::id().to_string());
        Self::new(&address, watchdog.filter(|_| mine).as_deref())
            .inspect_err(|error| tracing::warn!(%error, "the service manager is not told anything"))
            .ok()
    }

    /// `address` and `watchdog` as in the environment: a path or, with an @, an abstract name; microseconds.
    fn new(address: &OsStr, watchdog: Option<&str>) -> io::Result<Self> {
        let to = match address.as_bytes().strip_prefix(b"@") {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(address)?,
        };
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        if to.as_abstract_name().is_some() {
            // A confined process reaches only those abstract names that it is connected to. One with a path may be made
            // anew by the next manager, and is looked up for each message.
            socket.connect_addr(&to).ok();
        }
        // Half of what the manager allows is usual; a third leaves room for a busy host.
        let every = watchdog.and_then(|us| us.parse().ok()).map(|us: u64| Duration::from_micros(us) / 3);
        Ok(Self { socket, to, every: every.filter(|every| !every.is_zero()), lately: Mutex::default() })
    }

    fn send(&self, message: &str) {
        // A manager that does not read loses messages; nobody waits for it.
        self.socket.send_to_addr(message.as_bytes(), &self.to).ok();
    }

    fn alive(&self, now: Instant) {
        let Some(every) = self.every else { return };
        {
            let mut lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
            if lately.alive.is_some_and(|last| now.saturating_duration_since(last) < every) {
                return;
            }
            lately.alive = Some(now);
        }
        self.send("WATCHDOG=1");
    }

    fn status(&self, text: &str) {
        let line = text.replace('\n', " ");
        {
            let mut lately = self.lately.lock().unwrap_or_else(PoisonError::into_inner);
            if lately.status == line {
                return;
            }
            lately.status.clone_from(&line);
        }
        self.send(&format!("STATUS={line}"));
    }
}

fn manager() -> Option<&'static Manager> {
    MANAGER.get_or_init(Manager::from_environment).as_ref()
}

/// Finds the way to the service manager. Call it before the process is confined.
pub(crate) fn reach_manager() {
    manager();
}

/// The process does what it is there for.
pub(crate) fn ready() {
    if let Some(manager) = manager() {
        manager.send("READY=1");
        manager.alive(Instant::now());
    }
}

/// What the process does now, for a person.
pub(crate) fn status(text: &str) {
    if let Some(manager) = manager() {
        manager.status(text);
    }
}

/// The thread that decides makes progress. Only that thread says so; it costs nothing most of the time.
pub(crate) fn alive() {
    if let Some(manager) = manager() {
        manager.alive(Instant::now());
    }
}

/// The process ends.
pub(crate) fn stopping() {
    if let Some(manager) = manager() {
        manager.send("STOPPING=1");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(by: &UnixDatagram) -> Vec<String> {
        by.set_nonblocking(true).unwrap();
        let mut buffer = [0; 256];
        std::iter::from_fn(|| {
            by.recv(&mut buffer).ok().map(|n| String::from_utf8(buffer[..n].to_vec()).unwrap())
        })
        .collect()
    }

    #[test]
    fn a_manager_hears_changes_and_signs_of_life_and_no_more() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let by = UnixDatagram::bind(&path).unwrap();
        let manager = Manager::new(path.as_os_str(), Some("3000000")).unwrap();
        for text in ["one\nline", "one\nline", "another"] {
            manager.status(text);
        }
        let now = Instant::now();
        for after in [0, 999, 1000, 1500] {
            manager.alive(now + Duration::from_millis(after));
        }
        assert_eq!(heard(&by), ["STATUS=one line", "STATUS=another", "WATCHDOG=1", "WATCHDOG=1"]);
    }

    #[test]
    fn an_abstract_socket_is_reached_and_a_manager_that_is_gone_holds_nobody() {
        let name = format!("outlive-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let by = UnixDatagram::bind_addr(&address).unwrap();
        let manager = Manager::new(OsStr::new(&format!("@{name}")), None).unwrap();
        manager.alive(Instant::now());
        manager.send("READY=1");
        assert_eq!(heard(&by), ["READY=1"]);
        drop(by);
        manager.send("READY=1");
    }
}
