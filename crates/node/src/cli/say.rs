//! How commands say what they have to say, and with which exit code.

use std::io::{self, Write};

use serde::Serialize;
use serde_json::Value;

use super::{FAILED, OK, USAGE};
use crate::api::ErrorBody;
use crate::client::ClientError;
use crate::error::{BAD_DEFINITION, BAD_NAME, NAMES};
use crate::jobs::{Job, JobState};
use crate::printed;
use crate::terminal::{shown, shown_in_line};

/// Why a command says no.
#[derive(Debug, thiserror::Error)]
pub(super) enum Said {
    /// The node does.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The node refuses what is in a file.
    #[error("{0}: {1}")]
    Definition(String, ErrorBody),
    /// No VM can have this name.
    #[error("'{0}' cannot be a VM's name: {NAMES}")]
    Name(String),
    /// Nothing can be asked.
    #[error("cannot ask anybody: {0}; let this user have more descriptors")]
    Runtime(#[source] io::Error),
    /// A variable names no host.
    #[error("OUTLIVE_HOST: {0}")]
    Host(String),
    /// A job has failed.
    #[error("{0}")]
    Failed(String),
    /// A file cannot be read.
    #[error("cannot read {0}: {1}; give another file, or - for standard input")]
    Read(String, #[source] io::Error),
    /// Definitions cannot be used; each has had its line.
    #[error("{0} of {1} definitions cannot be used: correct what the lines above say")]
    Bad(usize, usize),
    /// There are none.
    #[error("cannot read the definitions in {0}: {1}; make the directory, or give another one with --vms")]
    NoFolder(String, #[source] io::Error),
    /// Nobody would see the picture.
    #[error(
        "this is no terminal, and `outlive top` needs one: `outlive vm list` is for scripts, and so is `outlive top --once`"
    )]
    NoTerminal,
    /// The terminal has failed.
    #[error("the terminal cannot be used: {0}; `outlive vm list` needs none")]
    Terminal(#[source] io::Error),
    /// Nobody would read it.
    #[error("cannot print: {0}")]
    Print(#[source] io::Error),
}

pub(super) type Outcome = Result<(), Said>;

/// Returns the exit code, after the one line that goes with it.
pub(super) fn conclude(outcome: Outcome) -> u8 {
    let why = match outcome {
        Ok(()) => return OK,
        // Whoever reads an endless stream (a pipe into head) has what it wants.
        Err(Said::Print(why)) if why.kind() == io::ErrorKind::BrokenPipe => return OK,
        Err(why) => why,
    };
    warn(&format!("outlive: {why}"));
    match why {
        Said::Client(ClientError::Refused(error)) if ![BAD_DEFINITION, BAD_NAME].contains(&&*error.code) => {
            FAILED
        }
        Said::Failed(_) => FAILED,
        _ => USAGE,
    }
}

/// Prints an answer.
pub(super) fn print<T: Serialize>(json: bool, it: &T, text: impl FnOnce(&T) -> String) -> Outcome {
    let text = if json {
        // Plain data: this cannot fail.
        serde_json::to_string_pretty(it).expect("an answer is plain data") + "\n"
    } else {
        shown(&text(it)).into_owned()
    };
    printed().write_all(text.as_bytes()).map_err(Said::Print)
}

/// A line for standard error, whoever has said it, and if anybody still reads it.
pub(super) fn warn(line: &str) {
    let _ = writeln!(io::stderr().lock(), "{}", shown_in_line(line));
}

/// Prints a line at once, as it is. If nobody reads it any more, that is an error: a stream ends then.
pub(super) fn print_line(line: &str) -> Outcome {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}").and_then(|()| out.flush()).map_err(Said::Print)
}

/// Says what a job has come to.
pub(super) fn job(json: bool, job: Job) -> Outcome {
    if json {
        print(true, &job, |_| String::new())?;
    }
    match (job.state, &job.error) {
        (JobState::Succeeded, _) if json => Ok(()),
        (JobState::Succeeded, _) => print(false, &job, |job| result(job.result.as_ref())),
        (_, Some(error)) => Err(Said::Failed(error.to_string())),
        (_, None) => Err(Said::Failed("the job has not succeeded".into())),
    }
}

/// What was done and measured, in a line; of a drain one for each VM.
fn result(result: Option<&Value>) -> String {
    let Some(result) = result else { return "done\n".into() };
    let text = |key: &str| result[key].as_str().map(str::to_owned);
    let did = text("said").or_else(|| text("state")).or_else(|| text("end")).unwrap_or_else(|| "done".into());
    let mut lines = format!("{did} ({} ms)\n", result["took_ms"]);
    for moved in result["moved"].as_array().into_iter().flatten() {
        lines += &format!(
            "  VM {} has moved ({} ms)\n",
            moved["vm"].as_str().unwrap_or_default(),
            moved["took_ms"]
        );
    }
    for stopped in result["stopped"].as_array().into_iter().flatten() {
        lines += &format!("  VM {} has no process here any more\n", stopped.as_str().unwrap_or_default());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_says_of_its_end_has_no_control_characters() {
        let said = serde_json::json!({ "said": "the standby has\x1b[2J the VM\u{9b}\n", "took_ms": 5 });
        let shown = shown(&result(Some(&said))).into_owned();
        assert_eq!(shown, "the standby has?[2J the VM?\n (5 ms)\n");
    }

    #[test]
    fn bad_input_has_its_own_exit_code_and_no_second_remedy() {
        let error = |code: &str, remedy: &str| {
            let (code, message, remedy) =
                (code.to_owned(), "memory: too little".to_owned(), remedy.to_owned());
            ErrorBody { code, message, remedy }
        };
        let refused = |code| conclude(Err(ClientError::Refused(error(code, "wait")).into()));
        assert_eq!((refused("busy"), refused(BAD_NAME), refused(BAD_DEFINITION)), (FAILED, USAGE, USAGE));
        assert_eq!(conclude(Err(Said::Name("a b".into()))), USAGE);
        assert_eq!(conclude(Err(Said::Print(io::ErrorKind::BrokenPipe.into()))), OK);
        assert_eq!(conclude(Err(Said::Print(io::ErrorKind::StorageFull.into()))), USAGE);
        let line = Said::Definition("web.toml".into(), error(BAD_DEFINITION, "")).to_string();
        assert_eq!(line, "web.toml: memory: too little");
    }
}
