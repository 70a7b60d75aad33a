//! Which part a host has in a VM, for every kind of image that it may find after a loss of power.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use outlive_epoch::VmId;

use super::provenance;
use crate::arbiter::{Arbiter, Claim, FileArbiter};
use crate::disk::provenance::{KnownArbiter, Provenance};
use crate::disk::sidecar::{CopyEnd, Role, Sidecar};
use crate::disk::stamp::Stamp;
use crate::disk::{Part, Start};

const VM: VmId = VmId([9; 16]);

struct Host {
    directory: tempfile::TempDir,
    arbiter: FileArbiter,
}

impl Host {
    /// A host with two empty images and an arbiter, where `VM` is in generation 3.
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("arbiter");
        fs::create_dir(&place).unwrap();
        let mut arbiter = FileArbiter::init(&place).unwrap().0;
        (1..=3).for_each(|generation| assert_eq!(arbiter.claim(&VM, generation, "somebody"), Claim::Won));
        let host = Self { directory, arbiter };
        host.images().iter().for_each(|image| File::create(image).unwrap().set_len(1 << 20).unwrap());
        host
    }

    fn images(&self) -> [PathBuf; 2] {
        ["a", "b"].map(|name| self.directory.path().join(name))
    }

    fn has(&self, image: usize, generation: u64, change: impl FnOnce(&mut Sidecar)) {
        let arbiter = KnownArbiter::Id(self.arbiter.identity().to_owned());
        let provenance = Provenance { arbiter, ..provenance(VM) };
        let mut sidecar = Sidecar::primary(&provenance, generation, Some("a process that is gone"));
        change(&mut sidecar);
        sidecar.write(&self.images()[image]).unwrap();
    }

    fn part(&mut self) -> Result<Part, String> {
        let images = self.images();
        let given: Vec<(u16, &Path)> = (0..).zip(images.iter().map(PathBuf::as_path)).collect();
        Part::decide(&given, &mut self.arbiter, None).map_err(|error| error.to_string())
    }

    fn waits(&mut self) -> String {
        match self.part().unwrap() {
            Part::Waits { why, .. } => why,
            starts => panic!("{starts:?}"),
        }
    }
}

fn both(host: &Host, generation: u64, change: impl Fn(&mut Sidecar)) {
    (0..2).for_each(|image| host.has(image, generation, &change));
}

#[test]
fn the_newest_image_of_the_vm_starts_it_and_leaves_time_for_a_takeover() {
    let mut host = Host::new();
    both(&host, 3, |_| {});
    let starts = Part::Starts { after: Duration::ZERO, may_be_taken_over: true };
    assert_eq!(host.part(), Ok(starts));
    // It ended in order, and this is the copy that followed.
    both(&host, 3, |it| (it.role, it.end) = (Role::Replica, Some(CopyEnd::Followed)));
    let starts = host.part().unwrap();
    assert!(matches!(starts, Part::Starts { after, .. } if after > Duration::from_secs(5)), "{starts:?}");
    // An operator has said whose it is, and nobody has ever had it.
    let unknown = |it: &mut Sidecar| (it.generation, it.provenance.vm) = (0, VmId([8; 16]));
    both(&host, 0, |it| {
        unknown(it);
        it.provenance.arbiter = KnownArbiter::None;
    });
    assert_eq!(host.part(), Ok(Part::Starts { after: Duration::ZERO, may_be_taken_over: false }));
}

#[test]
fn whoever_has_less_than_another_host_may_have_waits() {
    let mut host = Host::new();
    let why = host.waits();
    assert!(
        why.contains("is empty")
            && why.contains("if there is no VM yet")
            && why.contains("outlive image accept --yes")
    );
    assert!(matches!(host.part(), Ok(Part::Waits { needs_operator: true, .. })));
    both(&host, 2, |_| {});
    let why = host.waits();
    assert!(why.contains("continued in generation 3") && !why.contains("--accept"), "{why}");
    assert!(matches!(host.part(), Ok(Part::Waits { needs_operator: false, .. })));
    both(&host, 3, |it| it.role = Role::Replica);
    assert!(host.waits().contains("--accept-replica"));
    both(&host, 3, |it| (it.role, it.end) = (Role::Replica, Some(CopyEnd::Released)));
    assert!(host.waits().contains("gave it up"));
    // One image is enough.
    both(&host, 3, |_| {});
    host.has(1, 3, |it| it.whole = false);
    assert!(host.waits().contains("is not whole"));
    both(&host, 3, |it| it.role = Role::Replica);
    fs::remove_file(host.directory.path().join("a.outlive")).unwrap();
    assert!(host.waits().contains("--accept-replica"));
    both(&host, 2, |_| {});
    fs::remove_file(host.directory.path().join("b.outlive")).unwrap();
    assert!(matches!(host.part(), Ok(Part::Waits { name, .. }) if name.as_deref() == Some("server")));
}

