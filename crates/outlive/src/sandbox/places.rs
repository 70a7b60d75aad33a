//! Landlock: the only parts of the file system that this process can use from now on.
//!
//! A rule holds for a file or a directory as it is now, and for everything below it: for the inode, not for the name. So a
//! place that is replaced by another one (a new directory under the old name, another mount) is out of reach. Whatever
//! is replaced by renaming, as keys, sidecars and event files are, is given with its directory.

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope, make_bitflags,
};
use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, AtFlags};
use nix::unistd::{AccessFlags, Uid, User, faccessat, geteuid};

use super::run::NotHidden;
use super::secrets::{Exposed, Secrets};
use super::state::{InReach, States};

/// The newest rights that are asked for. A kernel that knows fewer of them takes those that it knows.
const NEWEST: ABI = ABI::V7;
/// What every process needs: its own memory and threads, facts about the host, random numbers, names of hosts.
const ALWAYS_READ: [&str; 16] = [
    "/proc",
    "/sys",
    "/dev/null",
    "/dev/zero",
    "/dev/urandom",
    "/dev/random",
    "/etc/hosts",
    "/etc/resolv.conf",
    "/etc/nsswitch.conf",
    "/etc/host.conf",
    "/etc/gai.conf",
    "/etc/services",
    "/etc/localtime",
    "/etc/ld.so.cache",
    "/usr/lib",
    "/usr/share/zoneinfo",
];
/// Where libraries are on systems that keep them elsewhere, too.
const LIBRARIES: [&str; 4] = ["/lib", "/lib64", "/usr/lib64", "/usr/libexec"];

/// Somebody else's file.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path} belongs to the user {owner}, and this process, which gives up the rights of root, may not use it: {remedy}, \
     or change its owner or its mode"
)]
pub(crate) struct NotOurs {
    path: String,
    owner: String,
    remedy: String,
}

impl NotOurs {
    fn of(path: &Path) -> Self {
        let owner = owner(path);
        Self { path: path.display().to_string(), remedy: format!("give --user {owner}"), owner }
    }

    /// Of a command without `--user`.
    pub(super) fn without_option(self) -> Self {
        Self { remedy: format!("start it as {}", self.owner), ..self }
    }
}

/// The owner of a place, by name if that can be looked up.
fn owner(path: &Path) -> String {
    name(Uid::from_raw(fs::metadata(path).map(|about| about.uid()).unwrap_or_default()))
}

fn name(uid: Uid) -> String {
    let user = User::from_uid(uid).ok().flatten();
    user.map_or_else(|| uid.to_string(), |user| user.name)
}

/// How a place is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Use {
    /// A file, or a directory and everything below it.
    Read,
    /// A file or device.
    Write,
    /// A directory in which files come and go.
    Keep,
    /// A directory of sockets.
    Sockets,
    /// A directory from which one that this process has made may be removed.
    Tidy,
}

impl Use {
    fn rights(self) -> BitFlags<AccessFs> {
        let read = make_bitflags!(AccessFs::{ReadFile | ReadDir});
        let write = make_bitflags!(AccessFs::{WriteFile | Truncate | IoctlDev});
        match self {
            Self::Read => read | AccessFs::IoctlDev,
            Self::Write => read | write,
            Self::Keep => {
                let files = make_bitflags!(AccessFs::{MakeReg | MakeDir | RemoveFile | RemoveDir | Refer});
                read | write | files
            }
            Self::Sockets => {
                read | write | make_bitflags!(AccessFs::{MakeSock | MakeDir | RemoveFile | RemoveDir})
            }
            Self::Tidy => AccessFs::RemoveDir.into(),
        }
    }
}

/// Directories of sockets that were made here, and not by whoever listens in them.
static MADE: Mutex<Option<HashSet<PathBuf>>> = Mutex::new(None);

/// Whether this directory was made for a socket before this process was confined. Asked once for each.
pub(crate) fn was_made(directory: &Path) -> bool {
    MADE.lock().is_ok_and(|mut made| made.as_mut().is_some_and(|made| made.remove(directory)))
}

/// Directories of sockets that this process may not use, with their owners. Once it is confined, it cannot look the
/// names of users up.
static FOREIGN: Mutex<Option<HashMap<PathBuf, Foreign>>> = Mutex::new(None);

/// Whose a directory is.
#[derive(Clone, Debug)]
pub(crate) struct Foreign {
    pub(crate) owner: String,
    /// Who this process is.
    pub(crate) user: String,
}

/// Whose this directory is, in which this process may make no socket.
pub(crate) fn foreign(directory: &Path) -> Foreign {
    let known = FOREIGN.lock().ok().and_then(|known| known.as_ref()?.get(directory).cloned());
    known.unwrap_or_else(|| foreign_now(directory))
}

