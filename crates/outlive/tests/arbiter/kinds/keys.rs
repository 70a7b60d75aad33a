//! Keys of a third machine and of hosts, of one CA.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use outlive::keys::{self, Certificate, Grant, Order};
use tempfile::TempDir;

/// How long they count.
const LIFE: Duration = Duration::from_secs(90 * 24 * 3600);

pub(crate) fn order(host: &str, grant: Grant) -> Order {
    Order { host: host.into(), grant, life: LIFE }
}

/// A CA on the third machine, and a host of VMs.
pub(crate) struct Keys(TempDir);

impl Keys {
    pub(crate) fn make() -> Self {
        let keys = Self(tempfile::tempdir().unwrap());
        keys::init(&keys.arbiter(), &order("third", Grant::ARBITER)).unwrap();
        keys.issue(&order("hosta", Grant::ALL));
        keys
    }

    /// Those of the arbiter, where certificates are made.
    pub(crate) fn arbiter(&self) -> PathBuf {
        self.of("third")
    }

    /// Those of the host of VMs.
    pub(crate) fn host(&self) -> PathBuf {
        self.of("hosta")
    }

    pub(crate) fn of(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Makes those of another host, or new ones over the old ones, as a copy would put them there.
    pub(crate) fn issue(&self, order: &Order) -> Certificate {
        let (new, place) = (self.of("new"), self.of(&order.host));
        let made = keys::issue(&self.arbiter(), order, &new).unwrap();
        if place.exists() {
            for file in fs::read_dir(&new).unwrap() {
                let file = file.unwrap();
                fs::rename(file.path(), place.join(file.file_name())).unwrap();
            }
            fs::remove_dir(&new).unwrap();
        } else {
            fs::rename(&new, &place).unwrap();
        }
        made
    }

    /// Copies a file of the arbiter's to the host's, as an operator does.
    pub(crate) fn copy(&self, file: &str) {
        let beside = self.host().join("copied");
        fs::copy(self.arbiter().join(file), &beside).unwrap();
        fs::rename(&beside, self.host().join(file)).unwrap();
    }
}

/// An arbiter's address, for whoever has these keys.
pub(crate) fn place(address: impl std::fmt::Display, keys: &Path) -> String {
    format!("outlive:{address}?keys={}", keys.display())
}
