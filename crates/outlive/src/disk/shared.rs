//! The note beside a disk that both hosts write to: `DISK.outlive-shared`, in TOML. It says which VM uses the disk, and
//! on which host that ran last. Without it a second host could start a second guest on the same file system.
//!
//! ```toml
//! version = 1
//! vm = "3f2a..."
//! name = "server"
//! generation = 4            # in which the VM ran on it last; 0 if it has no arbiter
//! arbiter = "9c01..."       # missing if it has none
//! processes = ["51d0..."]   # of that host: what they win at the arbiter is that host's
//! machine = "70ab..."       # that host, over its restarts; empty if only its name is known
//! host = "hostb"
//! over = false              # true once the VM has ended in order
//! written = "2026-01-31T12:00:00Z"
//! ```
//!
//! Beside a file on a file system that both hosts see, both see it. A block device has no such place: each host keeps a
//! note of its own (in `/var/lib/outlive`, as for sidecars), and a standby writes one when it is accepted. Only the host
//! where the VM runs says anything of a file: two hosts that both wrote would undo each other's words.
//!
//! A note that is out of date is harmless: the arbiter knows of newer generations.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use outlive_epoch::Lineage;
use serde::{Deserialize, Serialize};

use super::provenance::{KnownArbiter, Provenance};
use super::sidecar::{EARLIER_KEPT, beside, now};
use crate::{arbiter, process};

/// Version of the text.
const VERSION: u32 = 1;
/// How its name ends.
const SUFFIX: &str = "outlive-shared";

/// What the note says; see the module. The provenance has no ancestors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Note {
    /// The VM that uses the disk.
    pub(crate) provenance: Provenance,
    /// The generation in which it ran on it last.
    pub(crate) generation: u64,
    /// The processes of the host that had it last, oldest first.
    pub(crate) processes: Vec<String>,
    /// That host, as [`process::machine`] tells it.
    pub(crate) machine: String,
    /// Its name, for people.
    pub(crate) host: String,
    /// Whether the VM has ended in order.
    pub(crate) over: bool,
}

/// The fields of the text.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    version: u32,
    vm: String,
    name: String,
    generation: u64,
    arbiter: Option<String>,
    processes: Vec<String>,
    machine: String,
    host: String,
    over: bool,
    written: String,
}

/// A note cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoteError {
    /// The file system's.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The note.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not one.
    #[error(
        "{} is invalid ({why}), so nobody knows which host uses the shared disk {}: restore it, or, if its VM runs \
         nowhere, remove it",
        path.display(), image.display()
    )]
    Malformed {
        /// The note.
        path: PathBuf,
        /// The disk.
        image: PathBuf,
        /// What is wrong.
        why: String,
    },
}

impl Note {
    /// What this process says of the VM that runs here.
    ///
    /// # Errors
    /// The host has no random numbers.
    pub(crate) fn here(provenance: &Provenance, generation: u64) -> io::Result<Self> {
        Ok(Self {
            provenance: without_ancestors(provenance),
            generation,
            processes: vec![arbiter::process_token()?.to_owned()],
            machine: process::machine().to_owned(),
            host: process::host_name(),
            over: false,
        })
    }

    /// What a standby says of the VM that runs at `host`.
    pub(crate) fn at(host: &str, provenance: &Provenance, generation: u64) -> Self {
        Self {
            provenance: without_ancestors(provenance),
            generation,
            processes: Vec::new(),
            machine: String::new(),
            host: host.to_owned(),
            over: false,
        }
    }

    /// The same, and this process is about to have the disk, if this host had it.
    pub(super) fn handed_to(&self, process: &str) -> Self {
        let mut processes: Vec<String> = self.processes.iter().filter(|it| *it != process).cloned().collect();
        processes.drain(..processes.len().saturating_sub(EARLIER_KEPT));
        processes.push(process.to_owned());
        Self { processes, over: false, ..self.clone() }
    }

