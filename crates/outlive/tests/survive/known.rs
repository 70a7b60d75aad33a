//! An image, an arbiter and a VM remember each other: a command typed in a hurry, with the wrong host, a
//! missing mount or a forgotten option, makes no second VM and destroys no image.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use outlive::arbiter::{Arbiter, FileArbiter};
use outlive::events::{DangerKind, Event};

use crate::support::{Client, PROGRAM, Process, Side, Value, World, wait_until};

const SIZE: u64 = 16 << 20;

fn disk(world: &World, side: Side) -> String {
    format!("path={}", world.image(side).display())
}

/// An image with a little data, or with none.
fn make(world: &World, side: Side, data: bool) {
    let file = File::create(world.image(side)).unwrap();
    file.set_len(SIZE).unwrap();
    if data {
        file.write_all_at(b"the server", 1 << 20).unwrap();
    }
}

fn standby(world: &World, side: Side, options: &[&str]) -> Process {
    let there = side.other().addr().to_string();
    let usual = ["--standby", &there, "--disk", &disk(world, side)];
    let given = if options.contains(&"--disk") { &usual[..2] } else { &usual };
    world.standby_with(side, &[given, options].concat())
}

fn run(world: &World, side: Side, options: &[&str]) -> Process {
    let there = side.other().addr().to_string();
    world.run_with(side, &[&["--standby", &there, "--disk", &disk(world, side)], options].concat())
}

/// The line that refuses a start.
fn refusal(mut process: Process) -> String {
    assert_eq!(process.wait_exit(), 2, "{}", process.log());
    let log = process.log();
    let line = log.lines().find(|line| line.starts_with("outlive: ")).unwrap_or_else(|| panic!("{log}"));
    line.to_owned()
}

fn sidecar(world: &World, side: Side) -> String {
    let mut path = world.image(side).into_os_string();
    path.push(".outlive");
    fs::read_to_string(path).unwrap()
}

fn outlive(args: &[&str]) -> String {
    let output = Command::new(PROGRAM).args(args).output().unwrap();
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).unwrap().next().is_none()
}

/// Host a dies, host b takes over, host a comes back, and somebody simply starts the server again.
#[test]
fn a_stale_image_starts_nowhere() {
    let Some(world) = World::new() else { return };
    make(&world, Side::A, true);
    make(&world, Side::B, false);
    let mut b = standby(&world, Side::B, &[]);
    let mut a = run(&world, Side::A, &[]);
    a.wait_protected();
    let mut client = world.lan(|| Client::open(world.server())).unwrap();
    assert_eq!(client.ask("INCR n"), Ok(Value::Integer(1)));
    a.kill();
    assert_eq!(b.wait_takeover(), 2);
    let before = sidecar(&world, Side::A);
    let frames = world.settled_frames_out(Side::A);

    // The mount of the arbiter is missing: its mount point is a bare directory.
    let bare = world.dir().join("bare");
    fs::create_dir(&bare).unwrap();
    let at = format!("file:{}", bare.display());
    let said = refusal(run(&world, Side::A, &["--arbiter", &at]));
    assert!(said.contains("is not an arbiter: mount") && said.contains("outlive arbiter init"), "{said}");
    assert!(is_empty(&bare), "something was written to the mount point");
    // Somebody ran `init` on it.
    let (other, _) = FileArbiter::init(&bare).unwrap();
    let said = refusal(run(&world, Side::A, &["--arbiter", &at]));
    assert!(said.contains("another arbiter") && said.contains(other.identity()), "{said}");
    // The operator forgot the option.
    let said = refusal(world.run_without_arbiter(Side::A, &["--disk", &disk(&world, Side::A)]));
    assert!(
        said.contains("give the arbiter with --arbiter") && said.contains("--accept-no-arbiter"),
        "{said}"
    );
    // The operator forgot nothing.
    let said = refusal(run(&world, Side::A, &[]));
    assert!(said.contains("is out of date: it has generation 1"), "{said}");
    let place = |words: &str| said.find(words).unwrap_or_else(|| panic!("no {words}: {said}"));
    assert!(
        place("run `outlive standby ...") < place("--accept-stale-image"),
        "the wrong remedy first: {said}"
    );
    // The operator believes the last words of that line, although the VM runs.
    let said = refusal(run(&world, Side::A, &["--accept-stale-image"]));
    assert!(
        said.contains("--accept-stale-image would start a second VM")
            && said.contains(&format!("the host at {} has this VM", Side::B.addr()))
            && said.contains("generation 2"),
        "{said}"
    );
    // Somebody emptied the arbiter.
    let (vm, away) = (vm_of(&before), world.dir().join("away"));
    fs::rename(world.arbiter().join(&vm), &away).unwrap();
    let said = refusal(run(&world, Side::A, &[]));
    assert!(
        said.contains("the arbiter does not know the VM") && said.contains("--accept-lost-claims"),
        "{said}"
    );
    fs::rename(&away, world.arbiter().join(&vm)).unwrap();

    assert_eq!(sidecar(&world, Side::A), before, "a refusal left its mark");
    assert_eq!(world.settled_frames_out(Side::A), frames, "a second VM has sent something");
    assert_eq!(client.ask("INCR n"), Ok(Value::Integer(2)));
    assert!(!b.ended());

    // The image that was refused five times is welcome as a copy.
    let a = standby(&world, Side::A, &[]);
    b.wait_protected();
    wait_until("host a has the base", || a.log().contains("this standby can take over"));
}

