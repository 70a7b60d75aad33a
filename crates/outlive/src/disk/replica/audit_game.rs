//! The standby's side of the audit of disks, with an image that is read piece by piece while commits, and what is written
//! of them, come at every moment. What each checkpoint's disk is, is known exactly.

use std::collections::{BTreeSet, VecDeque};
use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use outlive_epoch::{AuditRange, ChunkRange, DISK_CHUNK, DiskOp, DiskRecord, RecordBuf, VmId};

use super::compare::{Audits, Compared};
use super::reading::{Found, Order, Read};
use crate::audit::Budget;
use crate::disk::apply::{Applier, Watch};
use crate::disk::image::{Store, chunks};
use crate::disk::journal::{Identity, Journal};
use crate::disk::{chunk_sum, overlay};

/// Six chunks and a part of one.
const BYTES: usize = 6 * DISK_CHUNK + 5 * 512;
const DISK: u16 = 1;

/// A mistake that must be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    None,
    /// Nobody looks whether something newer is written during a read.
    IgnoresOvertaking,
    /// Newer writes that land during a read go on top of it.
    PutsNewerOnTop,
    /// Newer writes that wait go on top of what was read.
    PutsWaitingNewerOnTop,
    /// Writes that land during a read are forgotten.
    ForgetsWhatLands,
    /// What is not in the image yet is forgotten.
    ForgetsWhatWaits,
    /// What was a hole stays one.
    RemembersHoles,
}

/// The image, and a read that is under way.
struct Disk {
    now: Vec<u8>,
    dice: fastrand::Rng,
    mistake: Mistake,
    holes: BTreeSet<u64>,
    order: Option<Order>,
    /// How many chunks were found to be in a hole, and how many bytes of the first one were read.
    begun: (u32, usize),
    read: Option<Read>,
}

impl Disk {
    /// The reader does a part of its work.
    fn go_on(&mut self) {
        let Some(Order { chunks, buffer, .. }) = &mut self.order else { return };
        let place = |chunk: u64| chunk as usize * DISK_CHUNK..BYTES.min((chunk as usize + 1) * DISK_CHUNK);
        let (holes, at) = self.begun;
        if at == 0 && holes < chunks.count {
            let chunk = chunks.first + u64::from(holes);
            let is_hole = self.now[place(chunk)].iter().all(|byte| *byte == 0);
            let remembers = self.mistake == Mistake::RemembersHoles && self.holes.contains(&chunk);
            if is_hole || remembers {
                self.holes.insert(chunk);
                self.begun.0 += 1;
                return;
            }
        }
        if holes > 0 {
            return self.end(Found::Hole(holes));
        }
        let whole = &self.now[place(chunks.first)];
        let to = whole.len().min(at + self.dice.usize(1..=DISK_CHUNK / 2));
        buffer[at..to].copy_from_slice(&whole[at..to]);
        self.begun.1 = to;
        if to == whole.len() {
            self.end(Found::Data);
        }
    }

    fn end(&mut self, found: Found) {
        self.begun = (0, 0);
        let (took, spent) = (Duration::ZERO, Duration::ZERO);
        self.read = self.order.take().map(|Order { ticket, buffer, .. }| {
            let found = Ok(found);
            Read { ticket, found, buffer, took, spent }
        });
    }

    /// A write lands in two pieces, and the reader goes on before each.
    fn land(&mut self, offset: usize, bytes: &[u8]) {
        let at = self.dice.usize(0..=bytes.len());
        for (from, to) in [(0, at), (at, bytes.len())] {
            (0..self.dice.u8(0..3)).for_each(|_| self.go_on());
            self.now[offset + from..offset + to].copy_from_slice(&bytes[from..to]);
        }
    }
}

enum Storage {
    Journal(Mutex<Vec<u8>>),
    Image(Arc<Mutex<Disk>>),
}

