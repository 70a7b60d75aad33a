//! The arbiter in a directory: one file for each generation that was won.
//!
//! ```text
//! DIR/outlive-arbiter          which arbiter this is: a random id, written by the first that opened DIR
//! DIR/<vm>.<generation>        a claim: who won this generation of this VM
//! DIR/.outlive-*.tmp           a claim that is being written
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
//! Claims are never deleted by the program. Each generation but the first is won beside the claim before it:
//! a directory without that claim was emptied, or is another one (a mount point without its mount), and what
//! was won elsewhere could be won there a second time. So an operator may delete the claims of a VM only when
//! the VM has ended, and keeps at least the newest of every other. For the same reason an old copy of the
//! directory must not be put back while a VM runs: it lacks the claims that were won since.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;

use super::{Arbiter, ArbiterSpecError, Claim, VmId};
use crate::process;

/// Name of the file that says which arbiter a directory is.
const MARKER: &str = "outlive-arbiter";
const MARKER_TITLE: &str = "outlive arbiter directory, version 1";
const CLAIM_TITLE: &str = "outlive claim, version 1";
/// Last line of both files: what is shorter was damaged.
const END: &str = "end";
const TEMP_PREFIX: &str = ".outlive-";
const TEMP_SUFFIX: &str = ".tmp";
/// A claim takes milliseconds. One that is unfinished for so long was left by a crash; should its writer live
/// after all (a file server that hung), it sees that its file is gone and claims again.
const LEFTOVER_AGE: Duration = Duration::from_secs(600);
/// Claims are a few hundred bytes. Nothing longer is read.
const LONGEST_FILE: u64 = 4096;
/// Longest owner name that is written, in characters.
const LONGEST_OWNER: usize = 200;
const LOST_CLAIMS: &str = "the arbiter directory has lost the claims of this VM: bring the right directory back; nobody \
                           goes on without it";

/// An arbiter in a directory that both hosts see.
pub struct FileArbiter {
    directory: PathBuf,
    /// Tells this process from all others, those of the past included.
    token: &'static str,
    /// What the marker said when the directory was opened.
    identity: String,
    /// The file system that the directory was on.
    device: u64,
    /// Own claims that were answered with `Won`: the text of each.
    won: HashSet<String>,
}

/// What is behind a name in the directory.
enum Found {
    Nothing,
    Text(String),
    /// It exists and is no file of ours.
    Garbage(String),
}