    /// Reads the note of a disk; `None` if it has none.
    ///
    /// # Errors
    /// [`NoteError`].
    pub(crate) fn read(image: &Path) -> Result<Option<Self>, NoteError> {
        let path = beside(image, SUFFIX);
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text).map(Some).map_err(|why| NoteError::Malformed {
                path,
                image: image.to_path_buf(),
                why,
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(NoteError::Io { path, source }),
        }
    }

    /// Writes the note of a disk. After this returns it is durable, and until then the old one is whole. A newer one
    /// of the VM stays: a host that lost the VM may write late.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn write(&self, image: &Path) -> io::Result<()> {
        let newer = |old: Self| old.provenance.vm == self.provenance.vm && old.generation > self.generation;
        if Self::read(image).ok().flatten().is_some_and(newer) {
            return Ok(());
        }
        self.put(image)
    }

    /// Writes the note of a disk that must have none: of two hosts that begin a VM at the same time, one is refused.
    ///
    /// # Errors
    /// The file system's; [`io::ErrorKind::AlreadyExists`] if there is one.
    pub(super) fn begin(&self, image: &Path) -> io::Result<()> {
        let (path, new) = self.prepared(image)?;
        let linked = fs::hard_link(&new, &path);
        fs::remove_file(&new)?;
        match linked {
            // No links there, so there is a moment in which both could begin.
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists && !path.exists() => self.put(image),
            other => other.and_then(|()| sync(&path)),
        }
    }

    /// Removes the note of a disk that is no shared one any more.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn remove(image: &Path) -> io::Result<()> {
        match fs::remove_file(beside(image, SUFFIX)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn put(&self, image: &Path) -> io::Result<()> {
        let (path, new) = self.prepared(image)?;
        fs::rename(&new, &path)?;
        sync(&path)
    }

    /// A durable file with the text, under a name that no other host uses.
    fn prepared(&self, image: &Path) -> io::Result<(PathBuf, PathBuf)> {
        let token = arbiter::process_token()?;
        let new = beside(image, &format!("{SUFFIX}.{}", &token[..8]));
        if let Some(directory) = new.parent() {
            fs::create_dir_all(directory)?;
        }
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).open(&new)?;
        file.write_all(self.text().map_err(io::Error::other)?.as_bytes())?;
        file.sync_all()?;
        Ok((beside(image, SUFFIX), new))
    }

    pub(super) fn text(&self) -> Result<String, toml::ser::Error> {
        let Self { provenance: Provenance { vm, name, arbiter, .. }, .. } = self;
        let text = toml::to_string(&Text {
            version: VERSION,
            vm: vm.to_string(),
            name: name.clone(),
            generation: self.generation,
            arbiter: arbiter.to_text(),
            processes: self.processes.clone(),
            machine: self.machine.clone(),
            host: self.host.clone(),
            over: self.over,
            written: now(),
        })?;
        Ok(format!(
            "# Written by Outlive: which VM uses the shared disk beside this file. See `outlive image show`.\n{text}"
        ))
    }

    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let text: Text = toml::from_str(text)
            .map_err(|error| error.message().lines().next().unwrap_or_default().to_owned())?;
        if text.version != VERSION {
            return Err(format!("it has version {}, but this release knows {VERSION}", text.version));
        }
        let vm = text.vm.parse().map_err(|_| "a VM's id is invalid".to_owned())?;
        let arbiter = KnownArbiter::from_text(text.arbiter);
        let Text { name, generation, processes, machine, host, over, .. } = text;
        let provenance = Provenance { vm, name, arbiter, lineage: Lineage::default() };
        Ok(Self { provenance, generation, processes, machine, host, over })
    }
}

/// Whether nobody but this host sees the note of a disk.
pub(crate) fn is_noted_here_only(image: &Path) -> bool {
    fs::metadata(image).is_ok_and(|about| about.file_type().is_block_device())
}

fn without_ancestors(provenance: &Provenance) -> Provenance {
    Provenance { lineage: Lineage::default(), ..provenance.clone() }
}

fn sync(path: &Path) -> io::Result<()> {
    File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
}
