//! A replica compares parts of its images with sums of the VM's disks.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use outlive_epoch::{AuditRange, ChunkRange, DISK_CHUNK, DiskAudited, DiskOp};

use super::check::{SIZE, Standby};
use super::records;
use crate::audit::{AuditShare, Budget};
use crate::disk::journal::START;
use crate::disk::sidecar::{Sidecar, beside};
use crate::disk::{DiskEvent, chunk_sum};

const CHUNK: u64 = DISK_CHUNK as u64;
const LAST: u64 = SIZE / CHUNK - 1;

fn all() -> Arc<Budget> {
    Budget::start("100".parse().unwrap())
}

fn range(disk: u16, first: u64, count: u32) -> ChunkRange {
    ChunkRange { disk, first, count }
}

impl Standby {
    /// One chunk, as the VM has it.
    fn sum(&self, first: u64) -> AuditRange {
        let mut chunk = vec![0; DISK_CHUNK];
        self.vm.read_exact_at(&mut chunk, first * CHUNK).unwrap();
        AuditRange { chunks: range(0, first, 1), sum: chunk_sum(first, &chunk) }
    }

    /// Audits until the replica says how far it is.
    fn audited(&self, number: u64, ranges: &[AuditRange]) -> DiskAudited {
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until {
            self.replica.audit(number, ranges, &all());
            match self.told.recv_timeout(Duration::from_millis(50)) {
                Ok(DiskEvent::Audited(audited, more)) if more > 0 => return audited,
                // It has left all of it out.
                Ok(DiskEvent::Audited(..)) => {}
                Ok(other) => panic!("{other:?}"),
                Err(_) => {}
            }
        }
        panic!("no word of the audit")
    }
}

