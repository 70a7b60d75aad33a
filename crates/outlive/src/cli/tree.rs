//! The tree of all commands, as people see it.

use clap::{Command as Tree, CommandFactory, FromArgMatches};

use super::{Cli, exits};

/// The program's commands. The help of each ends with what its exit codes mean.
pub fn tree() -> Tree {
    with_exits(Cli::command(), "")
}

fn with_exits(command: Tree, path: &str) -> Tree {
    let codes = exits::help(exits::of(path));
    let help = match command.get_after_help() {
        Some(help) => format!("{help}\n\n{codes}"),
        None => codes,
    };
    command.after_help(help).mut_subcommands(|inner| {
        let path = format!("{path} {}", inner.get_name());
        with_exits(inner, path.trim_start())
    })
}

impl Cli {
    /// Reads the command line of this process.
    ///
    /// # Errors
    /// It is wrong, or asks for help.
    pub fn read() -> clap::error::Result<Self> {
        Self::from_arg_matches(&tree().try_get_matches()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn helps(command: &Tree, path: &str, check: &dyn Fn(&str, &str)) {
        let help = command.clone().render_long_help().to_string();
        check(path, &help);
        for inner in command.get_subcommands().filter(|it| !it.is_hide_set() && it.get_name() != "help") {
            helps(inner, format!("{path} {}", inner.get_name()).trim(), check);
        }
    }

    #[test]
    fn every_help_ends_with_the_exit_codes() {
        helps(&tree(), "", &|path, help| {
            assert!(help.trim_end().ends_with(&exits::help(exits::of(path))), "{path}: {help}");
            assert_eq!(help.matches("xit code").count(), exits_named(path), "{path}: {help}");
        });
    }

    /// How often a help may speak of exit codes: in the table, and where an option is about them.
    fn exits_named(path: &str) -> usize {
        match path {
            // --once and --listen.
            "standby" | "run" | "hand-over" => 2,
            _ => 1,
        }
    }
}
