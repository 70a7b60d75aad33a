//! The arbiter in a directory: one file for each generation that was won.
//!
//! ```text
//! DIR/outlive-arbiter          which arbiter this is: a random id, written by `outlive arbiter init`
//! DIR/<vm>/<generation>        a claim: who won this generation of this VM
//! DIR/<vm>/pruned.<generation> claims to generations below this one count no more and are removed
//! DIR/<vm>/ended.<generation>  the VM ended in order in this generation; for people and for pruning
//! DIR/.outlive-*.tmp           a file that is being written
//! ```
//!
//! A claim is written to a file of its own, flushed to the disk, and then given its final name with
//! `link(2)`, which fails if the name exists. That is the one test-and-set that is atomic on local file
//! systems and on every version of NFS. So the final name never shows a half-written claim, and there is
//! never more than one.
//!
//! What decides is the *content* behind the final name, not the answer of `link`: over a network an answer
//! can be lost after the deed was done. Each process has a random token, and finding it there means that the
//! claim was ours.
//!
//! Each generation but the first is won beside the claim before it: a directory without that claim was
//! emptied, or is another one (a mount point without its mount), and what was won elsewhere could be won
//! there a second time. For the same reason an old copy of the directory must not be put back while a VM
//! runs: it lacks the claims that were won since.
//!
//! Old claims are removed, and the newest [`KEPT`] of a VM never (`prune.rs`). A generation whose claim was
//! removed cannot be won again: `pruned.N`, which is durable before the first claim goes, says that claims
//! below N count no more. It is looked for *after* the own claim was written: its writer may have been
//! stopped for any time just before, and everybody else's claims have come and gone meanwhile. Whoever finds
//! the place of a removed claim free finds `pruned.N` too.
//!
//! A directory becomes an arbiter by `outlive arbiter init` and in no other way: the mount point of a file
//! system that is not mounted must not look like an arbiter that knows of no VM yet.
//!
//! [`KEPT`]: super::prune::KEPT

use std::collections::HashSet;
use std::io;
use std::path::Path;

use super::directory::{Directory, Found, explain, unusable};
use super::record::{self, MARKER, Marker};
use super::{Arbiter, ArbiterSpecError, Claim, Ending, LOST_CLAIMS, VmId, Win, Winner};
use super::{process_token, prune, random_hex};

/// An arbiter in a directory that both hosts see.
pub struct FileArbiter {
    pub(super) directory: Directory,
    /// Tells this process from all others, those of the past included.
    process: &'static str,
    /// What the marker said when the directory was opened.
    identity: String,
    /// Own claims that were answered with `Won`: the text of each.
    won: HashSet<String>,
}

/// What [`FileArbiter::init`] has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initialized {
    /// The directory is an arbiter from now on.
    Made,
    /// It was one before; nothing was changed.
    Already,
    /// It was one of an earlier release, with the same identity and claims.
    Upgraded,
}

impl FileArbiter {
    /// Opens the arbiter in a directory.
    ///
    /// # Errors
    /// Why this is none, or none that this host can write to.
    pub fn open(path: &Path) -> Result<FileArbiter, ArbiterSpecError> {
        let directory = Directory::at(path)?;
        let identity = match read_marker(&directory, path)? {
            Some(Marker::Current(identity)) => identity,
            Some(Marker::Old(_)) => return Err(ArbiterSpecError::Old(path.to_path_buf())),
            None => return Err(ArbiterSpecError::NotArbiter(path.to_path_buf())),
        };
        directory.try_writing().map_err(|error| unusable(path, &error))?;
        let process = process_token().map_err(|error| unusable(path, &error))?;
        Ok(FileArbiter { directory, process, identity, won: HashSet::new() })
    }

    /// Makes an arbiter of an empty directory: the operator says that this is the place, and that it is
    /// mounted. An arbiter stays as it is, and one of an earlier release is brought up to date; no VM may use
    /// it meanwhile.
    ///
    /// # Errors
    /// Why the directory cannot be one. Nothing was changed then.
    pub fn init(path: &Path) -> Result<(FileArbiter, Initialized), ArbiterSpecError> {
        let directory = Directory::at(path)?;
        let failed = |error: io::Error| unusable(path, &error);
        let done = match read_marker(&directory, path)? {
            Some(Marker::Current(_)) => Initialized::Already,
            Some(Marker::Old(identity)) => {
                upgrade(&directory, &identity).map_err(failed)?;
                Initialized::Upgraded
            }
            None => {
                refuse_strangers(&directory, path)?;
                let identity = random_hex().map_err(failed)?;
                // Of several that do this at once one wins, and all open the same arbiter.
                directory.publish(MARKER, &Marker::text(&identity)).map_err(failed)?;
                directory.flush(MARKER).map_err(failed)?;
                Initialized::Made
            }
        };
        Ok((FileArbiter::open(path)?, done))
    }

