//! A guest that boots the kernel of its own disk (`--boot disk`). It crashes at once, so it restarts again and again, and
//! each restart reads the disk of the host where the VM runs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use outlive::events::Event;

use crate::support::{Habits, Process, Side, WRITTEN, World, crashing_kernel, wait_until, writer_with};

const SIZE: u64 = 16 << 20;
const MENU: &str = "set default=0\n\
                    menuentry 'first' {\n  linux /boot/kernel root=/dev/vda number=1\n}\n\
                    menuentry 'second' {\n  linux /boot/kernel root=/dev/vda number=2\n}\n\
                    menuentry 'none' {\n  linux /boot/text root=/dev/vda number=3\n}\n";

/// A disk with a menu of three entries, the last of which is no kernel. That of the others crashes at once.
fn disk(world: &World, name: &str) -> Option<PathBuf> {
    disk_with(world, name, &crashing_kernel())
}

fn disk_with(world: &World, name: &str, kernel: &[u8]) -> Option<PathBuf> {
    let (tree, image) = (world.dir().join(format!("{name}.tree")), world.dir().join(format!("{name}.img")));
    fs::create_dir_all(tree.join("boot/grub")).unwrap();
    fs::write(tree.join("boot/kernel"), kernel).unwrap();
    fs::write(tree.join("boot/text"), "no kernel").unwrap();
    // As long as nobody changes it, this is carried out never.
    let bomb = format!("while false; do\nmenuentry x {} {{ true\n }}\ndone\n", r#""" "#.repeat(20_000));
    fs::write(tree.join("boot/grub/grub.cfg"), format!("{MENU}{bomb}")).unwrap();
    File::create(&image).unwrap().set_len(SIZE).unwrap();
    let mke2fs = ["/usr/sbin/mke2fs", "/sbin/mke2fs"].into_iter().find(|path| Path::new(path).is_file());
    let Some(mke2fs) = mke2fs else {
        println!("skipped: no mke2fs here; to get it: apt-get install e2fsprogs");
        return None;
    };
    let mut command = Command::new(mke2fs);
    command.args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree).arg(&image);
    assert!(command.status().unwrap().success());
    Some(image)
}

/// Changes the image behind everybody's back: `from` becomes `to` wherever it is.
fn change(image: &Path, from: &[u8], to: &[u8]) {
    let bytes = fs::read(image).unwrap();
    let file = File::options().write(true).open(image).unwrap();
    let places = bytes.windows(from.len()).enumerate().filter(|(_, it)| *it == from).map(|(at, _)| at as u64);
    let places: Vec<u64> = places.collect();
    assert!(!places.is_empty(), "the image has it");
    places.iter().for_each(|at| file.write_all_at(to, *at).unwrap());
}

fn count(process: &mut Process, wanted: impl Fn(&Event) -> bool) -> usize {
    process.events().filter(|event| wanted(event)).count()
}

/// Waits until the entry has been booted so many times.
fn wait_booted(process: &mut Process, title: &str, line: &str, times: usize) {
    let is_it = |event: &Event| matches!(event, Event::BootsFromDisk { entry, command_line, .. } if entry == title && command_line == line);
    wait_until(&format!("{title} to boot"), || count(process, is_it) >= times);
}

const FIRST: &str = "root=/dev/vda number=1 console=ttyS0 panic=7";
const SECOND: &str = "root=/dev/vda number=2 console=ttyS0 panic=7";

#[test]
fn each_restart_reads_the_disk_and_one_that_cannot_be_read_costs_the_guest_nothing() {
    let Some(world) = World::new() else { return };
    let Some(image) = disk(&world, "a") else { return };
    let path = format!("path={},serial=boots", image.display());
    let options = ["--boot", "disk=boots", "--append", "panic=7", "--disk", &path];
    let mut vm = world.run_with(Side::A, &options);
    wait_booted(&mut vm, "first", FIRST, 2);
    change(&image, b"set default=0", b"set default=1");
    wait_booted(&mut vm, "second", SECOND, 1);
    let last = |event: &Event| matches!(event, Event::BootsLastKernel { .. });
    let restarts = |event: &Event| matches!(event, Event::GuestRestarted { .. });
    assert_eq!(count(&mut vm, last), 0);
    // What is the default now is no kernel.
    change(&image, b"set default=1", b"set default=2");
    wait_until("its last kernel", || count(&mut vm, last) == 1);
    // No file system any more.
    change(&image, b"\x53\xef\x01\x00", &[0; 4]);
    let before = count(&mut vm, restarts);
    wait_until("its last kernel once more", || {
        count(&mut vm, last) >= 2 && count(&mut vm, restarts) > before
    });
    assert!(!vm.ended(), "{}", vm.log());
    assert!(vm.log().contains("THE GUEST RESTARTS WITH ITS LAST KERNEL"), "{}", vm.log());
    vm.kill();
}

