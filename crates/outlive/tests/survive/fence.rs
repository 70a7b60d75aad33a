//! The operator's fence command runs before the VM does, and the VM waits for its success.

use std::fs;

use outlive::events::Event;

use crate::support::{Side, Witnesses, World, wait_until};

/// It fails once, then hangs once, then works. It writes down what it was told.
const SCRIPT: &str = r#"
echo "$OUTLIVE_ATTEMPT $OUTLIVE_GENERATION $OUTLIVE_PEER $OUTLIVE_VM $OUTLIVE_VM_ID" >> "$1/fenced"
case "$OUTLIVE_ATTEMPT" in
    1) exit 1;;
    2) sleep 600;;
    *) while [ ! -e "$1/let" ]; do sleep 0.02; done;;
esac
"#;

#[test]
fn the_vm_waits_for_a_fence_command_that_fails_or_hangs() {
    let Some(world) = World::new() else { return };
    let (script, dir) = (world.dir().join("fence"), world.dir().display().to_string());
    fs::write(&script, SCRIPT).unwrap();
    let command = format!("sh {} {dir}", script.display());
    let there = Side::A.addr().to_string();
    let options = ["--standby", &there, "--fence", &command, "--fence-timeout", "300ms"];
    let mut standby = world.standby_with(Side::B, &options);
    let mut active = world.run(Side::A);
    active.wait_protected();
    let witnesses = Witnesses::start(&world, 2);
    witnesses.hear_all();
    active.kill();
    let failed = |number: u32, words: &'static str| move |e: &Event| matches!(e, Event::FenceFailed { attempt, why } if *attempt == number && why.contains(words));
    standby.wait_for("failing to fence", failed(1, "exit status: 1"));
    standby.wait_for("killing the command", failed(2, "did not end within 0.3 s"));
    assert!(!standby.took_over());
    // The third run would be killed, too.
    standby.wait_for("killing the command", failed(3, "did not end"));
    assert!(!standby.took_over(), "the VM runs although nobody has fenced its old host");
    fs::write(world.dir().join("let"), "").unwrap();
    let fenced = standby.wait_for("fencing", |e| matches!(e, Event::PeerFenced { .. }));
    assert!(matches!(fenced, Event::PeerFenced { attempt: 4.., .. }), "{fenced:?}");
    assert_eq!(standby.wait_takeover(), 2);
    witnesses.hear_all();
    witnesses.finish(&world);
    wait_until("it was told", || fs::read_to_string(world.dir().join("fenced")).is_ok());
    let told = fs::read_to_string(world.dir().join("fenced")).unwrap();
    let first: Vec<&str> = told.lines().next().unwrap().split(' ').collect();
    assert_eq!((first[0], first[1]), ("1", "2"));
    assert!(first[2].starts_with("10.99.0.1:") && !first[3].is_empty() && first[4].len() >= 32, "{told}");
}
