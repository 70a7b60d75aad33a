//! Disks that hang, directories of others, files that are missing.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::sync::atomic::{AtomicBool, Ordering};

use outlive_epoch::PAGE_SIZE;

use super::*;
use crate::places::RunPlaces;
use crate::{Settled, Source};

/// A copy of which nothing is known but its disk, which is full of sevens until its guest runs elsewhere.
#[derive(Default)]
struct Odd {
    /// How long it takes to say that the images are settled.
    settles_in: Duration,
    was_read: AtomicBool,
    is_gone: AtomicBool,
}

impl Source for Odd {
    fn touched(&self, _: u64) -> u64 {
        0
    }

    fn read_page(&self, _: u64, _: &mut [u8; PAGE_SIZE]) -> bool {
        false
    }

    fn settled(&self) -> Settled {
        std::thread::sleep(self.settles_in);
        Settled::Yes
    }

    fn disks(&self) -> Vec<Option<u64>> {
        vec![self.settles_in.is_zero().then_some(vm::DISK_BYTES)]
    }

    fn next_data(&self, _: usize, from: u64) -> io::Result<Option<u64>> {
        Ok((from == 0 || !self.is_gone.load(Ordering::SeqCst)).then_some(from))
    }

    fn read_disk(&self, _: usize, to: &mut [u8], _: u64) -> io::Result<()> {
        to.fill(7);
        std::thread::sleep(Duration::from_millis(150));
        self.was_read.store(true, Ordering::SeqCst);
        Ok(())
    }
}

#[test]
fn a_thread_that_is_late_does_not_write_into_the_next_run() {
    let directory = tempfile::tempdir().unwrap();
    let (recorder, _) = recorder(directory.path(), Keep::Time(Duration::from_secs(3600)));
    let mut vm = Vm::new(77);
    let mut session = recorder.session(&vm::hello());
    let late: Arc<dyn Source> = Arc::new(Odd { settles_in: Duration::from_secs(4), ..Odd::default() });
    vm.commit(|checkpoint, _| session.commit(checkpoint, || late.clone()));
    wait("the first run begins", || recorder.report().run == Some(1));
    recorder.shared.pool.pretend_full(true);
    vm.commit(|checkpoint, usual| session.commit(checkpoint, usual));
    recorder.shared.pool.pretend_full(false);
    let end = Instant::now() + Duration::from_secs(6);
    while Instant::now() < end {
        vm.commit(|checkpoint, usual| session.commit(checkpoint, usual));
        std::thread::sleep(Duration::from_millis(2));
    }
    drop(session);
    drop(recorder);
    let record = Record::open(directory.path()).unwrap();
    assert!(record.runs().iter().all(|run| run.number() > 1), "{record:?}");
    assert!(compare_all(directory.path(), &vm, 200) > 2);
}

#[test]
fn what_the_guest_does_after_a_takeover_is_in_no_base() {
    let directory = tempfile::tempdir().unwrap();
    let (recorder, _) = recorder(directory.path(), Keep::Time(Duration::from_secs(3600)));
    let mut vm = Vm::new(5);
    let mut session = recorder.session(&vm::hello());
    let odd = Arc::new(Odd::default());
    vm.commit(|checkpoint, _| session.commit(checkpoint, || odd.clone()));
    wait("the first piece is read", || odd.was_read.load(Ordering::SeqCst));
    // In the rest behind it.
    std::thread::sleep(Duration::from_millis(30));
    session.finish("the VM was taken over");
    odd.is_gone.store(true, Ordering::SeqCst);
    drop(recorder);
    assert!(Record::open(directory.path()).is_err());
}

#[test]
fn a_session_that_is_over_holds_nothing_even_if_the_recorder_hangs() {
    let directory = tempfile::tempdir().unwrap();
    let (recorder, _) = recorder(directory.path(), Keep::Time(Duration::from_secs(3600)));
    let mut vm = Vm::new(5);
    let late = Arc::new(Odd { settles_in: Duration::from_secs(3), ..Odd::default() });
    let mut session = recorder.session(&vm::hello());
    vm.commit(|checkpoint, _| session.commit(checkpoint, || late.clone()));
    wait("a run begins", || recorder.report().run.is_some());
    // The recorder waits for the first one's thread, and takes nothing.
    session.finish("lost");
    for _ in 0..3 {
        let odd = Arc::new(Odd::default());
        let mut session = recorder.session(&vm::hello());
        vm.commit(|checkpoint, _| session.commit(checkpoint, || odd.clone()));
        session.finish("lost");
        assert_eq!(Arc::strong_count(&odd), 1);
    }
    let began = Instant::now();
    recorder.close();
    assert!(began.elapsed() < Duration::from_secs(30));
}

#[test]
fn what_no_recorder_has_made_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    fs::create_dir_all(path("2024/summer")).unwrap();
    let error = crate::check(directory.path()).unwrap_err().to_string();
    assert!(error.contains("no record"), "{error}");
    let (first, _) = recorder(directory.path(), Keep::Bytes(1 << 30));
    wait("it says so", || first.report().why.is_some_and(|why| why.contains("no record")));
    drop(first);
    assert!(path("2024/summer").exists() && !path("lock").exists());

    // In a record, too.
    fs::write(path("lock"), "").unwrap();
    fs::create_dir_all(path("00000001/mine")).unwrap();
    fs::create_dir_all(path("00000002")).unwrap();
    fs::write(path("00000002/memory"), "").unwrap();
    std::os::unix::fs::symlink(path("2024"), path("00000003")).unwrap();
    let (second, _) = recorder(directory.path(), Keep::Bytes(1 << 30));
    wait("what is half made goes", || !path("00000002").exists());
    drop(second);
    assert!(path("2024/summer").exists() && path("00000001/mine").exists() && path("00000003").exists());
}

