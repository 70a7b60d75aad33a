//! An image with those that it is based on, read from its beginning to its end.

use std::io;
use std::path::{Component, Path, PathBuf};

use crate::error::{OpenError, ReadError};
use crate::layer::{Layer, Note, Packed, Place};
use crate::qcow2::{Linked, Qcow2};
use crate::raw::Raw;
use crate::source::Source;
use crate::vdi::Vdi;
use crate::vhdx::Vhdx;
use crate::vmdk::Vmdk;
use crate::{Format, magic};

/// How many images may be based on each other.
const DEEPEST: usize = 16;

/// Opens files.
pub trait Files {
    /// Opens one for reading.
    ///
    /// # Errors
    /// Of the file system.
    fn open(&self, path: &Path) -> io::Result<Box<dyn Source>>;

    /// Whether files that an image names may be opened, too.
    fn may_be_named(&self) -> bool;
}

/// What is at a place of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// As many bytes of zeroes.
    Zero(u64),
    /// As many bytes, which are in the buffer now.
    Data(usize),
}

/// A disk image.
pub struct Image {
    layer: Box<dyn Layer>,
    backing: Option<Box<Image>>,
    /// The compressed cluster that was unpacked last.
    unpacked: Vec<u8>,
    which: Option<Packed>,
    packed: Vec<u8>,
    /// How much of the file was given since the first byte of the disk.
    given: u64,
}

impl Image {
    /// Opens an image. Reads its tables, and nothing else of it.
    ///
    /// # Errors
    /// One line that names the remedy.
    pub fn open(path: &Path, files: &dyn Files) -> Result<Self, OpenError> {
        Self::open_deep(path, None, files)
    }

    fn open_deep(path: &Path, base: Option<Base>, files: &dyn Files) -> Result<Self, OpenError> {
        let depth = base.as_ref().map_or(0, |base| base.depth);
        if depth >= DEEPEST {
            return Err(OpenError::TooDeep { path: path.to_owned(), limit: DEEPEST });
        }
        let source = open(path, files)?;
        // What another image says is raw is raw, whatever it begins with: its guest wrote that.
        let is_raw = base.as_ref().is_some_and(|base| base.format == Some("raw"));
        let format = if is_raw { Format::Raw } else { magic::format(&*source, path)? };
        if let Some(Base { of, format: None, .. }) = base
            && format != Format::Raw
        {
            return Err(OpenError::NoFormat { path: path.to_owned(), format, of: of.to_owned() });
        }
        let failed = |source| OpenError::Tables { path: path.to_owned(), format, source };
        let mut backing = None;
        let layer: Box<dyn Layer> = match format {
            Format::Raw => Box::new(Raw::open(source).map_err(failed)?),
            Format::Vdi => Box::new(Vdi::open(source, path)?),
            Format::Vmdk => Box::new(Vmdk::open(source, path)?),
            Format::Vhdx => Box::new(Vhdx::open(source, path)?),
            Format::Qcow2 => {
                let mut image = Qcow2::open(source, path)?;
                refuse_named(image.linked(), path, files)?;
                if let Some(name) = &image.linked().data {
                    let data = open(&beside(path, name), files)?;
                    image.with_data(data);
                }
                let Linked { backing: name, backing_format, .. } = image.linked();
                if let Some(name) = name {
                    let base = Base { of: path, format: backing_format.as_deref(), depth: depth + 1 };
                    backing = Some(Box::new(Self::open_deep(&beside(path, name), Some(base), files)?));
                }
                Box::new(image)
            }
        };
        Ok(Self { layer, backing, unpacked: Vec::new(), which: None, packed: Vec::new(), given: 0 })
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.layer.format()
    }

    /// Length of its disk in bytes: a positive number, 64 TiB at most, and not always whole sectors.
    pub fn bytes(&self) -> u64 {
        self.layer.bytes()
    }

    /// What an operator should know of it.
    pub fn notes(&self) -> Vec<Note> {
        let mut notes = self.layer.notes();
        let below = self.backing.iter().flat_map(|below| below.notes());
        notes.extend(below.filter(|note| matches!(note, Note::NotClosed)));
        notes.dedup();
        notes
    }

