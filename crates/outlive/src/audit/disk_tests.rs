//! The turns of the auditor of disks: what has one, what has another one, and what they cost.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use outlive_epoch::{AuditRange, ChunkRange, DISK_CHUNK, DiskAudited, DiskOp, DiskRecord};
use outlive_machine::PartLog;

use super::chunks::TRIES;
use super::disk_game::{DISK, log};
use super::disks::{AuditDisk, DiskAuditor};
use super::{Audit, Taking};
use crate::disk::{Store, chunk_sum, chunks};

/// A disk that nobody writes to, with a hole.
fn quiet(audit: &Arc<Audit>, seed: u64) -> (DiskAuditor, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let image = file.reopen().unwrap();
    image.set_len(40 * DISK_CHUNK as u64 + 512).unwrap();
    image.write(&[7; DISK_CHUNK], 0).unwrap();
    image.write(&[8; 100], 30 * DISK_CHUNK as u64).unwrap();
    image.write(&[9; 512], 40 * DISK_CHUNK as u64).unwrap();
    let disk = AuditDisk {
        index: DISK,
        bytes: image.bytes().unwrap(),
        image,
        part_log: Box::new(|offset, len, _| {
            let failed = 30 * DISK_CHUNK as u64;
            if (offset..offset + len).contains(&failed) { PartLog::Lacks } else { PartLog::Has }
        }),
    };
    (DiskAuditor::new(audit.clone(), vec![disk], seed), file)
}

/// A standby that compares all that it is sent.
struct Faithful {
    audit: Arc<Audit>,
    taking: Taking,
    said: DiskAudited,
    epoch: u64,
}

impl Faithful {
    fn new(audit: &Arc<Audit>) -> Self {
        let taking = Taking::start(audit.clone());
        Self { audit: audit.clone(), taking, said: DiskAudited::default(), epoch: 5 }
    }

    /// The auditor reads, the epoch ends without writes, and the standby compares the first of the checkpoint's sums.
    fn turn(&mut self, auditor: &mut DiskAuditor, most: usize) -> Vec<AuditRange> {
        auditor.look(&|| Some(self.epoch));
        if self.audit.chunks().room() >= 4 {
            auditor.burst(&|| Some(self.epoch));
        }
        self.answer_first(most)
    }

    fn answer(&mut self) {
        self.answer_first(usize::MAX);
    }

    /// It reads the first chunk that is as `overtaken` says, and does not compare it, nor what comes behind it.
    fn answer_until(&mut self, overtaken: impl Fn(&ChunkRange) -> bool) {
        let mut ranges = Vec::new();
        self.taking.take_chunks(self.epoch, &log(), &mut ranges);
        let compared = ranges.iter().take_while(|range| !overtaken(&range.chunks));
        self.said.chunks += compared.map(|range| u64::from(range.chunks.count)).sum::<u64>();
        self.said.read_ns += 1000 * ranges.len() as u64;
        self.said.checkpoint = self.epoch;
        self.audit.heard_of_disks(&self.said);
        self.epoch += 1;
    }

    fn answer_first(&mut self, most: usize) -> Vec<AuditRange> {
        let mut ranges = Vec::new();
        self.taking.take_chunks(self.epoch, &log(), &mut ranges);
        self.said.checkpoint = self.epoch;
        let compared = ranges.iter().take(most);
        self.said.chunks += compared.map(|range| u64::from(range.chunks.count)).sum::<u64>();
        self.audit.heard_of_disks(&self.said);
        self.epoch += 1;
        ranges
    }
}

