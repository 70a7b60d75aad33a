//! The directory of an arbiter: files that appear whole under their final name, or not at all.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use nix::errno::Errno;

use super::{DirectoryFault, FileSpecError};
use crate::arbiter::record::{MARKER, Marker};
use crate::arbiter::{process_token, random_hex};

const TEMP_PREFIX: &str = ".outlive-";
const TEMP_SUFFIX: &str = ".tmp";
/// A claim takes milliseconds. A file that stays unfinished for this long was left by a crash. If its writer
/// lives after all (the file server hung), the writer sees that its file is gone and claims again.
const LEFTOVER_AGE: Duration = Duration::from_secs(600);
/// The files are a few hundred bytes long. Nothing longer is read.
const LONGEST_FILE: u64 = 4096;

/// What is behind a name in the directory.
pub(super) enum Found {
    Nothing,
    Text(String),
    /// It exists, but Outlive did not write it.
    Garbage(String),
}

/// A directory that several hosts see.
#[derive(Clone)]
pub(super) struct Directory {
    path: PathBuf,
    /// The file system that the directory was on.
    device: u64,
}

impl Directory {
    /// An existing directory.
    pub(super) fn at(path: &Path) -> Result<Self, FileSpecError> {
        // Absolute, so that it stays the same directory if the process changes its own.
        let absolute = std::path::absolute(path).map_err(|error| unusable(path, error))?;
        match fs::metadata(&absolute) {
            Ok(metadata) if metadata.is_dir() => Ok(Self { path: absolute, device: metadata.dev() }),
            Ok(_) => Err(FileSpecError::NotDirectory(path.to_path_buf())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(FileSpecError::Missing(path.to_path_buf()))
            }
            Err(error) => Err(unusable(path, error)),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Writes and removes a file in the way of a claim. A host that may only read here would look like a good
    /// standby until the moment when it has to win.
    pub(super) fn try_writing(&self) -> io::Result<()> {
        let name = format!("{TEMP_PREFIX}probe-{}{TEMP_SUFFIX}", random_hex()?);
        self.publish(&name, "This host can write here.\n")?;
        self.remove(&name)
    }

    pub(super) fn read_marker(&self) -> Result<Option<Marker>, DirectoryFault> {
        match self.read(MARKER)? {
            Found::Nothing => Ok(None),
            Found::Garbage(problem) => Err(DirectoryFault::DamagedMarker(problem)),
            Found::Text(text) => Marker::parse(&text).map(Some).ok_or_else(|| {
                DirectoryFault::DamagedMarker("this release does not write such a file".into())
            }),
        }
    }

    /// Makes sure that this is still the directory that was opened.
    ///
    /// If the shared file system is not mounted, its mount point is an ordinary empty directory: each host
    /// would win there alone.
    pub(super) fn check(&self, identity: &str) -> Result<(), DirectoryFault> {
        let metadata = fs::metadata(&self.path)?;
        match self.read_marker()? {
            Some(Marker::Current(found)) if found == identity => Ok(()),
            Some(Marker::Current(found) | Marker::Old(found)) => {
                Err(DirectoryFault::OtherArbiter { found, opened: identity.to_owned() })
            }
            None if metadata.dev() != self.device => Err(DirectoryFault::OtherFileSystem),
            // A marker written now would only hide that the claims are gone.
            None => Err(DirectoryFault::MarkerGone),
        }
    }

    /// Reads a file.
    pub(super) fn read(&self, name: &str) -> io::Result<Found> {
        let path = self.path.join(name);
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

    /// When a file was written, by the file server's clock.
    pub(super) fn written(&self, name: &str) -> Option<SystemTime> {
        fs::symlink_metadata(self.path.join(name)).and_then(|metadata| metadata.modified()).ok()
    }

    /// The names in a directory below this one or, with an empty name, in this one. A directory that does not
    /// exist has no names.
    pub(super) fn names(&self, below: &str) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(self.path.join(below)) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let names = entries.map(|entry| Ok(entry?.file_name().into_string().ok()));
        names.filter_map(Result::transpose).collect()
    }

    /// Makes a directory below this one, durably, unless it exists.
    pub(super) fn make(&self, name: &str) -> io::Result<()> {
        match fs::create_dir(self.path.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other.and_then(|()| sync_directory(&self.path)),
        }
    }

    /// Puts a whole file under its final name unless the name exists. The caller reads the file to learn
    /// which of the two happened.
    pub(super) fn publish(&self, name: &str, text: &str) -> io::Result<()> {
        let temp = self.write_temp(text)?;
        let result = match fs::hard_link(&temp, self.path.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        };
        // If this fails, the file is a leftover and is removed later.
        let _ = fs::remove_file(&temp);
        result
    }

    /// Puts a whole file in the place of another.
    pub(super) fn replace(&self, name: &str, text: &str) -> io::Result<()> {
        let temp = self.write_temp(text)?;
        fs::rename(&temp, self.path.join(name))?;
        sync_directory(&self.path)
    }

    fn write_temp(&self, text: &str) -> io::Result<PathBuf> {
        let temp = self.path.join(temp_name(process_token()?));
        let mut file = OpenOptions::new().write(true).create_new(true).open(&temp)?;
        let written = file.write_all(text.as_bytes()).and_then(|()| file.sync_all());
        written.inspect_err(|_| drop(fs::remove_file(&temp)))?;
        Ok(temp)
    }

    pub(super) fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fs::rename(self.path.join(from), self.path.join(to))
    }

    pub(super) fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.path.join(name))
    }

    pub(super) fn remove_directory(&self, name: &str) -> io::Result<()> {
        fs::remove_dir(self.path.join(name))
    }

    /// Makes a file and its name durable.
    pub(super) fn flush(&self, name: &str) -> io::Result<()> {
        let path = self.path.join(name);
        File::open(&path)?.sync_all()?;
        sync_directory(path.parent().unwrap_or(&self.path))
    }

    /// Removes what crashed claimants left behind. Leftovers are untidy but do no harm, so errors are
    /// ignored.
    pub(super) fn remove_leftovers(&self) {
        let Ok(names) = self.names("") else { return };
        let mut leftovers =
            names.iter().filter(|n| n.starts_with(TEMP_PREFIX) && n.ends_with(TEMP_SUFFIX)).peekable();
        if leftovers.peek().is_none() {
            return;
        }
        // The file server's clock, which also dates the leftovers.
        let Some(now) = self.now() else { return };
        for name in leftovers {
            let age = self.written(name).map(|time| now.duration_since(time).unwrap_or_default());
            if age.is_some_and(|age| age > LEFTOVER_AGE) {
                let _ = self.remove(name);
            }
        }
    }

    /// The time by the file server's clock.
    fn now(&self) -> Option<SystemTime> {
        let temp = self.write_temp("").ok()?;
        let now = fs::metadata(&temp).and_then(|metadata| metadata.modified()).ok();
        let _ = fs::remove_file(temp);
        now
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    match File::open(path)?.sync_all() {
        // Some network file systems cannot flush a directory, because they write it at once.
        Err(error) if matches!(os_error(&error), Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(()),
        other => other,
    }
}

fn temp_name(token: &str) -> String {
    // One number for the whole process: several arbiters in it share the token.
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    format!("{TEMP_PREFIX}{token}-{}{TEMP_SUFFIX}", NUMBER.fetch_add(1, Ordering::Relaxed))
}

fn os_error(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(0))
}

pub(super) fn unusable(directory: &Path, error: io::Error) -> FileSpecError {
    FileSpecError::Unusable { directory: directory.to_path_buf(), fault: error.into() }
}
