//! Bodies of fuzz targets: hostile images.

use std::cell::Cell;
use std::io;
use std::path::Path;

use crate::{Files, Image, Source, Span};

/// Where a fuzzer's bytes go: the headers of every format and some tables fit.
const BYTES: usize = 4 << 20;
/// In which units offsets of patches are counted.
const UNIT: usize = 64;
/// How many reads an image is worth here.
const READS: usize = 2000;

/// The image, which is opened once.
struct One(Cell<Option<Vec<u8>>>);

impl Files for One {
    fn open(&self, path: &Path) -> io::Result<Box<dyn Source>> {
        assert_eq!(path, Path::new("image"), "it opened a file that nobody has allowed");
        Ok(Box::new(self.0.take().ok_or(io::ErrorKind::NotFound)?))
    }

    fn may_be_named(&self) -> bool {
        false
    }
}

/// An image with any contents. `data` is a list of patches to zeroes: two bytes of offset, in units of [`UNIT`], one of
/// length less one, and the bytes; so a short input reaches every header.
pub fn image(data: &[u8]) {
    let mut bytes = vec![0; BYTES];
    patch(&mut bytes, data);
    look(bytes);
}

/// An image with any changes, in the same form.
pub fn changed(image: &[u8], data: &[u8]) {
    let mut bytes = image.to_vec();
    patch(&mut bytes, data);
    look(bytes);
}

fn patch(bytes: &mut [u8], mut data: &[u8]) {
    while let [a, b, length, rest @ ..] = data {
        let at = (usize::from(*a) << 8 | usize::from(*b)) * UNIT;
        let (new, after) = rest.split_at(rest.len().min(usize::from(*length) + 1));
        if let Some(place) = bytes.get_mut(at..at + new.len()) {
            place.copy_from_slice(new);
        }
        data = after;
    }
}

/// Reads an image as it is.
pub fn look(bytes: Vec<u8>) {
    let Ok(mut image) = Image::open(Path::new("image"), &One(Cell::new(Some(bytes)))) else { return };
    let (mut at, mut buffer) = (0, vec![0; 64 << 10]);
    for _ in 0..READS {
        if at >= image.bytes() {
            break;
        }
        at += match image.read(at, &mut buffer) {
            Ok(Span::Zero(length)) => length,
            Ok(Span::Data(length)) => length as u64,
            Err(_) => break,
        };
    }
    assert!(at <= image.bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each input that was interesting once, and each beginning of it.
    #[test]
    fn what_fuzzers_have_found_is_survived() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus/image");
        let mut inputs = 0;
        for entry in std::fs::read_dir(corpus).unwrap() {
            let input = std::fs::read(entry.unwrap().path()).unwrap();
            (0..=input.len()).rev().step_by(97).for_each(|length| image(&input[..length]));
            inputs += 1;
        }
        assert!(inputs > 5);
    }
}
