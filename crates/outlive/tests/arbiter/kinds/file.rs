//! The directory.

use std::fs;
use std::path::PathBuf;

use outlive::arbiter::FileArbiter;
use tempfile::TempDir;

use crate::conformance::{Place, Reach, all};
use crate::support::{directory, empty};

struct Folder {
    parent: TempDir,
}

impl Folder {
    fn make() -> Self {
        let folder = Self { parent: directory() };
        fs::create_dir(folder.path()).unwrap();
        FileArbiter::init(&folder.path()).unwrap();
        folder
    }

    fn path(&self) -> PathBuf {
        self.parent.path().join("arbiter")
    }
}

impl Place for Folder {
    fn text(&self) -> String {
        format!("file:{}", self.path().display())
    }

    fn reach(&self, reach: Reach) -> bool {
        let away = self.parent.path().join("away");
        match reach {
            Reach::Here => fs::rename(away, self.path()).unwrap(),
            Reach::Away => fs::rename(self.path(), away).unwrap(),
            Reach::Deaf => return false,
        }
        true
    }

    fn empty(&self) {
        empty(&self.path(), "outlive-arbiter");
    }

    fn swap(&self) {
        empty(&self.path(), "");
        FileArbiter::init(&self.path()).unwrap();
    }
}

#[test]
fn a_directory_conforms() {
    all(&|| Box::new(Folder::make()), 200);
}
