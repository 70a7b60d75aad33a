//! Options that are right one by one and make no sense together, or on this machine. Each is refused in one line.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use outlive_machine::SectorSize;

use super::values::{BootFrom, ConsoleSpec, DiskSpec};
use super::{ActiveOptions, RunOptions, StandbyOptions};
use crate::disk::{self, NotRaw};
use crate::network::UplinkSpec;

/// What makes no sense.
#[derive(Debug, thiserror::Error)]
pub(super) enum SenseError {
    /// One stream for two.
    #[error("--console stdio and --events - both take standard output: give --events a file")]
    OneOutput,
    /// The same standby, asked twice.
    #[error("--standby {0} is given twice: give each standby once")]
    SameStandby(String),
    /// A time for something that is not done.
    #[error("--uplink-timeout has no effect with --uplink none: leave one of them out")]
    NoUplink,
    /// Nothing is ever won.
    #[error("--fence needs --arbiter: without one this host never takes a VM over, and has nobody to fence")]
    FenceWithoutArbiter,
    /// This process never takes over.
    #[error(
        "--fence has no effect here: give --listen, so that this host can take the VM over, or a --disk that an earlier \
         process may have taken over"
    )]
    FenceWithoutPart,
    /// Nothing would be recorded.
    #[error(
        "--record has no effect here: a standby records, so give --listen, with which this host can become the VM's standby"
    )]
    RecordWithoutPart,
    /// Nobody to wait for.
    #[error("--or-standby needs --standby HOST:PORT: name the other host")]
    NoOtherHost,
    /// Two disks of the guest would overwrite each other.
    #[error("the disk image {} is given twice: give each disk an image of its own", .0.display())]
    SameImage(PathBuf),
    /// It boots from nothing.
    #[error(
        "--boot disk={0}: there is no --disk with this serial number or position; positions count from 0, so give 0 to \
         {last}, or serial={0} to a disk",
        last = .1.saturating_sub(1)
    )]
    NoBootDisk(String, usize),
    /// A part of a sector.
    #[error(
        "the disk image {} has {bytes} bytes, no multiple of its sector of {sector}, so the guest would not see its end: \
         make it longer with `truncate -s {} {}`",
        .image.display(), bytes.next_multiple_of(*sector), .image.display()
    )]
    PartOfSector { image: PathBuf, bytes: u64, sector: u64 },
    /// No disk, or one that was cut.
    #[error(
        "{} has {bytes} bytes, no multiple of 512, so it is no raw disk image, or its end is missing: give another file; \
         a new image is made under a name of its own, for example with `truncate -s 8G NAME.img`",
        .image.display()
    )]
    NoDisk { image: PathBuf, bytes: u64 },
    /// Its tables would be the guest's disk.
    #[error(transparent)]
    NotRaw(#[from] NotRaw),
    /// It is in a folder that is not there.
    #[error("the directory {} does not exist: correct the path of --disk", .0.display())]
    NoFolder(PathBuf),
    /// A pipe would be waited for, a terminal read.
    #[error("{} is neither a file nor a block device: give the path of a raw disk image", .0.display())]
    NotAnImage(PathBuf),
}

impl RunOptions {
    /// Refuses what makes no sense together.
    ///
    /// # Errors
    /// See [`SenseError`].
    pub(super) fn make_sense(&self) -> Result<(), SenseError> {
        self.active.make_sense()?;
        if self.active.fence.is_some() {
            if self.arbiter.is_none() {
                return Err(SenseError::FenceWithoutArbiter);
            }
            if self.listen.is_none() && self.disks.is_empty() {
                return Err(SenseError::FenceWithoutPart);
            }
        }
        if self.active.record.is_some() && self.listen.is_none() {
            return Err(SenseError::RecordWithoutPart);
        }
        if self.or_standby && self.active.standbys.is_empty() {
            return Err(SenseError::NoOtherHost);
        }
        if let Some(BootFrom(Some(which))) = &self.boot
            && self.boot_disk().is_none()
        {
            return Err(SenseError::NoBootDisk(which.clone(), self.disks.len()));
        }
        images(self.disks.iter().map(|disk| disk.path.as_path()))?;
        for disk in &self.disks {
            disk::refuse_other_formats(&disk.path)?;
            whole_sectors(disk)?;
        }
        Ok(())
    }
}

