//! The operator's fence command runs before the VM does, and the VM waits for its success.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use nix::sys::signal::{Signal, kill};
use nix::unistd::pipe;
use outlive::events::Event;

use crate::status::status;
use crate::support::{Log, Process, Readers, Side, Witnesses, World, fill, wait_until};

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
    let manager = UnixDatagram::bind(world.manager()).unwrap();
    manager.set_nonblocking(true).unwrap();
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
    let told = status(standby.socket());
    let what = &told.loss_of_other_host.what;
    assert!(
        !told.loss_of_other_host.survived && what.contains("waiting for the fence command since "),
        "{told}"
    );
    assert!(
        told.why.as_ref().unwrap().contains("the VM has been waiting for the fence command since "),
        "{told}"
    );
    signs_of_life(&manager);
    // The third run would be killed, too.
    standby.wait_for("killing the command", failed(3, "did not end"));
    assert!(signs_of_life(&manager) >= 3, "a service manager would kill the only copy of the VM");
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

/// How often a process has said that it lives, since the last look.
fn signs_of_life(manager: &UnixDatagram) -> usize {
    let mut message = [0; 256];
    let messages =
        std::iter::from_fn(|| manager.recv(&mut message).ok().map(|n| message[..n] == *b"WATCHDOG=1"));
    messages.filter(|it| *it).count()
}

/// The takeover's process is killed while it fences in vain, and started again, twice: the VM does not run here
/// before the command has succeeded.
#[test]
fn a_host_that_is_started_again_while_it_fences_goes_on_fencing() {
    let Some(world) = World::new() else { return };
    Side::BOTH.iter().for_each(|side| File::create(world.image(*side)).unwrap().set_len(1 << 20).unwrap());
    let (told, opened) = (world.dir().join("told"), world.dir().join("let"));
    let command =
        format!("echo $OUTLIVE_GENERATION $OUTLIVE_PEER >> {}; test -e {}", told.display(), opened.display());
    let (here, there) = (Side::B.addr().to_string(), Side::A.addr().to_string());
    let disk = |side| format!("path={}", world.image(side).display());
    let both = ["--standby", &there, "--fence", &command, "--disk", &disk(Side::B)];
    let mut standby = world.standby_with(Side::B, &both);
    let mut active = world.run_with(Side::A, &["--standby", &here, "--disk", &disk(Side::A)]);
    active.wait_protected();
    active.kill();
    let fails = |process: &mut Process| {
        process.wait_for("failing to fence", |e| matches!(e, Event::FenceFailed { attempt: 2, .. }));
        assert!(!process.has(|e| matches!(e, Event::Started { vm: Some(_), .. })), "the VM runs unfenced");
    };
    fails(&mut standby);
    standby.kill();
    let again = || world.run_with(Side::B, &[&both[..], &["--or-standby", "--listen", &here]].concat());
    let mut restarted = again();
    fails(&mut restarted);
    assert_eq!(world.frames_out(Side::B), 0);
    restarted.kill();
    let mut restarted = again();
    fails(&mut restarted);
    // Told to stop, it ends at once: the next start goes on fencing.
    restarted.signal(Signal::SIGTERM);
    assert_eq!(restarted.wait_exit(), 0);
    let mut restarted = again();
    fails(&mut restarted);
    fs::write(opened, "").unwrap();
    restarted.wait_for("fencing", |e| matches!(e, Event::PeerFenced { .. }));
    restarted.wait_for("the VM", |e| matches!(e, Event::Started { vm: Some(_), .. }));
    let told = fs::read_to_string(told).unwrap();
    assert!(told.lines().all(|line| line.starts_with("2 10.99.0.1:")), "{told}");
    // It is fenced once.
    let asked = told.lines().count();
    restarted.kill();
    let mut restarted = again();
    restarted.wait_for("the VM", |e| matches!(e, Event::Started { vm: Some(_), .. }));
    assert_eq!(fs::read_to_string(world.dir().join("told")).unwrap().lines().count(), asked);
}

/// Without the process that keeps the right to fence, a takeover would win the VM and never run it. So a standby whose
/// steward is gone is relied on no more, and one whose steward says nothing tells so.
#[test]
fn a_standby_that_could_not_fence_leaves_or_says_so() {
    if !World::is_confined() {
        return println!("skipped: hosts in the sandbox (OUTLIVE_TEST_SANDBOX=0)");
    }
    let Some(world) = World::new() else { return };
    let options = ["--fence", "true", "--fence-timeout", "100ms"];
    let mut active = world.run(Side::A);
    let mut standby = world.standby_with(Side::B, &options);
    active.wait_protected();
    kill(standby.children("vm-steward")[0], Signal::SIGKILL).unwrap();
    active.wait_for("told that nobody protects it", |e| matches!(e, Event::Unprotected { .. }));
    assert_eq!(standby.wait_exit(), 1, "{}", standby.log());
    assert!(standby.log().contains("vm-steward") && standby.log().contains("start this command again"));
    assert!(!active.has(|e| matches!(e, Event::Arbitrating { .. })), "the standby has handed its right over");
    let mut standby = world.standby_with(Side::B, &options);
    active.wait_protected();
    let steward = standby.children("vm-steward")[0];
    kill(steward, Signal::SIGSTOP).unwrap();
    active.kill();
    let silent = |e: &Event| matches!(e, Event::FenceFailed { why, .. } if why.contains("does not answer"));
    standby.wait_for("told that it is silent", silent);
    assert!(!standby.took_over());
    kill(steward, Signal::SIGCONT).unwrap();
    standby.wait_takeover();
}

/// A command that speaks must not wait for, or die of, a standard error that nobody reads or that is closed.
#[test]
fn a_fence_command_that_speaks_succeeds_whoever_reads_the_log() {
    let Some(world) = World::new() else { return };
    let full = || {
        let (read, write) = pipe().unwrap();
        fill(&write);
        (read, write)
    };
    let (kept, blocked): (OwnedFd, OwnedFd) = full();
    let (gone, no_reader) = full();
    drop(gone);
    let command = "seq 20000; seq 20000 >&2; echo fenced >&2";
    for (number, log) in (1..).zip([Log::Pipe(blocked), Log::Pipe(no_reader), Log::Closed]) {
        let readers = Readers { log, ..Readers::default() };
        let (here, there) = (Side::B.addr().to_string(), Side::A.addr().to_string());
        let options = ["--standby", &there, "--fence", command, "--fence-timeout", "20s"];
        let command = ["standby", "--once", "--listen", &here];
        let mut standby = world.start_for(Side::B, &command, &options, &[], readers);
        let mut active = world.run(Side::A);
        active.wait_protected();
        active.kill();
        let fenced = standby.wait_for("fencing", |e| matches!(e, Event::PeerFenced { .. }));
        assert!(matches!(fenced, Event::PeerFenced { attempt: 1, .. }), "run {number}: {fenced:?}");
        standby.wait_takeover();
    }
    drop(kept);
}
