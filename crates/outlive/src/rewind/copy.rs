//! Copies a file where it has data. Where the file system can, the copy shares the blocks of the original until either is
//! written to, and costs nothing: `copy_file_range` does that by itself where both are on one such file system. (The call
//! that asks for it, FICLONE, is an ioctl of file systems, and a confined process makes none of them.)

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use indicatif::ProgressBar;
use nix::errno::Errno;
use nix::fcntl::copy_file_range;
use nix::unistd::{Whence, lseek};
use outlive_epoch::{DISK_CHUNK, is_zero};

use crate::disk::Store;

/// Bytes that the kernel copies before this looks whether anybody still wants it.
const STEP: u64 = 64 << 20;
/// Bytes at a time where the kernel does not copy.
const BUFFER: usize = 4 << 20;

/// Why a copy was not made.
#[derive(Debug, thiserror::Error)]
pub(super) enum CopyError {
    /// The original.
    #[error("cannot read it: {0}")]
    Read(#[source] io::Error),
    /// The copy.
    #[error(transparent)]
    Write(io::Error),
    /// Nobody wants it any more.
    #[error("told to stop")]
    Stopped,
}

/// Copies the first `bytes` bytes of a file to one that is empty and as long. `goes_on` is asked about twice a second at
/// least, unless storage is slow.
pub(super) fn copy(
    from: &File,
    to: &File,
    bytes: u64,
    goes_on: &dyn Fn() -> bool,
    bar: &ProgressBar,
) -> Result<(), CopyError> {
    let mut by_kernel = true;
    let mut at = 0;
    while let Some(data) = from.next_data(at).map_err(CopyError::Read)?.filter(|data| *data < bytes) {
        let end = end_of_data(from, data).map_err(CopyError::Read)?.min(bytes);
        at = data;
        while at < end {
            if !goes_on() {
                return Err(CopyError::Stopped);
            }
            bar.set_position(at);
            let copied = if by_kernel { kernels(from, to, at, (end - at).min(STEP))? } else { None };
            by_kernel = copied.is_some();
            at += match copied {
                Some(copied) => copied,
                None => own(from, to, at, (end - at).min(BUFFER as u64))?,
            };
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// The end of the data that is at `at`.
fn end_of_data(file: &File, at: u64) -> io::Result<u64> {
    match lseek(file, at as i64, Whence::SeekHole) {
        Ok(end) => Ok(end as u64),
        // Some file systems do not know their holes.
        Err(Errno::EINVAL | Errno::EOPNOTSUPP) => file.bytes(),
        Err(error) => Err(error.into()),
    }
}

/// Has the kernel copy, at most `len` bytes. `None` if it does not do that between these two files.
fn kernels(from: &File, to: &File, at: u64, len: u64) -> Result<Option<u64>, CopyError> {
    let (mut read, mut written) = (at as i64, at as i64);
    match copy_file_range(from, Some(&mut read), to, Some(&mut written), len as usize) {
        Ok(0) => Err(CopyError::Read(io::ErrorKind::UnexpectedEof.into())),
        Ok(copied) => Ok(Some(copied as u64)),
        Err(Errno::EXDEV | Errno::EINVAL | Errno::EOPNOTSUPP | Errno::ENOSYS | Errno::EPERM) => Ok(None),
        // It does not say which of the two has failed.
        Err(error) => Err(CopyError::Write(error.into())),
    }
}

/// Copies without the kernel's help, and leaves what is zero a hole.
fn own(from: &File, to: &File, at: u64, len: u64) -> Result<u64, CopyError> {
    let mut buffer = vec![0; len as usize];
    from.read_exact_at(&mut buffer, at).map_err(CopyError::Read)?;
    for (piece, offset) in buffer.chunks(DISK_CHUNK).zip((at..).step_by(DISK_CHUNK)) {
        if !is_zero(piece) {
            to.write_all_at(piece, offset).map_err(CopyError::Write)?;
        }
    }
    Ok(len)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const BYTES: u64 = 3 << 20;

    /// Data at both ends and in the middle, at places that are no block's.
    fn original() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        for (at, len) in [(0, 5000), (1_000_001, 70_000), (BYTES - 10, 10)] {
            file.write_all_at(&vec![at as u8 | 1; len], at).unwrap();
        }
        file
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut all = vec![0; file.bytes().unwrap() as usize];
        file.read_exact_at(&mut all, 0).unwrap();
        all
    }

    #[test]
    fn holes_stay_holes_and_data_is_the_same() {
        let (from, to) = (original(), tempfile::tempfile().unwrap());
        to.set_len(BYTES).unwrap();
        copy(&from, &to, BYTES, &|| true, &ProgressBar::hidden()).unwrap();
        assert!(contents(&from) == contents(&to));
        assert!(to.metadata().unwrap().blocks() <= from.metadata().unwrap().blocks() + 16);
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20);
    }

    #[test]
    fn without_the_kernels_help_it_is_the_same() {
        let (from, to) = (original(), tempfile::tempfile().unwrap());
        to.set_len(BYTES).unwrap();
        assert_eq!(own(&from, &to, 0, BYTES).unwrap(), BYTES);
        assert!(contents(&from) == contents(&to));
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20, "zeroes are not written");
        // From one file system to another one.
        let (other, to) = (File::open("/proc/self/exe").unwrap(), tempfile::tempfile().unwrap());
        let bytes = other.bytes().unwrap().min(BYTES);
        to.set_len(bytes).unwrap();
        copy(&other, &to, bytes, &|| true, &ProgressBar::hidden()).unwrap();
        assert!(contents(&to) == contents(&other)[..bytes as usize]);
    }

    #[test]
    fn a_copy_that_nobody_wants_ends() {
        let (from, to) = (original(), tempfile::tempfile().unwrap());
        let stopped = copy(&from, &to, BYTES, &|| false, &ProgressBar::hidden());
        assert!(matches!(stopped, Err(CopyError::Stopped)));
    }

    #[test]
    fn an_original_that_is_cut_is_noticed() {
        let (from, to) = (original(), tempfile::tempfile().unwrap());
        let cut = own(&from, &to, BYTES - 5, 10);
        assert!(matches!(cut, Err(CopyError::Read(_))));
        assert!(matches!(kernels(&from, &to, BYTES, 10), Err(CopyError::Read(_))));
    }
}
