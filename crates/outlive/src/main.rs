//! The `outlive` program: reads the command line and hands over to the command.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::error::ErrorKind;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use outlive::cli::{self, Cli};
use outlive::{exit, logs};

fn main() -> ExitCode {
    logs::end_with_a_panic();
    match cli::complete() {
        Ok(false) => {}
        Ok(true) => return ExitCode::SUCCESS,
        Err(error) => return ExitCode::from(exit::usage(outlive_node::one_line(&error))),
    }
    let cli = match Cli::read() {
        Ok(cli) => cli,
        // Help and version are no errors, and a call without arguments gets the help.
        Err(answer)
            if !answer.use_stderr()
                || answer.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand =>
        {
            answer.exit()
        }
        Err(error) => return ExitCode::from(exit::usage(one_line(&error))),
    };
    logs::init();
    no_core_dumps();
    let code = cli.command.execute();
    logs::finish();
    ExitCode::from(code)
}

/// A core dump would contain the guest's secrets, and would keep the links open until it is written, so a
/// standby would learn late that this side is gone. A limit of one byte also stops dumps into a pipe, which a
/// limit of 0 does not (core(5); fs/coredump.c).
fn no_core_dumps() {
    let limited = getrlimit(Resource::RLIMIT_CORE)
        .and_then(|(_, most)| setrlimit(Resource::RLIMIT_CORE, most.min(1), most));
    if let Err(error) = limited {
        tracing::warn!(%error, "this process may leave a core dump");
    }
}

/// What is wrong with the command line, and where help is.
fn one_line(error: &clap::Error) -> String {
    format!("{}; --help shows what is possible", outlive_node::one_line(error))
}
