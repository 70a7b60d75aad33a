//! Sidecars that cannot be written, and room that is not there: a VM that can be taken over is taken over,
//! and what would not be there later is missed before a primary counts on it.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use outlive_epoch::{DiskOp, VmId};

use super::provenance;
use crate::disk::replica::ReplicaStartError;
use crate::disk::sidecar::{CopyEnd, Role, Sidecar, beside};
use crate::disk::{Book, DiskEvent, Held, Replica, ReplicaDisk, for_run};

const VM: VmId = VmId([6; 16]);
const SIZE: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(20);

/// A standby's image in a directory where nothing new can be written while `blocked` is there.
struct Standby {
    directory: tempfile::TempDir,
}

impl Standby {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let standby = Self { directory };
        File::create(standby.image()).unwrap().set_len(SIZE).unwrap();
        standby
    }

    fn image(&self) -> PathBuf {
        self.directory.path().join("disk")
    }

    fn journal(&self) -> PathBuf {
        beside(&self.image(), "journal")
    }

    fn block(&self) {
        for name in ["outlive.new", "outlive.probe"] {
            fs::create_dir(beside(&self.image(), name)).unwrap();
        }
    }

    fn unblock(&self) {
        for name in ["outlive.new", "outlive.probe"] {
            fs::remove_dir(beside(&self.image(), name)).unwrap();
        }
    }

    fn start(&self) -> Result<(Replica, Receiver<DiskEvent>), ReplicaStartError> {
        self.start_on(OpenOptions::new().read(true).write(true).open(self.image()).unwrap())
    }

    fn start_on(&self, file: File) -> Result<(Replica, Receiver<DiskEvent>), ReplicaStartError> {
        let path = self.image();
        let (tell, told) = channel();
        let disks = vec![Some(ReplicaDisk {
            path,
            file,
            bytes: SIZE,
            read_only: false,
            accepted: None,
            thin: false,
            book: Book::none(),
        })];
        Ok((Replica::start(disks, provenance(VM), 7, move |it| drop(tell.send(it)))?, told))
    }

    fn sidecar(&self) -> Sidecar {
        Sidecar::read(&self.image()).unwrap().unwrap()
    }
}

