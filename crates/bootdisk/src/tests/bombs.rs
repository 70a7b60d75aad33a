//! Disks that are made to cost more than a boot: memory, time, or both. What counts is what the budgets say, and that each
//! step asks them; not how long it takes here.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use super::*;

const KERNEL: &str = "linux /boot/vmlinuz-6.1.0-13-amd64\n";

fn with_script(text: &str) -> Option<Vec<u8>> {
    file_system(&Tree::new(&[("/boot/grub/grub.cfg", text)]).kernels("/boot"), &["-t", "ext4"])
}

/// Many words, items, parts, values, arguments, or reads; each in a loop that never ends.
fn scripts() -> Vec<(&'static str, String)> {
    let forever = |command: &str| format!("while true; do {command}; done\n{KERNEL}");
    let numbers = (0..3000).map(|it| it.to_string()).collect::<Vec<_>>().join(" ");
    vec![
        ("items", forever(&format!("menuentry x {} {{ true\n }}", r#""" "#.repeat(30_000)))),
        ("items that do not fit", forever(&format!("menuentry x {} {{ true\n }}", r#""" "#.repeat(300_000)))),
        ("parts without text", forever(&format!("x {}", "$@ ".repeat(20_000)))),
        ("parts of a word", forever(&format!("x \"{}\"", "$a".repeat(20_000)))),
        ("values", forever(&format!("for i in {numbers}; do for j in {numbers}; do\ndone\ndone"))),
        (
            "arguments",
            format!("function f {{ f \"$@\" \"$@\" {}; }}\n", "$@ ".repeat(500))
                + &forever(&format!("f {}", "a ".repeat(500))),
        ),
        ("a long name", forever(&format!("x {}", format!("${{{}}} ", "a".repeat(3000)).repeat(100)))),
        ("environments", forever("load_env")),
        ("entries", forever("blscfg")),
        ("tests", forever(&format!("[ {} ]", "-f /boot -o ".repeat(10_000)))),
    ]
}

/// A tree with a large environment block and entries that are many words.
fn tree(text: &str) -> Tree {
    let tree = Tree::new(&[("/boot/grub/grub.cfg", text)]).kernels("/boot");
    let lines = "next_entry=a\n=\n".repeat(4000);
    tree.put("/boot/grub/grubenv", format!("# GRUB Environment Block\n{lines}").as_bytes());
    for number in 0..20 {
        let entry = format!("linux /vmlinuz\ninitrd {}\n", "a ".repeat(30_000));
        tree.put(&format!("/boot/loader/entries/{number}.conf"), entry.as_bytes());
    }
    tree
}

#[test]
fn scripts_that_want_all_memory_get_a_little() {
    for (what, text) in scripts() {
        let Some(fs) = file_system(&tree(&text), &["-t", "ext4"]) else { return };
        let error = boot(fs).unwrap_err();
        assert!(matches!(error, ReadError::Memory), "{what}: {error}");
    }
}

/// What distributions and people write needs little of it.
#[test]
fn a_usual_configuration_is_far_from_the_limits() {
    let tree = debian("0");
    // As many kernels as nobody has.
    let text = configured(DEBIAN, "/boot", "0");
    tree.put("/boot/grub/grub.cfg", text.repeat(20).as_bytes());
    let Some(fs) = file_system(&tree, &["-t", "ext4"]) else { return };
    let limits = Limits { memory: 16 << 20, rest: 64 << 20, ..Limits::default() };
    assert!(read(Box::new(fs), &limits).is_ok());
    let Some(fs) = file_system(&debian("0"), &["-t", "ext4"]) else { return };
    let limits = Limits { memory: 1 << 20, rest: 4 << 20, ..Limits::default() };
    assert!(read(Box::new(fs), &limits).is_ok());
}

/// A disk that is wanted until so many questions were asked, and none of the budgets ends it before.
struct Unwanted {
    bytes: Vec<u8>,
    left: Cell<u64>,
}

impl Disk for Unwanted {
    fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes.read_at(buffer, offset)
    }

    fn is_wanted(&self) -> bool {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        left > 0
    }
}

#[test]
fn every_step_asks_whether_anybody_waits() {
    let endless =
        Limits { memory: u64::MAX, rest: u64::MAX / 4, own_time: Duration::MAX, ..Limits::default() };
    for (what, text) in scripts() {
        let Some(fs) = file_system(&tree(&text), &["-t", "ext4"]) else { return };
        // More questions than reading asks.
        let disk = Unwanted { bytes: fs, left: Cell::new(100_000) };
        let error = read(Box::new(disk), &endless).unwrap_err();
        assert!(matches!(error, ReadError::Unwanted), "{what}: {error}");
    }
}

#[test]
fn an_item_keeps_some_arguments_and_texts_of_the_disk_are_short_for_people() {
    let words = "a ".repeat(1000);
    let kernel = KERNEL.trim();
    let text = format!("menuentry '{}' {words} {{\n{kernel} y=${{64}} z=${{65}}\n}}\n", "t".repeat(5000));
    let Some(fs) = with_script(&text) else { return };
    let boot = boot(fs).unwrap();
    assert_eq!(boot.command_line, "y=a z=");
    assert!(boot.found.entry.len() < 300, "{}", boot.found.entry.len());
}

/// Where the inode of a path is in an image of blocks of so many bytes.
fn inode(fs: &[u8], path: &str, block: usize) -> Option<usize> {
    let image = tempfile::NamedTempFile::new().unwrap();
    fs::write(image.path(), fs).unwrap();
    let done = program("debugfs")?.args(["-R", &format!("imap {path}")]).arg(image.path()).output().unwrap();
    let said = String::from_utf8(done.stdout).unwrap();
    let (_, place) = said.split_once("located at block ").unwrap();
    let (number, offset) = place.trim().split_once(", offset 0x").unwrap();
    Some(number.parse::<usize>().unwrap() * block + usize::from_str_radix(offset, 16).unwrap())
}

/// A map of blocks that leads to one block without names, over and over again, for so many bytes.
fn endless_map(fs: &mut [u8], inode: usize, bytes: u64) {
    let free = fs.len() / 4096 - 10;
    fs[free * 4096..(free + 1) * 4096].fill(0);
    fs[free * 4096 + 4..free * 4096 + 6].copy_from_slice(&4096_u16.to_le_bytes());
    for level in 1..4 {
        let pointer = (free as u32 + level - 1).to_le_bytes();
        let at = (free + level as usize) * 4096;
        fs[at..at + 4096].chunks_exact_mut(4).for_each(|place| place.copy_from_slice(&pointer));
    }
    for (number, place) in fs[inode + 0x28..inode + 0x28 + 60].chunks_exact_mut(4).enumerate() {
        let block = free as u32 + number.saturating_sub(11) as u32;
        place.copy_from_slice(&block.to_le_bytes());
    }
    fs[inode + 4..inode + 8].copy_from_slice(&(bytes as u32).to_le_bytes());
    fs[inode + 0x6c..inode + 0x70].copy_from_slice(&((bytes >> 32) as u32).to_le_bytes());
}

#[test]
fn a_directory_of_terabytes_is_not_looked_through() {
    let Some(fs) = file_system(&debian("0"), &["-t", "ext2", "-b", "4096"]) else { return };
    let Some(at) = inode(&fs, "/boot", 4096) else { return };
    let mut harmful = fs.clone();
    endless_map(&mut harmful, at, 4 << 40);
    let error = boot(harmful).unwrap_err().to_string();
    assert!(error.contains("a directory on its way has 4398046511104 bytes"), "{error}");
    // What is not too long is looked through as often as the budget lets it, known or not.
    let mut harmful = fs;
    endless_map(&mut harmful, at, 8 << 20);
    let limits = Limits { rest: 20 << 20, ..Limits::default() };
    let error = read(Box::new(harmful), &limits).unwrap_err();
    assert!(matches!(error, ReadError::Budget), "{error}");
}

/// A journal whose list of blocks is one block over and over again.
#[test]
fn a_journal_with_a_block_twice_or_with_more_than_any_is_not_read() {
    for kind in ["ext4", "ext3"] {
        let Some(mut fs) = file_system(&debian("0"), &["-t", kind, "-b", "4096"]) else { return };
        // It was not unmounted.
        fs[1024 + 0x60] |= 4;
        boots(fs.clone(), NEW);
        let Some(at) = inode(&fs, "<8>", 4096) else { return };
        for bytes in [64 << 20, 8 << 40] {
            let mut harmful = fs.clone();
            // No extents.
            harmful[at + 0x22] &= !8;
            endless_map(&mut harmful, at, bytes);
            let boot = boots(harmful, NEW);
            let why = if bytes == 64 << 20 { "it has a block twice" } else { "it is longer than any" };
            assert!(boot.found.notes[0].contains(why), "{:?}", boot.found.notes);
        }
    }
}

/// A disk whose guest goes on writing.
struct Changing {
    bytes: Vec<u8>,
    reads: Cell<u64>,
}

impl Disk for Changing {
    fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.bytes.read_at(buffer, offset)?;
        self.reads.set(self.reads.get() + 1);
        // All but what says where everything is.
        if self.reads.get() > 40 && offset > 1 << 16 {
            buffer.fill(0x55);
        }
        Ok(())
    }
}

#[test]
fn a_disk_that_changes_while_it_is_read_is_refused() {
    // Directories between which the blocks that are kept do not suffice.
    let tree = debian("0");
    let names = |at: u32| format!("/boot/loader/entries/{at}.conf");
    (0..200).for_each(|at| tree.put(&names(at), &b"# nothing\n".repeat(400)));
    let text = configured(DEBIAN, "/boot", "0");
    tree.put("/boot/grub/grub.cfg", format!("blscfg\n{text}").as_bytes());
    let Some(fs) = file_system(&tree, &["-t", "ext4", "-b", "4096"]) else { return };
    assert!(boot(fs.clone()).is_ok());
    let error = read(Box::new(Changing { bytes: fs, reads: Cell::new(0) }), &Limits::default()).unwrap_err();
    assert!(matches!(error, ReadError::Changed), "{error}");
}
