//! Completed writes are in the log before the guest knows of them.

use outlive_epoch::image::{DISK_RECORD_LEN, DiskOp, DiskRecord, RecordBuf};

use super::super::{CHUNK, ChunkSet, LogMode, MAX_RECORD, PartLog};
use super::driver::{T_DISCARD, T_WRITE_ZEROES};
use super::*;

/// What is in a buffer: the offset in sectors, and the operation.
fn records(buffer: &RecordBuf) -> Vec<(u64, String)> {
    buffer
        .iter()
        .map(|DiskRecord { disk, offset, op }| {
            assert_eq!(disk, 0);
            (offset / 512, format!("{op:?}"))
        })
        .collect()
}

fn take(log: &WriteLog) -> RecordBuf {
    let mut buffer = RecordBuf::with_capacity(1 << 20);
    log.swap(&mut buffer);
    buffer
}

fn logged(path: &Path, memory: &Arc<Memory>) -> (Rig, Driver) {
    let rig = Rig::manual(memory, &DiskOptions::new(path));
    let driver = rig.boot();
    rig.device.go_live(false);
    take(&rig.log);
    rig.log.set_mode(LogMode::Log);
    (rig, driver)
}

#[test]
fn everything_that_changes_a_disk_is_logged_in_order() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = logged(&images.sparse("disk", 1 << 20), &memory);
    driver.write(0, 0, 3, &[1; 1024]);
    driver.read(0, 1, 3, 512);
    driver.ranges(0, 2, T_DISCARD, &[(100, 2, 0), (0, 0, 0), (200, 3, 0)]);
    driver.ranges(0, 3, T_WRITE_ZEROES, &[(300, 4, 0)]);
    driver.flush(0, 4);
    driver.write(0, 5, 500, &[2; 512]);
    rig.turn();
    // The disk finishes them in another order. The discard takes two operations, and so do the zeroes in this
    // file system.
    rig.engine().complete(5, None);
    rig.run();
    let buffer = take(&rig.log);
    let expected = [
        (500, "Data(512 bytes)"),
        (3, "Data(1024 bytes)"),
        (0, "Flush"),
        (100, "Zero(1024)"),
        (200, "Zero(1536)"),
        (300, "Zero(2048)"),
    ]
    .map(|(sector, op)| (sector, op.to_owned()));
    assert_eq!(records(&buffer), expected);
    let data: Vec<_> = buffer
        .iter()
        .filter_map(|it| if let DiskOp::Data(data) = it.op { Some(data[0]) } else { None })
        .collect();
    assert_eq!(data, [2, 1]);
    assert!(take(&rig.log).is_empty());
    let stats = rig.log.stats();
    assert_eq!((stats.records, stats.most_bytes, stats.full), (6, buffer.len() as u64, 0));
}

#[test]
fn a_large_write_is_logged_in_pieces() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = logged(&images.sparse("disk", 1 << 20), &memory);
    let data: Vec<_> = (0..150_016).map(|i| (i * 7 / 3) as u8).collect();
    driver.write(0, 0, 1, &data);
    rig.run();
    let buffer = take(&rig.log);
    let mut disk = vec![0; 1 << 20];
    for DiskRecord { offset, op, .. } in buffer.iter() {
        let DiskOp::Data(data) = op else { panic!("{op:?}") };
        assert!(data.len() <= MAX_RECORD);
        disk[offset as usize..][..data.len()].copy_from_slice(data);
    }
    assert_eq!(buffer.iter().count(), 3);
    assert_eq!(disk[512..512 + data.len()], data);
}

#[test]
fn what_failed_is_not_logged_but_what_was_done_before_it_is() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = logged(&images.sparse("disk", 1 << 20), &memory);
    driver.write(0, 0, 0, &[1; 4096]);
    driver.ranges(0, 1, T_WRITE_ZEROES, &[(300, 8, 1), (400, 8, 1)]);
    driver.ranges(0, 2, T_DISCARD, &[(500, 8, 0)]);
    driver.flush(0, 3);
    rig.turn();
    rig.engine().complete(0, Some(Ok(1536)));
    rig.engine().complete(0, None);
    rig.engine().complete(0, Some(Err(libc::EOPNOTSUPP)));
    rig.engine().complete(0, Some(Err(libc::EIO)));
    rig.turn();
    rig.engine().complete(0, Some(Err(libc::EIO)));
    rig.engine().complete(0, Some(Err(libc::ENOSPC)));
    rig.run();
    assert_eq!([0, 1, 2, 3].map(|slot| driver.status(slot)), [IOERR, IOERR, OK, IOERR]);
    let expected = [(0, "Data(1536 bytes)"), (300, "Zero(4096)")].map(|(at, op)| (at, op.to_owned()));
    assert_eq!(records(&take(&rig.log)), expected);
    // A later comparison of the copies finds where they may differ.
    let mut chunks = rig.log.empty_chunks(0).unwrap();
    assert!(rig.log.swap_chunks(0, &mut chunks));
    assert_eq!(chunks.iter().collect::<Vec<_>>(), [0, 2, 3]);
}

