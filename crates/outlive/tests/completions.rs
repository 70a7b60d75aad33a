//! `outlive completions` in the shells themselves. Each shell has a test of its own: one that is not installed skips.

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::path::Path;
use std::process::{Command, Output};

const PROGRAM: &str = env!("CARGO_BIN_EXE_outlive");

/// Stands for the path of the script.
const SCRIPT: &str = "%SCRIPT";

/// The script of a shell, in a file.
struct Script {
    there: tempfile::TempDir,
    shell: &'static str,
}

impl Script {
    /// `None` if there is no such shell.
    fn of(shell: &'static str) -> Option<Self> {
        if let Err(why) = Command::new(shell).arg("--version").output() {
            println!("skipped: no {shell}: {why}");
            return None;
        }
        let output = Command::new(PROGRAM).args(["completions", shell]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let there = tempfile::tempdir().unwrap();
        std::fs::write(there.path().join("script"), output.stdout).unwrap();
        Some(Self { there, shell })
    }

    /// Runs a line of the shell, in which `%SCRIPT` is the script, with the program in its PATH.
    fn run(&self, words: &[&str], line: &str) -> Output {
        let script = self.there.path().join("script").display().to_string();
        let own = Path::new(PROGRAM).parent().unwrap().to_owned();
        let present = std::env::var_os("PATH").unwrap_or_default();
        let path: OsString =
            std::env::join_paths([own].into_iter().chain(std::env::split_paths(&present))).unwrap();
        let mut command = Command::new(self.shell);
        command
            .args(words)
            .arg(line.replace(SCRIPT, &script))
            .env("PATH", path)
            .env("HOME", self.there.path());
        command.output().unwrap()
    }

    /// The shell's own parser takes the script, and would notice if it was none.
    fn is_understood(&self) {
        let output = self.run(&["-n"], SCRIPT);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let wrong = self.there.path().join("wrong");
        std::fs::write(&wrong, "if (\n").unwrap();
        assert!(!self.run(&["-n"], wrong.to_str().unwrap()).status.success(), "the check checks nothing");
    }

    fn offers(&self, words: &[&str], line: &str) -> Vec<String> {
        let output = self.run(words, line);
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|line| line.split('\t').next().unwrap_or_default().to_owned()).collect()
    }
}

/// What bash does when somebody presses Tab behind these words.
fn bash(script: &Script, words: &[&str]) -> Vec<String> {
    let (last, before) = (words.last().unwrap(), words[words.len() - 2]);
    let quoted: Vec<_> = words.iter().map(|word| format!("'{word}'")).collect();
    let line = format!(
        "source %SCRIPT; COMP_WORDS=({all}); COMP_CWORD={at}; COMP_LINE='{text}'; COMP_POINT=${{#COMP_LINE}}; COMP_TYPE=9; \
         _clap_complete_outlive outlive '{last}' '{before}'; printf '%s\\n' \"${{COMPREPLY[@]}}\"; complete -p outlive >&2",
        all = quoted.join(" "),
        at = words.len() - 1,
        text = words.join(" "),
    );
    script.offers(&["--norc", "-c"], &line)
}

#[test]
fn bash_completes_commands_options_and_values() {
    let Some(script) = Script::of("bash") else { return };
    script.is_understood();
    assert_eq!(bash(&script, &["outlive", "vm", "st"]), ["start", "stop"]);
    assert_eq!(bash(&script, &["outlive", "node", "dr"]), ["drain"]);
    assert_eq!(bash(&script, &["outlive", "to"]), ["top"]);
    assert_eq!(bash(&script, &["outlive", "top", "--on"]), ["--once"]);
    assert_eq!(bash(&script, &["outlive", "completions", "z"]), ["zsh"]);
    assert_eq!(bash(&script, &["outlive", "run", "--frame"]), ["--frame-tail"]);
    // Commands that are no business of people.
    assert!(!bash(&script, &["outlive", "s"]).iter().any(|it| it == "steward" || it == "sentinel"));
    let file =
        bash(&script, &["outlive", "status", "--socket", script.there.path().join("scr").to_str().unwrap()]);
    assert_eq!(file, [script.there.path().join("script").display().to_string()]);
}

#[test]
fn zsh_understands_its_script() {
    let Some(script) = Script::of("zsh") else { return };
    script.is_understood();
    let line = "autoload -Uz compinit; compinit -D -u; source %SCRIPT; print -r -- $_comps[outlive]";
    assert_eq!(script.offers(&["-f", "-c"], line), ["_clap_dynamic_completer_outlive"]);
}

#[test]
fn fish_completes_commands() {
    let Some(script) = Script::of("fish") else { return };
    script.is_understood();
    let offers = |words: &str| {
        script.offers(&["--no-config", "-c"], &format!("source %SCRIPT; complete -C '{words}'"))
    };
    assert_eq!(offers("outlive vm st"), ["start", "stop"]);
    assert_eq!(offers("outlive completions b"), ["bash"]);
}

#[test]
fn another_shell_is_told_in_one_line() {
    let output = Command::new(PROGRAM).env("OUTLIVE_COMPLETE", "tcsh").output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), said.lines().count()), (Some(2), 1), "{said}");
    assert!(said.contains("tcsh") && said.contains("bash"), "{said}");
}
