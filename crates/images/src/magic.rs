//! Which format a file has, by its bytes. Its name says nothing: a file that is called raw may begin like a qcow2, and
//! whoever then trusts one of the two is the one who is deceived.

use std::fmt;
use std::path::Path;

use crate::error::{OpenError, ReadError};
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
/// What a virtual disk of the format before vhdx ends with, or begins with a copy of.
const VHD: &[u8] = b"conectix";
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
    match &*head {
        _ if head.get(TAR.0..).is_some_and(|rest| rest.starts_with(TAR.1)) => {
            Err(packed(path, "tar, as an OVA is", "tar --extract --file"))
        }
        [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 2 | 3, ..] => Ok(Format::Qcow2),
        [b'Q', b'F', b'I', 0xfb, 0, 0, 0, 1, ..] => not_read("qcow", "is in the format before qcow2"),
        [b'Q', b'F', b'I', 0xfb, ..] => not_read("qcow2", "is in a newer version of its format"),
        [b'Q', b'E', b'D', 0, ..] => not_read("qed", "is in the format qed"),
        [b'C', b'O', b'W', b'D', ..] => not_read("vmdk", "is a part of a disk, in VMware's old format"),
        [b'K', b'D', b'M', b'V', ..] => Ok(Format::Vmdk),
        _ if head.starts_with(b"# Disk DescriptorFile") => {
            not_read("vmdk", "only describes a disk that is in other files (a -flat.vmdk is raw: import it)")
        }
        _ if head.starts_with(b"vhdxfile") => Ok(Format::Vhdx),
        _ if head.get(64..68) == Some(&[0x7f, 0x10, 0xda, 0xbe]) => Ok(Format::Vdi),
        _ if head.starts_with(VHD) || tail.starts_with(VHD) => {
            not_read("vpc", "is in the format before vhdx")
        }
        _ => Ok(Format::Raw),
    }
}

fn packed(path: &Path, with: &'static str, command: &str) -> OpenError {
    OpenError::Packed { path: path.to_owned(), with, remedy: format!("{command} {}", path.display()) }
}
