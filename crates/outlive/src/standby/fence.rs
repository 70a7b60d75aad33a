//! Fencing: a command of the operator that cuts the lost primary off from what both hosts share, before the VM
//! runs here. The generation is won by then, so the old primary has stopped as soon as it knows; the command is for
//! one that does not know yet, or whose kernel still has writes to a shared disk.
//!
//! Without a success the VM does not run: a command that fails, or takes too long, is run again. A process that is
//! started again before the first success begins with it, too: see `Start::unfenced`.

mod output;

use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::{AccessFlags, Pid, access};
use serde::{Deserialize, Serialize};

use crate::events::{Event, EventWriter};
use crate::notify;
use crate::sandbox::{self, Ending, Steward, StewardError};
use crate::status::Standing;
use output::Output;

/// Time between two looks at the command.
const LOOK: Duration = Duration::from_millis(5);
/// Time between two signs of life while nothing is done.
const SIGN: Duration = Duration::from_millis(50);
/// How long a killed command may take to end before it is left alone.
const KILLED: Duration = Duration::from_secs(1);
/// How much longer than the command may take the steward may be silent.
const SILENCE: Duration = Duration::from_secs(5);
/// The pause before the second run; it doubles with each.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What the operator has asked for.
#[derive(Clone, Debug)]
pub(crate) struct Fence {
    /// For the shell.
    pub(crate) command: String,
    /// How long one run may take.
    pub(crate) limit: Duration,
}

/// What the command is told, as variables of its environment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct About {
    pub(crate) name: String,
    pub(crate) vm: String,
    /// The generation that this host has won.
    pub(crate) generation: u64,
    /// The lost primary, as it connected, or after a restart as `--standby` names it.
    pub(crate) peer: String,
}

/// Why a run of the command is no success.
#[derive(Debug, thiserror::Error)]
enum FenceError {
    /// There is no process for it.
    #[error("the fence command cannot be run: {0}")]
    Run(#[source] io::Error),
    /// The one who has the rights for it cannot run it.
    #[error(transparent)]
    Steward(#[from] StewardError),
    /// It says so.
    #[error("the fence command failed ({0}){1}")]
    Failed(ExitStatus, LastLine),
    /// It did not get done.
    #[error("the fence command did not end within {} s and was killed{}", .0.as_secs_f32(), .1)]
    Killed(Duration, LastLine),
}

/// Why a command can never succeed. That is known long before it is needed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FenceCheckError {
    /// There is none.
    #[error("it is empty: name a command, or leave --fence out")]
    Empty,
    /// The environment of a process has no such text.
    #[error("it has a NUL byte")]
    Nul,
    /// There is no shell.
    #[error("the shell that would run it cannot be started: /bin/sh: {0}")]
    Shell(#[source] io::Error),
    /// It is no command.
    #[error("the shell does not understand it: {0}")]
    Syntax(String),
    /// There is no such program.
    #[error(
        "there is no program {0} here that may be run: a VM that this host wins would wait for it for ever"
    )]
    Missing(String),
}

/// Checks what can be known of a command before it is needed: that the shell understands it, and that the program it
/// begins with is there.
///
/// # Errors
/// See [`FenceCheckError`].
pub(crate) fn check(command: &str) -> Result<(), FenceCheckError> {
    if command.trim().is_empty() {
        return Err(FenceCheckError::Empty);
    }
    if command.contains('\0') {
        return Err(FenceCheckError::Nul);
    }
    let shell = |words: &[&str]| {
        Command::new("/bin/sh").args(words).stdin(Stdio::null()).output().map_err(FenceCheckError::Shell)
    };
    let read = shell(&["-nc", command])?;
    if !read.status.success() {
        let said = String::from_utf8_lossy(&read.stderr);
        return Err(FenceCheckError::Syntax(said.trim().replace(char::is_control, " ")));
    }
    // What the shell would make of any other first word is known when it runs. One before a bracket is a function's name.
    let mut words = command.split_whitespace();
    let first = words.next().unwrap_or_default().trim_end_matches(';');
    if words.next().is_some_and(|next| next.starts_with('(')) {
        return Ok(());
    }
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._+-".contains(c);
    let is_there = match first.contains('/') {
        true => Path::new(first).is_file() && access(first, AccessFlags::X_OK).is_ok(),
        // The shell has commands and words of its own.
        false => shell(&["-c", "command -v -- \"$1\"", "sh", first])?.status.success(),
    };
    if first.chars().all(is_plain) && !is_there {
        return Err(FenceCheckError::Missing(first.to_owned()));
    }
    Ok(())
}

/// What the command said last, if it said anything.
#[derive(Debug)]
struct LastLine(Option<String>);

