//! Names of VMs, for a shell that completes a word.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::mpsc::channel;
use std::time::Duration;

use clap_complete::CompletionCandidate;
use serde::Deserialize;

use super::options::{API, VMS};
use crate::client::Client;
use crate::definition::{ENDING, is_name};

/// How long somebody who has pressed a key waits for the node.
const PATIENCE: Duration = Duration::from_secs(1);

/// The VMs whose names begin so.
pub(super) fn complete(current: &OsStr) -> Vec<CompletionCandidate> {
    let Some(current) = current.to_str() else { return Vec::new() };
    names(Path::new(API), Path::new(VMS), current).into_iter().map(CompletionCandidate::new).collect()
}

/// As the node says, or without one as the definitions are called. Whoever may see neither gets none.
fn names(socket: &Path, folder: &Path, beginning: &str) -> Vec<String> {
    let mut names = told(socket).unwrap_or_else(|| defined(folder));
    names.retain(|name| name.starts_with(beginning));
    names.sort();
    names
}

/// The thread of a node that does not answer ends with this process.
fn told(socket: &Path) -> Option<Vec<String>> {
    let (sender, names) = channel();
    let socket = socket.to_owned();
    std::thread::spawn(move || sender.send(ask(&socket)));
    names.recv_timeout(PATIENCE).ok()?
}

fn ask(socket: &Path) -> Option<Vec<String>> {
    #[derive(Deserialize)]
    struct Vms {
        vms: Vec<Named>,
    }
    #[derive(Deserialize)]
    struct Named {
        name: String,
    }
    let all: Vms = Client::here(socket).ok()?.get("/v1/vms").ok()?;
    Some(all.vms.into_iter().map(|vm| vm.name).collect())
}

fn defined(folder: &Path) -> Vec<String> {
    let files = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|file| file.path());
    let ours = files.filter(|path| path.extension().is_some_and(|it| it == ENDING));
    let names = ours.filter_map(|path| Some(path.file_stem()?.to_str()?.to_owned()));
    names.filter(|name| is_name(name)).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::api;
    use crate::testing::World;

    #[test]
    fn names_come_from_the_node_or_from_the_definitions() {
        let world = World::new();
        let vms = world.places().definitions;
        fs::create_dir_all(&vms).unwrap();
        for file in ["web.toml", "db.toml", "wiki.toml", "web.conf", ".w.toml"] {
            fs::write(vms.join(file), "memory = '1G'\n").unwrap();
        }
        let nowhere = world.folder.path().join("nobody.api");
        assert_eq!(names(&nowhere, &vms, "w"), ["web", "wiki"]);
        assert_eq!(names(&nowhere, &nowhere, ""), [""; 0]);
        let node = world.node();
        let socket = world.folder.path().join("node.api");
        let _server = api::serve(&node, &socket, None).unwrap();
        assert_eq!(names(&socket, &nowhere, ""), ["db", "web", "wiki"]);
    }
}
