//! A file system with little room.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system in memory, of a certain size.
pub(crate) struct Small {
    place: PathBuf,
}

impl Small {
    /// Makes the directory and mounts it there.
    pub(crate) fn mount(place: PathBuf, mib: u64) -> Small {
        fs::create_dir(&place).unwrap();
        let size = format!("size={mib}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(&place).status();
        assert!(mounted.unwrap().success());
        Small { place }
    }

    /// Its path.
    pub(crate) fn path(&self) -> &Path {
        &self.place
    }

    /// Uses up all room.
    pub(crate) fn fill(&self) {
        let mut file = File::create(self.place.join("others")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
        assert!(File::create(self.place.join("one more")).and_then(|mut f| f.write_all(b"x")).is_err());
    }

    /// Undoes [`Small::fill`].
    pub(crate) fn make_room(&self) {
        fs::remove_file(self.place.join("others")).unwrap();
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.place).status().ok();
    }
}