#[test]
fn all_chunks_have_their_turn_holes_cost_little_and_what_failed_is_left_out() {
    for seed in [0, 5, 30, 40] {
        let audit = Arc::<Audit>::default();
        let mut standby = Faithful::new(&audit);
        let (mut auditor, _file) = quiet(&audit, seed);
        let mut seen = BTreeSet::new();
        while audit.progress().disk_rounds < 2 {
            for AuditRange { chunks: range, sum } in standby.turn(&mut auditor, usize::MAX) {
                assert_eq!(sum != 0, range.first % 40 == 0, "{range:?}");
                assert!(range.fits(40 * DISK_CHUNK as u64 + 512));
                seen.extend(range.first..range.first + u64::from(range.count));
            }
        }
        assert!((0..41).filter(|chunk| *chunk != 30).all(|chunk| seen.contains(&chunk)), "{seen:?}");
        assert!(!seen.contains(&30));
        // Two rounds of three chunks of data and two holes, and the tries.
        assert!(standby.epoch < 5 + 12 + 2 * u64::from(TRIES), "{}", standby.epoch);
        assert_eq!(chunks(40 * DISK_CHUNK as u64 + 512), 41);
        let (progress, disk) = (audit.progress(), audit.disks()[0]);
        assert_eq!((progress.disk_round_left_out, progress.disk_left_out), (65536, 2 * 65536));
        assert_eq!((disk.left_out, disk.compared), (2 * 65536, 2 * 40 * 65536));
        assert_eq!((disk.index, disk.bytes), (DISK, 40 * DISK_CHUNK as u64 + 512));
        assert!(disk.compared_at >= disk.since && disk.since.is_some());
    }
}

#[test]
fn what_the_standby_leaves_out_has_another_turn() {
    let audit = Arc::<Audit>::default();
    let mut standby = Faithful::new(&audit);
    let (mut auditor, _file) = quiet(&audit, 0);
    // Nothing at all, for longer than anything is tried.
    for _ in 0..2 * u32::from(TRIES) {
        let ranges = standby.turn(&mut auditor, 0);
        assert!(!ranges.is_empty() && ranges[0].chunks.first == 0, "{ranges:?}");
    }
    assert!(auditor.standby_rests() >= Some(Duration::from_secs(1)), "it is asked more and more rarely");
    assert_eq!((audit.progress().disk_rounds, audit.progress().disk_bytes), (0, 0));
    assert_eq!(audit.disks()[0].compared_at, None);
    while audit.progress().disk_rounds == 0 {
        standby.turn(&mut auditor, 1);
    }
    assert_eq!(audit.disks()[0].compared, 40 * 65536);
    // One that never answers.
    let waiting = |audit: &Audit| audit.chunks().count_again();
    auditor.look(&|| Some(standby.epoch));
    auditor.burst(&|| Some(standby.epoch));
    let mut ranges = Vec::new();
    standby.taking.take_chunks(standby.epoch, &log(), &mut ranges);
    assert!(!ranges.is_empty());
    let before = waiting(&audit);
    audit.chunks().expire(Instant::now() + Duration::from_secs(30));
    assert_eq!(waiting(&audit), before, "a read may take long");
    audit.chunks().expire(Instant::now() + Duration::from_secs(40));
    assert_eq!(waiting(&audit), before + ranges.len());
}

/// The guest writes to a chunk in every epoch, and the standby's disk takes longer than that to read it.
#[test]
fn what_is_always_overtaken_is_left_out_and_does_not_hold_up_the_round() {
    let audit = Arc::<Audit>::default();
    let mut standby = Faithful::new(&audit);
    let (mut auditor, _file) = quiet(&audit, 0);
    while audit.progress().disk_rounds == 0 {
        assert!(standby.epoch < 200, "the round does not end");
        auditor.look(&|| Some(standby.epoch));
        if audit.chunks().room() >= 4 {
            auditor.burst(&|| Some(standby.epoch));
        }
        standby.answer_until(|chunks| chunks.first == 0);
    }
    let disk = audit.disks()[0];
    // The other one is where a write of the guest has failed.
    assert_eq!((disk.left_out, disk.compared), (2 * 65536, 39 * 65536));
}

