//! What is read of images, and what is not.

mod hostile;
mod real;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use crate::{Files, Image, OpenError, ReadError, Source, Span};

/// Files in memory.
#[derive(Default)]
struct Held {
    files: HashMap<PathBuf, Vec<u8>>,
    may_be_named: bool,
}

impl Held {
    fn with(mut self, name: &str, bytes: Vec<u8>) -> Self {
        self.files.insert(name.into(), bytes);
        self
    }

    fn image(bytes: Vec<u8>) -> Result<Image, OpenError> {
        Image::open(Path::new("a.img"), &Self::default().with("a.img", bytes))
    }
}

impl Files for Held {
    fn open(&self, path: &Path) -> io::Result<Box<dyn Source>> {
        let bytes = self.files.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Box::new(bytes.clone()))
    }

    fn may_be_named(&self) -> bool {
        self.may_be_named
    }
}

/// A whole disk, read into a buffer of this many bytes.
fn contents(image: &mut Image, buffer: usize) -> Result<Vec<u8>, ReadError> {
    let mut buffer = vec![0xee; buffer];
    let mut disk = Vec::new();
    while (disk.len() as u64) < image.bytes() {
        match image.read(disk.len() as u64, &mut buffer)? {
            Span::Zero(length) => disk.resize(disk.len() + length as usize, 0),
            Span::Data(length) => disk.extend(&buffer[..length]),
        }
    }
    assert_eq!(disk.len() as u64, image.bytes());
    Ok(disk)
}