#[test]
fn without_a_cache_a_write_is_followed_by_a_flush() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = logged(&images.sparse("disk", 1 << 20), &memory);
    rig.registers.lock().unwrap().write(0x120, &[0]);
    driver.write(0, 0, 5, &[1; 512]);
    rig.run();
    let expected = [(5, "Data(512 bytes)"), (0, "Flush")].map(|(at, op)| (at, op.to_owned()));
    assert_eq!(records(&take(&rig.log)), expected);
}

#[test]
fn a_write_is_logged_before_the_guest_sees_it_complete() {
    // The log has no room: requests that must be logged do not complete, everything else does.
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = logged(&images.sparse("disk", 1 << 20), &memory);
    let small = |bytes| {
        let mut buffer = RecordBuf::with_capacity(bytes);
        rig.log.swap(&mut buffer);
        buffer
    };
    small(512 + DISK_RECORD_LEN);
    driver.write(0, 0, 0, &[1; 512]);
    driver.write(0, 1, 1, &[2; 512]);
    driver.write(0, 2, 2, &[3; 512]);
    driver.flush(0, 3);
    driver.read(0, 4, 0, 512);
    rig.run();
    rig.run();
    assert_eq!(driver.used(0), 2);
    assert_eq!([0, 1, 2, 3, 4].map(|slot| driver.status(slot)), [OK, 0xaa, 0xaa, 0xaa, OK]);
    assert_eq!(rig.full.get(), 1, "told once");
    assert_eq!(rig.device.in_flight(), 3, "they are in flight for a checkpoint");
    let first = small(512 + DISK_RECORD_LEN);
    assert_eq!(records(&first), [(0, "Data(512 bytes)".to_owned())]);
    rig.run();
    assert_eq!((driver.used(0), driver.status(1), rig.full.get()), (3, OK, 2));
    small(1 << 20);
    rig.run();
    assert_eq!((driver.used(0), rig.device.in_flight(), rig.full.get()), (5, 0, 2));
    assert_eq!(rig.log.stats().full, 2);
    assert!(rig.device.stats().log_full >= 2);
    assert_eq!(rig.log.fill(), (2 * DISK_RECORD_LEN + 512, 1 << 20));
}

#[test]
fn a_full_log_wakes_the_thread_when_it_has_room() {
    for off in [false, true] {
        let (images, memory) = (Images::in_memory(), memory());
        let path = images.sparse("disk", 1 << 20);
        let rig = Rig::new(&memory, &DiskOptions::new(&path));
        let driver = rig.boot();
        rig.device.go_live(false);
        rig.log.set_mode(LogMode::Log);
        driver.write(0, 0, 0, &[1; 512]);
        rig.kick(0);
        wait_for("the log to be full", || rig.full.get() == 1);
        settle();
        assert_eq!(driver.used(0), 0);
        // A checkpoint does not wait for a device that waits for it.
        let start = Instant::now();
        rig.gate.close();
        assert!(start.elapsed() < Duration::from_secs(1));
        if off {
            rig.log.set_mode(LogMode::Off);
        } else {
            take(&rig.log);
        }
        rig.gate.open();
        wait_for("the write", || driver.used(0) == 1);
    }
}

#[test]
fn tracking_marks_the_chunks_of_completed_writes() {
    let (images, memory) = (Images::in_memory(), memory());
    let path = images.sparse("disk", 10 * CHUNK + 512);
    let rig = Rig::manual(&memory, &DiskOptions::new(&path));
    let driver = rig.boot();
    rig.device.go_live(false);
    let marked = || {
        let mut chunks = rig.log.empty_chunks(0).unwrap();
        assert!(rig.log.swap_chunks(0, &mut chunks));
        chunks.iter().collect::<Vec<_>>()
    };
    driver.write(0, 0, 0, &[1; 512]);
    rig.run();
    assert_eq!(marked(), [0u64; 0], "off");
    rig.log.set_mode(LogMode::Track);
    driver.write(0, 0, 0, &[1; 512]);
    rig.turn();
    assert_eq!(marked(), [0u64; 0], "not complete");
    rig.run();
    assert_eq!(marked(), [0]);
    driver.write(0, 0, 255, &[1; 1024]); // over an edge
    driver.ranges(0, 1, T_DISCARD, &[(512, 257, 0)]);
    driver.write(0, 2, 1280, &[1; 512]); // in the last, short chunk
    driver.read(0, 3, 900, 512);
    driver.flush(0, 4);
    rig.run();
    assert_eq!(driver.used(0), 7);
    assert_eq!(marked(), [1, 2, 4, 5, 6, 10]);
    assert_eq!(marked(), [0u64; 0]);
    // Chunks of another disk, or of another size.
    assert!(!rig.log.swap_chunks(1, &mut ChunkSet::for_disk(10 * CHUNK + 512)));
    assert!(!rig.log.swap_chunks(0, &mut ChunkSet::for_disk(10 * CHUNK)));
    assert!(rig.log.empty_chunks(1).is_none());
}