/// A disk with a chunk to which a request is always in flight: each begins before the last one is complete.
#[test]
fn a_chunk_that_is_always_written_is_compared_all_the_same() {
    let audit = Arc::<Audit>::default();
    let mut standby = Faithful::new(&audit);
    let image = tempfile::tempfile().unwrap();
    image.write(&[7; DISK_CHUNK], 0).unwrap();
    // Each look finds the next request begun, and the one before complete.
    let newest = Arc::new(Mutex::new(10));
    let part_log = Box::new(move |_, _, last| {
        let mut newest = newest.lock().unwrap();
        *newest += 1;
        if last >= *newest - 1 { PartLog::Waits((*newest).min(last)) } else { PartLog::Has }
    });
    let disk = AuditDisk { index: 0, bytes: DISK_CHUNK as u64, image, part_log };
    let mut auditor = DiskAuditor::new(audit.clone(), vec![disk], 0);
    for _ in 0..20 {
        standby.turn(&mut auditor, usize::MAX);
    }
    let (progress, disk) = (audit.progress(), audit.disks()[0]);
    assert!(disk.compared >= 4 * DISK_CHUNK as u64 && progress.disk_left_out == 0, "{disk:?}");
}

#[test]
fn what_came_too_late_for_its_checkpoint_has_another_turn_but_not_for_ever() {
    let audit = Arc::<Audit>::default();
    let taking = Taking::start(audit.clone());
    let (mut auditor, _file) = quiet(&audit, 0);
    let wanted = ChunkRange { disk: DISK, first: 0, count: 1 };
    let (mut ranges, mut tries) = (Vec::new(), 0);
    while audit.chunks().count_again() > 0 || tries == 0 {
        let (chunks, before) = audit.chunks().next_again().unwrap_or((wanted, 0));
        assert_eq!(auditor.sample(chunks, before, &|| Some(5)), 1);
        taking.take_chunks(6, &log(), &mut ranges);
        assert!(ranges.is_empty(), "the checkpoint has gone");
        tries += 1;
    }
    assert_eq!(tries, TRIES);
    auditor.look(&|| Some(6));
    assert_eq!(audit.progress().disk_left_out, DISK_CHUNK as u64);
    // A hole that is written in the epoch is no hole at its end.
    let hole = ChunkRange { first: 1, count: 16, ..wanted };
    assert_eq!(auditor.sample(hole, 0, &|| Some(7)), 16);
    let mut writes = log();
    let record = DiskRecord { disk: DISK, offset: 9 * DISK_CHUNK as u64 + 5, op: DiskOp::Data(b"x") };
    assert!(writes.push(record));
    taking.take_chunks(7, &writes, &mut ranges);
    assert_eq!((ranges.len(), audit.chunks().next_again()), (0, Some((hole, 1))));
    // All buffers are there again.
    auditor.sample(wanted, 0, &|| Some(8));
    taking.forget();
    taking.take_chunks(8, &log(), &mut ranges);
    assert!(ranges.is_empty(), "a base begins");
    let all = std::iter::from_fn(|| audit.chunks().buffer()).count();
    assert_eq!(all, super::MOST_CHUNKS);
}

/// A write that a disk does not finish keeps nothing waiting for ever.
#[test]
fn what_waits_for_a_write_is_compared_with_a_later_checkpoint_or_has_another_turn() {
    let audit = Arc::<Audit>::default();
    let taking = Taking::start(audit.clone());
    let image = tempfile::tempfile().unwrap();
    image.write(&[7; DISK_CHUNK], 0).unwrap();
    let done = Arc::new(Mutex::new(false));
    let asked = done.clone();
    let part_log =
        Box::new(move |_, _, _| if *asked.lock().unwrap() { PartLog::Has } else { PartLog::Waits(3) });
    let disk = AuditDisk { index: DISK, bytes: DISK_CHUNK as u64, image, part_log };
    let mut auditor = DiskAuditor::new(audit.clone(), vec![disk], 0);
    let wanted = ChunkRange { disk: DISK, first: 0, count: 1 };
    let mut ranges = Vec::new();
    assert_eq!(auditor.sample(wanted, 0, &|| Some(5)), 1);
    assert!(auditor.look(&|| Some(5)).is_some());
    let write = |byte: &[u8]| {
        let mut writes = log();
        assert!(writes.push(DiskRecord { disk: DISK, offset: 100, op: DiskOp::Data(byte) }));
        writes
    };
    taking.take_chunks(5, &write(b"5"), &mut ranges);
    assert!(ranges.is_empty());
    *done.lock().unwrap() = true;
    assert!(auditor.look(&|| Some(7)).is_some());
    taking.take_chunks(6, &log(), &mut ranges);
    assert!(ranges.is_empty(), "its record is in the next one");
    taking.take_chunks(7, &write(b"7"), &mut ranges);
    let mut expected = [7; DISK_CHUNK];
    expected[100] = b'7';
    assert_eq!(ranges, [AuditRange { chunks: wanted, sum: chunk_sum(0, &expected) }]);
    assert_eq!(auditor.look(&|| Some(8)), None);

    *done.lock().unwrap() = false;
    assert_eq!(auditor.sample(wanted, 0, &|| Some(8)), 1);
    audit.chunks().expire(Instant::now() + Duration::from_secs(3));
    assert_eq!(audit.chunks().next_again(), Some((wanted, 1)));
    // A checkpoint that is missing.
    *done.lock().unwrap() = true;
    assert_eq!(auditor.sample(wanted, 0, &|| Some(8)), 1);
    taking.take_chunks(9, &log(), &mut ranges);
    assert_eq!((ranges.len(), audit.chunks().next_again()), (0, Some((wanted, 1))));
}

