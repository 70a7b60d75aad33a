//! Which format a file has, by its bytes. Its name says nothing: a file that is called raw may begin like a qcow2, and
//! whoever then trusts one of the two is the one who is deceived.

use std::fmt;
use std::path::Path;

use crate::error::{OpenError, ReadError, shell_word};
use crate::source::Source;

/// A format that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// A disk as it is.
    Raw,
    /// QEMU's.
    Qcow2,
    /// VMware's, in one file.
    Vmdk,
    /// Hyper-V's.
    Vhdx,
    /// VirtualBox's.
    Vdi,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
        })
    }
}

/// What images of other programs have, where, and what `qemu-img` calls their format.
const IMAGES: [(usize, &[u8], &str); 8] = [
    (0, b"QFI\xfb", "qcow2"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, COWD, "vmdk"),
    (0, DESCRIPTOR, "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, VHD, "vpc"),
];
/// VMware's old format.
const COWD: &[u8] = b"COWD";
/// The text that only says which files a disk of VMware's has.
const DESCRIPTOR: &[u8] = b"# Disk DescriptorFile";
/// What a virtual disk of the format before vhdx ends with, or begins with a copy of.
const VHD: &[u8] = b"conectix";
/// As many bytes of a file as [`named`] needs.
pub const NAMED_BY: usize = 68;

/// The format of an image that is not raw, by its first [`NAMED_BY`] bytes, as `qemu-img` calls it. Not all of them are
/// read.
pub fn named(head: &[u8]) -> Option<&'static str> {
    let has = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    IMAGES.iter().find(|(at, magic, _)| has(*at, magic)).map(|(.., name)| *name)
}

/// What files begin with that are packed as a whole, and what unpacks them.
const PACKED: [(&[u8], &str, &str); 7] = [
    (b"\x1f\x8b", "gzip", "gunzip --keep"),
    (b"\xfd7zXZ\0", "xz", "xz --decompress --keep"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd --decompress"),
    (b"BZh", "bzip2", "bunzip2 --keep"),
    (b"\x04\x22\x4d\x18", "lz4", "lz4 --decompress"),
    (b"PK\x03\x04", "zip", "unzip"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "7z x"),
];
/// Where a tar archive, and so an OVA, says that it is one.
const TAR: (usize, &[u8]) = (257, b"ustar");
/// As many bytes as are looked at.
const HEAD: usize = 1024;

/// Tells the format of a file.
///
/// # Errors
/// It is in one that is not read.
pub(crate) fn format(source: &dyn Source, path: &Path) -> Result<Format, OpenError> {
    let failed = |source: ReadError| OpenError::Tables { path: path.to_owned(), format: Format::Raw, source };
    let bytes = source.bytes();
    let mut head = vec![0; HEAD.min(bytes as usize)];
    crate::source::read(source, &mut head, 0).map_err(failed)?;
    let end = bytes.min(512);
    let mut tail = vec![0; end as usize];
    crate::source::read(source, &mut tail, bytes - end).map_err(failed)?;
    let not_read =
        |format, what: &str| Err(OpenError::NotRead { path: path.to_owned(), format, what: what.to_owned() });
    for (magic, with, command) in PACKED {
        if head.starts_with(magic) {
            return Err(packed(path, with, command));
        }
    }
    if head.get(TAR.0..).is_some_and(|rest| rest.starts_with(TAR.1)) {
        return Err(packed(path, "tar, as an OVA is", "tar --extract --file"));
    }
    match named(&head) {
        Some("qcow2") => match head.get(4..8) {
            Some([0, 0, 0, 2 | 3]) => Ok(Format::Qcow2),
            Some([0, 0, 0, 1]) => not_read("qcow", "is in the format before qcow2"),
            _ => not_read("qcow2", "is in a newer version of its format"),
        },
        Some("vmdk") if head.starts_with(COWD) => {
            not_read("vmdk", "is a part of a disk, in VMware's old format")
        }
        Some("vmdk") if head.starts_with(DESCRIPTOR) => {
            not_read("vmdk", "only describes a disk that is in other files (a -flat.vmdk is raw: import it)")
        }
        Some("vmdk") => Ok(Format::Vmdk),
        Some("vhdx") => Ok(Format::Vhdx),
        Some("vdi") => Ok(Format::Vdi),
        Some("qed") => not_read("qed", "is in the format qed"),
        Some("vpc") => not_read("vpc", "is in the format before vhdx"),
        _ if tail.starts_with(VHD) => not_read("vpc", "is in the format before vhdx"),
        _ => Ok(Format::Raw),
    }
}

fn packed(path: &Path, with: &'static str, command: &str) -> OpenError {
    OpenError::Packed { path: path.to_owned(), with, remedy: format!("{command} {}", shell_word(path)) }
}