#[test]
fn chunks_are_compared_with_the_writes_that_wait_and_without_those_behind() {
    let standby = Standby::new();
    for number in 2..60 {
        let next = |more| 4 * number + more;
        standby.commit(next(0), false, number * 3000, &[number as u8; 5000]);
        // A write across chunks, and zeroes.
        standby.commit(next(1), false, CHUNK - 700, &[number as u8; 1400]);
        standby.replica.commit(next(2), false, records(&[(0, 4096, DiskOp::Zero(512))]));
        standby.vm.write_all_at(&[0; 512], 4096).unwrap();
        let hole = AuditRange { chunks: range(0, 700, 16), sum: 0 };
        let ranges = [standby.sum(0), standby.sum(1), standby.sum(2), hole, standby.sum(LAST)];
        standby.replica.audit(next(2), &ranges, &all());
        standby.commit(next(3), false, 0, &[number as u8; 100]);
    }
    // Everything is in the images.
    standby.replica.settle(4 * 59 + 3);
    loop {
        match standby.told() {
            DiskEvent::Audited(audited, _) => assert_eq!(audited.differs, None),
            DiskEvent::Settled { .. } => break,
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_was_compared_is_told_and_so_is_that_nothing_was() {
    let standby = Standby::new();
    standby.commit(2, false, 0, &[1; 100]);
    let ranges = [standby.sum(0), AuditRange { chunks: range(0, 9, 7), sum: 0 }];
    let (mut chunks, mut more) = (0, 0);
    // A host where a read takes long leaves some out, and one that is slow to tell is asked twice.
    for _ in 0..400 {
        let audited = standby.audited(2, &ranges);
        assert_eq!((audited.checkpoint, audited.differs), (2, None));
        assert!(audited.spent_ns > 0);
        more = audited.chunks - std::mem::replace(&mut chunks, audited.chunks);
        if more == 8 {
            break;
        }
    }
    assert_eq!(more, 8);
    // The primary waits for the answer. This host may have been asked for the other twice.
    let spent = Budget::start("0.01".parse().unwrap());
    spent.spend(Duration::from_secs(1));
    standby.commit(3, false, 0, &[2; 100]);
    standby.replica.audit(3, &[standby.sum(0)], &spent);
    let (audited, more) = loop {
        let DiskEvent::Audited(audited, more) = standby.told() else {
            panic!("it is told what was compared")
        };
        if audited.checkpoint == 3 {
            break (audited, more);
        }
        chunks = audited.chunks;
    };
    assert_eq!((audited.chunks, more), (chunks, 0));
}

/// See docs/audit.md for what this prints.
#[test]
fn every_chunk_costs_the_standby_something_which_is_told_and_printed() {
    const CHUNKS: u64 = 24;
    let standby = Standby::new();
    standby.commit(2, false, CHUNK, &vec![7; CHUNKS as usize * DISK_CHUNK]);
    // What waits for the image needs no read.
    let image = File::open(standby.image()).unwrap();
    let until = Instant::now() + Duration::from_secs(20);
    let mut last = [0; 1];
    while last != [7] {
        assert!(Instant::now() < until, "it does not come into the image");
        std::thread::sleep(Duration::from_millis(10));
        image.read_exact_at(&mut last, (CHUNKS + 1) * CHUNK - 1).unwrap();
    }
    let ranges: Vec<_> = (1..=CHUNKS).map(|chunk| standby.sum(chunk)).collect();
    let audited = standby.audited(2, &ranges);
    let DiskAudited { chunks, spent_ns, read_ns, differs, .. } = audited;
    println!("{chunks} chunks, {} ns of a core each, {} ns to read", spent_ns / chunks, read_ns / chunks);
    // A host where a read takes long leaves some out, and one that is slow to tell is asked again.
    assert!(chunks > 0 && differs.is_none() && spent_ns > 0 && read_ns > 0);
}

/// In the image, and in what waits for it; in data and in a hole.
#[test]
fn a_chunk_that_differs_makes_the_images_of_no_vm() {
    for (chunk, at, waits) in [(2, 3 * CHUNK - 1, false), (2, 2 * CHUNK, true), (LAST, SIZE - 1, false)] {
        let standby = Standby::new();
        standby.commit(2, false, 2 * CHUNK, b"right");
        if waits {
            standby.replica.commit(3, false, records(&[(0, at, DiskOp::Data(b"x"))]));
        } else {
            File::options().write(true).open(standby.image()).unwrap().write_all_at(b"x", at).unwrap();
        }
        let wrong = standby.sum(chunk);
        standby.replica.audit(3, &[standby.sum(0), wrong, standby.sum(5)], &all());
        // What comes behind it changes nothing any more.
        standby.commit(4, false, 9000, b"more");
        let DiskEvent::Audited(audited, more) = standby.told() else { panic!("nothing is told") };
        assert_eq!((audited.differs, audited.checkpoint, more), (Some(range(0, chunk, 1)), 3, 2));
        let DiskEvent::Differs { checkpoint: 3, chunks, why } = standby.told() else {
            panic!("no difference")
        };
        assert_eq!(chunks, range(0, chunk, 1));
        let place = format!("differs from the VM in disk 0 in the 64 KiB from byte {:#x} on", chunk * CHUNK);
        assert!(why.to_string().contains(&place), "{why}");
        // It has all writes, for an operator who has nothing else.
        let mut byte = [0];
        File::open(standby.image()).unwrap().read_exact_at(&mut byte, at).unwrap();
        assert_eq!(byte, *b"x");
        // It is never taken over.
        assert_eq!(standby.replica.become_primary(8).unwrap_err().to_string(), why.to_string());
        assert!(!Sidecar::read(&standby.image()).unwrap().unwrap().whole);
        assert!(!fs::exists(beside(&standby.image(), "journal")).unwrap());
    }
    let standby = Standby::new();
    File::options().write(true).open(standby.image()).unwrap().write_all_at(b"x", 80 * CHUNK).unwrap();
    standby.replica.audit(1, &[AuditRange { chunks: range(0, 70, 16), sum: 0 }], &all());
    assert!(matches!(standby.told(), DiskEvent::Audited(DiskAudited { chunks: 11, .. }, 11)));
    assert!(matches!(standby.told(), DiskEvent::Differs { chunks, .. } if chunks == range(0, 80, 1)));
}

#[test]
fn a_host_reads_no_more_than_its_rate_and_its_share_and_a_takeover_waits_for_none_of_it() {
    let wrong = AuditRange { chunks: range(0, 3, 1), sum: 5 };
    let standby = Standby::new();
    standby.replica.audit(1, &[wrong], &Budget::start(AuditShare::OFF));
    let spent = Budget::start("0.01".parse().unwrap());
    spent.spend(Duration::from_secs(1));
    standby.replica.audit(1, &[wrong], &spent);
    assert!(matches!(standby.told(), DiskEvent::Audited(DiskAudited { chunks: 0, differs: None, .. }, 0)));
    // Zeroes that are written: 14 s of them at the rate. A host that is busy reads fewer at once.
    let image = File::options().write(true).open(standby.image()).unwrap();
    (64..LAST).for_each(|chunk| image.write_all_at(&[0; DISK_CHUNK], chunk * CHUNK).unwrap());
    let zeroes: Vec<_> =
        (1..LAST / 64).map(|at| AuditRange { chunks: range(0, 64 * at, 64), sum: 0 }).collect();
    let audited = standby.audited(1, &zeroes);
    assert!((1..=300).contains(&audited.chunks), "{audited:?}");
    // The queue knows what is urgent before the comparison begins, as it is behind a slow one.
    for _ in 0..100 {
        standby.replica.audit(1, &zeroes, &all());
    }
    standby.replica.settle(1);
    standby.replica.become_primary(8).unwrap();
}

/// The journal is emptied when no writes come, however much is compared.
#[test]
fn an_audit_does_not_keep_the_journal_full() {
    let standby = Standby::new();
    standby.commit(2, false, 0, &[1; 20_000]);
    let journal = beside(&standby.image(), "journal");
    // Its header changes when it is emptied.
    let header = || {
        let mut header = vec![0; START as usize];
        File::open(&journal).and_then(|file| file.read_exact_at(&mut header, 0)).unwrap();
        header
    };
    let before = header();
    let until = Instant::now() + Duration::from_secs(10);
    while header() == before {
        standby.replica.audit(2, &[standby.sum(0)], &all());
        assert!(Instant::now() < until, "the journal is not emptied");
        std::thread::sleep(Duration::from_millis(20));
    }
}