impl FileArbiter {
    /// Opens an existing directory and puts the marker into it, if it has none.
    pub fn open(directory: &Path) -> Result<FileArbiter, ArbiterSpecError> {
        let unusable = |why: String| ArbiterSpecError::Unusable { directory: directory.to_path_buf(), why };
        // Absolute, so that it stays the same directory if the process goes elsewhere.
        let absolute = std::path::absolute(directory).map_err(|error| unusable(explain(&error)))?;
        let metadata = match fs::metadata(&absolute) {
            Ok(metadata) if metadata.is_dir() => metadata,
            Ok(_) => return Err(ArbiterSpecError::NotDirectory(directory.to_path_buf())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ArbiterSpecError::Missing(directory.to_path_buf()));
            }
            Err(error) => return Err(unusable(explain(&error))),
        };
        let token = process_token().map_err(|error| unusable(format!("no random numbers: {error}")))?;
        let mut arbiter = FileArbiter {
            directory: absolute,
            token,
            identity: String::new(),
            device: metadata.dev(),
            won: HashSet::new(),
        };
        arbiter.identity = arbiter.establish_identity().map_err(unusable)?;
        arbiter.try_writing().map_err(|error| unusable(explain(&error)))?;
        Ok(arbiter)
    }

    /// Writes and removes a file as a claim would be. Who may only read here would look like a good standby
    /// until the moment when it has to win.
    fn try_writing(&self) -> io::Result<()> {
        let name = format!(".outlive-probe-{}", random_hex()?);
        self.publish(&name, "This host can write here.\n")?;
        fs::remove_file(self.directory.join(name))
    }

    /// Reads the marker, or writes it with a new id if there is none. Of several that write it one wins.
    fn establish_identity(&self) -> Result<String, String> {
        if let Some(identity) = self.read_marker()? {
            return Ok(identity);
        }
        let fresh = random_hex().map_err(|error| format!("no random numbers: {error}"))?;
        self.publish(MARKER, &marker_text(&fresh)).map_err(|error| explain(&error))?;
        self.read_marker()?.ok_or_else(|| "a file that was just written is not there".to_string())
    }

    fn read_marker(&self) -> Result<Option<String>, String> {
        let damaged = |problem: &str| {
            format!(
                "its file {MARKER} is damaged ({problem}): restore it, or delete it while no VM uses this arbiter"
            )
        };
        match self.look(MARKER).map_err(|error| explain(&error))? {
            Found::Nothing => Ok(None),
            Found::Garbage(problem) => Err(damaged(&problem)),
            Found::Text(text) => {
                let id =
                    field(&text, MARKER_TITLE, "id").ok_or_else(|| damaged("not what Outlive writes"))?;
                Ok(Some(id.to_string()))
            }
        }
    }

    /// Makes sure that this still is the directory that was opened.
    ///
    /// If the shared file system is not mounted, its mount point is an ordinary empty directory: each host
    /// would win there alone.
    fn check_directory(&self) -> Result<(), String> {
        let metadata = fs::metadata(&self.directory).map_err(|error| explain(&error))?;
        match self.read_marker()? {
            Some(identity) if identity == self.identity => Ok(()),
            Some(other) => Err(format!(
                "it is another arbiter now (id {other}, at the start {}): mount the right file system there",
                self.identity
            )),
            None if metadata.dev() != self.device => {
                Err("another file system is there now: mount the one that was there at the start".to_string())
            }
            // Emptied, made anew, or a mount point on the same file system. A marker written now would only
            // hide that the claims are gone.
            None => Err(format!("its file {MARKER} is gone; {LOST_CLAIMS}")),
        }
    }

    fn try_claim(&mut self, vm: &VmId, generation: u64, owner: &str) -> Result<Claim, String> {
        self.check_directory()?;
        let text = claim_text(vm, generation, &printable(owner), self.token);
        let claim = self.find_or_publish(vm, generation, &text)?;
        // Looked for once more, after the own claim was seen: the directory may have been emptied just before
        // it was written, now or in an earlier attempt.
        if claim == Claim::Won && !self.won.contains(&text) {
            self.check_predecessor(vm, generation)?;
            self.won.insert(text);
        }
        Ok(claim)
    }

    /// Who owns this generation, after an attempt to make it ours. `text` is what our claim looks like.
    fn find_or_publish(&self, vm: &VmId, generation: u64, text: &str) -> Result<Claim, String> {
        let name = claim_name(vm, generation);
        if let Some(claim) = self.judge(&name, text)? {
            return Ok(claim);
        }
        if let Some(higher) = self.find_highest(vm).map_err(|error| explain(&error))?
            && higher > generation
        {
            return Ok(Claim::Lost { owner: format!("generation {higher}, which is newer") });
        }
        self.check_predecessor(vm, generation)?;
        let published = self.publish(&name, text);
        match (self.judge(&name, text)?, published) {
            (Some(claim), _) => Ok(claim),
            (None, Err(error)) => Err(explain(&error)),
            (None, Ok(())) => Err("a claim that was just written is not there".to_string()),
        }
    }

    /// Makes sure that the claim before this one is here. Whoever it belongs to, it shows that this is the
    /// place where the generations of this VM are won. The first generation of a new VM has none before it.
    fn check_predecessor(&self, vm: &VmId, generation: u64) -> Result<(), String> {
        if generation <= 1 {
            return Ok(());
        }
        match self.look(&claim_name(vm, generation - 1)).map_err(|error| explain(&error))? {
            Found::Nothing => Err(LOST_CLAIMS.to_string()),
            Found::Text(_) | Found::Garbage(_) => Ok(()),
        }
    }

    /// Who owns the claim of this name, if it exists. `text` is what our own claim looks like.
    fn judge(&self, name: &str, text: &str) -> Result<Option<Claim>, String> {
        let damaged = |problem: &str| Claim::Lost {
            owner: format!("nobody knows: {} is damaged ({problem})", self.directory.join(name).display()),
        };
        Ok(Some(match self.look(name).map_err(|error| explain(&error))? {
            Found::Nothing => return Ok(None),
            Found::Garbage(problem) => damaged(&problem),
            Found::Text(found) if found == text => {
                // It may be there without being on the disk: a crash of the server would forget who won.
                self.flush(name).map_err(|error| explain(&error))?;
                Claim::Won
            }
            Found::Text(found) => match field(&found, CLAIM_TITLE, "owner") {
                Some(owner) => Claim::Lost { owner: owner.to_string() },
                None => damaged("not what Outlive writes"),
            },
        }))
    }

    /// Reads a file of the directory.
    fn look(&self, name: &str) -> io::Result<Found> {
        let path = self.directory.join(name);
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
            Err(error) => return Err(error),
        };
        if !metadata.is_file() {
            return Ok(Found::Garbage("not a file".to_string()));
        }
        let mut bytes = Vec::new();
        File::open(&path)?.take(LONGEST_FILE + 1).read_to_end(&mut bytes)?;
        let length = bytes.len();
        if length as u64 > LONGEST_FILE {
            return Ok(Found::Garbage(format!("more than {LONGEST_FILE} bytes")));
        }
        Ok(match String::from_utf8(bytes) {
            Ok(text) => Found::Text(text),
            Err(_) => Found::Garbage(format!("{length} bytes, not text")),
        })
    }

    /// Puts a whole file under a final name unless the name exists. Which of the two happened is to be read
    /// from the file.
    fn publish(&self, name: &str, text: &str) -> io::Result<()> {
        let temp = self.directory.join(temp_name(self.token));
        let result = self.write_temp(&temp, text).and_then(|()| {
            match fs::hard_link(&temp, self.directory.join(name)) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
                other => other,
            }
        });
        // If this fails the file is a leftover, which somebody's later claim removes.
        let _ = fs::remove_file(&temp);
        result
    }

    fn write_temp(&self, temp: &Path, text: &str) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).open(temp)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        // The file server's clock, by which leftovers are dated too.
        let now = file.metadata()?.modified()?;
        self.remove_leftovers(now);
        Ok(())
    }

    /// Removes what crashed claimants left. Without it nothing would be wrong, only untidy, so errors are
    /// ignored.
    fn remove_leftovers(&self, now: SystemTime) {
        let Ok(entries) = fs::read_dir(&self.directory) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let old =
                || entry.metadata()?.modified().map(|time| now.duration_since(time).unwrap_or_default());
            if name.starts_with(TEMP_PREFIX)
                && name.ends_with(TEMP_SUFFIX)
                && old().is_ok_and(|age| age > LEFTOVER_AGE)
            {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn flush(&self, name: &str) -> io::Result<()> {
        File::open(self.directory.join(name))?.sync_all()?;
        match File::open(&self.directory)?.sync_all() {
            // Some network file systems cannot flush a directory; theirs are written at once.
            Err(error) if matches!(os_error(&error), Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    fn find_highest(&self, vm: &VmId) -> io::Result<Option<u64>> {
        let mut highest = None;
        for entry in fs::read_dir(&self.directory)? {
            let name = entry?.file_name();
            highest = highest.max(name.to_str().and_then(|name| parse_claim_name(name, vm)));
        }
        Ok(highest)
    }

    /// Adds the directory to a reason.
    fn unreachable(&self, why: &str) -> String {
        format!("arbiter directory {}: {why}", self.directory.display())
    }
}

impl Arbiter for FileArbiter {
    fn claim(&mut self, vm: &VmId, generation: u64, owner: &str) -> Claim {
        self.try_claim(vm, generation, owner)
            .unwrap_or_else(|why| Claim::Unreachable { why: self.unreachable(&why) })
    }

    fn highest(&mut self, vm: &VmId) -> Result<Option<u64>, String> {
        self.check_directory()
            .and_then(|()| self.find_highest(vm).map_err(|error| explain(&error)))
            .map_err(|why| self.unreachable(&why))
    }

    fn owner(&mut self, vm: &VmId, generation: u64) -> Option<String> {
        match self.look(&claim_name(vm, generation)) {
            Ok(Found::Text(text)) => field(&text, CLAIM_TITLE, "owner").map(str::to_owned),
            _ => None,
        }
    }

    fn identity(&self) -> &str {
        &self.identity
    }
}

fn claim_name(vm: &VmId, generation: u64) -> String {
    format!("{vm}.{generation}")
}

/// The generation of a claim's name, if it is exactly the name that this VM's claim would have.
fn parse_claim_name(name: &str, vm: &VmId) -> Option<u64> {
    let generation = name.split_once('.')?.1.parse().ok()?;
    (name == claim_name(vm, generation)).then_some(generation)
}

fn temp_name(token: &str) -> String {
    // One number for the whole process: several arbiters in it share the token.
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    format!("{TEMP_PREFIX}{token}-{}{TEMP_SUFFIX}", NUMBER.fetch_add(1, Ordering::Relaxed))
}

fn marker_text(id: &str) -> String {
    format!("{MARKER_TITLE}\nid {id}\n{END}\n")
}

fn claim_text(vm: &VmId, generation: u64, owner: &str, token: &str) -> String {
    format!("{CLAIM_TITLE}\nvm {vm}\ngeneration {generation}\nowner {owner}\ntoken {token}\n{END}\n")
}

/// A field of a whole file with this title; `None` if the file is not whole or is something else.
fn field<'a>(text: &'a str, title: &str, name: &str) -> Option<&'a str> {
    let body = text.strip_prefix(title)?.strip_prefix('\n')?.strip_suffix('\n')?;
    let fields = body.strip_suffix(END)?.strip_suffix('\n')?;
    fields.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))
}

