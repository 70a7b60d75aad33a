//! What stands in an image's way, and what an earlier process left.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use outlive_epoch::{DiskOp, VmId};
use outlive_machine::Image;

use super::provenance;
use crate::cli::StandbyDisk;
use crate::disk::journal::{Identity, Journal};
use crate::disk::sidecar::{Role, Sidecar, beside};
use crate::disk::stamp::Stamp;
use crate::disk::{Held, PrepareError};

const VM: VmId = VmId([3; 16]);

fn sidecar(disk: u16, journal: Option<PathBuf>) -> Sidecar {
    let role = Role::Replica;
    Sidecar { role, checkpoint: 10, disk, journal, ..Sidecar::primary(&provenance(VM), 2, Some("token")) }
}

fn for_run(paths: &[&Path]) -> Result<(), String> {
    crate::disk::for_run(paths, &Held::default()).map_err(|error| error.to_string())
}

fn refuse_unfinished(paths: &[&Path]) -> Result<(), String> {
    crate::disk::refuse_unfinished(paths).map_err(|error| error.to_string())
}

fn for_standby(paths: &[&Path]) -> Result<(), String> {
    let disk =
        |path: &&Path| StandbyDisk { path: path.to_path_buf(), overwrite: false, thin: false, said: None };
    crate::disk::for_standby(&paths.iter().map(disk).collect::<Vec<_>>()).map_err(|error| error.to_string())
}

/// Two images with a journal that has one checkpoint for both.
fn left_by_a_kill(directory: &Path) -> [PathBuf; 2] {
    let images = ["a.img", "b.img"].map(|name| directory.join(name));
    let journal = beside(&images[0], "journal");
    for (disk, image) in images.iter().enumerate() {
        fs::write(image, [0u8; 4096]).unwrap();
        // Disk 1 is one that is not replicated.
        sidecar(disk as u16 * 2, Some(journal.clone())).write(image).unwrap();
    }
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&journal).unwrap();
    let identity = Identity { vm: VM, generation: 2, sizes: vec![4096, 0, 4096] };
    let mut journal = Journal::create(file, identity, 10).unwrap();
    let records = super::records(&[0, 2].map(|disk| (disk, 100, DiskOp::Data(b"replayed"))));
    journal.append(11, records.records().bytes()).unwrap();
    images
}

#[test]
fn a_journal_is_replayed_before_the_images_are_used() {
    for run in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let images = left_by_a_kill(directory.path());
        let paths = [images[0].as_path(), images[1].as_path()];
        if run {
            for_run(&paths).unwrap()
        } else {
            for_standby(&paths).unwrap()
        }
        for image in &images {
            assert_eq!(&fs::read(image).unwrap()[100..108], b"replayed");
            let sidecar = Sidecar::read(image).unwrap().unwrap();
            assert_eq!((sidecar.checkpoint, sidecar.whole, sidecar.journal), (11, true, None));
            // What was in the hands of a process stays so: it may have won since.
            assert_eq!(sidecar.process.as_deref(), Some("token"));
        }
        assert!(!beside(&images[0], "journal").exists());
        for_run(&paths).unwrap();
        refuse_unfinished(&paths).unwrap();
    }
}

/// From the first look at the images to the end of their machine nobody else gets them, journals and all.
#[test]
fn a_lock_is_handed_over_to_the_machine() {
    let directory = tempfile::tempdir().unwrap();
    let images = left_by_a_kill(directory.path());
    let paths = [images[0].as_path(), images[1].as_path()];
    let taken = || {
        let locked = |image: &PathBuf| File::open(image).unwrap().try_lock();
        images.iter().all(|image| matches!(locked(image), Err(TryLockError::WouldBlock)))
    };
    let missing = directory.path().join("none");
    let held = Held::of(paths.into_iter().chain([missing.as_path()])).unwrap();
    assert!(taken() && held.at(&missing).is_none());
    assert!(matches!(Held::of(paths.into_iter()), Err(PrepareError::InUse(image)) if image == images[0]));
    crate::disk::for_run(&paths, &held).unwrap();
    assert_eq!(&fs::read(&images[0]).unwrap()[100..108], b"replayed");
    assert!(taken(), "the journal was replayed");
    let machine = paths.map(|path| Image::of_locked(held.at(path).unwrap(), None).unwrap());
    assert_eq!(machine[1].bytes(), 4096);
    drop(held);
    assert!(taken(), "the machine has them");
    drop(machine);
    for image in &images {
        File::open(image).unwrap().try_lock().unwrap();
    }
}

/// What is locked is not what was looked at since.
#[test]
fn a_locked_image_is_the_one_at_its_path() {
    let directory = tempfile::tempdir().unwrap();
    let [image, other] = left_by_a_kill(directory.path());
    let held = Held::of([image.as_path()].into_iter()).unwrap();
    fs::rename(&other, &image).unwrap();
    let error = Image::of_locked(held.at(&image).unwrap(), None).unwrap_err().to_string();
    assert!(error.contains("was replaced while it was being looked at: start again"), "{error}");
    fs::remove_file(&image).unwrap();
    let error = Image::of_locked(held.at(&image).unwrap(), None).unwrap_err().to_string();
    assert!(error.contains("does not exist"), "{error}");
}

