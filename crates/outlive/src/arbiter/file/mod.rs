//! The arbiter in a directory: one file for each generation that was won.
//!
//! ```text
//! DIR/outlive-arbiter          which arbiter this is: a random id, written by `outlive arbiter init`
//! DIR/<vm>/<generation>        a claim: who won this generation of this VM
//! DIR/<vm>/pruned.<generation> claims to generations below this one no longer count and are removed
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
//! can be lost after `link` succeeded. Each process has a random token; if a claim holds it, the claim is
//! ours.
//!
//! Each generation but the first can be won only where the claim before it is. A directory without that claim
//! was emptied, or is another one (a mount point without its mount), and there a generation could be won a
//! second time. For the same reason an old copy of the directory must not be put back while a VM runs: it
//! lacks the claims that were won since.
//!
//! Old claims are removed, but never the newest [`KEPT`] of a VM (`prune.rs`). A generation whose claim was
//! removed cannot be won again: `pruned.N`, which is durable before the first claim is removed, says that
//! claims below N no longer count. A claimant looks for it *after* it has written its claim, because it may
//! have been stopped just before, for any time, while other claims came and went. So whoever finds the place
//! of a removed claim free finds `pruned.N` too.
//!
//! Only `outlive arbiter init` makes a directory an arbiter: the mount point of a file system that is not
//! mounted must not look like an arbiter that knows no VM yet.
//!
//! [`KEPT`]: super::KEPT

mod directory;
mod fault;
mod prune;

use std::collections::HashSet;
use std::io;
use std::path::Path;
use std::time::Duration;

use self::directory::{Directory, Found, unusable};
pub(super) use self::fault::not_won;
pub use self::fault::{DirectoryFault, FileSpecError};
use super::record::{self, MARKER, Marker};
use super::registry::Needs;
use super::{
    Arbiter, ArbiterError, ArbiterSpecError, Claim, Ending, Initialized, Mode, Prober, VmId, Win, Winner,
    process_token, random_hex,
};

/// The most files of a VM that a served arbiter keeps. Hosts remove old claims themselves, long before.
const MOST_FILES: usize = 64;
/// How to write it.
pub(super) const FORM: &str =
    "file:DIR, where DIR is a directory that both hosts see, for example file:/srv/outlive";

/// Opens the arbiter of an `--arbiter` option.
pub(super) fn open(place: &str) -> Result<Box<dyn Arbiter>, ArbiterSpecError> {
    Ok(Box::new(FileArbiter::open(parse(place)?)?))
}

/// Whether it is written as one.
pub(super) fn read(place: &str) -> Result<(), ArbiterSpecError> {
    parse(place).map(drop)
}

/// The directory.
pub(super) fn needs(place: &str) -> Needs {
    Needs { kept: vec![place.into()], ..Needs::default() }
}

/// Makes the directory of an `--arbiter` option an arbiter.
pub(super) fn init(place: &str) -> Result<(Box<dyn Arbiter>, Initialized), ArbiterSpecError> {
    let (arbiter, done) = FileArbiter::init(parse(place)?)?;
    Ok((Box::new(arbiter), done))
}

fn parse(place: &str) -> Result<&Path, ArbiterSpecError> {
    if place.is_empty() {
        return Err(ArbiterSpecError::Form("file:".to_owned()));
    }
    Ok(Path::new(place))
}

/// An arbiter in a directory that both hosts see.
pub struct FileArbiter {
    directory: Directory,
    /// Distinguishes the claimant's process from all others, past ones included.
    process: String,
    /// What the marker said when the directory was opened.
    identity: String,
    /// The text of each claim of ours that was answered with `Won`.
    won: HashSet<String>,
}

impl FileArbiter {
    /// Opens the arbiter in a directory.
    ///
    /// # Errors
    /// Why this is no arbiter, or not one that this host can write to.
    pub fn open(path: &Path) -> Result<FileArbiter, FileSpecError> {
        let directory = Directory::at(path)?;
        let identity = match read_marker(&directory, path)? {
            Some(Marker::Current(identity)) => identity,
            Some(Marker::Old(_)) => return Err(FileSpecError::Old(path.to_path_buf())),
            None => return Err(FileSpecError::NotArbiter(path.to_path_buf())),
        };
        directory.try_writing().map_err(|error| unusable(path, error))?;
        let process = process_token().map_err(|error| unusable(path, error))?.to_owned();
        Ok(FileArbiter { directory, process, identity, won: HashSet::new() })
    }

    /// Makes an empty directory an arbiter: the operator says that this is the place, and that it is mounted.
    /// An existing arbiter stays as it is; one of an earlier release is brought up to date, and no VM may use
    /// it meanwhile.
    ///
    /// # Errors
    /// Why the directory cannot be one. Nothing was changed then.
    pub fn init(path: &Path) -> Result<(FileArbiter, Initialized), FileSpecError> {
        let directory = Directory::at(path)?;
        let failed = |error: io::Error| unusable(path, error);
        let done = match read_marker(&directory, path)? {
            Some(Marker::Current(_)) => Initialized::Already,
            Some(Marker::Old(identity)) => {
                upgrade(&directory, &identity).map_err(failed)?;
                Initialized::Upgraded
            }
            None => {
                refuse_strangers(&directory, path)?;
                let identity = random_hex().map_err(failed)?;
                // If several processes do this at once, one wins, and all open the same arbiter.
                directory.publish(MARKER, &Marker::text(&identity)).map_err(failed)?;
                directory.flush(MARKER).map_err(failed)?;
                Initialized::Made
            }
        };
        Ok((FileArbiter::open(path)?, done))
    }

