//! Two threads write at random, and a copy made of nothing but the reported pages is compared with memory
//! after every epoch: once with the back end alone, and once with a tracker over it.

use std::fs::File;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use super::{
    Backing, Memory, Random, by_preadv, by_process_vm_writev, open, source_of_bytes, take, take_some,
};
use crate::layout::{Gfn, MemoryLayout};
use crate::source::{Source, Uffd};
use crate::{DirtyKind, Fetch, GlobalLog, NewError, Tracker, TrackerConfig};

/// Memory of both kinds; the frame numbers of the second begin at `HIGH`.
struct Ram {
    parts: [Memory; 2],
    /// Another mapping of the second, for writes that must be marked.
    other: Memory,
}

const HIGH: u64 = 0x2000;
const WORDS: usize = 512;

impl Ram {
    fn new() -> Ram {
        let parts = [Memory::new(Backing::Private, 700).unwrap(), Memory::new(Backing::Shared, 900).unwrap()];
        let memfd = parts[1].memfd.as_ref().unwrap().try_clone().unwrap();
        let other = Memory::map(900, libc::MAP_SHARED, Some(memfd)).unwrap();
        Ram { parts, other }
    }

    fn layout(&self) -> MemoryLayout {
        MemoryLayout::new(vec![self.parts[0].slot(0, 0), self.parts[1].slot(1, HIGH)]).unwrap()
    }

    /// Every page with its number in the copy.
    fn pages(&self) -> impl Iterator<Item = u64> {
        (0..700).chain(HIGH..HIGH + 900)
    }

    fn words(&self, gfn: u64) -> impl Iterator<Item = u64> {
        let (memory, page) = match gfn.checked_sub(HIGH) {
            Some(page) => (&self.parts[1], page),
            None => (&self.parts[0], gfn),
        };
        (0..WORDS).map(move |index| memory.word(page, index).load(Ordering::Relaxed))
    }
}

/// A standby's copy: the contents of pages when they were copied.
struct Copy(Vec<u64>);

impl Copy {
    fn of(ram: &Ram) -> Copy {
        let mut copy = Copy(vec![0; (HIGH as usize + 900) * WORDS]);
        ram.pages().for_each(|gfn| copy.copy(ram, gfn));
        copy
    }

    fn page(&mut self, gfn: u64) -> &mut [u64] {
        &mut self.0[gfn as usize * WORDS..][..WORDS]
    }

    fn copy(&mut self, ram: &Ram, gfn: u64) {
        self.page(gfn).iter_mut().zip(ram.words(gfn)).for_each(|(old, now)| *old = now);
    }

    /// Pages that differ from memory. They are copied, so that each counts once.
    fn mend(&mut self, ram: &Ram) -> usize {
        let differs = |gfn: &u64| !ram.words(*gfn).eq(self.page(*gfn).iter().copied());
        let different: Vec<_> = ram.pages().filter(differs).collect();
        for &gfn in &different {
            let words = ram.words(gfn).zip(self.page(gfn).iter().copied()).filter(|(now, old)| now != old);
            words.for_each(|(now, _)| println!("page {gfn:#x}: missed {}", writer_of(now)));
            self.copy(ram, gfn);
        }
        different.len()
    }
}

/// The writer of a word: writers put their number into its lowest bits. Files read as bytes of 7.
fn writer_of(word: u64) -> &'static str {
    ["a store", "process_vm_writev", "a store to the other mapping", "preadv"][word as usize % 4]
}

/// Where the pages come from.
enum From<'a> {
    BackEnd(&'a Uffd, MemoryLayout),
    Tracker(&'a Tracker),
}

impl From<'_> {
    /// Takes some pages while they are written.
    fn some(&self, room: usize, random: &mut Random) -> Vec<u64> {
        match self {
            From::BackEnd(uffd, layout) => take_some(uffd, layout, room),
            From::Tracker(tracker) => {
                let mut pages = vec![Gfn(0); room];
                let rearm = random.below(2) == 0;
                let fetched = tracker.fetch(&mut pages, Fetch { rearm, ..Fetch::default() }).unwrap();
                // Dropped, they come again.
                if !rearm && random.below(8) == 0 { vec![] } else { numbers(fetched.rearm().unwrap()) }
            }
        }
    }

    /// Takes the others while nobody writes, and ends the epoch.
    fn rest(&self, random: &mut Random) -> Vec<u64> {
        match self {
            From::BackEnd(uffd, layout) => take(uffd, layout).unwrap(),
            From::Tracker(tracker) => {
                let end = || tracker.stopped().state_saved().harvest().unwrap().rearm().unwrap();
                if random.below(20) == 0 {
                    drop(end());
                }
                let epoch = end();
                let pages = numbers(epoch.pages());
                epoch.copied().run();
                pages
            }
        }
    }
}

fn numbers(pages: &[Gfn]) -> Vec<u64> {
    pages.iter().map(|gfn| gfn.0).collect()
}

/// A thread that writes, until told to stop.
struct Writer<'a> {
    ram: &'a Ram,
    file: &'a File,
    global: Option<&'a GlobalLog>,
    stamp: &'a AtomicU64,
    stop: &'a AtomicBool,
    pins: &'a RwLock<()>,
}