impl Store for Storage {
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        let Self::Journal(bytes) = self else { unreachable!("the reader has a way of its own") };
        to.copy_from_slice(&bytes.lock().unwrap()[offset as usize..offset as usize + to.len()]);
        Ok(())
    }

    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let offset = offset as usize;
        match self {
            Self::Image(disk) => disk.lock().unwrap().land(offset, bytes),
            Self::Journal(all) => {
                let mut all = all.lock().unwrap();
                let len = all.len().max(offset + bytes.len());
                all.resize(len, 0);
                all[offset..offset + bytes.len()].copy_from_slice(bytes);
            }
        }
        Ok(())
    }

    fn zero(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write(&vec![0; len as usize], offset)
    }

    fn sync(&self) -> io::Result<()> {
        if let Self::Image(disk) = self {
            disk.lock().unwrap().go_on();
        }
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        match self {
            Self::Image(_) => Ok(BYTES as u64),
            Self::Journal(bytes) => Ok(bytes.lock().unwrap().len() as u64),
        }
    }

    fn next_data(&self, _: u64) -> io::Result<Option<u64>> {
        unreachable!("the reader has a way of its own")
    }
}

/// Passes on what is about to be written, with a mistake.
struct Planted<'a> {
    audits: &'a mut Audits,
    mistake: Mistake,
    /// The checkpoint of the comparison that is under way.
    under_way: Option<u64>,
}

impl Watch for Planted<'_> {
    fn about_to_write(&mut self, checkpoint: u64, records: &RecordBuf) {
        let is_newer = self.under_way.is_some_and(|number| checkpoint > number);
        match self.mistake {
            Mistake::IgnoresOvertaking if is_newer => {}
            Mistake::ForgetsWhatLands if !is_newer => {}
            Mistake::PutsNewerOnTop => self.audits.about_to_write(0, records),
            _ => self.audits.about_to_write(checkpoint, records),
        }
    }
}

struct World {
    dice: fastrand::Rng,
    mistake: Mistake,
    /// Whether some of the sums are of another disk.
    lies: bool,
    disk: Arc<Mutex<Disk>>,
    applier: Applier<Storage>,
    audits: Audits,
    orders: Receiver<Order>,
    budget: Arc<Budget>,
    /// The VM's disk at the checkpoint that was committed last.
    model: Vec<u8>,
    number: u64,
    /// The checkpoint that was asked about last.
    last: u64,
    /// What was asked: the checkpoint, its chunks, and which of them is a lie.
    asked: VecDeque<(u64, Vec<u64>, Option<u64>)>,
    told: u64,
    played: Played,
}

#[derive(Default)]
struct Played {
    compared: u64,
    left_out: u64,
    /// Chunks that were written to while they were read, and compared all the same.
    written: u64,
    difference: Option<(u64, ChunkRange)>,
    /// It was to be found.
    was_a_lie: bool,
}

impl World {
    fn new(seed: u64, mistake: Mistake, lies: bool) -> Self {
        let mut dice = fastrand::Rng::with_seed(seed);
        let model: Vec<u8> =
            (0..BYTES).map(|at| if at / DISK_CHUNK % 3 == 1 { 0 } else { dice.u8(..) }).collect();
        let disk = Disk {
            now: model.clone(),
            dice: dice.fork(),
            mistake,
            holes: BTreeSet::new(),
            order: None,
            begun: (0, 0),
            read: None,
        };
        let disk = Arc::new(Mutex::new(disk));
        let identity = Identity { vm: VmId([1; 16]), generation: 1, sizes: vec![0, BYTES as u64] };
        let journal = Journal::create(Storage::Journal(Mutex::default()), identity, 1).unwrap();
        let applier = Applier::new(journal, vec![None, Some(Storage::Image(disk.clone()))], 1);
        let (sender, orders) = channel();
        let (audits, budget) =
            (Audits::new(sender, vec![0, BYTES as u64]), Budget::start("100".parse().unwrap()));
        let (number, last, asked, told, played) = (1, 0, VecDeque::new(), 0, Played::default());
        Self {
            dice,
            mistake,
            lies,
            disk,
            applier,
            audits,
            orders,
            budget,
            model,
            number,
            last,
            asked,
            told,
            played,
        }
    }

