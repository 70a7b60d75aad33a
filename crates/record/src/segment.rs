//! A segment: a file of consecutive checkpoints, as a primary would send them over a fresh link.
//!
//! It begins with the preface of the stream, and the first checkpoint has the whole state with its constants. So a
//! segment is read without those in front of it, in any version of the stream that this release reads, and each byte is
//! covered by a checksum. The end of a checkpoint has, as its stamp, the time of its commit in microseconds since 1970.
//!
//! A segment may end anywhere: with the power, with the disk, or because it is being written. What is whole in front of
//! that is good.

mod read;
mod write;

pub(crate) use read::{SegmentError, SegmentReader, disks};
pub(crate) use write::SegmentWriter;

use std::path::{Path, PathBuf};

/// How the name of a segment ends.
const ENDING: &str = ".log";

/// The name of a segment: its first checkpoint, and when that was committed, in microseconds since 1970. So the names of a
/// run are its index, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SegmentName {
    pub(crate) first: u64,
    pub(crate) time_us: u64,
}

impl SegmentName {
    /// The name in this text, if it is one.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let (first, time_us) = name.strip_suffix(ENDING)?.split_once('-')?;
        let number = |text: &str| text.bytes().all(|it| it.is_ascii_digit()).then(|| text.parse().ok())?;
        Some(Self { first: number(first)?, time_us: number(time_us)? })
    }

    /// Where it is in a run.
    pub(crate) fn path(self, run: &Path) -> PathBuf {
        run.join(format!("{:020}-{:020}{ENDING}", self.first, self.time_us))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_back_and_sort_by_checkpoint() {
        let names = [(1, 9), (10, 8), (2, 7)].map(|(first, time_us)| SegmentName { first, time_us });
        for name in names {
            let path = name.path(Path::new("/r"));
            assert_eq!(SegmentName::parse(path.file_name().unwrap().to_str().unwrap()), Some(name));
        }
        let mut paths = names.map(|name| name.path(Path::new("/r")));
        paths.sort();
        assert!(paths[0].to_str().unwrap().contains("0001-") && paths[2].to_str().unwrap().contains("0010-"));
        for other in
            ["1-2", "x-2.log", "1-.log", "-1.log", "+1-2.log", "12.log", "1-99999999999999999999999.log"]
        {
            assert_eq!(SegmentName::parse(other), None, "{other}");
        }
    }
}
