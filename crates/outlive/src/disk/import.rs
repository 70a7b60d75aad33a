//! `outlive image import` and `outlive image seed`: images that are made from other files.
//!
//! ```text
//! source.rs   the file that is read        target.rs   the image that is made: whole, or not at all
//! copy.rs     from one to the other        seed.rs     a disk for cloud-init
//! ```

mod copy;
mod seed;
mod source;
mod target;
#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use indicatif::{BinaryBytes, ProgressBar};
use outlive_images::{Image, OpenError, ReadError};

pub(super) use seed::{SeedCommandError, seed};
use source::Opened;
use target::{Target, TargetError};

use crate::cli::ImportOptions;
use crate::ui::{self, shell_word};

/// The sectors of a VM's disk.
const SECTOR: u64 = 512;

/// Why no image was made of a file.
#[derive(Debug, thiserror::Error)]
pub(super) enum ImportError {
    /// The file cannot be used.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It has changed while it was read, or will.
    #[error(
        "{} is in use by a program that writes to it, a VM perhaps: shut that down first, or half of what it writes \
         would be in the image",
        .0.display()
    )]
    InUse(PathBuf),
    /// What is in it cannot be read.
    #[error("{}: {source}", .path.display())]
    Read { path: PathBuf, source: ReadError },
    /// A disk cannot shrink: what is behind the new end would be lost.
    #[error("the disk of {} has {needs} bytes, more than --size {size}: give as much, or leave --size out", .path.display())]
    Smaller { path: PathBuf, needs: u64, size: u64 },
    /// No whole number of sectors.
    #[error("--size {size} is no multiple of 512, the length of a sector: give {}", .size.next_multiple_of(SECTOR))]
    Sectors { size: u64 },
    /// The image cannot be made.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// It was made, and has something else in it.
    #[error(
        "{} was written and reads back otherwise at byte {at}: its storage, or this host's memory, is not to be trusted",
        .path.display()
    )]
    Differs { path: PathBuf, at: u64 },
    /// The result cannot be shown.
    #[error("cannot print: {0}")]
    Print(#[from] io::Error),
}

/// Makes a raw image of a file in another format, and says what comes next.
pub(super) fn import(options: &ImportOptions, out: &mut impl Write) -> Result<(), ImportError> {
    let ImportOptions { file, to, size, overwrite, allow_backing, verify } = options;
    if let Some(size) = size.filter(|size| !size.is_multiple_of(SECTOR)) {
        return Err(ImportError::Sectors { size });
    }
    let files = Opened::new(*allow_backing);
    let mut image = Image::open(file, &files).map_err(source::not_opened)?;
    let needs = image.bytes().next_multiple_of(SECTOR);
    if let Some(size) = size.filter(|size| *size < needs) {
        return Err(ImportError::Smaller { path: file.clone(), needs, size });
    }
    let mut target = Target::open(to, &files.read(), *overwrite)?;
    let bytes = target.begin(size.unwrap_or(needs), size.is_some())?;
    for note in image.notes() {
        writeln!(out, "{}: {note}", file.display())?;
    }
    let bar = ui::bytes_bar("importing", image.bytes());
    let data = copy::copy(&mut image, file, &mut target, &bar)?;
    target.finish(image.bytes(), bytes)?;
    if *verify {
        let bar = ui::bytes_bar("comparing", image.bytes());
        // A device that has a bad disk is to start nothing.
        compare(&mut image, file, &target, &bar).inspect_err(|_| target.spoil())?;
    }
    let format = image.format();
    target.keep()?;
    report(out, to, bytes, data, &format!("{} ({format})", file.display()))?;
    Ok(())
}

fn compare(image: &mut Image, path: &Path, target: &Target, bar: &ProgressBar) -> Result<(), ImportError> {
    target.forget_cached();
    match copy::difference(image, path, target, bar)? {
        None => Ok(()),
        Some(at) => Err(ImportError::Differs { path: target.path().to_owned(), at }),
    }
}

fn report(out: &mut impl Write, to: &Path, bytes: u64, data: u64, from: &str) -> io::Result<()> {
    let word = shell_word(to);
    let whole = BinaryBytes(bytes);
    writeln!(out, "{}: {whole}, {} of it data, from {from}", to.display(), BinaryBytes(data))?;
    writeln!(out, "  start a VM:          outlive run --boot disk --memory 2G --disk path={word}")?;
    if to.is_file() {
        writeln!(out, "  its standby's image: truncate --size {bytes} {word}")?;
    } else {
        writeln!(out, "  its standby's image: an empty block device of {bytes} bytes")?;
    }
    Ok(())
}
