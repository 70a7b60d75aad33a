//! Image formats that are not raw, by their first bytes. As a raw disk the guest would see the format's own tables, and
//! its first write would destroy them.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use outlive_images::{NAMED_BY, named};

use super::sidecar::beside;
use crate::ui::shell_word;

/// An image that has to be converted.
#[derive(Debug, thiserror::Error)]
#[error(
    "the disk image {} is in the format {format}, and VMs of Outlive have raw images only: make one with `outlive image \
     import {} --to {}` and give that", .image.display(), shell_word(.image), shell_word(&beside(.image, "raw"))
)]
pub(crate) struct NotRaw {
    image: PathBuf,
    format: &'static str,
}

/// Refuses an image in another format. What a VM has written to its own image, which has a sidecar, is nobody's to
/// judge. An image that cannot be read is somebody else's to complain about.
///
/// # Errors
/// See [`NotRaw`].
pub(crate) fn refuse_other_formats(image: &Path) -> Result<(), NotRaw> {
    let mut bytes = [0; NAMED_BY];
    let known = beside(image, "outlive").exists();
    let Some(read) = File::open(image).and_then(|file| file.read_at(&mut bytes, 0)).ok().filter(|_| !known)
    else {
        return Ok(());
    };
    named(&bytes[..read]).map_or(Ok(()), |format| Err(NotRaw { image: image.to_owned(), format }))
}
