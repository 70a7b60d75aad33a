//! Which claims are no longer useful, and how they are removed.
//!
//! There are two kinds: claims that were superseded long ago, and everything about a VM that has ended. Every
//! winner removes the first kind, so that an arbiter does not grow; only an operator removes the second.

use std::io;
use std::time::{Duration, SystemTime};

use super::FileArbiter;
use super::directory::Found;
use crate::arbiter::{Ending, KEPT, Mode, VmId, record};

/// Removes all claims of a VM but the newest [`KEPT`]. Returns their generations.
///
/// First a durable note says that they no longer count. Without it, a claimant that was stopped in the middle
/// could win one of them again; see [`FileArbiter`].
pub(super) fn superseded(arbiter: &FileArbiter, vm: &VmId, mode: Mode) -> io::Result<Vec<u64>> {
    let names = arbiter.directory.names(&record::vm_name(vm))?;
    let mut generations: Vec<u64> = names.iter().filter_map(|name| record::parse_claim_name(name)).collect();
    generations.sort_unstable();
    let newest = generations.last().copied();
    let kept = generations.split_off(generations.len().saturating_sub(KEPT));
    if mode == Mode::Name {
        return Ok(generations);
    }
    for generation in names.iter().filter_map(|name| record::parse_ended_name(name)) {
        let ran_again = newest.is_some_and(|newest| generation < newest);
        // Earlier releases took anybody's word. The claim is older than its end, so it would be here.
        let unfounded = || {
            let claim = arbiter.directory.read(&record::claim_name(vm, generation))?;
            Ok::<_, io::Error>(matches!(claim, Found::Nothing))
        };
        if ran_again || unfounded()? {
            remove(arbiter, &record::ended_name(vm, generation))?;
        }
    }
    if let (false, Some(floor)) = (generations.is_empty(), kept.first()) {
        let note = record::pruned_name(vm, *floor);
        arbiter.directory.publish(&note, &format!("Claims below generation {floor} no longer count.\n"))?;
        arbiter.directory.flush(&note)?;
        for generation in &generations {
            remove(arbiter, &record::claim_name(vm, *generation))?;
        }
        // The previous note stays for processes that are listing the directory now: they may see neither a
        // file that is being added nor one that is being removed.
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

/// Removes a file that another process may be removing too.
fn remove(arbiter: &FileArbiter, name: &str) -> io::Result<()> {
    match arbiter.directory.remove(name) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes everything about a VM that ended in order at least `age` ago. The arbiter then does not know the
/// VM of its images, and they start only with an explicit option. Returns whether the VM was old enough.
pub(super) fn forget(arbiter: &FileArbiter, vm: &VmId, age: Duration, mode: Mode) -> io::Result<bool> {
    let Some(ending) = arbiter.find_ending(vm)? else { return Ok(false) };
    let ago = ending.at.and_then(|at| SystemTime::now().duration_since(at).ok());
    if ago.is_none_or(|ago| ago < age) {
        return Ok(false);
    }
    if mode == Mode::Name {
        return Ok(true);
    }
    // First move it out of the way, in one step. A host that has just claimed a generation no longer finds it
    // and has not won; if a host had won before, the directory is put back.
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
        let Found::Text(text) = self.directory.read(&name)? else { return Ok(None) };
        let at = self.directory.written(&name);
        Ok(record::parse_ended(&text).map(|why| Ending { generation, why: why.to_owned(), at }))
    }
}
