//! `outlive node`, `outlive vm` and `outlive top`: the node is a crate of its own, and starts this program.

use std::io;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};

use clap::Args;
use nix::sys::signal::Signal;
use outlive_node::Program;
use outlive_node::cli::{self, NodeCommand, NodeOptions, Service, TopOptions, VmOptions};

use super::{RunOptions, definition};
use crate::link::open_keys;
use crate::process::Signals;
use crate::{exit, notify, serving};

fn program(path: impl Into<PathBuf>) -> Program {
    let run = RunOptions::augment_args(clap::Command::new("run"));
    Program::new(path.into(), run).judged_by(definition::judge)
}

/// What reads definitions, without starting anything.
pub(crate) fn definitions() -> Program {
    program("outlive")
}

/// `outlive node`: returns the exit code.
pub(super) fn node(options: &NodeOptions) -> u8 {
    let program = match std::env::current_exe() {
        Ok(path) => program(path),
        Err(error) => return exit::usage(format!("cannot find this program: {error}; start it by its path")),
    };
    let with_stdin = match &options.command {
        NodeCommand::Run(serve) => serve.exit_with_stdin,
        NodeCommand::Page { exit_with_stdin, .. } => *exit_with_stdin,
        _ => false,
    };
    let service = || Ok(Service { stops: serving::stops(with_stdin)?, ready: notify::ready });
    cli::node(options, program, service, open_keys)
}

/// `outlive vm`: returns the exit code.
pub(super) fn vm(options: &VmOptions) -> u8 {
    cli::vm(options, open_keys)
}

/// `outlive top`: returns the exit code.
pub(super) fn top(options: &TopOptions) -> u8 {
    cli::top(options, ends, open_keys)
}

/// From now on no signal ends the process: it is told here, and the terminal can be given back.
fn ends() -> io::Result<Receiver<&'static str>> {
    let (told, ends) = channel();
    let signals = Signals::take(&[Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT])?;
    signals.each("signals", move |signal| {
        // Nobody listens once the process ends.
        let _ = told.send(signal.as_str());
    })?;
    Ok(ends)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use outlive_node::definition::{AUTOSTART, Definition, RESTART_LIMIT};

    use super::*;

    fn parse(text: &str) -> Result<Definition, String> {
        let file = Path::new("/etc/outlive/vms/web.toml");
        Definition::parse(file, text, "hosta", &program("/bin/false")).map_err(|it| it.to_string())
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
            ("standby = ['b:7000']\narbiter = 'file:/x'\nlisten = '0.0.0.0:7000'", ": disk: "),
            ("memory = 256", ": memory: "),
            ("memory = '1G'\narbiter = 'third:7010'", ": arbiter: unknown arbiter"),
            ("memory = '1G'\narbiter = 'outlive:third'", ": arbiter: "),
            ("memory = '1G'\nuplink = 'eth0'", ": uplink: "),
            ("memory = '1G'\nfence = 'true'", "--fence needs --arbiter"),
            ("boot = 'disk=3'\ndisk = ['path=/x']", ": boot: "),
            ("ip = '10.0.0.5/24'\nuser = 'root'\nsandbox = 'off'", ": user: "),
            ("autostart = true", "nothing of a VM"),
            ("memroy = '1G'", "memory"),
        ] {
            let why = parse(text).expect_err(text);
            assert!(why.contains(says) && !why.contains('\n'), "{text}: {why}");
        }
    }

    /// Definitions in the documents are definitions.
    #[test]
    fn definitions_in_the_documents_can_be_used() {
        let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs");
        let mut count = 0;
        for page in std::fs::read_dir(docs).unwrap().map(|page| page.unwrap().path()) {
            let Ok(text) = std::fs::read_to_string(&page) else { continue };
            for block in text.split("```toml\n").skip(1) {
                let block = block.split("```").next().unwrap_or_default();
                for host in ["hosta", "hostb"] {
                    let file = Path::new("/etc/outlive/vms/web.toml");
                    Definition::parse(file, block, host, &program("/bin/false"))
                        .unwrap_or_else(|why| panic!("{}: {why}", page.display()));
                }
                count += 1;
            }
        }
        assert!(count > 1, "docs/node.md has two");
    }

    /// What may come later is no mistake, and is said.
    #[test]
    fn what_is_missing_on_this_host_is_warned_of() {
        let warned = |text: &str| {
            let web = parse(text).expect(text);
            web.warnings(&program("/bin/false")).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let good = "ip = '10.0.0.5/24'\n";
        assert_eq!(warned(good), [] as [String; 0]);
        let pair =
            "arbiter = 'file:/x'\nlisten = '0.0.0.0:7000'\nstandby = ['b:7000']\ndisk = ['path=/dev/null']";
        for (text, says) in [
            ("memory = '1G'", "ip: "),
            ("kernel = '/no/kernel'", "kernel: there is no file /no/kernel"),
            ("boot = 'disk'\ndisk = ['path=/no/web.img']", "disk: "),
            (&format!("{good}user = 'no-such-user'"), "user: "),
            (&format!("{good}net = 'tap=t0,bridge=no-bridge'"), "net: there is no bridge no-bridge"),
            (&format!("{good}uplink = 'no-port'\nnet = 'tap=t0'"), "uplink: "),
            (&format!("{good}events = '/no/folder/events'"), "events: "),
            (&format!("{good}keys = '/no/keys'\n{pair}"), "keys: /no/keys has no keys"),
        ] {
            let warned = warned(text);
            assert!(warned.iter().any(|it| it.starts_with(says) && !it.contains('\n')), "{text}: {warned:?}");
        }
    }
}
