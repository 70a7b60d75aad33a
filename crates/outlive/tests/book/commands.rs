//! Command lines in the documents are read by the program's own parser. In blocks they are whole; in the text only
//! commands and options must be there.

use std::path::Path;

use clap::error::ErrorKind;
use clap::{Command as Tree, Parser};
use outlive::cli::{Cli, tree};

use crate::pages::{self, Block, Page};
use crate::shell;

/// What stands for something in a command line of a block, and what is read in its place. Add a word here if a document
/// needs another one that the parser does not take as it is.
const PLACEHOLDERS: &[(&str, &str)] =
    &[("SIZE", "64M"), ("N", "2"), ("SECONDS", "60"), ("ADDR:PORT", "0.0.0.0:7020")];

/// Why the parser refuses a line that is right on another host: the fence command must be there.
const OF_A_HOST: &str = "there is no program";

/// Words of programs that begin like a command of this one.
const NO_COMMANDS: &[&str] = &["outlive guest is up: ..."];

/// The lines of a block that somebody types: those with a prompt if there are any, else all. A line that ends with a
/// backslash goes on in the next one.
fn typed(block: &Block<'_>) -> Vec<(usize, String)> {
    let prompted: Vec<_> = block.lines.iter().map(|line| after_prompt(line)).collect();
    let has_prompts = prompted.iter().any(Option::is_some);
    let mut typed: Vec<(usize, String)> = Vec::new();
    let mut goes_on = false;
    for (at, (line, prompted)) in block.lines.iter().zip(prompted).enumerate() {
        let text = if has_prompts { prompted } else { Some(line.trim_start()) };
        let text = if goes_on { Some(line.trim()) } else { text };
        let Some(text) = text else { continue };
        let part = text.strip_suffix('\\');
        match typed.last_mut().filter(|_| goes_on) {
            Some((_, line)) => *line += part.unwrap_or(text),
            None => typed.push((block.line + at, part.unwrap_or(text).to_owned())),
        }
        goes_on = part.is_some();
    }
    typed
}

/// What stands behind `hosta# `, `client$ ` or `# `.
fn after_prompt(line: &str) -> Option<&str> {
    let line = line.trim_start();
    let (host, rest) = line.split_at(line.find(['#', '$'])?);
    let is_host = host.chars().all(|it| it.is_ascii_lowercase() || it.is_ascii_digit());
    let rest = rest[1..].strip_prefix(' ')?;
    is_host.then(|| rest.trim_start())
}

/// The arguments of this program, if a simple command is one of it.
fn arguments(words: &[String]) -> Option<&[String]> {
    let is_setting = |word: &&String| word.split_once('=').is_some_and(|(name, _)| is_variable(name));
    let words = &words[words.iter().take_while(is_setting).count()..];
    let words = if words.first().is_some_and(|it| it == "sudo") { &words[1..] } else { words };
    let first = words.first()?;
    if first == "cargo" && words.get(1).is_some_and(|it| it == "run") {
        let at = words.iter().position(|it| it == "--")?;
        let of_another = words[..at].iter().any(|it| ["-p", "--example", "--manifest-path"].contains(&&**it));
        return (!of_another).then(|| &words[at + 1..]);
    }
    (Path::new(first).file_name()? == "outlive").then(|| &words[1..])
}

fn is_variable(name: &str) -> bool {
    !name.is_empty() && name.chars().all(|it| it.is_ascii_uppercase() || it == '_')
}

/// A value that can be read: of `on|off` the first, of a placeholder what stands for it.
fn value(word: &str) -> String {
    let word = word.split_once('|').filter(|_| !word.contains(':')).map_or(word, |(first, _)| first);
    PLACEHOLDERS.iter().find(|(name, _)| *name == word).map_or(word, |(_, value)| value).to_owned()
}

/// What is wrong with arguments of this program.
fn wrong(arguments: &[String]) -> Option<String> {
    if arguments.iter().any(|it| it == "...") {
        return unknown(arguments);
    }
    let words = std::iter::once("outlive".to_owned()).chain(arguments.iter().map(|it| value(it)));
    let error = Cli::try_parse_from(words).err()?;
    let is_asked_for = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    let why = error.to_string().lines().next().unwrap_or_default().to_owned();
    (!is_asked_for && !why.contains(OF_A_HOST)).then_some(why)
}

/// A command or an option that does not exist. What is left out does not matter.
fn unknown(arguments: &[String]) -> Option<String> {
    let tree = tree();
    let mut command = &tree;
    let mut words = arguments.iter().peekable();
    while let Some(word) = words.next_if(|it| !it.starts_with('-')) {
        let mut ways = word.split('|');
        let first = ways.next().unwrap_or_default();
        let Some(inner) = command.find_subcommand(first) else {
            let has_commands = command.get_subcommands().any(|it| !it.is_hide_set());
            let is_left_out = word == "..." || word.chars().all(|it| it.is_ascii_uppercase());
            if has_commands && !is_left_out {
                return Some(format!("there is no command {word}"));
            }
            break;
        };
        if let Some(way) = ways.find(|way| command.find_subcommand(way).is_none()) {
            return Some(format!("there is no command {way}"));
        }
        command = inner;
    }
    let options = arguments.iter().map(|word| word.trim_start_matches('['));
    let mut options = options.filter_map(|word| word.strip_prefix("--").filter(|it| !it.is_empty()));
    let missing = options.find(|option| !has(command, option))?;
    Some(format!("{} has no option --{missing}", command.get_name()))
}

