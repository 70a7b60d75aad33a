//! Disks made by mke2fs and sfdisk, with the configurations of distributions.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use super::*;

const UUID: &str = "11111111-2222-4333-8444-555555555555";
const DEBIAN: &str = include_str!("tests/debian.cfg");
const UBUNTU: &str = include_str!("tests/ubuntu.cfg");
const FEDORA: &str = include_str!("tests/fedora.cfg");
const START: usize = 1 << 20;
const MEBIBYTE: u64 = 1 << 20;

/// A directory whose files become those of a file system.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new(files: &[(&str, &str)]) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        files.iter().for_each(|(path, text)| tree.put(path, text.as_bytes()));
        tree
    }

    fn put(&self, path: &str, bytes: &[u8]) {
        let path = self.0.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    }

    fn link(&self, path: &str, target: &str) {
        std::os::unix::fs::symlink(target, self.0.path().join(path.trim_start_matches('/'))).unwrap();
    }

    /// Two kernels with their initrds.
    fn kernels(self, prefix: &str) -> Self {
        for version in ["6.12.0-2-amd64", "6.1.0-13-amd64"] {
            self.put(&format!("{prefix}/vmlinuz-{version}"), format!("kernel {version}").as_bytes());
            self.put(&format!("{prefix}/initrd.img-{version}"), format!("initrd {version}").as_bytes());
        }
        self
    }
}

fn program(name: &str) -> Option<Command> {
    let places = ["/usr/sbin", "/sbin", "/usr/bin"].map(|place| Path::new(place).join(name));
    let found = places.into_iter().find(|path| path.is_file());
    if found.is_none() {
        println!("skipped: no {name} here; to get it: apt-get install e2fsprogs fdisk");
    }
    found.map(Command::new)
}

/// A file system with the tree in it. `None` if it cannot be made here.
fn file_system(tree: &Tree, options: &[&str]) -> Option<Vec<u8>> {
    file_system_of(16 * MEBIBYTE, tree, options)
}

fn file_system_of(bytes: u64, tree: &Tree, options: &[&str]) -> Option<Vec<u8>> {
    let image = tempfile::NamedTempFile::new().unwrap();
    image.as_file().set_len(bytes).unwrap();
    let mut command = program("mke2fs")?;
    command.args(["-q", "-F", "-L", "own", "-E", "root_owner=0:0"]).args(options);
    if !options.contains(&"-U") {
        command.args(["-U", UUID]);
    }
    assert!(command.arg("-d").arg(tree.0.path()).arg(image.path()).status().unwrap().success());
    Some(fs::read(image.path()).unwrap())
}

/// A disk with a table and these partitions.
fn disk(table: &str, partitions: &[&[u8]]) -> Option<Vec<u8>> {
    let image = tempfile::NamedTempFile::new().unwrap();
    let mut bytes = vec![0; START];
    let mut lines = format!("label: {table}\n");
    for partition in partitions {
        // A logical partition has a sector of its own in front.
        let start = if table == "dos" && bytes.len() > START { bytes.len() + START } else { bytes.len() };
        bytes.resize(start, 0);
        lines += &format!("start={}, size={}\n", start / 512, partition.len() / 512);
        bytes.extend_from_slice(partition);
    }
    bytes.resize(bytes.len() + START, 0);
    image.as_file().set_len(bytes.len() as u64).unwrap();
    let mut sfdisk = program("sfdisk")?;
    sfdisk.args(["--quiet", "--no-reread", "--no-tell-kernel"]).arg(image.path());
    let mut child = sfdisk.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), lines.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{lines}");
    let table = fs::read(image.path()).unwrap();
    let is_partition = |at: usize| bytes[at] != 0;
    let merged = table.iter().enumerate();
    Some(merged.map(|(at, byte)| if is_partition(at) { bytes[at] } else { *byte }).collect())
}

fn boot(disk: Vec<u8>) -> Result<Boot, ReadError> {
    read(Box::new(disk), &Limits::default())
}

fn configured(text: &str, prefix: &str, default: &str) -> String {
    text.replace("@UUID@", UUID).replace("@PREFIX@", prefix).replace("@DEFAULT@", default)
}