impl StandbyOptions {
    /// Refuses what makes no sense together.
    ///
    /// # Errors
    /// See [`SenseError`].
    pub(super) fn make_sense(&self) -> Result<(), SenseError> {
        self.active.make_sense()?;
        images(self.disks.iter().map(|disk| disk.path.as_path()))?;
        // What may be overwritten may be anything.
        for disk in self.disks.iter().filter(|disk| !disk.overwrite) {
            disk::refuse_other_formats(&disk.path)?;
            multiple_of_512(&disk.path)?;
        }
        Ok(())
    }
}

impl ActiveOptions {
    pub(super) fn make_sense(&self) -> Result<(), SenseError> {
        let to_stdout = self.events.as_deref().is_some_and(|path| path == Path::new("-"));
        if to_stdout && self.console == Some(ConsoleSpec::Stdio) {
            return Err(SenseError::OneOutput);
        }
        let mut known = HashSet::new();
        if let Some(twice) = self.standbys.iter().find(|it| !known.insert(it.to_ascii_lowercase())) {
            return Err(SenseError::SameStandby(twice.clone()));
        }
        if self.uplink_timeout.is_some() && matches!(self.uplink, UplinkSpec::None) {
            return Err(SenseError::NoUplink);
        }
        Ok(())
    }
}

/// Looks at the images without opening them: opening a named pipe would wait for its other end. An image that is
/// missing is somebody else's to complain about.
fn images<'a>(paths: impl Iterator<Item = &'a Path>) -> Result<(), SenseError> {
    let mut known = HashSet::new();
    for path in paths {
        let Ok(about) = fs::metadata(path) else {
            let folder = path.parent().filter(|it| !it.as_os_str().is_empty());
            match folder.filter(|folder| is_missing(folder)) {
                Some(folder) => return Err(SenseError::NoFolder(folder.to_owned())),
                None => continue,
            }
        };
        let kind = about.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(SenseError::NotAnImage(path.to_owned()));
        }
        // Two names of a block device may be two files.
        let identity = if kind.is_file() { (about.dev(), about.ino()) } else { (u64::MAX, about.rdev()) };
        if !known.insert(identity) {
            return Err(SenseError::SameImage(path.to_owned()));
        }
    }
    Ok(())
}

