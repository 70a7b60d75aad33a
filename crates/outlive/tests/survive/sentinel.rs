//! The process that ends the links of a killed host. Nobody may depend on it.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use outlive::events::{Event, Record, now_us};

use crate::support::{Client, MemoryLoad, Process, Side, Witnesses, World, wait_until};

/// The processes that this one has started, or its steward, and that are still there.
pub(crate) fn sentinels(pid: u32) -> Vec<u32> {
    let is = |pid: &u32, name: &str| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|it| it.trim() == name)
    };
    let own = children(pid);
    let stewards = own.iter().filter(|pid| is(pid, "vm-steward")).flat_map(|pid| children(*pid));
    let all: Vec<u32> = stewards.chain(own.iter().copied()).collect();
    all.into_iter().filter(|pid| is(pid, "vm-sentinel")).collect()
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    let children = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    children
        .flat_map(|it| it.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .collect()
}

fn sockets(pid: u32) -> BTreeSet<PathBuf> {
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
    let targets = files.filter_map(|file| fs::read_link(file.ok()?.path()).ok());
    targets.filter(|to| to.to_string_lossy().starts_with("socket:")).collect()
}

/// Waits until a process has a sentinel that knows its link.
pub(crate) fn sentinel_of(process: &Process) -> u32 {
    let mut found = None;
    wait_until("the sentinel knows the link", || {
        let guards = |pid: &u32| !sockets(*pid).is_disjoint(&sockets(process.pid()));
        found = sentinels(process.pid()).into_iter().find(guards);
        found.is_some()
    });
    found.unwrap()
}

fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid as i32), signal).unwrap();
}

pub(crate) fn is_gone(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}

#[test]
fn a_sentinel_that_is_told_to_end_stays_and_one_that_is_killed_is_replaced() {
    let Some(world) = World::new() else { return };
    let (mut active, mut standby) = world.protected(Side::A);
    let witnesses = Witnesses::start(&world, 2);
    for process in [&active, &standby] {
        let first = sentinel_of(process);
        for unheard in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT, Signal::SIGUSR1] {
            signal(first, unheard);
        }
        witnesses.hear_all();
        assert_eq!(sentinel_of(process), first);
        signal(first, Signal::SIGKILL);
        wait_until("the first sentinel is gone", || is_gone(first));
        assert_ne!(sentinel_of(process), first, "another takes its place, and knows the link");
    }
    witnesses.hear_all();
    for process in [&mut active, &mut standby] {
        let cut = process.has(|e| matches!(e, Event::LinkLost { .. }));
        assert!(!cut, "the link is as it was\n{}", process.log());
    }
    let own = sentinel_of(&active);
    active.kill();
    standby.wait_takeover();
    wait_until("the sentinel ends with its parent", || is_gone(own));
    witnesses.finish(&world);
}

/// It has duplicates of the link's socket, so the link would live on with it.
#[test]
fn a_sentinel_that_was_stopped_does_not_keep_its_dead_parents_link() {
    let Some(world) = World::new() else { return };
    let (active, mut standby) = world.protected_with(Side::A, &["--dead-after", "30s"]);
    let witnesses = Witnesses::start(&world, 2);
    let sentinel = sentinel_of(&active);
    signal(sentinel, Signal::SIGSTOP);
    witnesses.hear_all();
    active.kill();
    standby.wait_takeover();
    let heard = |e: &Event| matches!(e, Event::LinkLost { reason } if reason.contains("closed the link"));
    assert!(standby.has(heard), "it is the end of the link that it heard of\n{}", standby.log());
    wait_until("the sentinel ends with its parent", || is_gone(sentinel));
    witnesses.finish(&world);
}

#[test]
fn with_lock_memory_all_memory_of_both_hosts_is_locked_and_in_no_dump() {
    let Some(world) = World::new() else { return };
    let there = Side::B.addr().to_string();
    let options = ["--standby", &there, "--lock-memory"];
    let standby = world.standby_with(Side::B, &["--lock-memory"]);
    let mut active = world.run_with(Side::A, &options);
    active.wait_protected();
    for process in [&active, &standby] {
        let smaps = fs::read_to_string(format!("/proc/{}/smaps", process.pid())).unwrap();
        let mut guest = 0;
        let mut size = 0;
        for line in smaps.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("Size:") => size = words.next().unwrap().parse::<u64>().unwrap() << 10,
                Some("VmFlags:") => {
                    let flags: Vec<&str> = words.collect();
                    // Mappings of devices are no memory of this process's.
                    let special = flags.contains(&"io") || flags.contains(&"pf") || flags.contains(&"de");
                    let file = !flags.contains(&"wr");
                    assert!(special || file || flags.contains(&"lo"), "{size} bytes: {flags:?}");
                    guest += u64::from(size >= crate::support::MEMORY && flags.contains(&"dd"));
                }
                _ => {}
            }
        }
        assert!(guest > 0, "the guest's memory is in no dump");
    }
}