impl fmt::Display for LastLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.as_ref().map_or(Ok(()), |line| write!(f, ": {line}"))
    }
}

/// What an operator's order to stop means while the command fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// There is none.
    No,
    /// Nothing is lost if this process ends.
    Now,
    /// This process has the only copy of the VM.
    Later,
}

/// Runs the command until it succeeds, and returns true; or until there is an order to stop now, and returns false.
/// Call it on the thread that decides: meanwhile it gives the process' signs of life, because a service manager that
/// kills the process would kill the only copy of the VM.
pub(crate) fn fence(
    fence: &Fence,
    about: &About,
    events: &EventWriter,
    standing: &Standing,
    stop: impl Fn() -> Stop,
) -> bool {
    let mut said = false;
    let began = Instant::now();
    let mut pause = FIRST_PAUSE;
    let since = SystemTime::now();
    standing.fencing(since, None);
    for attempt in 1_u32.. {
        tracing::info!(attempt, "fencing the lost primary");
        match run(fence, about, attempt, &stop) {
            Ok(()) => {
                let took_ms = began.elapsed().as_millis() as u64;
                tracing::info!(attempt, took_ms, "fenced");
                standing.fenced();
                events.emit(Event::PeerFenced { attempt, took_ms });
                return true;
            }
            Err(error) => {
                let why = error.to_string();
                tracing::error!(attempt, "the VM does not run yet: {why}; running it again");
                standing.fencing(since, Some(&why));
                events.emit(Event::FenceFailed { attempt, why });
            }
        }
        rest(pause, &stop);
        match stop() {
            Stop::Now => return false,
            Stop::Later if !std::mem::replace(&mut said, true) => tracing::warn!(
                "told to stop, but this process has the only copy of the VM: it ends in order once the fence command has \
                 succeeded and the VM runs"
            ),
            _ => {}
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    // Nobody counts that far.
    false
}

fn rest(pause: Duration, stop: &impl Fn() -> Stop) {
    let until = Instant::now() + pause;
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        notify::alive();
        if stop() == Stop::Now {
            return;
        }
        std::thread::sleep(left.min(SIGN));
    }
}

fn run(fence: &Fence, about: &About, attempt: u32, stop: &impl Fn() -> Stop) -> Result<(), FenceError> {
    let (mut output, to) = Output::open(attempt).map_err(FenceError::Run)?;
    let mut signs = || {
        notify::alive();
        output.drain();
    };
    let ending = match sandbox::steward() {
        Some(steward) => {
            let signs = || {
                signs();
                stop() == Stop::Now
            };
            ask(steward, about, (attempt, fence.limit), to.into(), signs)?
        }
        None => run_fence_command(fence, about, attempt, to.into(), signs).map_err(FenceError::Run)?,
    };
    match ending {
        Ending::Exited(status) if status.success() => {
            output.finish();
            Ok(())
        }
        Ending::Exited(status) => Err(FenceError::Failed(status, LastLine(output.finish()))),
        Ending::Killed => Err(FenceError::Killed(fence.limit, LastLine(output.finish()))),
    }
}

/// Has the steward run the command that the command line named. It keeps the time limit, and is given some time more
/// for that: it may be stopped, or its disk may not answer. `signs` says whether nobody waits any more.
fn ask(
    steward: &Steward,
    about: &About,
    (attempt, limit): (u32, Duration),
    to: OwnedFd,
    mut signs: impl FnMut() -> bool,
) -> Result<Ending, StewardError> {
    let pending = steward.fence(about, attempt, to.as_fd())?;
    drop(to);
    let until = Instant::now() + limit + KILLED + SILENCE;
    loop {
        if signs() || Instant::now() >= until {
            return Err(StewardError::Silent);
        }
        if let Some(ending) = pending.ended_within(LOOK)? {
            return Ok(ending);
        }
    }
}

/// Runs the command once, with the rights of this process. Whatever it says goes into `to`; `signs` is called all
/// the time.
///
/// # Errors
/// There is no process for it.
pub(crate) fn run_fence_command(
    fence: &Fence,
    about: &About,
    attempt: u32,
    to: OwnedFd,
    mut signs: impl FnMut(),
) -> io::Result<Ending> {
    let mut child = start(fence, about, attempt, to)?;
    if let Some(status) = ends_within(&mut child, fence.limit, &mut signs) {
        return Ok(Ending::Exited(status));
    }
    // Fails only if it has just ended.
    let _ = killpg(Pid::from_raw(child.id() as i32), Signal::SIGKILL);
    ends_within(&mut child, KILLED, &mut signs);
    Ok(Ending::Killed)
}

/// Starts it. The standard library gives a child no blocked signal and the usual effect of SIGPIPE.
fn start(fence: &Fence, about: &About, attempt: u32, to: OwnedFd) -> io::Result<Child> {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", &fence.command]).stdin(Stdio::null()).stdout(to.try_clone()?).stderr(to);
    command.env("OUTLIVE_VM", &about.name).env("OUTLIVE_VM_ID", &about.vm).env("OUTLIVE_PEER", &about.peer);
    command.env("OUTLIVE_GENERATION", about.generation.to_string());
    command.env("OUTLIVE_ATTEMPT", attempt.to_string());
    // A group of its own, so that it can be killed with its children.
    command.process_group(0).spawn()
}

/// Waits for the end of the command itself, not for that of its children, who may hold the pipe open.
fn ends_within(child: &mut Child, limit: Duration, signs: &mut impl FnMut()) -> Option<ExitStatus> {
    let until = Instant::now() + limit;
    loop {
        signs();
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => std::thread::sleep(LOOK),
            _ => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about() -> About {
        let (name, vm, peer) = ("shop".into(), "0123".into(), "10.0.0.1:40000".into());
        About { name, vm, generation: 7, peer }
    }

    #[test]
    fn the_command_is_told_what_it_is_about() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let words = "$OUTLIVE_VM $OUTLIVE_VM_ID $OUTLIVE_GENERATION $OUTLIVE_PEER $OUTLIVE_ATTEMPT";
        let command = format!("echo {words} > {}", out.display());
        run(&Fence { command, limit: Duration::from_secs(60) }, &about(), 3, &|| Stop::No).unwrap();
        assert_eq!(std::fs::read_to_string(out).unwrap(), "shop 0123 7 10.0.0.1:40000 3\n");
    }

    #[test]
    fn a_command_that_fails_hangs_or_is_missing_is_no_success() {
        let fails = |command: &str, limit| {
            run(&Fence { command: command.into(), limit }, &about(), 1, &|| Stop::No).unwrap_err().to_string()
        };
        let long = Duration::from_secs(60);
        assert!(fails("exit 3", long).contains("exit status: 3"));
        assert!(fails("kill -9 $$", long).contains("signal: 9"));
        assert!(fails("/no/such/command", long).contains("exit status: 127"));
        // Its children go with it.
        let began = Instant::now();
        let why = fails("sleep 600 & sleep 600; true", Duration::from_millis(100));
        assert!(why.contains("did not end within 0.1 s"), "{why}");
        assert!(began.elapsed() < long);
    }

    #[test]
    fn a_command_that_could_never_succeed_is_refused_at_once() {
        let why = |command: &str| check(command).unwrap_err().to_string();
        for missing in ["/no/such/command --off", "no-such-command; true", "/etc/passwd"] {
            let first = missing.split([' ', ';']).next().unwrap();
            assert!(
                why(missing).starts_with(&format!("there is no program {first} here")),
                "{}",
                why(missing)
            );
        }
        assert!(
            why("if true; then").starts_with("the shell does not understand it: "),
            "{}",
            why("if true; then")
        );
        assert!(why(" \t").starts_with("it is empty"));
        assert!(why("true\0").starts_with("it has a NUL"));
        for good in [
            "true",
            "exit 3",
            "cd / && true",
            "if true; then false; fi",
            "X=1 no-matter",
            "\"$HOME\"/x",
            "(true)",
            "off () { no-such-command; }; off",
            "off() { true; }; off",
        ] {
            check(good).unwrap_or_else(|error| panic!("{good}: {error}"));
        }
    }

    #[test]
    fn what_the_command_says_is_in_the_reason_and_nothing_that_it_says_stops_it() {
        let long = Duration::from_secs(60);
        let run =
            |command: &str, limit| run(&Fence { command: command.into(), limit }, &about(), 1, &|| Stop::No);
        let why = |command: &str, limit| run(command, limit).unwrap_err().to_string();
        let said = why("echo first; echo the controller says no >&2; exit 3", long);
        assert!(said.ends_with("(exit status: 3): the controller says no"), "{said}");
        let said = why("printf 'no answer\\033[2J yet'; sleep 600", Duration::from_millis(300));
        assert!(said.ends_with("was killed: no answer [2J yet"), "{said}");
        // Far more than a pipe holds, in one line and in many.
        run("head -c 1000000 /dev/zero | tr '\\0' x; seq 200000; seq 200000 >&2", long).unwrap();
        assert!(why("yes", Duration::from_millis(300)).ends_with("was killed: y"));
        // A child that keeps the pipe keeps nobody.
        let began = Instant::now();
        run("echo started; sleep 30 & exit 0", long).unwrap();
        assert!(began.elapsed() < Duration::from_secs(20));
    }
}
