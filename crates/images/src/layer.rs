//! What formats have in common: which part of a disk is stored where.

use std::fmt;

use crate::error::ReadError;
use crate::source::Source;
use crate::{Format, MAX_BYTES};

/// One file with a disk, or with a part of it.
pub(crate) trait Layer {
    /// Its format.
    fn format(&self) -> Format;

    /// Length of the disk in bytes.
    fn bytes(&self) -> u64;

    /// Where the byte `at` of the disk is, and for how many bytes that holds. `at` is within the disk, and the answer is
    /// about one byte at least.
    fn place(&mut self, at: u64) -> Result<(Place, u64), ReadError>;

    /// The file in which places are.
    fn data(&self) -> &dyn Source;

    /// Reading begins at the first byte once more.
    fn begin_anew(&mut self) {}

    /// What an operator should know.
    fn notes(&self) -> Vec<Note> {
        Vec::new()
    }
}

/// Where a part of a disk is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Not in this file: in the image that it is based on, or nowhere, and then it is zero.
    Absent,
    /// It is zero.
    Zero,
    /// As it is, at this byte of the file.
    Stored(u64),
    /// In a compressed cluster.
    Packed(Packed),
}

/// A compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Packed {
    /// Where it is in the file.
    pub(crate) offset: u64,
    /// How many bytes it has there, at most.
    pub(crate) length: usize,
    /// By which method.
    pub(crate) codec: Codec,
    /// Its length when it is unpacked.
    pub(crate) unpacked: usize,
    /// Which of its bytes was asked for.
    pub(crate) within: usize,
}

/// A method of compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    Deflate,
    Zlib,
    Zstd,
}

/// What an operator should know of an image that is read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// It was not closed in order.
    NotClosed,
    /// It has snapshots, which are not read.
    Snapshots(u32),
    /// Its disk has sectors of this many bytes.
    Sectors(u32),
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotClosed => write!(
                f,
                "it was not closed in order, as after a loss of power: the guest will check its file systems"
            ),
            Self::Snapshots(1) => write!(f, "it has a snapshot, which is left out: this is its newest state"),
            Self::Snapshots(number) => {
                write!(f, "it has {number} snapshots, which are left out: this is its newest state")
            }
            Self::Sectors(bytes) => {
                write!(
                    f,
                    "its disk has sectors of {bytes} bytes: give it with --disk path=...,sector={bytes}"
                )
            }
        }
    }
}

/// Checks the length of a disk.
pub(crate) fn disk_bytes(bytes: u64) -> Result<u64, ReadError> {
    match bytes {
        0 => Err(ReadError::damaged("its disk has no bytes")),
        _ if bytes > MAX_BYTES => Err(ReadError::TooLarge(bytes)),
        _ => Ok(bytes),
    }
}

/// A run of units of one length, beginning with the one at `at`: asks `place` for one after another and joins those that
/// lie together, up to `limit` units. `place` may answer for the beginning of each unit only.
pub(crate) fn joined(
    at: u64,
    unit: u64,
    limit: u64,
    mut place: impl FnMut(u64) -> Result<Place, ReadError>,
) -> Result<(Place, u64), ReadError> {
    let (index, within) = (at / unit, at % unit);
    let first = place(index)?;
    let mut units = 1;
    while units < limit {
        let goes_on = match (first, place(index + units)?) {
            (Place::Absent, Place::Absent) | (Place::Zero, Place::Zero) => true,
            (Place::Stored(first), Place::Stored(next)) => first.checked_add(units * unit) == Some(next),
            _ => false,
        };
        if !goes_on {
            break;
        }
        units += 1;
    }
    let first = match first {
        Place::Stored(offset) => Place::Stored(offset.checked_add(within).ok_or_else(out_of_bounds)?),
        Place::Packed(packed) => {
            // A part of a cluster says where in the cluster it begins.
            Place::Packed(Packed { within: packed.within + within as usize, ..packed })
        }
        other => other,
    };
    Ok((first, units * unit - within))
}

pub(crate) fn out_of_bounds() -> ReadError {
    ReadError::damaged("a part of it would be behind the end of every file")
}

/// Part of a table in the file, read in pieces, so that a table of any length costs little memory.
pub(crate) struct Window {
    /// Where the table begins.
    offset: u64,
    /// Which piece is there.
    piece: Option<u64>,
    bytes: Vec<u8>,
}

/// How many bytes of a table are there at a time.
const PIECE: u64 = 64 << 10;

impl Window {
    /// A table at this byte of the file.
    pub(crate) fn new(offset: u64) -> Self {
        Self { offset, piece: None, bytes: Vec::new() }
    }

    /// The entry with this number, of `N` bytes. `N` divides 64 KiB.
    pub(crate) fn entry<const N: usize>(
        &mut self,
        source: &dyn Source,
        number: u64,
    ) -> Result<[u8; N], ReadError> {
        let at = number.checked_mul(N as u64).ok_or_else(out_of_bounds)?;
        let (piece, within) = (at / PIECE, (at % PIECE) as usize);
        if self.piece != Some(piece) {
            let begin = self.offset.checked_add(piece * PIECE).ok_or_else(out_of_bounds)?;
            // The table may end the file.
            let length = source.bytes().saturating_sub(begin).min(PIECE) as usize;
            self.piece = None;
            self.bytes.resize(length, 0);
            crate::source::read(source, &mut self.bytes, begin)?;
            self.piece = Some(piece);
        }
        let entry = self.bytes.get(within..).and_then(|rest| rest.first_chunk());
        let needs = self.offset.saturating_add(at).saturating_add(N as u64);
        entry.copied().ok_or(ReadError::CutOff { bytes: source.bytes(), needs })
    }
}
