//! Keys and CAs are replaced under a protected VM, by the commands of docs/trust.md.

use std::fs;
use std::path::Path;
use std::process::Command;

use outlive::events::Event;
use outlive::keys;

use crate::support::{PROGRAM, Process, Side, Witnesses, World};

/// `outlive keys` with these words, on the host with the CA.
fn outlive_keys(world: &World, words: &[&str]) {
    let mut command = Command::new(PROGRAM);
    let said = command.arg("keys").args(words).arg("--keys").arg(world.keys(Side::A)).output().unwrap();
    assert!(said.status.success(), "{words:?}: {}", String::from_utf8_lossy(&said.stderr));
}

/// As `scp` does: what is in the files changes, and the files stay.
fn copy(from: &Path, to: &Path, names: &[&str]) {
    for name in names {
        fs::copy(from.join(name), to.join(name)).unwrap();
    }
}

/// The link that was there before is still there, and the next one can be made, too.
fn goes_on(world: &World, primary: &mut Process, standby: Process, witnesses: &Witnesses) -> Process {
    witnesses.hear_all();
    let lost = |e: &Event| matches!(e, Event::LinkLost { .. });
    let before = primary.events().filter(|e| lost(e)).count();
    assert_eq!(before, standbys_before(primary), "each standby but the last one was killed by this test");
    standby.kill();
    primary.wait_for("without its standby", lost);
    let standby = world.standby(Side::B);
    primary.wait_protected();
    witnesses.hear_all();
    standby
}

fn standbys_before(primary: &mut Process) -> usize {
    primary.events().filter(|e| matches!(e, Event::Protected { .. })).count() - 1
}

#[test]
fn keys_and_the_ca_are_replaced_under_a_protected_vm() {
    let Some(world) = World::new() else { return };
    let (a, b) = (world.keys(Side::A), world.keys(Side::B));
    let (mut primary, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    let old = keys::load(&a).unwrap().host.ca;

    outlive_keys(&world, &["rotate", "--ca"]);
    copy(&a, &b, &["ca.crt"]);
    standby = goes_on(&world, &mut primary, standby, &witnesses);

    for (host, options) in [("hostb", &[][..]), ("third", &["--arbiter"])] {
        let new = world.dir().join(host).display().to_string();
        outlive_keys(&world, &[&["issue", "--host", host, "--to", &new], options].concat());
    }
    copy(&world.dir().join("hostb"), &b, &["ca.crt", "host.pem", "revoked"]);
    standby = goes_on(&world, &mut primary, standby, &witnesses);

    outlive_keys(&world, &["rotate"]);
    standby = goes_on(&world, &mut primary, standby, &witnesses);

    outlive_keys(&world, &["rotate", "--forget-old-cas"]);
    copy(&a, &b, &["ca.crt"]);
    let mut standby = goes_on(&world, &mut primary, standby, &witnesses);
    for keys in [&a, &b] {
        let keys = keys::load(keys).unwrap();
        assert!(keys.cas.len() == 1 && keys.host.ca != old, "nothing of the old CA is left");
    }
    primary.kill();
    standby.wait_takeover();
    witnesses.hear_all();
    let _again = world.standby(Side::A);
    standby.wait_protected();
    witnesses.finish(&world);
}
