//! The VMs that are defined on this host, and whether it reaches their arbiters.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use outlive_node::definition::{Definition, Folder};

use super::{Defined, Finding};
use crate::arbiter;
use crate::cli;

const NAME: &str = "arbiter";
/// How long an arbiter may take. The server of a directory may be dead, and then nothing of it ever answers.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is found, and the VMs that are defined. Each arbiter is asked once, whoever names it.
pub(super) fn of(vms: &Path, host: &str) -> (Vec<Finding>, Vec<Defined>) {
    let folder = Folder::new(vms.to_owned(), host.to_owned());
    // Without a directory there are no VMs, which is no mistake of a host.
    let read = folder.read(&cli::definitions()).unwrap_or_default();
    let mut findings = Vec::new();
    let (mut seen, mut defined) = (BTreeMap::new(), Vec::new());
    for (vm, definition) in read {
        let definition = match definition {
            Ok(definition) => definition,
            Err(why) => {
                findings.push(Finding::warning("definition", why.to_string(), "outlive node check"));
                continue;
            }
        };
        let place = place(&definition);
        let identity = place.as_ref().and_then(|place| {
            let ask = || {
                let looked = look(place);
                findings.push(judge(place, &looked));
                looked.ok()
            };
            seen.entry(place.clone()).or_insert_with(ask).clone()
        });
        defined.push(Defined { vm, arbiter: definition.values(NAME).next(), identity });
    }
    (findings, defined)
}

/// With the keys that the VM's process would use.
fn place(definition: &Definition) -> Option<String> {
    let keys = definition.values("keys").next();
    definition.values(NAME).next().map(|place| arbiter::with_keys(&place, keys.as_deref().map(Path::new)))
}

/// What an arbiter says that it is, after it was tried whether a claim could be made there now.
fn look(place: &str) -> Result<String, String> {
    let (tell, told) = channel();
    let asked = place.to_owned();
    let look = move || {
        let found = arbiter::parse(&asked).map_err(|why| why.to_string()).and_then(|arbiter| {
            arbiter.prober()().map_err(|why| why.to_string())?;
            Ok(arbiter.identity().to_owned())
        });
        // Nobody may wait any more.
        let _ = tell.send(found);
    };
    thread::Builder::new().name("look".into()).spawn(look).map_err(|why| why.to_string())?;
    told.recv_timeout(PATIENCE).map_err(|_| format!("it has not answered within {} s", PATIENCE.as_secs()))?
}

fn judge(place: &str, looked: &Result<String, String>) -> Finding {
    match looked {
        Ok(_) if arbiter::is_manual(place) => Finding::warning(
            NAME,
            "manual: after a failure the VM waits for an operator",
            "an arbiter on a third machine decides at once (docs/arbitration.md)",
        ),
        Ok(identity) => Finding::ok(NAME, format!("{place} answers (id {identity})")),
        Err(why) => Finding::error(
            NAME,
            format!("{place} cannot be claimed at: {}", one_line(why)),
            "bring it back: without it no VM starts, and none goes on when its hosts lose each other",
        ),
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn arbiters_are_asked_once_each_and_told_with_their_vms() {
        let there = tempfile::tempdir().unwrap();
        let at = |name: &str| there.path().join(name);
        for name in ["vms", "arbiter"] {
            std::fs::create_dir(at(name)).unwrap();
        }
        let good = format!("file:{}", at("arbiter").display());
        let (arbiter, _) = arbiter::init(&good).unwrap();
        let define = |vm: &str, arbiter: &str, disk: usize| {
            let text = format!(
                "ip = '10.0.0.{disk}/24'\ndisk = ['path=/no/{disk}.img']\narbiter = '{arbiter}'\n\
                 listen = '0.0.0.0:700{disk}'\n[host.hosta]\nstandby = ['hostb:7000']\n"
            );
            std::fs::write(at("vms").join(format!("{vm}.toml")), text).unwrap();
        };
        define("a", &good, 1);
        define("b", &good, 2);
        define("c", "file:/no/arbiter", 3);
        std::fs::write(at("vms/d.toml"), "colour = 'red'").unwrap();
        std::fs::write(at("vms/e.toml"), "ip = '10.0.0.5/24'").unwrap();
        let (findings, defined) = of(&at("vms"), "hosta");
        let states: Vec<_> = findings.iter().map(|it| (&*it.name, it.state)).collect();
        let expected = [("arbiter", State::Ok), ("arbiter", State::Error), ("definition", State::Warning)];
        assert_eq!(states, expected, "{findings:?}");
        assert!(findings[1].found.contains("/no/arbiter") && !findings[1].found.contains('\n'));
        let identities: Vec<_> = defined.iter().map(|it| (it.vm.as_str(), it.identity.as_deref())).collect();
        let id = Some(arbiter.identity());
        assert_eq!(identities, [("a", id), ("b", id), ("c", None), ("e", None)]);
        assert_eq!((defined[0].arbiter.as_deref(), &defined[3].arbiter), (Some(good.as_str()), &None));
        assert_eq!(of(&at("missing"), "hosta"), (vec![], vec![]));
    }
}
