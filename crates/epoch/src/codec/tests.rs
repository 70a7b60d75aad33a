//! A primary's memory, a standby's memory and a writer of pages between them, used correctly and incorrectly.

use std::collections::BTreeSet;

use proptest::prelude::*;
use proptest::strategy::ValueTree;

use super::*;

const PAGES: usize = 60;
type Memory = Vec<[u8; PAGE_SIZE]>;

/// One step of a schedule.
#[derive(Debug, Clone)]
enum Step {
    /// The guest writes these bytes: page, place, byte; place `PAGE_SIZE` fills the page.
    Write(Vec<(usize, usize, u8)>),
    /// An epoch ends; its checkpoint goes to the standby. These pages are in it although the guest did not
    /// write them.
    Checkpoint(Vec<usize>),
    /// An epoch ends, and its checkpoint is lost before it is written down; so is the connection.
    Lost,
    /// The connection is lost with a checkpoint half written.
    Cut,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let page = prop_oneof![0..PAGES, 0..6usize];
    let place = prop_oneof![8 => 0..PAGE_SIZE, 1 => Just(PAGE_SIZE)];
    let byte = prop_oneof![any::<u8>(), Just(0)];
    let write = proptest::collection::vec((page.clone(), place, byte), 0..40).prop_map(Step::Write);
    let checkpoint = proptest::collection::vec(page, 0..8).prop_map(Step::Checkpoint);
    let step = prop_oneof![6 => write, 6 => checkpoint, 1 => Just(Step::Lost), 1 => Just(Step::Cut)];
    proptest::collection::vec(step, 1..60)
}

/// A deliberate mistake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    /// The writer outlives its connection.
    KeptOverLoss,
    /// A page is left out of a checkpoint without a comparison.
    LeftOut,
}

struct World {
    primary: Memory,
    standby: Memory,
    writer: PageWriter,
    dirty: BTreeSet<usize>,
    mistake: Mistake,
}

fn writer() -> PageWriter {
    // Room for some of the pages, so that they replace each other.
    PageWriter::remembering(16, || ()).unwrap()
}

impl World {
    fn new(mistake: Mistake) -> Self {
        let memory = vec![[0; PAGE_SIZE]; PAGES];
        Self { primary: memory.clone(), standby: memory, writer: writer(), dirty: BTreeSet::new(), mistake }
    }

    /// Writes the checkpoint down. Returns the entries and the data of its section.
    fn write_down(&mut self) -> (Vec<PageEntry>, Vec<u8>) {
        let dirty = std::mem::take(&mut self.dirty);
        let mut staging: Vec<u8> = dirty.iter().flat_map(|page| self.primary[*page]).collect();
        let (mut entries, mut length) = (Vec::new(), 0);
        for (place, page) in dirty.iter().enumerate() {
            if self.mistake == Mistake::LeftOut && place == 3 {
                continue;
            }
            let entry = self.writer.write(*page as u64, &mut staging, place * PAGE_SIZE, length);
            if let Some(entry) = entry {
                length += entry.data_len();
                entries.push(entry);
            }
        }
        staging.truncate(length);
        (entries, staging)
    }

    fn apply(&mut self, entries: &[PageEntry], data: &[u8]) {
        let words = entries.iter().map(|entry| PageEntry::from_wire(3, entry.to_wire(3)).unwrap());
        let mut applied = 0;
        for (gfn, page) in with_data(words, data) {
            let to = &mut self.standby[gfn as usize];
            match page {
                PageData::Raw(bytes) => *to = *bytes,
                PageData::Zero => to.fill(0),
                PageData::Granules(granules) => granules.apply(to),
            }
            applied += 1;
        }
        assert_eq!(applied, entries.len(), "every page comes");
    }

    /// A new connection: the base is the primary's memory as it is now.
    fn connect(&mut self) {
        self.standby = self.primary.clone();
        self.dirty.clear();
        if self.mistake != Mistake::KeptOverLoss {
            self.writer = writer();
        }
    }

    /// False when the standby differs after a checkpoint.
    fn run(&mut self, steps: &[Step]) -> bool {
        steps.iter().all(|step| {
            match step {
                Step::Write(writes) => {
                    for &(page, place, byte) in writes {
                        match self.primary[page].get_mut(place) {
                            Some(to) => *to = byte,
                            None => self.primary[page].fill(byte),
                        }
                        self.dirty.insert(page);
                    }
                    return true;
                }
                Step::Checkpoint(also) => {
                    self.dirty.extend(also);
                    let (entries, data) = self.write_down();
                    self.apply(&entries, &data);
                }
                Step::Lost => self.connect(),
                Step::Cut => {
                    self.write_down();
                    self.connect();
                }
            }
            self.standby == self.primary
        })
    }
}

