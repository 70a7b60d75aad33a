//! Images that are made, and what stays when none is.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::Parser;
use fastrand::Rng;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use outlive_epoch::VmId;

use super::source::Identity;
use super::target::{HEAD, Target};
use super::{import, seed};
use crate::cli::{Cli, ImageCommand};
use crate::disk::sidecar::Sidecar;
use crate::disk::tests::provenance;

/// A directory in which commands are carried out.
struct There(tempfile::TempDir);

impl There {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }

    /// Carries out `outlive image ...`, in which `@` is this directory: what it prints, or the one line of its error.
    fn says(&self, line: &str) -> Result<String, String> {
        let words = line.split_whitespace().map(|it| it.replace('@', &self.0.path().display().to_string()));
        let words = ["outlive".to_owned(), "image".to_owned()].into_iter().chain(words);
        let crate::cli::Command::Image(options) = Cli::try_parse_from(words).unwrap().command else {
            unreachable!("it is of image")
        };
        let mut out = Vec::new();
        let done = match &options.command {
            ImageCommand::Import(options) => import(options, &mut out).map_err(|why| why.to_string()),
            ImageCommand::Seed(options) => seed(options, &mut out).map_err(|why| why.to_string()),
            _ => unreachable!("it makes an image"),
        };
        let left: Vec<_> = fs::read_dir(self.0.path()).unwrap().map(|it| it.unwrap().file_name()).collect();
        assert!(!left.iter().any(|it| it.to_string_lossy().ends_with(".importing")), "{left:?}");
        done.inspect_err(|why| assert!(!why.contains('\n'), "{why}"))
            .map(|()| String::from_utf8(out).unwrap())
    }

    fn refuses(&self, line: &str, why: &str) {
        let said = self.says(line).unwrap_err();
        assert!(said.contains(why), "{line}: {said}");
    }
}

/// Data of any length at any place, and a lot of nothing.
fn fill(dice: &mut Rng, disk: &mut [u8]) {
    for _ in 0..dice.usize(0..9) {
        let from = dice.usize(0..disk.len());
        let to = (from + dice.usize(1..300_000)).min(disk.len());
        disk[from..to].fill_with(|| dice.u8(..));
    }
}

#[test]
fn an_image_has_what_its_source_has_and_holes_where_that_is_zero() {
    for seed in 0..30 {
        let (there, mut dice) = (There::new(), Rng::with_seed(seed));
        // Sizes that are no multiple of anything.
        let mut disk = vec![0; dice.usize(1000..6_000_000)];
        fill(&mut dice, &mut disk);
        there.write("source", &disk);
        let verify = if seed % 2 == 0 { "--verify" } else { "" };
        let said = there.says(&format!("import @/source --to @/image {verify}")).unwrap();
        let image = there.read("image");
        assert_eq!(image.len(), disk.len().next_multiple_of(512));
        assert!(
            image[..disk.len()] == disk[..] && image[disk.len()..].iter().all(|byte| *byte == 0),
            "{seed}"
        );
        let about = fs::metadata(there.path("image")).unwrap();
        let chunks = disk.chunks(65_536).filter(|chunk| chunk.iter().any(|byte| *byte != 0)).count() as u64;
        assert!(about.blocks() * 512 <= (chunks + 2) * 65_536, "{seed}: {} blocks", about.blocks());
        assert_eq!(about.permissions().mode() & 0o777, 0o600);
        let command = format!("truncate --size {} {}", image.len(), there.path("image").display());
        assert!(said.contains(&command) && said.contains("(raw)"), "{said}");
    }
}

