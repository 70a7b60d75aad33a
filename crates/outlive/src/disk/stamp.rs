//! Which file an image is. A sidecar stands beside a path; the file there may have been copied, restored or made
//! anew since, and then the sidecar says nothing about it.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::UNIX_EPOCH;

use nix::sys::statfs::{BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, TMPFS_MAGIC, XFS_SUPER_MAGIC, statfs};
use outlive_pair::Differs;
use serde::{Deserialize, Serialize};

/// File systems that give a file one number for its whole life, over restarts too. Others, such as most of FUSE, may
/// give it another one after each mount.
const STEADY: [FsType; 4] = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC];

/// What a file is recognised by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Stamp {
    /// Its size in bytes; 0 of a block device.
    bytes: u64,
    /// Its number and the time when it was made, where both tell it from every other file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<String>,
}

impl Stamp {
    /// The stamp of an image as it is now.
    ///
    /// # Errors
    /// The file system's.
    pub(crate) fn of(image: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(image)?;
        let steady =
            metadata.is_file() && statfs(image).is_ok_and(|it| STEADY.contains(&it.filesystem_type()));
        let made = metadata.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok());
        let file = made.filter(|_| steady).map(|made| format!("{}-{}", metadata.ino(), made.as_nanos()));
        Ok(Self { bytes: metadata.len(), file })
    }

    /// Whether it tells the file from every other.
    #[cfg(test)]
    pub(crate) fn is_certain(&self) -> bool {
        self.file.is_some()
    }

    /// How the image differs from the one with this stamp; `None` if it does not, as far as anybody can tell.
    pub(crate) fn differs(&self, image: &Path) -> Option<Differs> {
        let now = Self::of(image).ok()?;
        let other = self.file.is_some() && now.file.is_some() && self.file != now.file;
        if other {
            return Some(Differs::File);
        }
        let (was, is) = (self.bytes, now.bytes);
        (is < was).then_some(Differs::Shorter { was, is })
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_file_is_known_by_its_number_and_its_size() {
        let directory = tempfile::tempdir().unwrap();
        let (image, other) = (directory.path().join("a"), directory.path().join("b"));
        File::create(&image).unwrap().set_len(8192).unwrap();
        let stamp = Stamp::of(&image).unwrap();
        assert_eq!(stamp.differs(&image), None);
        File::options().write(true).open(&image).unwrap().set_len(16384).unwrap();
        assert_eq!(stamp.differs(&image), None, "it has grown");
        File::options().write(true).open(&image).unwrap().set_len(4096).unwrap();
        assert_eq!(stamp.differs(&image), Some(Differs::Shorter { was: 8192, is: 4096 }));
        if !stamp.is_certain() {
            return println!("skipped: a file system with steady numbers for the tests' directory");
        }
        fs::copy(&image, &other).unwrap();
        assert_eq!(stamp.differs(&other), Some(Differs::File));
        fs::remove_file(&image).unwrap();
        File::create(&image).unwrap().set_len(8192).unwrap();
        assert_eq!(stamp.differs(&image), Some(Differs::File), "the number may be the same, the time is not");
        assert_eq!(stamp.differs(&directory.path().join("c")), None, "somebody else reports it");
    }
}