/// Both hosts got an empty image for a new disk. If the host with the VM's own image waited as well, the VM would
/// never run again.
#[test]
fn a_new_disk_is_not_waited_with_and_joins_the_vm_by_the_remedy() {
    let mut host = Host::new();
    for data in [false, true] {
        host.has(0, 3, |_| {});
        fs::remove_file(host.directory.path().join("b.outlive")).ok();
        if data {
            let image = File::options().write(true).open(&host.images()[1]).unwrap();
            image.write_all_at(b"data", 4096).unwrap();
        }
        let refused = host.part().unwrap_err();
        assert!(refused.contains("new disk") && refused.contains("without --or-standby"), "{refused}");
    }
    // The other host has a copy and an empty image: it waits for this one.
    host.has(0, 3, |it| it.role = Role::Replica);
    File::create(&host.images()[1]).unwrap().set_len(1 << 20).unwrap();
    assert!(host.waits().contains("--accept-replica"));
    // The remedy: a start without --or-standby.
    host.has(0, 3, |_| {});
    let images = host.images();
    let written: Vec<(u16, &Path)> = (0..).zip(images.iter().map(PathBuf::as_path)).collect();
    let start = Start::plan(&written, &[], Some(&mut host.arbiter), None, &[]).unwrap();
    let disks = [(0, images[0].clone()), (1, images[1].clone())];
    start.carry_out(&disks, Some(&mut host.arbiter)).unwrap();
    assert!(matches!(host.part(), Ok(Part::Starts { .. })));
}

/// Host a's file was lost, and somebody made an empty one in its place. The sidecar is still there and says that the
/// VM's newest state is in it.
#[test]
fn a_new_empty_file_beside_an_old_sidecar_starts_no_vm() {
    let mut host = Host::new();
    both(&host, 3, |_| {});
    assert!(matches!(host.part(), Ok(Part::Starts { .. })));
    let [image, _] = host.images();
    fs::remove_file(&image).unwrap();
    let file = File::create(&image).unwrap();
    file.set_len(1 << 20).unwrap();
    if !Stamp::of(&image).unwrap().is_certain() {
        return println!("skipped: a file system with steady numbers for the tests' directory");
    }
    assert!(host.waits().contains("is empty, and was made anew"));
    // A file with data may be anything, and so may one that has lost its end.
    file.write_all_at(b"data", 4096).unwrap();
    let refused = host.part().unwrap_err();
    assert!(
        refused.contains("is not the file that") && refused.contains("--accept-moved-image"),
        "{refused}"
    );
    both(&host, 3, |_| {});
    file.set_len(1 << 19).unwrap();
    let refused = host.part().unwrap_err();
    assert!(refused.contains("has 524288 bytes and had 1048576"), "{refused}");
}

#[test]
fn what_nobody_can_judge_starts_nothing_and_is_not_waited_with() {
    let mut host = Host::new();
    let image = host.images()[0].clone();
    File::options().write(true).open(&image).unwrap().write_all_at(b"data", 4096).unwrap();
    assert!(host.part().unwrap_err().contains("outlive image accept --yes"));
    both(&host, 4, |_| {});
    assert!(host.part().unwrap_err().contains("--accept-lost-claims"));
    both(&host, 3, |it| it.provenance.arbiter = KnownArbiter::Id("0".repeat(32)));
    assert!(host.part().unwrap_err().contains("another arbiter"));
    let none = Part::decide(&[], &mut host.arbiter, None).unwrap_err().to_string();
    assert!(none.contains("needs a --disk"), "{none}");
}
