//! `outlive node`: the node is a crate of its own, and starts this program.

use clap::Args;
use outlive_node::Program;
use outlive_node::cli::{self, NodeCommand, NodeOptions, Service};

use super::RunOptions;
use crate::{exit, notify, serving};

/// `outlive node`: returns the exit code.
pub(super) fn node(options: &NodeOptions) -> u8 {
    let program = match std::env::current_exe() {
        Ok(path) => Program::new(path, RunOptions::augment_args(clap::Command::new("run"))),
        Err(error) => return exit::usage(format!("cannot find this program: {error}; start it by its path")),
    };
    let with_stdin = matches!(&options.command, NodeCommand::Run(serve) if serve.exit_with_stdin);
    let service = || Ok(Service { stops: serving::stops(with_stdin)?, ready: notify::ready });
    cli::node(options, program, service)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use outlive_node::definition::{AUTOSTART, Definition, RESTART_LIMIT};

    use super::*;

    fn program() -> Program {
        Program::new("/bin/false".into(), RunOptions::augment_args(clap::Command::new("run")))
    }

    fn parse(text: &str) -> Result<Definition, String> {
        let file = Path::new("/etc/outlive/vms/web.toml");
        Definition::parse(file, text, "hosta", &program()).map_err(|it| it.to_string())
    }

    /// A definition can have every option that people are told of, and the node's own keys are none of them.
    #[test]
    fn definitions_have_the_options_of_the_command() {
        let run = RunOptions::augment_args(clap::Command::new("run"));
        for option in run.get_arguments().filter(|it| !it.is_hide_set()) {
            let key = option.get_long().expect("all options are long");
            assert!(![AUTOSTART, RESTART_LIMIT, "host"].contains(&key), "{key} would be ambiguous");
            let why = parse(&format!("{key} = []")).expect_err("no option is an empty list");
            assert!(!why.contains("unknown key"), "{why}");
        }
        let web = parse(
            "boot = 'disk'\nappend = 'panic=10'\nmemory = '2G'\nvcpus = 2\ndisk = ['path=/web.img,thin']\n\
             arbiter = 'file:/srv/arbiter'\nlisten = '0.0.0.0:7000'\nnet = 'tap=vm0,bridge=br0'\naudit = 0.5\n\
             self-check = 100\nframe-tail = 'off'\nlock-memory = true\n[host.hosta]\nstandby = ['hostb:7000']",
        )
        .unwrap();
        assert!(web.arguments().contains(&"--or-standby".to_owned()));
        for (text, says) in [
            ("memory = '2X'", ": memory: "),
            ("vcpus = 99", ": vcpus: "),
            ("net = 'bridge=br0'", ": net: "),
            ("disk = ['path=/a,colour=red']", ": disk: "),
            ("standby = ['b']", ": standby: "),
            ("initrd = '/initrd'", "--kernel"),
            ("standby = ['b:7000']\narbiter = 'file:/x'\nlisten = '0.0.0.0:7000'", "--disk"),
            ("memroy = '1G'", "memory"),
        ] {
            let why = parse(text).expect_err(text);
            assert!(why.contains(says) && !why.contains('\n'), "{text}: {why}");
        }
    }
}
