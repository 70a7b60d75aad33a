//! A disk that both hosts write to. No write of the lost host may land after the new one's, so a takeover waits until the
//! lost host has no permission left; and no second VM begins on such a disk.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::signal::Signal;
use outlive::events::Event;

use crate::hand_over::hand_over;
use crate::support::{Pace, Process, Proxy, Side, Slow, Small, WRITTEN, World, wait_until, writer_kernel};

/// Long, so that a busy machine does not decide who is faster.
const DEAD_AFTER: Duration = Duration::from_secs(8);

/// An operator does not wait longer for the answer than 15 s, and the standby waits for this time.
const SOON_DEAD: Duration = Duration::from_secs(4);

/// Bytes that the guest writes at a time.
const BLOCK: usize = 4096;

/// A guest that writes to the shared disk all the time.
struct Sharing {
    world: World,
    disk: PathBuf,
    dead_after: Duration,
}

impl Sharing {
    fn new() -> Option<Self> {
        let world = World::new()?;
        fs::write(world.dir().join("writer"), writer_kernel()).unwrap();
        let mut sharing = Self { world, disk: PathBuf::new(), dead_after: DEAD_AFTER };
        let place = sharing.world.dir().to_path_buf();
        sharing.put_disk(&place);
        Some(sharing)
    }

    /// The disk is in this directory.
    fn put_disk(&mut self, place: &Path) {
        self.disk = place.join("shared.img");
        File::create(&self.disk).unwrap().set_len(WRITTEN + (1 << 20)).unwrap();
    }

    fn standby(&self, side: Side) -> Process {
        let (disk, there) = (format!("path={}", self.disk.display()), side.other().addr().to_string());
        self.world.standby_with(side, &["--disk", &disk, "--standby", &there])
    }

    fn run(&self, side: Side, more: &[&str]) -> Process {
        let disk = format!("path={},shared", self.disk.display());
        let kernel = self.world.dir().join("writer").display().to_string();
        let dead_after = format!("{}s", self.dead_after.as_secs());
        let options = ["--disk", &disk, "--kernel", &kernel, "--dead-after", &dead_after];
        self.world.run_with(side, &[&options[..], more].concat())
    }

