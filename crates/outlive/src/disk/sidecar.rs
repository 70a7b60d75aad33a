//! The file beside an image that says whose copy the image is: `IMAGE.outlive`, plain text.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};
use outlive_epoch::VmId;

/// Where the sidecars and journals of block devices are kept: beside them is no place that lasts.
const STATE_DIR: &str = "/var/lib/outlive";
/// Characters of a block device's name in that of its sidecar.
const LONGEST_NAME: usize = 150;

/// What an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// The VM runs, or ran, on it.
    Primary,
    /// A standby's copy.
    Replica,
}

/// See the module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sidecar {
    /// The VM.
    pub(crate) vm: VmId,
    /// The generation in which the image was written last.
    pub(crate) generation: u64,
    /// What it is.
    pub(crate) role: Role,
    /// Whether it is a disk of the VM at all: not while it is being synchronised.
    pub(crate) whole: bool,
    /// A replica's checkpoint, when this was written; the journal may know newer ones.
    pub(crate) checkpoint: u64,
    /// Its position among the VM's disks.
    pub(crate) disk: u16,
    /// The journal that may have writes for it.
    pub(crate) journal: Option<PathBuf>,
}

/// Why a sidecar could not be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SidecarError {
    /// The file system's.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It makes no sense.
    #[error("{} makes no sense in line {line}: restore it, or delete it if you know that its image is good", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Counted from 1; 0 if a line is missing.
        line: usize,
    },
}

/// The file that goes with an image: beside it, or for a block device in a directory of its own.
pub(crate) fn beside(image: &Path, suffix: &str) -> PathBuf {
    let whole = fs::canonicalize(image).unwrap_or_else(|_| image.to_path_buf());
    if let Ok(data) = fs::metadata(&whole)
        && data.file_type().is_block_device()
    {
        let name = lasting_name(&sysfs(data.rdev())).unwrap_or_else(|| whole.to_string_lossy().into_owned());
        return Path::new(STATE_DIR).join(format!("{}.{suffix}", file_name(&name)));
    }
    let mut name = whole.into_os_string();
    name.push(".");
    name.push(suffix);
    name.into()
}

/// What the kernel says of a block device (Documentation/ABI/stable/sysfs-block and testing/sysfs-block-dm).
fn sysfs(device: u64) -> PathBuf {
    let number = format!("/sys/dev/block/{}:{}", major(device), minor(device));
    fs::canonicalize(&number).unwrap_or_else(|_| number.into())
}

