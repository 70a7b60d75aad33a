//! The auditor of disks, with a guest whose writes are carried out piece by piece at any moment, and epochs that end
//! at any moment, against both images.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex};

use outlive_epoch::{AuditRange, DISK_CHUNK, DiskAudited, DiskOp, DiskRecord, RecordBuf};
use outlive_machine::PartLog;

use super::disks::{AuditDisk, DiskAuditor};
use super::{Audit, Taking};
use crate::disk::{Store, chunk_sum, chunks, overlay};

/// Eight chunks and a part of one.
const BYTES: usize = 8 * DISK_CHUNK + 5 * 512;
pub(super) const DISK: u16 = 3;

/// A mistake that must be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    None,
    /// Nobody looks whether a write is in flight.
    IgnoresWritesInFlight,
    /// Whether a write is in flight is asked before the read only.
    LooksBeforeTheRead,
    /// What was read is compared before the writes in flight that it may have seen are in a log.
    DoesNotWait,
    /// What a write that failed has left is compared.
    IgnoresFailures,
    /// The writes of the epoch are not put on top of what was read.
    IgnoresTheLog,
    /// The log of the epoch in which a read began is not put on top of it.
    BeginsLate,
    /// Sums are compared with the checkpoint after theirs.
    ComparesOneLate,
    /// The standby does not look at what is not in its image yet.
    IgnoresWhatWaits,
    /// A byte of the standby's image changes.
    Flipped,
}

/// A write of the guest.
struct Write {
    number: u64,
    offset: usize,
    /// `None`: zeroes.
    data: Option<Vec<u8>>,
    len: usize,
    /// How many bytes of it are on the disk.
    landed: usize,
    /// Whether the disk fails when a part of it has landed.
    fails: bool,
}

impl Write {
    fn end(&self) -> usize {
        self.offset + self.len
    }
}

struct World {
    dice: fastrand::Rng,
    mistake: Mistake,
    here: Vec<u8>,
    there: Vec<u8>,
    /// Writes that the disk carries out, in any order; none overlaps another.
    in_flight: Vec<Write>,
    begun: u64,
    log: RecordBuf,
    /// Chunks where a write failed.
    marked: BTreeSet<u64>,
    epoch: u64,
    audit: Arc<Audit>,
    taking: Taking,
    /// What the standby says.
    said: DiskAudited,
    on_their_way: VecDeque<(u64, RecordBuf, Vec<AuditRange>)>,
    /// Writes of checkpoints that are committed at the standby and not in its image.
    waiting: VecDeque<RecordBuf>,
    late: Vec<AuditRange>,
    flipped: bool,
    compared: u64,
    /// In this round.
    chunks: BTreeSet<u64>,
    rounds: u64,
    /// Those of chunks that the guest wrote in the same epoch.
    written: u64,
    difference: Option<u64>,
}

pub(super) fn log() -> RecordBuf {
    RecordBuf::with_capacity(4 << 20)
}

impl World {
    /// Something happens, between any two reads of the auditor.
    fn step(&mut self) {
        for _ in 0..self.dice.usize(0..4) {
            match self.dice.u32(0..100) {
                0..20 => self.begin(),
                20..70 => self.go_on(),
                70..75 => self.end_epoch(),
                75..85 => self.arrive(),
                _ => {}
            }
        }
    }

    fn begin(&mut self) {
        // The last chunks are written rarely, so that they are quiet for whole epochs.
        let within = if self.dice.u8(0..8) == 0 { BYTES } else { 4 * DISK_CHUNK };
        let sector = self.dice.usize(0..within / 512);
        let len = (512 * self.dice.usize(1..40)).min(BYTES - 512 * sector);
        let is_zero = self.dice.u8(0..4) == 0;
        // A discard may be of a part of the disk.
        let len = if is_zero && self.dice.u8(0..4) == 0 { BYTES - 512 * sector } else { len };
        let data = (!is_zero).then(|| (0..len).map(|_| self.dice.u8(..)).collect());
        // Where one fails nothing is compared any more.
        let rarely = if self.mistake == Mistake::IgnoresFailures { 40 } else { 250 };
        let (number, fails) = (self.begun + 1, self.dice.u8(0..rarely) == 0);
        let write = Write { number, offset: 512 * sector, data, len, landed: 0, fails };
        // A request that overlaps another waits for it.
        let overlaps = |it: &Write| it.offset < write.end() && write.offset < it.end();
        if self.in_flight.len() < 6 && !self.in_flight.iter().any(overlaps) {
            self.in_flight.push(write);
            self.begun = number;
        }
    }

