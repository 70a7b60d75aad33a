//! Runs the programs that do the work.

use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// After this silence, checks whether the command has ended; if it has, and the same time passes again, its
/// output counts as complete.
const PATIENCE: Duration = Duration::from_secs(2);

/// A test program that prints nothing for this long has hung: it prints a line for each test, and no test takes half
/// as long.
const SILENCE: Duration = Duration::from_mins(8);

/// Why a command of xtask failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StepError {
    /// A program could not be started.
    #[error("cannot start {program}: {source}")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A program ran and failed; its own output says why.
    #[error("{0} failed")]
    Failed(String),
    /// A file or directory could not be used.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Some of several checks failed.
    #[error("{count} checks:\n  {failed}")]
    Checks {
        /// How many.
        count: usize,
        /// Which checks, one a line.
        failed: String,
    },
    /// Tests failed; the summary has been printed.
    #[error("tests failed")]
    TestsFailed,
    /// It cannot be done here, or not with these arguments.
    #[error("{0}")]
    Unusable(String),
}

impl StepError {
    /// 2 for something that the caller can change, 1 for a failure.
    pub(crate) fn exit_code(&self) -> u8 {
        if matches!(self, StepError::Unusable(_)) { 2 } else { 1 }
    }
}

/// Paths of the sources and the build results.
pub(crate) struct Workspace {
    pub(crate) root: PathBuf,
    pub(crate) target: PathBuf,
}

impl Workspace {
    pub(crate) fn find() -> Workspace {
        // xtask is used where it was compiled: cargo compiles it again in a checkout that was moved.
        let root =
            Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask is in the workspace").to_path_buf();
        let target = match std::env::var_os("CARGO_TARGET_DIR") {
            Some(directory) => root.join(directory),
            None => root.join("target"),
        };
        Workspace { root, target }
    }

    /// The cargo that runs xtask, in the workspace.
    pub(crate) fn cargo<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Command {
        let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        command.args(arguments).current_dir(&self.root);
        command
    }
}

/// The same command, which lets all others go first.
pub(crate) fn niced(command: &Command) -> Command {
    let mut niced = Command::new("nice");
    niced.args(["-n", "10"]).arg(command.get_program()).args(command.get_args());
    command.get_current_dir().map(|directory| niced.current_dir(directory));
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => niced.env(name, value),
            None => niced.env_remove(name),
        };
    }
    niced
}

/// The command as a line for people, without the environment.
pub(crate) fn describe(command: &Command) -> String {
    let program = Path::new(command.get_program()).file_name().unwrap_or_default();
    let words = std::iter::once(program).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}

fn start_error(command: &Command, source: io::Error) -> StepError {
    StepError::Start { program: command.get_program().to_string_lossy().into_owned(), source }
}

/// Runs a command that must succeed; its output goes to ours.
pub(crate) fn step(command: &mut Command) -> Result<(), StepError> {
    eprintln!("==> {}", describe(command));
    let status = command.stdin(Stdio::null()).status().map_err(|source| start_error(command, source))?;
    if status.success() { Ok(()) } else { Err(StepError::Failed(describe(command))) }
}

/// What a command says.
pub(crate) enum Said<'a> {
    /// One line.
    Line(&'a str),
    /// Nothing for this long; what it had started is ended.
    Nothing(Duration),
}