fn debian(default: &str) -> Tree {
    let text = configured(DEBIAN, "/boot", default);
    Tree::new(&[("/etc/fstab", ""), ("/boot/grub/grub.cfg", &text)]).kernels("/boot")
}

fn boots(disk: Vec<u8>, version: &str) -> Boot {
    let boot = boot(disk).unwrap();
    assert_eq!(boot.kernel, format!("kernel {version}").as_bytes(), "{boot:?}");
    assert_eq!(boot.initrd, format!("initrd {version}").as_bytes(), "{boot:?}");
    boot
}

const NEW: &str = "6.12.0-2-amd64";
const OLD: &str = "6.1.0-13-amd64";

#[test]
fn debians_default_is_found_on_every_kind_of_table_and_ext() {
    for options in [&["-t", "ext4"][..], &["-t", "ext3"], &["-t", "ext2"], &["-t", "ext4", "-b", "1024"]] {
        let Some(fs) = file_system(&debian("0"), options) else { return };
        let boot = boots(fs.clone(), NEW);
        assert_eq!(boot.command_line, format!("root=UUID={UUID} ro quiet"));
        assert_eq!((boot.found.entry.as_str(), boot.found.partition), ("Debian GNU/Linux", 0));
        assert_eq!((boot.found.kernel, boot.found.notes), (format!("/boot/vmlinuz-{NEW}"), vec![]));
        for table in ["gpt", "dos"] {
            let Some(disk) = disk(table, &[&fs]) else { return };
            assert_eq!(boots(disk, NEW).found.partition, 1, "{table}");
        }
    }
}

#[test]
fn a_damaged_gpt_is_read_from_its_copy_at_the_end() {
    let Some(fs) = file_system(&debian("0"), &["-t", "ext4"]) else { return };
    let Some(disk) = disk("gpt", &[&fs]) else { return };
    // In the header, and in the first partition's begin.
    for at in [512 + 40, 1024 + 33] {
        let mut damaged = disk.clone();
        damaged[at] ^= 1;
        assert_eq!(boots(damaged, NEW).found.partition, 1);
    }
}

#[test]
fn entries_are_named_by_number_title_and_id() {
    let way = format!("gnulinux-advanced-{UUID}>gnulinux-{OLD}-advanced-{UUID}");
    let titles = format!("Advanced options for Debian GNU/Linux>Debian GNU/Linux, with Linux {OLD}");
    for (default, version) in
        [("0", NEW), ("1>1", OLD), ("1", NEW), (&way, OLD), (&titles, OLD), ("gone", NEW), ("", NEW)]
    {
        let Some(fs) = file_system(&debian(default), &["-t", "ext4"]) else { return };
        let boot = boots(fs, version);
        assert_eq!(boot.found.notes.is_empty(), default != "gone", "{default}: {:?}", boot.found.notes);
        if version == OLD {
            assert_eq!(boot.command_line, format!("root=UUID={UUID} ro quiet \"dyndbg=file a +p\""));
        }
    }
}

#[test]
fn the_saved_entry_is_followed_and_the_choice_for_one_boot_is_not() {
    let env = |lines: &str| format!("# GRUB Environment Block\n{lines}{}", "#".repeat(900));
    let saved = format!("saved_entry=1>1\nnext_entry={}\n", "");
    for (lines, notes) in [(saved.as_str(), 0), ("saved_entry=1>1\nnext_entry=0\n", 1)] {
        let tree = debian("${saved_entry}");
        tree.put("/boot/grub/grubenv", env(lines).as_bytes());
        let Some(fs) = file_system(&tree, &["-t", "ext4"]) else { return };
        assert_eq!(boots(fs, OLD).found.notes.len(), notes);
    }
}

#[test]
fn ubuntu_with_a_partition_for_boot_and_its_root_elsewhere() {
    let text = configured(UBUNTU, "", "0");
    let tree = Tree::new(&[("/grub/grub.cfg", &text)]).kernels("");
    let Some(fs) = file_system(&tree, &["-t", "ext4"]) else { return };
    let mut lvm = vec![0; 2 << 20];
    lvm[0x200..0x208].copy_from_slice(b"LABELONE");
    for table in ["gpt", "dos"] {
        let Some(disk) = disk(table, &[&lvm, &fs]) else { return };
        let boot = boots(disk, NEW);
        assert_eq!(boot.command_line, "root=/dev/mapper/ubuntu--vg-ubuntu--lv ro quiet splash vt.handoff=7");
        assert_eq!(boot.found.partition, 2);
    }
}