    fn try_claim(&mut self, vm: &VmId, generation: u64, owner: &str) -> Result<Claim, String> {
        self.directory.check(&self.identity)?;
        let text = record::claim_text(vm, generation, owner, self.process);
        let claim = self.find_or_publish(vm, generation, &text)?;
        if claim != Claim::Won || self.won.contains(&text) {
            return Ok(claim);
        }
        // Looked for once more, after the own claim was seen: the directory may have been emptied, or the
        // claims of this VM have gone on and this one been pruned, just before it was written, now or in an
        // earlier attempt.
        let floor = self.directory.names(&record::vm_name(vm)).map_err(|error| explain(&error))?;
        let floor = floor.iter().filter_map(|name| record::parse_pruned_name(name)).max();
        if floor.is_some_and(|floor| generation < floor)
            && let Some(newer) = self.newer(vm, generation)?
        {
            return Ok(newer);
        }
        self.check_predecessor(vm, generation)?;
        self.won.insert(text);
        Ok(claim)
    }

    /// Who owns this generation, after an attempt to make it ours. `text` is what our claim looks like.
    fn find_or_publish(&self, vm: &VmId, generation: u64, text: &str) -> Result<Claim, String> {
        let name = record::claim_name(vm, generation);
        if let Some(claim) = self.judge(&name, text)? {
            return Ok(claim);
        }
        if let Some(newer) = self.newer(vm, generation)? {
            return Ok(newer);
        }
        self.check_predecessor(vm, generation)?;
        if generation <= 1 {
            self.directory.make(&record::vm_name(vm)).map_err(|error| explain(&error))?;
        }
        let published = self.directory.publish(&name, text);
        match (self.judge(&name, text)?, published) {
            (Some(claim), _) => Ok(claim),
            (None, Err(error)) => Err(explain(&error)),
            (None, Ok(())) => Err("a claim that was just written is not there".to_string()),
        }
    }

    /// A generation that is newer than this one ends every claim to it.
    fn newer(&self, vm: &VmId, generation: u64) -> Result<Option<Claim>, String> {
        let highest = self.find_highest(vm).map_err(|error| explain(&error))?;
        Ok(highest.filter(|highest| *highest > generation).map(|highest| {
            let owner = self.win(vm, highest).winner.map_or_else(String::new, |it| format!(", {}", it.owner));
            Claim::Lost { owner: format!("generation {highest}, which is newer{owner}") }
        }))
    }

    /// Makes sure that the claim before this one is here. Whoever it belongs to, it shows that this is the
    /// place where the generations of this VM are won. The first generation of a new VM has none before it.
    fn check_predecessor(&self, vm: &VmId, generation: u64) -> Result<(), String> {
        if generation <= 1 {
            return Ok(());
        }
        match self.look(&record::claim_name(vm, generation - 1))? {
            Found::Nothing => Err(LOST_CLAIMS.to_string()),
            Found::Text(_) | Found::Garbage(_) => Ok(()),
        }
    }

    /// Who owns the claim of this name, if it exists. `text` is what our own claim looks like.
    ///
    /// A damaged claim belongs to nobody that can be told: if both sides took it for lost, the VM would be
    /// gone for good. They wait for an operator.
    fn judge(&self, name: &str, text: &str) -> Result<Option<Claim>, String> {
        let damaged = |problem: &str| {
            format!(
                "its claim {name} is damaged ({problem}): restore it; or make sure that no host runs this VM in that \
                 generation, and delete the file"
            )
        };
        match self.look(name)? {
            Found::Nothing => Ok(None),
            Found::Garbage(problem) => Err(damaged(&problem)),
            Found::Text(found) if found == text => {
                // It may be there without being on the disk: a crash of the server would forget who won.
                self.directory.flush(name).map_err(|error| explain(&error))?;
                Ok(Some(Claim::Won))
            }
            Found::Text(found) => match record::parse_claim(&found) {
                Some((owner, _)) => Ok(Some(Claim::Lost { owner: owner.to_string() })),
                None => Err(damaged("not what Outlive writes")),
            },
        }
    }

    fn look(&self, name: &str) -> Result<Found, String> {
        self.directory.look(name).map_err(|error| explain(&error))
    }

