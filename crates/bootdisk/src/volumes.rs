//! The partitions with their file systems, by the names that boot loaders and tables of mounts have for them.

use std::rc::Rc;

use crate::ReadError;
use crate::files::{Files, Journal};
use crate::partitions::{self, Partition, Table};
use crate::probe::{Kind, probe};
use crate::source::Source;

/// Longest `/etc/fstab`.
const FSTAB: u64 = 256 << 10;
/// Partitions with a file system that is read.
const MOST: usize = 32;

/// A file on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Which volume.
    pub(crate) volume: usize,
    pub(crate) path: String,
}

/// A partition with its file system.
pub(crate) struct Volume {
    partition: Partition,
    kind: Kind,
    files: Option<Files>,
    /// Why it could not be opened.
    error: Option<ReadError>,
}

/// All of them.
pub(crate) struct Volumes {
    all: Vec<Volume>,
    source: Rc<Source>,
}

/// A directory with kernels in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct BootDirectory {
    pub(crate) volume: usize,
    /// `/boot`, or nothing for a partition of its own.
    pub(crate) prefix: &'static str,
}

impl Volumes {
    pub(crate) fn open(source: &Rc<Source>) -> Result<Self, ReadError> {
        let mut volumes = Vec::new();
        for partition in partitions::list(source)? {
            let kind = probe(source, &partition)?;
            let readable = volumes.iter().filter(|it: &&Volume| it.kind == Kind::Ext).count();
            if kind != Kind::Ext || readable == MOST {
                volumes.push(Volume { partition, kind, files: None, error: None });
                continue;
            }
            let (files, error) = match Files::open(source, &partition) {
                Ok(files) => (Some(files), None),
                // Another partition may do; what concerns the whole disk does not wait.
                Err(error @ ReadError::FileSystem { .. }) => (None, Some(error)),
                Err(error) => return Err(error),
            };
            volumes.push(Volume { partition, kind, files, error });
        }
        Ok(Self { all: volumes, source: source.clone() })
    }

    /// What the log should say of the file systems.
    pub(crate) fn notes(&self) -> Vec<String> {
        let note = |volume: &Volume| match &volume.files.as_ref()?.journal {
            Journal::Clean => None,
            Journal::Used => Some(format!(
                "the file system of {} was not unmounted; its journal was read, not replayed",
                volume.partition
            )),
            Journal::Ignored(why) => Some(format!(
                "the file system of {} was not unmounted, and its journal cannot be read ({why}): what the guest wrote \
                 last may be missing",
                volume.partition
            )),
        };
        self.all.iter().filter_map(note).collect()
    }

    /// Why nothing was found.
    pub(crate) fn nothing(&self) -> ReadError {
        let say = |volume: &Volume| match (&volume.error, volume.kind) {
            (Some(error), _) => error.to_string(),
            (None, Kind::Ext) => format!("{} has no /boot with a kernel", volume.partition),
            (None, Kind::Unknown) => format!("{} has no known file system", volume.partition),
            (None, kind) => format!("{} is {kind}, which cannot be read", volume.partition),
        };
        let said: Vec<String> = self.all.iter().take(MOST).map(say).collect();
        ReadError::Nothing(if said.is_empty() { "it has no partitions".into() } else { said.join("; ") })
    }

    fn readable(&self) -> impl Iterator<Item = (usize, &Files)> {
        self.all.iter().enumerate().filter_map(|(number, volume)| Some((number, volume.files.as_ref()?)))
    }

    /// The disk, with its budgets.
    pub(crate) fn source(&self) -> &Source {
        &self.source
    }

    /// The file system of a volume.
    pub(crate) fn files(&self, volume: usize) -> Option<&Files> {
        self.all.get(volume)?.files.as_ref()
    }

    /// The number of its partition; 0 is the whole disk.
    pub(crate) fn partition(&self, place: &Place) -> u32 {
        self.all.get(place.volume).map_or(0, |volume| volume.partition.number)
    }

    /// A file's contents; it must be there.
    pub(crate) fn read(&self, place: &Place, limit: u64) -> Result<Vec<u8>, ReadError> {
        let files = self.files(place.volume);
        let contents = files.map(|files| files.read(&place.path, limit)).transpose()?.flatten();
        contents.ok_or_else(|| ReadError::File {
            path: place.path.clone(),
            partition: self.all.get(place.volume).map_or_else(String::new, |it| it.partition.to_string()),
            why: "there is no such file".into(),
        })
    }

    /// The file system of this UUID.
    pub(crate) fn of_uuid(&self, uuid: &str) -> Option<usize> {
        self.readable().find(|(_, files)| files.uuid.eq_ignore_ascii_case(uuid)).map(|(number, _)| number)
    }

    /// The file system of this label.
    pub(crate) fn of_label(&self, label: &str) -> Option<usize> {
        self.readable().find(|(_, files)| !label.is_empty() && files.label == label).map(|(number, _)| number)
    }

