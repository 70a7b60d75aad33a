//! A replica whose image answers the audit late, or not at all.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use outlive_epoch::{AuditRange, ChunkRange, DISK_CHUNK, DiskOp};

use super::check::{SIZE, Standby};
use super::records;
use crate::audit::Budget;
use crate::disk::replica::Source;
use crate::disk::{DiskEvent, ReplicaDisk, Store, chunk_sum};

const CHUNK: u64 = DISK_CHUNK as u64;
/// Far more than anything here takes that waits for no read.
const SOON: Duration = Duration::from_secs(10);

/// When reads are answered.
#[derive(Default)]
struct Gate {
    /// Whether they are, and how many wait.
    state: Mutex<(bool, u32)>,
    changed: Condvar,
    /// How long each takes beside that.
    takes: Duration,
}

impl Gate {
    fn open(&self) {
        self.state.lock().unwrap().0 = true;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.1 += 1;
        self.changed.notify_all();
        state = self.changed.wait_while(state, |(open, _)| !*open).unwrap();
        state.1 -= 1;
        drop(state);
        std::thread::sleep(self.takes);
    }

    fn wait_for_a_read(&self) {
        let state = self.state.lock().unwrap();
        let none = |state: &mut (bool, u32)| state.1 == 0;
        let waited = self.changed.wait_timeout_while(state, SOON, none).unwrap();
        assert!(!waited.1.timed_out(), "nothing is read");
    }
}

/// An image of which each read sees the first half before the gate opens, and the other half afterwards.
struct Late(File, Arc<Gate>);

impl Store for Late {
    fn read(&self, to: &mut [u8], offset: u64) -> io::Result<()> {
        let (first, last) = to.split_at_mut(to.len() / 2);
        self.0.read_exact_at(first, offset)?;
        self.1.pass();
        self.0.read_exact_at(last, offset + first.len() as u64)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.0.next_data(offset)
    }

    fn bytes(&self) -> io::Result<u64> {
        self.0.bytes()
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
}

fn late(gate: &Arc<Gate>) -> Standby {
    let late = |disk: &ReplicaDisk| Late(File::open(&disk.path).unwrap(), gate.clone());
    let source = |disk: &ReplicaDisk| Source { store: late(disk), bytes: disk.bytes };
    let standby = Standby::reading(|disks| disks.iter().map(|disk| disk.as_ref().map(source)).collect());
    // The base has nothing but holes, which cost no read.
    standby.commit(2, false, 3 * CHUNK, &[7; 3 * DISK_CHUNK]);
    standby.wait_in_image(3 * CHUNK, &[7; 3 * DISK_CHUNK]);
    standby
}

fn all() -> Arc<Budget> {
    Budget::start("100".parse().unwrap())
}

fn chunk(first: u64) -> ChunkRange {
    ChunkRange { disk: 0, first, count: 1 }
}

impl Standby {
    /// One chunk, as the VM has it.
    fn right(&self, first: u64) -> AuditRange {
        let mut bytes = vec![0; DISK_CHUNK];
        self.vm.read_exact_at(&mut bytes, first * CHUNK).unwrap();
        AuditRange { chunks: chunk(first), sum: chunk_sum(first, &bytes) }
    }

    fn wait_in_image(&self, offset: u64, bytes: &[u8]) {
        let image = File::open(self.image()).unwrap();
        let (mut there, until) = (vec![0; bytes.len()], Instant::now() + SOON);
        while there != bytes {
            assert!(Instant::now() < until, "it does not come into the image");
            std::thread::sleep(Duration::from_millis(5));
            image.read_exact_at(&mut there, offset).unwrap();
        }
    }

