//! `outlive node run` and `outlive node check`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;

use serde::Serialize;

use super::options::Serve;
use super::say::{Outcome, Said, print, warn};
use super::{OK, USAGE};
use crate::api;
use crate::definition::{Definition, DefinitionError, Folder};
use crate::node::{Node, Places};
use crate::program::Program;
use crate::remote::OpenKeys;

/// What the program has for a process that serves.
pub struct Service {
    /// Orders to stop, in words.
    pub stops: Receiver<&'static str>,
    /// Tells the service manager that the node is there.
    pub ready: fn(),
}

/// Serves until it is told to stop. Returns the exit code.
pub(super) fn run(
    options: &Serve,
    program: Program,
    service: impl FnOnce() -> io::Result<Service>,
    keys: OpenKeys,
) -> u8 {
    match serve(options, program, service, keys) {
        Ok(()) => OK,
        Err(why) => {
            warn(&format!("outlive: {why}"));
            USAGE
        }
    }
}

fn serve(
    options: &Serve,
    program: Program,
    service: impl FnOnce() -> io::Result<Service>,
    keys: OpenKeys,
) -> Result<(), Box<dyn std::error::Error>> {
    let Service { stops, ready } = service()?;
    let places = Places {
        definitions: absolute(&options.vms)?,
        state: absolute(&options.state)?,
        run: absolute(&options.run)?,
        logs: absolute(&options.logs)?,
    };
    let host = host(options.host.as_deref());
    let node = Node::start(&host, places, program)?;
    let server = api::serve(&node, &options.socket, options.socket_group.as_deref())?;
    tracing::info!("the node of host {host} answers at {}", options.socket.display());
    let port = options
        .listen
        .as_deref()
        .map(|address| api::serve_hosts(&node, address, keys(options.keys.as_deref())));
    let port = port.transpose()?;
    ready();
    // It ends, too, if nobody can give the order any more.
    let why = stops.recv().unwrap_or("nobody can stop it any more");
    tracing::info!("the node ends ({why}), and its VMs run on");
    drop((port, server));
    Ok(())
}

/// VMs run with another working directory.
fn absolute(path: &Path) -> io::Result<PathBuf> {
    std::path::absolute(path)
}

fn host(given: Option<&str>) -> String {
    let own = || std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    given.map_or_else(own, str::to_owned)
}

#[derive(Serialize)]
struct Checked {
    vm: String,
    /// What is wrong; `null`: nothing.
    error: Option<String>,
    /// What this host lacks for it now.
    warnings: Vec<String>,
}

pub(super) fn check(vms: &Path, name: Option<&str>, json: bool, program: &Program) -> Outcome {
    let wrong = |error| Said::NoFolder(vms.display().to_string(), error);
    let folder = Folder::new(absolute(vms).map_err(wrong)?, host(name));
    let read = folder.read(program).map_err(wrong)?;
    let checked = |(vm, read): (String, Result<Definition, DefinitionError>)| match read {
        Err(why) => Checked { vm, error: Some(why.to_string()), warnings: Vec::new() },
        Ok(it) => {
            let file = it.file.display().to_string();
            let warnings = it.warnings(program).iter().map(|why| format!("{file}: {why}")).collect();
            Checked { vm, error: None, warnings }
        }
    };
    let all: Vec<_> = read.into_iter().map(checked).collect();
    let (bad, total) = (all.iter().filter(|it| it.error.is_some()).count(), all.len());
    if json {
        print(true, &all, |_| String::new())?;
    } else {
        for it in &all {
            it.error.iter().for_each(|why| warn(&format!("outlive: {why}")));
            it.warnings.iter().for_each(|why| warn(&format!("outlive: warning: {why}")));
        }
        if bad == 0 {
            print(false, &all, |all| format!("{} definitions can be used\n", all.len()))?;
        }
    }
    if bad > 0 { Err(Said::Bad(bad, total)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_no_mistake() {
        let folder = tempfile::tempdir().unwrap();
        let write = |text: &str| std::fs::write(folder.path().join("web.toml"), text).unwrap();
        let check = || check(folder.path(), Some("hosta"), false, &crate::testing::program());
        write("kernel = '/no/kernel'");
        check().unwrap();
        write("");
        assert!(matches!(check(), Err(Said::Bad(1, 1))));
    }
}