#[test]
fn an_image_of_another_format_becomes_raw_and_larger_if_it_is_asked_for() {
    let (there, mut dice) = (There::new(), Rng::with_seed(1));
    let mut disk = vec![0; 5 << 20];
    fill(&mut dice, &mut disk);
    there.write("raw", &disk);
    let (raw, qcow2) = (there.path("raw"), there.path("image.raw"));
    let made = Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2", "-c"])
        .args([&raw, &qcow2])
        .status();
    if !made.is_ok_and(|status| status.success()) {
        return println!("skipped: no qemu-img (apt-get install qemu-utils)");
    }
    there.refuses("import @/image.raw --to @/new --size 4M", "has 5242880 bytes, more than --size 4194304");
    there.refuses("import @/image.raw --to @/new --size 6000000", "give 6000128");
    let said = there.says("import @/image.raw --to @/new --size 1G --verify").unwrap();
    assert!(said.contains("(qcow2)") && said.contains("1.00 GiB"), "{said}");
    let new = fs::File::open(there.path("new")).unwrap();
    let mut begin = vec![0; disk.len()];
    new.read_exact_at(&mut begin, 0).unwrap();
    assert!(begin == disk && new.metadata().unwrap().len() == 1 << 30);
    assert!(new.metadata().unwrap().blocks() * 512 < 6 << 20);
}

