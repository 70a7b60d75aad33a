//! Loss of power and kills at every step: the images are at one commit, both at the same.

use std::time::{Duration, Instant};

use outlive_epoch::{DiskOp, DiskRecord, RecordBuf, VmId};
use proptest::prelude::*;

use super::power::{File, Power};
use crate::disk::apply::{Applier, JOURNAL_TIME, recover};
use crate::disk::journal::{Identity, Journal};

const SIZES: [u64; 3] = [8192, 0, 4096];

#[derive(Clone, Debug)]
enum Write {
    Data { disk: u16, offset: u64, len: u64, fill: u8 },
    Zero { disk: u16, offset: u64, len: u64 },
    Flush,
}

fn write() -> impl Strategy<Value = Write> {
    let place = || {
        prop_oneof![Just(0u16), Just(2)].prop_flat_map(|disk| {
            let size = SIZES[usize::from(disk)];
            (Just(disk), 0..size).prop_flat_map(move |(disk, offset)| {
                (Just(disk), Just(offset), 1..=(size - offset).min(1500))
            })
        })
    };
    prop_oneof![
        6 => (place(), any::<u8>()).prop_map(|((disk, offset, len), fill)| Write::Data { disk, offset, len, fill }),
        1 => place().prop_map(|(disk, offset, len)| Write::Zero { disk, offset, len }),
        1 => Just(Write::Flush),
    ]
}

fn records(epoch: &[Write]) -> RecordBuf {
    let mut out = RecordBuf::with_capacity(1 << 20);
    for write in epoch {
        let data;
        let (disk, offset, op) = match *write {
            Write::Data { disk, offset, len, fill } => {
                data = vec![fill; len as usize];
                (disk, offset, DiskOp::Data(&data))
            }
            Write::Zero { disk, offset, len } => (disk, offset, DiskOp::Zero(len)),
            Write::Flush => (0, 0, DiskOp::Flush),
        };
        assert!(out.push(DiskRecord { disk, offset, op }));
    }
    out
}

/// The disks after each epoch, beginning with those before the first.
fn states(epochs: &[Vec<Write>]) -> Vec<[Vec<u8>; 2]> {
    let mut now = [vec![0xaa; SIZES[0] as usize], vec![0xbb; SIZES[2] as usize]];
    let mut states = vec![now.clone()];
    for epoch in epochs {
        for write in epoch {
            let (disk, offset, len, fill) = match *write {
                Write::Data { disk, offset, len, fill } => (disk, offset, len, fill),
                Write::Zero { disk, offset, len } => (disk, offset, len, 0),
                Write::Flush => continue,
            };
            now[usize::from(disk / 2)][offset as usize..(offset + len) as usize].fill(fill);
        }
        states.push(now.clone());
    }
    states
}

fn identity() -> Identity {
    Identity { vm: VmId([1; 16]), generation: 1, sizes: SIZES.to_vec() }
}

struct Run {
    journal: File,
    images: [File; 2],
    /// Epochs that were in the images, or safely on their way, when the power went.
    hardened: usize,
    /// Epochs that were committed.
    committed: usize,
}

/// Commits epochs until the power goes; hardens and settles as `steps` say.
fn run(epochs: &[Vec<Write>], steps: &[u8], operations: u64) -> Run {
    let start = &states(&[])[0];
    let power = Power::for_operations(u64::MAX);
    let journal_file = File::new(Vec::new(), &power);
    let journal = Journal::create(journal_file.clone(), identity(), 100).unwrap();
    let power = Power::for_operations(operations);
    let journal_file = File::new(journal_file.seen(), &power);
    drop(journal);
    let images = [File::new(start[0].clone(), &power), File::new(start[1].clone(), &power)];
    let mut run = Run { journal: journal_file, images, hardened: 0, committed: 0 };
    let (journal, checkpoint) = Journal::open(run.journal.clone()).unwrap();
    let stores = vec![Some(run.images[0].clone()), None, Some(run.images[1].clone())];
    let mut applier = Applier::new(journal, stores, checkpoint);
    for (index, epoch) in epochs.iter().enumerate() {
        // An epoch whose append fails half-way may be found all the same: it was acknowledged.
        run.committed = index + 1;
        if applier.commit(Instant::now(), 101 + index as u64, records(epoch), &mut ()).is_err() {
            break;
        }
        let done = match steps[index % steps.len()] % 4 {
            0 => applier.harden(&mut ()).map(|()| true),
            1 => applier.settle(&mut ()).map(|at| {
                assert_eq!(at, 101 + index as u64);
                true
            }),
            2 => applier.make_durable().map(|()| true),
            _ => Ok(false),
        };
        match done {
            Ok(true) => run.hardened = run.committed,
            Ok(false) => {}
            Err(_) => break,
        }
    }
    run
}

/// What the next program finds, and what it makes of it. Returns the checkpoint.
fn restart(journal: Vec<u8>, images: [Vec<u8>; 2], operations: u64) -> (Option<u64>, File, [File; 2]) {
    let power = Power::for_operations(operations);
    let [a, b] = images;
    let (journal, images) = (File::new(journal, &power), [File::new(a, &power), File::new(b, &power)]);
    let (opened, durable) = Journal::open(journal.clone()).unwrap();
    let stores = [Some(images[0].clone()), None, Some(images[1].clone())];
    (recover(opened, durable, &stores).ok(), journal, images)
}

