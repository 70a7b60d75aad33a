//! `outlive status`: asks processes on this host.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::{Status, json, place};
use crate::cli::StatusOptions;
use crate::events::Role;
use crate::{exit, socket};

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// The longest answer.
const LONGEST: u64 = 64 << 10;

/// `outlive status`: returns the exit code.
pub fn command(options: &StatusOptions) -> u8 {
    let answers = match &options.socket {
        Some(path) => one(path),
        None => all(&place::folders()),
    };
    let printed = answers.and_then(|answers| {
        let width = outlive_node::cli::width();
        print(&answers, options.json, width, &mut outlive_node::printed()).map_err(StatusError::Print)?;
        Ok(code(&answers))
    });
    printed.unwrap_or_else(exit::usage)
}

/// What helps against a wrong path.
const HINT: &str = "give the --status path of a running outlive run or standby, or none to see all";

/// Why there is no status to show.
#[derive(Debug, thiserror::Error)]
enum StatusError {
    /// The path leads nowhere.
    #[error("there is no socket at {}: {HINT}", .0.display())]
    NoSocket(PathBuf),
    /// The process has ended.
    #[error("nobody answers at {} any more: {HINT}", .0.display())]
    Gone(PathBuf),
    /// The operating system refuses for another reason.
    #[error("cannot ask at {}: {source}; {HINT}", .path.display())]
    Refused { path: PathBuf, source: io::Error },
    /// Nobody answers at the usual places.
    #[error(
        "no VM or standby that you may ask runs on this host (none answers in {}): give the path of its --status \
         with --socket, or ask as the user who runs it",
        listed(.0)
    )]
    Nobody(Vec<PathBuf>),
    /// The status cannot be shown.
    #[error("cannot print: {0}")]
    Print(#[source] io::Error),
}

fn listed(folders: &[PathBuf]) -> String {
    let folders: Vec<_> = folders.iter().map(|folder| folder.display().to_string()).collect();
    folders.join(" or ")
}

/// What one socket says.
#[derive(Debug, Serialize)]
struct Answer {
    socket: PathBuf,
    #[serde(flatten)]
    said: Said,
}

#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Said {
    Status(Box<Status>),
    /// The process is there, but nothing of use came from it.
    Nothing {
        error: String,
    },
}

impl Said {
    /// Whether the process has the VM.
    pub(super) fn runs(&self) -> bool {
        matches!(self, Self::Status(status) if status.role == Role::Primary)
    }
}

fn code(answers: &[Answer]) -> u8 {
    let protected = |it: &Answer| matches!(&it.said, Said::Status(status) if status.protected);
    if answers.iter().all(protected) { exit::OK } else { exit::FAILED }
}

fn one(path: &Path) -> Result<Vec<Answer>, StatusError> {
    let path = path.to_owned();
    match ask(&path) {
        Ok(said) => Ok(vec![Answer { socket: path, said }]),
        Err(source) => Err(match source.kind() {
            ErrorKind::NotFound => StatusError::NoSocket(path),
            ErrorKind::ConnectionRefused => StatusError::Gone(path),
            _ => StatusError::Refused { path, source },
        }),
    }
}

fn all(folders: &[PathBuf]) -> Result<Vec<Answer>, StatusError> {
    let files = folders.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten();
    let mut sockets: Vec<PathBuf> = files.map(|file| file.path()).collect();
    sockets.retain(|path| path.extension().is_some_and(|it| it == place::ENDING));
    sockets.sort();
    // Those of dead processes and of other users say nothing.
    let answer = |socket: PathBuf| Some(Answer { said: ask(&socket).ok()?, socket });
    let answers: Vec<Answer> = sockets.into_iter().filter_map(answer).collect();
    if answers.is_empty() {
        return Err(StatusError::Nobody(folders.to_vec()));
    }
    Ok(answers)
}

/// Asks one process.
///
/// # Errors
/// The operating system's, when there is no such process.
pub(super) fn ask(path: &Path) -> io::Result<Said> {
    let nothing = |error: String| Ok(Said::Nothing { error });
    let socket = match socket::connect(path) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            return nothing("too many wait for its answer: it stands still".into());
        }
        socket => socket?,
    };
    socket.set_read_timeout(Some(PATIENCE))?;
    // There is no more to come: the process need not wait for an operator's word.
    let _ = socket.shutdown(Shutdown::Write);
    let mut bytes = Vec::new();
    match socket.take(LONGEST).read_to_end(&mut bytes) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => {
            nothing(format!("it has not answered for {} s", PATIENCE.as_secs()))
        }
        Err(error) => nothing(format!("its answer is lost: {error}")),
        Ok(_) => match serde_json::from_slice(&bytes) {
            Ok(status) => Ok(Said::Status(status)),
            Err(error) => nothing(format!("its answer is not understood: {error}")),
        },
    }
}