fn foreign_now(directory: &Path) -> Foreign {
    Foreign { owner: owner(directory), user: name(geteuid()) }
}

/// The places that a process needs.
#[derive(Clone, Debug, Default)]
pub(super) struct Places {
    list: Vec<(PathBuf, Use)>,
    /// What none of them may reach.
    secrets: Secrets,
    /// Whose the files are that are made here.
    owner: Option<User>,
}

impl Places {
    /// None so far.
    pub(super) fn of(owner: Option<User>) -> Self {
        Self { list: Vec::new(), secrets: Secrets::default(), owner }
    }

    /// The private key of the CA that belongs to this directory of keys stays out of reach of what is added later.
    pub(super) fn guard(&mut self, keys: &Path) {
        self.secrets.guard(keys);
    }

    /// A file or a directory, to read.
    pub(super) fn read(&mut self, path: impl Into<PathBuf>) {
        self.list.push((path.into(), Use::Read));
    }

    /// A file to read that is renewed by putting another one in its place.
    pub(super) fn renewed(&mut self, file: &Path) {
        self.list.extend(self.secrets.places_of(file).into_iter().map(|place| (place, Use::Read)));
    }

    /// A device, to use.
    pub(super) fn device(&mut self, path: impl Into<PathBuf>) {
        self.list.push((path.into(), Use::Write));
    }

    /// A disk image, with what is kept beside it. A block device's things are kept in `state`.
    pub(super) fn image(&mut self, path: &Path, read_only: bool, state: &Path) {
        let whole = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        self.list.push((path.to_owned(), if read_only { Use::Read } else { Use::Write }));
        if fs::metadata(&whole).is_ok_and(|about| about.file_type().is_block_device()) {
            // Fails where it is not this user's to make; then the one who needs it says so.
            if !state.exists() && fs::create_dir_all(state).is_ok() {
                self.give(state);
            }
            self.list.push((state.to_owned(), Use::Keep));
        } else if let Some(directory) = whole.parent() {
            self.list.push((directory.to_owned(), Use::Keep));
        }
    }

    /// A directory in which files are made and removed.
    pub(super) fn keep(&mut self, path: impl Into<PathBuf>) {
        self.list.push((path.into(), Use::Keep));
    }

    /// A file that is appended to, and made if it is missing. With `renamed`, the files that it becomes are beside it.
    pub(super) fn append(&mut self, path: &Path, renamed: bool) {
        if renamed {
            self.list.push((parent(path).to_owned(), Use::Keep));
        } else if fs::symlink_metadata(path).is_err() {
            // A rule needs a file. Fails where there can be none; then the one who writes it says so.
            if OpenOptions::new().append(true).create_new(true).mode(0o666).open(path).is_ok() {
                self.give(path);
            }
        }
        self.list.push((path.to_owned(), Use::Write));
    }

    /// A directory of this process's own with what a VM's memory has been, which is made if it is missing. One that is
    /// there stays whose it is.
    pub(super) fn record(&mut self, directory: &Path) {
        if DirBuilder::new().mode(0o700).create(directory).is_ok() {
            self.give(directory);
        }
        self.list.push((directory.to_owned(), Use::Keep));
    }

    /// A directory for the disks of a VM. If it was made for that (`is_new`), it may be removed again.
    pub(super) fn folder(&mut self, directory: &Path, is_new: bool) {
        if is_new {
            self.give(directory);
            self.list.push((parent(directory).to_owned(), Use::Tidy));
        }
        self.keep(directory);
    }

    /// A directory for sockets, which is made if it is missing.
    pub(super) fn sockets(&mut self, directory: &Path) {
        if DirBuilder::new().mode(0o700).create(directory).is_ok() {
            self.give(directory);
            if let Ok(mut made) = MADE.lock() {
                made.get_or_insert_default().insert(directory.to_owned());
            }
            self.list.push((parent(directory).to_owned(), Use::Tidy));
        }
        self.list.push((directory.to_owned(), Use::Sockets));
    }

    /// The places that are there and that this process may not use with the rights that it has now.
    pub(super) fn denied(&self) -> HashSet<&Path> {
        let denied = self.list.iter().filter(|(path, usage)| {
            let access = match usage {
                Use::Read => AccessFlags::R_OK,
                Use::Write => AccessFlags::R_OK | AccessFlags::W_OK,
                Use::Keep => AccessFlags::R_OK | AccessFlags::W_OK | AccessFlags::X_OK,
                Use::Sockets | Use::Tidy => return false,
            };
            faccessat(AT_FDCWD, path, access, AtFlags::AT_EACCESS) == Err(Errno::EACCES)
        });
        denied.map(|(path, _)| path.as_path()).collect()
    }