/// A name that a block device has in every life of this host: `/dev/sdb` and `/dev/dm-3` may be another one
/// next time, and a sidecar that is not found lets a torn image start. `None` if it has none; then its name
/// of today has to do.
fn lasting_name(sysfs: &Path) -> Option<String> {
    let word = |file: &str| {
        let text = fs::read_to_string(sysfs.join(file)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    };
    if let Some(number) = word("partition") {
        return Some(format!("{}-part{number}", lasting_name(sysfs.parent()?)?));
    }
    let names = ["dm/uuid", "md/uuid", "wwid", "device/wwid", "serial", "device/serial", "loop/backing_file"];
    names.into_iter().find_map(|file| Some(format!("{}-{}", file.replace('/', "-"), word(file)?)))
}

/// As the name of a file, whatever is in it.
fn file_name(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let text: String = name.trim_start_matches('/').chars().map(plain).collect();
    // Two names may look alike now.
    if text == name || name.starts_with("/dev/") && text.len() < LONGEST_NAME {
        return text;
    }
    let start: String = text.chars().take(LONGEST_NAME).collect();
    format!("{start}-{:08x}", crc32fast::hash(name.as_bytes()))
}

impl Sidecar {
    /// Reads the sidecar of an image; `None` if it has none.
    ///
    /// # Errors
    /// [`SidecarError`].
    pub(crate) fn read(image: &Path) -> Result<Option<Self>, SidecarError> {
        let path = beside(image, "outlive");
        match fs::read_to_string(&path) {
            Ok(text) => Self::parse(&text).map(Some).map_err(|line| SidecarError::Malformed { path, line }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(SidecarError::Io { path, source }),
        }
    }

    /// Writes the sidecar of an image: after this returns it is durable, and until then the old one is whole.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn write(&self, image: &Path) -> io::Result<()> {
        let path = beside(image, "outlive");
        let new = beside(image, "outlive.new");
        let directory = path.parent().unwrap_or(Path::new("/"));
        fs::create_dir_all(directory)?;
        let mut file = File::create(&new)?;
        file.write_all(self.text().as_bytes())?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        File::open(directory)?.sync_all()
    }

    /// Finds out whether the sidecar of an image could be written now. Changes nothing.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn probe(image: &Path) -> io::Result<()> {
        let new = beside(image, "outlive.new");
        if let Some(directory) = new.parent() {
            fs::create_dir_all(directory)?;
        }
        let tried = File::create(&new).and_then(|mut file| {
            // No sidecar is larger.
            file.write_all(&[b'#'; 4096])?;
            file.sync_all()
        });
        tried.and(fs::remove_file(&new))
    }

    fn text(&self) -> String {
        let Self { vm, generation, role, whole, checkpoint, disk, journal } = self;
        let role = match role {
            Role::Primary => "primary",
            Role::Replica => "replica",
        };
        let mut text = format!(
            "# Written by outlive: whose disk the image beside this file is.\nversion = 1\nvm = {vm}\ndisk = {disk}\n\
             role = {role}\ngeneration = {generation}\ncheckpoint = {checkpoint}\nwhole = {}\n",
            if *whole { "yes" } else { "no" }
        );
        if let Some(journal) = journal {
            text.push_str(&format!("journal = {}\n", journal.display()));
        }
        text
    }

    /// Returns the number of the line that makes no sense.
    fn parse(text: &str) -> Result<Self, usize> {
        let (mut version, mut vm, mut disk, mut role) = (None, None, None, None);
        let (mut generation, mut checkpoint, mut whole, mut journal) = (None, None, None, None);
        for (index, line) in text.lines().enumerate() {
            if line.starts_with('#') || line.trim().is_empty() {
                continue;
            }
            let wrong = index + 1;
            let (key, value) = line.split_once('=').ok_or(wrong)?;
            let value = value.trim();
            let number = || value.parse::<u64>().map_err(|_| wrong);
            match key.trim() {
                "version" => version = Some(number()?),
                "vm" => vm = Some(value.parse().map_err(|_| wrong)?),
                "disk" => disk = Some(value.parse().map_err(|_| wrong)?),
                "role" if value == "primary" => role = Some(Role::Primary),
                "role" if value == "replica" => role = Some(Role::Replica),
                "generation" => generation = Some(number()?),
                "checkpoint" => checkpoint = Some(number()?),
                "whole" if value == "yes" => whole = Some(true),
                "whole" if value == "no" => whole = Some(false),
                "journal" => journal = Some(PathBuf::from(value)),
                _ => return Err(wrong),
            }
        }
        if version != Some(1) {
            return Err(0);
        }
        Ok(Self {
            vm: vm.ok_or(0usize)?,
            generation: generation.ok_or(0usize)?,
            role: role.ok_or(0usize)?,
            whole: whole.ok_or(0usize)?,
            checkpoint: checkpoint.ok_or(0usize)?,
            disk: disk.ok_or(0usize)?,
            journal,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sidecar() -> Sidecar {
        Sidecar {
            vm: VmId(*b"0123456789abcdef"),
            generation: 4,
            role: Role::Replica,
            whole: true,
            checkpoint: 77,
            disk: 2,
            journal: Some("/srv/with space/root.img.journal".into()),
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("root.img");
        File::create(&image).unwrap();
        assert_eq!(Sidecar::read(&image).unwrap(), None);
        let primary = Sidecar { role: Role::Primary, whole: false, journal: None, ..sidecar() };
        for sidecar in [sidecar(), primary] {
            sidecar.write(&image).unwrap();
            assert_eq!(Sidecar::read(&image).unwrap(), Some(sidecar));
        }
        let names: Vec<_> = fs::read_dir(&directory).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        // Through a link the image is the same one.
        let link = directory.path().join("link.img");
        std::os::unix::fs::symlink(&image, &link).unwrap();
        assert!(Sidecar::read(&link).unwrap().is_some());
    }

    #[test]
    fn nonsense_is_named_by_its_line() {
        let good = sidecar().text();
        assert_eq!(Sidecar::parse(&good), Ok(sidecar()));
        for (from, to, line) in [
            ("vm = 3031", "vm = 30x1", 3),
            ("vm = 3031", "vm = 303", 3),
            ("role = replica", "role = other", 5),
            ("whole = yes", "whole = perhaps", 8),
            ("checkpoint = 77", "checkpoint = -1", 7),
            ("disk = 2", "colour = red", 4),
            ("disk = 2\n", "", 0),
            ("version = 1", "version = 2", 0),
            ("generation = 4", "generation", 6),
        ] {
            assert!(good.contains(from), "{from}");
            assert_eq!(Sidecar::parse(&good.replace(from, to)), Err(line), "{to}");
        }
    }

    #[test]
    fn block_devices_have_theirs_elsewhere() {
        // Any block device of this machine will do; without one there is nothing to see.
        let device =
            fs::read_dir("/dev").into_iter().flatten().flatten().find(|entry| {
                fs::metadata(entry.path()).is_ok_and(|data| data.file_type().is_block_device())
            });
        if let Some(device) = device {
            assert!(beside(&device.path(), "outlive").starts_with(STATE_DIR));
        }
    }

    #[test]
    fn a_block_device_is_known_by_what_lasts() {
        let sys = tempfile::tempdir().unwrap();
        let put = |file: &str, text: &str| {
            let path = sys.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let name = |device: &str| lasting_name(&sys.path().join(device));
        put("dm-3/dm/uuid", "LVM-abc\n");
        put("sdb/device/wwid", "naa.5002538e\n");
        put("sdb/sdb2/partition", "2\n");
        put("vda/serial", "\n");
        assert_eq!(name("dm-3").as_deref(), Some("dm-uuid-LVM-abc"));
        assert_eq!(name("sdb").as_deref(), Some("device-wwid-naa.5002538e"));
        assert_eq!(name("sdb/sdb2").as_deref(), Some("device-wwid-naa.5002538e-part2"));
        assert_eq!(name("vda"), None, "an empty serial is none");
        assert_eq!(file_name("dm-uuid-LVM-abc"), "dm-uuid-LVM-abc");
        assert_eq!(file_name("/dev/vda"), "dev-vda");
        assert_ne!(file_name("a/b"), file_name("a-b"));
        assert!(file_name(&"x/".repeat(400)).len() < 200);
    }
}
