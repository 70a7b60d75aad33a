//! The thread that tells what a process has counted, at a socket of its own.
//!
//! The socket of `outlive status` takes an operator's word, so only the owner of the process may use it. This one hears
//! nothing: whoever connects gets a line, in one write that does not wait, and is let go. So whoever makes metrics needs no
//! right over a VM, and many who ask keep no operator's word from being heard.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;

use crate::keys;
use crate::serving::ServingThread;
use crate::socket::{BindError, Listener};
use crate::status::Standing;

/// Time between two answers, in milliseconds: clients that ask all the time cost no core.
const PACE: u8 = 5;
/// Clients that get one answer.
const AT_ONCE: usize = 256;
/// Time between two looks at this host's certificate, which others may renew.
const LOOKS: Duration = Duration::from_secs(60);
/// What is added to the path of the status socket.
pub(super) const SUFFIX: &str = ".metrics";

/// Why nobody is told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TellError {
    /// There can be no socket.
    #[error(transparent)]
    Place(#[from] BindError),
    /// Nobody would answer there.
    #[error("no thread: {0}")]
    NoThread(#[source] io::Error),
}

/// The socket beside that of `outlive status`.
pub(super) fn beside(status: &Path) -> PathBuf {
    let mut path = status.to_owned().into_os_string();
    path.push(SUFFIX);
    path.into()
}

/// Tells, beside the status socket, until the thread is dropped.
///
/// # Errors
/// See [`TellError`].
pub(crate) fn tell(status: &Path, standing: Arc<Standing>) -> Result<ServingThread, TellError> {
    let listener = Listener::bind_for_all(&beside(status))?;
    let serve = move |quit: &EventFd| serve(&listener, &standing, quit);
    ServingThread::start("metrics", serve).map_err(TellError::NoThread)
}

fn serve(listener: &Listener, standing: &Standing, quit: &EventFd) {
    let mut certificate = Certificate::default();
    loop {
        let quits = PollFd::new(quit.as_fd(), PollFlags::POLLIN);
        let comes = PollFd::new(listener.socket.as_fd(), PollFlags::POLLIN);
        match poll(&mut [quits, comes], PollTimeout::NONE) {
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return tracing::error!(%error, "`outlive metrics` sees this process no more"),
        }
        // All that wait get the same: whoever connects again and again keeps nobody from an answer.
        let mut waiting = (0..AT_ONCE).map_while(|_| listener.socket.accept().ok());
        if let Some((first, _)) = waiting.next() {
            let line = line(standing, certificate.until(standing));
            say(first, &line);
            waiting.for_each(|(client, _)| say(client, &line));
        }
        // Also if it cannot be accepted: it would be tried again at once.
        let mut quits = [PollFd::new(quit.as_fd(), PollFlags::POLLIN)];
        if poll(&mut quits, PollTimeout::from(PACE)).is_ok_and(|count| count > 0) {
            return;
        }
    }
}

/// What is told.
pub(super) fn line(standing: &Standing, until: Option<SystemTime>) -> Vec<u8> {
    // Numbers and names: this cannot fail.
    let mut line = serde_json::to_vec(&standing.report(until)).expect("a report is plain data");
    line.push(b'\n');
    line
}

/// The line fits into a socket's buffer; a client with less room has itself to blame.
fn say(mut client: UnixStream, line: &[u8]) {
    if client.set_nonblocking(true).is_ok() {
        // The client may be gone.
        let _ = client.write(line);
    }
}

/// Until when this host's certificate counts, read from time to time.
#[derive(Default)]
struct Certificate {
    read: Option<(Instant, Option<SystemTime>)>,
}

impl Certificate {
    fn until(&mut self, standing: &Standing) -> Option<SystemTime> {
        match self.read {
            Some((at, until)) if at.elapsed() < LOOKS => until,
            _ => {
                let until = standing.keys().and_then(|it| keys::load(&it).ok()).map(|it| it.host.until);
                // A process that has no links yet may have some soon.
                self.read = until.map(|until| (Instant::now(), Some(until)));
                until
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read;
    use std::net::Shutdown;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::events::Role;
    use crate::metrics::Report;
    use crate::socket::connect;

    fn read(mut client: UnixStream) -> Report {
        let mut text = String::new();
        client.read_to_string(&mut text).unwrap();
        assert!(text.ends_with("}\n"), "{text}");
        serde_json::from_str(&text).unwrap()
    }

    /// Every user may connect, and nobody is heard: not an operator's word, and not by keeping silent.
    #[test]
    fn whoever_asks_gets_numbers_and_says_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (status, place) = (folder.path().join("a.sock"), folder.path().join("a.sock.metrics"));
        let standing = Standing::new(Role::Primary, Some("web"), "a secret reason");
        standing.peer("10.1.2.3:7000");
        let told = tell(&status, standing.clone()).unwrap();
        assert_eq!(fs::metadata(&place).unwrap().permissions().mode() & 0o777, 0o666);
        let mut silent = Vec::new();
        while silent.len() < 20 {
            match connect(&place) {
                Ok(client) => silent.push(client),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    std::thread::sleep(Duration::from_millis(5));
                }
            }
        }
        let mut speaks = loop {
            match connect(&place) {
                Ok(client) => break client,
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let _ = speaks.write_all(br#"{"word":"hand_over"}"#);
        let _ = speaks.shutdown(Shutdown::Write);
        // What was said and not heard may cost the answer.
        let mut text = String::new();
        if speaks.read_to_string(&mut text).is_ok() {
            assert!(text.contains(r#""vm":"web""#) && !text.contains("refused"), "{text}");
        }
        for client in silent {
            let report = read(client);
            assert_eq!((report.vm.as_deref(), report.protected), (Some("web"), false));
        }
        let line = String::from_utf8(line(&standing, None)).unwrap();
        assert!(
            !line.contains("secret") && !line.contains("10.1.2.3"),
            "every user of the host may read it: {line}"
        );
        drop(told);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    /// A directory that was made for the sockets goes with them.
    #[test]
    fn nothing_is_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let standing = Standing::new(Role::Primary, Some("web"), "why");
        let made = folder.path().join("made");
        let listener = crate::socket::Listener::bind(&made.join("s")).unwrap();
        let server = crate::status::Server::start(listener, standing).unwrap();
        assert!(made.join("s.metrics").exists());
        drop(server);
        assert!(!made.exists());
    }

    #[test]
    fn the_report_says_what_the_status_says() {
        let standing = Standing::new(Role::Standby, Some("web"), "why");
        standing.protected(4);
        standing.staged(77);
        let (report, status) = (standing.report(None), standing.status());
        assert!(report.protected && report.loss_of_other_host.survived && !report.active);
        assert_eq!((report.generation, report.checkpoint, report.protection_losses), (Some(4), Some(77), 0));
        assert_eq!(report.loss_of_this_host.survived, status.loss_of_this_host.survived);
        standing.unprotected("lost");
        standing.asking("asking");
        let report = standing.report(None);
        assert!(report.waits && !report.protected);
        assert_eq!(report.loss_of_other_host.survived, standing.status().loss_of_other_host.survived);
        assert_eq!((report.protection_losses, report.fencing), (1, None));
        standing.fencing(SystemTime::now() - Duration::from_secs(5), None);
        assert!(standing.report(None).fencing.unwrap() >= 5.0);
        standing.runs_here("web", "00ff", 5, "it was taken over", Default::default);
        let report = standing.report(None);
        assert_eq!((report.role, report.active), (Role::Primary, false), "it is not measured yet");
        standing.measured_by(Default::default);
        assert!(standing.report(None).active);
        standing.asking("asking the arbiter");
        assert!(!standing.report(None).active, "its output is held");
        standing.goes_on("alone");
        assert!(standing.report(None).active);
        standing.waits_here("another host has it");
        assert!(!standing.report(None).active && standing.report(None).running.is_none());
    }
}