    /// The disk does a part of a write. When it has done all of it, it is logged, and no longer in flight.
    fn go_on(&mut self) {
        if self.in_flight.is_empty() {
            return;
        }
        let at = self.dice.usize(0..self.in_flight.len());
        let write = &mut self.in_flight[at];
        let piece = self.dice.usize(1..=write.len).min(write.len - write.landed);
        let (from, to) = (write.landed, write.landed + piece);
        let place = &mut self.here[write.offset + from..write.offset + to];
        match &write.data {
            Some(data) => place.copy_from_slice(&data[from..to]),
            None => place.fill(0),
        }
        write.landed = to;
        let Write { offset, landed, fails, len, .. } = *write;
        if fails {
            let last = (offset + len - 1) / DISK_CHUNK;
            self.marked.extend((offset / DISK_CHUNK..=last).map(|chunk| chunk as u64));
            // The log has nothing of it.
            self.in_flight.swap_remove(at);
        } else if landed == len {
            let Write { data, .. } = self.in_flight.swap_remove(at);
            let mut push = |offset, op| {
                assert!(self.log.push(DiskRecord { disk: DISK, offset: offset as u64, op }));
            };
            match data {
                Some(data) => push(offset, DiskOp::Data(&data)),
                None => push(offset, DiskOp::Zero(len as u64)),
            }
        }
    }

    fn end_epoch(&mut self) {
        let writes = std::mem::replace(&mut self.log, log());
        let mut ranges = Vec::new();
        if self.mistake == Mistake::IgnoresTheLog {
            self.taking.take_chunks(self.epoch, &log(), &mut ranges);
        } else {
            self.taking.take_chunks(self.epoch, &writes, &mut ranges);
        }
        if self.mistake == Mistake::ComparesOneLate {
            std::mem::swap(&mut ranges, &mut self.late);
        }
        self.on_their_way.push_back((self.epoch, writes, ranges));
        self.epoch += 1;
        if self.on_their_way.len() > 3 {
            self.arrive();
        }
    }

    /// The standby commits a checkpoint and compares it; its image may be behind.
    fn arrive(&mut self) {
        let Some((checkpoint, writes, ranges)) = self.on_their_way.pop_front() else { return };
        self.waiting.push_back(writes);
        while self.waiting.len() > self.dice.usize(0..3) {
            let oldest = self.waiting.pop_front().unwrap();
            overlay(&mut self.there, DISK, 0, oldest.iter());
        }
        if self.mistake == Mistake::Flipped && self.epoch >= 20 && !std::mem::replace(&mut self.flipped, true)
        {
            self.there[BYTES - 7] ^= 0x20;
        }
        self.said.checkpoint = checkpoint;
        'all: for AuditRange { chunks: range, sum } in ranges {
            for chunk in range.first..range.first + u64::from(range.count) {
                // It leaves out what is too much.
                if self.dice.u8(0..20) == 0 {
                    break 'all;
                }
                self.said.chunks += 1;
                self.chunks.insert(chunk);
                let from = chunk as usize * DISK_CHUNK;
                let mut bytes = self.there[from..BYTES.min(from + DISK_CHUNK)].to_vec();
                let mut last = false;
                for records in &self.waiting {
                    if self.mistake != Mistake::IgnoresWhatWaits {
                        last = overlay(&mut bytes, DISK, from as u64, records.iter());
                    }
                }
                self.compared += 1;
                self.written += u64::from(last);
                if chunk_sum(chunk, &bytes) != sum {
                    self.difference.get_or_insert(chunk);
                }
            }
        }
        self.audit.heard_of_disks(&self.said);
    }

    fn part_log(&self, offset: u64, len: u64, last: u64) -> PartLog {
        let (from, to) = (offset as usize, (offset + len) as usize);
        let counts = |it: &&Write| match self.mistake {
            Mistake::IgnoresWritesInFlight | Mistake::LooksBeforeTheRead => false,
            Mistake::DoesNotWait => last == u64::MAX,
            _ => it.number <= last,
        };
        let hits = self.in_flight.iter().filter(|it| it.offset < to && from < it.end()).filter(counts);
        let mut chunks = offset / DISK_CHUNK as u64..(offset + len).div_ceil(DISK_CHUNK as u64);
        let failed = chunks.any(|chunk| self.marked.contains(&chunk));
        match hits.map(|it| it.number).max() {
            _ if failed && self.mistake != Mistake::IgnoresFailures => PartLog::Lacks,
            Some(last) => PartLog::Waits(last),
            None => PartLog::Has,
        }
    }
}

/// The primary's image, which changes while it is read.
struct Image(Arc<Mutex<World>>);

impl Store for Image {
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        let whole = offset..offset + to.len() as u64;
        {
            let world = self.0.lock().unwrap();
            let overlaps = |it: &Write| it.offset < whole.end as usize && (whole.start as usize) < it.end();
            if world.mistake == Mistake::LooksBeforeTheRead && world.in_flight.iter().any(overlaps) {
                return Err(io::Error::other("not now"));
            }
        }
        for (piece, part) in to.chunks_mut(DISK_CHUNK / 8).enumerate() {
            let mut world = self.0.lock().unwrap();
            let from = offset as usize + piece * (DISK_CHUNK / 8);
            part.copy_from_slice(&world.here[from..from + part.len()]);
            world.step();
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let mut world = self.0.lock().unwrap();
        world.step();
        let found = world.here[offset as usize..].iter().position(|byte| *byte != 0);
        Ok(found.map(|at| offset + at as u64))
    }