#[test]
fn nothing_is_lost_unless_somebody_says_so_and_a_vms_disk_never_is() {
    let there = There::new();
    there.write("source", &[7; 4096]);
    there.write("image", &[8; 8192]);
    there.refuses("import @/source --to @/image", "has data (at byte 0), and nothing is overwritten");
    there.refuses("import @/source --to @/source --overwrite", "is the file that is imported");
    assert_eq!(there.read("image"), [8; 8192]);
    // Whose it was stays.
    fs::set_permissions(there.path("image"), fs::Permissions::from_mode(0o640)).unwrap();
    there.says("import @/source --to @/image --overwrite").unwrap();
    assert_eq!(there.read("image"), [7; 4096]);
    assert_eq!(fs::metadata(there.path("image")).unwrap().permissions().mode() & 0o777, 0o640);
    // Nor what the file is based on.
    let overlay = Command::new("qemu-img")
        .args(["create", "-f", "qcow2", "-F", "raw", "-b"])
        .args([there.path("image"), there.path("overlay")])
        .status();
    if overlay.is_ok_and(|status| status.success()) {
        let line = "import @/overlay --allow-backing --to @/image --overwrite";
        there.refuses(line, "/image is the file that is imported");
        let writer = fs::File::options().read(true).write(true).open(there.path("image")).unwrap();
        writer.lock().unwrap();
        there.refuses("import @/overlay --allow-backing --to @/other", "/image is in use by a program");
    }
    // Nothing but zeroes is nobody's.
    there.write("empty", &[0; 100_000]);
    symlink(there.path("empty"), there.path("link")).unwrap();
    there.says("import @/source --to @/link").unwrap();
    assert_eq!(there.read("empty"), [7; 4096]);
    assert!(there.path("link").is_symlink());
    // A QEMU has it, if only for reading.
    there.write("blank", &[0; 4096]);
    let other = fs::File::open(there.path("blank")).unwrap();
    let lock = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 100,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(&other, FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    there.refuses("import @/source --to @/blank", "blank is in use");
    drop(other);
    let vm = VmId([9; 16]);
    Sidecar::primary(&provenance(vm), 1, None).write(&there.path("image")).unwrap();
    let why = format!("is a disk of VM {vm}, as ");
    there.refuses("import @/source --to @/image --overwrite", &why);
    // What is beside the place counts, too: it would speak of the new image.
    fs::remove_file(there.path("image")).unwrap();
    there.refuses("import @/source --to @/image", &why);
    there.refuses("import @/source --to @/missing/image", "cannot make ");
    there.refuses("import @/missing --to @/other", "cannot open ");
    there.refuses("import @/source --to /dev/null", "neither a file nor a block device");
}

#[test]
fn what_a_killed_import_has_left_is_replaced_and_what_another_one_writes_is_not() {
    let there = There::new();
    there.write("source", &[7; 4096]);
    fs::write(there.path("image.importing"), [1; 70_000]).unwrap();
    there.says("import @/source --to @/image").unwrap();
    assert_eq!(there.read("image"), [7; 4096]);

    let other = Target::open(&there.path("new"), &[], false).unwrap();
    let why = super::Target::open(&there.path("new"), &[], false).err().unwrap().to_string();
    assert!(why.contains("is being made by another process"), "{why}");
    drop(other);
    assert!(!there.path("new.importing").exists() && !there.path("new").exists());
    // Somebody else was faster.
    let mut slow = Target::open(&there.path("new"), &[], false).unwrap();
    slow.write(0, &[7; 512]).unwrap();
    slow.finish(512, 512).unwrap();
    there.write("new", b"mine");
    let why = slow.keep().unwrap_err().to_string();
    assert!(why.contains("was made by somebody else") && there.read("new") == b"mine", "{why}");
    assert!(!there.path("new.importing").exists());
    // Another image came to the place of the one that is replaced, or a VM began to have it.
    let replace = || {
        there.write("old", &[1; 512]);
        let mut target = Target::open(&there.path("old"), &[], true).unwrap();
        target.finish(512, 512).unwrap();
        target
    };
    let slow = replace();
    there.write("moved", b"mine");
    fs::rename(there.path("moved"), there.path("old")).unwrap();
    let why = slow.keep().unwrap_err().to_string();
    assert!(why.contains("was replaced") && there.read("old") == b"mine", "{why}");
    let slow = replace();
    Sidecar::primary(&provenance(VmId([9; 16])), 1, None).write(&there.path("old")).unwrap();
    let why = slow.keep().unwrap_err().to_string();
    assert!(why.contains("is a disk of VM ") && there.read("old") == [1; 512], "{why}");
    // What has the name of an unfinished image, and is something else.
    there.write("third.importing", &[5; 512]);
    fs::hard_link(there.path("third.importing"), there.path("second")).unwrap();
    let why = Target::open(&there.path("third"), &[], false).err().unwrap().to_string();
    assert!(why.contains("is in the way") && there.read("second") == [5; 512], "{why}");
    fs::remove_file(there.path("third.importing")).unwrap();
    there.write("third.importing", &[5; 512]);
    Sidecar::primary(&provenance(VmId([9; 16])), 1, None).write(&there.path("third.importing")).unwrap();
    assert!(Target::open(&there.path("third"), &[], false).is_err());
    assert_eq!(there.read("third.importing"), [5; 512]);
    // Without the sidecar, but it is what is read.
    for name in fs::read_dir(there.0.path()).unwrap().map(|it| it.unwrap().path()) {
        if name.to_string_lossy().contains("third.importing.") {
            fs::remove_file(name).unwrap();
        }
    }
    let read = [Identity::of(&fs::metadata(there.path("third.importing")).unwrap())];
    assert!(Target::open(&there.path("third"), &read, false).is_err());
    assert_eq!(there.read("third.importing"), [5; 512]);
    assert!(Target::open(&there.path("third"), &[], false).is_ok());
    // No link leads an import elsewhere.
    symlink(there.path("source"), there.path("other.importing")).unwrap();
    assert!(Target::open(&there.path("other"), &[], false).is_err());
    assert_eq!(there.read("source"), [7; 4096]);
}

#[test]
fn an_image_that_breaks_off_leaves_nothing() {
    let there = There::new();
    let mut broken = vec![0; 3 << 16];
    broken[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    for (at, value) in [(20, 16u32), (36, 1), (100, 104)] {
        broken[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }
    for (at, value) in [(24, 1 << 20), (40, 1 << 16), (1 << 16, 2 << 16), ((2 << 16) + 24, 1 << 40)] {
        broken[at..at + 8].copy_from_slice(&u64::to_be_bytes(value));
    }
    there.write("broken", &broken);
    there.refuses("import @/broken --to @/image", "it was not copied to its end");
    assert!(!there.path("image").exists());
    there.write("image", &[8; 512]);
    there.refuses("import @/broken --to @/image --overwrite", "it was not copied to its end");
    assert_eq!(there.read("image"), [8; 512]);
    there.write("packed", b"\x1f\x8b\x08 and so on, for as many bytes as it takes");
    there.refuses("import @/packed --to @/other", "gunzip --keep ");
}

#[test]
fn a_seed_is_made_of_files_and_names_the_one_that_is_wrong() {
    let there = There::new();
    there.write("user", b"#cloud-config\npassword: x\n");
    there.write("network", b"version: 2\n");
    there.write("wrong", b"password: x\n");
    let said =
        there.says("seed --user-data @/user --network-config @/network --hostname web --to @/seed").unwrap();
    let image = there.read("seed");
    assert!(said.contains("truncate --size 2097152 ") && image.len() == 2 << 20, "{said}");
    assert!(image.windows(6).any(|it| it == b"CIDATA") && image.windows(11).any(|it| it == b"version: 2\n"));
    there.says("seed --user-data @/user --network-config @/network --hostname web --to @/again").unwrap();
    assert!(there.read("again") == image);
    // There may be passwords in it, whoever could read what was there.
    there.write("empty", &[0; 4096]);
    fs::set_permissions(there.path("empty"), fs::Permissions::from_mode(0o644)).unwrap();
    there.says("seed --user-data @/user --to @/empty").unwrap();
    assert_eq!(there.path("empty").metadata().unwrap().mode() & 0o777, 0o600);
    there.refuses("seed --user-data @/user --to @/seed", "say --overwrite");
    there.refuses(
        "seed --user-data @/wrong --to @/new",
        "/wrong as user-data: its first line is \"password: x\"",
    );
    there.refuses("seed --user-data @/user --vendor-data @/wrong --to @/new", "/wrong as vendor-data: ");
    there.refuses("seed --user-data @/missing --to @/new", "cannot read ");
    assert!(!there.path("new").exists());
}

/// A loop device on a file.
struct Loop(String);

impl Loop {
    fn on(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        output.status.success().then_some(Self(name))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("losetup").args(["--detach", &self.0]).status().ok();
    }
}

#[test]
fn a_block_device_is_a_disk_when_all_of_it_is_there() {
    let (there, mut dice) = (There::new(), Rng::with_seed(4));
    let mut disk = vec![0; 3 << 20];
    disk.fill_with(|| dice.u8(..));
    // Also a hole in the first and in the last part.
    disk[4096..200_000].fill(0);
    disk[2 << 20..(2 << 20) + 700_000].fill(0);
    there.write("source", &disk);
    there.write("storage", &[0; 4 << 20]);
    let Some(device) = Loop::on(&there.path("storage")) else {
        return println!("skipped: loop devices");
    };
    let name = &device.0;
    there.refuses(&format!("import @/source --to {name} --size 4M"), "leave --size out");
    let said = there.says(&format!("import @/source --to {name} --verify")).unwrap();
    assert!(said.contains("an empty block device of 4194304 bytes"), "{said}");
    let stored = || fs::read(name).unwrap();
    assert!(stored()[..disk.len()] == disk[..] && stored()[disk.len()..].iter().all(|byte| *byte == 0));

    // What was there is gone, also behind the new disk and in its holes.
    fs::write(name, vec![9; 4 << 20]).unwrap();
    there.refuses(&format!("import @/source --to {name}"), "say --overwrite");
    there.says(&format!("import @/source --to {name} --overwrite --verify")).unwrap();
    assert!(stored()[..disk.len()] == disk[..] && stored()[disk.len()..].iter().all(|byte| *byte == 0));
    let before = stored();
    there.write("large", &[1; (4 << 20) + 1]);
    there.refuses(&format!("import @/large --to {name} --overwrite"), "and 4194816 are needed");
    assert!(stored() == before);

    // What a comparison has found to be bad is no disk any more.
    let mut target = Target::open(Path::new(name), &[], true).unwrap();
    target.begin(disk.len() as u64, false).unwrap();
    target.write(0, &disk).unwrap();
    target.finish(disk.len() as u64, 4 << 20).unwrap();
    assert!(stored()[..HEAD] == disk[..HEAD]);
    target.spoil();
    assert!(stored()[..HEAD].iter().all(|byte| *byte == 0));
    drop(target);

    // Until it is whole nobody takes it for a disk.
    let mut target = Target::open(Path::new(name), &[], true).unwrap();
    target.begin(disk.len() as u64, false).unwrap();
    target.write(0, &disk).unwrap();
    target.sync().unwrap();
    drop(target);
    assert!(stored()[..HEAD].iter().all(|byte| *byte == 0) && stored()[HEAD..disk.len()] == disk[HEAD..]);
}
