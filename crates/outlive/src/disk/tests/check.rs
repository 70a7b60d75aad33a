//! A replica compares its images with hashes of the VM's disks.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use outlive_epoch::{DiskOp, VmId};
use outlive_machine::DiskHash;

use super::provenance;
use crate::disk::replica::Source;
use crate::disk::sidecar::{Sidecar, beside};
use crate::disk::{Book, DiskEvent, Replica, ReplicaDisk, Store, hash_contents};

pub(super) const SIZE: u64 = 64 << 20;

/// A replica of one disk with its base, and a file that is the VM's disk.
pub(super) struct Standby {
    pub(super) directory: tempfile::TempDir,
    pub(super) replica: Replica,
    pub(super) told: Receiver<DiskEvent>,
    pub(super) vm: File,
}

impl Standby {
    pub(super) fn new() -> Self {
        let source = |disk: &ReplicaDisk| Source::of(&disk.file, disk.bytes).unwrap();
        Self::reading(|disks| disks.iter().map(|disk| disk.as_ref().map(source)).collect())
    }

    /// One whose audit reads these instead of the images themselves.
    pub(super) fn reading<S: Store + Sync + 'static>(
        sources: impl FnOnce(&[Option<ReplicaDisk>]) -> Vec<Option<Source<S>>>,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let open = |name| {
            let path = directory.path().join(name);
            let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
            file.set_len(SIZE).unwrap();
            (path, file)
        };
        let ((path, file), (read_only, other), (_, vm)) = (open("disk"), open("read-only"), open("vm"));
        let disks = vec![
            Some(ReplicaDisk {
                path,
                file,
                bytes: SIZE,
                read_only: false,
                accepted: None,
                thin: false,
                book: Book::none(),
            }),
            None,
            Some(ReplicaDisk {
                path: read_only,
                file: other,
                bytes: SIZE,
                read_only: true,
                accepted: None,
                thin: false,
                book: Book::none(),
            }),
        ];
        let (tell, told) = channel();
        let (sources, about) = (sources(&disks), (provenance(VmId([5; 16])), 7));
        let told_of = move |it| drop(tell.send(it));
        let replica = Replica::begin(disks, Vec::new(), about, sources, told_of).unwrap();
        let standby = Self { directory, replica, told, vm };
        standby.commit(1, true, 0, b"base");
        standby
    }

    pub(super) fn commit(&self, number: u64, base: bool, offset: u64, bytes: &[u8]) {
        self.replica.commit(number, base, super::records(&[(0, offset, DiskOp::Data(bytes))]));
        self.vm.write_all_at(bytes, offset).unwrap();
    }

    fn hash(&self) -> Vec<DiskHash> {
        vec![DiskHash { disk: 0, hash: hash_contents(&self.vm, SIZE, || true).unwrap().unwrap() }]
    }

    pub(super) fn told(&self) -> DiskEvent {
        self.told.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    pub(super) fn image(&self) -> PathBuf {
        self.directory.path().join("disk")
    }
}

#[test]
fn images_are_compared_as_of_the_commit_before_and_not_of_those_behind() {
    let standby = Standby::new();
    for number in 2..40 {
        standby.commit(number, false, number * 3000, &[number as u8; 5000]);
        if number % 8 == 0 {
            standby.replica.check(number, standby.hash());
            standby.commit(number + 1, false, 0, &[number as u8; 100]);
            let told = standby.told();
            assert!(
                matches!(told, DiskEvent::Checked { checkpoint, difference: None } if checkpoint == number),
                "{told:?}"
            );
        }
    }
    standby.replica.become_primary(8).unwrap();
}

#[test]
fn an_image_that_differs_is_of_no_vm_any_more() {
    let standby = Standby::new();
    standby.commit(2, false, 9000, b"right");
    standby.vm.write_all_at(b"l", 9000).unwrap();
    standby.replica.check(2, standby.hash());
    let DiskEvent::Checked { checkpoint: 2, difference: Some(why) } = standby.told() else {
        panic!("no difference")
    };
    assert!(why.starts_with("disk 0: the image "), "{why}");
    assert!(matches!(standby.told(), DiskEvent::Failed(failed) if failed.to_string() == why));
    assert_eq!(standby.replica.become_primary(8).unwrap_err().to_string(), why);
    assert_eq!(standby.replica.leave(None).unwrap_err().to_string(), why);
    assert!(!Sidecar::read(&standby.image()).unwrap().unwrap().whole);
    assert!(!fs::exists(beside(&standby.image(), "journal")).unwrap());
}

#[test]
fn a_takeover_does_not_wait_for_a_comparison() {
    let standby = Standby::new();
    // Enough for the end to come before the difference behind it is reached.
    let image = File::options().write(true).open(standby.image()).unwrap();
    (0..SIZE / 65536).for_each(|chunk| image.write_all_at(&[1; 65536], chunk * 65536).unwrap());
    let hashes = standby.hash();
    standby.replica.check(1, hashes);
    standby.replica.settle(1);
    standby.replica.become_primary(8).unwrap();
    assert!(matches!(standby.told(), DiskEvent::Settled { checkpoint: 1 }), "the comparison was given up");
    assert!(standby.told.try_recv().is_err());
}

#[test]
fn hashes_of_disks_that_are_not_replicated_are_refused() {
    let standby = Standby::new();
    for disk in [1, 2, 3] {
        let refused = standby.replica.check_hashes(&[DiskHash { disk, hash: 0 }]);
        let why = refused.unwrap_err().to_string();
        assert_eq!(why, format!("a hash of disk {disk}, which is not replicated"));
    }
}