fn commit(replica: &Replica, number: u64, base: bool, bytes: &[u8]) {
    replica.commit(number, base, super::records(&[(0, 512, DiskOp::Data(bytes))]));
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < SOON, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_takeover_does_not_need_the_sidecars() {
    let standby = Standby::new();
    let (replica, told) = standby.start().unwrap();
    commit(&replica, 1, true, b"base");
    wait_until("the base is on the image", || {
        Sidecar::read(&standby.image()).unwrap().is_some_and(|s| s.whole)
    });
    commit(&replica, 2, false, b"last");
    standby.block();
    replica.settle(2);
    let event = told.recv_timeout(SOON).unwrap();
    assert!(matches!(event, DiskEvent::Settled { checkpoint: 2 }), "{event:?}");
    replica.become_primary(8).unwrap();
    let sidecars = replica.sidecars();
    drop(replica);
    // From here on the guest writes. Nobody must bring the image back to what the journal had.
    OpenOptions::new().write(true).open(standby.image()).unwrap().write_all_at(b"more", 512).unwrap();
    let stale = standby.sidecar();
    assert_eq!((stale.role, stale.generation), (Role::Replica, 7));
    assert_eq!(stale.journal.as_ref(), Some(&standby.journal()));

    // As if the host had lost its power now.
    let copy = Standby::new();
    let journal = copy.directory.path().join("j");
    fs::copy(standby.image(), copy.image()).unwrap();
    fs::copy(standby.journal(), &journal).unwrap();
    Sidecar { journal: Some(journal), ..stale }.write(&copy.image()).unwrap();
    for_run(&[&copy.image()], &Held::default()).unwrap();
    assert_eq!(&fs::read(copy.image()).unwrap()[512..516], b"more");

    standby.unblock();
    wait_until("the sidecar is written when it can be", || sidecars.written_within(SOON).is_ok());
    assert_eq!(standby.sidecar().generation, 8);
    assert_eq!((standby.sidecar().role, standby.sidecar().journal), (Role::Primary, None));
    assert!(!standby.journal().exists());
}

#[test]
fn a_standby_that_ends_in_order_keeps_the_journal_that_its_sidecar_names() {
    let standby = Standby::new();
    let (replica, _told) = standby.start().unwrap();
    commit(&replica, 1, true, b"base");
    commit(&replica, 2, false, b"last");
    wait_until("the base is on the image", || {
        Sidecar::read(&standby.image()).unwrap().is_some_and(|s| s.whole)
    });
    standby.block();
    replica.leave(None).unwrap();
    drop(replica);
    assert_eq!(standby.sidecar().journal, Some(standby.journal()));
    assert!(standby.journal().exists());
    standby.unblock();
    for_run(&[&standby.image()], &Held::default()).unwrap();
    assert_eq!(&fs::read(standby.image()).unwrap()[512..516], b"last");
    assert_eq!((standby.sidecar().checkpoint, standby.sidecar().journal), (2, None));
    assert!(!standby.journal().exists());
}

/// What a standby left behind that handed its right over: the word for it is durable before it is given.
#[test]
fn a_copy_that_was_given_up_says_so_before_the_primary_hears_of_it() {
    for blocked in [false, true] {
        let standby = Standby::new();
        let (replica, told) = standby.start().unwrap();
        commit(&replica, 1, true, b"base");
        commit(&replica, 2, false, b"last");
        wait_until("the base is on the image", || {
            Sidecar::read(&standby.image()).unwrap().is_some_and(|s| s.whole)
        });
        if blocked {
            standby.block();
        }
        replica.release();
        let released = told.iter().find_map(|event| match event {
            DiskEvent::Released(result) => Some(result),
            _ => None,
        });
        let released = released.unwrap();
        assert_eq!(released.is_err(), blocked, "{released:?}");
        if blocked {
            continue;
        }
        let sidecar = standby.sidecar();
        assert_eq!((sidecar.end, sidecar.checkpoint), (Some(CopyEnd::Released), 2));
        assert_eq!(&fs::read(standby.image()).unwrap()[512..516], b"last");
        // The primary died before it heard of it: this side takes over all the same.
        replica.settle(2);
        assert!(matches!(told.recv().unwrap(), DiskEvent::Settled { checkpoint: 2 }));
        replica.become_primary(8).unwrap();
        let sidecar = standby.sidecar();
        assert_eq!((sidecar.role, sidecar.end, sidecar.generation), (Role::Primary, None, 8));
    }
}

#[test]
fn what_will_be_needed_is_missed_before_a_primary_is_accepted() {
    let standby = Standby::new();
    standby.block();
    let why = standby.start().err().unwrap().to_string();
    assert!(why.contains("cannot write") && why.contains("disk.outlive"), "{why}");
    standby.unblock();
    // A directory where the journal is to be.
    fs::remove_file(standby.journal()).ok();
    fs::create_dir(standby.journal()).unwrap();
    let why = standby.start().err().unwrap().to_string();
    assert!(why.contains("cannot set 64 MiB aside for the journal"), "{why}");
    assert_eq!(why.lines().count(), 1);
    fs::remove_dir(standby.journal()).unwrap();
    assert_eq!(fs::read(standby.image()).unwrap(), vec![0; SIZE as usize]);
    assert!(!beside(&standby.image(), "outlive").exists());

    // What is not needed after all is given back.
    let (replica, _told) = standby.start().unwrap();
    assert!(fs::metadata(standby.journal()).unwrap().len() >= 64 << 20);
    drop(replica);
    assert!(!standby.journal().exists());
}

/// The newest copy must not be refused because of a leave that was never sent; one that was sent counts for good.
#[test]
fn a_copy_stays_given_up_only_if_the_primary_may_have_heard() {
    for (blocked, end) in [(false, None), (true, None), (false, Some(CopyEnd::Released))] {
        let standby = Standby::new();
        let (replica, told) = standby.start().unwrap();
        commit(&replica, 1, true, b"base");
        commit(&replica, 2, false, b"last");
        wait_until("the base is on the image", || {
            Sidecar::read(&standby.image()).unwrap().is_some_and(|s| s.whole)
        });
        if blocked {
            standby.block();
        }
        replica.release();
        assert!(told.iter().any(|event| matches!(event, DiskEvent::Released(_))));
        if blocked {
            standby.unblock();
        }
        replica.leave(end).unwrap();
        wait_until("the sidecar says so", || {
            let sidecar = standby.sidecar();
            (sidecar.end, sidecar.checkpoint, sidecar.whole) == (end, 2, true)
        });
        drop(replica);
        assert_eq!(standby.sidecar().end, end);
    }
}

/// Its images are between two checkpoints then, and the journal stays for whoever has nothing better.
#[test]
fn a_copy_whose_disk_has_failed_is_given_up_too_and_taken_back_if_nobody_heard() {
    for heard in [false, true] {
        let standby = Standby::new();
        // Nothing can be written to it.
        let (replica, told) = standby.start_on(File::open(standby.image()).unwrap()).unwrap();
        commit(&replica, 1, true, b"base");
        let failed = told.recv_timeout(SOON).unwrap();
        assert!(matches!(failed, DiskEvent::Failed(_)), "{failed:?}");
        replica.release();
        let released = told.recv_timeout(SOON).unwrap();
        assert!(matches!(released, DiskEvent::Released(Ok(()))), "{released:?}");
        let sidecar = standby.sidecar();
        assert_eq!(sidecar.end, Some(CopyEnd::Released));
        assert_eq!(sidecar.journal, Some(standby.journal()));
        if heard {
            replica.promise();
        }
        drop(replica);
        assert_eq!(standby.sidecar().end, heard.then_some(CopyEnd::Released));
        assert!(standby.journal().exists());
    }
}

/// The link was lost before the leave went out: the copy may be the newest one.
#[test]
fn a_copy_that_is_thrown_away_unheard_is_not_given_up() {
    for heard in [false, true] {
        let standby = Standby::new();
        let (replica, told) = standby.start().unwrap();
        commit(&replica, 1, true, b"base");
        commit(&replica, 2, false, b"last");
        replica.release();
        assert!(told.iter().any(|event| matches!(event, DiskEvent::Released(Ok(())))));
        if heard {
            replica.promise();
        }
        drop(replica);
        let sidecar = standby.sidecar();
        assert_eq!(sidecar.end, heard.then_some(CopyEnd::Released));
        assert_eq!((sidecar.checkpoint, sidecar.whole), (2, true));
    }
}