/// The original's journal is no business of a copy: its writes would be missing where they belong.
#[test]
fn a_journal_is_not_replayed_into_another_file() {
    let directory = tempfile::tempdir().unwrap();
    let images = left_by_a_kill(directory.path());
    let journal = beside(&images[0], "journal");
    let whole = fs::read(&journal).unwrap();
    let away = directory.path().join("away.img");
    for image in &images {
        fs::rename(image, &away).unwrap();
        fs::copy(&away, image).unwrap();
        fs::remove_file(&away).unwrap();
    }
    if !Stamp::of(&images[0]).unwrap().is_certain() {
        return println!("skipped: a file system with steady numbers for the tests' directory");
    }
    let paths = [images[0].as_path(), images[1].as_path()];
    let error = for_run(&paths).unwrap_err();
    assert!(error.contains("is not the file that") && error.contains("still has writes"), "{error}");
    // What becomes of the image is decided when a primary comes.
    for_standby(&paths).unwrap();
    for image in &images {
        assert_eq!(fs::read(image).unwrap(), [0; 4096]);
        assert!(Sidecar::read(image).unwrap().unwrap().journal.is_some(), "nobody has judged it anew");
    }
    assert_eq!(fs::read(&journal).unwrap(), whole);
}

#[test]
fn a_journal_of_two_images_wants_both() {
    let directory = tempfile::tempdir().unwrap();
    let images = left_by_a_kill(directory.path());
    // Nor is it one that is shared or only read.
    let error = refuse_unfinished(&[&images[0]]).unwrap_err();
    assert!(error.contains("unfinished copy"), "{error}");
    let error = for_run(&[&images[0]]).unwrap_err();
    assert!(error.contains("also has writes for disk 2: give all disks"), "{error}");
    // A standby does not give up what may be all that is left, and with all disks it comes back.
    let error = for_standby(&[&images[0]]).unwrap_err();
    assert!(error.contains("give all disks") && error.contains("--disk path=...,overwrite"), "{error}");
    for_standby(&[&images[0], &images[1]]).unwrap();
    assert_eq!(&fs::read(&images[1]).unwrap()[100..108], b"replayed");
}

/// Killed in the middle of saying that the journal is not needed any more.
#[test]
fn an_empty_journal_wants_no_image() {
    for run in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let images = left_by_a_kill(directory.path());
        let paths = [images[0].as_path(), images[1].as_path()];
        for_run(&paths).unwrap();
        let journal = beside(&images[0], "journal");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&journal).unwrap();
        let identity = Identity { vm: VM, generation: 2, sizes: vec![4096, 0, 4096] };
        Journal::create(file, identity, 11).unwrap();
        sidecar(2, Some(journal.clone())).write(&images[1]).unwrap();
        if run {
            for_run(&paths).unwrap()
        } else {
            for_standby(&paths).unwrap()
        }
        for image in &images {
            let sidecar = Sidecar::read(image).unwrap().unwrap();
            assert_eq!((sidecar.checkpoint, sidecar.whole, sidecar.journal), (11, true, None));
        }
        assert!(!journal.exists());
    }
}

#[test]
fn what_cannot_be_used_is_refused_with_the_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("a.img");
    let standby = || for_standby(&[&image]).unwrap_err();
    assert!(standby().contains("does not exist: make one with `truncate"), "{}", standby());
    fs::write(&image, [0; 4096]).unwrap();
    let held = File::options().read(true).write(true).open(&image).unwrap();
    held.lock().unwrap();
    assert!(standby().contains("is in use: stop the program"), "{}", standby());
    drop(held);
    for_standby(&[&image]).unwrap();
    for_run(&[&image]).unwrap();

    Sidecar { whole: false, ..sidecar(0, None) }.write(&image).unwrap();
    let error = for_run(&[&image]).unwrap_err();
    assert!(
        error.contains("is not whole") && error.contains("give it to `outlive standby` again"),
        "{error}"
    );
    sidecar(0, Some(directory.path().join("gone.journal"))).write(&image).unwrap();
    let error = for_run(&[&image]).unwrap_err();
    assert!(error.contains("gone.journal") && error.contains("put it back"), "{error}");
    fs::write(beside(&image, "outlive"), "vm = nonsense").unwrap();
    let error = for_run(&[&image]).unwrap_err();
    assert!(error.contains("is invalid in line 1"), "{error}");
    // What cannot be read may be the newest that there is: it is not overwritten unasked.
    let error = for_standby(&[&image]).unwrap_err();
    assert!(error.contains("is invalid") && error.contains("--disk path=...,overwrite"), "{error}");
    crate::disk::for_standby(&[StandbyDisk { path: image, overwrite: true, thin: false, said: None }])
        .unwrap();
}

/// Killed with an empty journal, and started with too few disks.
#[test]
fn an_empty_journal_stays_for_the_image_that_was_not_given() {
    for standby in [false, true] {
        let directory = tempfile::tempdir().unwrap();
        let images = left_by_a_kill(directory.path());
        let journal = beside(&images[0], "journal");
        let file = File::options().read(true).write(true).truncate(true).open(&journal).unwrap();
        Journal::create(file, Identity { vm: VM, generation: 2, sizes: vec![4096, 0, 4096] }, 11).unwrap();
        let (one, both) = ([images[0].as_path()], [images[0].as_path(), images[1].as_path()]);
        let start = if standby { for_standby } else { for_run };
        start(&one).unwrap();
        start(&both).unwrap();
        assert!(Sidecar::read(&images[1]).unwrap().unwrap().journal.is_none());
    }
}
