//! The audit of disks: parts of both hosts' images are compared all the time, and a copy that differs is made anew.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use outlive::events::{Event, Place};

use crate::hand_over::hand_over;
use crate::support::{
    Dice, Habits, Pace, Process, Side, Slow, Small, WRITTEN, World, wait_until, writer_with,
};

/// Little more than what the guest writes, so that a round takes about two seconds.
const SIZE: u64 = WRITTEN + (1 << 20);
const CHUNK: u64 = 64 << 10;
/// Mebibytes for a standby's image, and for a journal that is not emptied before it has 64.
const MEMORY: u64 = 160;

/// Two hosts with an image each, and a guest that writes to its image all the time.
struct Writing {
    world: World,
    images: [PathBuf; 2],
    audit: &'static str,
    /// The VM's further disks, on each host.
    more: [Vec<String>; 2],
}

impl Writing {
    /// With images in these directories, of different data.
    fn new(world: World, places: [&Path; 2], audit: &'static str) -> Self {
        Self::with(world, places, audit, Habits::default())
    }

    /// The same, and a guest that does something else, too.
    fn with(world: World, places: [&Path; 2], audit: &'static str, habits: Habits) -> Self {
        fs::write(world.dir().join("writer"), writer_with(habits)).unwrap();
        let images = [places[0].join("a.img"), places[1].join("b.img")];
        let mut dice = Dice::new();
        for image in &images {
            let file = File::create(image).unwrap();
            file.set_len(SIZE).unwrap();
            for _ in 0..20 {
                let bytes = vec![dice.below(256) as u8; 1 + dice.below(200_000) as usize];
                file.write_all_at(&bytes, dice.below(SIZE - bytes.len() as u64)).unwrap();
            }
        }
        Self { world, images, audit, more: Default::default() }
    }

    fn image(&self, side: Side) -> &Path {
        &self.images[side as usize]
    }

    fn options(&self, side: Side) -> Vec<String> {
        let there = side.other().addr().to_string();
        let mut disk = format!("path={}", self.image(side).display());
        // At first the other image is unknown.
        let known = PathBuf::from(format!("{}.outlive", self.image(side).display())).exists();
        if !known && side == Side::B {
            disk.push_str(",overwrite");
        }
        // A busy host must not lose its standby by that. A process that is killed is noticed at once.
        let dead_after = ["--dead-after", "20s"];
        let options = [&["--standby", &there, "--disk", &disk, "--audit", self.audit], &dead_after[..]];
        let more = self.more[side as usize].iter().flat_map(|disk| ["--disk", disk]);
        options.concat().into_iter().chain(more).map(Into::into).collect()
    }

