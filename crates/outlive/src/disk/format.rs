//! Image formats that are not raw, by their first bytes. As a raw disk the guest would see the format's own tables, and
//! its first write would destroy them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::sidecar::beside;

/// What images of other programs begin with.
const MAGIC: [(usize, &[u8], &str); 8] = [
    (0, b"QFI\xfb", "qcow2"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"QED\0", "qed"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
];
/// As many bytes as are looked at.
const LONGEST: usize = 68;

/// An image that has to be converted.
#[derive(Debug, thiserror::Error)]
#[error(
    "the disk image {image} is in the format {format}, and VMs of Outlive have raw images only: make one with \
     `outlive image import {image} --to {image}.raw` and give that"
)]
pub(crate) struct NotRaw {
    image: String,
    format: &'static str,
}

/// Refuses an image in another format. What a VM has written to its own image, which has a sidecar, is nobody's to
/// judge. An image that cannot be read is somebody else's to complain about.
///
/// # Errors
/// See [`NotRaw`].
pub(crate) fn refuse_other_formats(image: &Path) -> Result<(), NotRaw> {
    let mut bytes = [0; LONGEST];
    let known = beside(image, "outlive").exists();
    let Some(read) = File::open(image).and_then(|file| file.read_at(&mut bytes, 0)).ok().filter(|_| !known)
    else {
        return Ok(());
    };
    let format = MAGIC.iter().find(|(at, magic, _)| bytes[*at.min(&read)..read].starts_with(magic));
    format.map_or(Ok(()), |(.., format)| Err(NotRaw { image: image.display().to_string(), format }))
}
