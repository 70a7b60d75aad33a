//! What a VM's process says of itself, at the socket of `outlive status`.

use std::io::{self, ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::Deserialize;
use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::figures::{Heat, taken_out};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest answer, in bytes.
const LONGEST: usize = 64 << 10;

/// How deeply an answer may be nested. It is a part of the node's own answers, and whoever reads those has a limit, too (128):
/// one process would keep all VMs of the host from being listed.
const DEEPEST: usize = 32;

/// How a process begins to say why it protects nothing, while it asks the arbiter which host starts the VM.
pub const UNDECIDED: &str = "it is not decided yet which host starts the VM";
/// How it begins while the VM is its own and does not run yet.
pub const BEING_STARTED: &str = "the VM is being started";

/// What a process says.
#[derive(Clone, Debug)]
pub(crate) struct Told {
    /// Whose socket it is, as the kernel knows.
    pub(crate) pid: u32,
    /// The VM runs there, or is about to.
    pub(crate) runs: bool,
    /// It is about to, which may still come to nothing.
    pub(crate) starts: bool,
    /// It is not decided yet whether the VM will run there.
    pub(crate) decides: bool,
    /// The other host is lost, and this standby may be about to take the VM over.
    pub(crate) takes_over: bool,
    /// A standby has all of it.
    pub(crate) protected: bool,
    /// Why not.
    pub(crate) why: Option<String>,
    /// Where the guest's memory is written.
    pub(crate) heat: Option<Arc<Heat>>,
    /// All else that it says.
    pub(crate) all: Value,
}

/// The parts that the node looks at. Releases may add others.
#[derive(Deserialize)]
struct Parts {
    role: String,
    protected: bool,
    why: Option<String>,
    loss_of_this_host: Option<Loss>,
}

#[derive(Deserialize)]
struct Loss {
    survived: bool,
}

/// Asks the process that listens at `path`.
///
/// # Errors
/// The operating system's: nobody listens there, nobody answers in time, or the answer is not understood.
pub(crate) fn ask(path: &Path) -> io::Result<Told> {
    let (said, pid) = hear(path, PATIENCE, LONGEST)?;
    if is_deeper(&said, DEEPEST) {
        return Err(io::Error::new(ErrorKind::InvalidData, "its answer is nested too deeply"));
    }
    let mut all: Value = serde_json::from_slice(&said)?;
    let heat = taken_out(&mut all).map(Arc::new);
    // As it is told to others: a short number may be a long one then.
    if all.to_string().len() > LONGEST {
        return Err(io::Error::new(ErrorKind::InvalidData, "its answer is too long"));
    }
    let Parts { role, protected, why, loss_of_this_host } = serde_json::from_value(all.clone())?;
    let runs = role == "primary";
    let says = |words: &str| why.as_ref().is_some_and(|it| it.starts_with(words));
    let (starts, decides) = (runs && says(BEING_STARTED), !runs && says(UNDECIDED));
    // Without a copy that counts, or with a primary, the VM would not depend on a standby.
    let counts = loss_of_this_host.is_some_and(|loss| !loss.survived);
    let takes_over = !runs && !protected && counts;
    Ok(Told { pid, runs, starts, decides, takes_over, protected, why, heat, all })
}

/// Whether a text is nested more deeply, if it is JSON.
fn is_deeper(text: &[u8], deepest: usize) -> bool {
    let (mut depth, mut within, mut escaped) = (0_usize, false, false);
    for byte in text {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if within => escaped = true,
            b'"' => within = !within,
            _ if within => {}
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > deepest {
            return true;
        }
    }
    false
}

/// What is said to whoever connects at `path`, and which process says it.
///
/// # Errors
/// The operating system's: nobody listens there, or the answer has not ended in time.
pub(crate) fn hear(path: &Path, patience: Duration, longest: usize) -> io::Result<(Vec<u8>, u32)> {
    let (stream, pid) = connect(path)?;
    // There is no word to come.
    let _ = stream.shutdown(Shutdown::Write);
    Ok((read(&stream, patience, longest)?, pid))
}

/// Which process listens at `path`, whether it answers or not.
///
/// # Errors
/// The operating system's.
pub(crate) fn listener(path: &Path) -> io::Result<u32> {
    connect(path).map(|(_, pid)| pid)
}

fn connect(path: &Path) -> io::Result<(UnixStream, u32)> {
    let socket = Socket::new(Domain::UNIX, Type::STREAM, None)?;
    // A process that stands still, and for which too many wait, must not hold up the node.
    socket.set_nonblocking(true)?;
    socket.connect(&SockAddr::unix(path)?)?;
    socket.set_nonblocking(false)?;
    let pid = getsockopt(&socket, PeerCredentials)?.pid();
    let pid = u32::try_from(pid).map_err(|_| ErrorKind::InvalidData)?;
    Ok((UnixStream::from(OwnedFd::from(socket)), pid))
}

/// The whole answer. One that comes byte by byte has no more time than another.
fn read(mut stream: &UnixStream, patience: Duration, longest: usize) -> io::Result<Vec<u8>> {
    let until = Instant::now() + patience;
    let (mut bytes, mut part) = (Vec::new(), [0; 4096]);
    while bytes.len() < longest {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut part)? {
            0 => break,
            count => bytes.extend_from_slice(&part[..count]),
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn brackets_in_a_text_nest_nothing() {
        let text = format!(r#"{{"why":"{}\"{}"}}"#, "[".repeat(200), "{".repeat(200));
        assert!(!is_deeper(text.as_bytes(), 1) && is_deeper(b"[[]]", 1) && !is_deeper(b"[[],[],{}]", 2));
    }

    #[test]
    fn answers_are_bounded_and_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        assert_eq!(ask(&path).unwrap_err().kind(), ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let endless = "[".repeat(LONGEST * 2);
            let of = |more: &str| format!(r#"{{"role":"primary","protected":true,"why":null,"new":{more}}}"#);
            let nested = |depth: usize| of(&format!("{}{}", "[".repeat(depth), "]".repeat(depth)));
            let (deep, deepest) = (nested(DEEPEST), nested(DEEPEST - 1));
            let grows = of(&format!("[{}0]", "1e15,".repeat(LONGEST / 6)));
            for answer in [
                r#"{"role":"primary","protected":true,"why":null,"new":1}"#,
                r#"{"role":"standby","protected":false,"why":"w"}"#,
                &deepest,
                r#"{"role":1}"#,
                "",
                &endless,
                &deep,
                &grows,
            ] {
                let mut client = listener.accept().unwrap().0;
                // The client stops reading a long answer.
                let _ = client.write_all(answer.as_bytes());
            }
        });
        let told = ask(&path).unwrap();
        assert!(told.runs && told.protected && told.pid == std::process::id() && told.all["new"] == 1);
        let told = ask(&path).unwrap();
        assert!(!told.runs && !told.protected && told.why.as_deref() == Some("w"));
        ask(&path).unwrap();
        for _ in 0..5 {
            ask(&path).unwrap_err();
        }
        server.join().unwrap();
        assert_eq!(ask(&path).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
}