#[test]
fn a_standby_that_counts_chunks_wrongly_neither_ends_nor_stops_the_audit() {
    let audit = Arc::<Audit>::default();
    let most = u64::MAX;
    for (chunks, spent_ns, read_ns) in [(most, most, most), (5, 0, 0), (6, most, most), (most, 7, 7)] {
        audit.heard_of_disks(&DiskAudited { checkpoint: 1, chunks, spent_ns, read_ns, differs: None });
        assert!(audit.theirs_of_chunk() <= Duration::from_millis(16), "{:?}", audit.theirs_of_chunk());
        assert!(audit.their_read() <= Duration::from_secs(1), "{:?}", audit.their_read());
    }
    assert_eq!(audit.progress().disk_bytes, u64::MAX);
    // One whose disk is slow has its way.
    let word = DiskAudited { chunks: 10, read_ns: 20_000_000, spent_ns: 100_000, ..DiskAudited::default() };
    audit.heard_of_disks(&word);
    assert_eq!(audit.their_read(), Duration::from_millis(2));
    assert_eq!(audit.theirs_of_chunk(), Duration::from_micros(10));
}

#[test]
fn a_slow_disk_of_the_standby_sets_the_pace() {
    let audit = Arc::<Audit>::default();
    let _taking = Taking::start(audit.clone());
    let (mut auditor, _file) = quiet(&audit, 0);
    auditor.burst(&|| Some(5));
    assert!(auditor.rests() <= Duration::from_millis(250), "{:?}", auditor.rests());
    let word = DiskAudited { chunks: 1, read_ns: 1_000_000_000, ..DiskAudited::default() };
    audit.heard_of_disks(&word);
    auditor.burst(&|| Some(5));
    assert!(auditor.rests() >= Duration::from_secs(20), "{:?}", auditor.rests());
}

/// What this prints says which part of its rate a disk has at a share of a core. See docs/audit.md.
#[test]
fn every_chunk_is_read_once_in_a_round_and_what_it_costs_is_printed() {
    const CHUNKS: u64 = 256;
    let audit = Arc::<Audit>::default();
    let mut standby = Faithful::new(&audit);
    let image = tempfile::tempfile().unwrap();
    (0..CHUNKS).for_each(|at| image.write(&[at as u8 | 1; DISK_CHUNK], at * DISK_CHUNK as u64).unwrap());
    let disk = AuditDisk {
        index: 0,
        bytes: CHUNKS * DISK_CHUNK as u64,
        image,
        part_log: Box::new(|_, _, _| PartLog::Has),
    };
    let mut auditor = DiskAuditor::new(audit.clone(), vec![disk], 0);
    let (mut spent, mut read) = (Duration::ZERO, 0);
    loop {
        let began = super::thread_time();
        auditor.look(&|| Some(standby.epoch));
        if audit.progress().disk_rounds > 0 {
            break;
        }
        read += auditor.burst(&|| Some(standby.epoch));
        spent += super::thread_time() - began;
        standby.answer();
    }
    println!("{read} chunks, {:?} each", spent / read);
    assert_eq!(u64::from(read), CHUNKS);
}