#[test]
fn the_boot_that_fstab_mounts_counts_and_the_hidden_one_does_not() {
    let hidden = debian("1>1");
    hidden.put("/etc/fstab", b"# /boot\nUUID=99999999-2222-4333-8444-555555555555 /boot ext4 defaults 0 2\n");
    let text = configured(DEBIAN, "", "0").replace(UUID, "99999999-2222-4333-8444-555555555555");
    let own = Tree::new(&[("/grub/grub.cfg", &text)]).kernels("");
    let Some(root) = file_system(&hidden, &["-t", "ext4"]) else { return };
    let Some(own) = file_system(&own, &["-t", "ext4", "-U", "99999999-2222-4333-8444-555555555555"]) else {
        return;
    };
    let Some(disk) = disk("gpt", &[&root, &own]) else { return };
    assert_eq!(boots(disk, NEW).found.partition, 2);
}

/// Fedora's `/boot` with two entries.
fn fedora(env: &str) -> Tree {
    let tree = Tree::new(&[("/grub2/grub.cfg", &configured(FEDORA, "", ""))]).kernels("");
    tree.put("/grub2/grubenv", format!("# GRUB Environment Block\n{env}").as_bytes());
    for version in [OLD, NEW] {
        let entry = format!(
            "title Fedora Linux ({version})\nversion {version}\nlinux /vmlinuz-{version}\ninitrd /initrd.img-{version} \
             $tuned_initrd\noptions $kernelopts $tuned_params x=1\ngrub_users $grub_users\n"
        );
        tree.put(&format!("/loader/entries/machine-{version}.conf"), entry.as_bytes());
    }
    tree
}

#[test]
fn fedoras_entries_are_found_by_blscfg() {
    let options = "root=UUID=0123 ro rhgb quiet x=1";
    for (env, version, line) in [
        ("", NEW, options),
        ("saved_entry=machine-6.1.0-13-amd64\n", OLD, options),
        ("kernelopts=root=/dev/vda3 ro\nboot_success=1\n", NEW, "root=/dev/vda3 ro x=1"),
    ] {
        let Some(fs) = file_system(&fedora(env), &["-t", "ext4"]) else { return };
        let Some(disk) = disk("gpt", &[&fs]) else { return };
        let boot = boots(disk, version);
        assert_eq!(boot.command_line, line, "{env}");
        assert_eq!(boot.found.entry, format!("Fedora Linux ({version})"));
    }
}

#[test]
fn entries_without_grub_and_kernels_without_entries() {
    let tree = fedora("");
    fs::remove_dir_all(tree.0.path().join("grub2")).unwrap();
    tree.put("/loader/loader.conf", b"timeout 3\ndefault machine-6.1.0-*\n");
    let Some(fs) = file_system(&tree, &["-t", "ext4"]) else { return };
    boots(fs, OLD);

    let tree = Tree::new(&[("/etc/fstab", "")]).kernels("/boot");
    let Some(fs) = file_system(&tree, &["-t", "ext4"]) else { return };
    let boot = boots(fs, NEW);
    assert_eq!(boot.command_line, format!("root=UUID={UUID} ro"));
    assert!(boot.found.notes[0].contains("newest kernel"));
}

#[test]
fn links_are_followed_within_the_file_system_and_loops_are_not() {
    let text = "linux /vmlinuz root=/dev/vda1\ninitrd /boot/early.img /initrd.img\n";
    let tree = Tree::new(&[("/boot/grub/grub.cfg", text), ("/boot/early.img", "12345")]).kernels("/boot");
    tree.link("/vmlinuz", "boot/vmlinuz-6.1.0-13-amd64");
    tree.link("/initrd.img", "/boot/../boot/initrd.img-6.1.0-13-amd64");
    let Some(fs) = file_system(&tree, &["-t", "ext4"]) else { return };
    let found = boot(fs).unwrap();
    assert_eq!(found.initrd, b"12345\0\0\0initrd 6.1.0-13-amd64");
    assert_eq!(found.command_line, "root=/dev/vda1");

    tree.link("/loop", "/loop");
    tree.put("/boot/grub/grub.cfg", b"linux /loop\n");
    let Some(fs) = file_system(&tree, &["-t", "ext4"]) else { return };
    let error = boot(fs).unwrap_err().to_string();
    assert!(error.contains("/loop"), "{error}");
}