/// A protected guest that boots from its disk, and its standby with an image of its own.
fn pair(world: &World, image: &Path, other: &Path) -> (Process, Process) {
    let (here, there) = (format!("path={}", image.display()), format!("path={},overwrite", other.display()));
    let (a, b) = (Side::A.addr().to_string(), Side::B.addr().to_string());
    // The audit would find what the tests do to the images, and make the copy anew.
    let standby = world.standby_with(Side::B, &["--disk", &there, "--standby", &a, "--audit", "off"]);
    let options =
        ["--boot", "disk", "--append", "panic=7", "--disk", &here, "--standby", &b, "--audit", "off"];
    let mut active = world.run_with(Side::A, &options);
    active.wait_protected();
    (active, standby)
}

#[test]
fn after_a_takeover_the_disk_of_the_new_host_is_read() {
    let Some(world) = World::new() else { return };
    let (Some(image), Some(other)) = (disk(&world, "a"), disk(&world, "b")) else { return };
    let (mut active, mut standby) = pair(&world, &image, &other);
    // Not by the guest, so the other host does not hear of it.
    change(&image, b"set default=0", b"set default=1");
    wait_booted(&mut active, "second", SECOND, 1);
    active.kill();
    standby.wait_takeover();
    wait_booted(&mut standby, "first", FIRST, 1);
    change(&other, b"set default=0", b"set default=1");
    wait_booted(&mut standby, "second", SECOND, 1);
    standby.kill();
}

/// A guest that writes to another disk, and crashes, is seen to run again: it is not enough that a restart is told of.
#[test]
fn a_guest_whose_disk_has_no_kernel_any_more_runs_again_with_its_last_one() {
    let Some(world) = World::new() else { return };
    let kernel = writer_with(Habits { life: Some(300), ..Habits::default() });
    let Some(image) = disk_with(&world, "a", &kernel) else { return };
    let written = world.dir().join("written.img");
    File::create(&written).unwrap().set_len(WRITTEN).unwrap();
    let (first, second) =
        (format!("path={}", written.display()), format!("path={},serial=boots", image.display()));
    let options = ["--boot", "disk=boots", "--append", "panic=7", "--disk", &first, "--disk", &second];
    let mut vm = world.run_with(Side::A, &options);
    wait_booted(&mut vm, "first", FIRST, 2);
    let last = |event: &Event| matches!(event, Event::BootsLastKernel { .. });
    // A write that was in flight at the crash may come once.
    let runs = |vm: &mut Process| {
        for _ in 0..3 {
            let before = fs::read(&written).unwrap();
            wait_until("the guest writes", || fs::read(&written).unwrap() != before);
        }
        assert!(!vm.ended(), "{}", vm.log());
    };
    // The default is no kernel; then there is no file system.
    change(&image, b"set default=0", b"set default=2");
    wait_until("its last kernel", || count(&mut vm, last) >= 1);
    runs(&mut vm);
    change(&image, b"\x53\xef\x01\x00", &[0; 4]);
    let before = count(&mut vm, last);
    // That of the restart that was under way, and the next one.
    wait_until("its last kernel once more", || count(&mut vm, last) >= before + 2);
    runs(&mut vm);
    vm.kill();
}

/// The most memory that a process has had, in bytes.
fn peak(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// A guest whose disk says without end what would be in a menu gets its last kernel, on each of its hosts, and they keep
/// their memory.
#[test]
fn a_script_without_end_costs_a_protected_guest_its_new_kernel_and_nothing_else() {
    let Some(world) = World::new() else { return };
    let (Some(image), Some(other)) = (disk(&world, "a"), disk(&world, "b")) else { return };
    let (mut active, mut standby) = pair(&world, &image, &other);
    wait_booted(&mut active, "first", FIRST, 1);
    let last = |event: &Event| matches!(event, Event::BootsLastKernel { .. });
    let before = peak(&active);
    change(&image, b"while false; do", b"while true;  do");
    change(&other, b"while false; do", b"while true;  do");
    wait_until("its last kernel, twice", || count(&mut active, last) >= 2);
    assert!(active.log().contains("would need more memory or work than any"), "{}", active.log());
    // It was some gigabytes.
    let grown = peak(&active).saturating_sub(before);
    assert!(grown < 512 << 20, "{grown} bytes for a script");
    assert!(!active.ended() && !standby.ended(), "{}", active.log());
    active.kill();
    standby.wait_takeover();
    wait_until("its last kernel at the other host", || count(&mut standby, last) >= 1);
    // The disk is as good as it was before.
    change(&other, b"while true;  do", b"while false; do");
    wait_booted(&mut standby, "first", FIRST, 1);
    standby.kill();
}
