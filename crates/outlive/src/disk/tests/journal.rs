//! The file itself: cut, damaged, used again.

use outlive_epoch::{DiskOp, VmId};

use super::power::{File, Power};
use crate::disk::image::Store;
use crate::disk::journal::{Identity, Journal, JournalError};

fn identity() -> Identity {
    Identity { vm: VmId([7; 16]), generation: 3, sizes: vec![1 << 20, 0, 4096] }
}

fn records(fill: u8, len: usize) -> Vec<u8> {
    let records = super::records(&[(0, 9, DiskOp::Data(&vec![fill; len])), (2, 96, DiskOp::Zero(4000))]);
    records.records().bytes().to_vec()
}

/// What a journal replays.
fn replay(file: &File) -> (u64, Option<u64>, Vec<Vec<u8>>) {
    let (mut journal, checkpoint) = Journal::open(file.clone()).unwrap();
    assert_eq!(journal.identity(), &identity());
    let mut epochs = Vec::new();
    let last = journal.replay(|records| {
        epochs.push(records.bytes().to_vec());
        Ok(())
    });
    (checkpoint, last.unwrap(), epochs)
}

fn three_epochs() -> (File, Vec<Vec<u8>>, Vec<u64>) {
    let file = File::new(Vec::new(), &Power::steady());
    let mut journal = Journal::create(file.clone(), identity(), 40).unwrap();
    let epochs = vec![records(1, 10), Vec::new(), records(3, 900)];
    let mut ends = vec![journal.len()];
    for (number, epoch) in [41, 43, 44].into_iter().zip(&epochs) {
        journal.append(number, epoch).unwrap();
        ends.push(journal.len());
    }
    (file, epochs, ends)
}

#[test]
fn what_was_appended_is_replayed() {
    let (file, epochs, _) = three_epochs();
    assert_eq!(replay(&file), (40, Some(44), epochs));
}

#[test]
fn cut_at_every_byte_it_has_the_epochs_in_front_of_the_cut() {
    let (file, epochs, ends) = three_epochs();
    let bytes = file.seen();
    for length in 0..=ends[3] as usize {
        let cut = File::new(bytes[..length].to_vec(), &Power::steady());
        // The header of the only lap so far is the second copy.
        if length < 8192 {
            assert!(matches!(Journal::open(cut), Err(JournalError::NoHeader)), "{length}");
            continue;
        }
        let whole = ends[1..].iter().filter(|end| **end <= length as u64).count();
        assert_eq!(replay(&cut).2, epochs[..whole], "{length}");
    }
}

#[test]
fn a_wrong_byte_ends_it_in_front_of_the_epoch() {
    let (file, epochs, ends) = three_epochs();
    let bytes = file.seen();
    for at in (8192..ends[3] as usize).filter(|at| at % 7 == 0 || *at < 8400) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x20;
        let whole = ends[1..].iter().filter(|end| **end <= at as u64).count();
        assert_eq!(replay(&File::new(damaged, &Power::steady())).2, epochs[..whole], "{at}");
    }
}

#[test]
fn emptied_it_forgets_what_is_still_in_the_file() {
    let (file, epochs, _) = three_epochs();
    let (mut journal, _) = Journal::open(file.clone()).unwrap();
    journal.replay(|_| Ok(())).unwrap();
    journal.reset(44).unwrap();
    assert_eq!(replay(&file), (44, None, Vec::new()));
    // The same bytes at the same place, but of the lap before, stand behind this one.
    journal.append(45, &epochs[0]).unwrap();
    assert_eq!(replay(&file), (44, Some(45), vec![epochs[0].clone()]));
    // A journal that is begun anew in an old file counts its laps on.
    Journal::create(file.clone(), identity(), 50).unwrap();
    assert_eq!(replay(&file), (50, None, Vec::new()));
}

