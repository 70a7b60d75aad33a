//! From a file in any format to a raw image.

use std::path::Path;

use indicatif::ProgressBar;
use outlive_epoch::{DISK_CHUNK, is_zero};
use outlive_images::{Image, Span};

use super::ImportError;
use super::target::Target;

/// How many bytes are read at a time.
const STEP: usize = 4 << 20;
/// After so many bytes what was written is made durable: else all of it would be at the end, behind a full bar.
const SYNCED: u64 = 256 << 20;

/// Writes the disk, and no zeroes. Returns how many bytes were written.
pub(super) fn copy(
    image: &mut Image,
    path: &Path,
    target: &mut Target,
    bar: &ProgressBar,
) -> Result<u64, ImportError> {
    let (mut at, mut written, mut synced) = (0, 0, 0);
    let mut buffer = vec![0; STEP];
    let bytes = image.bytes();
    while at < bytes {
        let failed = |source| ImportError::Read { path: path.to_owned(), source };
        match image.read(at, &mut buffer).map_err(failed)? {
            Span::Zero(length) => {
                target.zero(at, length)?;
                at += length;
            }
            Span::Data(length) => {
                for (offset, piece) in pieces(&buffer[..length], at) {
                    if is_zero(piece) {
                        target.zero(offset, piece.len() as u64)?;
                    } else {
                        target.write(offset, piece)?;
                        written += piece.len() as u64;
                    }
                }
                at += length as u64;
            }
        }
        if written - synced >= SYNCED {
            target.sync()?;
            synced = written;
        }
        bar.set_position(at);
    }
    bar.finish_and_clear();
    Ok(written)
}

/// The parts of `bytes`, which are at `at`, that are in one chunk each: as a standby looks for what is empty.
fn pieces(bytes: &[u8], at: u64) -> impl Iterator<Item = (u64, &[u8])> {
    let (mut rest, mut offset) = (bytes, at);
    std::iter::from_fn(move || {
        let length = (DISK_CHUNK - (offset % DISK_CHUNK as u64) as usize).min(rest.len());
        let (piece, after) = rest.split_at(length);
        let place = offset;
        rest = after;
        offset += length as u64;
        (!piece.is_empty()).then_some((place, piece))
    })
}

/// The first byte where the image that was made differs.
pub(super) fn difference(
    image: &mut Image,
    path: &Path,
    target: &Target,
    bar: &ProgressBar,
) -> Result<Option<u64>, ImportError> {
    let (mut buffer, mut there) = (vec![0; STEP], vec![0; STEP]);
    let (mut at, bytes) = (0, image.bytes());
    while at < bytes {
        let failed = |source| ImportError::Read { path: path.to_owned(), source };
        let (end, is_data) = match image.read(at, &mut buffer).map_err(failed)? {
            Span::Zero(length) => (at + length, false),
            Span::Data(length) => (at + length as u64, true),
        };
        let mut within = 0;
        while at < end {
            if !is_data {
                // What is a hole in both is not read.
                match target.next_data(at)? {
                    Some(data) if data < end => at = data.max(at),
                    _ => at = end,
                }
            }
            let length = (end - at).min(STEP as u64) as usize;
            let there = &mut there[..length];
            target.read(at, there)?;
            let differs = if is_data {
                let wanted = &buffer[within..within + length];
                wanted.iter().zip(&*there).position(|(one, other)| one != other)
            } else {
                there.iter().position(|byte| *byte != 0)
            };
            if let Some(first) = differs {
                return Ok(Some(at + first as u64));
            }
            within += length;
            at += length as u64;
        }
        bar.set_position(at);
    }
    bar.finish_and_clear();
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_end_where_chunks_do() {
        let bytes = vec![1; 2 * DISK_CHUNK];
        let found: Vec<_> = pieces(&bytes, 1000).map(|(at, piece)| (at, piece.len())).collect();
        let chunk = DISK_CHUNK as u64;
        assert_eq!(found, [(1000, DISK_CHUNK - 1000), (chunk, DISK_CHUNK), (2 * chunk, 1000)]);
        assert_eq!(pieces(&[], 7).count(), 0);
    }
}
