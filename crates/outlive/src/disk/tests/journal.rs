//! The file itself: cut, damaged, used again.

use outlive_epoch::{DiskOp, DiskRecord, VmId};

use super::power::{File, Power};
use crate::disk::image::Store;
use crate::disk::journal::{Identity, Journal, JournalError};

fn identity() -> Identity {
    Identity { vm: VmId([7; 16]), generation: 3, sizes: vec![1 << 20, 0, 4096] }
}

fn records(fill: u8, len: usize) -> Vec<u8> {
    let mut out = Vec::new();
    DiskRecord { disk: 0, offset: 9, op: DiskOp::Data(&vec![fill; len]) }.put(&mut out);
    DiskRecord { disk: 2, offset: 96, op: DiskOp::Zero(4000) }.put(&mut out);
    out
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
    let mut outside = Vec::new();
    DiskRecord { disk: 1, offset: 0, op: DiskOp::Zero(1) }.put(&mut outside);
    for (records, why) in [(outside, "a write outside disk 1"), (vec![1, 2, 3], "a disk record ends early")] {
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