    /// The same arbiter, once more.
    fn twin(&self) -> Self {
        self.on_behalf_of(&self.process)
    }

    /// The same arbiter, for claims of the process that has this token.
    pub(super) fn on_behalf_of(&self, process: &str) -> Self {
        Self {
            directory: self.directory.clone(),
            process: process.to_owned(),
            identity: self.identity.clone(),
            won: HashSet::new(),
        }
    }

    fn try_claim(&mut self, vm: &VmId, generation: u64, owner: &str) -> Result<Claim, DirectoryFault> {
        self.directory.check(&self.identity)?;
        let text = record::claim_text(vm, generation, owner, &self.process);
        let claim = self.find_or_publish(vm, generation, &text)?;
        if claim != Claim::Won || self.won.contains(&text) {
            return Ok(claim);
        }
        // Check once more after our own claim was seen. Just before it was written, now or in an earlier
        // attempt, the directory may have been emptied, or this VM's newer claims may have pruned this one.
        let floor = self.directory.names(&record::vm_name(vm))?;
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

    /// Who owns this generation after an attempt to make it ours. `text` is our claim.
    fn find_or_publish(&self, vm: &VmId, generation: u64, text: &str) -> Result<Claim, DirectoryFault> {
        let name = record::claim_name(vm, generation);
        if let Some(claim) = self.judge(&name, text)? {
            return Ok(claim);
        }
        if let Some(newer) = self.newer(vm, generation)? {
            return Ok(newer);
        }
        self.check_predecessor(vm, generation)?;
        if generation <= 1 {
            self.directory.make(&record::vm_name(vm))?;
        }
        let published = self.directory.publish(&name, text);
        match (self.judge(&name, text)?, published) {
            (Some(claim), _) => Ok(claim),
            (None, Err(error)) => Err(error.into()),
            (None, Ok(())) => Err(DirectoryFault::ClaimGone),
        }
    }

    /// A generation that is newer than this one ends every claim to it.
    fn newer(&self, vm: &VmId, generation: u64) -> Result<Option<Claim>, DirectoryFault> {
        let highest = self.find_highest(vm)?;
        Ok(highest.filter(|highest| *highest > generation).map(|highest| {
            let owner = self.win(vm, highest).winner.map_or_else(String::new, |it| format!(", {}", it.owner));
            Claim::Lost { owner: format!("generation {highest}, which is newer{owner}") }
        }))
    }

    /// Makes sure that the claim before this one is here. Whoever it belongs to, it shows that this is the
    /// place where the generations of this VM are won. The first generation of a new VM has none before it.
    fn check_predecessor(&self, vm: &VmId, generation: u64) -> Result<(), DirectoryFault> {
        if generation <= 1 {
            return Ok(());
        }
        match self.directory.read(&record::claim_name(vm, generation - 1))? {
            Found::Nothing => Err(DirectoryFault::LostClaims),
            Found::Text(_) | Found::Garbage(_) => Ok(()),
        }
    }

    /// Who owns the claim of this name, if it exists. `text` is our own claim.
    ///
    /// Nobody can tell who owns a damaged claim. If both sides took it for lost, the VM would be gone for
    /// good, so both wait for an operator.
    fn judge(&self, name: &str, text: &str) -> Result<Option<Claim>, DirectoryFault> {
        let damaged = |problem: String| DirectoryFault::DamagedClaim { name: name.to_owned(), problem };
        match self.directory.read(name)? {
            Found::Nothing => Ok(None),
            Found::Garbage(problem) => Err(damaged(problem)),
            Found::Text(found) if found == text => {
                // The claim may be visible without being on the disk; a crash of the server would then forget
                // who won.
                self.directory.flush(name)?;
                Ok(Some(Claim::Won))
            }
            Found::Text(found) => match record::parse_claim(&found) {
                Some((owner, _)) => Ok(Some(Claim::Lost { owner: owner.to_string() })),
                None => Err(damaged("Outlive does not write such a file".into())),
            },
        }
    }

    /// What is known of a generation that was won.
    fn win(&self, vm: &VmId, generation: u64) -> Win {
        let name = record::claim_name(vm, generation);
        let winner = match self.directory.read(&name) {
            Ok(Found::Text(text)) => record::parse_claim(&text)
                .map(|(owner, process)| Winner { owner: owner.to_owned(), process: process.to_owned() }),
            _ => None,
        };
        Win { generation, winner, at: self.directory.written(&name) }
    }

    /// Whether this process has won a generation.
    fn has_won(&self, vm: &VmId, generation: u64) -> io::Result<bool> {
        let Found::Text(text) = self.directory.read(&record::claim_name(vm, generation))? else {
            return Ok(false);
        };
        Ok(record::parse_claim(&text).is_some_and(|(_, process)| process == self.process))
    }

    /// Removes old claims of a VM whose hosts leave that to others: at most so many of its files stay.
    pub(super) fn keep_small(&self, vm: &VmId) -> Result<(), ArbiterError> {
        self.checked(|arbiter| {
            if arbiter.directory.names(&record::vm_name(vm))?.len() > MOST_FILES {
                prune::superseded(arbiter, vm, Mode::Remove)?;
            }
            Ok(())
        })
    }

    fn find_highest(&self, vm: &VmId) -> io::Result<Option<u64>> {
        let names = self.directory.names(&record::vm_name(vm))?;
        Ok(names.iter().filter_map(|name| record::parse_claim_name(name)).max())
    }

    fn unreachable(&self, fault: DirectoryFault) -> ArbiterError {
        ArbiterError::Directory { directory: self.directory.path().to_path_buf(), fault }
    }

    /// Uses the directory after making sure that it is still the one that was opened.
    fn checked<T>(&self, work: impl FnOnce(&Self) -> io::Result<T>) -> Result<T, ArbiterError> {
        let done = self.directory.check(&self.identity).and_then(|()| Ok(work(self)?));
        done.map_err(|fault| self.unreachable(fault))
    }
}

impl Arbiter for FileArbiter {
    fn claim(&mut self, vm: &VmId, generation: u64, owner: &str) -> Claim {
        self.try_claim(vm, generation, owner)
            .unwrap_or_else(|fault| Claim::Unreachable { why: self.unreachable(fault).to_string() })
    }