    fn written(&self) -> Vec<u8> {
        let mut bytes = vec![0; WRITTEN as usize];
        File::open(&self.disk).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn wait_written(&self) {
        let before = self.written();
        wait_until("the guest writes to its disk", || self.written() != before);
    }

    fn note(&self) -> String {
        fs::read_to_string(format!("{}.outlive-shared", self.disk.display())).unwrap()
    }

    /// The note as if another host had written it; in a test both hosts are one machine.
    fn pretend_another_host(&self) {
        let of_machine = |line: &str| match line.starts_with("machine = ") {
            true => "machine = \"another\"\n".to_owned(),
            false => format!("{line}\n"),
        };
        let note: String = self.note().lines().map(of_machine).collect();
        fs::write(format!("{}.outlive-shared", self.disk.display()), note).unwrap();
    }
}

/// How many writes the guest has made, if its disk is as these leave it, one after the other: the guest makes the next
/// one when the last one is complete. Its numbers and places are those of `support/writer.rs`.
fn writes_in_order(disk: &[u8]) -> Option<usize> {
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let ends = |block: &[u8]| [number(&block[..8]), number(&block[BLOCK - 8..])];
    let found: Vec<_> = disk.chunks(BLOCK).map(ends).collect();
    let mut left = vec![0; found.len()];
    let is_right = |left: &[u64], at: usize| found[at] == [left[at]; 2];
    let mut wrong = (0..found.len()).filter(|&at| !is_right(&left, at)).count();
    let mut number: u64 = 0x9e37_79b9;
    // Far more than a test has time for.
    for count in 1..=1 << 24 {
        number ^= number << 13;
        number ^= number >> 7;
        number ^= number << 17;
        let at = (number as usize & 0x3ff8) * 512 / BLOCK;
        wrong -= usize::from(!is_right(&left, at));
        left[at] = number;
        wrong += usize::from(!is_right(&left, at));
        if wrong == 0 {
            return Some(count);
        }
    }
    None
}

/// From the last word of the lost host to the VM's first instruction here.
fn took(standby: &mut Process) -> Duration {
    let took = |e: &Event| match e {
        Event::Takeover { total_us, .. } => Some(Duration::from_micros(*total_us)),
        _ => None,
    };
    standby.events().find_map(took).expect("a takeover")
}

#[test]
fn a_takeover_with_a_shared_disk_waits_for_the_end_of_the_lost_hosts_permission() {
    let Some(sharing) = Sharing::new() else { return };
    let mut standby = sharing.standby(Side::B);
    let mut active = sharing.run(Side::A, &["--standby", &Side::B.addr().to_string()]);
    active.wait_protected();
    sharing.wait_written();
    // Without a shared disk the end of the connection would be enough.
    active.kill();
    assert_eq!(standby.wait_takeover(), 2);
    let took = took(&mut standby);
    assert!(took >= DEAD_AFTER, "taken over {took:?} after the lost host was heard last");
    sharing.wait_written();
    wait_until("the note follows", || sharing.note().contains("generation = 2"));
}

#[test]
fn a_connection_that_ends_at_the_standby_only_takes_no_shared_disk_from_a_primary_that_lives() {
    let Some(sharing) = Sharing::new() else { return };
    let mut standby = sharing.standby(Side::B);
    let proxy = Proxy::start(&sharing.world, Side::A);
    let mut active = sharing.run(Side::A, &["--standby", &proxy.addr()]);
    active.wait_protected();
    sharing.wait_written();
    proxy.part();
    standby.wait_for("the loss", |e| matches!(e, Event::LinkLost { .. }));
    wait_until("one of them has the VM", || {
        active.has(|e| matches!(e, Event::Won { .. })) || standby.took_over()
    });
    // The primary stops letting writes out, and asks, before the standby may ask.
    if standby.took_over() {
        let took = took(&mut standby);
        assert!(took >= DEAD_AFTER, "taken over {took:?} after the primary was heard last");
        assert_eq!(active.wait_exit(), 3);
    } else {
        assert_eq!(standby.wait_exit(), 3);
        assert!(!active.ended());
    }
    sharing.wait_written();
}

/// The guest always has a write under way, and waits for it, so the last checkpoint holds one. It is let out while the
/// guest stands still, and must count as done as soon as the storage has it. Nobody fences: what the old host wrote late
/// would stay.
#[test]
fn a_vm_that_writes_to_a_shared_disk_is_handed_over() {
    let Some(mut sharing) = Sharing::new() else { return };
    // In memory: the storage of a busy machine may hang for longer than a hand-over waits. And slow, so that the write is
    // still under way when the guest stands still.
    let memory = Small::mount(sharing.world.dir().join("memory"), 16);
    let Some(slow) = Slow::mount(sharing.world.dir().join("slow"), memory.path()) else { return };
    sharing.put_disk(slow.path());
    sharing.dead_after = SOON_DEAD;
    let mut standby = sharing.standby(Side::B);
    let mut active = sharing.run(Side::A, &["--standby", &Side::B.addr().to_string()]);
    active.wait_protected();
    sharing.wait_written();
    slow.set(Pace { write: Duration::from_millis(300), ..Pace::default() });
    let (code, said) = hand_over(&active);
    slow.set(Pace::default());
    assert_eq!(code, Some(0), "{said}: {}", active.log());
    assert!(said.contains("generation 2"), "{said}");
    assert_eq!(standby.wait_takeover(), 2);
    active.wait_end();
    let blamed = active.has(|e| matches!(e, Event::HostFault { .. } | Event::HandOver { kept: Some(_) }));
    assert!(!blamed, "{}", active.log());
    sharing.wait_written();
    let restarted = standby.has(|e| matches!(e, Event::GuestRestarted { .. }));
    assert!(!restarted, "a write has failed: {}", standby.log());
    // Nobody writes any more.
    standby.kill();
    let count = writes_in_order(&sharing.written()).expect("a disk as the guest's writes leave it");
    println!("the guest has made {count} writes");
}

#[test]
fn no_second_vm_begins_on_a_shared_disk() {
    let Some(sharing) = Sharing::new() else { return };
    let refused = |words: &str| {
        let mut second = sharing.run(Side::B, &[]);
        assert_eq!(second.wait_exit(), 2, "{}", second.log());
        assert!(second.log().contains(words), "{}", second.log());
    };
    let active = sharing.run(Side::A, &[]);
    sharing.wait_written();
    // On this machine the lock tells. On another host the note does, also after the first one has died.
    refused("is in use by another process");
    active.kill();
    sharing.pretend_another_host();
    let before = sharing.written();
    refused("--accept-shared-disk");
    assert!(sharing.written() == before, "the second guest has written");
    let mut accepted = sharing.run(Side::B, &["--accept-shared-disk"]);
    accepted.wait_for("accepted", |e| matches!(e, Event::Accepted { .. }));
    sharing.wait_written();
    assert!(sharing.note().contains("generation = 2"), "{}", sharing.note());
    // A VM that has ended in order runs nowhere.
    wait_until("it ends", || {
        let ended = accepted.ended();
        if !ended {
            accepted.signal(Signal::SIGTERM);
        }
        ended
    });
    assert_eq!(accepted.wait_exit(), 0);
    assert!(sharing.note().contains("over = true"), "{}", sharing.note());
    sharing.pretend_another_host();
    let third = sharing.run(Side::A, &[]);
    sharing.wait_written();
    assert!(sharing.note().contains("generation = 3") && sharing.note().contains("over = false"));
    drop(third);
}
