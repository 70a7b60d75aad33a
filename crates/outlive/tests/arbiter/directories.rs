//! A directory that is missing, or is a different one, is not an arbiter.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use outlive::arbiter::{self, Arbiter, Claim, FileArbiter, Initialized};

use crate::support::{OTHER_VM, VM, claim_path, directory, empty, loser, names, open, why};

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

/// A host that knew the old directory cannot tell the new one from a mount point without its mount, so it
/// waits. The new directory is good for VMs that start from now on.
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
        // Somebody runs `init` on it again, and still no generation can be won.
        assert_lost_claims(open(directory.path()).claim(&VM, 2, "primary"));
        assert_eq!(names(directory.path()), ["outlive-arbiter"]);
    }
}

/// The standby's directory is mounted from the file system that also holds the mount point, and the mount
/// disappears: an empty directory with the same device number remains.
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
    // Running `init` on it does not help either.
    assert_lost_claims(open(&mount).claim(&VM, 2, "standby"));

    fs::rename(&mount, &bare).unwrap();
    fs::rename(&real, &mount).unwrap();
    assert_eq!(primary.claim(&VM, 2, "primary"), Claim::Won);
    assert_eq!(loser(standby.claim(&VM, 2, "standby")), "primary");
}

/// A claimant can be stopped just before it writes its claim, and the directory can be emptied meanwhile. The
/// claimant then finds its own claim there, all alone.
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

/// The mount point of a file server that is down is just an empty directory.
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

    // A directory with somebody else's files, and one that has claims but has lost its marker.
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

/// An arbiter of the previous release kept all claims side by side.
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