    fn step(&mut self) {
        match self.dice.u32(0..100) {
            0..25 => self.commit(),
            25..45 => self.ask(),
            45..75 => (0..2).for_each(|_| self.disk.lock().unwrap().go_on()),
            75..83 => self.apply(false),
            83..85 => self.apply(true),
            85..90 => self.applier.make_durable().unwrap(),
            _ => self.hear(),
        }
    }

    fn commit(&mut self) {
        let mut records = RecordBuf::with_capacity(1 << 20);
        for _ in 0..self.dice.usize(0..4) {
            // The last chunks are written rarely.
            let within = if self.dice.u8(0..8) == 0 { BYTES } else { 3 * DISK_CHUNK };
            let offset = self.dice.usize(0..within / 512) * 512;
            let len = (512 * self.dice.usize(1..40)).min(BYTES - offset);
            let data: Vec<u8> = (0..len).map(|_| self.dice.u8(..)).collect();
            let op = match self.dice.u8(0..6) {
                0 => DiskOp::Zero(len as u64),
                1 => DiskOp::Zero((BYTES - offset) as u64),
                _ => DiskOp::Data(&data),
            };
            assert!(records.push(DiskRecord { disk: DISK, offset: offset as u64, op }));
        }
        self.number += 1;
        overlay(&mut self.model, DISK, 0, records.iter());
        // It empties a journal that is full, so it writes, too.
        let mut watch = Planted {
            under_way: self.asked.front().map(|(number, ..)| *number),
            audits: &mut self.audits,
            mistake: self.mistake,
        };
        self.applier.commit(Instant::now(), self.number, records, &mut watch).unwrap();
    }

    fn ask(&mut self) {
        if self.audits.count() >= 4 || self.last == self.number {
            return;
        }
        self.last = self.number;
        let (mut ranges, mut all, mut lie) = (Vec::new(), Vec::new(), None);
        let mut first = self.dice.u64(0..chunks(BYTES as u64));
        for _ in 0..self.dice.usize(1..5) {
            let sum = |chunk: u64| {
                let from = chunk as usize * DISK_CHUNK;
                chunk_sum(chunk, &self.model[from..BYTES.min(from + DISK_CHUNK)])
            };
            let zeroes = (first..chunks(BYTES as u64)).take_while(|chunk| sum(*chunk) == 0).count() as u32;
            let (count, mut sum) = (zeroes.max(1), sum(first));
            if self.lies && lie.is_none() && count == 1 && self.dice.u8(0..6) == 0 {
                (lie, sum) = (Some(all.len() as u64), sum ^ 4);
            }
            ranges.push(AuditRange { chunks: ChunkRange { disk: DISK, first, count }, sum });
            all.extend(first..first + u64::from(count));
            first += u64::from(count);
            if first >= chunks(BYTES as u64) {
                break;
            }
        }
        self.asked.push_back((self.number, all, lie));
        self.audits.ask(self.number, ranges, self.budget.clone());
        self.go_on();
    }

    /// What waits is written into the image. Whether that would overtake something was known before.
    fn apply(&mut self, settle: bool) {
        let would_be = self.audits.would_be_overtaken(self.applier.waiting());
        let before = self.audits.left();
        let under_way = self.asked.front().map(|(number, ..)| *number);
        let mut watch = Planted { under_way, audits: &mut self.audits, mistake: self.mistake };
        if settle {
            self.applier.settle(&mut watch).map(drop).unwrap();
        } else {
            self.applier.harden(&mut watch).unwrap();
        }
        if self.mistake == Mistake::None {
            assert_eq!(self.audits.left() < before, would_be);
        }
    }