proptest! {
    #[test]
    fn what_is_written_down_and_applied_is_the_primarys_memory(steps in steps()) {
        prop_assert!(World::new(Mistake::None).run(&steps));
    }
}

/// The property above finds these.
#[test]
fn mistakes_are_found() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for mistake in [Mistake::None, Mistake::KeptOverLoss, Mistake::LeftOut] {
        let found = (0..300).any(|_| {
            let steps = steps().new_tree(&mut runner).unwrap().current();
            !World::new(mistake).run(&steps)
        });
        assert_eq!(found, mistake != Mistake::None, "{mistake:?}");
    }
}

#[test]
fn each_page_is_written_in_the_fewest_bytes() {
    let mut writer = PageWriter::remembering(16, || ()).unwrap();
    let mut write = |gfn: u64, page: &[u8; PAGE_SIZE]| {
        let mut buffer = page.to_vec();
        writer.write(gfn, &mut buffer, 0, 0).map(|entry| (entry.codec(), entry.data_len()))
    };
    let mut page = [7; PAGE_SIZE];
    assert_eq!(write(1, &page), Some((PageCodec::Raw, PAGE_SIZE)));
    assert_eq!(write(1, &page), None);
    assert_eq!(write(2, &page), Some((PageCodec::Raw, PAGE_SIZE)), "another page");
    page[4095] = 8;
    page[0] = 8;
    assert_eq!(write(1, &page), Some((PageCodec::Granules, 8 + 2 * GRANULE)));
    assert_eq!(write(1, &page), None);
    page.iter_mut().for_each(|byte| *byte += 1);
    assert_eq!(write(1, &page), Some((PageCodec::Raw, PAGE_SIZE)));
    assert_eq!(write(1, &[0; PAGE_SIZE]), Some((PageCodec::Zero, 0)));
    assert_eq!(write(1, &[0; PAGE_SIZE]), None);
    page.fill(0);
    page[100] = 1;
    assert_eq!(write(1, &page), Some((PageCodec::Granules, 8 + GRANULE)), "of zeroes");
    assert_eq!(write(3, &[0; PAGE_SIZE]), Some((PageCodec::Zero, 0)));
    writer.forget();
    assert_eq!(writer.write(1, &mut page, 0, 0).map(PageEntry::codec), Some(PageCodec::Raw));
    let counts = CodecCounts { raw: 4, zero: 2, granules: 2, granule_bytes: 16 + 3 * 64, unchanged: 3 };
    assert_eq!((writer.take_counts(), writer.take_counts()), (counts, CodecCounts::default()));
}

#[test]
fn memory_is_taken_step_by_step() {
    let mut steps = 0;
    PageWriter::remembering(2048, || steps += 1).unwrap();
    assert_eq!(steps, 8);
}

#[test]
fn an_older_peer_is_sent_whole_pages() {
    let mut writer = PageWriter::plain();
    for _ in 0..2 {
        assert_eq!(writer.write(1, &mut [1; PAGE_SIZE], 0, 0), Some(PageEntry::raw(1)));
        assert_eq!(writer.write(1, &mut [0; PAGE_SIZE], 0, 0), Some(PageEntry::zero(1)));
    }
}

#[test]
fn entries_of_a_wrong_length_or_version_are_refused() {
    let word = |length: usize| 7 | 2 << CODEC_AT | (length as u64) << LENGTH_AT;
    for length in [0, 7, 9, 8 + GRANULE - 1, 8 + 64 * GRANULE, 65_535] {
        assert_eq!(PageEntry::from_wire(3, word(length)), Err(EntryError::Length(length as u16)));
    }
    for length in [8, 8 + GRANULE, 8 + 63 * GRANULE] {
        assert_eq!(PageEntry::from_wire(3, word(length)).map(PageEntry::data_len), Ok(length));
        assert_eq!(PageEntry::from_wire(2, word(length)), Err(EntryError::Codec(2)));
    }
    assert_eq!(PageEntry::from_wire(1, 7 | 2 << OLD_CODEC_AT), Err(EntryError::Codec(2)));
    assert_eq!(PageEntry::from_wire(3, 7 | 3 << CODEC_AT), Err(EntryError::Codec(3)));
}