/// Bytes of RAM that a process has.
fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().trim().parse::<u64>().unwrap() << 10
}

/// Has the guest write to all of its memory but its program's own heap.
fn fill_memory(world: &World, vm: &Process) {
    let mut client = Client::connect(world);
    let pages = client.work("max_pages");
    client.ask(&format!("WORK SET {pages} 0 0")).unwrap();
    wait_until("the guest has written its memory", || resident(vm.pid()) > pages as u64 * 4096 / 20 * 19);
    client.ask("WORK OFF").unwrap();
}

/// How long a standby takes to hear of a kill, over the VM's memory, with all of it in use. `OUTLIVE_MIB`
/// gives the sizes.
#[test]
#[ignore = "measures; needs more than twice the VM's memory"]
fn detection_over_the_memory_of_a_vm() {
    const KILLS: usize = 5;
    let sizes = std::env::var("OUTLIVE_MIB").unwrap_or_else(|_| "256 1024".into());
    for mib in sizes.split_whitespace().map(|size| size.parse::<u64>().unwrap()) {
        let mut found: Vec<u64> = (0..KILLS).filter_map(|_| detection(mib)).collect();
        found.sort_unstable();
        println!("{mib} MiB: detection {found:?} us");
    }
}

/// A protected VM with so much memory, all of it in use, and its standby.
fn full(world: &World, mib: u64, more: &[&str]) -> (Process, Process) {
    let (memory, there) = (format!("{mib}M"), Side::B.addr().to_string());
    let options = [&["--standby", &there, "--memory", &memory], more].concat();
    let mut active = world.run_with(Side::A, &options);
    active.wait_for("started", |e| matches!(e, Event::Started { .. }));
    fill_memory(world, &active);
    let standby = world.standby_with(Side::B, more);
    active.wait_protected();
    (active, standby)
}

/// What the standby waits for must not be that the killed process has given its memory back, which takes the longer the
/// more it has.
#[test]
fn a_kill_is_heard_before_the_memory_of_the_vm_is_free() {
    /// A host that is busy with something else may free the memory before the sentinel has had its turn.
    const KILLS: usize = 5;
    /// Freed faster than this, memory makes no difference.
    const WORTH_US: u64 = 20_000;
    let mut found = Vec::new();
    for _ in 0..KILLS {
        let Some(world) = World::new() else { return };
        // Nobody is to be taken for dead for silence.
        let (mut active, mut standby) = full(&world, 512, &["--dead-after", "30s"]);
        sentinel_of(&active);
        let killed = now_us();
        active.signal(Signal::SIGKILL);
        active.wait_end();
        let freed = now_us() - killed;
        standby.wait_for("without its primary", |e| matches!(e, Event::LinkLost { .. }));
        let lost = |record: &&Record| matches!(record.event, Event::LinkLost { .. });
        let heard = standby.records().iter().find(lost).unwrap().t_us.saturating_sub(killed);
        standby.wait_takeover();
        println!("the kill was heard after {heard} us, the memory was free after {freed} us");
        if freed >= WORTH_US && 2 * heard < freed {
            return;
        }
        found.push((heard, freed));
    }
    if found.iter().all(|(_, freed)| *freed < WORTH_US) {
        return println!("skipped: memory is freed too fast here to tell");
    }
    panic!("each kill was heard only when the memory was free, or nearly so: {found:?}");
}

fn detection(mib: u64) -> Option<u64> {
    let world = World::new()?;
    let (active, mut standby) = full(&world, mib, &[]);
    // A guest that does nothing is seldom heard, and the time counts from when the host was last heard.
    let _load = MemoryLoad::start(&world, 50, 100_000);
    std::thread::sleep(std::time::Duration::from_secs(1));
    active.kill();
    let heard = standby.wait_for("the new primary", |e| matches!(e, Event::Takeover { .. }));
    let Event::Takeover { detect_us, .. } = heard else { unreachable!("the filter above") };
    Some(detect_us)
}
