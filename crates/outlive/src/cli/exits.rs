//! What every command's exit codes mean: one table, which `--help`, the manual pages and docs/exit-codes.md show.

use std::fmt::Write as _;

/// Exit codes and what they mean.
pub type Codes = &'static [(u8, &'static str)];

const BAD: &str = "wrong options, or something missing on this machine: one line says what to do";
const ELSEWHERE: &str = "another host won the VM, and this process does not wait as its standby";

const DONE: Codes = &[(0, "done"), (2, "wrong options, or it cannot be done: one line says what to do")];
const ASKS: Codes = &[
    (0, "done"),
    (1, "the node refuses, or it has failed"),
    (2, "wrong options or definitions, or nobody answers: one line says what to do"),
];
const WORD: Codes = &[(0, "done"), (2, "wrong options, refused, or nobody to speak with")];

/// The commands with their codes. One without a row has those of the command that it belongs to.
pub const TABLE: &[(&str, Codes)] = &[
    ("", &[(0, "help or the version was asked for"), (2, "no command, or an unknown one")]),
    (
        "run",
        &[
            (0, "the VM ended in order: its guest was shut down, or this process was told to stop"),
            (1, "the VM or its host failed, or the guest crashed"),
            (2, BAD),
            (3, ELSEWHERE),
        ],
    ),
    (
        "standby",
        &[(0, "ended in order, also when its guest crashed"), (1, "it failed"), (2, BAD), (3, ELSEWHERE)],
    ),
    (
        "status",
        &[
            (0, "every VM is protected"),
            (1, "one is not, or its process does not answer"),
            (2, "wrong options, or nobody to ask"),
        ],
    ),
    (
        "metrics",
        &[
            (0, "done, or told to stop"),
            (2, "wrong options, nobody to ask, or an address that cannot be used"),
        ],
    ),
    (
        "console",
        &[
            (0, "detached, or the VM does not run here any more"),
            (1, "the console was lost"),
            (2, "wrong options, or no console there"),
        ],
    ),
    ("hand-over", &[(0, "the standby has the VM"), (2, "wrong options, refused, or nobody to speak with")]),
    ("take-over", WORD),
    ("go-on-alone", WORD),
    ("give-up", WORD),
    ("node", ASKS),
    (
        "node run",
        &[(0, "told to stop; the VMs run on"), (2, "wrong options, or a place that cannot be used")],
    ),
    (
        "node check",
        &[
            (0, "all definitions can be used, also with warnings"),
            (2, "one cannot: a line for each says why"),
        ],
    ),
    (
        "node drain",
        &[
            (0, "no VM runs here any more"),
            (1, "a VM stays, or it was cancelled"),
            (2, "wrong options, or nobody answers"),
        ],
    ),
    (
        "node events",
        &[
            (1, "the node refuses"),
            (2, "wrong options, or nobody answers; a node that goes later is waited for"),
        ],
    ),
    ("vm", ASKS),
    (
        "top",
        &[
            (0, "its user, or a signal, has ended it; or the picture is printed"),
            (1, "the node refuses"),
            (2, "wrong options, no terminal, or nobody answers; a node that goes later is waited for"),
        ],
    ),
    ("arbiter", DONE),
    ("arbiter serve", &[(0, "told to stop"), (2, BAD)]),
    ("keys", DONE),
    ("image", DONE),
    (
        "history",
        &[
            (0, "done"),
            (1, "a part of the record cannot be read"),
            (2, "wrong options, or there is no record"),
        ],
    ),
    (
        "rewind",
        &[
            (0, "the VM ended in order: its guest was shut down, or this process was told to stop"),
            (1, "the VM or its host failed, or the guest crashed"),
            (
                2,
                "wrong options, no such moment, or something missing on this machine: one line says what to do",
            ),
        ],
    ),
    (
        "demo",
        &[
            (0, "nothing was lost, duplicated or broken"),
            (1, "something was"),
            (2, BAD),
            (130, "ended by Ctrl-C"),
        ],
    ),
    ("check", &[(0, "VMs can run here"), (2, "wrong options, or something essential is missing")]),
    (
        "doctor",
        &[
            (0, "no error was found, perhaps warnings"),
            (1, "an error was found: on a host, or between both"),
            (2, "wrong options, or the other host cannot be asked: one line says what to do"),
        ],
    ),
    ("completions", DONE),
    ("man", DONE),
];

/// The codes of a command, for example of `vm start`.
pub fn of(command: &str) -> Codes {
    let mut asked = command;
    loop {
        if let Some((_, codes)) = TABLE.iter().find(|(command, _)| *command == asked) {
            return codes;
        }
        asked = asked.rsplit_once(' ').map_or("", |(outer, _)| outer);
    }
}

/// As `--help` shows them.
pub(super) fn help(codes: Codes) -> String {
    let mut text = String::from("Exit codes:");
    for (code, meaning) in codes {
        // Writing to a string does not fail.
        write!(text, "\n  {code:<3} {meaning}").ok();
    }
    text
}

/// As docs/exit-codes.md has them.
pub fn markdown() -> String {
    let mut text = String::from("| command | code | meaning |\n|---|---|---|\n");
    for (command, codes) in TABLE {
        for (at, (code, meaning)) in codes.iter().enumerate() {
            let shown = match (at, command.is_empty()) {
                (0, true) => "`outlive`".to_owned(),
                (0, false) => format!("`outlive {command}`"),
                _ => String::new(),
            };
            writeln!(text, "| {shown} | {code} | {meaning} |").ok();
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::Cli;
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn every_row_is_a_command_and_every_command_has_codes() {
        for (row, codes) in TABLE {
            let mut command = &Cli::command();
            for word in row.split_whitespace() {
                command = command.find_subcommand(word).unwrap_or_else(|| panic!("outlive {row}"));
            }
            assert!(codes.is_sorted_by(|a, b| a.0 < b.0), "{row}");
        }
        for command in Cli::command().get_subcommands().filter(|it| !it.is_hide_set()) {
            let name = command.get_name();
            assert!(TABLE.iter().any(|(row, _)| *row == name), "{name} has no row");
        }
        assert_eq!(of("vm start"), of("vm"));
        assert_ne!(of("node check"), of("node status"));
    }

    #[test]
    fn the_book_has_the_table() {
        let book = include_str!("../../../../docs/exit-codes.md");
        assert!(book.contains(&markdown()), "docs/exit-codes.md is not this table:\n{}", markdown());
    }
}
