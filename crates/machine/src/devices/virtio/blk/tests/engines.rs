//! Reading and writing, the same with both engines.

use std::os::unix::fs::MetadataExt;

use super::driver::{DATA, T_DISCARD, T_GET_ID, T_WRITE_ZEROES, WRITE};
use super::*;

fn options(path: &Path, engine: EngineKind) -> DiskOptions {
    DiskOptions { engine, ..DiskOptions::new(path) }
}

#[test]
fn what_is_written_is_on_the_disk_and_is_read_back() {
    for engine in ENGINES {
        let (images, memory) = (Images::new(), memory());
        let path = images.sparse("disk", 1 << 20);
        let rig = Rig::new(&memory, &options(&path, engine));
        assert_eq!(rig.device.engine(), if engine == EngineKind::Uring { "io_uring" } else { "threads" });
        for features in [rig.offered(), rig.offered() & !EVENT_IDX] {
            let driver = rig.boot_with(features, 1);
            rig.device.go_live(false);
            driver.write(0, 0, 3, &[0x11; 1024]);
            driver.write(0, 1, 2047, &[0x22; 512]);
            rig.serve(&driver, 2);
            driver.flush(0, 2);
            driver.read(0, 3, 2, 2048);
            rig.serve(&driver, 4);
            assert_eq!([0, 1, 2, 3].map(|slot| driver.status(slot)), [OK; 4]);
            let mut expected = vec![0; 2048];
            expected[512..1536].fill(0x11);
            assert_eq!(driver.data(3, 2048), expected);
            let disk = content(&path);
            assert_eq!((&disk[1536..2560], &disk[2047 * 512..]), (&[0x11; 1024][..], &[0x22; 512][..]));
            let lens: Vec<_> = (0..4).map(|index| driver.used_entry(0, index)).collect();
            assert!(lens.contains(&(3, 2049)) && lens.contains(&(0, 1)), "{lens:?}");
        }
        let stats = rig.device.stats();
        assert_eq!((stats.writes, stats.write_bytes, stats.flushes), (4, 2 * 1536, 2));
        assert_eq!((stats.reads, stats.read_bytes, stats.errors), (2, 4096, 0));
        assert_eq!(stats.in_flight, 0);
    }
}

#[test]
fn many_requests_through_all_queues() {
    for engine in ENGINES {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.sparse("disk", 8 << 20);
        let rig = Rig::new(&memory, &DiskOptions { queues: 16, ..options(&path, engine) });
        let driver = rig.boot_with(rig.offered(), 16);
        rig.device.go_live(false);
        assert_eq!(rig.read(0x100 + 0x20) >> 16, 16, "num_queues in the configuration space");
        for round in 0..40u16 {
            for queue in 0..16 {
                for part in 0..3 {
                    let slot = queue * 3 + part;
                    let sector = u64::from(slot) * 16 + u64::from(round % 2) * 2048;
                    driver.write(queue, slot, sector, &[(round + slot) as u8; 8192]);
                }
                rig.kick(queue);
            }
            wait_for("a round", || (0..16).all(|queue| driver.used(queue) == round * 3 + 3));
        }
        assert!((0..48).all(|slot| driver.status(slot) == OK));
        let disk = content(&path);
        for slot in 0..48u16 {
            for round in [38, 39] {
                let at = usize::from(slot) * 8192 + usize::from(round % 2) * (1 << 20);
                assert!(disk[at..at + 8192].iter().all(|&byte| byte == (round + slot) as u8));
            }
        }
        assert!(rig.interrupts.get() > 0 && rig.wakes.get() > 0);
    }
}

#[test]
fn a_driver_may_use_fewer_queues() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    let rig = Rig::new(&memory, &DiskOptions { queues: 4, ..DiskOptions::new(&path) });
    let driver = rig.boot_with(rig.offered(), 2);
    rig.device.go_live(false);
    driver.write(1, 0, 0, &[1; 512]);
    rig.kick(1);
    rig.kick(3);
    wait_for("the write", || driver.used(1) == 1);
    // The queue that is needed is missing.
    rig.write(0x70, 0);
    rig.write(0x70, 3);
    rig.write(0x24, 1);
    rig.write(0x20, 1);
    rig.write(0x70, 11);
    rig.write(0x70, 15);
    assert!(rig.needs_reset());
}

