//! A record is good at every moment, whatever ends the host.

use std::fs;

use super::*;

/// Where the process that is killed records; see [`victim`].
const DIRECTORY: &str = "OUTLIVE_TEST_RECORD";
/// The VM of that process.
const SEED: u64 = 11;

/// Records without an end, in a process of its own.
#[test]
#[ignore = "another test starts it"]
fn victim() {
    let Some(directory) = std::env::var_os(DIRECTORY) else { return };
    let (recorder, _) = recorder(Path::new(&directory), Keep::Time(Duration::from_millis(100)));
    let mut vm = Vm::new(SEED);
    let mut session = recorder.session(&vm::hello());
    loop {
        vm.commit(|checkpoint, sources| session.commit(checkpoint, sources));
        std::thread::sleep(Duration::from_micros(300));
    }
}

#[test]
fn a_recorder_that_is_killed_at_any_moment_leaves_what_it_promises() {
    let directory = tempfile::tempdir().unwrap();
    let mut random = fastrand::Rng::new();
    let (mut had, mut folded, mut killed) = (0, 0, 0);
    while had <= 10 || folded == 0 {
        killed += 1;
        assert!(killed < 100, "{had} checkpoints, {folded} of a base that had moved");
        let mut victim = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::torn::victim", "--ignored"])
            .env(DIRECTORY, directory.path())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(random.u64(200..800) + 20 * killed));
        victim.kill().unwrap();
        victim.wait().unwrap();
        let Ok(record) = Record::open(directory.path()) else { continue };
        assert!(record.unread().is_empty(), "{:?}", record.unread());
        let Some(run) = record.runs().last() else { continue };
        let (first, last) = (run.first().unwrap().checkpoint, run.last().unwrap().checkpoint);
        folded += u64::from(crate::run::segments(run.places()).unwrap()[0].first > 1);
        // The same VM again.
        let mut vm = Vm::new(SEED);
        (0..last).for_each(|_| vm.commit(|_, _| ()));
        for number in [first, (first + last) / 2, last] {
            vm.compare(&play(&record, At::Checkpoint { run: Some(run.number()), number }).unwrap());
            had += 1;
        }
    }
}

#[test]
fn a_log_that_ends_at_any_byte_is_good_up_to_its_last_whole_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let limits = Limits { segment_time: Duration::from_secs(60), segment_bytes: 1 << 30, ..QUICK };
    let (recorder, _) = recorder_with(limits, directory.path(), Keep::Time(Duration::from_secs(3600)));
    let mut vm = Vm::new(3);
    let mut session = recorder.session(&vm::hello());
    let mut after = 0;
    while after < 100 {
        after += u64::from(recorder.report().from.is_some());
        vm.commit(|checkpoint, sources| session.commit(checkpoint, sources));
        std::thread::sleep(Duration::from_micros(500));
    }
    drop(session);
    drop(recorder);
    let run = crate::places::RunPlaces::of(directory.path(), 1);
    let newest = crate::run::segments(&run).unwrap().pop().unwrap().path(&run.directory);
    let whole = fs::read(&newest).unwrap();
    let last = Record::open(directory.path()).unwrap().find(&At::Newest).unwrap().checkpoint;
    let mut seen = std::collections::BTreeSet::new();
    let mut random = fastrand::Rng::with_seed(4);
    for _ in 0..150 {
        // Most of them where something can be had.
        let least = if random.u8(..4) == 0 { 0 } else { whole.len() / 2 };
        let mut bytes = whole[..random.usize(least..=whole.len())].to_vec();
        // As a file system leaves it that has written the length and not the data, or with a byte that is another one.
        match random.u8(..3) {
            0 => bytes.resize(whole.len(), 0),
            1 if !bytes.is_empty() => {
                let at = random.usize(..bytes.len());
                bytes[at] ^= 1 << random.u8(..8);
            }
            _ => {}
        }
        fs::write(&newest, &bytes).unwrap();
        let Ok(record) = Record::open(directory.path()) else { continue };
        let Ok(found) = record.find(&At::Newest) else { continue };
        assert!(found.checkpoint <= last);
        seen.insert(found.checkpoint);
        vm.compare(&play(&record, At::Newest).unwrap());
    }
    assert!(seen.len() > 2, "{seen:?}");
}

#[test]
fn a_full_disk_is_a_gap_and_no_more() {
    let directory = tempfile::tempdir().unwrap();
    let Ok(small) = Small::mount(directory.path(), 1) else {
        return eprintln!("skipped: cannot mount a tmpfs");
    };
    let (recorder, told) = recorder(directory.path(), Keep::Time(Duration::from_secs(3600)));
    let mut vm = Vm::new(3);
    let mut session = recorder.session(&vm::hello());
    let deadline = Instant::now() + Duration::from_secs(60);
    while recorder.report().gaps < 3 {
        assert!(Instant::now() < deadline, "{:?}", recorder.report());
        vm.commit(|checkpoint, sources| session.commit(checkpoint, sources));
        std::thread::sleep(Duration::from_micros(500));
    }
    drop(session);
    drop(recorder);
    let gaps = told.lock().unwrap().iter().filter(|it| matches!(it, Told::Gap { .. })).count();
    assert!(gaps >= 3, "{told:?}");
    // What is left is good.
    if let Ok(record) = Record::open(directory.path())
        && let Ok(found) = record.find(&At::Newest)
    {
        vm.compare(
            &play(&record, At::Checkpoint { run: Some(found.run), number: found.checkpoint }).unwrap(),
        );
    }
    drop(small);
}

/// A small file system.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(at: &'a Path, mib: u64) -> Result<Self, ()> {
        let size = format!("size={mib}m");
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "outlive-test"])
            .arg(at)
            .status();
        mount.ok().filter(|it| it.success()).map(|_| Self(at)).ok_or(())
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        std::process::Command::new("umount").arg("-l").arg(self.0).status().ok();
    }
}
