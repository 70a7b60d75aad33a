//! The base of a run: the VM's memory and disks, to which its checkpoints are added.
//!
//! # Why a copy of what changes is a base
//!
//! The base is copied while commits go on writing to what is copied, so it is no moment of the VM. Every checkpoint from
//! the first of the run on is in the run's log; call it S. A byte that none of the checkpoints S to M writes had one
//! content all that time, and that was copied. A byte that some of them write has, after playing S to M on top of the
//! copy, what the last of them wrote. So **the copy, made between S and M, with the checkpoints S to M on top, is the VM at
//! M**; and with those up to any later one, the VM at that one. Earlier than M nothing can be had. It needs only that
//!
//! * what was committed before S is in memory and images before the copy begins, and
//! * nothing is in them that comes behind M. So M is read after the copy has ended.
//!
//! The file `base` says M, and is written when the copy is durable. To forget the oldest checkpoints, they are played on
//! the base itself: `from` is raised first, durably, so a base that was half way when the power went is played from its
//! oldest segment again, which writes the same bytes.

use std::io;
use std::path::Path;

use crate::places::{read_small, write_whole};

/// From which moment on a run can be played.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Base {
    /// The first checkpoint that can be had.
    pub(crate) from: u64,
    /// When it was committed, in microseconds since 1970.
    pub(crate) time_us: u64,
}

/// The first line of the file. Its number grows when an older release would misread it.
const FORMAT: &str = "outlive record 1";

/// Why a file is no base.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BaseError {
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// Another release has written it, or nobody.
    #[error("it begins with {0:?}, which this release does not read")]
    Format(String),
    /// It has other fields.
    #[error("it is damaged")]
    Damaged,
}

impl Base {
    /// Reads the file; `None` if there is none.
    ///
    /// # Errors
    /// See [`BaseError`].
    pub(crate) fn read(path: &Path) -> Result<Option<Self>, BaseError> {
        let text = match read_small(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        if first != FORMAT {
            return Err(BaseError::Format(first.chars().take(80).collect()));
        }
        let mut field = |name: &str| lines.next()?.strip_prefix(name)?.trim().parse().ok();
        let (from, time_us) = (field("from "), field("time_us "));
        from.zip(time_us).map(|(from, time_us)| Some(Self { from, time_us })).ok_or(BaseError::Damaged)
    }

    /// Writes the file, whole and durable.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn write(self, path: &Path) -> io::Result<()> {
        let Self { from, time_us } = self;
        write_whole(path, format!("{FORMAT}\nfrom {from}\ntime_us {time_us}\n").as_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_comes_back_and_anything_else_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("base");
        assert_eq!(Base::read(&path).unwrap(), None);
        let base = Base { from: 7, time_us: 1_700_000_000_000_000 };
        base.write(&path).unwrap();
        assert_eq!(Base::read(&path).unwrap(), Some(base));
        for bad in [
            "",
            "outlive record 2\nfrom 1\ntime_us 2\n",
            "outlive record 1\nfrom x\ntime_us 2\n",
            "outlive record 1\nfrom 1\n",
        ] {
            std::fs::write(&path, bad).unwrap();
            assert!(Base::read(&path).is_err(), "{bad:?}");
        }
    }
}