    /// Reads the disk at `at`, which is within it: zeroes to a place that may be far away, or data into the beginning of
    /// `buffer`. Call it with rising `at`; a call with 0 begins anew.
    ///
    /// # Errors
    /// Of the file system, or the image is damaged.
    pub fn read(&mut self, at: u64, buffer: &mut [u8]) -> Result<Span, ReadError> {
        if at == 0 {
            self.begin_anew();
        }
        let rest = self.bytes() - at;
        let (place, length) = self.layer.place(at)?;
        let length = length.min(rest);
        let part = length.min(buffer.len() as u64) as usize;
        match place {
            Place::Zero => Ok(Span::Zero(length)),
            Place::Absent => self.below(at, length, buffer),
            Place::Stored(offset) => {
                crate::source::read(self.layer.data(), &mut buffer[..part], offset)?;
                self.give(part as u64)?;
                Ok(Span::Data(part))
            }
            Place::Packed(packed) => {
                self.unpack(packed)?;
                let bytes = &self.unpacked[packed.within..];
                let part = part.min(bytes.len());
                buffer[..part].copy_from_slice(&bytes[..part]);
                Ok(Span::Data(part))
            }
        }
    }

    fn begin_anew(&mut self) {
        self.given = 0;
        self.layer.begin_anew();
        if let Some(below) = &mut self.backing {
            below.begin_anew();
        }
    }

    /// What the image has that this one is based on.
    fn below(&mut self, at: u64, length: u64, buffer: &mut [u8]) -> Result<Span, ReadError> {
        let Some(below) = self.backing.as_mut().filter(|below| at < below.bytes()) else {
            return Ok(Span::Zero(length));
        };
        let part = length.min(buffer.len() as u64) as usize;
        Ok(match below.read(at, &mut buffer[..part])? {
            Span::Zero(zeroes) => Span::Zero(zeroes.min(length)),
            data => data,
        })
    }

    fn unpack(&mut self, packed: Packed) -> Result<(), ReadError> {
        let which = Packed { within: 0, ..packed };
        if self.which == Some(which) {
            return Ok(());
        }
        self.which = None;
        let source = self.layer.data();
        // The last sector of a file need not be whole.
        let length = (packed.length as u64).min(source.bytes().saturating_sub(packed.offset)) as usize;
        self.packed.resize(length, 0);
        crate::source::read(source, &mut self.packed, packed.offset)?;
        self.unpacked.resize(packed.unpacked, 0);
        let stream = crate::packed::unpack(packed.codec, &self.packed, &mut self.unpacked)?;
        self.give(stream as u64)?;
        self.which = Some(which);
        Ok(())
    }

    /// A file gives each of its bytes once. So no table can make more of a file than it has room for.
    fn give(&mut self, bytes: u64) -> Result<(), ReadError> {
        self.given += bytes;
        if self.given > self.layer.data().bytes() { Err(ReadError::Twice) } else { Ok(()) }
    }
}

/// An image that another one is based on.
struct Base<'a> {
    /// The other one.
    of: &'a Path,
    /// Its format, if the other one says that.
    format: Option<&'a str>,
    /// How many are above it.
    depth: usize,
}

fn open(path: &Path, files: &dyn Files) -> Result<Box<dyn Source>, OpenError> {
    files.open(path).map_err(|source| OpenError::Io { path: path.to_owned(), source })
}

/// Refuses to open what an image names, if nobody has allowed it.
fn refuse_named(linked: &Linked, path: &Path, files: &dyn Files) -> Result<(), OpenError> {
    let named = [
        ("a file that has its data", linked.data.as_ref()),
        ("an image that it is based on", linked.backing.as_ref()),
    ];
    for (what, name) in named {
        let Some(name) = name else { continue };
        let named = || name.chars().take(200).collect::<String>();
        if !files.may_be_named() {
            return Err(OpenError::NamesAnother { path: path.to_owned(), what, named: named() });
        }
        if !is_path(name) {
            let what = format!("names {what}, {:?}, which is no path", named());
            return Err(OpenError::NotRead { path: path.to_owned(), format: "qcow2", what });
        }
    }
    Ok(())
}

/// Whether a name is a path. QEMU also reads `json:...`, `nbd://...` and the like.
fn is_path(name: &str) -> bool {
    let first = Path::new(name).components().next();
    !name.is_empty()
        && !matches!(first, Some(Component::Normal(part)) if part.as_encoded_bytes().contains(&b':'))
}

/// A name in an image begins where the image is.
fn beside(path: &Path, name: &str) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).join(name)
}
