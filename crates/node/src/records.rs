//! What is desired of each VM, and which process it has: one small file for each, in the node's state directory.

use std::fs;
use std::io::{self, ErrorKind, Read};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::files::{self, replace};

/// The longest record, in bytes. The arguments of a process are in it.
const LONGEST: u64 = 256 << 10;
const ENDING: &str = "json";

/// What the operator wants of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Desired {
    /// It shall run, here or on the other host.
    Running,
    /// It shall not.
    Stopped,
}

/// Who has said so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum By {
    /// An operator.
    Operator,
    /// The definition: nobody has said anything else.
    Definition,
    /// The guest, which has ended by itself.
    Guest,
    /// The record cannot be read; until an operator says something, nothing is started.
    Damage,
}

/// A process that was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Started {
    /// Its process id.
    pub(crate) pid: u32,
    /// The boot of the host in which it has that id.
    pub(crate) boot: String,
    /// Its arguments.
    pub(crate) arguments: Vec<String>,
}

/// What is kept of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// What is desired.
    pub(crate) desired: Desired,
    /// By whom.
    pub(crate) by: By,
    /// The process whose end is not known yet.
    pub(crate) process: Option<Started>,
    /// A stop that was accepted, and of which the process was not told yet.
    #[serde(default)]
    pub(crate) untold: Option<Stop>,
}

/// What shall end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Stop {
    /// The VM, which runs here.
    Vm,
    /// Its protection by this host.
    Standby,
}

impl Record {
    /// Whether an operator has asked for the end of the process, and it was told.
    pub(crate) fn is_told(&self) -> bool {
        self.desired == Desired::Stopped && self.by == By::Operator && self.untold.is_none()
    }

    /// Of a VM that nobody has started or stopped.
    pub(crate) fn fresh(autostart: bool) -> Self {
        let desired = if autostart { Desired::Running } else { Desired::Stopped };
        Self { desired, by: By::Definition, process: None, untold: None }
    }
}

/// The directory with all records.
#[derive(Clone, Debug)]
pub(crate) struct Records {
    folder: PathBuf,
}

impl Records {
    /// The records in this directory, which is made if it is missing.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn open(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        Ok(Self { folder })
    }

    /// The VMs that have a record.
    pub(crate) fn names(&self) -> io::Result<Vec<String>> {
        let files =
            fs::read_dir(&self.folder)?.map(|it| Ok(it?.path())).collect::<io::Result<Vec<PathBuf>>>()?;
        let records = files.into_iter().filter(|it| it.extension().is_some_and(|it| it == ENDING));
        let names = records.filter_map(|it| Some(it.file_stem()?.to_str()?.to_owned()));
        Ok(names.filter(|it| crate::definition::is_name(it)).collect())
    }

    /// The record of a VM. `None`: there is none. One that cannot be read starts nothing.
    pub(crate) fn read(&self, name: &str) -> Option<Record> {
        let read = || -> io::Result<Record> {
            let mut bytes = Vec::new();
            files::open(&self.file(name))?.take(LONGEST).read_to_end(&mut bytes)?;
            Ok(serde_json::from_slice(&bytes)?)
        };
        match read() {
            Ok(record) => Some(record),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => {
                tracing::error!(
                    vm = name, %error,
                    "the record {} cannot be read: the VM is not started until `outlive vm start {name}`",
                    self.file(name).display()
                );
                Some(Record { desired: Desired::Stopped, by: By::Damage, process: None, untold: None })
            }
        }
    }

    /// Keeps a record, durably.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn write(&self, name: &str, record: &Record) -> io::Result<()> {
        // Plain data: this cannot fail.
        replace(&self.file(name), &serde_json::to_vec(record).expect("a record is plain data"))
    }

    /// Forgets a VM.
    pub(crate) fn remove(&self, name: &str) {
        if let Err(error) = fs::remove_file(self.file(name))
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!(vm = name, %error, "its record stays");
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.{ENDING}"))
    }
}

/// Which boot of the host this is. Process ids mean something only within one.
pub(crate) fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|it| it.trim().to_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_comes_back_and_a_damaged_one_starts_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let records = Records::open(folder.path().join("vms")).unwrap();
        assert_eq!(records.read("web"), None);
        let process = Some(Started { pid: 7, boot: boot(), arguments: vec!["--name=web".into()] });
        let record = Record { process, ..Record::fresh(true) };
        records.write("web", &record).unwrap();
        assert_eq!(records.read("web"), Some(record));
        assert_eq!(records.names().unwrap(), ["web"]);
        fs::write(folder.path().join("vms/web.json"), "{\"desired\":\"runn").unwrap();
        let damaged = records.read("web").unwrap();
        assert_eq!((damaged.desired, damaged.by), (Desired::Stopped, By::Damage));
        records.remove("web");
        records.remove("web");
        assert_eq!(records.read("web"), None);
        assert!(!boot().is_empty());
    }
}
