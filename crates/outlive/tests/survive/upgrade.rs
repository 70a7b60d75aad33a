//! This release and the one before it, on the two hosts of a pair.
//!
//! `cargo xtask upgrade` builds the release before from the commit that `RELEASES` names and runs these tests. Under
//! plain `cargo test` they are skipped; `OUTLIVE_BEFORE` is the path of an older program.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use outlive::events::Event;

use crate::arbiters;
use crate::support::{Dice, MemoryLoad, PROGRAM, Process, Side, Witnesses, World, wait_until, writer_kernel};

const SIZE: u64 = 24 << 20;

/// Every so many checkpoints the memory and disks of both hosts are compared.
const CHECK: [&str; 2] = ["--self-check", "100"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Release {
    Before,
    Now,
}

impl Release {
    fn other(self) -> Release {
        match self {
            Release::Before => Release::Now,
            Release::Now => Release::Before,
        }
    }
}

/// Two hosts with an image each.
struct Hosts {
    world: World,
    before: PathBuf,
}

impl Hosts {
    /// `None`, after saying why, without an older release. Whatever lasts longer than a release, keys and the arbiter, the
    /// release `maker` has made.
    fn new(maker: Release) -> Option<Hosts> {
        let Some(before) = std::env::var_os("OUTLIVE_BEFORE") else {
            println!("skipped: no release before this one (`cargo xtask upgrade` builds it)");
            return None;
        };
        let mut hosts = Hosts { world: World::new()?, before: before.into() };
        for side in Side::BOTH {
            hosts.install(side, maker);
        }
        hosts.make_keys();
        hosts.make_arbiter();
        Some(hosts)
    }

    fn install(&mut self, side: Side, release: Release) {
        let program = self.program(release);
        self.world.install(side, program);
    }

    /// Runs the program of a host to its end.
    fn command(&self, side: Side, words: &[&str]) {
        let output = Command::new(self.world.program(side)).args(words).output().unwrap();
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn make_keys(&self) {
        let [a, b] = Side::BOTH.map(|side| self.world.keys(side).display().to_string());
        fs::remove_dir_all(&a).unwrap();
        fs::remove_dir_all(&b).unwrap();
        // This release has the CA beside the keys.
        fs::remove_dir_all(format!("{a}-ca")).unwrap();
        self.command(Side::A, &["keys", "init", &a, "--host", "hosta"]);
        self.command(Side::A, &["keys", "issue", "--host", "hostb", "--keys", &a, "--to", &b]);
    }

    fn make_arbiter(&self) {
        let place = self.world.arbiter();
        fs::remove_dir_all(&place).unwrap();
        fs::create_dir(&place).unwrap();
        self.command(Side::A, &["arbiter", "init", &format!("file:{}", place.display())]);
    }

    /// The program of a release.
    fn program(&self, release: Release) -> PathBuf {
        match release {
            Release::Before => self.before.clone(),
            Release::Now => PROGRAM.into(),
        }
    }

    /// Whether a release can hand a VM over. The first one cannot.
    fn hands_over(&self, release: Release) -> bool {
        Command::new(self.program(release)).args(["hand-over", "--help"]).output().unwrap().status.success()
    }

    /// `outlive status` of each release understands the processes of each: it succeeds where a VM is protected.
    fn wait_seen(&self, processes: [&Process; 2]) {
        for release in [Release::Before, Release::Now] {
            for process in processes {
                let look = || {
                    let mut status = Command::new(self.program(release));
                    status.args(["status", "--socket"]).arg(process.socket()).output().unwrap()
                };
                let what = format!("status of {release:?}: {} is protected", process.pid());
                wait_until(&what, || look().status.success());
                let said = String::from_utf8(look().stdout).unwrap();
                assert!(said.contains("protect") && !said.contains("UNPROTECTED"), "{release:?}: {said}");
            }
        }
    }

    /// Two images; that of host a has data.
    fn make_images(&self) {
        let mut dice = Dice::new();
        for side in Side::BOTH {
            let file = File::create(self.world.image(side)).unwrap();
            file.set_len(SIZE).unwrap();
            for _ in 0..if side == Side::A { 30 } else { 0 } {
                let bytes = vec![dice.below(255) as u8 + 1; 1 + dice.below(200_000) as usize];
                file.write_all_at(&bytes, dice.below(SIZE - bytes.len() as u64)).unwrap();
            }
        }
        let image = self.world.image(Side::A).display().to_string();
        self.command(Side::A, &["image", "accept", "--yes", &image]);
    }

    /// The command of a host, which is the same for both, as a service manager gives it.
    fn start(&self, side: Side, more: &[&str]) -> Process {
        let (here, there) = (side.addr().to_string(), side.other().addr().to_string());
        let disk = format!("path={}", self.world.image(side).display());
        let usual = ["--or-standby", "--listen", &here, "--standby", &there, "--disk", &disk];
        self.world.run_with(side, &[&usual, &CHECK[..], more].concat())
    }

    /// A VM on host a that host b protects.
    fn protected(&self, more: &[&str]) -> (Process, Process) {
        self.make_images();
        let b = self.start(Side::B, more);
        let mut a = self.start(Side::A, more);
        a.wait_protected();
        (a, b)
    }

    /// A guest that writes to its disk all the time.
    fn writer(&self) -> String {
        let kernel = self.world.dir().join("writer");
        fs::write(&kernel, writer_kernel()).unwrap();
        kernel.display().to_string()
    }
}

/// Waits until the standby has compared its copy with the VM, so many times.
fn wait_equal(standby: &mut Process, times: u32) {
    for _ in 0..times {
        let checked = standby.wait_for("comparing", |e| matches!(e, Event::SelfCheck { .. }));
        assert!(matches!(checked, Event::SelfCheck { difference: None, .. }), "{checked:?}");
    }
}

/// A pair of both releases: each protects the other's VM and takes it over, as its new and as its old standby.
fn protects_and_takes_over(primary: Release) {
    let Some(mut hosts) = Hosts::new(Release::Before) else { return };
    hosts.install(Side::A, primary);
    hosts.install(Side::B, primary.other());
    let (a, mut b) = hosts.protected(&[]);
    let witnesses = Witnesses::start(&hosts.world, 3);
    let load = MemoryLoad::start(&hosts.world, 300, 50_000);
    wait_equal(&mut b, 3);
    a.kill();
    assert_eq!(b.wait_takeover(), 2);
    witnesses.hear_all();

    let mut a = hosts.start(Side::A, &[]);
    b.wait_protected();
    wait_equal(&mut a, 3);
    b.kill();
    assert_eq!(a.wait_takeover(), 3);
    witnesses.hear_all();
    load.finish(&hosts.world);
    witnesses.finish(&hosts.world);
}

#[test]
fn an_older_primary_has_a_newer_standby() {
    protects_and_takes_over(Release::Before);
}

#[test]
fn a_newer_primary_has_an_older_standby() {
    protects_and_takes_over(Release::Now);
}

/// The guest's disk, and the requests that are in flight at a takeover.
fn a_disk_follows(primary: Release) {
    let Some(mut hosts) = Hosts::new(Release::Before) else { return };
    hosts.install(Side::A, primary);
    hosts.install(Side::B, primary.other());
    let kernel = hosts.writer();
    let kernel = ["--kernel", kernel.as_str()];
    let (mut here, mut there) = hosts.protected(&kernel);
    for side in [Side::A, Side::B, Side::A] {
        wait_equal(&mut there, 3);
        // It crashes where a write fails.
        assert!(!here.has(|e| matches!(e, Event::GuestRestarted { .. })), "{}", here.log());
        here.kill();
        there.wait_takeover();
        here = there;
        there = hosts.start(side, &kernel);
        here.wait_protected();
    }
    wait_equal(&mut there, 1);
}

#[test]
fn the_disk_of_an_older_primary_follows_its_vm_to_a_newer_standby_and_back() {
    a_disk_follows(Release::Before);
}

#[test]
fn the_disk_of_a_newer_primary_follows_its_vm_to_an_older_standby_and_back() {
    a_disk_follows(Release::Now);
}

/// `docs/upgrade.md`, step by step: the standby's host first, then the VM moves, then the other host.
fn roll(from: Release) {
    let Some(mut hosts) = Hosts::new(from) else { return };
    let (mut a, mut b) = hosts.protected(&[]);
    let witnesses = Witnesses::start(&hosts.world, 4);
    let load = MemoryLoad::start(&hosts.world, 300, 50_000);
    witnesses.hear_all();

    hosts.install(Side::B, from.other());
    b.signal(Signal::SIGTERM);
    assert_eq!(b.wait_exit(), 0);
    a.wait_for("alone", |e| matches!(e, Event::Unprotected { .. }));
    let mut b = hosts.start(Side::B, &[]);
    a.wait_protected();
    wait_equal(&mut b, 2);
    witnesses.hear_all();
    hosts.wait_seen([&a, &b]);

    if hosts.hands_over(from) {
        // The newer program gives the order: on the way back, before the older one is installed.
        let order = Command::new(PROGRAM).args(["hand-over", "--socket"]).arg(a.socket()).output().unwrap();
        assert!(order.status.success(), "{}", String::from_utf8_lossy(&order.stderr));
        assert_eq!(b.wait_takeover(), 2);
        // The old process waits as the standby.
        b.wait_protected();
        wait_equal(&mut a, 1);
        witnesses.hear_all();
        hosts.install(Side::A, from.other());
        a.signal(Signal::SIGTERM);
        assert_eq!(a.wait_exit(), 0);
        b.wait_for("alone", |e| matches!(e, Event::Unprotected { .. }));
    } else {
        hosts.install(Side::A, from.other());
        a.kill();
        assert_eq!(b.wait_takeover(), 2);
    }
    witnesses.hear_all();
    let mut a = hosts.start(Side::A, &[]);
    b.wait_protected();
    wait_equal(&mut a, 2);

    // And it is a pair as any other.
    b.kill();
    assert_eq!(a.wait_takeover(), 3);
    witnesses.hear_all();
    load.finish(&hosts.world);
    witnesses.finish(&hosts.world);
}

#[test]
fn a_protected_pair_is_upgraded_without_a_lost_connection() {
    roll(Release::Before);
}

#[test]
fn a_protected_pair_goes_back_to_the_release_before_without_a_lost_connection() {
    roll(Release::Now);
}

/// The arbiter's machine is upgraded while the hosts have one release each.
#[test]
fn a_served_arbiter_is_upgraded_under_a_pair_of_both_releases() {
    let Some(mut hosts) = Hosts::new(Release::Before) else { return };
    hosts.install(Side::B, Release::Now);
    let served = hosts.world.dir().join("served");
    fs::create_dir(&served).unwrap();
    hosts.command(Side::A, &["arbiter", "init", &format!("file:{}", served.display())]);
    let world = &hosts.world;
    arbiters::join_clients_network(world);
    let server = arbiters::serve_with(world, world.program(Side::A), "first");
    let (primary, mut taken) = arbiters::protected(world, arbiters::SERVED);
    let witnesses = Witnesses::start(world, 2);
    primary.kill();
    assert_eq!(taken.wait_takeover(), 2);
    witnesses.hear_all();

    let mut second = arbiters::standby(world, Side::A, arbiters::SERVED);
    taken.wait_protected();
    drop(server);
    let _server = arbiters::serve_with(world, world.program(Side::B), "second");
    taken.kill();
    assert_eq!(second.wait_takeover(), 3);
    witnesses.hear_all();
    witnesses.finish(world);
}

/// Both hosts lose their power, and come back with the other release: sidecars, journal, arbiter and images are
/// those of the release that was there.
fn comes_back(from: Release) {
    let Some(mut hosts) = Hosts::new(from) else { return };
    let kernel = hosts.writer();
    let (a, mut b) = hosts.protected(&["--kernel", &kernel]);
    wait_equal(&mut b, 1);
    // Nothing is taken over: both are gone at once.
    b.signal(Signal::SIGSTOP);
    a.kill();
    b.kill();
    // The kernel finishes what a killed process has given it.
    std::thread::sleep(Duration::from_millis(300));
    let newest = fs::read(hosts.world.image(Side::A)).unwrap();

    for side in Side::BOTH {
        hosts.install(side, from.other());
    }
    // From here on a guest that leaves its disk alone.
    let mut b = hosts.start(Side::B, &[]);
    let decided = b.wait_for("a standby", |e| matches!(e, Event::Decided { .. }));
    assert!(
        matches!(&decided, Event::Decided { starts: false, why, .. } if why.contains("a standby's copy")),
        "{decided:?}"
    );
    let mut a = hosts.start(Side::A, &[]);
    a.wait_protected();
    let witnesses = Witnesses::start(&hosts.world, 2);
    wait_until("the standby's image is that of the VM", || {
        fs::read(hosts.world.image(Side::B)).unwrap() == newest
    });
    assert!(fs::read(hosts.world.image(Side::A)).unwrap() == newest);
    a.kill();
    b.wait_takeover();
    witnesses.hear_all();
    witnesses.finish(&hosts.world);
}

#[test]
fn after_a_power_cut_this_release_starts_what_the_one_before_has_left() {
    comes_back(Release::Before);
}

#[test]
fn after_a_power_cut_the_release_before_starts_what_this_one_has_left() {
    comes_back(Release::Now);
}