    /// What is known of a generation that was won.
    fn win(&self, vm: &VmId, generation: u64) -> Win {
        let name = record::claim_name(vm, generation);
        let winner = match self.directory.look(&name) {
            Ok(Found::Text(text)) => record::parse_claim(&text)
                .map(|(owner, process)| Winner { owner: owner.to_owned(), process: process.to_owned() }),
            _ => None,
        };
        Win { generation, winner, at: self.directory.written(&name) }
    }

    fn find_highest(&self, vm: &VmId) -> io::Result<Option<u64>> {
        let names = self.directory.names(&record::vm_name(vm))?;
        Ok(names.iter().filter_map(|name| record::parse_claim_name(name)).max())
    }

    /// Adds the directory to a reason.
    pub(super) fn unreachable(&self, why: &str) -> String {
        format!("arbiter directory {}: {why}", self.directory.path().display())
    }

    /// Does something with the directory once it is known to be the one that was opened.
    pub(super) fn checked<T>(&self, work: impl FnOnce(&Self) -> io::Result<T>) -> Result<T, String> {
        let checked = self.directory.check(&self.identity);
        checked
            .and_then(|()| work(self).map_err(|error| explain(&error)))
            .map_err(|why| self.unreachable(&why))
    }
}

impl Arbiter for FileArbiter {
    fn claim(&mut self, vm: &VmId, generation: u64, owner: &str) -> Claim {
        self.try_claim(vm, generation, owner)
            .unwrap_or_else(|why| Claim::Unreachable { why: self.unreachable(&why) })
    }

    fn highest(&mut self, vm: &VmId) -> Result<Option<u64>, String> {
        self.checked(|arbiter| arbiter.find_highest(vm))
    }

    fn history(&mut self, vm: &VmId) -> Result<Vec<Win>, String> {
        self.checked(|arbiter| {
            let names = arbiter.directory.names(&record::vm_name(vm))?;
            let mut generations: Vec<u64> =
                names.iter().filter_map(|name| record::parse_claim_name(name)).collect();
            generations.sort_unstable();
            Ok(generations.into_iter().map(|generation| arbiter.win(vm, generation)).collect())
        })
    }

    fn ending(&mut self, vm: &VmId) -> Result<Option<Ending>, String> {
        self.checked(|arbiter| arbiter.find_ending(vm))
    }

    fn note_end(&mut self, vm: &VmId, generation: u64, why: &str) -> Result<(), String> {
        self.checked(|arbiter| {
            let name = record::ended_name(vm, generation);
            arbiter.directory.publish(&name, &record::ended_text(vm, generation, why))?;
            arbiter.directory.flush(&name)
        })
    }

    fn tidy(&mut self, vm: &VmId) {
        let pruned = self.checked(|arbiter| prune::superseded(arbiter, vm, prune::Mode::Remove));
        if let Err(why) = pruned {
            tracing::debug!("old claims are not removed: {why}");
        }
        self.directory.remove_leftovers();
    }

    fn identity(&self) -> &str {
        &self.identity
    }
}

fn read_marker(directory: &Directory, path: &Path) -> Result<Option<Marker>, ArbiterSpecError> {
    let unusable = |why| ArbiterSpecError::Unusable { directory: path.to_path_buf(), why };
    directory.read_marker().map_err(unusable)
}

/// A directory in use for something else is most likely a wrong one. One with claims and without a marker
/// was an arbiter, and a new identity would hide that.
fn refuse_strangers(directory: &Directory, path: &Path) -> Result<(), ArbiterSpecError> {
    let names = directory.names("").map_err(|error| unusable(path, &error))?;
    let usual = |name: &String| name.starts_with('.') || name == "lost+found" || name == MARKER;
    match names.into_iter().find(|name| !usual(name)) {
        Some(found) => Err(ArbiterSpecError::NotEmpty { directory: path.to_path_buf(), found }),
        None => Ok(()),
    }
}

/// Moves the claims of version 1 to their places in version 2. The marker comes last: if this is interrupted,
/// doing it again goes on.
fn upgrade(directory: &Directory, identity: &str) -> io::Result<()> {
    for name in directory.names("")? {
        if let Some((vm, generation)) = record::parse_old_claim_name(&name) {
            directory.make(&record::vm_name(&vm))?;
            directory.rename(&name, &record::claim_name(&vm, generation))?;
            directory.flush(&record::claim_name(&vm, generation))?;
        }
    }
    directory.replace(MARKER, &Marker::text(identity))
}