fn has(command: &Tree, option: &str) -> bool {
    let name = option.split(['=', '[', ']']).next().unwrap_or_default();
    let own = command.get_arguments().any(|it| it.get_long() == Some(name));
    own || name == "help" || name == "version"
}

fn in_blocks(page: &Page) -> Vec<String> {
    let mut found = Vec::new();
    for block in page.parts().0.iter().filter(|it| ["", "sh"].contains(&it.kind)) {
        for (number, line) in typed(block) {
            // Only lines with this program need be a shell's.
            if !line.contains("outlive ") && !line.contains("cargo run") {
                continue;
            }
            let at = format!("{}:{number}", page.path.display());
            let commands = match shell::commands(&line) {
                Ok(commands) => commands,
                Err(why) => {
                    found.push(format!("{at}: {why}"));
                    continue;
                }
            };
            for arguments in commands.iter().filter_map(|words| arguments(words)) {
                found.extend(wrong(arguments).map(|why| format!("{at}: {line}: {why}")));
            }
        }
    }
    found
}

fn in_text(page: &Page) -> Vec<String> {
    let mut found = Vec::new();
    for (number, line) in page.parts().1 {
        for code in line.split('`').skip(1).step_by(2) {
            let Some(rest) = code.strip_prefix("outlive ").filter(|_| !NO_COMMANDS.contains(&code)) else {
                continue;
            };
            let words: Vec<String> = rest.split_whitespace().map(str::to_owned).collect();
            found.extend(
                unknown(&words).map(|why| format!("{}:{number}: {code}: {why}", page.path.display())),
            );
        }
    }
    found
}

/// A list of changes speaks of releases that were.
fn is_of_today(page: &&Page) -> bool {
    !page.path.ends_with("CHANGELOG.md")
}

#[test]
fn every_command_line_is_one_that_the_program_reads() {
    let wrong: Vec<_> = pages::all().iter().filter(is_of_today).flat_map(in_blocks).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_command_in_the_text_is_there_with_its_options() {
    let wrong: Vec<_> = pages::all().iter().filter(is_of_today).flat_map(in_text).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Examples of `--help` and of the manual pages: two spaces, the line, and what it does behind two more.
fn in_help(command: &Tree, found: &mut Vec<String>) {
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    // A line that ends with a backslash goes on in the next one.
    let help = help.split("\\\n").map(str::trim_start).collect::<Vec<_>>().join(" ");
    for line in help.lines().filter_map(|line| line.strip_prefix("  ")) {
        let line = line.split("  ").next().unwrap_or_default();
        let commands = shell::commands(line).unwrap_or_default();
        for arguments in commands.iter().filter_map(|words| arguments(words)) {
            found.extend(wrong(arguments).map(|why| format!("{}: {line}: {why}", command.get_name())));
        }
    }
    command.get_subcommands().for_each(|inner| in_help(inner, found));
}

#[test]
fn every_example_of_a_help_is_one_that_the_program_reads() {
    let mut wrong = Vec::new();
    in_help(&tree(), &mut wrong);
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A test that finds nothing would be no test: there are many lines, and each mistake is found.
#[test]
fn a_wrong_command_line_is_found() {
    let page = |text: &str| Page { path: "x.md".into(), text: text.into() };
    let block = |line: &str| in_blocks(&page(&format!("```\n{line}\n```\n"))).len();
    for good in [
        "hosta# outlive run --listen 0.0.0.0:7000 --standby hostb:7000 \\\n  --arbiter file:/srv/arbiter",
        "outlive demo --kills 0 --memory SIZE --frame-tail on|off",
        "# outlive status --json | jq .     # and so on",
        "OUTLIVE_HOST=hosta outlive vm list && outlive vm start web",
        "$ cargo run --release -- demo\noutlive demo: 3 kills, seed 7",
        "outlive run ... --interval 2ms     the same, and more",
        "install -m 755 outlive /usr/local/bin/outlive",
        "both#  outlive --version",
    ] {
        assert_eq!(block(good), 0, "{good}: {:?}", in_blocks(&page(&format!("```\n{good}\n```\n"))));
    }
    for bad in [
        "hosta# outlive run --standby hostb",
        "outlive rnu",
        "outlive run --no-such-option",
        "outlive run ... --no-such-option",
        "third# mkdir x && outlive arbiter serve --directroy x",
        "hosta# /usr/bin/outlive vm begin web",
    ] {
        assert_eq!(block(bad), 1, "{bad}");
    }
    let text = |code: &str| in_text(&page(&format!("Say `{code}` here."))).len();
    for good in [
        "outlive vm list|show",
        "outlive run",
        "outlive status [--socket PATH] [--json]",
        "outlive keys show",
    ] {
        assert_eq!(text(good), 0, "{good}");
    }
    for bad in ["outlive vm list|shwo", "outlive vm stop NAME --only-standbys", "outlive begin"] {
        assert_eq!(text(bad), 1, "{bad}");
    }
    let all = pages::all();
    let lines =
        all.iter().flat_map(|page| page.parts().0.into_iter().flat_map(|it| typed(&it)).collect::<Vec<_>>());
    let commands = lines.filter_map(|(_, line)| shell::commands(&line).ok()).flatten();
    assert!(commands.filter(|words| arguments(words).is_some()).count() > 60);
}
