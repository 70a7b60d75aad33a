//! Whether an image is empty, so that a standby may overwrite it unasked.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use outlive_epoch::is_zero;

use super::image::Store;

/// How many bytes are read at a time.
const STEP: u64 = 1 << 20;
/// Every file system, volume manager and partition table writes into the first or the last bytes of its
/// device, so this much of both is always read.
const ENDS: u64 = 64 << 20;
/// How many places are sampled where not everything can be read.
const SAMPLES: u64 = 1024;
/// How many bytes are read at each place.
const SAMPLE: u64 = 64 << 10;

/// What an image contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// Nothing but holes and zeroes.
    Blank,
    /// Zeroes at both ends and in samples between them; there was no time to read everything.
    BlankInSamples,
    /// Data at this place.
    Data {
        /// The first byte with data.
        at: u64,
    },
}

/// Searches for anything but zeroes, for not much longer than `patience`. Holes cost nothing.
///
/// # Errors
/// The file system's.
pub(super) fn scan(file: &File, patience: Duration) -> io::Result<Content> {
    let bytes = file.bytes()?;
    let deadline = Instant::now() + patience;
    let mut reader = Reader { file, bytes, buffer: vec![0; STEP as usize] };
    for (from, to) in [(0, ENDS.min(bytes)), (bytes.saturating_sub(ENDS), bytes)] {
        if let Some(at) = reader.find(from, to, None)?.found() {
            return Ok(Content::Data { at });
        }
    }
    match reader.find(ENDS.min(bytes), bytes.saturating_sub(ENDS), Some(deadline))? {
        Found::Data(at) => Ok(Content::Data { at }),
        Found::Nothing => Ok(Content::Blank),
        Found::NoTime(at) => {
            let step = (bytes - at) / SAMPLES;
            for place in (0..SAMPLES).map(|number| at + number * step) {
                if let Some(at) = reader.find(place, (place + SAMPLE).min(bytes), None)?.found() {
                    return Ok(Content::Data { at });
                }
            }
            Ok(Content::BlankInSamples)
        }
    }
}

enum Found {
    Nothing,
    Data(u64),
    NoTime(u64),
}

impl Found {
    fn found(self) -> Option<u64> {
        match self {
            Self::Data(at) => Some(at),
            Self::Nothing | Self::NoTime(_) => None,
        }
    }
}

struct Reader<'a> {
    file: &'a File,
    bytes: u64,
    buffer: Vec<u8>,
}

impl Reader<'_> {
    /// The first place with data between two positions.
    fn find(&mut self, from: u64, to: u64, deadline: Option<Instant>) -> io::Result<Found> {
        let mut at = from;
        while at < to {
            match self.file.next_data(at)? {
                Some(data) if data < to => at = data.max(at),
                _ => return Ok(Found::Nothing),
            }
            if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                return Ok(Found::NoTime(at));
            }
            let len = STEP.min(to - at).min(self.bytes - at) as usize;
            let buffer = &mut self.buffer[..len];
            self.file.read(buffer, at)?;
            if !is_zero(buffer) {
                return Ok(Found::Data(at));
            }
            at += len as u64;
        }
        Ok(Found::Nothing)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    const AGES: Duration = Duration::from_secs(3600);

    fn file(bytes: u64, data: &[u64]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        data.iter().for_each(|at| file.write_all_at(&[1], *at).unwrap());
        file
    }

    #[test]
    fn one_byte_anywhere_is_found() {
        let bytes = (300 << 20) + 512;
        assert_eq!(scan(&file(bytes, &[]), AGES).unwrap(), Content::Blank);
        for at in [0, 1 << 20, ENDS - 1, ENDS, (150 << 20) + 77, bytes - ENDS, bytes - 1] {
            let found = scan(&file(bytes, &[at]), AGES).unwrap();
            assert!(
                matches!(found, Content::Data { at: from } if from <= at && at < from + STEP),
                "{at}: {found:?}"
            );
        }
        for bytes in [0, 1, 512, STEP, ENDS, ENDS + 1, 2 * ENDS, 2 * ENDS + 1] {
            assert_eq!(scan(&file(bytes, &[]), AGES).unwrap(), Content::Blank, "{bytes}");
            if bytes > 0 {
                assert_ne!(scan(&file(bytes, &[bytes - 1]), AGES).unwrap(), Content::Blank, "{bytes}");
            }
        }
        // Written zeroes are not data.
        let zeroes = file(4 << 20, &[]);
        zeroes.write_all_at(&[0; 3 << 20], 77).unwrap();
        assert_eq!(scan(&zeroes, AGES).unwrap(), Content::Blank);
    }

    /// A terabyte of holes takes no time; without enough time, samples are taken.
    #[test]
    fn a_large_image_is_looked_at_in_reasonable_time() {
        let began = Instant::now();
        let large = file(1 << 40, &[]);
        assert_eq!(scan(&large, AGES).unwrap(), Content::Blank);
        let zeroes = file(1 << 40, &[]);
        zeroes.write_all_at(&[0; 1 << 20], 500 << 20).unwrap();
        assert_eq!(scan(&zeroes, Duration::ZERO).unwrap(), Content::BlankInSamples);
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        let full = file(200 << 20, &[]);
        for at in (64..136).map(|megabyte| megabyte << 20) {
            full.write_all_at(&[9; 1 << 20], at).unwrap();
        }
        assert!(matches!(scan(&full, Duration::ZERO).unwrap(), Content::Data { .. }));
    }
}