/// The same without disks: nothing but the other host knows that there is a VM.
#[test]
fn a_new_vm_is_not_started_beside_one_of_its_name() {
    let Some(world) = World::new() else { return };
    let mut b = world.standby(Side::B);
    let mut a = world.run(Side::A);
    a.wait_protected();
    a.kill();
    assert_eq!(b.wait_takeover(), 2);
    let frames = world.settled_frames_out(Side::A);
    let said = refusal(world.run(Side::A));
    assert!(
        said.contains("runs a VM of the name vm (id ")
            && said.contains(", generation 2)")
            && said.contains("run `outlive standby` here"),
        "{said}"
    );
    assert_eq!(world.settled_frames_out(Side::A), frames, "a second VM has sent something");
    assert!(!b.ended());

    // A host that cannot be reached says nothing. Once it is, both VMs run, and that is said.
    world.cut_link();
    let mut a = world.run(Side::A);
    a.wait_for("a start", |e| matches!(e, Event::Started { vm: Some(_), .. }));
    world.mend_link();
    let twice = a.wait_for("two VMs", |e| matches!(e, Event::RunsTwice { .. }));
    let Event::RunsTwice { vm, generation, at, same_vm, .. } = twice else {
        unreachable!("the filter above")
    };
    assert_eq!((vm.as_str(), generation, same_vm), ("vm", 2, false));
    assert_eq!(at, Side::B.addr().to_string());
    a.wait_says("TWO VMS HAVE THE NAME vm: ", 1);
    assert!(!a.ended() && !b.ended(), "nobody stops a VM by itself");

    // A VM of another name is none of its business.
    a.kill();
    let there = Side::B.addr().to_string();
    let mut a = world.run_with(Side::A, &["--name", "other", "--standby", &there]);
    a.wait_says("standby refused: this host RUNS the VM vm (id ", 1);
    assert!(!a.has(|e| matches!(e, Event::RunsTwice { .. })));
}

fn vm_of(sidecar: &str) -> String {
    let line = sidecar.lines().find_map(|line| line.strip_prefix("vm = ")).unwrap();
    line.trim_matches('"').to_owned()
}

/// Host b is lost for good after its takeover: the operator says so, and image and arbiter remember it.
#[test]
fn a_stale_image_is_accepted_with_a_word_that_is_remembered() {
    let Some(world) = World::new() else { return };
    make(&world, Side::A, true);
    make(&world, Side::B, false);
    let mut b = standby(&world, Side::B, &[]);
    let mut a = run(&world, Side::A, &[]);
    a.wait_protected();
    a.kill();
    b.wait_takeover();
    b.kill();
    let old = vm_of(&sidecar(&world, Side::A));
    let spec = format!("file:{}", world.arbiter().display());
    let shown = outlive(&["image", "show", "--arbiter", &spec, world.image(Side::A).to_str().unwrap()]);
    assert!(
        shown.contains("generation 1, the VM's own") && shown.contains("--accept-stale-image"),
        "{shown}"
    );

    let mut a = run(&world, Side::A, &["--accept-stale-image"]);
    let is_accepted = |e: &Event| matches!(e, Event::Accepted { danger: DangerKind::StaleImage, .. });
    a.wait_for("the word in the events", is_accepted);
    a.wait_says("ACCEPTED: VM ", 1);
    assert!(a.log().contains("WARN"), "{}", a.log());
    let now = sidecar(&world, Side::A);
    assert!(
        now.contains("danger = \"stale_image\"") && now.contains(&format!("vm = \"{old}\"\nthrough = 1")),
        "{now}"
    );
    assert_ne!(vm_of(&now), old);

    // Host b comes back after all, with the state that was given up. Nobody overwrites it unasked.
    let before = fs::read(world.image(Side::B)).unwrap();
    let b = standby(&world, Side::B, &[]);
    wait_until("host b's image is kept", || {
        a.log().contains("generation 2 of another VM vm (") && a.log().contains("nothing is overwritten")
    });
    assert!(!a.has(|e| matches!(e, Event::Protected { .. })));
    drop(b);
    assert_eq!(fs::read(world.image(Side::B)).unwrap(), before);
    let word = format!("{},overwrite", disk(&world, Side::B));
    let b = standby(&world, Side::B, &["--disk", &word]);
    a.wait_protected();
    b.wait_says("OVERWRITTEN as asked for: it held generation 2 of another VM", 1);
    wait_until("the sidecar remembers it", || sidecar(&world, Side::B).contains("danger = \"overwrite\""));

    let known = outlive(&["arbiter", "list", &spec]);
    assert!(known.contains(&old) && known.contains(&vm_of(&now)), "{known}");
}

