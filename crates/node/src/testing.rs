//! What unit tests of several files need.

use clap::{Arg, ArgAction, Command};

use crate::Program;

/// A program with options of every kind, like `outlive run`.
pub(crate) fn program() -> Program {
    program_at("/bin/false")
}

/// The same, somewhere else.
pub(crate) fn program_at(path: impl Into<std::path::PathBuf>) -> Program {
    let value = |name: &'static str| Arg::new(name).long(name);
    let list = |name: &'static str| value(name).action(ArgAction::Append);
    let flag = |name: &'static str| value(name).action(ArgAction::SetTrue);
    let run = Command::new("run")
        .args(["name", "memory", "kernel", "net", "arbiter", "listen", "console", "events", "events-max", "status"].map(value))
        .arg(value("vcpus").value_parser(clap::value_parser!(u8).range(1..=32)))
        .args(["disk", "standby"].map(list))
        .args(["insecure", "lock-memory", "accept-replica"].map(flag))
        .arg(flag("or-standby").requires("listen").requires("arbiter").requires("disk"))
        .arg(flag("exit-with-stdin").hide(true));
    Program::new(path.into(), run)
}