#[test]
fn buffers_may_be_cut_anywhere() {
    for engine in ENGINES {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.numbered("disk", 64);
        let rig = Rig::new(&memory, &options(&path, engine));
        let driver = rig.boot();
        rig.device.go_live(false);
        // A header in three parts, whose last part also has data; the rest of the data in crumbs.
        let at = Driver::slot(0);
        let mut bytes = vec![1, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend((0..1024).map(|i| i as u8));
        memory.write_slice(&bytes, GuestAddress(at + DATA)).unwrap();
        let [_, status] = Driver::ends(0);
        let cuts = [3, 1, 20, 0, 500, 1, 515];
        assert_eq!(cuts.iter().sum::<u32>(), 1040);
        let mut buffers = Vec::new();
        let mut from = at + DATA;
        for len in cuts {
            buffers.push((from, len, 0));
            from += u64::from(len);
        }
        buffers.push((status, 1, WRITE));
        driver.chain(0, 0, &buffers);
        rig.serve(&driver, 1);
        assert_eq!(driver.status(0), OK);
        assert_eq!(content(&path)[5 * 512..7 * 512], bytes[16..]);
        // Read back: crumbs, and the status in one buffer with the end of the data.
        driver.header(1, 0, 5);
        let at = Driver::slot(1);
        let buffers = [
            (Driver::ends(1)[0], 16, 0),
            (at + DATA, 1, WRITE),
            (at + DATA + 1, 700, WRITE),
            (at + DATA + 701, 0, WRITE),
            (at + DATA + 701, 324, WRITE),
        ];
        driver.chain(0, 1, &buffers);
        rig.serve(&driver, 2);
        let got = driver.data(1, 1025);
        assert_eq!((&got[..1024], got[1024]), (&bytes[16..], OK));
        assert_eq!(driver.used_entry(0, 1), (1, 1025));
        // Without indirect tables.
        driver.indirect.store(false, Ordering::Relaxed);
        driver.write(0, 2, 9, &[9; 512]);
        driver.read(0, 3, 8, 512);
        rig.serve(&driver, 4);
        assert_eq!((driver.status(2), driver.status(3)), (OK, OK));
        assert_eq!(driver.data(3, 8), 9u64.to_le_bytes());
    }
}

#[test]
fn the_largest_request_and_one_more() {
    for engine in ENGINES {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.sparse("disk", 8 << 20);
        let rig = Rig::new(&memory, &options(&path, engine));
        let driver = rig.boot();
        rig.device.go_live(false);
        // Data over all slots except for the first ones.
        let data = Driver::slot(2);
        let len = 126 * (32 << 10);
        let pattern: Vec<_> = (0..len).map(|i| (i / 512 * 7 + i) as u8).collect();
        let transfer = |slot, kind, flags, pieces: u64, more: u32| {
            driver.header(slot, kind, 8);
            let [header, status] = Driver::ends(slot);
            let mut buffers = vec![(header, 16, 0)];
            for piece in 0..pieces {
                let last = if piece == pieces - 1 { more } else { 0 };
                buffers.push((data + (piece << 19), (len / 8) as u32 + last, flags));
            }
            buffers.push((status, 1, WRITE));
            driver.chain(0, slot, &buffers);
        };
        // In memory the pieces are half a MiB apart.
        for piece in (0..8u64).rev() {
            let from = (len as u64 / 8 * piece) as usize;
            let part = &pattern[from..from + len / 8];
            memory.write_slice(part, GuestAddress(data + (piece << 19))).unwrap();
        }
        transfer(0, 1, 0, 8, 0);
        rig.serve(&driver, 1);
        assert_eq!(driver.status(0), OK);
        assert_eq!(content(&path)[4096..4096 + len], pattern);
        memory.write_slice(&vec![0; 4 << 20], GuestAddress(data)).unwrap();
        transfer(0, 0, WRITE, 8, 0);
        rig.serve(&driver, 2);
        assert_eq!((driver.status(0), driver.used_entry(0, 1)), (OK, (0, len as u32 + 1)));
        let mut got = vec![0; len / 8];
        for piece in 0..8 {
            memory.read_slice(&mut got, GuestAddress(data + (piece << 19))).unwrap();
            assert_eq!(got, pattern[len / 8 * piece as usize..][..len / 8]);
        }
        transfer(1, 1, 0, 8, 512);
        rig.serve(&driver, 3);
        assert_eq!(driver.status(1), IOERR, "one sector too long");
    }
}

#[test]
fn requests_that_make_no_sense_fail_alone() {
    for engine in ENGINES {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.numbered("disk", 100);
        let rig = Rig::new(&memory, &options(&path, engine));
        let driver = rig.boot();
        rig.device.go_live(false);
        let before = content(&path);
        let mut slot = 0;
        let mut fails = |expected, lay: &dyn Fn(u16)| {
            lay(slot % 16);
            slot += 1;
            rig.serve(&driver, slot);
            assert_eq!(driver.status((slot - 1) % 16), expected, "request {slot}");
        };
        for sector in [100, 99, u64::MAX, u64::MAX / 512, 1 << 55] {
            fails(IOERR, &|slot| driver.read(0, slot, sector, 1024));
            fails(IOERR, &|slot| driver.write(0, slot, sector, &[7; 1024]));
        }
        for len in [0, 1, 511, 513] {
            fails(IOERR, &|slot| driver.read(0, slot, 0, len));
            fails(IOERR, &|slot| driver.write(0, slot, 0, &vec![7; len]));
        }
        for kind in [2, 3, 5, 10, 14, 15, 16, 24, u32::MAX] {
            fails(UNSUPP, &|slot| driver.request(0, slot, kind, 0, 512));
        }
        for kind in [T_DISCARD, T_WRITE_ZEROES] {
            for (sector, count) in [(0, 101), (99, 2), (u64::MAX, 1), (0, u32::MAX)] {
                fails(IOERR, &|slot| driver.ranges(0, slot, kind, &[(0, 1, 0), (sector, count, 0)]));
            }
            fails(UNSUPP, &|slot| driver.ranges(0, slot, kind, &[(0, 1, 2)]));
            fails(IOERR, &|slot| driver.ranges(0, slot, kind, &[(0, 1, 0); 17]));
            fails(IOERR, &|slot| driver.request(0, slot, kind, 0, 8));
            fails(IOERR, &|slot| driver.request(0, slot, kind, 0, 0));
        }
        fails(UNSUPP, &|slot| driver.ranges(0, slot, T_DISCARD, &[(0, 1, 1)]));
        assert_eq!(content(&path), before, "nothing of it has touched the disk");
        assert_eq!(rig.device.stats().errors, u64::from(slot));
        assert!(!rig.needs_reset());
        // Empty ranges are valid.
        driver.ranges(0, 20, T_WRITE_ZEROES, &[(5, 0, 1), (100, 0, 0)]);
        driver.ranges(0, 21, T_DISCARD, &[(0, 0, 0)]);
        rig.serve(&driver, slot + 2);
        assert_eq!((driver.status(20), driver.status(21)), (OK, OK));
        assert_eq!(content(&path), before);
    }
}

#[test]
fn the_serial_number() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 1 << 20);
    for (chosen, expected) in
        [(None, "outlive-disk0"), (Some("exactly 20 letters.."), "exactly 20 letters..")]
    {
        let serial = chosen.map(str::to_owned);
        let rig = Rig::new(&memory, &DiskOptions { serial, ..DiskOptions::new(&path) });
        let driver = rig.boot();
        rig.device.go_live(false);
        driver.request(0, 0, T_GET_ID, 0, 20);
        driver.request(0, 1, T_GET_ID, 0, 7);
        driver.request(0, 2, T_GET_ID, 0, 30);
        rig.serve(&driver, 3);
        let mut whole = [0; 20];
        whole[..expected.len()].copy_from_slice(expected.as_bytes());
        assert_eq!(driver.data(0, 20), whole);
        assert_eq!(driver.data(1, 7), whole[..7]);
        assert_eq!((0..3).map(|i| driver.used_entry(0, i).1).collect::<Vec<_>>(), [21, 8, 21]);
        assert_eq!([0, 1, 2].map(|slot| driver.status(slot)), [OK; 3]);
    }
    for bad in ["", "twenty-one characters", "t\tab", "gr\u{fc}n"] {
        let options = DiskOptions { serial: Some(bad.into()), ..DiskOptions::new(&path) };
        let host = DeviceHost {
            memory: memory.clone(),
            gate: Arc::default(),
            interrupt: Arc::new(Count::default()),
            waker: Arc::new(Count::default()),
        };
        let error = BlockDevice::new(&options, 0, WriteLog::new(|| {}), permit(), host).err().unwrap();
        assert!(error.to_string().contains("serial number"), "{error}");
    }
}