    fn standby(&self, side: Side) -> Process {
        // The primary says what kind of disk it is.
        let of_disk = |option: String| option.replace(",readonly", "").replace(",shared", "");
        let options: Vec<_> = self.options(side).into_iter().map(of_disk).collect();
        self.world.standby_with(side, &options.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// One that stays a host of the pair after its takeover.
    fn staying_standby(&self, side: Side) -> Process {
        let options = self.options(side);
        self.world.staying_standby_with(side, &options.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn run(&self, side: Side) -> Process {
        let (options, kernel) = (self.options(side), self.world.dir().join("writer").display().to_string());
        let listen = side.addr().to_string();
        let options = options.iter().map(String::as_str).chain(["--kernel", &kernel, "--listen", &listen]);
        self.world.run_with(side, &options.collect::<Vec<_>>())
    }

    fn read(&self, side: Side, offset: u64, bytes: u64) -> Vec<u8> {
        let mut read = vec![0; bytes as usize];
        File::open(self.image(side)).unwrap().read_exact_at(&mut read, offset).unwrap();
        read
    }

    /// Changes a byte behind the host's back.
    fn flip(&self, side: Side, at: u64) {
        let image = File::options().read(true).write(true).open(self.image(side)).unwrap();
        let mut byte = [0];
        image.read_exact_at(&mut byte, at).unwrap();
        image.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
    }

    fn wait_written(&self, side: Side) {
        let before = self.read(side, 0, WRITTEN);
        wait_until("the guest writes to its disk", || self.read(side, 0, WRITTEN) != before);
    }
}

/// Bytes of disks compared, and rounds, as the primary says.
fn compared(primary: &mut Process) -> (u64, u64) {
    let counts = |event: &Event| match event {
        Event::Stats(stats) => Some((stats.audit.disk_bytes, stats.audit.disk_rounds)),
        _ => None,
    };
    primary.events().filter_map(counts).last().unwrap_or_default()
}

/// Bytes of disks that were left out of a round.
fn left_out(primary: &mut Process) -> u64 {
    let counts = |event: &Event| match event {
        Event::Stats(stats) => Some(stats.audit.disk_left_out),
        _ => None,
    };
    primary.events().filter_map(counts).last().unwrap_or_default()
}

fn differs(event: &Event) -> bool {
    matches!(event, Event::AuditDiffers { .. })
}

fn wait_round(primary: &mut Process) {
    let (_, rounds) = compared(primary);
    let found = primary.events().filter(|event| differs(event)).count();
    // On a host that is busy reads take long, and disks rest nine times as long.
    while compared(primary).1 <= rounds + 1 {
        let (before, _) = compared(primary);
        wait_until("some of the disk has had its turn", || {
            let now = primary.events().filter(|event| differs(event)).count();
            assert_eq!(now, found, "{}", primary.log());
            let (bytes, now) = compared(primary);
            bytes != before || now > rounds + 1
        });
    }
}

#[test]
fn a_byte_that_differs_on_the_standbys_disk_is_found_and_the_image_is_made_anew() {
    let Some(world) = World::new() else { return };
    let place = world.dir().to_path_buf();
    let writing = Writing::new(world, [&place, &place], "100");
    let mut standby = writing.standby(Side::B);
    let mut primary = writing.run(Side::A);
    primary.wait_protected();
    wait_round(&mut primary);
    assert!(!standby.has(differs), "{}", standby.log());
    // The second time it is the primary's image that has changed, which is right by definition.
    let at = SIZE - 4097;
    for (time, side) in [Side::B, Side::A].into_iter().enumerate() {
        writing.wait_written(Side::B);
        writing.flip(side, at);
        let place = Place::Disk { disk: 0, offset: at / CHUNK * CHUNK, bytes: CHUNK };
        let told = |e: &Event| matches!(e, Event::AuditDiffers { place: it, .. } if *it == place);
        primary.wait_for("told of the difference", told);
        primary.wait_for("without its standby", |e| matches!(e, Event::Unprotected { .. }));
        primary.wait_protected();
        wait_until("both say so", || standby.events().filter(|e| told(e)).count() == time + 1);
        assert!(!standby.ended() && !standby.took_over());
        assert_eq!(writing.read(Side::B, at - 100, 200), writing.read(Side::A, at - 100, 200));
    }

    primary.kill();
    standby.wait_takeover();
    writing.wait_written(Side::B);
    assert_eq!(
        writing.read(Side::B, WRITTEN, SIZE - WRITTEN),
        writing.read(Side::A, WRITTEN, SIZE - WRITTEN)
    );
    assert!(!standby.has(|e| matches!(e, Event::GuestRestarted { .. })), "{}", standby.log());
}

#[test]
#[ignore = "takes minutes"]
fn a_guest_that_writes_to_its_disk_all_the_time_never_differs_and_after_takeovers_neither() {
    let Some(world) = World::new() else { return };
    let place = world.dir().to_path_buf();
    let writing = Writing::new(world, [&place, &place], "100");
    let mut standby = writing.standby(Side::B);
    let mut primary = writing.run(Side::A);
    for side in [Side::B, Side::A, Side::B] {
        primary.wait_protected();
        wait_round(&mut primary);
        writing.wait_written(side);
        let (bytes, rounds) = compared(&mut primary);
        let left_out = left_out(&mut primary);
        println!("{bytes} bytes compared in {rounds} rounds, {left_out} left out");
        // All of it, although most chunks are written in nearly every epoch; and what is not says so.
        assert!(bytes + left_out >= rounds * SIZE, "{bytes} in {rounds} rounds, {left_out} left out");
        assert!(left_out <= bytes / 20, "{left_out} of {bytes}");
        assert!(!primary.has(differs) && !standby.has(differs), "{}", standby.log());
        primary.kill();
        standby.wait_takeover();
        primary = standby;
        standby = writing.standby(side.other());
    }
    primary.wait_protected();
    assert!(!primary.has(differs) && !standby.has(differs), "{}", standby.log());
}

/// Discards, and writes of zeroes, are writes. A guest that crashes and restarts leaves a write in flight behind.
#[test]
fn a_guest_that_discards_and_restarts_never_differs_and_what_differs_is_found() {
    let Some(world) = World::new() else { return };
    let place = world.dir().to_path_buf();
    let habits = Habits { discards: true, life: Some(3000), ..Habits::default() };
    let writing = Writing::with(world, [&place, &place], "100", habits);
    let mut standby = writing.standby(Side::B);
    let mut primary = writing.run(Side::A);
    primary.wait_protected();
    let restarts = |primary: &mut Process| {
        primary.events().filter(|event| matches!(event, Event::GuestRestarted { .. })).count()
    };
    let before = restarts(&mut primary);
    wait_until("the guest restarts", || restarts(&mut primary) > before + 1);
    wait_round(&mut primary);
    assert!(!standby.has(differs), "{}", standby.log());
    let (bytes, rounds) = compared(&mut primary);
    let left_out = left_out(&mut primary);
    println!("{bytes} bytes compared in {rounds} rounds, {left_out} left out");
    assert!(bytes + left_out >= rounds * SIZE && left_out <= bytes / 20);
    let at = SIZE - 4097;
    writing.flip(Side::B, at);
    let place = Place::Disk { disk: 0, offset: at / CHUNK * CHUNK, bytes: CHUNK };
    primary.wait_for("told", |e| matches!(e, Event::AuditDiffers { place: it, .. } if *it == place));
    primary.wait_protected();
    wait_round(&mut primary);
    primary.kill();
    standby.wait_takeover();
    writing.wait_written(Side::B);
    assert_eq!(standby.events().filter(|event| differs(event)).count(), 1, "{}", standby.log());
}

/// What only the primary's image has, or what both hosts write to, is nobody's to compare.
#[test]
fn a_read_only_disk_and_a_shared_one_beside_it_are_not_compared() {
    let Some(world) = World::new() else { return };
    let place = world.dir().to_path_buf();
    let mut writing = Writing::new(world, [&place, &place], "100");
    let of = |name: &str| place.join(name);
    for name in ["shared.img", "read-only-a.img", "read-only-b.img"] {
        fs::write(of(name), vec![7; 3 * CHUNK as usize]).unwrap();
    }
    for side in Side::BOTH {
        let read_only = of(&format!("read-only-{}.img", side.letter()));
        writing.more[side as usize] = vec![
            format!("path={},readonly", read_only.display()),
            format!("path={},shared", of("shared.img").display()),
        ];
    }
    let mut standby = writing.standby(Side::B);
    let mut primary = writing.run(Side::A);
    primary.wait_protected();
    // Neither of them is read: what differs stays unnoticed.
    fs::write(of("read-only-b.img"), vec![8; 3 * CHUNK as usize]).unwrap();
    fs::write(of("shared.img"), vec![9; 3 * CHUNK as usize]).unwrap();
    wait_round(&mut primary);
    let (bytes, rounds) = compared(&mut primary);
    assert!(
        bytes >= rounds * SIZE - left_out(&mut primary) && bytes < (rounds + 1) * SIZE,
        "{bytes} in {rounds}"
    );
    assert!(!primary.has(differs) && !standby.has(differs), "{}", standby.log());
    // The disk that is written is compared all the same.
    writing.flip(Side::B, SIZE - 4097);
    primary.wait_for("told", |e| matches!(e, Event::AuditDiffers { place: Place::Disk { disk: 0, .. }, .. }));
    assert!(!standby.ended());
}

#[test]
#[ignore = "takes minutes"]
fn an_audit_of_disks_goes_on_after_a_hand_over() {
    let Some(world) = World::new() else { return };
    let place = world.dir().to_path_buf();
    let writing = Writing::new(world, [&place, &place], "100");
    let standby = writing.staying_standby(Side::B);
    let mut hosts = [writing.run(Side::A), standby];
    hosts[0].wait_protected();
    for (old, new, generation) in [(0, 1, 2), (1, 0, 3)] {
        wait_round(&mut hosts[old]);
        let (code, said) = hand_over(&hosts[old]);
        assert_eq!(code, Some(0), "{said}");
        let protected = |e: &Event| matches!(e, Event::Protected { generation: it, .. } if *it == generation);
        hosts[new].wait_for("protected again", protected);
    }
    wait_round(&mut hosts[0]);
    writing.wait_written(Side::B);
    for host in &mut hosts {
        assert!(!host.ended() && !host.has(differs), "{}", host.log());
    }
}

/// What a write does can be read long before the write is complete. Whoever compares it then finds a difference.
#[test]
#[ignore = "takes minutes"]
fn writes_that_take_long_never_differ() {
    let Some(world) = World::new() else { return };
    let (behind, mounted) = (world.dir().join("behind"), world.dir().join("slow"));
    fs::create_dir(&behind).unwrap();
    let Some(slow) = Slow::mount(mounted.clone(), &behind) else { return };
    let place = world.dir().to_path_buf();
    let writing = Writing::new(world, [&mounted, &place], "100");
    let mut standby = writing.standby(Side::B);
    let mut primary = writing.run(Side::A);
    primary.wait_protected();
    slow.set(Pace { write: Duration::from_millis(30), ..Pace::default() });
    for _ in 0..4 {
        wait_round(&mut primary);
        writing.wait_written(Side::B);
        assert!(!primary.has(differs) && !standby.has(differs), "{}", standby.log());
    }
    slow.set(Pace::default());
    primary.kill();
    standby.wait_takeover();
    assert!(!standby.has(differs), "{}", standby.log());
}

/// Nothing but the audit reads a standby's disk. A part of it that the disk cannot read, and tries for long, must not
/// hold up a guest, however fast it writes.
#[test]
fn a_standbys_disk_that_does_not_answer_a_read_delays_no_commit() {
    let Some(world) = World::new() else { return };
    // In memory: on a busy host making anything durable takes so long that its disk counts as slow.
    let memory = Small::mount(world.dir().join("memory"), MEMORY);
    let mounted = world.dir().join("slow");
    let Some(slow) = Slow::mount(mounted.clone(), memory.path()) else { return };
    let place = world.dir().to_path_buf();
    let writing = Writing::new(world, [&place, &mounted], "100");
    let mut standby = writing.standby(Side::B);
    let mut primary = writing.run(Side::A);
    primary.wait_protected();
    wait_round(&mut primary);
    // What the kernel has in memory needs no read. (To open the image later would wait for the read.)
    let image = File::open(writing.image(Side::B)).unwrap();
    posix_fadvise(image, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
    // A few of these are shorter than the time after which a disk counts as broken. Where the guest writes, a write would
    // wait for the kernel, which holds the pages that it reads.
    slow.set(Pace { read: Duration::from_secs(12), read_from: WRITTEN, ..Pace::default() });
    wait_until("a read takes long", || slow.waiting() > 0);
    let committed = |primary: &mut Process| {
        let count = |event: &Event| match event {
            Event::Stats(stats) => Some(stats.checkpoints),
            _ => None,
        };
        primary.events().filter_map(count).last().unwrap()
    };
    // Longer than a commit may wait for a disk that is slow.
    std::thread::sleep(Duration::from_secs(4));
    let before = committed(&mut primary);
    wait_until("checkpoints are committed", || {
        assert!(slow.waiting() > 0, "only when the read is over");
        committed(&mut primary) > before + 3
    });
    slow.set(Pace::default());
    assert!(!primary.has(|e| matches!(e, Event::Unprotected { .. })), "{}", standby.log());
    assert!(!primary.has(differs) && !standby.has(differs), "{}", standby.log());
    primary.kill();
    standby.wait_takeover();
    writing.wait_written(Side::B);
}

#[test]
fn an_audit_that_is_off_compares_no_disks() {
    let Some(world) = World::new() else { return };
    let place = world.dir().to_path_buf();
    let writing = Writing::new(world, [&place, &place], "off");
    let mut standby = writing.standby(Side::B);
    let mut primary = writing.run(Side::A);
    primary.wait_protected();
    writing.flip(Side::B, SIZE - 4097);
    // Long enough for a round.
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(compared(&mut primary), (0, 0));
    assert!(!primary.has(differs) && !standby.has(differs));
}
