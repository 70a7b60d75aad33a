//! Images as qemu-img makes them.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use fastrand::Rng;

use super::{Held, contents};
use crate::{Files, Format, Image, Note, OpenError, Source, Span};

/// Files of a directory.
struct Real {
    may_be_named: bool,
}

impl Files for Real {
    fn open(&self, path: &Path) -> std::io::Result<Box<dyn Source>> {
        Ok(Box::new(fs::read(path)?))
    }

    fn may_be_named(&self) -> bool {
        self.may_be_named
    }
}

/// Runs qemu-img in a directory. `false` if it is not installed.
fn qemu_img(there: &Path, line: &str) -> bool {
    match Command::new("qemu-img").args(line.split_whitespace()).current_dir(there).output() {
        Ok(output) => {
            assert!(output.status.success(), "qemu-img {line}: {}", String::from_utf8_lossy(&output.stderr));
            true
        }
        Err(_) => {
            println!("skipped: no qemu-img (apt-get install qemu-utils)");
            false
        }
    }
}

fn open(there: &Path, name: &str, may_be_named: bool) -> Result<Image, OpenError> {
    Image::open(&there.join(name), &Real { may_be_named })
}

/// Every way in which an image may be stored.
const WAYS: [(&str, Format); 28] = [
    ("-O qcow2", Format::Qcow2),
    ("-O qcow2 -c", Format::Qcow2),
    ("-O qcow2 -c -o compression_type=zstd", Format::Qcow2),
    ("-O qcow2 -o compat=0.10", Format::Qcow2),
    ("-O qcow2 -o compat=0.10,cluster_size=512 -c", Format::Qcow2),
    ("-O qcow2 -o cluster_size=2M", Format::Qcow2),
    ("-O qcow2 -o cluster_size=2M -c", Format::Qcow2),
    ("-O qcow2 -o extended_l2=on,cluster_size=64k", Format::Qcow2),
    ("-O qcow2 -c -o extended_l2=on,cluster_size=64k", Format::Qcow2),
    ("-O qcow2 -c -o extended_l2=on,cluster_size=16k", Format::Qcow2),
    ("-O qcow2 -c -o extended_l2=on,cluster_size=2M,compression_type=zstd", Format::Qcow2),
    ("-O qcow2 -o extended_l2=on,cluster_size=16k,lazy_refcounts=on", Format::Qcow2),
    ("-O qcow2 -o cluster_size=4k,refcount_bits=1", Format::Qcow2),
    ("-O qcow2 -c -o cluster_size=512,refcount_bits=64,compression_type=zstd", Format::Qcow2),
    ("-O qcow2 -o preallocation=metadata", Format::Qcow2),
    ("-O qcow2 -o preallocation=falloc,extended_l2=on", Format::Qcow2),
    ("-O vmdk", Format::Vmdk),
    ("-O vmdk -o zeroed_grain=on", Format::Vmdk),
    ("-O vmdk -o subformat=streamOptimized", Format::Vmdk),
    ("-O vmdk -o subformat=streamOptimized,adapter_type=lsilogic", Format::Vmdk),
    ("-O vmdk -o adapter_type=buslogic,compat6=on", Format::Vmdk),
    ("-O vhdx", Format::Vhdx),
    ("-O vhdx -o subformat=fixed,block_size=2M", Format::Vhdx),
    ("-O vhdx -o block_size=1M,block_state_zero=off", Format::Vhdx),
    ("-O vhdx -o block_size=4M,log_size=2M", Format::Vhdx),
    ("-O vdi", Format::Vdi),
    ("-O vdi -o static=on", Format::Vdi),
    ("-O raw", Format::Raw),
];

/// A disk with data of any length at any place, with and without order in it, and a lot of nothing.
fn disk(dice: &mut Rng) -> Vec<u8> {
    // Whole sectors: qemu-img makes them so.
    let length = dice.usize(1..12_000) * 512;
    let mut disk = vec![0; length];
    for _ in 0..dice.usize(0..12) {
        let from = dice.usize(0..length);
        let to = (from + dice.usize(1..600_000)).min(length);
        match dice.u8(0..3) {
            0 => disk[from..to].fill(dice.u8(..)),
            1 => disk[from..to].fill_with(|| dice.u8(..)),
            _ => disk[from..to].fill_with(|| b"to be or not "[dice.usize(0..13)]),
        }
    }
    disk
}

#[test]
fn every_format_has_the_disk_that_went_into_it() {
    for seed in 0..6 {
        let mut dice = Rng::with_seed(seed);
        let directory = tempfile::tempdir().unwrap();
        let there = directory.path();
        let mut disk = disk(&mut dice);
        // VMDK's descriptions and qcow2's magic are no reason to take a disk for one.
        disk[300..310].copy_from_slice(b"KDMVQFI\xfb\0\0");
        fs::write(there.join("raw"), &disk).unwrap();
        for (way, format) in WAYS {
            // The name lies.
            if !qemu_img(there, &format!("convert -f raw {way} raw image.raw")) {
                return;
            }
            let mut image = open(there, "image.raw", false).unwrap();
            assert_eq!(image.format(), format, "{way}");
            assert!(image.notes().is_empty(), "{way}");
            let buffer = [4096, 65_536, 1 << 20, 3 << 20][dice.usize(0..4)];
            let read = contents(&mut image, buffer).unwrap_or_else(|why| panic!("{seed} {way}: {why}"));
            // Some formats know larger units only.
            assert!(read.len() >= disk.len() && read.len() - disk.len() < 1 << 20, "{way}");
            assert!(read[..disk.len()] == disk[..], "{seed} {way}");
            assert!(read[disk.len()..].iter().all(|byte| *byte == 0), "{way}");
            // A second time, as who compares does.
            assert!(contents(&mut image, 1 << 16).unwrap() == read, "{way}");
            // A download that broke off.
            let mut cut = fs::read(there.join("image.raw")).unwrap();
            if format != Format::Raw && cut.len() > 300 {
                cut.truncate(dice.usize(300..cut.len()));
                if let Ok(mut image) = Held::image(cut) {
                    let read = contents(&mut image, 1 << 20);
                    assert!(read.is_err() || read.unwrap()[..disk.len()] == disk[..], "{seed} {way}");
                }
            }
            fs::remove_file(there.join("image.raw")).unwrap();
        }
    }
}

