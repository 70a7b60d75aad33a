//! Which claims are of no use any more, and how they go.
//!
//! Two kinds go: claims that were superseded long ago, and all that is known of a VM that has ended. The
//! first is done by every winner, so that an arbiter does not grow; the second by an operator only.

use std::io;
use std::time::{Duration, SystemTime};

use super::directory::Found;
use super::file::FileArbiter;
use super::{Ending, VmId, record};

/// So many of the newest claims of a VM stay. One would do for the decisions; the others tell a host that
/// comes back late who took its place.
pub(super) const KEPT: usize = 8;

/// Whether something is removed or only named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// It is removed.
    Remove,
    /// It would be removed.
    Name,
}

/// Removes all claims of a VM but the newest [`KEPT`]. Returns their generations.
///
/// First it is noted, durably, that they count no more. See [`FileArbiter`]: without that a claimant that was
/// stopped in the middle could win one of them again.
pub(super) fn superseded(arbiter: &FileArbiter, vm: &VmId, mode: Mode) -> io::Result<Vec<u64>> {
    let names = arbiter.directory.names(&record::vm_name(vm))?;
    let mut generations: Vec<u64> = names.iter().filter_map(|name| record::parse_claim_name(name)).collect();
    generations.sort_unstable();
    let newest = generations.last().copied();
    let kept = generations.split_off(generations.len().saturating_sub(KEPT));
    if mode == Mode::Name {
        return Ok(generations);
    }
    // An end that the VM was started again after.
    let ends = names.iter().filter_map(|name| record::parse_ended_name(name));
    for generation in ends.filter(|generation| newest.is_some_and(|newest| *generation < newest)) {
        remove(arbiter, &record::ended_name(vm, generation))?;
    }
    if let (false, Some(floor)) = (generations.is_empty(), kept.first()) {
        let note = record::pruned_name(vm, *floor);
        arbiter.directory.publish(&note, &format!("Claims below generation {floor} count no more.\n"))?;
        arbiter.directory.flush(&note)?;
        for generation in &generations {
            remove(arbiter, &record::claim_name(vm, *generation))?;
        }
        // The note before this one stays for whoever is reading the names meanwhile and sees neither a file
        // that comes nor one that goes.
        let mut notes: Vec<u64> = names.iter().filter_map(|name| record::parse_pruned_name(name)).collect();
        notes.retain(|note| note < floor);
        notes.sort_unstable();
        notes.pop();
        for note in notes {
            remove(arbiter, &record::pruned_name(vm, note))?;
        }
    }
    Ok(generations)
}

/// Somebody else may remove the same.
fn remove(arbiter: &FileArbiter, name: &str) -> io::Result<()> {
    match arbiter.directory.remove(name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes everything about a VM that ended in order at least `age` ago. Its images are then of a VM that the
/// arbiter does not know, and start only with an explicit word. Returns whether the VM is such a one.
pub(super) fn forget(arbiter: &FileArbiter, vm: &VmId, age: Duration, mode: Mode) -> io::Result<bool> {
    let Some(ending) = arbiter.find_ending(vm)? else { return Ok(false) };
    let ago = ending.at.and_then(|at| SystemTime::now().duration_since(at).ok());
    if ago.is_none_or(|ago| ago < age) {
        return Ok(false);
    }
    if mode == Mode::Name {
        return Ok(true);
    }
    // Out of the way first, in one step. Whoever has just claimed a generation does not find it any more and
    // has not won; and if somebody had won before, it is put back.
    let (here, aside) = (record::vm_name(vm), format!(".outlive-forgotten-{vm}"));
    arbiter.directory.rename(&here, &aside)?;
    let names = arbiter.directory.names(&aside)?;
    let newest = names.iter().filter_map(|name| record::parse_claim_name(name)).max();
    if newest != Some(ending.generation) {
        arbiter.directory.rename(&aside, &here)?;
        return Ok(false);
    }
    for name in names {
        arbiter.directory.remove(&format!("{aside}/{name}"))?;
    }
    arbiter.directory.remove_directory(&aside)?;
    Ok(true)
}

impl FileArbiter {
    /// How the VM ended, if it did in its newest generation.
    pub(super) fn find_ending(&self, vm: &VmId) -> io::Result<Option<Ending>> {
        let names = self.directory.names(&record::vm_name(vm))?;
        let Some(generation) = names.iter().filter_map(|name| record::parse_claim_name(name)).max() else {
            return Ok(None);
        };
        let name = record::ended_name(vm, generation);
        let Found::Text(text) = self.directory.look(&name)? else { return Ok(None) };
        let at = self.directory.written(&name);
        Ok(record::parse_ended(&text).map(|why| Ending { generation, why: why.to_owned(), at }))
    }

    /// The VMs that the arbiter knows, in the order of their ids.
    ///
    /// # Errors
    /// The file system's, with what helps.
    pub fn vms(&self) -> Result<Vec<VmId>, String> {
        self.checked(|arbiter| {
            let names = arbiter.directory.names("")?;
            let mut vms: Vec<VmId> = names.iter().filter_map(|name| record::parse_vm_name(name)).collect();
            vms.sort_unstable();
            Ok(vms)
        })
    }
}
