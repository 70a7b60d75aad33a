//! Short commands of the program, which the node runs and waits for.

use std::io::{self, Read as _};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// The most that is heard of a command, in bytes: what a pipe holds. One that says more does not end, and is killed.
const LONGEST: u64 = 64 << 10;

/// Which words of a command count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hears {
    /// Output and errors, as they come.
    Everything,
    /// Output only.
    Output,
}

/// Runs a short command: whether it succeeded, and its words. `None`: it did not end in time and was killed.
pub(crate) fn run(mut command: Command, hears: Hears, most: Duration) -> io::Result<(Option<bool>, String)> {
    let (words, theirs) = io::pipe()?;
    let errors = match hears {
        Hears::Everything => Stdio::from(theirs.try_clone()?),
        Hears::Output => Stdio::null(),
    };
    let mut child = command.stdin(Stdio::null()).stdout(theirs).stderr(errors).spawn()?;
    // Its ends of the pipe.
    drop(command);
    let began = Instant::now();
    let ended = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status.success());
        }
        if began.elapsed() > most {
            child.kill()?;
            // One that waits in the kernel, for a mount that is dead, ends when that answers.
            thread::spawn(move || child.wait());
            break None;
        }
        thread::sleep(Duration::from_millis(5));
    };
    Ok((ended, at_hand(words)?))
}

/// What is in a pipe by now. A process that the command has left behind may keep it open for ever.
fn at_hand(pipe: io::PipeReader) -> io::Result<String> {
    fcntl(&pipe, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let mut words = Vec::new();
    match pipe.take(LONGEST).read_to_end(&mut words) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(String::from_utf8_lossy(&words).into_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn words_are_heard_and_nobody_is_waited_for_for_ever() {
        let patience = Duration::from_secs(60);
        let both = run(shell("echo a; echo b >&2; exit 3"), Hears::Everything, patience).unwrap();
        assert_eq!(both, (Some(false), "a\nb\n".into()));
        let output = run(shell("echo a; echo b >&2"), Hears::Output, patience).unwrap();
        assert_eq!(output, (Some(true), "a\n".into()));
        let (ended, said) =
            run(shell("echo a; exec sleep 1000"), Hears::Output, Duration::from_secs(1)).unwrap();
        assert_eq!((ended, said.as_str()), (None, "a\n"));
    }
}
