//! Disks whose sectors have 4096 bytes: block devices that are like this, and files that shall look so.

use std::process::Command;

use super::super::{ImageError, SectorSize};
use super::driver::{T_DISCARD, T_WRITE_ZEROES};
use super::*;

/// A block device on a file; it goes away with the test.
struct Loop(PathBuf);

impl Loop {
    /// `None` where this user may not make one.
    fn attach(file: &Path, sector: u32) -> Option<Self> {
        let command = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(file)
            .output()
            .ok()
            .filter(|output| output.status.success());
        let Some(output) = command else {
            println!("skipped: no loop device (losetup, as root)");
            return None;
        };
        Some(Self(String::from_utf8(output.stdout).unwrap().trim().into()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// blk_size, physical_block_exp with alignment_offset, min_io_size.
fn geometry(rig: &Rig) -> (u32, [u8; 2], u16) {
    let mut space = [0; 32];
    rig.registers.lock().unwrap().read(0x100, &mut space);
    (
        u32::from_le_bytes([20, 21, 22, 23].map(|at| space[at])),
        [space[24], space[25]],
        u16::from_le_bytes([space[26], space[27]]),
    )
}

const SMALL: (u32, [u8; 2], u16) = (512, [3, 0], 8);
const LARGE: (u32, [u8; 2], u16) = (4096, [0, 0], 1);

#[test]
fn a_block_device_of_large_sectors_takes_every_request() {
    for (engine, sectors) in ENGINES.into_iter().zip([Some(SectorSize::Large), None]) {
        let (images, memory) = (Images::new(), memory());
        let file = images.path("file");
        std::fs::write(&file, vec![0xff; 1 << 20]).unwrap();
        let Some(device) = Loop::attach(&file, 4096) else { return };
        let rig = Rig::new(&memory, &DiskOptions { engine, sectors, ..DiskOptions::new(&device.0) });
        // A guest sees the same on every host, whatever its disk lies on there.
        assert_eq!(geometry(&rig), if sectors.is_none() { SMALL } else { LARGE });
        let driver = rig.boot();
        rig.device.go_live(false);
        driver.write(0, 0, 3, &[1; 512]);
        driver.write(0, 1, 15, &[2; 1024]);
        driver.ranges(0, 2, T_WRITE_ZEROES, &[(32, 16, 1), (64, 16, 0), (97, 10, 1), (123, 3, 0)]);
        driver.ranges(0, 3, T_DISCARD, &[(200, 16, 0)]);
        driver.ranges(0, 4, T_DISCARD, &[(241, 10, 0)]);
        driver.read(0, 5, 2, 1536);
        driver.flush(0, 6);
        rig.serve(&driver, 7);
        for slot in 0..7 {
            assert_eq!(driver.status(slot), OK, "request {slot} by {engine:?}");
        }
        let mut expected = vec![0xff; 1 << 20];
        let mut fill = |first: usize, count: usize, value| {
            expected[first * 512..(first + count) * 512].fill(value);
        };
        fill(3, 1, 1);
        fill(15, 2, 2);
        // A discard of parts of sectors changes nothing.
        for (first, count) in [(32, 16), (64, 16), (97, 10), (123, 3), (200, 16)] {
            fill(first, count, 0);
        }
        let wrong = content(&device.0).iter().zip(&expected).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "by {engine:?}");
        driver.read(0, 7, 2, 1536);
        rig.serve(&driver, 8);
        assert!(driver.data(7, 1536) == expected[1024..2560]);
        drop((rig, device));
        assert!(content(&file) == expected, "the disk itself, by {engine:?}");
    }
}

#[test]
fn a_file_may_have_large_sectors() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let options = DiskOptions { sectors: Some(SectorSize::Large), ..DiskOptions::new(&path) };
    let rig = Rig::new(&memory, &options);
    assert_eq!((geometry(&rig), rig.read(0x100)), (LARGE, 2048), "the capacity counts 512 bytes");
    drop(rig);
    assert_eq!(geometry(&Rig::new(&memory, &DiskOptions::new(&path))), SMALL);

    let odd = images.sparse("odd", (1 << 20) + 512);
    let error = Image::open(&odd, false, false, Some(SectorSize::Large)).unwrap_err();
    assert!(matches!(error, ImageError::Length { bytes: 1_049_088, .. }), "{error}");
    let remedy = format!("no multiple of 4096: make it longer with `truncate -s 1052672 {}`", odd.display());
    assert!(error.to_string().contains(&remedy), "{error}");
    Image::open(&odd, false, false, None).unwrap();
}
