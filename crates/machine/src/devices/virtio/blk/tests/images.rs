//! Images of all kinds: odd, sparse, small, read-only, in use, and on a full disk.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::super::ImageError;
use super::driver::{T_DISCARD, T_WRITE_ZEROES};
use super::*;

fn open(path: &Path, readonly: bool, shared: bool) -> Result<Image, ImageError> {
    Image::open(path, readonly, shared, None)
}

#[test]
fn the_rest_of_an_odd_image_is_out_of_reach() {
    for engine in ENGINES {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.path("disk");
        std::fs::write(&path, vec![7; 10 * 512 + 511]).unwrap();
        let rig = Rig::new(&memory, &DiskOptions { engine, ..DiskOptions::new(&path) });
        assert_eq!((rig.device.capacity_bytes(), rig.read(0x100)), (5120, 10));
        let driver = rig.boot();
        rig.device.go_live(false);
        driver.write(0, 0, 9, &[1; 512]);
        driver.write(0, 1, 10, &[2; 512]);
        driver.read(0, 2, 0, 5120);
        driver.ranges(0, 3, T_DISCARD, &[(0, 10, 0)]);
        driver.ranges(0, 4, T_WRITE_ZEROES, &[(5, 6, 0)]);
        rig.serve(&driver, 5);
        assert_eq!([0, 1, 2, 3, 4].map(|slot| driver.status(slot)), [OK, IOERR, OK, OK, IOERR]);
        let disk = content(&path);
        assert_eq!((disk.len(), &disk[5120..]), (10 * 512 + 511, &[7; 511][..]));
    }
}

#[test]
fn a_sparse_image_of_a_terabyte() {
    for engine in ENGINES {
        let (images, memory) = (Images::new(), memory());
        let path = images.sparse("disk", 1 << 40);
        let rig = Rig::new(&memory, &DiskOptions { engine, ..DiskOptions::new(&path) });
        let driver = rig.boot();
        rig.device.go_live(false);
        let last = (1 << 31) - 1;
        driver.write(0, 0, last, &[5; 512]);
        rig.serve(&driver, 1);
        driver.read(0, 1, last - 1, 1024);
        driver.ranges(0, 2, T_DISCARD, &[(0, 1 << 21, 0)]);
        rig.serve(&driver, 3);
        assert_eq!([0, 1, 2].map(|slot| driver.status(slot)), [OK; 3]);
        assert_eq!((driver.data(1, 1024)[511], driver.data(1, 1024)[512]), (0, 5));
    }
}

#[test]
fn a_read_only_image_cannot_be_written() {
    for engine in ENGINES {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.numbered("disk", 64);
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o444)).unwrap();
        let before = content(&path);
        let rig = Rig::new(&memory, &DiskOptions { engine, readonly: true, ..DiskOptions::new(&path) });
        assert_eq!(rig.offered() & (F_RO | F_FLUSH | F_CONFIG_WCE | 3 << 13), F_RO);
        let driver = rig.boot();
        rig.device.go_live(false);
        driver.write(0, 0, 0, &[1; 512]);
        driver.ranges(0, 1, T_DISCARD, &[(0, 8, 0)]);
        driver.ranges(0, 2, T_WRITE_ZEROES, &[(0, 8, 0)]);
        driver.flush(0, 3);
        driver.read(0, 4, 7, 512);
        rig.serve(&driver, 5);
        assert_eq!([0, 1, 2, 3, 4].map(|slot| driver.status(slot)), [IOERR, IOERR, IOERR, OK, OK]);
        assert_eq!(driver.data(4, 8), 8u64.to_le_bytes());
        assert_eq!(content(&path), before);
    }
}

#[test]
fn an_image_that_shrinks_under_the_guest_fails_reads() {
    for engine in ENGINES {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.numbered("disk", 64);
        let rig = Rig::new(&memory, &DiskOptions { engine, ..DiskOptions::new(&path) });
        let driver = rig.boot();
        rig.device.go_live(false);
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(10 * 512 + 100).unwrap();
        driver.read(0, 0, 9, 512);
        driver.read(0, 1, 10, 512);
        driver.read(0, 2, 30, 512);
        rig.serve(&driver, 3);
        assert_eq!([0, 1, 2].map(|slot| driver.status(slot)), [OK, IOERR, IOERR]);
    }
}

/// A small file system in memory, mounted for as long as this lives. `None` without the permission to mount.
struct Mount(Images);

impl Mount {
    fn new(size: &str) -> Option<Self> {
        let images = Images::new();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "outlive-test"])
            .arg(images.0.path())
            .status()
            .is_ok_and(|status| status.success());
        mounted.then(|| Self(images))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.0.path()).status();
    }
}

