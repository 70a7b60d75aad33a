//! `outlive completions`: what makes a shell complete the words of a command line.
//!
//! The shell asks this program itself, so what it offers is what this release knows, and names of VMs are those that
//! are there now.

use std::io::{self, Write};

use clap::{Args, ValueEnum};
use clap_complete::CompleteEnv;
use clap_complete::env::{Bash, EnvCompleter, Fish, Shells, Zsh};

use super::tree;
use crate::exit;

/// With this variable in its environment, the program completes a word for the shell that it names.
const ASKED: &str = "OUTLIVE_COMPLETE";
const PROGRAM: &str = "outlive";

/// A shell.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// GNU Bash
    Bash,
    /// the Z shell
    Zsh,
    /// fish
    Fish,
}

/// `outlive completions`.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CompletionsOptions {
    /// The shell
    pub shell: Shell,
}

const EXAMPLES: &str = "\
The Debian package has them in place. Names of VMs are completed where the node may be asked, or its definitions read.

Examples:
  source <(outlive completions bash)                                            for this shell
  outlive completions bash > /usr/share/bash-completion/completions/outlive     for everybody, with bash-completion
  outlive completions zsh > /usr/local/share/zsh/site-functions/_outlive
  outlive completions fish > /etc/fish/completions/outlive.fish";

/// What a file whose name is the function's needs so that the first word is completed, too.
const AUTOLOADED: &str = "
if [[ \"$funcstack[1]\" = _outlive ]]; then
    _clap_dynamic_completer_outlive \"$@\"
fi
";

fn script(shell: Shell) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let shell_is: &dyn EnvCompleter = match shell {
        Shell::Bash => &Bash,
        Shell::Zsh => &Zsh,
        Shell::Fish => &Fish,
    };
    shell_is.write_registration(ASKED, PROGRAM, PROGRAM, PROGRAM, &mut text)?;
    if shell == Shell::Zsh {
        text.extend(AUTOLOADED.as_bytes());
    }
    Ok(text)
}

/// `outlive completions`: returns the exit code.
pub(super) fn command(options: &CompletionsOptions) -> u8 {
    match script(options.shell).and_then(|text| outlive_node::printed().write_all(&text)) {
        Ok(()) => exit::OK,
        Err(error) => exit::usage(format!("cannot print: {error}")),
    }
}

/// Completes a word, if it is a shell that asks. Comes before the first thread, and before anything is printed.
///
/// # Errors
/// Another shell asks, or in a way that only another release knows.
pub fn complete() -> clap::error::Result<bool> {
    let here = std::env::current_dir().ok();
    CompleteEnv::with_factory(tree)
        .var(ASKED)
        .shells(Shells(&[&Bash, &Zsh, &Fish]))
        .try_complete(std::env::args_os(), here.as_deref())
}
