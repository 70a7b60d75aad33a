//! The file arbiter under races of threads and processes, crashes, damage and missing directories.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Barrier;
use std::thread::{scope, sleep};
use std::time::{Duration, SystemTime};

use outlive::arbiter::{self, Arbiter, Claim, FileArbiter, Initialized, VmId};
use proptest::prelude::*;
use tempfile::TempDir;

const VM: VmId = VmId([0x5e; 16]);
const OTHER_VM: VmId = VmId([0x5f; 16]);
const ROUNDS: u64 = 1000;

/// A directory in memory if there is such a place: the races need many rounds, not a disk.
fn directory() -> TempDir {
    tempfile::Builder::new().prefix("outlive-arbiter-").tempdir_in(memory_or_temp()).unwrap()
}

fn memory_or_temp() -> PathBuf {
    let memory = Path::new("/dev/shm");
    if tempfile::tempfile_in(memory).is_ok() { memory.to_path_buf() } else { std::env::temp_dir() }
}

/// The arbiter in a directory, which is made one if it is none.
fn open(directory: &Path) -> FileArbiter {
    let made = || FileArbiter::init(directory).map(|(arbiter, _)| arbiter);
    FileArbiter::open(directory).or_else(|_| made()).unwrap()
}

/// All files in a directory and in those below it, and directories without a file.
fn names(directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let below = directory.join(&name);
        if fs::symlink_metadata(&below).unwrap().is_dir() {
            let inner = self::names(&below);
            names.extend(inner.iter().map(|inner| format!("{name}/{inner}")));
            if inner.is_empty() {
                names.push(format!("{name}/"));
            }
        } else {
            names.push(name);
        }
    }
    names.sort();
    names
}

fn empty(directory: &Path, keep: &str) {
    for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
        if entry.file_type().unwrap().is_dir() {
            fs::remove_dir_all(entry.path()).unwrap();
        } else if entry.file_name() != keep {
            fs::remove_file(entry.path()).unwrap();
        }
    }
}

fn why(claim: Claim) -> String {
    match claim {
        Claim::Unreachable { why } => why,
        other => panic!("expected Unreachable, got {other:?}"),
    }
}

fn loser(claim: Claim) -> String {
    match claim {
        Claim::Lost { owner } => owner,
        other => panic!("expected Lost, got {other:?}"),
    }
}

