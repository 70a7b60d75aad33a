//! A read beside the VM's life.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::channel;

use super::*;

/// An image with an entry, in a file system that mke2fs has made.
fn image(directory: &std::path::Path, menu: &str) -> Option<Arc<Image>> {
    let (tree, path) = (directory.join("tree"), directory.join("image"));
    std::fs::create_dir_all(tree.join("boot/grub")).unwrap();
    std::fs::write(tree.join("boot/vmlinuz-6.1"), "kernel").unwrap();
    if !menu.is_empty() {
        std::fs::write(tree.join("boot/grub/grub.cfg"), menu).unwrap();
    }
    File::create(&path).unwrap().set_len(8 << 20).unwrap();
    let made = std::process::Command::new("/usr/sbin/mke2fs")
        .args(["-q", "-F", "-d"])
        .arg(&tree)
        .arg(&path)
        .status();
    if !made.is_ok_and(|status| status.success()) {
        println!("skipped: no mke2fs here; to get it: apt-get install e2fsprogs");
        return None;
    }
    Some(Arc::new(Image::open(&path, false, false, None).unwrap()))
}

fn from(append: &str) -> DiskBoot {
    DiskBoot { disk: 0, append: append.into() }
}

#[test]
fn the_operators_words_come_behind_the_disks() {
    let directory = tempfile::tempdir().unwrap();
    let Some(image) = image(directory.path(), "linux /boot/vmlinuz-6.1 root=/dev/sda1 quiet\n") else {
        return;
    };
    let read = read_boot(image, &from("root=/dev/vda1"), 1 << 20, None, || true).unwrap();
    assert_eq!(read.boot.command_line(), "root=/dev/sda1 quiet console=ttyS0 root=/dev/vda1");
    assert_eq!(read.boot.disk(), Some(&from("root=/dev/vda1")));
}

#[test]
fn a_kernel_without_an_entry_needs_a_root() {
    let directory = tempfile::tempdir().unwrap();
    let Some(image) = image(directory.path(), "") else { return };
    let error = read_boot(image.clone(), &from(""), 1 << 20, None, || true).err().unwrap().to_string();
    assert!(error.contains("name it with --append root="), "{error}");
    assert!(read_boot(image, &from("root=/dev/vda"), 1 << 20, None, || true).is_ok());
}

#[test]
fn nothing_larger_than_the_guests_memory_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let Some(image) = image(directory.path(), "linux /boot/vmlinuz-6.1 root=/dev/vda\n") else { return };
    let error = read_boot(image, &from(""), 5, None, || true).err().unwrap().to_string();
    assert!(error.contains("has 6 bytes, and 5 are the limit"), "{error}");
}

#[test]
fn a_read_that_nobody_wants_ends_and_its_image_is_free() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    File::create(&path).unwrap().write_all(&[0; 65536]).unwrap();
    let image = Arc::new(Image::open(&path, false, false, None).unwrap());
    image.file().write_all_at(b"\x53\xef", 1080).unwrap();
    let disk = ImageDisk::new(image, || false);
    let (tell, told) = channel();
    std::thread::spawn(move || {
        tell.send(read(disk, &from(""), 1 << 20, None).err().map(|it| it.to_string()))
    });
    assert!(told.recv().unwrap().unwrap().contains("nobody waits for it any more"));
    assert!(Image::open(&path, false, false, None).is_ok(), "it is no longer locked");
}

/// A script that has not ended holds up nobody: not the machine's end, and not who needs the image next.
#[test]
fn a_reader_that_ends_leaves_a_thinking_thread_without_the_image() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image");
    File::create(&path).unwrap().write_all(&[0; 65536]).unwrap();
    let disk = ImageDisk::new(Arc::new(Image::open(&path, false, false, None).unwrap()), || true);
    let mut reader = BootReader::default();
    reader.lent = disk.lent.clone();
    let mut sector = [0; 512];
    outlive_bootdisk::Disk::read_at(&disk, &mut sector, 0).unwrap();
    drop(reader);
    assert!(Image::open(&path, false, false, None).is_ok(), "it is no longer locked");
    assert!(outlive_bootdisk::Disk::read_at(&disk, &mut sector, 0).is_err());
}
