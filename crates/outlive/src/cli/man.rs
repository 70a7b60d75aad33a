//! `outlive man`: the manual, made of the commands themselves.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Args, Command as Tree, CommandFactory};

use super::{Cli, page};
use crate::exit;

/// `outlive man`.
#[derive(Clone, Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ManOptions {
    /// Write a page for every command to this directory instead, which is made if it is missing
    #[arg(value_name = "DIR")]
    pub directory: Option<PathBuf>,
}

const EXAMPLES: &str = "\
The Debian package has them in place: man outlive, man outlive-vm-start.

Examples:
  outlive man | man -l -                          the page of the program
  outlive man /usr/local/share/man/man1           all pages, for man outlive-run and the others";

/// Why there is no manual.
#[derive(Debug, thiserror::Error)]
enum ManError {
    /// The page cannot be shown.
    #[error("cannot print: {0}")]
    Print(#[source] io::Error),
    /// A page cannot be written.
    #[error("cannot write {}: {source}; give a directory that you may write to", .path.display())]
    Write { path: PathBuf, source: io::Error },
}

/// `outlive man`: returns the exit code.
pub(super) fn command(options: &ManOptions) -> u8 {
    let program = program();
    let done = match &options.directory {
        None => print(&program),
        Some(directory) => write(&program, directory),
    };
    match done {
        Ok(()) => exit::OK,
        Err(line) => exit::usage(line),
    }
}

/// The commands that have a page.
fn program() -> Tree {
    let mut program = Cli::command().disable_help_subcommand(true);
    // Gives every command its whole name.
    program.build();
    program
}

fn print(program: &Tree) -> Result<(), ManError> {
    let page = page::of(program, None).map_err(ManError::Print)?;
    outlive_node::printed().write_all(&page).map_err(ManError::Print)
}

fn write(program: &Tree, directory: &Path) -> Result<(), ManError> {
    fs::create_dir_all(directory).map_err(|source| ManError::Write { path: directory.to_owned(), source })?;
    each(program, None, &mut |command, outer| {
        let path = directory.join(page::file(command));
        page::of(command, outer)
            .and_then(|page| fs::write(&path, page))
            .map_err(|source| ManError::Write { path, source })
    })
}

/// Visits a command and all within it, with the one that each belongs to.
fn each<E>(
    command: &Tree,
    outer: Option<&Tree>,
    visit: &mut impl FnMut(&Tree, Option<&Tree>) -> Result<(), E>,
) -> Result<(), E> {
    visit(command, outer)?;
    command.get_subcommands().filter(|it| !it.is_hide_set()).try_for_each(|it| each(it, Some(command), visit))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::process::{Command, Output};

    use super::super::exits;
    use super::*;

    fn written() -> (tempfile::TempDir, BTreeSet<String>) {
        let directory = tempfile::tempdir().unwrap();
        write(&program(), &directory.path().join("man1")).unwrap();
        let names = fs::read_dir(directory.path().join("man1")).unwrap();
        let names = names.map(|it| it.unwrap().file_name().into_string().unwrap()).collect();
        (directory, names)
    }

    fn text(page: &Path) -> String {
        fs::read_to_string(page).unwrap()
    }

    #[test]
    fn every_command_has_a_page_with_all_sections() {
        let (directory, names) = written();
        for name in [
            "outlive.1",
            "outlive-run.1",
            "outlive-vm.1",
            "outlive-vm-start.1",
            "outlive-node-drain.1",
            "outlive-top.1",
        ] {
            assert!(names.contains(name), "{names:?}");
        }
        assert!(!names.iter().any(|it| it.contains("help") || it.contains("steward")), "{names:?}");
        for name in &names {
            let page = text(&directory.path().join("man1").join(name));
            for section in ["NAME", "SYNOPSIS", "DESCRIPTION", "EXIT STATUS", "SEE ALSO"] {
                assert_eq!(
                    page.matches(&format!(".SH \"{section}\"")).count()
                        + page.lines().filter(|it| *it == format!(".SH {section}")).count(),
                    1,
                    "{name}: {section}"
                );
            }
            assert!(!page.contains("Examples:") && !page.contains("xit codes:"), "{name}: {page}");
        }
        let page = text(&directory.path().join("man1/outlive-vm.1"));
        assert!(page.contains(".SH EXAMPLES") && page.contains("outlive vm define web web.toml"), "{page}");
        for (_, meaning) in exits::of("vm") {
            assert!(page.contains(&meaning.replace('-', "\\-")), "{page}");
        }
        assert!(page.contains("outlive\\-vm\\-start") && page.contains("docs/node.md"), "{page}");
    }

    /// What a program that reads manual pages says of one; `None` where there is none.
    fn said(program: &str, words: &[&str], page: &Path) -> Option<Output> {
        let output = Command::new(program).args(words).arg(page).env("LC_ALL", "C.UTF-8").output();
        output.inspect_err(|why| println!("skipped: no {program}: {why}")).ok()
    }

    #[test]
    fn readers_of_manual_pages_find_no_mistake() {
        let (directory, names) = written();
        let check = |page: &Path| {
            let groff = said("groff", &["-man", "-Tutf8", "-ww", "-z"], page);
            let complaint = groff.map(|it| String::from_utf8_lossy(&it.stderr).into_owned());
            let mandoc = said("mandoc", &["-Tlint", "-Werror"], page);
            let second = mandoc.map(|it| String::from_utf8_lossy(&it.stdout).into_owned());
            // Long lines of examples are what they are.
            complaint
                .into_iter()
                .chain(second)
                .flat_map(|it| {
                    it.lines()
                        .filter(|it| !it.contains("cannot adjust"))
                        .map(str::to_owned)
                        .collect::<Vec<_>>()
                })
                .collect::<Vec<_>>()
        };
        for name in &names {
            assert_eq!(check(&directory.path().join("man1").join(name)), [""; 0], "{name}");
        }
        let wrong = directory.path().join("wrong.1");
        fs::write(&wrong, text(&directory.path().join("man1/outlive.1")).replace(".SH NAME", ".SHH NAME"))
            .unwrap();
        let there = said("groff", &["-v"], Path::new("/dev/null")).is_some();
        assert!(!there || !check(&wrong).is_empty(), "the check checks nothing");
    }

    #[test]
    fn a_place_that_cannot_be_written_to_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        let why = write(&program(), &file.join("man1")).unwrap_err().to_string();
        assert!(why.contains("file/man1") && why.contains("give a directory"), "{why}");
    }
}