#[test]
fn what_a_driver_gave_up_is_logged_when_the_disk_has_done_it() {
    let (images, memory) = (Images::in_memory(), memory());
    let (rig, driver) = logged(&images.sparse("disk", 1 << 20), &memory);
    driver.write(0, 0, 7, &[1; 512]);
    driver.write(0, 1, 7, &[2; 512]);
    rig.turn();
    rig.write(0x70, 0);
    assert_eq!(rig.device.in_flight(), 0);
    let driver = rig.boot();
    driver.write(0, 5, 7, &[3; 512]);
    rig.turn();
    assert_eq!(rig.engine().waiting().len(), 1, "the new one waits for the old one");
    rig.run();
    assert_eq!(records(&take(&rig.log)), [(7, "Data(512 bytes)".into()), (7, "Data(512 bytes)".to_owned())]);
    assert_eq!((driver.used(0), content(&images.path("disk"))[7 * 512]), (1, 3));
}

#[test]
#[should_panic(expected = "empty")]
fn a_buffer_is_not_shipped_twice() {
    let log = WriteLog::new(|| {});
    let mut buffer = RecordBuf::with_capacity(100);
    assert!(buffer.push(DiskRecord { disk: 0, offset: 0, op: DiskOp::Flush }));
    log.swap(&mut buffer);
}

/// What the audit asks before it compares a part of the disk.
#[test]
fn the_log_has_a_part_once_its_writes_are_complete_and_never_after_a_failed_one() {
    let (images, memory) = (Images::in_memory(), memory());
    let rig = Rig::manual(&memory, &DiskOptions::new(images.sparse("disk", 4 << 16)));
    let driver = rig.boot();
    rig.device.go_live(false);
    let chunk = 1u64 << 16;
    let all = |at: u64| rig.device.part_log(at * chunk, chunk, u64::MAX);
    let logged = || [0, 1, 2, 3].map(all);
    let (has, lacks) = ([PartLog::Has; 4], [PartLog::Lacks; 4]);
    assert_eq!(logged(), lacks, "nothing is logged");
    rig.log.set_mode(LogMode::Track);
    assert_eq!(logged(), lacks);
    // No room for any of the records.
    rig.log.swap(&mut RecordBuf::with_capacity(DISK_RECORD_LEN - 1));
    rig.log.set_mode(LogMode::Log);
    assert_eq!(logged(), has);

    // Across two chunks; a discard of a third; a read.
    driver.write(0, 0, 126, &[1; 2048]);
    driver.ranges(0, 1, T_DISCARD, &[(300, 8, 0)]);
    driver.read(0, 2, 400, 512);
    rig.turn();
    let wait = [PartLog::Waits(1), PartLog::Waits(1), PartLog::Waits(2), PartLog::Has];
    assert_eq!(logged(), wait);
    let of_first = |len| rig.device.part_log(0, len, u64::MAX);
    assert_eq!((of_first(126 * 512), of_first(126 * 512 + 1)), (PartLog::Has, PartLog::Waits(1)));
    // What has begun since does not count.
    driver.write(0, 4, 127, &[3; 512]);
    rig.turn();
    let up_to = |last| rig.device.part_log(0, chunk, last);
    assert_eq!([up_to(u64::MAX), up_to(1), up_to(0)], [PartLog::Waits(4), PartLog::Waits(1), PartLog::Has]);
    // The disk is done, but the log has no room.
    rig.engine().complete_all();
    rig.turn();
    assert_eq!(driver.used(0), 1, "the read");
    assert_eq!([logged()[1], up_to(1)], [PartLog::Waits(1); 2]);
    take(&rig.log);
    rig.turn();
    assert_eq!(up_to(1), PartLog::Has);
    rig.run();
    assert_eq!(logged(), has);

    // The host's disk fails, and the guest hears of it.
    driver.write(0, 3, 256, &[2; 512]);
    rig.turn();
    rig.engine().complete(0, Some(Err(libc::EIO)));
    rig.turn();
    assert_eq!(logged(), [PartLog::Has, PartLog::Has, PartLog::Lacks, PartLog::Has]);
    // A synchronisation takes the marks, and brings the chunk to the other host.
    let mut marks = rig.log.empty_chunks(0).unwrap();
    assert!(rig.log.swap_chunks(0, &mut marks));
    assert_eq!(logged(), has);
}
