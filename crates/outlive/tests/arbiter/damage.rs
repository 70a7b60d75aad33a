//! Files that are damaged, cut or left over.

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::{Duration, SystemTime};

use outlive::arbiter::{Arbiter, Claim, FileArbiter};
use proptest::prelude::*;

use crate::support::{VM, claim_path, directory, names, open, why};

#[test]
fn damage_is_never_a_win() {
    let directory = directory();
    let claim_file = |generation: u64| claim_path(directory.path(), generation);
    let mut arbiter = open(directory.path());
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
    let good = fs::read(claim_file(1)).unwrap();

    // Nor is it a loss: if all sides treated it as one, the VM would be gone for good.
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
    assert!(refusal.contains("restore it, or make a new arbiter in an empty directory"), "{refusal}");
    fs::write(&marker, &good).unwrap();
    assert_eq!(arbiter.claim(&VM, 1, "primary"), Claim::Won);
}