impl Writer<'_> {
    fn through_pins(&self, write: impl FnOnce()) {
        let _shared = self.pins.read().unwrap();
        write();
    }

    fn write_some(&self, random: &mut Random) {
        for _ in 0..random.below(400) {
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            let memory = &self.ram.parts[random.below(2) as usize];
            let (page, place) = (random.below(memory.pages), random.below(WORDS as u64) as usize);
            let stamp = self.stamp.fetch_add(1, Ordering::Relaxed) << 2;
            match (random.below(16), self.global) {
                // Not while pages are taken: the call may have pinned its page already, and write it later.
                (0, _) => self.through_pins(|| {
                    by_process_vm_writev(memory.word(page, place).as_ptr().cast(), stamp | 1)
                }),
                (1, _) => by_preadv(self.file, [memory.page(page), memory.page(random.below(memory.pages))]),
                (2, Some(global)) => {
                    let page = random.below(900);
                    self.ram.other.word(page, place).store(stamp | 2, Ordering::Relaxed);
                    global.mark(Gfn(HIGH + page));
                }
                _ => memory.word(page, place).store(stamp, Ordering::Relaxed),
            }
        }
    }
}

/// Returns the number of reported pages, and of those that had changed without a report. Every `lose`-th
/// report is ignored.
fn run(ram: &Ram, from: &From<'_>, global: Option<&GlobalLog>, epochs: u64, lose: usize) -> (usize, usize) {
    let (file, stamp, stop) = (source_of_bytes(), AtomicU64::new(1), AtomicBool::new(false));
    let pins = RwLock::new(());
    let (mut reported, mut missed) = (0, 0);
    let mut random = Random(11);
    let mut copy = Copy::of(ram);
    let mut copy_all = |copy: &mut Copy, pages: Vec<u64>| {
        for gfn in pages {
            reported += 1;
            if lose == 0 || reported % lose != 0 {
                copy.copy(ram, gfn);
            }
        }
    };
    std::thread::scope(|scope| {
        let (done, is_done) = channel();
        let starts: Vec<_> = (0..2)
            .map(|seed| {
                let (start, starts) = channel::<()>();
                let done = done.clone();
                let writer = Writer { ram, file: &file, global, stamp: &stamp, stop: &stop, pins: &pins };
                scope.spawn(move || {
                    let mut random = Random(seed);
                    starts.iter().for_each(|()| {
                        writer.write_some(&mut random);
                        done.send(()).unwrap();
                    });
                });
                start
            })
            .collect();
        // So that a failing thread ends the test.
        drop(done);
        for _ in 0..epochs {
            stop.store(false, Ordering::Relaxed);
            starts.iter().for_each(|start| start.send(()).unwrap());
            for _ in 0..random.below(3) {
                std::thread::sleep(Duration::from_micros(random.below(100)));
                let room = random.below(200) as usize;
                // Copied while others write: writes after the take must be reported again.
                let pages = {
                    let _alone = pins.write().unwrap();
                    from.some(room, &mut random)
                };
                copy_all(&mut copy, pages);
            }
            stop.store(random.below(4) == 0, Ordering::Relaxed);
            starts.iter().for_each(|_| is_done.recv().unwrap());
            copy_all(&mut copy, from.rest(&mut random));
            missed += copy.mend(ram);
        }
        drop(starts);
    });
    println!("{reported} pages in {epochs} epochs, {missed} missed");
    (reported, missed)
}

fn run_back_end(epochs: u64, lose: usize) -> Option<(usize, usize)> {
    let ram = Ram::new();
    let layout = ram.layout();
    let uffd = open(&layout)?;
    uffd.populate(0);
    uffd.arm_all(&layout).unwrap();
    let outcome = run(&ram, &From::BackEnd(&uffd, layout.clone()), None, epochs, lose);
    uffd.disarm_all(&layout).unwrap();
    Some(outcome)
}

#[test]
fn no_write_of_two_threads_is_missed() {
    let Some((reported, missed)) = run_back_end(400, 0) else { return };
    assert!(reported > 20_000, "the test has tested nothing");
    assert_eq!(missed, 0);
}

#[test]
fn the_test_notices_a_lost_page() {
    let Some((_, missed)) = run_back_end(50, 500) else { return };
    assert!(missed > 0);
}

#[test]
fn nor_does_a_tracker_miss_one() {
    let ram = Ram::new();
    let global = GlobalLog::new(HIGH + 900, 64);
    let config = TrackerConfig { max_dirty_pages: 300, trigger: 100, ..TrackerConfig::default() };
    let tracker = match Tracker::of_memory(ram.layout(), config, global.clone()) {
        Err(NewError::Uffd(error)) => return println!("skipped: {error}"),
        tracker => tracker.unwrap(),
    };
    assert_eq!(tracker.kind(), DirtyKind::Uffd);
    for _ in 0..2 {
        tracker.enable_stopped().unwrap();
        assert!(ram.parts.iter().all(Memory::is_registered));
        let (reported, missed) = run(&ram, &From::Tracker(&tracker), Some(&global), 200, 0);
        assert!(reported > 10_000, "the test has tested nothing");
        assert_eq!(missed, 0);
        tracker.disable().unwrap();
        assert!(!ram.parts.iter().any(Memory::is_registered));
    }
    println!("{:?}", tracker.stats());
}