#[test]
fn what_cannot_be_read_is_said_in_one_line() {
    let mut xfs = vec![0; 2 << 20];
    xfs[..4].copy_from_slice(b"XFSB");
    let mut luks = vec![0; 2 << 20];
    luks[..6].copy_from_slice(b"LUKS\xba\xbe");
    let Some(whole) = disk("gpt", &[&xfs, &luks]) else { return };
    let error = boot(whole).unwrap_err().to_string();
    assert_eq!(
        error,
        "no kernel was found on it: partition 1 is xfs, which cannot be read; partition 2 is LUKS (encrypted), which \
         cannot be read"
    );
    assert!(boot(vec![0; 4096]).unwrap_err().to_string().contains("the whole disk has no known file system"));
    assert!(boot(Vec::new()).is_err());

    let Some(root) = file_system(&Tree::new(&[("/etc/fstab", "/dev/vda1 /boot xfs defaults\n")]), &[]) else {
        return;
    };
    let Some(disk) = disk("gpt", &[&xfs, &root]) else { return };
    let error = boot(disk).unwrap_err().to_string();
    assert_eq!(error, "its /boot is in partition 1, which is xfs: only ext2, ext3 and ext4 can be read");

    for (text, said) in [
        ("menuentry 'Windows' {\nchainloader +1\n}\n", "'Windows' starts no Linux kernel"),
        ("if [ a = a ]; then\n", "/boot/grub/grub.cfg cannot be understood: it ends within a block"),
        ("linux /boot/gone\n", "/boot/gone of the whole disk cannot be read: there is no such file"),
        ("linux '/boot/unended\n", "a quote does not end"),
        (
            "menuentry 'a' {\nset root=hd0,gpt3\nlinux /x\n}",
            "needs /x on the device 'hd0,gpt3', which this disk does not have",
        ),
    ] {
        let Some(fs) = file_system(&Tree::new(&[("/boot/grub/grub.cfg", text)]), &["-t", "ext4"]) else {
            return;
        };
        let error = boot(fs).unwrap_err().to_string();
        assert!(error.contains(said) && !error.contains('\n'), "{error}");
    }
}

#[test]
fn scripts_that_never_end_do() {
    let long = "x".repeat(3000);
    for text in [
        "while true; do set a=b; done\nlinux /boot/vmlinuz-6.1.0-13-amd64\n",
        "function f { f; f; }\nf\nlinux /boot/vmlinuz-6.1.0-13-amd64\n",
        "source /boot/grub/grub.cfg\nsource /boot/grub/grub.cfg\nlinux /boot/vmlinuz-6.1.0-13-amd64\n",
        &format!(
            "set a={long}\nfor i in 1 2 3 4 5 6 7 8; do set a=$a$a$a; done\nlinux /boot/vmlinuz-6.1.0-13-amd64 $a$a\n"
        ),
        &"submenu a {\n".repeat(40),
    ] {
        let tree = Tree::new(&[("/boot/grub/grub.cfg", text)]).kernels("/boot");
        let Some(fs) = file_system(&tree, &["-t", "ext4"]) else { return };
        // Whatever it is, it comes soon and small.
        if let Ok(boot) = boot(fs) {
            assert!(boot.command_line.len() < 128 << 10);
        }
    }
}

#[test]
fn a_file_that_is_too_large_and_a_budget_that_is_used_up_are_refused() {
    let Some(fs) = file_system(&debian("0"), &["-t", "ext4"]) else { return };
    let small = Limits { kernel: 10, ..Limits::default() };
    let error = read(Box::new(fs.clone()), &small).unwrap_err().to_string();
    assert_eq!(error, format!("/boot/vmlinuz-{NEW} has 21 bytes, and 10 are the limit"));
    let poor = Limits { rest: 50_000, ..Limits::default() };
    assert!(matches!(read(Box::new(fs.clone()), &poor), Err(ReadError::Budget)));
    let late = Limits { until: Some(std::time::Instant::now()), ..Limits::default() };
    assert!(matches!(read(Box::new(fs), &late), Err(ReadError::Time)));
}

