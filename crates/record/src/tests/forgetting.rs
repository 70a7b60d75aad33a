//! What is old is forgotten, and the rest is as it was.

use super::*;
use crate::places::RunPlaces;

/// Commits until this has happened.
fn commit_until(vm: &mut Vm, session: &mut crate::Session, what: &str, done: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        vm.commit(|checkpoint, sources| session.commit(checkpoint, sources));
        std::thread::sleep(Duration::from_micros(500));
    }
}

#[test]
fn by_time_the_base_moves_on_and_every_checkpoint_is_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let keep = Duration::from_millis(300);
    let (recorder, told) = recorder(directory.path(), Keep::Time(keep));
    let mut vm = Vm::new(21);
    let mut session = recorder.session(&vm::hello());
    let from = || recorder.report().from.map(|(number, _)| number);
    commit_until(&mut vm, &mut session, "a base", || from().is_some());
    let first = from();
    commit_until(&mut vm, &mut session, "the base moves", || from() > first.map(|it| it + 400));
    drop(session);
    drop(recorder);
    assert!(!told.lock().unwrap().iter().any(|it| matches!(it, Told::Gap { .. })), "{told:?}");
    assert!(compare_all(directory.path(), &vm, 9) > 5);
}

#[test]
fn by_bytes_the_record_stays_within_them() {
    let directory = tempfile::tempdir().unwrap();
    let limit = 4 << 20;
    let (recorder, told) = recorder(directory.path(), Keep::Bytes(limit));
    let mut vm = Vm::new(22);
    let mut session = recorder.session(&vm::hello());
    let from = || recorder.report().from.map(|(number, _)| number);
    commit_until(&mut vm, &mut session, "a base", || from().is_some());
    let first = from();
    commit_until(&mut vm, &mut session, "the base moves", || from() > first.map(|it| it + 300));
    let takes = RunPlaces::of(directory.path(), 1).allocated().unwrap();
    drop(session);
    drop(recorder);
    // A look comes late, and a segment is forgotten as a whole.
    assert!(takes < limit * 2, "{takes}");
    assert!(!told.lock().unwrap().iter().any(|it| matches!(it, Told::Gap { .. })), "{told:?}");
    assert!(compare_all(directory.path(), &vm, 9) > 5);
}

#[test]
fn fewer_bytes_than_a_base_takes_are_said_to_be_too_few() {
    let directory = tempfile::tempdir().unwrap();
    let (recorder, _) = recorder(directory.path(), Keep::Bytes(64 << 10));
    let mut vm = Vm::new(23);
    let mut session = recorder.session(&vm::hello());
    let why = || recorder.report().why.unwrap_or_default();
    commit_until(&mut vm, &mut session, "it says so", || why().contains("give more"));
}

#[test]
fn who_plays_a_run_keeps_its_past() {
    let directory = tempfile::tempdir().unwrap();
    let (recorder, _) = recorder(directory.path(), Keep::Time(Duration::from_millis(100)));
    let mut vm = Vm::new(24);
    let mut session = recorder.session(&vm::hello());
    let from = || recorder.report().from.map(|(number, _)| number);
    commit_until(&mut vm, &mut session, "a base", || from().is_some());
    let record = Record::open(directory.path()).unwrap();
    let found = record.find(&At::Newest).unwrap();
    let playing = record.play(&found);
    let Ok(mut playing) = playing else { panic!("it was forgotten at once") };
    let end = Instant::now() + Duration::from_millis(500);
    commit_until(&mut vm, &mut session, "time passes", || Instant::now() > end);
    let mut machine = Machine::of_base(&playing);
    playing
        .each::<PlayError>(|incoming| {
            machine.apply(&incoming.checkpoint().unwrap());
            Ok(())
        })
        .unwrap();
    vm.compare(&machine);
    drop(playing);
    commit_until(&mut vm, &mut session, "it is forgotten", || from() > Some(found.checkpoint));
    assert!(matches!(record.play(&found), Err(PlayError::Forgotten { run: 1 })));
}

#[test]
fn runs_that_are_too_old_go_as_a_whole() {
    let directory = tempfile::tempdir().unwrap();
    let (recorder, _) = recorder(directory.path(), Keep::Time(Duration::from_millis(400)));
    for seed in [31, 32] {
        let mut vm = Vm::new(seed);
        let mut session = recorder.session(&vm::hello());
        let number = || recorder.report().run.filter(|_| recorder.report().from.is_some());
        commit_until(&mut vm, &mut session, "a base", || number().is_some());
        if seed == 32 {
            let gone = || !RunPlaces::of(directory.path(), 1).directory.exists();
            commit_until(&mut vm, &mut session, "the first run goes", gone);
        }
    }
    assert!(recorder.report().why.is_none(), "{:?}", recorder.report());
}