/// An owner's name in one line of reasonable length.
fn printable(owner: &str) -> String {
    owner.chars().take(LONGEST_OWNER).map(|c| if c.is_control() { '?' } else { c }).collect()
}

/// 16 random bytes that are the same for the whole life of this process and no other.
fn process_token() -> io::Result<&'static str> {
    static TOKEN: OnceLock<String> = OnceLock::new();
    if let Some(token) = TOKEN.get() {
        return Ok(token);
    }
    let fresh = random_hex()?;
    Ok(TOKEN.get_or_init(|| fresh))
}

fn random_hex() -> io::Result<String> {
    Ok(process::random::<16>()?.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn os_error(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

/// An error with what helps against it.
fn explain(error: &io::Error) -> String {
    let remedy = match os_error(error) {
        Errno::ENOENT | Errno::ENOTDIR => "it is not there; mount it or put it back",
        Errno::EACCES | Errno::EPERM => "let this user read and write it; it must also support hard links",
        Errno::ENOSPC | Errno::EDQUOT => "make room there",
        Errno::EROFS => "mount it writable",
        Errno::ESTALE => "mount it again",
        Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EXDEV | Errno::EMLINK => {
            "use a file system that supports hard links"
        }
        Errno::EMFILE | Errno::ENFILE => "raise the limit of open files (ulimit -n)",
        _ => "check the file server and the network to it",
    };
    format!("{error}; {remedy}")
}