#[test]
fn of_many_threads_exactly_one_wins_and_the_others_know_who() {
    const THREADS: usize = 8;
    let directory = directory();
    let barrier = Barrier::new(THREADS);
    let results: Vec<Vec<Claim>> = scope(|threads| {
        let racer = |number: usize| {
            let (barrier, path) = (&barrier, directory.path());
            move || {
                // The directory itself is opened in a race too: all must agree which arbiter it is.
                barrier.wait();
                let mut arbiter = open(path);
                let owner = format!("thread {number}");
                let claim = |generation| {
                    barrier.wait();
                    arbiter.claim(&VM, generation, &owner)
                };
                (1..=ROUNDS).map(claim).collect()
            }
        };
        let racers: Vec<_> = (0..THREADS).map(|number| threads.spawn(racer(number))).collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    for round in 0..ROUNDS as usize {
        let claims: Vec<&Claim> = results.iter().map(|claims| &claims[round]).collect();
        let winners: Vec<usize> = (0..THREADS).filter(|&thread| *claims[thread] == Claim::Won).collect();
        let [winner] = winners[..] else { panic!("round {round}: winners {winners:?}") };
        let lost = Claim::Lost { owner: format!("thread {winner}") };
        assert!(
            claims.iter().enumerate().all(|(thread, claim)| thread == winner || **claim == lost),
            "{claims:?}"
        );
    }
    assert_eq!(open(directory.path()).highest(&VM), Ok(Some(ROUNDS)));
    assert_eq!(names(directory.path()).len(), ROUNDS as usize + 1, "the marker and one file a generation");
}

const RACER_DIRECTORY: &str = "OUTLIVE_TEST_RACER";

/// Not a test by itself: what the racing processes run. Claims one generation after the other and says which
/// it won.
#[test]
fn racer() {
    let Ok(directory) = std::env::var(RACER_DIRECTORY) else { return };
    let mut arbiter = open(Path::new(&directory));
    // All racers use one name on purpose: only the process tells them apart.
    println!("\nready");
    while !Path::new(&directory).join("go").exists() {
        std::hint::spin_loop();
    }
    for generation in 1..=ROUNDS {
        match arbiter.claim(&VM, generation, "racer") {
            Claim::Won => println!("\nwon {generation}"),
            Claim::Lost { .. } => {}
            Claim::Unreachable { why } => panic!("{why}"),
        }
    }
}

fn start_racer(directory: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["racer", "--exact", "--nocapture"])
        .env(RACER_DIRECTORY, directory)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// The generations that a racer says it won. Reads until the racer ends.
fn wins(racer: &mut Child) -> Vec<u64> {
    let lines = BufReader::new(racer.stdout.take().unwrap()).lines().map_while(Result::ok);
    lines.filter_map(|line| line.strip_prefix("won ")?.parse().ok()).collect()
}

#[test]
fn of_many_processes_exactly_one_wins() {
    let directory = directory();
    let mut racers: Vec<Child> = (0..6).map(|_| start_racer(directory.path())).collect();
    sleep(Duration::from_millis(300));
    fs::write(directory.path().join("go"), "").unwrap();
    let mut winners = BTreeMap::new();
    for (number, racer) in racers.iter_mut().enumerate() {
        for generation in wins(racer) {
            let earlier = winners.insert(generation, number);
            assert_eq!(earlier, None, "generation {generation} was won twice");
        }
        assert!(racer.wait().unwrap().success());
    }
    assert!(winners.keys().copied().eq(1..=ROUNDS), "every generation was won by somebody");
}

/// Whatever a killed process had won stays won; whatever it was doing harms nobody.
#[test]
fn a_claimant_killed_at_any_moment_leaves_no_second_winner() {
    for round in 0..12_u64 {
        let directory = directory();
        open(directory.path());
        fs::write(directory.path().join("go"), "").unwrap();
        let mut racers = [start_racer(directory.path()), start_racer(directory.path())];
        sleep(Duration::from_millis(20 + 7 * round));
        racers.iter_mut().for_each(|racer| racer.kill().unwrap());
        let won: Vec<u64> = racers.iter_mut().flat_map(wins).collect();
        for racer in &mut racers {
            racer.wait().unwrap();
        }

        let mut successor = open(directory.path());
        let highest = successor.highest(&VM).unwrap().unwrap_or(0);
        for generation in won {
            assert_eq!(loser(successor.claim(&VM, generation, "racer")), "racer", "generation {generation}");
        }
        assert_eq!(successor.claim(&VM, highest + 1, "racer"), Claim::Won);
    }
}

#[test]
fn a_repeated_claim_is_won_again_but_not_by_another() {
    let directory = directory();
    let mut arbiter = open(directory.path());
    assert_eq!(arbiter.highest(&VM), Ok(None));
    for _ in 0..3 {
        assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    }
    // The same process may have opened it twice.
    assert_eq!(open(directory.path()).claim(&VM, 1, "primary"), Claim::Won);
    assert_eq!(loser(arbiter.claim(&VM, 1, "standby")), "primary");
    // Another VM is another matter.
    assert_eq!(arbiter.claim(&OTHER_VM, 1, "standby"), Claim::Won);
    assert_eq!(arbiter.claim(&OTHER_VM, 2, "standby"), Claim::Won);
    assert_eq!(arbiter.highest(&VM), Ok(Some(1)));
    assert_eq!(arbiter.highest(&OTHER_VM), Ok(Some(2)));
    let history = arbiter.history(&OTHER_VM).unwrap();
    let owners: Vec<_> =
        history.iter().map(|win| (win.generation, &*win.winner.as_ref().unwrap().owner)).collect();
    assert_eq!(owners, [(1, "standby"), (2, "standby")]);
    assert!(
        history.iter().all(|win| win.winner.as_ref().unwrap().process == arbiter::process_token().unwrap())
    );
    assert_eq!(names(directory.path()).len(), 4, "nothing but the marker and the claims");
}

/// A host that was stopped for long must not win an old generation whose file was tidied away.
#[test]
fn a_generation_below_the_highest_cannot_be_won() {
    let directory = directory();
    let mut arbiter = open(directory.path());
    for generation in 1..=5 {
        assert_eq!(arbiter.claim(&VM, generation, "standby"), Claim::Won);
    }
    for generation in 1..=4 {
        fs::remove_file(claim_path(directory.path(), generation)).unwrap();
    }
    assert!(loser(arbiter.claim(&VM, 4, "primary")).contains("generation 5, which is newer"));
    assert_eq!(arbiter.claim(&VM, 6, "primary"), Claim::Won);
    // The winner of an old one is still its winner.
    assert_eq!(arbiter.claim(&VM, 5, "standby"), Claim::Won);
}

#[test]
fn an_unreachable_directory_is_said_to_be_and_works_when_it_is_back() {
    let parent = directory();
    let (path, away) = (parent.path().join("arbiter"), parent.path().join("away"));
    fs::create_dir(&path).unwrap();
    let mut arbiter = open(&path);
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);

    fs::rename(&path, &away).unwrap();
    for _ in 0..2 {
        let why = why(arbiter.claim(&VM, 2, "primary"));
        assert!(why.contains(path.to_str().unwrap()) && why.contains("put it back"), "{why}");
    }
    assert!(arbiter.highest(&VM).is_err());
    assert!(!path.exists(), "the directory must not be created");
    fs::write(&path, "a file").unwrap();
    assert!(why(arbiter.claim(&VM, 2, "primary")).contains("Not a directory"));
    fs::remove_file(&path).unwrap();
    fs::rename(&away, &path).unwrap();
    assert_eq!(loser(arbiter.claim(&VM, 1, "standby")), "primary");
    assert_eq!(arbiter.claim(&VM, 2, "primary"), Claim::Won);
}

/// Those that knew the old directory cannot tell the new one from a mount point without its mount, so they
/// wait. It is a good directory for VMs that are started from now on.
#[test]
fn a_directory_made_anew_in_its_place_is_no_arbiter_for_those_that_knew_the_old_one() {
    let parent = directory();
    let path = parent.path().join("arbiter");
    fs::create_dir(&path).unwrap();
    let (mut here, mut there) = (open(&path), open(&path));
    assert_eq!(here.identity(), there.identity());
    assert_eq!(here.claim(&VM, 1, "here"), Claim::Won);
    fs::remove_dir_all(&path).unwrap();
    assert!(why(here.claim(&VM, 2, "here")).contains("put it back"));
    fs::create_dir(&path).unwrap();
    for (arbiter, owner) in [(&mut here, "here"), (&mut there, "there")] {
        for generation in [1, 2] {
            assert_lost_claims(arbiter.claim(&VM, generation, owner));
        }
        assert!(arbiter.highest(&VM).is_err());
    }
    assert!(names(&path).is_empty(), "nothing may be written there");
    let mut fresh = open(&path);
    assert_eq!(fresh.claim(&OTHER_VM, 1, "fresh"), Claim::Won);
    assert_lost_claims(fresh.claim(&VM, 2, "fresh"));
    assert!(why(here.claim(&VM, 2, "here")).contains("now another arbiter"));
}

/// The primary is stopped, the standby takes over, somebody empties the directory, the primary continues.
#[test]
fn a_generation_cannot_be_won_again_after_the_directory_was_emptied() {
    for keep_marker in [false, true] {
        let directory = directory();
        let (mut primary, mut standby) = (open(directory.path()), open(directory.path()));
        assert_eq!(primary.claim(&VM, 1, "primary"), Claim::Won);
        assert_eq!(standby.claim(&VM, 2, "standby"), Claim::Won);
        empty(directory.path(), if keep_marker { "outlive-arbiter" } else { "" });
        for generation in 2..5 {
            assert_lost_claims(primary.claim(&VM, generation, "primary"));
            assert_lost_claims(standby.claim(&VM, generation, "standby"));
        }
        // Somebody makes it an arbiter anew, and still no generation can be won.
        assert_lost_claims(open(directory.path()).claim(&VM, 2, "primary"));
        assert_eq!(names(directory.path()), ["outlive-arbiter"]);
    }
}

/// The standby's directory was mounted from the same file system that the mount point is on, and the mount
/// disappears: there is an empty directory with the same device number.
#[test]
fn a_mount_point_on_the_same_file_system_is_no_arbiter() {
    let parent = directory();
    let in_parent = |name: &str| parent.path().join(name);
    let (real, mount, bare) = (in_parent("real"), in_parent("mount"), in_parent("bare"));
    fs::create_dir(&mount).unwrap();
    fs::create_dir(&bare).unwrap();
    let (mut primary, mut standby) = (open(&mount), open(&mount));
    assert_eq!(primary.claim(&VM, 1, "primary"), Claim::Won);

    fs::rename(&mount, &real).unwrap();
    fs::rename(&bare, &mount).unwrap();
    assert_eq!(device(&real), device(&mount));
    assert_lost_claims(standby.claim(&VM, 2, "standby"));
    assert!(standby.highest(&VM).is_err());
    assert!(names(&mount).is_empty(), "nothing may be written there");
    // Neither does it help to make it an arbiter.
    assert_lost_claims(open(&mount).claim(&VM, 2, "standby"));

    fs::rename(&mount, &bare).unwrap();
    fs::rename(&real, &mount).unwrap();
    assert_eq!(primary.claim(&VM, 2, "primary"), Claim::Won);
    assert_eq!(loser(standby.claim(&VM, 2, "standby")), "primary");
}

/// A claimant can be stopped just before it writes its claim, and the directory be emptied meanwhile. It then
/// finds its own claim there, all alone.
#[test]
fn a_claim_written_into_an_emptied_directory_is_not_won() {
    let directory = directory();
    let mut arbiter = open(directory.path());
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    assert_eq!(arbiter.claim(&VM, 2, "primary"), Claim::Won);
    fs::remove_file(claim_path(directory.path(), 1)).unwrap();
    assert_lost_claims(open(directory.path()).claim(&VM, 2, "primary"));
    assert_eq!(arbiter.claim(&VM, 2, "primary"), Claim::Won, "what was won stays won");
}

fn claim_path(directory: &Path, generation: u64) -> PathBuf {
    directory.join(VM.to_string()).join(generation.to_string())
}

fn assert_lost_claims(claim: Claim) {
    let why = why(claim);
    assert!(why.contains("has lost the claims of this VM: bring the right directory back"), "{why}");
}

/// A mount point without its mount is an empty directory: a win there would be a win on this host only.
#[test]
fn a_directory_that_is_not_the_one_of_the_start_is_no_arbiter() {
    let parent = directory();
    let (shared, other, path) =
        (parent.path().join("shared"), parent.path().join("other"), parent.path().join("mount"));
    fs::create_dir(&shared).unwrap();
    fs::create_dir(&other).unwrap();
    symlink(&shared, &path).unwrap();
    let mut arbiter = open(&path);
    let mut redirect = |to: &Path| {
        fs::remove_file(&path).unwrap();
        symlink(to, &path).unwrap();
        arbiter.claim(&VM, 1, "primary")
    };
    assert_ne!(open(&other).identity(), open(&shared).identity());
    let reason = why(redirect(&other));
    assert!(reason.contains("now another arbiter"), "{reason}");
    assert_eq!(redirect(&shared), Claim::Won);
}

#[test]
fn a_mount_point_without_its_mount_is_no_arbiter() {
    let (shared, bare) = (directory(), tempfile::tempdir().unwrap());
    if device(bare.path()) == device(shared.path()) {
        println!("skipped: there is only one file system");
        return;
    }
    let links = directory();
    let path = links.path().join("mount");
    symlink(shared.path(), &path).unwrap();
    let mut arbiter = open(&path);
    fs::remove_file(&path).unwrap();
    symlink(bare.path(), &path).unwrap();
    let reason = why(arbiter.claim(&VM, 1, "primary"));
    assert!(reason.contains("another file system"), "{reason}");
    assert!(names(bare.path()).is_empty(), "nothing may be written there");
}

fn device(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::dev(&fs::metadata(path).unwrap())
}

#[test]
fn damage_is_never_a_win() {
    let directory = directory();
    let claim_file = |generation: u64| claim_path(directory.path(), generation);
    let mut arbiter = open(directory.path());
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    let good = fs::read(claim_file(1)).unwrap();

    // Nor is it a loss: if all sides took it for one, the VM would be gone for good.
    let mut nobodys = |generation: u64| {
        let why = why(arbiter.claim(&VM, generation, "primary"));
        assert!(why.contains("is damaged") && why.contains("and delete the file"), "{why}");
    };
    let contents: [&[u8]; 5] = [b"", b"\n", b"garbage", &[0xff; 300], &[b'x'; 100_000]];
    for (generation, content) in (10..).zip(contents) {
        fs::write(claim_file(generation), content).unwrap();
        nobodys(generation);
    }
    fs::create_dir(claim_file(20)).unwrap();
    nobodys(20);
    symlink("/no/such/file", claim_file(21)).unwrap();
    nobodys(21);
    // Opening a pipe without a writer would block forever.
    assert!(Command::new("mkfifo").arg(claim_file(22)).status().unwrap().success());
    nobodys(22);
    for length in 0..good.len() {
        fs::write(claim_file(1), &good[..length]).unwrap();
        nobodys(1);
    }
    fs::write(claim_file(1), &good).unwrap();
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
}

#[test]
fn a_flipped_bit_is_never_a_win() {
    let directory = directory();
    let mut arbiter = open(directory.path());
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    let path = claim_path(directory.path(), 1);
    let good = fs::read(&path).unwrap();
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(at in 0..good.len(), bit in 0..8_u8)| {
        let mut bad = good.clone();
        bad[at] ^= 1_u8 << bit;
        fs::write(&path, &bad).unwrap();
        let claim = open(directory.path()).claim(&VM, 1, "primary");
        prop_assert!(claim != Claim::Won, "{:?}", claim);
    });
}

