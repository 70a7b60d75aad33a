//! One page of the manual.

use std::io::{self, Write};

use clap::Command as Tree;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, roman};

use super::exits;

const SECTION: &str = "1";
const HOME: &str = "https://github.com/outlive-vm/outlive";

/// Which documents say more about a command. One without a row has those of the command that it belongs to.
const DOCUMENTS: &[(&str, &[&str])] = &[
    ("", &["README.md", "docs/exit-codes.md"]),
    ("run", &["docs/linux-guest.md", "docs/policies.md", "docs/devices.md", "docs/systemd.md"]),
    ("standby", &["docs/linux-guest.md", "docs/systemd.md"]),
    ("status", &["docs/linux-guest.md", "docs/metrics.md"]),
    ("metrics", &["docs/metrics.md"]),
    ("console", &["docs/linux-guest.md"]),
    ("hand-over", &["docs/upgrade.md", "docs/systemd.md"]),
    ("take-over", &["docs/arbitration.md"]),
    ("go-on-alone", &["docs/arbitration.md"]),
    ("give-up", &["docs/arbitration.md"]),
    ("node", &["docs/node.md"]),
    ("vm", &["docs/node.md"]),
    ("top", &["docs/node.md"]),
    ("arbiter", &["docs/arbitration.md"]),
    ("keys", &["docs/trust.md"]),
    ("image", &["docs/linux-guest.md"]),
    ("history", &["docs/time-machine.md"]),
    ("rewind", &["docs/time-machine.md"]),
    ("demo", &["docs/measuring.md"]),
    ("check", &["docs/operations.md"]),
    ("doctor", &["docs/operations.md"]),
];

/// The name of a page's file.
pub(super) fn file(command: &Tree) -> String {
    format!("{}.{SECTION}", name(command))
}

/// A command as pages are called, for example `outlive-vm-start`.
fn name(command: &Tree) -> &str {
    command.get_display_name().unwrap_or_else(|| command.get_name())
}

/// The page of a command, which belongs to another one.
pub(super) fn of(command: &Tree, outer: Option<&Tree>) -> io::Result<Vec<u8>> {
    let man = Man::new(command.clone()).section(SECTION);
    let path = command.get_bin_name().unwrap_or_default();
    let path = path.strip_prefix("outlive").unwrap_or(path).trim_start();
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    let (notes, examples) = parts(&help);
    let mut page = Vec::new();
    // Without a date: the same tree makes the same page. The crate would leave the field out, and move the others.
    writeln!(page, ".TH {} {SECTION} \"\" \"outlive {}\" Outlive", name(command), env!("CARGO_PKG_VERSION"))?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    paragraphs(&notes, &mut page)?;
    if command.get_arguments().any(|it| !it.is_hide_set()) {
        man.render_options_section(&mut page)?;
    }
    if command.get_subcommands().any(|it| !it.is_hide_set()) {
        man.render_subcommands_section(&mut page)?;
    }
    codes(path, &mut page)?;
    if !examples.is_empty() {
        verbatim(&examples, &mut page)?;
    }
    see_also(command, outer, path, &mut page)?;
    Ok(page)
}

/// What is under a help: its paragraphs, and its examples, which are indented.
fn parts(help: &str) -> (Vec<String>, Vec<&str>) {
    let (mut notes, mut examples, mut among) = (vec![String::new()], Vec::new(), false);
    for line in help.lines() {
        among = line == "Examples:" || among && (line.is_empty() || line.starts_with("  "));
        match line {
            "Examples:" => {}
            _ if among => examples.push(line.strip_prefix("  ").unwrap_or(line)),
            "" => notes.push(String::new()),
            _ => notes.last_mut().into_iter().for_each(|it| *it = format!("{it} {line}").trim().to_owned()),
        }
    }
    while examples.last().is_some_and(|it| it.is_empty()) {
        examples.pop();
    }
    notes.retain(|it| !it.is_empty());
    (notes, examples)
}

fn paragraphs(notes: &[String], page: &mut dyn Write) -> io::Result<()> {
    let mut roff = Roff::default();
    for note in notes {
        roff.control("PP", []);
        roff.text([roman(note)]);
    }
    roff.to_writer(page)
}

fn codes(path: &str, page: &mut dyn Write) -> io::Result<()> {
    let mut roff = Roff::default();
    roff.control("SH", ["EXIT STATUS"]);
    for (code, meaning) in exits::of(path) {
        roff.control("TP", []);
        roff.text([bold(code.to_string())]);
        roff.text([roman(*meaning)]);
    }
    roff.to_writer(page)
}

fn verbatim(lines: &[&str], page: &mut dyn Write) -> io::Result<()> {
    let mut roff = Roff::default();
    roff.control("SH", ["EXAMPLES"]);
    roff.control("EX", []);
    for line in lines {
        roff.text([roman(*line)]);
    }
    roff.control("EE", []);
    roff.to_writer(page)
}

fn see_also(command: &Tree, outer: Option<&Tree>, path: &str, page: &mut dyn Write) -> io::Result<()> {
    let inner = command.get_subcommands().filter(|it| !it.is_hide_set()).map(name);
    let mut pages: Vec<&str> = outer.map(name).into_iter().chain(inner).collect();
    if !path.is_empty() && !pages.contains(&"outlive") {
        pages.push("outlive");
    }
    pages.sort_unstable();
    let mut roff = Roff::default();
    roff.control("SH", ["SEE ALSO"]);
    let mut line = Vec::new();
    for (at, page) in pages.iter().enumerate() {
        line.extend([roman(if at == 0 { "" } else { ", " }), bold(*page), roman(format!("({SECTION})"))]);
    }
    roff.text(line);
    roff.control("PP", []);
    roff.text([roman(format!("{}, in /usr/share/doc/outlive or at {HOME}", documents(path).join(", ")))]);
    roff.to_writer(page)
}

fn documents(path: &str) -> &'static [&'static str] {
    let outer = path.split(' ').next().unwrap_or_default();
    let of = |wanted: &str| DOCUMENTS.iter().find(|(command, _)| *command == wanted).map(|(_, it)| *it);
    of(outer).or_else(|| of("")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn a_help_falls_into_paragraphs_and_examples() {
        let help = "One\ntwo.\n\nExamples:\n  a b    what it does\n\n  c d\n      more\n\nLast.";
        let (notes, examples) = parts(help);
        assert_eq!(notes, ["One two.", "Last."]);
        assert_eq!(examples, ["a b    what it does", "", "c d", "    more"]);
        assert_eq!(parts(""), (vec![], vec![]));
    }

    #[test]
    fn the_documents_are_there() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for (command, documents) in DOCUMENTS {
            for document in *documents {
                assert!(root.join(document).is_file(), "{command}: {document}");
            }
        }
    }
}
