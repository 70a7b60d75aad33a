//! Images that lie.

use std::path::Path;

use proptest::prelude::*;

use super::{Held, contents};
use crate::{Format, Image, MAX_BYTES, Note, OpenError, ReadError, Span, fuzz};

/// What a qcow2 says in its header.
struct Made {
    bytes: Vec<u8>,
}

const CLUSTER: usize = 1 << 16;

impl Made {
    /// A qcow2 of version 3 with a disk of this many bytes and clusters of 64 KiB. The first table is in cluster 1, the
    /// second in cluster 2, one cluster of data in cluster 3.
    fn new(disk: u64) -> Self {
        let mut made = Self { bytes: vec![0; 4 * CLUSTER] };
        made.bytes[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        made.be32(20, 16);
        made.be64(24, disk);
        made.be32(36, disk.div_ceil(512 << 20).max(1).min(u64::from(u32::MAX)) as u32);
        made.be64(40, CLUSTER as u64);
        made.be32(96, 4);
        made.be32(100, 104);
        made.be64(CLUSTER, (2 * CLUSTER as u64) | (1 << 63));
        made.bytes[3 * CLUSTER..].fill(7);
        made
    }

    fn be32(&mut self, at: usize, value: u32) -> &mut Self {
        self.bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        self
    }

    fn be64(&mut self, at: usize, value: u64) -> &mut Self {
        self.bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        self
    }

    /// The entry of a cluster.
    fn cluster(&mut self, number: usize, entry: u64) -> &mut Self {
        self.be64(2 * CLUSTER + 8 * number, entry)
    }

    fn open(&self) -> Result<Image, OpenError> {
        Held::image(self.bytes.clone())
    }

    fn read(&self) -> Result<Vec<u8>, ReadError> {
        contents(&mut self.open().unwrap(), 1 << 20)
    }
}

const DATA: u64 = (3 * CLUSTER as u64) | (1 << 63);

#[test]
fn a_cluster_that_is_stored_once_is_given_once() {
    let mut made = Made::new(1 << 20);
    made.cluster(0, DATA);
    let disk = made.read().unwrap();
    assert!(disk[..CLUSTER].iter().all(|byte| *byte == 7) && disk[CLUSTER..].iter().all(|byte| *byte == 0));
    // As often as it would fit into the file, it may have been another one each time.
    (0..16).for_each(|number| {
        made.cluster(number, DATA);
    });
    assert!(matches!(made.read(), Err(ReadError::Twice)));
}

#[test]
fn a_disk_of_any_length_costs_no_memory_and_little_time() {
    // 64 TiB of nothing.
    let mut made = Made::new(MAX_BYTES);
    made.bytes.resize(CLUSTER + (8 << 17), 0);
    made.be64(CLUSTER, 0);
    made.bytes[CLUSTER + 8..].fill(0);
    let mut image = made.open().unwrap();
    assert_eq!(image.read(0, &mut [0; 512]).unwrap(), Span::Zero(MAX_BYTES));
    // Tables that the file has no room for are not even begun.
    let mut cut = Made::new(MAX_BYTES);
    cut.be32(36, u32::MAX);
    assert!(matches!(
        cut.open(),
        Err(OpenError::Tables { source: ReadError::CutOff { .. }, format: Format::Qcow2, .. })
    ));
    let mut small = Made::new(1 << 40);
    small.be32(20, 9);
    small.be32(36, u32::MAX);
    assert!(small.open().err().unwrap().to_string().contains("larger than QEMU makes it"));
    for bytes in [0, MAX_BYTES + 1, u64::MAX] {
        assert!(Made::new(bytes).open().is_err(), "{bytes}");
    }
    assert!(Made::new(MAX_BYTES + 1).open().err().unwrap().to_string().contains("larger than 64 TiB"));
}

#[test]
fn a_file_makes_no_more_work_than_it_is_long() {
    // One table for every part of the disk.
    let mut made = Made::new(8 * (512 << 20));
    (0..8).for_each(|number| {
        made.be64(CLUSTER + 8 * number, (2 * CLUSTER as u64) | (1 << 63));
    });
    let read = |image: &mut Image| -> Result<(), ReadError> {
        let mut at = 0;
        while at < image.bytes() {
            let Span::Zero(length) = image.read(at, &mut [0; 512])? else { unreachable!("it has no data") };
            at += length;
        }
        Ok(())
    };
    assert!(matches!(read(&mut made.open().unwrap()), Err(ReadError::Twice)));
    // Once more is not twice.
    (4..8).for_each(|number| {
        made.be64(CLUSTER + 8 * number, 0);
    });
    let mut image = made.open().unwrap();
    (0..3).for_each(|_| read(&mut image).unwrap());
    // A compressed cluster whose stream is as long as the cluster: in two blocks of stored bytes.
    let mut made = Made::new(1 << 20);
    let stream = &mut made.bytes[3 * CLUSTER..];
    stream[..5].copy_from_slice(&[0, 0xff, 0x7f, 0, 0x80]);
    stream[5 + 0x7fff..][..5].copy_from_slice(&[1, 1, 0x80, 0xfe, 0x7f]);
    made.bytes.resize(5 * CLUSTER, 0);
    // The lengths differ, or it would be unpacked once.
    let packed = |number: usize| (1 << 62) | ((128 + (number as u64 & 1)) << 54) | (3 * CLUSTER as u64);
    (0..4).for_each(|number| {
        made.cluster(number, packed(number));
    });
    assert!(made.read().is_ok());
    made.cluster(4, packed(4));
    assert!(matches!(made.read(), Err(ReadError::Twice)));
}

#[test]
fn no_file_of_the_host_comes_into_a_guest() {
    let named = |mut made: Made, name: &str| {
        made.be64(8, 512).be32(16, name.len() as u32);
        made.bytes[512..512 + name.len()].copy_from_slice(name.as_bytes());
        made
    };
    let mut files = Held::default().with("a.img", named(Made::new(1 << 20), "/etc/shadow").bytes);
    let why = Image::open(Path::new("a.img"), &files).err().unwrap().to_string();
    assert!(why.contains("\"/etc/shadow\"") && why.contains("--allow-backing"), "{why}");
    assert!(!why.contains('\n'));
    // Allowed, and then it is read, from where the image is.
    files.may_be_named = true;
    assert!(
        matches!(Image::open(Path::new("a.img"), &files), Err(OpenError::Io { path, .. }) if path == Path::new("/etc/shadow"))
    );
    for name in ["json:{\"driver\":\"nbd\"}", "nbd://10.0.0.1/x", "fat:/etc"] {
        let mut files = Held::default().with("a.img", named(Made::new(1 << 20), name).bytes);
        files.may_be_named = true;
        let why = Image::open(Path::new("a.img"), &files).err().unwrap().to_string();
        assert!(why.contains("which is no path"), "{name}: {why}");
    }
    // Nobody says what that is, and it looks like something: its guest may have written that.
    let mut circle = named(Made::new(1 << 20), "a.img");
    let mut files = Held::default().with("a.img", circle.bytes.clone());
    files.may_be_named = true;
    let why = Image::open(Path::new("a.img"), &files).err().unwrap().to_string();
    assert!(
        why.contains("looks like qcow2") && why.contains("qemu-img rebase -u -b a.img -F FORMAT"),
        "{why}"
    );
    // Around in a circle.
    circle.be32(104, 0xe279_2aca).be32(108, 5);
    circle.bytes[112..117].copy_from_slice(b"qcow2");
    let mut files = Held::default().with("a.img", circle.bytes);
    files.may_be_named = true;
    assert!(matches!(Image::open(Path::new("a.img"), &files), Err(OpenError::TooDeep { .. })));
    // A name with an escape sequence is shown as what it is.
    let why = Held::image(named(Made::new(1 << 20), "\x1b[2J\nx").bytes).err().unwrap().to_string();
    assert!(why.contains("\\u{1b}[2J\\nx"), "{why}");
    // Names that are not where they should be.
    let mut made = named(Made::new(1 << 20), "x");
    made.be64(8, u64::MAX);
    assert!(made.open().is_err());
    made.be64(8, 512).be32(16, 1 << 20);
    assert!(made.open().is_err());
    // A file for data, named behind the header.
    let mut made = Made::new(1 << 20);
    made.be64(72, 1 << 2).be32(104, 0x4441_5441).be32(108, 11);
    made.bytes[112..123].copy_from_slice(b"/etc/shadow");
    assert!(matches!(made.open(), Err(OpenError::NamesAnother { named, .. }) if named == "/etc/shadow"));
    made.be32(104, 0);
    assert!(made.open().err().unwrap().to_string().contains("does not name that"));
}

#[test]
fn what_a_header_says_of_the_image_is_heard() {
    let mut made = Made::new(1 << 20);
    made.be64(72, 1).be32(60, 3);
    assert_eq!(made.open().unwrap().notes(), [Note::NotClosed, Note::Snapshots(3)]);
    made.be64(72, 1 << 1);
    assert!(matches!(made.open(), Err(OpenError::MarkedCorrupt(_))));
    made.be64(72, 1 << 40);
    assert!(made.open().err().unwrap().to_string().contains("a feature with the number 40"));
    made.be64(72, 0).be32(32, 1);
    assert!(matches!(made.open(), Err(OpenError::Encrypted(_))));
    for (at, value) in [(20, 8), (20, 22), (20, 63), (100, 8), (100, u32::MAX), (36, 0)] {
        let mut made = Made::new(1 << 20);
        made.be32(at, value);
        assert!(made.open().is_err(), "{value} at {at}");
    }
}

#[test]
fn clusters_and_tables_that_cannot_be_there_are_no_disk() {
    for entry in [
        DATA + 512,
        1 << 50,
        0x00ff_ffff_ffff_0000,
        1 << 62 | u64::MAX >> 2,
        (1 << 62) | (3 * CLUSTER as u64),
    ] {
        let mut made = Made::new(1 << 20);
        made.cluster(3, entry);
        assert!(made.read().is_err(), "{entry:x}");
    }
    for table in [512, 1 << 50] {
        let mut made = Made::new(1 << 20);
        made.be64(CLUSTER, table);
        assert!(made.read().is_err(), "{table:x}");
    }
}

#[test]
fn what_is_packed_as_a_whole_is_named() {
    for (head, command) in [
        (&b"\x1f\x8b\x08"[..], "gunzip --keep a.img"),
        (b"\xfd7zXZ\0", "xz --decompress --keep a.img"),
        (b"PK\x03\x04", "unzip a.img"),
    ] {
        let mut bytes = vec![1; 4096];
        bytes[..head.len()].copy_from_slice(head);
        let why = Held::image(bytes).err().unwrap().to_string();
        assert!(why.contains(&format!("`{command}`")), "{why}");
    }
    let mut tar = vec![0; 4096];
    tar[257..262].copy_from_slice(b"ustar");
    assert!(Held::image(tar).err().unwrap().to_string().contains("as an OVA is"));
    assert!(Held::image(Vec::new()).is_err());
    assert_eq!(Held::image(vec![1]).unwrap().format(), Format::Raw);
}

fn at(bytes: &mut [u8], offset: usize, value: &[u8]) {
    bytes[offset..offset + value.len()].copy_from_slice(value);
}

#[test]
fn a_vmdk_that_is_a_part_of_something_is_refused() {
    let vmdk = |description: &str| {
        let mut bytes = vec![0; 8192];
        at(&mut bytes, 0, b"KDMV\x01\0\0\0");
        at(&mut bytes, 12, &2048u64.to_le_bytes());
        at(&mut bytes, 20, &128u64.to_le_bytes());
        at(&mut bytes, 28, &1u64.to_le_bytes());
        at(&mut bytes, 36, &2u64.to_le_bytes());
        at(&mut bytes, 44, &512u32.to_le_bytes());
        at(&mut bytes, 56, &4u64.to_le_bytes());
        at(&mut bytes, 512, description.as_bytes());
        bytes
    };
    let whole = "# Disk DescriptorFile\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\n";
    assert_eq!(contents(&mut Held::image(vmdk(whole)).unwrap(), 4096).unwrap(), vec![0; 1 << 20]);
    for (from, to, why) in [
        ("monolithicSparse", "monolithicFlat", "with parts in other files"),
        ("monolithicSparse", "vmfs", "with parts in other files"),
        ("ffffffff", "12345678", "differs from another image"),
    ] {
        let error = Held::image(vmdk(&whole.replace(from, to))).err().unwrap().to_string();
        assert!(error.contains(why), "{error}");
    }
    for (offset, value) in
        [(12, u64::MAX), (20, 0), (20, 3), (20, u64::MAX), (36, 1 << 40), (56, u64::MAX), (56, 1 << 60)]
    {
        let mut bytes = vmdk(whole);
        at(&mut bytes, offset, &value.to_le_bytes());
        let read = Held::image(bytes).map(|mut image| contents(&mut image, 4096));
        assert!(matches!(read, Err(_) | Ok(Err(_))), "{value} at {offset}");
    }
}

#[test]
fn a_vdi_of_a_snapshot_is_refused() {
    let vdi = |kind: u32, block: u32, disk: u64| {
        let mut bytes = vec![0; 8192];
        at(&mut bytes, 64, &[0x7f, 0x10, 0xda, 0xbe, 1, 0, 1, 0]);
        at(&mut bytes, 76, &kind.to_le_bytes());
        at(&mut bytes, 340, &512u32.to_le_bytes());
        at(&mut bytes, 344, &4096u32.to_le_bytes());
        at(&mut bytes, 368, &disk.to_le_bytes());
        at(&mut bytes, 376, &block.to_le_bytes());
        at(&mut bytes, 384, &4u32.to_le_bytes());
        bytes[512..528].fill(0xff);
        bytes
    };
    assert_eq!(
        contents(&mut Held::image(vdi(1, 1 << 20, 4 << 20)).unwrap(), 4096).unwrap(),
        vec![0; 4 << 20]
    );
    assert!(Held::image(vdi(4, 1 << 20, 4 << 20)).err().unwrap().to_string().contains("of a snapshot"));
    for (block, disk) in [(0, 4096), (1 << 20, 5 << 20), (1 << 20, u64::MAX), (3, 9), (1 << 31, 9)] {
        assert!(Held::image(vdi(1, block, disk)).is_err(), "{block} {disk}");
    }
    let mut lies = vdi(1, 1 << 20, 4 << 20);
    at(&mut lies, 516, &0x00ff_ffffu32.to_le_bytes());
    assert!(matches!(contents(&mut Held::image(lies).unwrap(), 4096), Err(ReadError::CutOff { .. })));
}

#[test]
fn a_vhdx_without_sums_is_refused() {
    let mut bytes = vec![0; 1 << 20];
    at(&mut bytes, 0, b"vhdxfile");
    let why = Held::image(bytes.clone()).err().unwrap().to_string();
    assert!(why.contains("neither of its headers is whole"), "{why}");
    at(&mut bytes, 64 << 10, b"head");
    assert!(Held::image(bytes).is_err());
    assert!(Held::image(b"vhdxfile".to_vec()).is_err());
}

/// What each format begins with, as patches: so that random bytes come beyond the first look.
const BEGINNINGS: [&[u8]; 4] = [
    b"\0\0\x17QFI\xfb\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10",
    b"\0\0\x07KDMV\x01\0\0\0",
    b"\0\x01\x07\x7f\x10\xda\xbe\x01\0\x01\0",
    b"\0\0\x07vhdxfile",
];

proptest! {
    #[test]
    fn no_bytes_make_it_panic(format in 0..BEGINNINGS.len(), patches: Vec<u8>) {
        fuzz::image(&[BEGINNINGS[format], &patches].concat());
    }

    #[test]
    fn no_changes_make_it_panic(entries in proptest::collection::vec((0..16usize, any::<u64>()), 0..8), patches: Vec<u8>) {
        let mut made = Made::new(1 << 20);
        for (number, entry) in entries {
            made.cluster(number, entry);
        }
        fuzz::changed(&made.bytes, &patches);
    }
}