#[test]
fn an_owner_of_any_characters_is_kept_in_one_line() {
    let directory = directory();
    let mut arbiter = open(directory.path());
    let owners = ["", "a\nowner b", "\0", &"x".repeat(5000), "zweiter \u{1f980}"];
    for (generation, owner) in (1..).zip(owners) {
        assert_eq!(arbiter.claim(&VM, generation, owner), Claim::Won);
        assert_eq!(arbiter.claim(&VM, generation, owner), Claim::Won);
        let shown = loser(arbiter.claim(&VM, generation, "somebody else"));
        assert!(!shown.contains('\n') && shown.chars().count() <= 200, "{shown}");
        assert!(!shown.contains("damaged"), "{shown}");
    }
}

#[test]
fn leftovers_of_crashes_are_removed_and_nothing_else() {
    let directory = directory();
    let mut arbiter = open(directory.path());
    let put = |name: &str, age: u64| {
        let file = File::create(directory.path().join(name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(age)).unwrap();
    };
    put(".outlive-old-0.tmp", 3600);
    put(".outlive-young-0.tmp", 5);
    put(".somebody-elses.tmp", 3600);
    put("notes", 3600);
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    arbiter.tidy(&VM);
    let claim = format!("{VM}/1");
    let mut expected =
        vec![".outlive-young-0.tmp", ".somebody-elses.tmp", "notes", "outlive-arbiter", &claim];
    expected.sort_unstable();
    assert_eq!(names(directory.path()), expected);
}

#[test]
fn a_damaged_marker_stops_claims_until_it_is_repaired() {
    let directory = directory();
    let marker = directory.path().join("outlive-arbiter");
    let mut arbiter = open(directory.path());
    let good = fs::read(&marker).unwrap();
    fs::write(&marker, &good[..good.len() - 1]).unwrap();
    assert!(why(arbiter.claim(&VM, 1, "primary")).contains("outlive-arbiter is damaged"));
    let refusal = FileArbiter::open(directory.path()).map(drop).unwrap_err().to_string();
    assert!(refusal.contains("restore it, or delete it"), "{refusal}");
    fs::write(&marker, &good).unwrap();
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
}

/// The mount point of a file server that is down is an empty directory like any other.
#[test]
fn a_directory_becomes_an_arbiter_by_an_explicit_command_only() {
    let directory = directory();
    let refusal = |path: &Path| FileArbiter::open(path).map(drop).unwrap_err().to_string();
    let said = refusal(directory.path());
    let remedy = format!("`outlive arbiter init file:{}`", directory.path().display());
    assert!(said.contains("is not an arbiter: mount") && said.contains(&remedy), "{said}");
    assert!(arbiter::parse(&format!("file:{}", directory.path().display())).is_err());
    assert!(names(directory.path()).is_empty(), "nothing may be written there");

    let (made, done) = FileArbiter::init(directory.path()).unwrap();
    assert_eq!(done, Initialized::Made);
    let (again, done) = FileArbiter::init(directory.path()).unwrap();
    assert_eq!((done, again.identity()), (Initialized::Already, made.identity()));
    assert_eq!(open(directory.path()).identity(), made.identity());

    // A directory with files of somebody else, and one that has claims and has lost its marker.
    let mut arbiter = open(directory.path());
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    fs::remove_file(directory.path().join("outlive-arbiter")).unwrap();
    let init = |path: &Path| FileArbiter::init(path).map(drop).unwrap_err().to_string();
    let said = init(directory.path());
    assert!(said.contains("cannot become an arbiter") && said.contains(&VM.to_string()), "{said}");
    let strange = self::directory();
    fs::write(strange.path().join("letter.txt"), "").unwrap();
    assert!(init(strange.path()).contains("letter.txt"));
    assert_eq!(names(strange.path()), ["letter.txt"]);
}

/// Of many that make a directory an arbiter at once, all get the same one.
#[test]
fn an_arbiter_is_made_once() {
    for _ in 0..50 {
        let directory = directory();
        let barrier = Barrier::new(4);
        let identities: Vec<String> = scope(|threads| {
            let make = || {
                barrier.wait();
                FileArbiter::init(directory.path()).unwrap().0.identity().to_owned()
            };
            let makers: Vec<_> = (0..4).map(|_| threads.spawn(make)).collect();
            makers.into_iter().map(|maker| maker.join().unwrap()).collect()
        });
        assert!(identities.iter().all(|it| *it == identities[0]), "{identities:?}");
    }
}

const KEPT: u64 = 8;

#[test]
fn old_claims_go_and_their_generations_cannot_be_won_again() {
    let directory = directory();
    let mut arbiter = open(directory.path());
    let claim_all = |arbiter: &mut FileArbiter, end: u64| {
        (1..=end).for_each(|generation| assert_eq!(arbiter.claim(&VM, generation, "late"), Claim::Won));
    };
    claim_all(&mut arbiter, 20);
    arbiter.tidy(&VM);
    let left: Vec<u64> = arbiter.history(&VM).unwrap().iter().map(|win| win.generation).collect();
    assert_eq!(left, (20 - KEPT + 1..=20).collect::<Vec<_>>());
    let mut stranger = open(directory.path());
    for generation in 1..=20 - KEPT {
        let lost = loser(stranger.claim(&VM, generation, "stranger"));
        assert!(lost.contains("generation 20, which is newer, late"), "{lost}");
    }

    // Claimants that were stopped between their look and their claim, while all others came and went: they
    // find their own claims, alone in their places.
    let elsewhere = self::directory();
    claim_all(&mut open(elsewhere.path()), 5);
    for generation in [4, 5] {
        fs::copy(claim_path(elsewhere.path(), generation), claim_path(directory.path(), generation)).unwrap();
        let lost = loser(open(directory.path()).claim(&VM, generation, "late"));
        assert!(lost.contains("generation 20, which is newer"), "{lost}");
    }
    // Nor does that claim help anybody to the next generation.
    assert!(loser(open(directory.path()).claim(&VM, 6, "late")).contains("generation 20"));
    assert_eq!(stranger.claim(&VM, 21, "stranger"), Claim::Won);
    assert_eq!(stranger.highest(&VM), Ok(Some(21)));
}

/// Everybody tidies up all the time.
#[test]
fn with_claims_going_all_the_time_exactly_one_wins() {
    const THREADS: usize = 4;
    let directory = directory();
    let barrier = Barrier::new(THREADS);
    let wins: Vec<Vec<u64>> = scope(|threads| {
        let racer = |number: usize| {
            let (barrier, path) = (&barrier, directory.path());
            move || {
                let mut arbiter = open(path);
                let owner = format!("thread {number}");
                let mut won = Vec::new();
                for generation in 1..=400 {
                    barrier.wait();
                    match arbiter.claim(&VM, generation, &owner) {
                        Claim::Won => won.push(generation),
                        Claim::Lost { .. } => {}
                        Claim::Unreachable { why } => panic!("{why}"),
                    }
                    arbiter.tidy(&VM);
                }
                won
            }
        };
        let racers: Vec<_> = (0..THREADS).map(|number| threads.spawn(racer(number))).collect();
        racers.into_iter().map(|racer| racer.join().unwrap()).collect()
    });
    let mut all = wins.concat();
    all.sort_unstable();
    assert!(all.into_iter().eq(1..=400), "every generation was won once");
    let names = names(directory.path());
    let is_claim = |name: &&String| !name.contains('.') && name.contains('/');
    assert_eq!(names.iter().filter(is_claim).count() as u64, KEPT, "{names:?}");
    assert!(names.len() as u64 <= KEPT + 3, "the claims, the marker, what was pruned: {names:?}");
}

/// An arbiter of the release before kept all claims side by side.
#[test]
fn an_arbiter_of_an_earlier_release_is_brought_up_to_date() {
    let directory = directory();
    let marker = directory.path().join("outlive-arbiter");
    let old = |generation: u64| directory.path().join(format!("{VM}.{generation}"));
    fs::write(&marker, "outlive arbiter directory, version 1\nid 0123456789abcdef\nend\n").unwrap();
    for generation in 1..=3 {
        let text = format!(
            "outlive claim, version 1\nvm {VM}\ngeneration {generation}\nowner host {generation}\ntoken 77\nend\n"
        );
        fs::write(old(generation), text).unwrap();
    }
    let said = FileArbiter::open(directory.path()).map(drop).unwrap_err().to_string();
    assert!(said.contains("by an earlier release") && said.contains("`outlive arbiter init file:"), "{said}");
    // Interrupted after the first claim.
    fs::create_dir(directory.path().join(VM.to_string())).unwrap();
    fs::rename(old(1), claim_path(directory.path(), 1)).unwrap();

    let (mut arbiter, done) = FileArbiter::init(directory.path()).unwrap();
    assert_eq!((done, arbiter.identity()), (Initialized::Upgraded, "0123456789abcdef"));
    assert_eq!(loser(arbiter.claim(&VM, 3, "late")), "host 3");
    assert_eq!(arbiter.claim(&VM, 4, "next"), Claim::Won);
    let names = names(directory.path());
    assert!(names.iter().all(|name| !name.contains('.')), "{names:?}");
}