fn is_missing(folder: &Path) -> bool {
    fs::metadata(folder).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

/// Bytes of an image that is a file.
fn length(path: &Path) -> Option<u64> {
    fs::metadata(path).ok().filter(fs::Metadata::is_file).map(|about| about.len())
}

/// A file that nobody made as a disk. Advice to make it longer would change what is somebody's data.
fn multiple_of_512(path: &Path) -> Result<(), SenseError> {
    match length(path) {
        Some(bytes) if !bytes.is_multiple_of(512) => {
            Err(SenseError::NoDisk { image: path.to_owned(), bytes })
        }
        _ => Ok(()),
    }
}

fn whole_sectors(disk: &DiskSpec) -> Result<(), SenseError> {
    multiple_of_512(&disk.path)?;
    let sector = disk.sectors.unwrap_or(SectorSize::Small).bytes();
    match length(&disk.path) {
        // An image that is empty has its own line.
        Some(bytes) if bytes > sector && !bytes.is_multiple_of(sector) => {
            Err(SenseError::PartOfSector { image: disk.path.clone(), bytes, sector })
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use clap::Parser;
    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;
    use crate::cli::{Cli, Command};

    /// What is said of a command line; nothing if it makes sense.
    fn said(line: &str) -> String {
        let words = ["outlive"].into_iter().chain(line.split_whitespace());
        let checked = match Cli::try_parse_from(words).unwrap().command {
            Command::Run(options) => options.make_sense(),
            Command::Standby(options) => options.make_sense(),
            _ => unreachable!("the tests give none"),
        };
        checked.map_or_else(|why| why.to_string(), |()| String::new())
    }

    #[test]
    fn options_that_make_no_sense_together_are_refused() {
        let arbiter = "--arbiter file:/srv/arbiter";
        let standby = format!("standby --listen 0.0.0.0:7000 {arbiter}");
        for (line, expected) in [
            ("run --console stdio --events -".to_owned(), "--events a file"),
            (format!("{standby} --console stdio --events -"), "--events a file"),
            (format!("run {arbiter} --standby b:7000 --standby B:7000"), "given twice"),
            ("run --uplink none --uplink-timeout 2s".into(), "--uplink-timeout has no effect"),
            ("run --fence true".into(), "--fence needs --arbiter"),
            (format!("run --fence true {arbiter}"), "--fence has no effect"),
            (format!("run {arbiter} --or-standby --listen :1 --disk path=/x"), "name the other host"),
        ] {
            let line = line.replace(":1 ", "0.0.0.0:1 ");
            assert!(said(&line).contains(expected), "{line}: {}", said(&line));
        }
        for line in [
            "run --console stdio --events /tmp/events",
            "run --uplink none",
            "run --uplink-timeout 3s",
            &format!("run --fence true {arbiter} --listen 0.0.0.0:1"),
            &format!("{standby} --fence true --standby a:7000 --standby b:7000"),
        ] {
            assert_eq!(said(line), "", "{line}");
        }
    }

    #[test]
    fn images_that_cannot_be_the_guests_disks_are_refused_without_opening_them() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).display().to_string();
        let make = |name: &str, bytes| File::create(path(name)).unwrap().set_len(bytes).unwrap();
        let sizes = [("a", 1 << 20), ("odd", (1 << 20) + 100), ("half", (1 << 20) + 512), ("small", 8)];
        for (name, bytes) in sizes {
            make(name, bytes);
        }
        fs::hard_link(path("a"), path("same")).unwrap();
        mkfifo(Path::new(&path("pipe")), Mode::S_IRWXU).unwrap();
        let run = |disks: &[&str]| {
            let disks = disks.iter().map(|disk| format!(" --disk path={}", path(disk)));
            said(&format!("run{}", disks.collect::<String>()))
        };
        let standby = format!("standby --listen 0.0.0.0:1 --arbiter file:/x --disk path={}", path(""));
        assert_eq!(run(&["a", "half", "missing"]), "");
        assert!(run(&["a", "same"]).contains("is given twice"));
        for what in [run(&["odd"]), said(&format!("{standby}odd")), said(&format!("{standby}small"))] {
            assert!(
                what.contains("no multiple of 512") && what.contains("under a name of its own"),
                "{what}"
            );
            assert!(!what.contains(&format!("truncate -s 1049088 {}", path("odd"))), "{what}");
        }
        for what in [run(&["no-folder/a"]), said(&format!("{standby}no-folder/a"))] {
            assert!(what.contains("no-folder does not exist: correct the path"), "{what}");
            assert!(!what.contains("truncate"), "{what}");
        }
        assert!(run(&["half,sector=4096"]).contains("truncate -s 1052672"));
        assert!(run(&["pipe"]).contains("is neither a file nor a block device"));
        assert!(said(&format!("{standby}pipe")).contains("is neither a file nor a block device"));
    }

    #[test]
    fn an_image_in_another_format_is_refused_with_the_command_that_converts_it() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("server.img");
        let standby = "standby --listen 0.0.0.0:1 --arbiter file:/x";
        for (magic, format) in [(&b"QFI\xfb"[..], "qcow2"), (b"KDMV", "vmdk"), (b"vhdxfile", "vhdx")] {
            fs::write(&image, [magic, &vec![0; 4096 - magic.len()]].concat()).unwrap();
            let disk = format!("--disk path={}", image.display());
            for line in [format!("run {disk}"), format!("run {disk},readonly"), format!("{standby} {disk}")] {
                let said = said(&line);
                let remedy = format!(
                    "{format}, and VMs of Outlive have raw images only: make one with `outlive image import {} ",
                    image.display()
                );
                assert!(said.contains(&remedy), "{line}: {said}");
            }
            assert_eq!(said(&format!("{standby} {disk},overwrite")), "");
            // What a VM has written to its own disk is its own business.
            let sidecar = folder.path().join("server.img.outlive");
            fs::write(&sidecar, "").unwrap();
            assert_eq!(said(&format!("run {disk}")), "");
            fs::remove_file(sidecar).unwrap();
        }
    }
}