fn check(found: &[File; 2], at: u64, run: &Run, states: &[[Vec<u8>; 2]]) {
    let epoch = (at - 100) as usize;
    assert!(epoch >= run.hardened, "commit {epoch} of at least {} is there", run.hardened);
    assert!(epoch <= run.committed, "commit {epoch} of at most {} is there", run.committed);
    assert_eq!([found[0].seen(), found[1].seen()], states[epoch], "the images are at commit {epoch}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// The power goes at any operation, and again at any operation of the replay.
    #[test]
    fn after_a_loss_of_power_the_images_are_at_a_commit(
        epochs in proptest::collection::vec(proptest::collection::vec(write(), 0..6), 1..12),
        steps in proptest::collection::vec(any::<u8>(), 1..6),
        operations in 0u64..80,
        again in 0u64..30,
        seed in any::<u64>(),
    ) {
        let states = states(&epochs);
        let run = run(&epochs, &steps, operations);
        let mut random = seed | 1;
        let mut keep = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random & 2 == 0
        };
        let journal = run.journal.after_power_loss(&mut keep);
        let images = [run.images[0].after_power_loss(&mut keep), run.images[1].after_power_loss(&mut keep)];
        let (done, journal, images) = restart(journal, images, again);
        let (at, images) = match done {
            Some(at) => (at, images),
            None => {
                let journal = journal.after_power_loss(&mut keep);
                let images = [images[0].after_power_loss(&mut keep), images[1].after_power_loss(&mut keep)];
                let (done, _, images) = restart(journal, images, u64::MAX);
                (done.unwrap(), images)
            }
        };
        check(&images, at, &run, &states);
    }

    /// A kill leaves everything that was written.
    #[test]
    fn after_a_kill_the_images_are_at_the_last_commit(
        epochs in proptest::collection::vec(proptest::collection::vec(write(), 0..6), 1..12),
        steps in proptest::collection::vec(any::<u8>(), 1..6),
        operations in 0u64..80,
    ) {
        let states = states(&epochs);
        let run = run(&epochs, &steps, operations);
        let images = [run.images[0].seen(), run.images[1].seen()];
        let (at, journal, images) = restart(run.journal.seen(), images, u64::MAX);
        check(&images, at.unwrap(), &run, &states);
        // Once more: nothing is left to do, and nothing changes.
        let (second, _, after) = restart(journal.seen(), [images[0].seen(), images[1].seen()], u64::MAX);
        prop_assert_eq!(second, at);
        prop_assert_eq!([after[0].seen(), after[1].seen()], [images[0].seen(), images[1].seen()]);
    }
}

/// The test must be able to fail: without the journal's order a loss of power is seen.
#[test]
fn images_written_before_the_journal_is_durable_are_noticed() {
    let power = Power::steady();
    let file = File::new(vec![0; 1024], &power);
    crate::disk::image::Store::write(&file, &[1; 1024], 0).unwrap();
    let mut first = true;
    let torn = file.after_power_loss(|| std::mem::replace(&mut first, false));
    assert_eq!((torn[0], torn[1023]), (1, 0));
}

/// A journal that is full is emptied by itself and never grows without end.
#[test]
fn a_full_journal_is_emptied() {
    let power = Power::steady();
    let file = File::new(Vec::new(), &power);
    let image = File::new(vec![0; 8192], &power);
    let identity = Identity { vm: VmId([1; 16]), generation: 1, sizes: vec![1 << 30] };
    let journal = Journal::create(file.clone(), identity, 0).unwrap();
    let mut applier = Applier::new(journal, vec![Some(image.clone())], 0);
    let data = vec![3; 24 << 20];
    for number in 1..=6 {
        applier
            .commit(Instant::now(), number, super::records(&[(0, 0, DiskOp::Data(&data))]), &mut ())
            .unwrap();
        assert!(file.seen().len() < 66 << 20);
    }
    assert_eq!(applier.settle(&mut ()).unwrap(), 6);
    assert!(applier.is_settled());
    assert_eq!(Journal::open(file).unwrap().1, 6);
}

/// A guest that writes a little all the time: whatever a takeover would have to make durable is a few seconds old.
#[test]
fn a_journal_that_grows_slowly_is_emptied_too() {
    let power = Power::steady();
    let file = File::new(Vec::new(), &power);
    let image = File::new(vec![0; 8192], &power);
    let identity = Identity { vm: VmId([1; 16]), generation: 1, sizes: vec![8192] };
    let journal = Journal::create(file.clone(), identity, 0).unwrap();
    let mut applier = Applier::new(journal, vec![Some(image.clone())], 0);
    let mut now = Instant::now();
    let mut commit = |number: u64, later: Duration| {
        now += later;
        let data = [number as u8; 512];
        applier
            .commit(now, number, super::records(&[(0, number * 512, DiskOp::Data(&data))]), &mut ())
            .unwrap();
        applier.harden(&mut ()).unwrap();
        // Up to this checkpoint the images are durable and the journal is empty.
        Journal::open(file.clone()).unwrap().1
    };
    assert_eq!(commit(1, Duration::ZERO), 0);
    assert_eq!(commit(2, JOURNAL_TIME / 2), 0);
    assert_eq!(commit(3, JOURNAL_TIME / 2), 2, "the first is too old");
    assert_eq!(image.after_power_loss(|| false)[2 * 512], 2);
    assert_eq!(commit(4, JOURNAL_TIME / 2), 2, "it is the time of the oldest, not of the journal");
    assert_eq!(commit(5, JOURNAL_TIME / 2), 4);
    assert_eq!(commit(6, JOURNAL_TIME * 2), 5);
}