#[test]
fn a_full_file_system_fails_writes_and_is_survived() {
    for engine in ENGINES {
        let Some(mount) = Mount::new("1m") else {
            eprintln!("skipped: needs the right to mount");
            return;
        };
        let memory = memory();
        let path = mount.0.sparse("disk", 8 << 20);
        let rig = Rig::new(&memory, &DiskOptions { engine, ..DiskOptions::new(&path) });
        let driver = rig.boot();
        rig.device.go_live(false);
        for slot in 0..16 {
            driver.write(0, slot, u64::from(slot) * 256, &[1; 128 << 10]);
        }
        rig.serve(&driver, 16);
        let failed = (0..16).filter(|&slot| driver.status(slot) == IOERR).count();
        assert!((8..16).contains(&failed), "{failed} failed");
        assert_eq!(rig.device.stats().errors, failed as u64);
        // The space is given back.
        driver.ranges(0, 0, T_DISCARD, &[(0, 16384, 0)]);
        rig.serve(&driver, 17);
        driver.write(0, 1, 10_000, &[2; 128 << 10]);
        driver.flush(0, 2);
        rig.serve(&driver, 19);
        assert_eq!([0, 1, 2].map(|slot| driver.status(slot)), [OK; 3]);
        assert_eq!(content(&path)[10_000 * 512], 2);
    }
}

/// A block device made of a file, for as long as this lives.
struct Loop(PathBuf);

impl Loop {
    fn new(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| Self(name.trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device() {
    let images = Images::new();
    let path = images.path("disk");
    std::fs::write(&path, vec![0xff; 1 << 20]).unwrap();
    let Some(device) = Loop::new(&path) else {
        eprintln!("skipped: needs loop devices and the right to use them");
        return;
    };
    for engine in ENGINES {
        let memory = memory();
        let rig = Rig::new(&memory, &DiskOptions { engine, ..DiskOptions::new(&device.0) });
        assert_eq!(rig.device.capacity_bytes(), 1 << 20);
        assert!(matches!(open(&device.0, false, false), Err(ImageError::InUse(_))));
        let driver = rig.boot();
        rig.device.go_live(false);
        driver.write(0, 0, 100, &[1; 4096]);
        driver.ranges(0, 1, T_DISCARD, &[(200, 8, 0)]);
        driver.ranges(0, 2, T_WRITE_ZEROES, &[(304, 8, 0), (400, 8, 1)]);
        driver.flush(0, 3);
        rig.serve(&driver, 4);
        driver.read(0, 4, 0, 128 << 10);
        rig.serve(&driver, 5);
        driver.read(0, 5, 256, 128 << 10);
        rig.serve(&driver, 6);
        assert_eq!([0, 1, 2, 3, 4, 5].map(|slot| driver.status(slot)), [OK; 6]);
        let disk = [driver.data(4, 128 << 10), driver.data(5, 128 << 10)].concat();
        let sectors = [99, 100, 107, 108, 303, 304, 311, 312, 400].map(|sector| disk[sector * 512]);
        assert_eq!(sectors, [0xff, 1, 1, 0xff, 0xff, 0, 0, 0xff, 0]);
    }
}

#[test]
fn an_image_that_cannot_be_used_is_refused_with_advice() {
    let images = Images::in_memory();
    let refused = |path: &Path, words: &str| {
        let error = open(path, false, false).unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
        error
    };
    assert!(matches!(refused(&images.path("none"), "truncate -s"), ImageError::Missing(_)));
    assert!(matches!(refused(images.0.path(), "neither a file"), ImageError::Kind(_)));
    assert!(matches!(refused(Path::new("/dev/null"), "neither a file"), ImageError::Kind(_)));
    for bytes in [0, 511] {
        let path = images.sparse("small", bytes);
        assert!(matches!(refused(&path, "make it larger"), ImageError::TooSmall { .. }));
    }
    let path = images.sparse("disk", 512);
    let first = open(&path, false, false).unwrap();
    assert!(matches!(refused(&path, "in use"), ImageError::InUse(_)));
    assert!(open(&path, true, false).is_err() && open(&path, false, true).is_err());
    drop(first);
    let _first = open(&path, false, true).unwrap();
    let _second = open(&path, false, true).unwrap();
    let _third = open(&path, true, false).unwrap();
    assert!(open(&path, false, false).is_err());
}

#[test]
fn a_disk_has_one_to_sixteen_queues() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 512);
    for queues in [0, 17, u16::MAX] {
        let host = DeviceHost {
            memory: memory.clone(),
            gate: Arc::default(),
            interrupt: Arc::new(Count::default()),
            waker: Arc::new(Count::default()),
        };
        let options = DiskOptions { queues, ..DiskOptions::new(&path) };
        let error = BlockDevice::new(&options, 0, WriteLog::new(|| {}), permit(), host).err().unwrap();
        assert!(error.to_string().contains("1 to 16 queues"), "{error}");
    }
}