/// For people, an empty line is between two processes.
fn print(answers: &[Answer], json: bool, width: Option<usize>, out: &mut impl Write) -> io::Result<()> {
    if json {
        return writeln!(out, "{}", json::text(&answers)?);
    }
    let shown = |answer: &Answer| match &answer.said {
        Said::Status(status) => status.lines(width),
        Said::Nothing { error } => format!("{}: {error}\n", answer.socket.display()),
    };
    let text = answers.iter().map(shown).collect::<Vec<_>>().join("\n");
    // What a process says of itself, its peer and its arbiter.
    out.write_all(outlive_node::shown(&text).as_bytes())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::super::{Server, Standing};
    use super::*;
    use crate::events::Role;
    use crate::socket::Listener;

    #[test]
    fn all_that_answer_are_listed_and_each_counts() {
        let directory = tempfile::tempdir().unwrap();
        let folders = [directory.path().join("missing"), directory.path().to_owned()];
        let error = all(&folders).unwrap_err().to_string();
        assert!(error.contains("--socket"), "{error}");
        drop(UnixListener::bind(directory.path().join("dead.sock")).unwrap());
        all(&folders).unwrap_err();

        let (a, b) = (directory.path().join("a.sock"), directory.path().join("b.sock"));
        let first = Standing::new(Role::Primary, Some("a"), "why");
        let second = Standing::new(Role::Standby, None, "none has come");
        let servers = [(&a, &first), (&b, &second)]
            .map(|(path, standing)| Server::start(Listener::bind(path).unwrap(), standing.clone()).unwrap());
        first.protected(1);
        assert_eq!((code(&one(&a).unwrap()), code(&one(&b).unwrap())), (exit::OK, exit::FAILED));
        let answers = all(&folders).unwrap();
        assert_eq!(code(&answers), exit::FAILED);
        second.protected(1);
        assert_eq!(code(&all(&folders).unwrap()), exit::OK);
        let mut out = Vec::new();
        print(&answers, false, Some(80), &mut out).unwrap();
        let text = String::from_utf8(out).unwrap();
        let heads: Vec<_> = text.split("\n\n").map(|it| it.lines().next().unwrap()).collect();
        assert!(heads[0].starts_with("a: primary, protected; "), "{text}");
        assert!(heads[1].starts_with("(no VM yet): standby, UNPROTECTED; ") && heads.len() == 2, "{text}");
        assert!(text.lines().all(|line| line.chars().count() <= 80), "{text}");
        assert_eq!(
            text.matches(&format!("\n  process:            {}\n", std::process::id())).count(),
            2,
            "{text}"
        );
        let mut out = Vec::new();
        print(&answers, true, None, &mut out).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&out).unwrap();
        assert_eq!((&json[0]["vm"], &json[1]["protected"]), (&"a".into(), &false.into()));
        assert_eq!(json[1]["socket"], b.to_str().unwrap());
        drop(servers);
        assert!(!a.exists() && !b.exists());
        assert!(one(&a).unwrap_err().to_string().contains("no socket"));
    }

    /// Clients that stay and do not read, more than a socket has room for, hold nobody up.
    #[test]
    fn clients_that_do_not_read_are_let_go() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let standing = Standing::new(Role::Primary, Some("a"), "why");
        let server = Server::start(Listener::bind(&path).unwrap(), standing).unwrap();
        let mut idle = Vec::new();
        while idle.len() < 40 {
            match socket::connect(&path) {
                Ok(client) => idle.push(client),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    thread::sleep(Duration::from_millis(5));
                }
            }
        }
        assert!(matches!(wait_for(&path), Said::Status(_)));
        for mut client in idle {
            let mut text = String::new();
            client.read_to_string(&mut text).expect("it has hung up");
            assert!(text.ends_with("}\n"), "{text}");
        }
        drop(server);
    }

    fn wait_for(path: &Path) -> Said {
        loop {
            match ask(path).unwrap() {
                Said::Nothing { .. } => thread::sleep(Duration::from_millis(5)),
                said => return said,
            }
        }
    }

    #[test]
    fn a_process_that_stands_still_is_told_of() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s.sock");
        let listener = Listener::bind(&path).unwrap();
        let waiting: Vec<_> = std::iter::from_fn(|| socket::connect(&path).ok()).collect();
        let answers = all(&[directory.path().to_owned()]).unwrap();
        assert!(matches!(&answers[0].said, Said::Nothing { error } if error.contains("stands still")));
        assert_eq!(code(&answers), exit::FAILED);
        drop((waiting, listener));
    }
}
