//! Commits go on while the base is copied, and every checkpoint comes back as it was.

use super::*;

/// Records `checkpoints` of a VM behind the one with which its base was whole.
fn recorded(directory: &Path, seed: u64, checkpoints: usize) -> Vm {
    let (recorder, _) = recorder(directory, Keep::Time(Duration::from_secs(3600)));
    let mut vm = Vm::new(seed);
    vm.image_waits = seed * 150;
    let mut session = recorder.session(&vm::hello());
    // The run begins with a VM that has written already.
    recorder.shared.pool.pretend_full(true);
    (0..40).for_each(|_| vm.commit(|checkpoint, sources| session.commit(checkpoint, sources)));
    recorder.shared.pool.pretend_full(false);
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut left = checkpoints;
    while left > 0 {
        assert!(Instant::now() < deadline, "no base: {:?}", recorder.report());
        left -= usize::from(recorder.report().from.is_some());
        vm.commit(|checkpoint, sources| session.commit(checkpoint, sources));
        std::thread::sleep(Duration::from_micros(500));
    }
    drop(session);
    drop(recorder);
    vm
}

#[test]
fn every_checkpoint_comes_back_as_it_was() {
    for seed in 0..4 {
        let directory = tempfile::tempdir().unwrap();
        let vm = recorded(directory.path(), seed, 120);
        assert!(compare_all(directory.path(), &vm, 7) > 10, "seed {seed}");
    }
}

#[test]
fn a_moment_is_found_by_its_time() {
    let directory = tempfile::tempdir().unwrap();
    recorded(directory.path(), 1, 60);
    let record = Record::open(directory.path()).unwrap();
    let (first, last) = (record.runs()[0].first().unwrap(), record.runs()[0].last().unwrap());
    let all = (first.checkpoint..=last.checkpoint).map(|number| {
        let found = record.find(&At::Checkpoint { run: None, number }).unwrap();
        assert_eq!(found.checkpoint, number);
        found
    });
    for found in all {
        let same = record.find(&At::Time(found.time)).unwrap();
        assert!(same.checkpoint >= found.checkpoint && same.time == found.time, "{same:?} {found:?}");
        let before = found.time - Duration::from_micros(1);
        match record.find(&At::Time(before)) {
            Ok(earlier) => assert!(earlier.checkpoint < found.checkpoint && earlier.time <= before),
            Err(error) => assert!(found.time <= first.time, "{error}"),
        }
    }
    assert_eq!(record.find(&At::Newest).unwrap(), last);
    assert_eq!(record.find(&At::Time(last.time + Duration::from_secs(99))).unwrap(), last);
    let error =
        record.find(&At::Checkpoint { run: None, number: last.checkpoint + 1 }).unwrap_err().to_string();
    assert!(error.contains(&format!("{} to {}", first.checkpoint, last.checkpoint)), "{error}");
    assert!(record.find(&At::Checkpoint { run: Some(9), number: last.checkpoint }).is_err());
}

#[test]
fn what_comes_faster_than_it_can_be_written_is_a_gap_and_then_another_run() {
    let directory = tempfile::tempdir().unwrap();
    let (recorder, told) = recorder(directory.path(), Keep::Time(Duration::from_secs(3600)));
    let mut vm = Vm::new(5);
    let mut session = recorder.session(&vm::hello());
    let mut until = |vm: &mut Vm, what: &str, done: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done() {
            assert!(Instant::now() < deadline, "{what}");
            vm.commit(|checkpoint, sources| session.commit(checkpoint, sources));
            std::thread::sleep(Duration::from_micros(500));
        }
    };
    until(&mut vm, "a base", &|| recorder.report().from.is_some());
    let first = recorder.report().run;
    recorder.shared.pool.pretend_full(true);
    until(&mut vm, "a gap", &|| recorder.report().gaps > 0);
    recorder.shared.pool.pretend_full(false);
    until(&mut vm, "another run", &|| recorder.report().run > first && recorder.report().from.is_some());
    for _ in 0..20 {
        vm.commit(|checkpoint, sources| session.commit(checkpoint, sources));
    }
    drop(session);
    drop(recorder);
    assert!(
        matches!(&told.lock().unwrap()[2], Told::Gap { run: 1, why } if why.contains("faster")),
        "{told:?}"
    );
    let record = Record::open(directory.path()).unwrap();
    assert_eq!(record.runs().len(), 2);
    for run in record.runs() {
        let last = run.last().unwrap().checkpoint;
        vm.compare(&play(&record, At::Checkpoint { run: Some(run.number()), number: last }).unwrap());
    }
    assert!(compare_all(directory.path(), &vm, 3) > 5);
}

#[test]
fn a_run_whose_base_was_never_whole_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (recorder, _) = recorder(directory.path(), Keep::Time(Duration::from_secs(3600)));
    let mut vm = Vm::new(5);
    vm.reads_take = Duration::from_millis(50);
    let mut session = recorder.session(&vm::hello());
    for _ in 0..20 {
        vm.commit(|checkpoint, sources| session.commit(checkpoint, sources));
    }
    session.finish("enough");
    drop(recorder);
    assert!(matches!(Record::open(directory.path()), Err(crate::OpenError::Nothing(_))));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1, "its lock");
}

#[test]
fn two_do_not_record_in_one_place() {
    let directory = tempfile::tempdir().unwrap();
    let (_recorder, _) = recorder(directory.path(), Keep::Bytes(1 << 30));
    wait("it claims its place", || recorder_has(directory.path()));
    let (second, _) = recorder(directory.path(), Keep::Bytes(1 << 30));
    wait("the second one says so", || {
        second.report().why.is_some_and(|why| why.contains("another standby records"))
    });
}

fn recorder_has(directory: &Path) -> bool {
    matches!(crate::check(directory), Err(crate::ClaimError::Held(_)))
}