/// A tree of extents whose nodes all lead to the same node below: five levels of 340 entries. And sizes that nothing
/// has the memory for.
#[test]
fn trees_and_sizes_that_are_made_to_harm_end_soon() {
    let tree = debian("0");
    // So that its inode is found by its size.
    tree.put("/boot/grub/grub.cfg", &vec![b'#'; 12_345]);
    let Some(fs) = file_system(&tree, &["-t", "ext4", "-b", "4096", "-O", "^metadata_csum"]) else { return };
    let inode = (0..fs.len() - 256)
        .step_by(128)
        .find(|at| fs[*at..at + 2] == [0xa4, 0x81] && fs[at + 4..at + 8] == 12_345u32.to_le_bytes());
    let inode = inode.expect("the inode of grub.cfg");
    let node = |depth: u16, child: u32| {
        let mut node = Vec::new();
        for half in [0xf30a_u16, 340, 340, depth, 0, 0] {
            node.extend_from_slice(&half.to_le_bytes());
        }
        (0..340).for_each(|_| {
            node.extend_from_slice(&0u32.to_le_bytes());
            node.extend_from_slice(&child.to_le_bytes());
            node.extend_from_slice(&0u32.to_le_bytes());
        });
        node.resize(4096, 0);
        node
    };
    for levels in [2u16, 5] {
        let mut harmful = fs.clone();
        let first = (harmful.len() / 4096 - 10) as u32;
        for depth in 0..levels {
            let at = (first + u32::from(depth)) as usize * 4096;
            let mut node = node(depth, first + u32::from(depth) - u32::from(depth > 0));
            if depth == 0 {
                node[2] = 0;
                node[3] = 0;
            }
            harmful[at..at + 4096].copy_from_slice(&node);
        }
        let root = &node(levels, first + u32::from(levels) - 1)[..60];
        harmful[inode + 0x28..inode + 0x28 + 60].copy_from_slice(root);
        harmful[inode + 0x28 + 2..inode + 0x28 + 6].copy_from_slice(&[4, 0, 4, 0]);
        let _ = boot(harmful);
    }
    for (at, value) in [(0x18, 21u32), (0x18, u32::MAX), (0x20, 1), (0x20, 0), (4, u32::MAX), (0x28, 1)] {
        let mut harmful = fs.clone();
        harmful[1024 + at..1024 + at + 4].copy_from_slice(&value.to_le_bytes());
        let _ = boot(harmful);
    }
    let mut huge = fs.clone();
    huge[inode + 0x6c..inode + 0x70].copy_from_slice(&0x7fff_u32.to_le_bytes());
    let error = boot(huge).unwrap_err().to_string();
    assert!(error.contains("grub.cfg"), "{error}");
}

/// The root of a directory's hash tree says how many entries it has, and their sum is taken over that many.
#[test]
fn a_hash_tree_with_more_entries_than_its_block_is_refused_or_read() {
    let tree = debian("0");
    (0..120).for_each(|number| tree.put(&format!("/boot/{}-{number}", "long".repeat(20)), b""));
    let Some(fs) = file_system(&tree, &["-t", "ext4", "-b", "1024"]) else { return };
    let image = tempfile::NamedTempFile::new().unwrap();
    fs::write(image.path(), &fs).unwrap();
    let Some(mut e2fsck) = program("e2fsck") else { return };
    let done = e2fsck.args(["-f", "-y", "-D"]).arg(image.path()).stdout(Stdio::null()).stderr(Stdio::null());
    assert!(done.status().unwrap().code().is_some_and(|code| code <= 1));
    let mut fs = fs::read(image.path()).unwrap();
    boots(fs.clone(), NEW);
    // `.`, `..`, a reserved word of zero, the kind of hash, the length of this information.
    let is_root = |block: &[u8]| {
        block[4..10] == [12, 0, 1, 2, b'.', 0]
            && block[0x18..0x1c] == [0; 4]
            && block[0x1d] == 8
            && block[0x20] > 0
    };
    let roots: Vec<usize> = (0..fs.len()).step_by(1024).filter(|at| is_root(&fs[*at..at + 1024])).collect();
    assert!(!roots.is_empty(), "e2fsck -D makes hash trees");
    roots.iter().for_each(|at| fs[at + 0x22..at + 0x24].fill(0xff));
    let _ = boot(fs);
}