/// Runs a command that starts one test program after another, and passes every line of its output to `said`,
/// after printing it. A program that hangs is ended, and the rest runs: a time limit of the whole run would not say
/// which it was.
///
/// Standard output and standard error come through one pipe, so that cargo's line about a test program
/// precedes the program's output.
pub(crate) fn lines(command: &mut Command, mut said: impl FnMut(Said<'_>)) -> Result<ExitStatus, StepError> {
    eprintln!("==> {}", describe(command));
    watch(command, SILENCE, |it| {
        if let Said::Line(text) = it {
            println!("{text}");
        }
        said(it);
    })
}

/// The same without printing and however long it says nothing.
pub(crate) fn collect(command: &mut Command, mut line: impl FnMut(&str)) -> Result<ExitStatus, StepError> {
    watch(command, Duration::MAX, |said| {
        if let Said::Line(text) = said {
            line(text);
        }
    })
}

fn watch(
    command: &mut Command,
    silence: Duration,
    mut said: impl FnMut(Said<'_>),
) -> Result<ExitStatus, StepError> {
    let (output, input) = io::pipe().map_err(|source| start_error(command, source))?;
    let errors = input.try_clone().map_err(|source| start_error(command, source))?;
    let started = command.stdin(Stdio::null()).stdout(input).stderr(errors).spawn();
    // The command holds our ends of the pipe; without dropping them the reader would never see the end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = started.map_err(|source| start_error(command, source))?;
    let (sender, received) = channel();
    thread::spawn(move || send_lines(output, &sender));
    let mut ended = None;
    let mut heard = Instant::now();
    loop {
        match received.recv_timeout(PATIENCE) {
            Ok(text) => {
                heard = Instant::now();
                said(Said::Line(&text));
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) if ended.is_some() => {
                eprintln!(
                    "xtask: a process that a test left behind still holds its output; going on without it"
                );
                break;
            }
            Err(RecvTimeoutError::Timeout) => {
                ended = child.try_wait().map_err(|source| start_error(command, source))?;
                if ended.is_none() && heard.elapsed() >= silence {
                    heard = Instant::now();
                    said(Said::Nothing(silence));
                    end_what_it_started(child.id());
                }
            }
        }
    }
    child.wait().map_err(|source| start_error(command, source))
}

/// Ends the children of a process of ours, and theirs.
fn end_what_it_started(parent: u32) {
    for child in children(parent) {
        end_what_it_started(child);
        let _ = kill(Pid::from_raw(child.cast_signed()), Signal::SIGKILL);
    }
}

fn children(parent: u32) -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{parent}/task")) else { return Vec::new() };
    let lists = threads.flatten().filter_map(|it| std::fs::read_to_string(it.path().join("children")).ok());
    lists
        .flat_map(|list| list.split_whitespace().filter_map(|it| it.parse().ok()).collect::<Vec<_>>())
        .collect()
}

/// Lines are bytes up to this point, because tests may print anything.
pub(crate) fn send_lines(output: impl Read, sender: &Sender<String>) {
    let mut output = BufReader::new(output);
    let mut bytes = Vec::new();
    while output.read_until(b'\n', &mut bytes).is_ok_and(|length| length > 0) {
        let text = String::from_utf8_lossy(&bytes).trim_end_matches(['\n', '\r']).to_string();
        if sender.send(text).is_err() {
            return;
        }
        bytes.clear();
    }
}

/// Runs a command for its standard output. `None` if it could not be started or failed.
pub(crate) fn output(command: &mut Command) -> Option<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> (Vec<String>, ExitStatus) {
        let mut seen = Vec::new();
        let mut command = Command::new("sh");
        let status = collect(command.args(["-c", script]), |line| seen.push(line.to_string())).unwrap();
        (seen, status)
    }

    #[test]
    fn both_outputs_come_in_order_with_the_exit_status() {
        let (seen, status) = shell("echo one; echo two >&2; printf 'th\\377ree\\r\\n'; printf four; exit 3");
        assert_eq!(seen, ["one", "two", "th\u{fffd}ree", "four"]);
        assert_eq!(status.code(), Some(3));
    }

    #[test]
    fn a_niced_command_is_the_same_command() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo $(nice) $OUTLIVE_A ${OUTLIVE_B:-none} $PWD"]).current_dir("/usr");
        command.env("OUTLIVE_A", "a").env("OUTLIVE_B", "b").env_remove("OUTLIVE_B");
        let before: i32 = output(&mut Command::new("nice")).unwrap().trim().parse().unwrap();
        let line = output(&mut niced(&command)).unwrap();
        assert_eq!(line.trim(), format!("{} a none /usr", (before + 10).min(19)));
    }

    #[test]
    fn what_hangs_is_ended_and_the_rest_runs() {
        let script = "echo one; sh -c 'sleep 3600; true'; echo $?; sleep 3600; echo three";
        let (mut seen, mut hung) = (Vec::new(), 0);
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        let status = watch(&mut command, Duration::from_secs(1), |said| match said {
            Said::Line(line) => seen.push(line.to_string()),
            Said::Nothing(_) => hung += 1,
        });
        assert!(status.unwrap().success());
        // The shell itself says that its child was killed.
        seen.retain(|line| !line.contains("Killed"));
        assert_eq!((seen, hung), (vec!["one".to_owned(), "137".to_owned(), "three".to_owned()], 2));
    }

    #[test]
    fn a_process_left_behind_does_not_hold_us() {
        let start = std::time::Instant::now();
        let (seen, status) = shell("sleep 60 & echo pid $!; exit 0");
        assert!(status.success() && start.elapsed() < Duration::from_secs(30));
        let pid = seen[0].strip_prefix("pid ").unwrap();
        assert!(Command::new("kill").arg(pid).status().unwrap().success(), "our own sleep was still there");
    }
}
