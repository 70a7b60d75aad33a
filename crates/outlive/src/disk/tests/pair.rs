//! A synchronisation and a replica, joined by a wire that is no wire.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outlive_epoch::{DISK_CHUNK, DiskOp, DiskSums, DiskWant, RecordBuf, UncheckedRecords, VmId};

use super::provenance;
use crate::disk::journal::Journal;
use crate::disk::replica::{ReplicaError, UnfitError};
use crate::disk::sidecar::{Role, Sidecar, beside};
use crate::disk::{
    Book, Books, Changed, DiskEvent, DiskSection, DiskSync, Replica, ReplicaDisk, SourceDisk, SyncReport,
};

const CHUNK: u64 = DISK_CHUNK as u64;

#[derive(Clone, Default)]
struct Marks(Arc<Mutex<Vec<u64>>>);

impl Changed for Marks {
    fn take(&mut self, disk: u16, chunks: &mut Vec<u64>) {
        if disk == 0 {
            let mut marks = self.0.lock().unwrap();
            marks.sort_unstable();
            marks.dedup();
            chunks.append(&mut marks);
        }
    }
}

struct Pair {
    directory: tempfile::TempDir,
    marks: Marks,
    sync: Option<DiskSync>,
    replica: Replica,
    sections: Receiver<DiskSection>,
    reports: Receiver<SyncReport>,
    told: Receiver<DiskEvent>,
    /// Bytes of blocks that went over, and chunks in sums.
    blocks: u64,
    /// What each host knows of its images, and what the primary's machine has written since it last said so.
    books: [Books; 2],
    touched: Arc<Mutex<Vec<u64>>>,
    /// Bytes that the primary has read to compare them.
    read: u64,
}

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).unwrap()
}

/// Two disks: one of many chunks and an odd end, one that is only read.
fn images(directory: &Path, host: &str) -> [PathBuf; 2] {
    [directory.join(format!("{host}-0.img")), directory.join(format!("{host}-1.img"))]
}

const SIZES: [u64; 2] = [300 * CHUNK + 1536, 3 * CHUNK];

fn start_replica(directory: &Path, books: &Books) -> (Replica, Receiver<DiskEvent>) {
    let (tell, told): (Sender<DiskEvent>, _) = channel();
    let paths = images(directory, "standby");
    let disk = |at: usize| {
        Some(ReplicaDisk {
            path: paths[at].clone(),
            file: open(&paths[at]),
            bytes: SIZES[at],
            read_only: at == 1,
            accepted: None,
            thin: false,
            book: books.open(&paths[at], &open(&paths[at]), SIZES[at]),
        })
    };
    let disks = vec![disk(0), None, disk(1)];
    (Replica::start(disks, provenance(VmId([5; 16])), 7, move |it| drop(tell.send(it))).unwrap(), told)
}