/// What was written and not yet put into its place is read.
#[test]
fn a_file_system_that_was_not_unmounted_is_read_with_its_journal() {
    let Some(fs) = file_system(&debian("0"), &["-t", "ext4", "-b", "4096"]) else { return };
    let image = tempfile::NamedTempFile::new().unwrap();
    fs::write(image.path(), &fs).unwrap();
    let Some(mut debugfs) = program("debugfs") else { return };
    // A transaction with one block: that of the configuration's contents, with another default.
    let text = configured(DEBIAN, "/boot", "0");
    let changed = text.replace("set default=\"0\"", "set default=1>1");
    let text_block = fs.windows(200).position(|it| it == &text.as_bytes()[..200]).unwrap() / 4096;
    let mut block = fs[text_block * 4096..(text_block + 1) * 4096].to_vec();
    let length = changed.len().min(4096);
    block[..length].copy_from_slice(&changed.as_bytes()[..length]);
    let new = tempfile::NamedTempFile::new().unwrap();
    fs::write(new.path(), &block).unwrap();
    let commands = tempfile::NamedTempFile::new().unwrap();
    let lines = format!("jo -c\njw -b {text_block} {}\njc\n", new.path().display());
    fs::write(commands.path(), lines).unwrap();
    let done = debugfs.arg("-w").arg("-f").arg(commands.path()).arg(image.path());
    assert!(done.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap().success());
    let dirty = fs::read(image.path()).unwrap();
    assert_ne!(dirty, fs, "debugfs wrote a transaction");
    let boot = boots(dirty, OLD);
    assert!(boot.found.notes[0].contains("its journal was read"), "{:?}", boot.found.notes);
}

mod bombs;

/// The guest can write whatever it likes.
mod hostile {
    use std::sync::OnceLock;

    use proptest::prelude::*;

    use super::*;

    fn image() -> Option<&'static [u8]> {
        static IMAGE: OnceLock<Option<Vec<u8>>> = OnceLock::new();
        IMAGE
            .get_or_init(|| file_system_of(2 * MEBIBYTE, &debian("1>1"), &["-t", "ext4", "-b", "1024"]))
            .as_deref()
    }

    /// Bytes that are not zero, in units of 16: changes anywhere else change nothing that is read.
    fn used(image: &[u8]) -> Vec<usize> {
        image
            .chunks(16)
            .enumerate()
            .filter(|(_, it)| it.iter().any(|byte| *byte != 0))
            .map(|(at, _)| at)
            .collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(200))]

        #[test]
        fn a_changed_file_system_is_read_or_refused(
            changes in prop::collection::vec((any::<prop::sample::Index>(), 0usize..16, any::<u8>()), 1..40),
        ) {
            let Some(image) = image() else { return Ok(()) };
            let used = used(image);
            let mut bytes = image.to_vec();
            for (place, within, byte) in changes {
                bytes[used[place.index(used.len())] * 16 + within] = byte;
            }
            crate::fuzz::look(bytes);
        }

        #[test]
        fn any_table_is_read_or_refused(sectors in prop::collection::vec(any::<[u8; 32]>(), 1..64)) {
            let mut bytes = vec![0; 64 << 10];
            for (at, sector) in sectors.iter().enumerate() {
                bytes[at * 512 + 440..at * 512 + 472].copy_from_slice(sector);
                bytes[at * 512 + 510..at * 512 + 512].copy_from_slice(&[0x55, 0xaa]);
            }
            crate::fuzz::look(bytes);
        }

        #[test]
        fn any_script_ends(words in prop::collection::vec(prop::sample::select(vec![
            "if", "then", "else", "elif", "fi", "while", "do", "done", "for", "in", "function", "f", "{", "}", ";",
            "\n", "menuentry", "submenu", "'a'", "\"$a\"", "$a", "${a}", "set", "a=$a$a", "[", "]", "!", "-f", "linux",
            "true", "false", "search", "--set=root", "source", "blscfg", "'", "\\", "$", "#", "(", ")", "-a", "-o", "=",
        ]), 0..60)) {
            crate::fuzz::text(words.join(" ").as_bytes());
        }
    }
}