#[test]
fn a_run_that_cannot_be_read_stays_and_stands_in_nobodys_way() {
    let directory = tempfile::tempdir().unwrap();
    let other = RunPlaces::of(directory.path(), 1);
    fs::write(directory.path().join("lock"), "").unwrap();
    other.make().unwrap();
    fs::write(other.base(), "outlive record 2\nfrom 1\n").unwrap();
    let (recorder, told) = recorder(directory.path(), Keep::Time(Duration::from_millis(100)));
    let mut vm = Vm::new(3);
    let mut session = recorder.session(&vm::hello());
    let from = || recorder.report().from.map(|(number, _)| number);
    let deadline = Instant::now() + Duration::from_secs(60);
    while from() <= Some(200) {
        assert!(Instant::now() < deadline, "{:?}", recorder.report());
        vm.commit(|checkpoint, usual| session.commit(checkpoint, usual));
        std::thread::sleep(Duration::from_micros(500));
    }
    assert!(other.base().exists());
    assert!(!told.lock().unwrap().iter().any(|it| matches!(it, Told::Gap { .. })), "{told:?}");
    assert_eq!(Record::open(directory.path()).unwrap().unread().len(), 1);
}

#[test]
fn a_run_without_its_first_segments_is_damaged() {
    let directory = tempfile::tempdir().unwrap();
    let (recorder, _) = recorder(directory.path(), Keep::Bytes(1 << 40));
    let mut vm = Vm::new(4);
    let mut session = recorder.session(&vm::hello());
    let mut left = 300;
    while left > 0 {
        left -= usize::from(recorder.report().from.is_some());
        vm.commit(|checkpoint, usual| session.commit(checkpoint, usual));
        std::thread::sleep(Duration::from_micros(500));
    }
    drop(session);
    drop(recorder);
    let record = Record::open(directory.path()).unwrap();
    let (run, newest) = (&record.runs()[0], record.find(&At::Newest).unwrap());
    let from = run.first().unwrap().checkpoint;
    let segments = crate::run::segments(run.places()).unwrap();
    let behind = segments.iter().position(|it| it.first > from).unwrap();
    segments[..behind].iter().for_each(|it| fs::remove_file(it.path(&run.places().directory)).unwrap());
    assert!(play(&record, At::Checkpoint { run: None, number: newest.checkpoint }).is_err());
    let record = Record::open(directory.path()).unwrap();
    assert!(
        record.runs().is_empty() && record.unread()[0].1.to_string().contains("are missing"),
        "{record:?}"
    );
}

#[test]
fn nobody_else_can_read_the_memory_of_a_vm() {
    let directory = tempfile::tempdir().unwrap();
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let set = |mode| fs::set_permissions(directory.path(), fs::Permissions::from_mode(mode)).unwrap();
    set(0o777);
    let error = crate::check(directory.path()).unwrap_err().to_string();
    assert!(error.contains("chmod go-w"), "{error}");
    set(0o755);
    crate::check(directory.path()).unwrap();
    let new = directory.path().join("new");
    crate::check(&new).unwrap();
    assert!(!new.exists(), "a look makes nothing");
    for record in [directory.path(), &new] {
        let (recorder, _) = recorder(record, Keep::Time(Duration::from_secs(3600)));
        let mut vm = Vm::new(6);
        let mut session = recorder.session(&vm::hello());
        vm.commit(|checkpoint, usual| session.commit(checkpoint, usual));
        let run = RunPlaces::of(record, 1);
        wait("a base begins", || run.memory().exists());
        assert_eq!(
            (mode(&run.directory), mode(&run.memory()), mode(&run.introduction())),
            (0o700, 0o600, 0o600)
        );
        drop(session);
        drop(recorder);
        if record == directory.path() {
            fs::remove_file(record.join("lock")).unwrap();
        }
    }
    assert_eq!(mode(&new), 0o700);
}

#[test]
fn times_within_a_run_only_grow() {
    let directory = tempfile::tempdir().unwrap();
    let (recorder, _) = recorder(directory.path(), Keep::Time(Duration::from_secs(3600)));
    let mut vm = Vm::new(8);
    let mut session = recorder.session(&vm::hello());
    let mut left = 40;
    while left > 0 {
        left -= usize::from(recorder.report().from.is_some());
        vm.commit(|checkpoint, usual| session.commit(checkpoint, usual));
        std::thread::sleep(Duration::from_micros(500));
    }
    drop(session);
    drop(recorder);
    let record = Record::open(directory.path()).unwrap();
    let (first, last) = (record.runs()[0].first().unwrap(), record.runs()[0].last().unwrap());
    let times = (first.checkpoint..=last.checkpoint)
        .map(|number| record.find(&At::Checkpoint { run: None, number }).unwrap().time)
        .collect::<Vec<_>>();
    assert!(times.is_sorted());
}
