//! Why an image is not read.

use std::io;
use std::path::{Path, PathBuf};

use crate::Format;

/// Why an image is not opened. Each names the remedy.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It cannot be opened.
    #[error("cannot open {}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Its tables cannot be read.
    #[error("{} ({format}): {source}", .path.display())]
    Tables {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: Format,
        /// What is wrong.
        source: ReadError,
    },
    /// It is packed as a whole, as downloads are.
    #[error("{} is no disk image yet, it is packed ({with}): unpack it first with `{remedy}` and import what comes of it", .path.display())]
    Packed {
        /// The file.
        path: PathBuf,
        /// By which program.
        with: &'static str,
        /// What unpacks it.
        remedy: String,
    },
    /// The format, or something in it, is not read.
    #[error(
        "{} ({format}) {what}, and Outlive does not read that: make a raw image with `{}` (`apt install qemu-utils` \
         brings it), if you trust the image, and import that",
        .path.display(), convert(.path, .format)
    )]
    NotRead {
        /// The file.
        path: PathBuf,
        /// Its format, as `qemu-img` calls it.
        format: &'static str,
        /// What is not read.
        what: String,
    },
    /// Its contents are partly in another file.
    #[error(
        "{} names {what}, {named:?}: an image that you did not make could name any file of this host and carry it into \
         the guest, so it is not read; if you trust the image, say --allow-backing",
        .path.display()
    )]
    NamesAnother {
        /// The file.
        path: PathBuf,
        /// What the other one is.
        what: &'static str,
        /// Its name.
        named: String,
    },
    /// Another image is based on it, and does not say in which format it is.
    #[error(
        "{} looks like {format}, and {}, which is based on it, does not say in which format it is: a guest may have \
         written what it begins with; if you know the format, say it with `qemu-img rebase -u -b {} -F FORMAT {}`",
        .path.display(), .of.display(), shell_word(.path), shell_word(.of)
    )]
    NoFormat {
        /// The file.
        path: PathBuf,
        /// What it begins like.
        format: Format,
        /// The image that is based on it.
        of: PathBuf,
    },
    /// Images name each other, or too many do.
    #[error(
        "{} is the last of {limit} images that name each other: make one of them with `qemu-img convert -O raw`",
        .path.display()
    )]
    TooDeep {
        /// The file.
        path: PathBuf,
        /// How many are read.
        limit: usize,
    },
    /// It is another program's, which marked it as damaged.
    #[error(
        "{} is marked as corrupt, by the program that used it last: repair it with `qemu-img check -r all {}`, or \
         restore it from a backup",
        .0.display(), shell_word(.0)
    )]
    MarkedCorrupt(PathBuf),
    /// It has a log whose writes are not in their places.
    #[error(
        "{} (vhdx) was not closed in order, and its log has writes that are not in their places yet: open it once where \
         it comes from, or replay the log with `qemu-img check -r all {}`",
        .0.display(), shell_word(.0)
    )]
    Log(PathBuf),
    /// It is encrypted.
    #[error(
        "{} is encrypted: decrypt it with `qemu-img convert -O raw` and its secret (--object secret), and import that",
        .0.display()
    )]
    Encrypted(PathBuf),
}

fn convert(path: &Path, format: &str) -> String {
    let mut raw = path.as_os_str().to_owned();
    raw.push(".raw");
    format!("qemu-img convert -f {format} -O raw {} {}", shell_word(path), shell_word(Path::new(&raw)))
}

/// A path as a shell reads it.
pub(crate) fn shell_word(path: &Path) -> String {
    let path = path.display().to_string();
    // No path has the byte that cannot be quoted.
    shlex::try_quote(&path).map_or(path.clone(), Into::into)
}

/// What is wrong with the contents of an image.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file system's.
    #[error("cannot read: {0}")]
    Io(#[from] io::Error),
    /// The file is too short.
    #[error(
        "the file ends at byte {bytes} and should reach to {needs} at least: it was not copied to its end; get it once more"
    )]
    CutOff {
        /// Its length.
        bytes: u64,
        /// What it must have.
        needs: u64,
    },
    /// It contradicts itself.
    #[error("damaged: {0}; get the image once more, or look at it with `qemu-img check`")]
    Damaged(String),
    /// Parts of the disk are stored at the same place.
    #[error("damaged: its disk has more data than its file has room for; get the image once more")]
    Twice,
    /// It is larger than what is read.
    #[error(
        "a disk of {0} bytes is larger than 64 TiB, which nobody has: the image is damaged, or it is a trap"
    )]
    TooLarge(u64),
}

impl ReadError {
    /// Something that contradicts itself.
    pub(crate) fn damaged(why: impl Into<String>) -> Self {
        Self::Damaged(why.into())
    }
}