#[test]
fn an_image_with_others_behind_it_is_read_only_if_that_is_allowed() {
    let directory = tempfile::tempdir().unwrap();
    let there = directory.path();
    let mut dice = Rng::with_seed(9);
    let below: Vec<u8> = (0..3 << 20).map(|_| dice.u8(..)).collect();
    fs::write(there.join("below"), &below).unwrap();
    // Larger than what it is based on.
    if !qemu_img(there, "create -f qcow2 -b below -F raw middle 4M") {
        return;
    }
    qemu_img(there, "create -f qcow2 -b middle -F qcow2 -o extended_l2=on top 4M");
    let error = open(there, "top", false).err().unwrap().to_string();
    assert!(
        error.contains("an image that it is based on, \"middle\"") && error.contains("--allow-backing"),
        "{error}"
    );
    let mut image = open(there, "top", true).unwrap();
    let read = contents(&mut image, 1 << 20).unwrap();
    assert!(read[..below.len()] == below[..] && read[below.len()..].iter().all(|byte| *byte == 0));
    assert!(contents(&mut image, 1 << 20).unwrap() == read);
    // A guest can write anything to its raw disk, also what makes it look like another format.
    let mut lies = below.clone();
    lies[..16].copy_from_slice(b"QFI\xfb\0\0\0\x03\0\0\0\0\0\0\0\x40");
    fs::write(there.join("below"), &lies).unwrap();
    assert!(contents(&mut open(there, "top", true).unwrap(), 1 << 20).unwrap()[..lies.len()] == lies[..]);

    qemu_img(there, "convert -f raw -O qcow2 -o data_file=clusters,data_file_raw=off below image");
    assert!(matches!(
        open(there, "image", false),
        Err(OpenError::NamesAnother { what: "a file that has its data", named, .. }) if named == "clusters"
    ));
    assert!(contents(&mut open(there, "image", true).unwrap(), 1 << 20).unwrap() == lies);
}

#[test]
fn what_qemu_img_makes_and_is_not_read_has_a_remedy() {
    let directory = tempfile::tempdir().unwrap();
    let there = directory.path();
    fs::write(there.join("raw"), vec![7; 1 << 20]).unwrap();
    for (way, what) in [
        ("-O vmdk -o subformat=monolithicFlat", "a -flat.vmdk is raw"),
        ("-O vmdk -o subformat=twoGbMaxExtentSparse", "only describes a disk"),
        ("-O vpc", "before vhdx"),
        ("-O vpc -o subformat=fixed", "before vhdx"),
        ("-O qed", "qed"),
        ("-O qcow", "before qcow2"),
    ] {
        if !qemu_img(there, &format!("convert -f raw {way} raw image")) {
            return;
        }
        let error = open(there, "image", false).err().unwrap().to_string();
        assert!(error.contains(what) && error.contains("qemu-img convert -f "), "{way}: {error}");
        assert!(error.contains("apt install qemu-utils"), "{error}");
    }
    qemu_img(there, "convert -f raw -O qcow2 raw image");
    qemu_img(there, "snapshot -c first image");
    assert_eq!(open(there, "image", false).unwrap().notes(), [Note::Snapshots(1)]);
    qemu_img(
        there,
        "create -f qcow2 -o encrypt.format=luks,encrypt.key-secret=s --object secret,id=s,data=x secret 1M",
    );
    assert!(matches!(open(there, "secret", false), Err(OpenError::Encrypted(_))));
    // A copy that was cut off lacks clusters, and says so.
    let whole = fs::read(there.join("image")).unwrap();
    let cut = whole[..whole.len() / 2].to_vec();
    let read = Held::image(cut).map(|mut image| contents(&mut image, 1 << 20));
    let why = read.map_or_else(|why| why.to_string(), |read| read.unwrap_err().to_string());
    assert!(why.contains("it was not copied to its end"), "{why}");
}

#[test]
fn a_large_disk_with_little_in_it_is_read_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let there = directory.path();
    let raw = fs::File::create(there.join("raw")).unwrap();
    raw.set_len(1 << 40).unwrap();
    let places = [0, (300 << 30) + 4096, (1 << 40) - 65_536];
    for at in places {
        raw.write_all_at(&[7; 65_536], at).unwrap();
    }
    for way in
        ["qcow2", "qcow2 -o extended_l2=on,cluster_size=16k", "qcow2 -c -o extended_l2=on", "vmdk", "vdi"]
    {
        if !qemu_img(there, &format!("convert -f raw -O {way} raw image")) {
            return;
        }
        let mut image = open(there, "image", false).unwrap();
        let (mut at, mut reads, mut data, mut buffer) = (0, 0, 0, vec![0; 1 << 20]);
        while at < image.bytes() {
            reads += 1;
            at += match image.read(at, &mut buffer).unwrap_or_else(|why| panic!("{way}: {why}")) {
                Span::Zero(length) => length,
                Span::Data(length) => {
                    data += buffer[..length].iter().filter(|byte| **byte == 7).count();
                    length as u64
                }
            };
        }
        assert!(data == places.len() * 65_536 && reads < 300_000, "{way}: {data} in {reads}");
    }
}