    /// Looks whether this process may still use the places that were not `denied` before it gave its rights up. Of
    /// those that were, and of directories of sockets, whoever needs one says why.
    ///
    /// # Errors
    /// See [`NotOurs`].
    pub(super) fn check(&self, denied: &HashSet<&Path>) -> Result<(), NotOurs> {
        let sockets = self.list.iter().filter(|(_, usage)| *usage == Use::Sockets);
        for (path, _) in sockets {
            let access = AccessFlags::W_OK | AccessFlags::X_OK;
            if faccessat(AT_FDCWD, path, access, AtFlags::AT_EACCESS) == Err(Errno::EACCES)
                && let Ok(mut known) = FOREIGN.lock()
            {
                known.get_or_insert_default().insert(path.clone(), foreign_now(path));
            }
        }
        let now = self.denied();
        let lost = self.list.iter().find(|(path, _)| now.contains(&**path) && !denied.contains(&**path));
        lost.map_or(Ok(()), |(path, _)| Err(NotOurs::of(path)))
    }

    /// The places that this process needs. One that it may only remove it can do without.
    pub(super) fn needed(&self) -> impl Iterator<Item = PathBuf> + '_ {
        self.all().filter(|(_, usage)| *usage != Use::Tidy).map(|(place, _)| place)
    }

    /// Whether the user of this process is root, and stays so.
    pub(super) fn stays_root(&self) -> bool {
        self.owner.as_ref().map_or_else(geteuid, |user| user.uid).is_root()
    }

    /// Looks whether a rule would reach what none may.
    ///
    /// # Errors
    /// See [`Exposed`].
    pub(super) fn check_secrets(&self) -> Result<(), Exposed> {
        self.needed().try_for_each(|place| self.secrets.check(&place))
    }

    /// Looks whether a rule would let this process write to the state of a node. `why`: why that is not hidden, if it is not.
    ///
    /// # Errors
    /// See [`InReach`].
    pub(super) fn check_states(&self, states: &States, why: Option<&NotHidden>) -> Result<(), InReach> {
        let writes = |usage: Use| [Use::Write, Use::Keep, Use::Sockets].contains(&usage);
        let mut written = self.list.iter().filter(|(_, usage)| writes(*usage));
        written.try_for_each(|(place, _)| states.check(place, why))
    }

    /// Whoever this process becomes has what it has made.
    fn give(&self, path: &Path) {
        if let Some(owner) = &self.owner {
            // Fails for a file system without owners, or one that is another's.
            let _ = chown(path, Some(owner.uid.as_raw()), Some(owner.gid.as_raw()));
        }
    }

    /// Confines the calling thread, and those that it starts, to these places. Returns what the kernel lacks for it, if
    /// anything.
    ///
    /// # Errors
    /// The kernel refuses.
    pub(super) fn enforce(&self) -> Result<Option<Lack>, RulesetError> {
        let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
        let ruleset = ruleset.handle_access(AccessFs::from_all(NEWEST))?;
        // The service manager's socket, if its name is abstract, is connected already.
        let mut ruleset = ruleset.scope(Scope::Signal | Scope::AbstractUnixSocket)?.create()?;
        for (path, usage) in self.all() {
            let Ok(place) = PathFd::new(&path) else { continue };
            let is_directory = fs::metadata(&path).is_ok_and(|about| about.is_dir());
            let rights = usage.rights();
            let rights = if is_directory { rights } else { rights & AccessFs::from_file(NEWEST) };
            ruleset = ruleset.add_rule(PathBeneath::new(place, rights))?;
        }
        let status = ruleset.restrict_self()?;
        Ok(match (status.ruleset, status.landlock) {
            (RulesetStatus::FullyEnforced, _) => None,
            (RulesetStatus::PartiallyEnforced, _) => Some(Lack::Newest),
            (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => Some(Lack::NotEnabled),
            (RulesetStatus::NotEnforced, _) => Some(Lack::NotThere),
        })
    }

    /// Those that every process needs, and its own.
    pub(super) fn all(&self) -> impl Iterator<Item = (PathBuf, Use)> + '_ {
        let own = std::env::current_exe().ok();
        let read = ALWAYS_READ.iter().chain(&LIBRARIES).map(PathBuf::from).chain(own).chain(resolver());
        read.map(|path| (path, Use::Read)).chain(self.list.iter().cloned())
    }
}

/// Where another program keeps the addresses of name servers: it replaces the file, so its directory is given.
fn resolver() -> Option<PathBuf> {
    let file = fs::canonicalize("/etc/resolv.conf").ok()?;
    file.parent().filter(|directory| *directory != Path::new("/etc")).map(Path::to_owned)
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => Path::new("/"),
    }
}

/// What a kernel lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lack {
    /// Landlock.
    NotThere,
    /// It has Landlock, and it is switched off.
    NotEnabled,
    /// Some of its rights.
    Newest,
}
