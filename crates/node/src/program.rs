//! The program whose processes the node starts, and the options that it has.

use std::fmt;
use std::path::PathBuf;

use clap::{ArgAction, ArgMatches, Command};

use crate::bounded;

/// `outlive`: where it is, and its command `run`.
#[derive(Clone, Debug)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// `outlive run`, as the program itself reads it. So a definition can have every option that the program has, and
    /// its values are checked by what will read them.
    run: Command,
    judge: Option<Judge>,
}

/// What the program makes of options that it can read.
pub type Judge = fn(&ArgMatches) -> Sense;

/// Whether options make sense.
#[derive(Clone, Debug, Default)]
pub struct Sense {
    /// Why the program would not start with them, on any host.
    pub wrong: Option<Remark>,
    /// What this host lacks for them now.
    pub warnings: Vec<Remark>,
}

/// A remark about an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Remark {
    /// The option, without `--`; empty if it is about several.
    pub key: &'static str,
    /// What is wrong, and what helps.
    pub text: String,
}

impl Remark {
    /// About this option.
    pub fn new(key: &'static str, text: impl ToString) -> Self {
        Self { key, text: text.to_string() }
    }
}

impl fmt::Display for Remark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.text)
    }
}

/// How an option is written in a definition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `true` or `false`.
    Flag,
    /// One value.
    Value,
    /// A list of values.
    List,
}

impl Program {
    /// Describes a program.
    pub fn new(path: PathBuf, run: Command) -> Self {
        // Groups and what requires what are worked out here, once.
        let mut run = run.no_binary_name(true).disable_help_flag(true).disable_version_flag(true);
        run.build();
        Self { path, run, judge: None }
    }

    /// Lets the program say what it thinks of options that go together.
    pub fn judged_by(self, judge: Judge) -> Self {
        Self { judge: Some(judge), ..self }
    }

    /// What kind of option this is; `None` if there is none of this name that people are told of.
    pub(crate) fn kind(&self, key: &str) -> Option<Kind> {
        let option = self.run.get_arguments().find(|it| it.get_long() == Some(key) && !it.is_hide_set())?;
        match option.get_action() {
            ArgAction::SetTrue => Some(Kind::Flag),
            ArgAction::Append => Some(Kind::List),
            ArgAction::Set => Some(Kind::Value),
            _ => None,
        }
    }

    /// The option that was meant, where one is alike.
    pub(crate) fn similar(&self, key: &str) -> Option<String> {
        use clap::error::{ContextKind, ContextValue};
        let error = self.run.clone().try_get_matches_from([format!("--{key}")]).err()?;
        match error.get(ContextKind::SuggestedArg)? {
            ContextValue::String(it) => Some(it.trim_start_matches('-').to_owned()),
            _ => None,
        }
    }

    /// Reads arguments as the program will.
    ///
    /// # Errors
    /// What it would say, in one line.
    pub(crate) fn check(&self, arguments: &[String]) -> Result<(), String> {
        match self.run.clone().try_get_matches_from(arguments) {
            Ok(_) => Ok(()),
            Err(error) => Err(one_line(&error)),
        }
    }

    /// What the program thinks of arguments, if it can read them.
    pub(crate) fn judge(&self, arguments: &[String]) -> Sense {
        let read = self.run.clone().try_get_matches_from(arguments).ok();
        let Some((judge, matches)) = self.judge.zip(read) else { return Sense::default() };
        // It looks at the files that are named.
        bounded::look(&arguments.join(" "), move || judge(&matches)).unwrap_or_else(|| {
            let late = "a file that it names does not answer: look after the mount that it is on";
            Sense { wrong: None, warnings: vec![Remark::new("", late)] }
        })
    }
}

/// What is wrong with a command line, with clap's hints but without the summary of all options.
pub fn one_line(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with("Usage:"));
    let (mut said, mut lists) = (String::new(), false);
    for line in lines.take_while(|line| !line.starts_with("For more information")) {
        let (is_tip, is_choice) = (line.starts_with("tip: "), line.starts_with('['));
        // Only the ends of lines part a hint from the fault, and things that are listed from each other.
        said += match (is_tip, lists && !is_choice) {
            _ if said.is_empty() => "",
            (true, _) => "; ",
            (false, true) if !said.ends_with(':') => ", ",
            _ => " ",
        };
        lists = line.ends_with(':') || lists && !is_tip && !is_choice;
        said += line;
    }
    said.strip_prefix("error: ").unwrap_or(&said).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn options_are_those_of_the_program() {
        let program = testing::program();
        assert_eq!(program.kind("memory"), Some(Kind::Value));
        assert_eq!(program.kind("disk"), Some(Kind::List));
        assert_eq!(program.kind("insecure"), Some(Kind::Flag));
        assert_eq!(program.kind("exit-with-stdin"), None, "nobody is told of it");
        assert_eq!((program.kind("help"), program.kind("nothing")), (None, None));
        assert_eq!(program.similar("memry").as_deref(), Some("memory"));
        assert_eq!(program.similar("q"), None);
    }

    /// Clap says its faults, hints and lists in lines of their own.
    #[test]
    fn what_clap_says_in_lines_is_a_sentence_in_one() {
        use clap::{Arg, ArgAction, Command};

        let flag = |name: &'static str| Arg::new(name).long(name).action(ArgAction::SetTrue);
        let value = |name: &'static str| Arg::new(name).long(name).required(true);
        let options = [
            flag("keys"),
            flag("alone").conflicts_with_all(["keys", "force"]),
            flag("force"),
            Arg::new("kind").long("kind").value_parser(["file", "own"]),
        ];
        let run = Command::new("run").args(options);
        let program = Command::new("outlive").subcommand_required(true).subcommand(run);
        let program = program.subcommand(Command::new("two").args([value("a"), value("b")]));
        for (words, expected) in [
            (
                &["run", "--kyes"][..],
                "unexpected argument '--kyes' found; tip: a similar argument exists: '--keys'",
            ),
            (&["runn"], "unrecognized subcommand 'runn'; tip: a similar subcommand exists: 'run'"),
            (
                &["run", "--alone", "--keys", "--force"],
                "the argument '--alone' cannot be used with: --keys, --force",
            ),
            (&["two"], "the following required arguments were not provided: --a <a>, --b <b>"),
            (
                &["run", "--kind", "fil"],
                "invalid value 'fil' for '--kind <kind>' [possible values: file, own]; tip: a similar value exists: 'file'",
            ),
            (&["run", "x"], "unexpected argument 'x' found"),
        ] {
            let error = program.clone().try_get_matches_from([&["outlive"], words].concat()).unwrap_err();
            assert_eq!(one_line(&error), expected, "{words:?}");
        }
    }

    #[test]
    fn values_are_read_as_the_program_reads_them() {
        let program = testing::program();
        program.check(&["--memory=64M".into(), "--vcpus=2".into()]).unwrap();
        let why = program.check(&["--vcpus=many".into()]).unwrap_err();
        assert!(why.contains("'many'") && why.contains("--vcpus") && !why.contains('\n'), "{why}");
        let why = program.check(&["--or-standby".into()]).unwrap_err();
        assert!(why.contains("--listen"), "{why}");
    }
}