impl Pair {
    fn new(fill: impl FnOnce(&[File; 2], &[File; 2])) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let [ours, theirs] = ["primary", "standby"].map(|host| {
            let files = images(directory.path(), host).map(|path| open(&path));
            files.iter().zip(SIZES).for_each(|(file, size)| file.set_len(size).unwrap());
            files
        });
        fill(&ours, &theirs);
        Self::over(directory, [Books::default(), Books::default()])
    }

    /// A synchronisation of two hosts that know this of their images.
    fn over(directory: tempfile::TempDir, books: [Books; 2]) -> Self {
        let (replica, told) = start_replica(directory.path(), &books[1]);
        let marks = Marks::default();
        let (send, sections) = channel();
        let (tell, reports) = channel();
        let paths = images(directory.path(), "primary");
        let disks = vec![
            SourceDisk {
                index: 0,
                file: open(&paths[0]),
                bytes: SIZES[0],
                written: true,
                book: books[0].opened(&paths[0], &open(&paths[0]), SIZES[0]),
            },
            SourceDisk {
                index: 2,
                file: open(&paths[1]),
                bytes: SIZES[1],
                written: false,
                book: Book::none(),
            },
        ];
        let sync = DiskSync::start(
            disks,
            marks.clone(),
            move |section| drop(send.send(section)),
            move |report| drop(tell.send(report)),
        );
        let sync = Some(sync.unwrap());
        let (blocks, read, touched) = (0, 0, Arc::default());
        Self { directory, marks, sync, replica, sections, reports, told, blocks, books, touched, read }
    }

    /// Carries messages until the primary's side reports something that is not progress.
    fn until_report(&mut self) -> SyncReport {
        loop {
            let mut idle = true;
            while let Ok(section) = self.sections.try_recv() {
                idle = false;
                self.carry(&section).unwrap();
            }
            while let Ok(told) = self.told.try_recv() {
                idle = false;
                match told {
                    DiskEvent::Want(want) => self.sync.as_ref().unwrap().want(want),
                    DiskEvent::Failed(why) => return SyncReport::Failed(why.to_string()),
                    other => panic!("nobody asked for it: {other:?}"),
                }
            }
            while let Ok(report) = self.reports.try_recv() {
                match report {
                    SyncReport::Progress { read_bytes, .. } => self.read = read_bytes,
                    report => return report,
                }
            }
            if idle {
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// Settles at this checkpoint; what the replica says to that.
    fn settled(&self, checkpoint: u64) -> Result<u64, Arc<ReplicaError>> {
        self.replica.settle(checkpoint);
        loop {
            match self.told.recv_timeout(Duration::from_secs(20)).unwrap() {
                DiskEvent::Settled { checkpoint } => return Ok(checkpoint),
                DiskEvent::Failed(why) => return Err(why),
                _ => {}
            }
        }
    }

    fn carry(&mut self, section: &DiskSection) -> Result<(), UnfitError> {
        match section {
            DiskSection::Sums { disk, first, count, sums } => self.replica.sums(&DiskSums {
                disk: *disk,
                first: *first,
                count: *count,
                sums: sums.as_deref(),
            }),
            DiskSection::Blocks { records, .. } => {
                self.blocks += records.len() as u64;
                self.replica.blocks(as_received(records))
            }
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        let file = open(&images(self.directory.path(), "primary")[0]);
        file.write_all_at(bytes, offset).unwrap();
        let chunks = offset / CHUNK..(offset + bytes.len() as u64).div_ceil(CHUNK);
        self.marks.0.lock().unwrap().extend(chunks.clone());
        self.touched.lock().unwrap().extend(chunks);
    }

    fn commit(&self, number: u64, base: bool, writes: &[(u64, &[u8])], flush: bool) {
        let data = writes.iter().map(|(offset, bytes)| (0, *offset, DiskOp::Data(bytes)));
        let flush = flush.then_some((0, 0, DiskOp::Flush));
        self.replica.commit(number, base, super::records(&data.chain(flush).collect::<Vec<_>>()));
    }

    fn content(&self, host: &str) -> [Vec<u8>; 2] {
        images(self.directory.path(), host).map(|path| fs::read(path).unwrap())
    }

    fn sidecar(&self) -> Option<Sidecar> {
        Sidecar::read(&images(self.directory.path(), "standby")[0]).unwrap()
    }
}

fn differing(ours: &[File; 2], theirs: &[File; 2]) {
    for chunk in [0u64, 1, 63, 64, 65, 200, 299, 300] {
        ours[0].write_all_at(&[chunk as u8 | 1; 1000], chunk * CHUNK + 100).unwrap();
    }
    // Data at the standby where the primary has none, and the same data on both.
    theirs[0].write_all_at(&[9; 70_000], 150 * CHUNK + 17).unwrap();
    theirs[0].write_all_at(&[65; 1000], 65 * CHUNK + 100).unwrap();
    for files in [ours, theirs] {
        files[1].write_all_at(&[4; 5000], 60_000).unwrap();
    }
}

#[test]
fn a_base_takes_what_differs_and_no_more() {
    let mut pair = Pair::new(differing);
    assert_eq!(pair.until_report(), SyncReport::Synced);
    assert_eq!(pair.content("primary"), pair.content("standby"));
    // Chunk 65 was the same already; chunk 300 is a short one.
    let expected = 6 * (CHUNK + 24) + 1536 + 24;
    assert_eq!(pair.blocks, expected);
    let sidecar = pair.sidecar().unwrap();
    assert!(!sidecar.whole && sidecar.role == Role::Replica);

    // Written after the first round: goes with the next, whatever its kind.
    pair.write(3 * CHUNK - 5, &[7; 10]);
    pair.write(64 * CHUNK, &[0; 2 * DISK_CHUNK]);
    pair.sync.as_ref().unwrap().catch_up(true);
    assert_eq!(pair.until_report(), SyncReport::CaughtUp { last: true, chunks: 4 });
    assert_eq!(pair.content("primary"), pair.content("standby"));

    // Again with nothing to send.
    let before = pair.blocks;
    let mut pair = Pair { blocks: before, ..Pair::over_again(pair) };
    assert_eq!(pair.until_report(), SyncReport::Synced);
    assert_eq!(pair.blocks, before);
}

impl Pair {
    /// Another connection of the same two hosts.
    fn over_again(pair: Self) -> Self {
        let Self { directory, sync, replica, books, touched, .. } = pair;
        drop(sync);
        drop(replica);
        books[1].close();
        let path = &images(directory.path(), "primary")[0];
        let book = books[0].opened(path, &open(path), SIZES[0]);
        touched.lock().unwrap().drain(..).for_each(|chunk| book.forget(chunk));
        Self::over(directory, books)
    }
}

/// Only what either side has written since is read again, and it is compared.
#[test]
fn what_both_sides_have_seen_before_is_not_read_again() {
    let mut pair = Pair::new(|ours, theirs| {
        differing(ours, theirs);
        // No holes.
        for chunk in 0..300 {
            ours[0].write_all_at(&[3; 10], chunk * CHUNK + 50_000).unwrap();
        }
    });
    assert_eq!(pair.until_report(), SyncReport::Synced);
    assert!(pair.read >= SIZES[0], "{} of {}", pair.read, SIZES[0]);
    let first = pair.blocks;
    // The standby commits what the primary has written, and the primary writes on.
    pair.write(7 * CHUNK, &[1; 100]);
    pair.commit(50, true, &[(7 * CHUNK, &[1; 100])], false);
    pair.write(9 * CHUNK, &[2; 100]);
    pair.commit(51, false, &[(20 * CHUNK, &[4; 100])], true);
    assert_eq!(pair.settled(51).unwrap(), 51);

    let mut pair = Pair::over_again(pair);
    assert_eq!(pair.until_report(), SyncReport::Synced);
    assert_eq!(pair.content("primary"), pair.content("standby"));
    // The disk that is only read is compared as ever.
    assert!(pair.read <= 2 * CHUNK + SIZES[1], "{} bytes read", pair.read);
    assert!(pair.blocks < first && pair.blocks >= 2 * CHUNK, "{} bytes sent", pair.blocks);

    // Somebody has written to the standby's image while nobody had it.
    let Pair { directory, sync, replica, books, .. } = pair;
    drop((sync, replica));
    books[1].close();
    let image = open(&images(directory.path(), "standby")[0]);
    image.write_all_at(b"somebody", 100 * CHUNK).unwrap();
    image.set_modified(std::time::SystemTime::now() + Duration::from_secs(5)).unwrap();
    let mut pair = Pair::over(directory, books);
    assert_eq!(pair.until_report(), SyncReport::Synced);
    assert_eq!(pair.content("primary"), pair.content("standby"));
}

#[test]
fn commits_go_through_the_journal_into_the_image() {
    let mut pair = Pair::new(differing);
    assert_eq!(pair.until_report(), SyncReport::Synced);
    let image = images(pair.directory.path(), "standby")[0].clone();
    let journal = beside(&image, "journal");
    let mut expected = pair.content("primary")[0].clone();
    for number in 50..80u64 {
        let (offset, fill) = (number * 3000, [number as u8; 5000]);
        let far = (SIZES[0] - 700, &fill[..700]);
        pair.commit(number, number == 50, &[(offset, &fill), far], number % 7 == 0);
        expected[offset as usize..offset as usize + 5000].fill(number as u8);
        expected[far.0 as usize..].fill(number as u8);
    }
    let began = std::time::Instant::now();
    while pair.content("standby")[0] != expected || Journal::open(open(&journal)).unwrap().1 != 79 {
        assert!(began.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(5));
    }
    let sidecar = pair.sidecar().unwrap();
    assert!(sidecar.whole && sidecar.checkpoint == 50);
    assert_eq!((sidecar.provenance.vm, sidecar.generation), (VmId([5; 16]), 7));
    assert_eq!(sidecar.journal.as_deref().map(fs::canonicalize).unwrap().unwrap(), journal);

    let mode = fs::metadata(&journal).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "it has what the guest writes");

    pair.commit(80, false, &[(0, b"the last")], false);
    // Before this host asks for the VM, what a takeover would have to write is written.
    assert_eq!(pair.settled(80).unwrap(), 80);
    expected[..8].copy_from_slice(b"the last");
    assert!(pair.content("standby")[0] == expected);
    let sidecar = pair.sidecar().unwrap();
    let now = (sidecar.role, sidecar.generation, sidecar.checkpoint, sidecar.whole, sidecar.journal);
    assert_eq!(now, (Role::Replica, 7, 80, true, None));
    assert!(!journal.exists());
    pair.replica.become_primary(8).unwrap();
    let sidecar = pair.sidecar().unwrap();
    let now = (sidecar.role, sidecar.generation, sidecar.checkpoint, sidecar.whole, sidecar.journal);
    assert_eq!(now, (Role::Primary, 8, 80, true, None));
    assert!(!journal.exists());
    // Only the images that are written have a sidecar.
    assert_eq!(Sidecar::read(&images(pair.directory.path(), "standby")[1]).unwrap(), None);
}

#[test]
fn without_more_commits_they_are_applied_soon() {
    let mut pair = Pair::new(|_, _| ());
    assert_eq!(pair.until_report(), SyncReport::Synced);
    pair.commit(1, true, &[], false);
    pair.commit(2, false, &[(70_000, b"soon")], false);
    let began = std::time::Instant::now();
    while &pair.content("standby")[0][70_000..70_004] != b"soon" {
        assert!(began.elapsed() < Duration::from_secs(5));
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_standby_that_ends_in_order_leaves_a_whole_image() {
    let mut pair = Pair::new(differing);
    assert_eq!(pair.until_report(), SyncReport::Synced);
    pair.commit(9, true, &[(5, b"base")], false);
    pair.commit(12, false, &[(5, b"more")], false);
    let Pair { directory, replica, .. } = pair;
    drop(replica);
    let image = images(directory.path(), "standby")[0].clone();
    let sidecar = Sidecar::read(&image).unwrap().unwrap();
    assert_eq!((sidecar.whole, sidecar.checkpoint, sidecar.journal), (true, 12, None));
    assert_eq!(&fs::read(&image).unwrap()[5..9], b"more");
    assert!(!beside(&image, "journal").exists());
}

#[test]
fn a_read_only_disk_that_differs_is_named() {
    let mut pair = Pair::new(|ours, _| ours[1].write_all_at(b"x", 100_000).unwrap());
    let report = pair.until_report();
    let SyncReport::Failed(why) = report else { panic!("{report:?}") };
    assert!(why.contains("disk 2 is read-only") && why.contains("copy the primary's file"), "{why}");
}

fn as_received(records: &RecordBuf) -> UncheckedRecords<'_> {
    UncheckedRecords::new(records.records().bytes())
}

#[test]
fn sums_and_blocks_out_of_bounds_are_refused() {
    let mut pair = Pair::new(|_, _| ());
    assert_eq!(pair.until_report(), SyncReport::Synced);
    let sums = |disk, first, count| pair.replica.sums(&DiskSums { disk, first, count, sums: None });
    assert!(sums(0, 0, 301).is_ok());
    for (disk, first, count) in [(0, 0, 302), (0, 301, 1), (1, 0, 1), (3, 0, 1), (2, 1, 3)] {
        assert!(sums(disk, first, count).is_err(), "{disk} {first} {count}");
    }
    let block = |disk, offset, op| pair.replica.blocks(as_received(&super::records(&[(disk, offset, op)])));
    let refused = |disk, offset, op| block(disk, offset, op).unwrap_err().to_string();
    assert_eq!(refused(0, 0, DiskOp::Data(&[1])), "blocks that were not asked for");
    for (disk, offset, op) in [
        (0, SIZES[0], DiskOp::Zero(1)),
        (1, 0, DiskOp::Zero(1)),
        (2, 0, DiskOp::Data(&[1])),
        (9, 0, DiskOp::Zero(1)),
    ] {
        assert!(refused(disk, offset, op).contains("is outside the VM's disks"), "{disk} {offset}");
    }
    assert_eq!(refused(0, 0, DiskOp::Flush), "a flush among the blocks of a disk");
    let cut = super::records(&[(0, 0, DiskOp::Data(&[1]))]);
    let cut = UncheckedRecords::new(&cut.records().bytes()[..24]);
    assert!(pair.replica.blocks(cut).unwrap_err().to_string().contains("a disk record ends early"));
}

#[test]
fn an_answer_that_fits_no_window_ends_the_synchronisation() {
    let pair = Pair::new(|_, _| ());
    pair.sync.as_ref().unwrap().want(DiskWant { disk: 0, first: 5, count: 2, wanted: vec![] });
    loop {
        match pair.reports.recv_timeout(Duration::from_secs(5)).unwrap() {
            SyncReport::Progress { .. } => {}
            SyncReport::Failed(why) => {
                assert_eq!(why, "the standby answered to sums that were not sent");
                break;
            }
            other => panic!("{other:?}"),
        }
    }
}

/// Without an answer only a bounded number of sums ever goes out, and dropping ends the thread.
#[test]
fn what_is_on_its_way_is_bounded() {
    let mut pair = Pair::new(|ours, _| {
        for chunk in 0..300 {
            ours[0].write_all_at(&[1], chunk * CHUNK).unwrap();
        }
    });
    std::thread::sleep(Duration::from_millis(500));
    let sections: Vec<_> = pair.sections.try_iter().collect();
    let chunks: u32 =
        sections.iter().map(|s| if let DiskSection::Sums { count, .. } = s { *count } else { 0 }).sum();
    assert_eq!(chunks, 128);
    drop(pair.sync.take());
}

#[test]
fn an_image_is_no_longer_whole_while_the_last_writes_of_a_base_reach_it() {
    let mut pair = Pair::new(differing);
    assert_eq!(pair.until_report(), SyncReport::Synced);
    pair.commit(9, true, &[], false);
    assert_eq!(pair.settled(9).unwrap(), 9);
    let mut pair = Pair::over_again(pair);
    assert_eq!(pair.until_report(), SyncReport::Synced);
    let image = images(pair.directory.path(), "standby")[0].clone();
    // Stands for the kill or the loss of power between the image and the sidecar.
    fs::create_dir(beside(&image, "outlive.new")).unwrap();
    pair.commit(20, true, &[(5, b"torn")], false);
    assert!(pair.settled(20).is_err());
    let after = pair.sidecar().unwrap();
    let is_written = fs::read(&image).unwrap()[5..9] == *b"torn";
    assert!(!is_written || !after.whole || after.journal.is_some(), "{after:?}");
}