/// Discards and zeroes on a file system.
fn zeroes(images: &Images, engine: EngineKind) {
    let memory = memory();
    let path = images.path("disk");
    std::fs::write(&path, vec![0xff; 1 << 20]).unwrap();
    let rig = Rig::new(&memory, &options(&path, engine));
    let driver = rig.boot();
    rig.device.go_live(false);
    let blocks = std::fs::metadata(&path).unwrap().blocks();
    let mut expected = vec![0xff; 1 << 20];
    // Whole pages, and parts of them.
    driver.ranges(0, 0, T_DISCARD, &[(0, 512, 0), (1024, 3, 0), (1025, 7, 0)]);
    driver.ranges(0, 1, T_WRITE_ZEROES, &[(600, 256, 0), (900, 1, 0)]);
    driver.ranges(0, 2, T_WRITE_ZEROES, &[(1100, 256, 1), (2047, 1, 1)]);
    rig.serve(&driver, 3);
    assert_eq!([0, 1, 2].map(|slot| driver.status(slot)), [OK; 3]);
    for (first, count) in [(0, 512), (1024, 3), (1025, 7), (600, 256), (900, 1), (1100, 256), (2047, 1)] {
        expected[first * 512..(first + count) * 512].fill(0);
    }
    assert_eq!(content(&path), expected);
    let now = std::fs::metadata(&path).unwrap();
    assert_eq!(now.len(), 1 << 20);
    assert!(now.blocks() < blocks, "space is given back: {} of {blocks} blocks", now.blocks());
    let stats = rig.device.stats();
    assert_eq!((stats.discards, stats.zeroes, stats.errors), (1, 2, 0));
}