/// The hosts are mixed up: the standby gets the server's image, and `run` the empty one.
#[test]
fn a_standby_does_not_overwrite_a_server() {
    let Some(world) = World::new() else { return };
    make(&world, Side::A, false);
    make(&world, Side::B, true);
    let before = fs::read(world.image(Side::B)).unwrap();
    let b = standby(&world, Side::B, &[]);
    let mut a = run(&world, Side::A, &[]);
    wait_until("both sides say so", || {
        a.log().contains("standby refused: the disk image") && b.log().contains("and is no standby's copy")
    });
    a.wait_says("nothing is overwritten", 1);
    assert!(!a.has(|e| matches!(e, Event::StandbyAttached { .. })));
    drop(b);
    assert_eq!(fs::read(world.image(Side::B)).unwrap(), before);

    // A standby that is kept for another VM refuses this one.
    make(&world, Side::B, false);
    let b = standby(&world, Side::B, &["--vm", "mail"]);
    wait_until("another VM is refused", || {
        a.log().contains("this standby is kept for VM mail, not for vm (")
    });
    drop(b);
    let b = standby(&world, Side::B, &["--vm", "vm"]);
    a.wait_protected();
    drop(b);
}

/// Both hosts were stopped in order, and the server is started again, on either host.
#[test]
fn after_an_orderly_end_either_image_is_good() {
    let Some(world) = World::new() else { return };
    make(&world, Side::A, true);
    make(&world, Side::B, false);
    let mut b = standby(&world, Side::B, &[]);
    let mut a = run(&world, Side::A, &[]);
    a.wait_protected();
    let vm = vm_of(&sidecar(&world, Side::A));
    a.signal(Signal::SIGTERM);
    assert_eq!((a.wait_exit(), b.wait_exit()), (0, 0));
    let spec = format!("file:{}", world.arbiter().display());
    let known = outlive(&["arbiter", "show", &spec, &vm]);
    assert!(known.contains("ended ") && known.contains("in generation 1"), "{known}");

    let a = standby(&world, Side::A, &[]);
    let mut b = run(&world, Side::B, &[]);
    b.wait_protected();
    assert_eq!(vm_of(&sidecar(&world, Side::B)), vm, "it is the same VM");
    wait_until("host a has the copy", || sidecar(&world, Side::A).contains("generation = 2"));
    drop(a);
}

/// Somebody copied a running VM's image with its sidecar, and starts the copy on the other host.
#[test]
fn a_copy_is_refused_and_never_runs_beside_its_original() {
    let Some(world) = World::new() else { return };
    make(&world, Side::A, true);
    let mut original = run(&world, Side::A, &[]);
    original.wait_for("running", |e| matches!(e, Event::Started { .. }));
    fs::copy(world.image(Side::A), world.image(Side::B)).unwrap();
    fs::write(format!("{}.outlive", world.image(Side::B).display()), sidecar(&world, Side::A)).unwrap();
    let said = refusal(run(&world, Side::B, &[]));
    assert!(said.contains("is not the file that") && said.contains("--accept-moved-image"), "{said}");
    assert!(!original.ended());
    // The operator insists. Whoever has the newest generation runs the VM, and nobody else.
    let mut copy = run(&world, Side::B, &["--accept-moved-image"]);
    copy.wait_for("the word in the events", |e| {
        matches!(e, Event::Accepted { danger: DangerKind::MovedImage, .. })
    });
    assert_eq!(original.wait_exit(), 3, "{}", original.log());
    assert!(original.has(|e| matches!(e, Event::Lost { generation: 2, .. })), "{}", original.log());
    assert!(original.log().contains("an image of it was started elsewhere"));
    assert!(!copy.ended());
}

/// The host's newest image was lost. Somebody put an empty one in its place, and the sidecar is still there.
#[test]
fn an_empty_file_in_the_place_of_the_newest_image_destroys_nothing() {
    let Some(world) = World::new() else { return };
    make(&world, Side::A, true);
    make(&world, Side::B, false);
    let mut b = standby(&world, Side::B, &[]);
    let mut a = run(&world, Side::A, &[]);
    a.wait_protected();
    a.signal(Signal::SIGTERM);
    assert_eq!((a.wait_exit(), b.wait_exit()), (0, 0));
    fs::remove_file(world.image(Side::A)).unwrap();
    make(&world, Side::A, false);
    let said = refusal(run(&world, Side::A, &[]));
    assert!(said.contains("is not the file that"), "{said}");
    // As a standby it is welcome: it has nothing.
    let a = standby(&world, Side::A, &[]);
    let mut b = run(&world, Side::B, &[]);
    b.wait_protected();
    wait_until("host a has the base", || a.log().contains("this standby can take over"));
    for side in [Side::A, Side::B] {
        let mut data = [0; 10];
        File::open(world.image(side)).unwrap().read_exact_at(&mut data, 1 << 20).unwrap();
        assert_eq!(&data, b"the server", "{side:?}");
    }
}