#[test]
fn a_header_that_tears_leaves_the_one_before() {
    let (file, epochs, _) = three_epochs();
    let before = file.seen();
    let (mut journal, _) = Journal::open(file.clone()).unwrap();
    journal.replay(|_| Ok(())).unwrap();
    journal.reset(44).unwrap();
    let after = file.seen();
    for torn in (0..4096).step_by(512) {
        let mut bytes = before.clone();
        bytes[..torn].copy_from_slice(&after[..torn]);
        assert_eq!(replay(&File::new(bytes, &Power::steady())), (40, Some(44), epochs.clone()), "{torn}");
    }
}

#[test]
fn numbers_that_do_not_grow_end_it() {
    let file = File::new(Vec::new(), &Power::steady());
    let mut journal = Journal::create(file.clone(), identity(), 0).unwrap();
    for number in [5, 6, 6, 7] {
        journal.append(number, &[]).unwrap();
    }
    assert_eq!(replay(&file).1, Some(6));
}

#[test]
fn whole_epochs_of_nonsense_are_named() {
    let outside = super::records(&[(1, 0, DiskOp::Zero(1))]).records().bytes().to_vec();
    let outside = (outside, "a write to disk 1 at 0x0 is outside the VM's disks");
    for (records, why) in [outside, (vec![1, 2, 3], "a disk record ends early")] {
        let file = File::new(Vec::new(), &Power::steady());
        Journal::create(file.clone(), identity(), 0).unwrap().append(9, &records).unwrap();
        let error = Journal::open(file).unwrap().0.replay(|_| Ok(())).unwrap_err().to_string();
        assert!(error.contains(why) && error.contains("checkpoint 9"), "{error}");
    }
}

#[test]
fn an_absurd_length_is_no_epoch() {
    let (file, epochs, ends) = three_epochs();
    let mut head = [0; 40];
    file.read(&mut head, ends[2]).unwrap();
    head[24..32].copy_from_slice(&u64::MAX.to_le_bytes());
    let crc = crc32fast::hash(&head[..36]);
    head[36..].copy_from_slice(&crc.to_le_bytes());
    file.write(&head, ends[2]).unwrap();
    assert_eq!(replay(&file).2, epochs[..2]);
}

/// The bytes of the format: what a release has written, every later one replays.
#[test]
fn a_journal_of_the_first_format_is_replayed() {
    let bytes = include_bytes!("journal-v1.bin");
    let (file, epochs, _) = three_epochs();
    let written = file.seen();
    let first = bytes.iter().zip(&written).position(|(a, b)| a != b);
    assert_eq!((first, bytes.len()), (None, written.len()), "{}", crate::golden::REMEDY);
    assert_eq!(replay(&File::new(bytes.to_vec(), &Power::steady())), (40, Some(44), epochs));
}

/// A journal of a newer release may have what is nowhere else: it is neither taken for damaged nor
/// overwritten.
#[test]
fn a_journal_of_another_format_is_refused_with_the_remedy() {
    let (file, ..) = three_epochs();
    let mut bytes = file.seen();
    for slot in 0..2 {
        let mut newer = bytes.clone();
        let header = &mut newer[slot * 4096..][..4096];
        header[..8].copy_from_slice(b"OUTLVJNL");
        header[8..12].copy_from_slice(&2u32.to_le_bytes());
        let crc = crc32fast::hash(&header[..4092]);
        header[4092..].copy_from_slice(&crc.to_le_bytes());
        let newer = File::new(newer, &Power::steady());
        let error = Journal::open(newer.clone()).err().unwrap().to_string();
        assert!(
            error.contains("format 2, this release knows 1") && error.contains("start the VM with"),
            "{error}"
        );
        let error = Journal::create(newer, identity(), 1).err().unwrap().to_string();
        assert!(error.contains("format 2") && error.contains("delete the journal"), "{error}");
    }
    // A header that is damaged is none, whatever version it seems to have.
    bytes[8] = 2;
    assert_eq!(replay(&File::new(bytes, &Power::steady())).1, Some(44));
}