#[test]
fn discards_and_zeroes() {
    for engine in ENGINES {
        zeroes(&Images::new(), engine);
        // Here zeroes that keep their space have to be written.
        zeroes(&Images::in_memory(), engine);
    }
}

#[test]
fn more_than_there_are_bounce_buffers_for() {
    for engine in ENGINES {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.sparse("disk", 64 << 20);
        let rig = Rig::new(&memory, &options(&path, engine));
        let driver = rig.boot();
        rig.device.go_live(false);
        // 16 requests of 2 MiB, all with the same memory.
        for slot in 0..16 {
            driver.header(slot, u32::from(slot % 2 == 0), u64::from(slot) * 4096);
            let [header, status] = Driver::ends(slot);
            let flags = if slot % 2 == 0 { 0 } else { WRITE };
            let data = Driver::slot(40) + u64::from(slot % 2) * (2 << 20);
            driver.chain(0, slot, &[(header, 16, 0), (data, 2 << 20, flags), (status, 1, WRITE)]);
        }
        rig.serve(&driver, 16);
        assert!((0..16).all(|slot| driver.status(slot) == OK));
        let stats = rig.device.stats();
        assert!(stats.most_in_flight <= 8, "{stats:?}");
        assert_eq!((stats.reads, stats.writes), (8, 8));
    }
}
