//! What a node notes down on this host: which VMs shall run, which processes they have, and the locks by which it knows them.
//! No process of a VM may write there: it could have other VMs started or stopped, or be taken for another one.
//!
//! It is usually in the directory in which VMs have their things (`/var/lib/outlive`), and there an image gives a process the
//! right to all that is beside it. So the process has nothing of it in its mounts (`run.rs`), but for the place of its own
//! events. Where that is not to be had, such a process is refused.

use std::path::{Path, PathBuf};

use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, faccessat};
use outlive_node::{STATE, STATE_VARIABLE};

use super::run::{NotHidden, Own};

/// What is in it that is the node's alone.
const OWN: [&str; 3] = ["vms", "locks", "mode.json"];

/// The node's state is within reach of a rule.
#[derive(Debug, thiserror::Error)]
#[error(
    "{place} is needed as a whole, and what this host's node notes down ({state}) is in it and cannot be hidden: {why}. \
     Whoever breaks out of the guest could command other VMs. Keep the VM's things in a directory of their own, as \
     /var/lib/outlive/NAME (docs/sandbox.md)"
)]
pub(crate) struct InReach {
    place: String,
    state: String,
    why: String,
}

/// The states of nodes that are here: of the node that has started this process, and of one that is started as usual.
#[derive(Clone, Debug, Default)]
pub(super) struct States(Vec<PathBuf>);

impl States {
    /// Those that are there.
    pub(super) fn find() -> Self {
        let said = std::env::var_os(STATE_VARIABLE).map(PathBuf::from);
        Self::of(said.into_iter().chain([STATE.into()]))
    }

    fn of(folders: impl Iterator<Item = PathBuf>) -> Self {
        let mut there: Vec<_> = folders.filter_map(|it| it.canonicalize().ok()).collect();
        there.sort();
        there.dedup();
        Self(there)
    }

    /// Leaves of them only the places that are needed.
    ///
    /// # Errors
    /// See [`NotHidden`].
    pub(super) fn hide(&self, own: &Own, needed: &[PathBuf]) -> Result<(), NotHidden> {
        self.0.iter().try_for_each(|state| own.hide(state, needed.iter().cloned()))
    }

    /// Looks whether this process, with the rights that it has now, could write to one of them through a rule for this place.
    /// `why`: why they are not hidden, if they are not.
    ///
    /// # Errors
    /// See [`InReach`].
    pub(super) fn check(&self, place: &Path, why: Option<&NotHidden>) -> Result<(), InReach> {
        let Ok(place) = place.canonicalize() else { return Ok(()) };
        let reached = self.0.iter().find(|state| {
            // What is hidden cannot be written to.
            let around = state.starts_with(&place) && **state != place;
            let may = || faccessat(AT_FDCWD, *state, AccessFlags::W_OK, AtFlags::AT_EACCESS).is_ok();
            **state == place || OWN.iter().any(|own| place.starts_with(state.join(own))) || around && may()
        });
        reached.map_or(Ok(()), |state| {
            let why = why.map_or_else(|| "it is that place itself".to_owned(), ToString::to_string);
            Err(InReach { place: place.display().to_string(), state: state.display().to_string(), why })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn no_place_around_the_state_or_in_what_is_the_nodes_is_given() {
        let directory = tempfile::tempdir().unwrap();
        let whole = directory.path().canonicalize().unwrap();
        let state = whole.join("node");
        for folder in ["node/vms", "node/locks", "node/events/web", "web"] {
            fs::create_dir_all(whole.join(folder)).unwrap();
        }
        let states =
            States::of([state.clone(), whole.join("nowhere"), whole.join("node/../node")].into_iter());
        assert_eq!(states.0, std::slice::from_ref(&state));
        for place in [Path::new("/"), &whole, &state, &state.join("vms"), &state.join("locks")] {
            let why = states.check(place, Some(&NotHidden::NotShared)).unwrap_err().to_string();
            assert!(
                why.contains("make-rshared") && why.contains("of their own") && !why.contains('\n'),
                "{why}"
            );
        }
        for place in ["web", "node/events/web", "no-such-place"] {
            states.check(&whole.join(place), None).unwrap();
        }
    }
}