    /// The checkpoint that is answered next, and how many of its chunks were compared.
    fn answered(&self) -> (u64, u64) {
        match self.told() {
            DiskEvent::Audited(audited, more) => {
                assert_eq!(audited.differs, None);
                (audited.checkpoint, more)
            }
            other => panic!("{other:?}"),
        }
    }
}

fn wrong(first: u64) -> AuditRange {
    AuditRange { chunks: chunk(first), sum: 5 }
}

/// Of a copy that has left, nothing is compared any more: the guest writes to its image.
#[test]
fn commits_and_the_end_of_a_copy_wait_for_no_read() {
    for end in 0..4 {
        let gate = Arc::<Gate>::default();
        let standby = late(&gate);
        // Nothing overtakes it.
        standby.replica.audit(2, &[wrong(5)], &all());
        gate.wait_for_a_read();
        let began = Instant::now();
        for number in 3..40 {
            standby.commit(number, false, 3 * CHUNK, &[number as u8; 5000]);
            standby.commit(number, false, 9 * CHUNK, &[number as u8; 5000]);
        }
        standby.wait_in_image(3 * CHUNK, &[39; 5000]);
        assert!(!standby.replica.holds_back() && standby.replica.working_for() < SOON);
        match end {
            0 => standby.replica.leave(None).unwrap(),
            1 => standby.replica.become_primary(8).unwrap(),
            2 => {
                standby.replica.settle(39);
                assert!(matches!(standby.told(), DiskEvent::Settled { checkpoint: 39 }));
                standby.replica.become_primary(8).unwrap();
            }
            _ => {
                standby.replica.release();
                assert!(matches!(standby.told(), DiskEvent::Released(Ok(()))));
            }
        }
        let Standby { replica, told, directory, .. } = standby;
        // Nobody knows when it ends: before the disks' thread does, or after that.
        let replica = (end % 2 == 0).then_some(replica);
        assert!(began.elapsed() < SOON);
        gate.open();
        assert!(told.recv_timeout(Duration::from_millis(200)).is_err(), "it belongs to nobody any more");
        drop((replica, directory));
    }
}

#[test]
fn what_is_overtaken_is_left_out_and_the_answers_stay_in_order() {
    let gate = Arc::<Gate>::default();
    let standby = late(&gate);
    // The first chunk is overtaken, and what is behind it is left out with it, whatever it is.
    standby.replica.audit(2, &[wrong(3), wrong(4)], &all());
    gate.wait_for_a_read();
    let at = 3 * CHUNK + 40_000;
    standby.commit(3, false, at, b"newer");
    standby.replica.audit(3, &[standby.right(3)], &all());
    standby.wait_in_image(at, b"newer");
    standby.commit(4, false, 9 * CHUNK, b"newer");
    standby.replica.audit(4, &[standby.right(3)], &all());
    gate.open();
    assert_eq!(standby.answered(), (2, 0));
    assert_eq!(standby.answered().0, 3);
    assert_eq!(standby.answered().0, 4);
    standby.replica.become_primary(8).unwrap();
}

/// A half of a write of the checkpoint itself, and one that waits.
#[test]
fn what_lands_of_the_checkpoint_itself_changes_nothing() {
    let gate = Arc::<Gate>::default();
    let standby = late(&gate);
    standby.commit(3, false, 3 * CHUNK + 100, &[8; 50_000]);
    standby.replica.audit(3, &[standby.right(3)], &all());
    gate.wait_for_a_read();
    // What a later checkpoint has elsewhere changes nothing either.
    standby.commit(4, false, 9 * CHUNK, &[9; 100]);
    standby.wait_in_image(9 * CHUNK, &[9; 100]);
    gate.open();
    assert_eq!(standby.answered(), (3, 1));
    // One that differs is found.
    let image = File::options().write(true).open(standby.image()).unwrap();
    image.write_all_at(b"x", 4 * CHUNK + 7).unwrap();
    let until = Instant::now() + SOON;
    loop {
        assert!(Instant::now() < until, "it is not found");
        standby.replica.audit(4, &[standby.right(4)], &all());
        match standby.told.recv_timeout(Duration::from_millis(50)) {
            // The disk has its rest.
            Err(_) => {}
            Ok(DiskEvent::Audited(audited, 0)) => assert_eq!(audited.differs, None),
            Ok(DiskEvent::Audited(audited, more)) => {
                assert_eq!((audited.differs, more), (Some(chunk(4)), 1));
                break;
            }
            Ok(other) => panic!("{other:?}"),
        }
    }
    assert!(matches!(standby.told(), DiskEvent::Differs { chunks, .. } if chunks == chunk(4)));
}

#[test]
fn few_comparisons_wait_while_a_read_hangs() {
    let gate = Arc::<Gate>::default();
    let standby = late(&gate);
    standby.replica.audit(2, &[standby.right(3)], &all());
    gate.wait_for_a_read();
    (3..100).for_each(|number| standby.replica.audit(number, &[standby.right(3)], &all()));
    gate.open();
    let mut answers = Vec::new();
    while let Ok(DiskEvent::Audited(audited, _)) = standby.told.recv_timeout(Duration::from_millis(500)) {
        answers.push(audited.checkpoint);
    }
    assert!(answers.len() >= 2 && answers.len() <= 16 && answers.is_sorted(), "{answers:?}");
}

/// The guest writes to it in every epoch, and wants it durable. A disk whose reads take longer than an epoch is common.
#[test]
fn a_chunk_that_is_written_in_every_epoch_has_its_turn_on_a_slow_disk() {
    let gate = Arc::new(Gate { takes: Duration::from_millis(40), ..Gate::default() });
    gate.open();
    let standby = late(&gate);
    let (mut compared, mut number) = (0, 2);
    let until = Instant::now() + 3 * SOON;
    while compared < 3 {
        assert!(Instant::now() < until, "{compared} compared in {number} epochs");
        number += 1;
        let data = [number as u8; 700];
        let at = 3 * CHUNK + number % 60 * 1000;
        let writes = [(0, at, DiskOp::Data(&data)), (0, 0, DiskOp::Flush)];
        standby.replica.commit(number, false, records(&writes));
        standby.vm.write_all_at(&data, at).unwrap();
        standby.replica.audit(number, &[standby.right(3)], &all());
        std::thread::sleep(Duration::from_millis(10));
        for event in standby.told.try_iter() {
            let DiskEvent::Audited(audited, more) = event else { panic!("{event:?}") };
            assert_eq!(audited.differs, None);
            compared += more;
        }
    }
    println!("{compared} compared in {number} epochs");
}

/// Behind the back of a host, beside a guest that writes all the time.
#[test]
fn a_difference_is_found_while_writes_go_on() {
    let standby = Standby::new();
    let at = SIZE - 2 * CHUNK;
    standby.commit(2, false, at, &[7; 2 * DISK_CHUNK]);
    standby.wait_in_image(at, &[7; 2 * DISK_CHUNK]);
    File::options().write(true).open(standby.image()).unwrap().write_all_at(b"x", SIZE - 1).unwrap();
    let wrong = chunk(SIZE / CHUNK - 1);
    let until = Instant::now() + 3 * SOON;
    for number in 3.. {
        assert!(Instant::now() < until, "it is not found");
        standby.commit(number, false, number % 50 * 4096, &[number as u8; 4096]);
        let ranges = [standby.right(number % 3), standby.right(wrong.first)];
        standby.replica.audit(number, &ranges, &all());
        std::thread::sleep(Duration::from_millis(3));
        if let Some(checkpoint) = found(&standby, wrong) {
            assert!(checkpoint <= number);
            return;
        }
    }
}

fn found(standby: &Standby, wrong: ChunkRange) -> Option<u64> {
    standby.told.try_iter().find_map(|event| match event {
        DiskEvent::Audited(audited, _) => {
            assert!(audited.differs.is_none_or(|chunks| chunks == wrong), "{audited:?}");
            None
        }
        DiskEvent::Differs { checkpoint, chunks, .. } => {
            assert_eq!(chunks, wrong);
            Some(checkpoint)
        }
        other => panic!("{other:?}"),
    })
}
