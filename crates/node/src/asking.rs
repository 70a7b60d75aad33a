//! What a VM's process says of itself, at the socket of `outlive status`.

use std::io::{self, ErrorKind, Read};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::Deserialize;
use serde_json::Value;
use socket2::{Domain, SockAddr, Socket, Type};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest answer, in bytes.
const LONGEST: usize = 64 << 10;

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
    /// All that it says.
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
    let all: Value = serde_json::from_slice(&said)?;
    let Parts { role, protected, why, loss_of_this_host } = serde_json::from_value(all.clone())?;
    let runs = role == "primary";
    let says = |words: &str| why.as_ref().is_some_and(|it| it.starts_with(words));
    let (starts, decides) = (runs && says(BEING_STARTED), !runs && says(UNDECIDED));
    // Without a copy that counts, or with a primary, the VM would not depend on a standby.
    let counts = loss_of_this_host.is_some_and(|loss| !loss.survived);
    let takes_over = !runs && !protected && counts;
    Ok(Told { pid, runs, starts, decides, takes_over, protected, why, all })
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
    fn answers_are_bounded_and_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        assert_eq!(ask(&path).unwrap_err().kind(), ErrorKind::NotFound);
        let listener = UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let endless = "[".repeat(LONGEST * 2);
            for answer in [
                r#"{"role":"primary","protected":true,"why":null,"new":1}"#,
                r#"{"role":"standby","protected":false,"why":"w"}"#,
                r#"{"role":1}"#,
                "",
                &endless,
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
        for _ in 0..3 {
            ask(&path).unwrap_err();
        }
        server.join().unwrap();
        assert_eq!(ask(&path).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
}