    /// The first file system that has this file.
    pub(crate) fn with_file(&self, path: &str) -> Result<Option<usize>, ReadError> {
        for (number, files) in self.readable() {
            if files.is_file(path)? {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }

    /// GRUB's name of a volume's device. There is one disk.
    pub(crate) fn device(&self, volume: usize) -> String {
        let partition = self.all.get(volume).map(|volume| &volume.partition);
        match partition.map(|it| (it.table, it.number)) {
            None | Some((Table::None, _)) => "hd0".into(),
            Some((Table::Gpt, number)) => format!("hd0,gpt{number}"),
            Some((Table::Mbr, number)) => format!("hd0,msdos{number}"),
        }
    }

    /// The volume of a device in GRUB's words: `hd0,gpt2`, `hd1,2`, `hd0`. A firmware numbers disks as it likes, so
    /// the disk's number does not count.
    pub(crate) fn of_device(&self, device: &str) -> Option<usize> {
        let device = device.trim_start_matches('(').trim_end_matches(')');
        let (disk, part) = device.split_once(',').unwrap_or((device, ""));
        if !disk.starts_with("hd") && !disk.starts_with("ahci") && !disk.starts_with("ieee1275") {
            return None;
        }
        let number = part.trim_start_matches(|letter: char| letter.is_ascii_alphabetic());
        let number: u32 = if part.is_empty() { 0 } else { number.parse().ok()? };
        self.all.iter().position(|volume| volume.partition.number == number)
    }

    /// The directories that may have kernels, in the order in which they are looked at: those that `/etc/fstab` mounts
    /// at `/boot`, those without a root file system around them, and `/boot` of root file systems, unless it is only the
    /// place where another one is mounted.
    ///
    /// # Errors
    /// `/boot` is known to be in a file system that cannot be read.
    pub(crate) fn boot_directories(&self) -> Result<Vec<BootDirectory>, ReadError> {
        let mut mounted = Vec::new();
        let (mut alone, mut within) = (Vec::new(), Vec::new());
        for (volume, files) in self.readable() {
            let within_it = BootDirectory { volume, prefix: "/boot" };
            if !files.is_directory("/etc")? {
                alone.push(BootDirectory { volume, prefix: "" });
                alone.extend(files.is_directory("/boot")?.then_some(within_it));
                continue;
            }
            match self.mounted_at_boot(files)? {
                Some(boot) => mounted.push(boot),
                None => within.push(within_it),
            }
        }
        if let [only] = mounted[..]
            && within.is_empty()
            && let Some(volume) = self.all.get(only).filter(|volume| volume.files.is_none())
        {
            let (partition, kind) = (volume.partition.to_string(), volume.kind.to_string());
            return Err(ReadError::BootKind { partition, kind });
        }
        let mounted = mounted.into_iter().map(|volume| BootDirectory { volume, prefix: "" });
        let mut all: Vec<BootDirectory> = mounted.collect();
        alone.into_iter().chain(within).for_each(|it| {
            if !all.contains(&it) {
                all.push(it);
            }
        });
        Ok(all)
    }

    /// The volume that a root file system's table of mounts has at `/boot`.
    fn mounted_at_boot(&self, files: &Files) -> Result<Option<usize>, ReadError> {
        let Some(table) = files.read("/etc/fstab", FSTAB)? else { return Ok(None) };
        let table = String::from_utf8_lossy(&table).into_owned();
        let mounts = table.lines().filter_map(|line| {
            let mut words = line.split_whitespace();
            let what = words.next().filter(|it| !it.starts_with('#'))?;
            (words.next()? == "/boot").then_some(what)
        });
        let mounts: Vec<&str> = mounts.collect();
        Ok(mounts.iter().find_map(|what| self.of_spec(what)))
    }

    /// The volume that a table of mounts names. A file system that cannot be read has no known UUID, so only its
    /// partition's is found.
    fn of_spec(&self, spec: &str) -> Option<usize> {
        let (kind, value) = spec.split_once('=').unwrap_or(("", spec));
        let value = value.trim_matches('"');
        let by = |test: &dyn Fn(&Partition) -> bool| self.all.iter().position(|it| test(&it.partition));
        match kind {
            "UUID" => self.of_uuid(value),
            "LABEL" => self.of_label(value),
            "PARTUUID" => by(&|it| !it.uuid.is_empty() && it.uuid.eq_ignore_ascii_case(value)),
            _ => {
                let name = value.strip_prefix("/dev/")?;
                let number = name.trim_start_matches(|letter: char| !letter.is_ascii_digit());
                let number: u32 = number.parse().ok()?;
                by(&|it| it.number == number)
            }
        }
    }

    /// The file system with the guest's own system, if exactly one is readable.
    pub(crate) fn root(&self) -> Result<Option<&Files>, ReadError> {
        let mut roots = Vec::new();
        for (_, files) in self.readable() {
            if files.is_file("/etc/fstab")? || files.is_file("/etc/os-release")? {
                roots.push(files);
            }
        }
        Ok(if let [root] = roots[..] { Some(root) } else { None })
    }
}