    fn highest(&mut self, vm: &VmId) -> Result<Option<u64>, ArbiterError> {
        self.checked(|arbiter| arbiter.find_highest(vm))
    }

    fn history(&mut self, vm: &VmId) -> Result<Vec<Win>, ArbiterError> {
        self.checked(|arbiter| {
            let names = arbiter.directory.names(&record::vm_name(vm))?;
            let mut generations: Vec<u64> =
                names.iter().filter_map(|name| record::parse_claim_name(name)).collect();
            generations.sort_unstable();
            Ok(generations.into_iter().map(|generation| arbiter.win(vm, generation)).collect())
        })
    }

    fn ending(&mut self, vm: &VmId) -> Result<Option<Ending>, ArbiterError> {
        self.checked(|arbiter| arbiter.find_ending(vm))
    }

    fn note_end(&mut self, vm: &VmId, generation: u64, why: &str) -> Result<(), ArbiterError> {
        if !self.checked(|arbiter| arbiter.has_won(vm, generation))? {
            return Err(self.unreachable(DirectoryFault::NotWinner(generation)));
        }
        self.checked(|arbiter| {
            let name = record::ended_name(vm, generation);
            arbiter.directory.publish(&name, &record::ended_text(vm, generation, why))?;
            arbiter.directory.flush(&name)
        })
    }

    fn vms(&mut self) -> Result<Vec<VmId>, ArbiterError> {
        self.checked(|arbiter| {
            let names = arbiter.directory.names("")?;
            let mut vms: Vec<VmId> = names.iter().filter_map(|name| record::parse_vm_name(name)).collect();
            vms.sort_unstable();
            Ok(vms)
        })
    }

    fn prune(&mut self, vm: &VmId, mode: Mode) -> Result<Vec<u64>, ArbiterError> {
        let pruned = self.checked(|arbiter| prune::superseded(arbiter, vm, mode));
        if mode == Mode::Remove {
            self.directory.remove_leftovers();
        }
        pruned
    }

    fn forget(&mut self, vm: &VmId, age: Duration, mode: Mode) -> Result<bool, ArbiterError> {
        self.checked(|arbiter| prune::forget(arbiter, vm, age, mode))
    }

    fn prober(&self) -> Prober {
        let twin = self.twin();
        Box::new(move || twin.checked(|arbiter| arbiter.directory.try_writing()))
    }

    fn identity(&self) -> &str {
        &self.identity
    }
}

fn read_marker(directory: &Directory, path: &Path) -> Result<Option<Marker>, FileSpecError> {
    let unusable = |fault| FileSpecError::Unusable { directory: path.to_path_buf(), fault };
    directory.read_marker().map_err(unusable)
}

/// A directory in use for something else is most likely the wrong one. A directory with claims and without a
/// marker was an arbiter, and a new identity would hide that.
fn refuse_strangers(directory: &Directory, path: &Path) -> Result<(), FileSpecError> {
    let names = directory.names("").map_err(|error| unusable(path, error))?;
    let usual = |name: &String| name.starts_with('.') || name == "lost+found" || name == MARKER;
    match names.into_iter().find(|name| !usual(name)) {
        Some(found) => Err(FileSpecError::NotEmpty { directory: path.to_path_buf(), found }),
        None => Ok(()),
    }
}

/// Moves the claims of version 1 to their places in version 2. The marker comes last, so that an interrupted
/// move continues when it is run again.
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