    /// The disks' thread hears what was read.
    fn hear(&mut self) {
        let Some(read) = self.disk.lock().unwrap().read.take() else { return };
        let (before, mistake) = (self.audits.left(), self.mistake);
        let waiting = self.applier.waiting().filter(|_| mistake != Mistake::ForgetsWhatWaits);
        let newer_too = |number| if mistake == Mistake::PutsWaitingNewerOnTop { 0 } else { number };
        let waiting = waiting.map(|(number, records)| (newer_too(number), records));
        let Compared { checkpoint, disk, differs } = self.audits.compare(read, waiting).unwrap();
        assert_eq!((disk, Some(checkpoint)), (DISK, self.asked.front().map(|(number, ..)| *number)));
        if checkpoint < self.number {
            self.played.written += u64::from(before - self.audits.left());
        }
        if let Some(chunk) = differs.unwrap() {
            let (_, all, lie) = self.asked.front().unwrap();
            self.played.was_a_lie = lie.is_some_and(|at| all[at as usize] == chunk.first);
            self.played.difference = Some((checkpoint, chunk));
        }
        self.go_on();
    }

    fn go_on(&mut self) {
        self.audits.have_rested();
        while self.played.difference.is_none()
            && let Some((audited, more)) = self.audits.go_on()
        {
            // The answers come in the order of the checkpoints, and say how many of the first chunks were compared.
            self.told += more;
            let (number, all, lie) = self.asked.pop_front().unwrap();
            assert_eq!((audited.checkpoint, audited.chunks), (number, self.told));
            assert!(lie.is_none_or(|at| at >= more), "a difference that was missed");
            self.played.compared += more;
            self.played.left_out += all.len() as u64 - more;
        }
        if let Ok(order) = self.orders.try_recv() {
            let mut disk = self.disk.lock().unwrap();
            assert!(disk.order.is_none() && disk.read.is_none(), "one at a time");
            disk.order = Some(order);
        }
    }
}

fn play(seed: u64, mistake: Mistake, lies: bool) -> Played {
    let mut world = World::new(seed, mistake, lies);
    for _ in 0..600 {
        world.step();
        if world.played.difference.is_some() {
            break;
        }
    }
    if mistake == Mistake::None {
        world.audits.give_up();
        world.applier.settle(&mut world.audits).unwrap();
        assert!(world.disk.lock().unwrap().now == world.model);
    }
    world.played
}

#[test]
fn a_chunk_is_compared_as_of_its_checkpoint_whatever_is_written_while_it_is_read() {
    let (mut compared, mut left_out, mut written) = (0, 0, 0);
    for seed in 0..300 {
        let played = play(seed, Mistake::None, false);
        assert_eq!(played.difference, None, "seed {seed}");
        compared += played.compared;
        left_out += played.left_out;
        written += played.written;
    }
    println!("{compared} chunks compared, {written} of them after later commits, {left_out} left out");
    assert!(compared > 3000 && written > 300 && left_out > 300, "{compared}, {written}, {left_out}");
}

#[test]
fn a_chunk_that_differs_is_found_while_others_are_written() {
    let mut found = 0;
    for seed in 0..100 {
        let played = play(seed, Mistake::None, true);
        assert_eq!(played.difference.is_some(), played.was_a_lie, "seed {seed}");
        found += u32::from(played.was_a_lie);
    }
    println!("found: {found} of 100");
    assert!(found >= 40, "{found} of 100");
}

#[test]
fn every_mistake_about_what_is_written_during_a_read_is_noticed() {
    for mistake in [
        Mistake::IgnoresOvertaking,
        Mistake::PutsNewerOnTop,
        Mistake::PutsWaitingNewerOnTop,
        Mistake::ForgetsWhatLands,
        Mistake::ForgetsWhatWaits,
        Mistake::RemembersHoles,
    ] {
        let noticed = (0..100).filter(|seed| play(*seed, mistake, false).difference.is_some()).count();
        println!("{mistake:?}: {noticed} of 100");
        assert!(noticed >= 20, "{mistake:?}: {noticed} of 100");
    }
}