    fn write(&self, _: &[u8], _: u64) -> io::Result<()> {
        unreachable!("an audit only reads")
    }

    fn zero(&self, _: u64, _: u64) -> io::Result<()> {
        unreachable!("an audit only reads")
    }

    fn sync(&self) -> io::Result<()> {
        unreachable!("an audit only reads")
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(BYTES as u64)
    }
}

/// A round has compared every chunk, or says how many it has not.
fn check_round(audit: &Audit, world: &mut World) {
    let progress = audit.progress();
    if progress.disk_rounds > world.rounds {
        let there = chunks(BYTES as u64) - world.chunks.len() as u64;
        assert_eq!(progress.disk_round_left_out, there * DISK_CHUNK as u64, "{:?}", world.chunks);
        world.chunks.clear();
        world.rounds = progress.disk_rounds;
    }
}

struct Played {
    compared: u64,
    rounds: u64,
    written: u64,
    difference: Option<u64>,
}

fn play(seed: u64, mistake: Mistake) -> Played {
    let audit = Arc::<Audit>::default();
    let mut dice = fastrand::Rng::with_seed(seed);
    let here: Vec<u8> = (0..BYTES).map(|at| if at / DISK_CHUNK % 3 == 1 { 0 } else { dice.u8(..) }).collect();
    let mut world = World {
        dice,
        mistake,
        here,
        there: Vec::new(),
        in_flight: Vec::new(),
        begun: 0,
        log: log(),
        marked: BTreeSet::new(),
        epoch: 7,
        audit: audit.clone(),
        taking: Taking::start(audit.clone()),
        said: DiskAudited::default(),
        on_their_way: VecDeque::new(),
        waiting: VecDeque::new(),
        late: Vec::new(),
        flipped: false,
        compared: 0,
        chunks: BTreeSet::new(),
        rounds: 0,
        written: 0,
        difference: None,
    };
    (0..20).for_each(|_| world.begin());
    (0..10).for_each(|_| world.go_on());
    // A base is whole but for the writes in flight, of which it may have a part.
    (world.there, world.log) = (world.here.clone(), log());
    let world = Arc::new(Mutex::new(world));
    let (asked, looked_at) = (world.clone(), world.clone());
    let disk = AuditDisk {
        index: DISK,
        bytes: BYTES as u64,
        image: Image(world.clone()),
        part_log: Box::new(move |offset, len, last| {
            let mut world = asked.lock().unwrap();
            let answer = world.part_log(offset, len, last);
            world.step();
            answer
        }),
    };
    let epoch = move || {
        let mut world = looked_at.lock().unwrap();
        world.step();
        Some(world.epoch + u64::from(world.mistake == Mistake::BeginsLate))
    };
    let mut auditor = DiskAuditor::new(audit.clone(), vec![disk], seed);
    for _ in 0..240 {
        auditor.look(&epoch);
        if mistake == Mistake::None {
            check_round(&audit, &mut world.lock().unwrap());
        }
        if audit.chunks().room() >= 4 {
            auditor.burst(&epoch);
        }
        (0..2).for_each(|_| world.lock().unwrap().step());
    }
    let mut world = world.lock().unwrap();
    world.end_epoch();
    while !world.on_their_way.is_empty() {
        world.arrive();
    }
    Played {
        compared: world.compared,
        rounds: world.rounds,
        written: world.written,
        difference: world.difference,
    }
}

#[test]
fn chunks_are_compared_as_of_one_checkpoint_whatever_is_written_meanwhile() {
    let (mut compared, mut written, mut rounds) = (0, 0, 0);
    for seed in 0..150 {
        let played = play(seed, Mistake::None);
        assert_eq!(played.difference, None, "seed {seed}");
        compared += played.compared;
        written += played.written;
        rounds += played.rounds;
    }
    println!("{compared} chunks compared, {written} of them written just then, in {rounds} rounds");
    assert!(rounds > 20);
    assert!(compared > 150 * 20 && written > 150, "{compared}, {written}");
}

#[test]
fn every_mistake_about_what_is_compared_is_noticed() {
    for mistake in [
        Mistake::IgnoresWritesInFlight,
        Mistake::LooksBeforeTheRead,
        Mistake::DoesNotWait,
        Mistake::IgnoresFailures,
        Mistake::IgnoresTheLog,
        Mistake::BeginsLate,
        Mistake::ComparesOneLate,
        Mistake::IgnoresWhatWaits,
    ] {
        let noticed = (0..100).filter(|seed| play(*seed, mistake).difference.is_some()).count();
        println!("{mistake:?}: {noticed} of 100");
        assert!(noticed >= 8, "{mistake:?}: {noticed} of 100");
    }
    let found: Vec<u64> = (0..40).filter_map(|seed| play(seed, Mistake::Flipped).difference).collect();
    println!("{:?}: {} of 40", Mistake::Flipped, found.len());
    assert!(found.len() >= 10, "{} of 40", found.len());
    assert!(found.iter().all(|chunk| *chunk == 8), "{found:?}");
}
