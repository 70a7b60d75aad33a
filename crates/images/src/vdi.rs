//! VirtualBox's format: a header, a map of blocks, and blocks.

use std::path::Path;

use crate::Format;
use crate::bytes::{le32, le64};
use crate::error::{OpenError, ReadError};
use crate::layer::{Layer, Place, Window, disk_bytes, joined, out_of_bounds};
use crate::source::{Source, read_vec};

const HEADER: usize = 456;
/// Blocks that nobody has written, and blocks that the guest has given back.
const FREE: u32 = u32::MAX;
const DISCARDED: u32 = u32::MAX - 1;
/// Kinds of images: growing, and whole from the beginning.
const GROWS: u32 = 1;
const WHOLE: u32 = 2;
/// How many blocks are joined to one place.
const JOINED: u64 = 64;

pub(crate) struct Vdi {
    source: Box<dyn Source>,
    bytes: u64,
    block: u64,
    /// Where the blocks begin.
    data: u64,
    map: Window,
}

impl Vdi {
    pub(crate) fn open(source: Box<dyn Source>, path: &Path) -> Result<Self, OpenError> {
        let failed = |source| OpenError::Tables { path: path.to_owned(), format: Format::Vdi, source };
        let not_read = |what: String| OpenError::NotRead { path: path.to_owned(), format: "vdi", what };
        let header = read_vec(&*source, 0, HEADER).map_err(failed)?;
        let version = le32(&header, 68);
        if version != 0x0001_0001 {
            return Err(not_read(format!(
                "is in version {}.{} of its format",
                version >> 16,
                version & 0xffff
            )));
        }
        let has_parent = header[424..456].iter().any(|byte| *byte != 0);
        match le32(&header, 76) {
            GROWS | WHOLE if !has_parent => {}
            GROWS | WHOLE | 4 => {
                return Err(not_read(
                    "has only what differs from another image (it is of a snapshot)".into(),
                ));
            }
            kind => return Err(not_read(format!("is of a kind with the number {kind}"))),
        }
        Self::with(source, &header).map_err(failed)
    }

    fn with(source: Box<dyn Source>, header: &[u8]) -> Result<Self, ReadError> {
        let bytes = disk_bytes(le64(header, 368))?;
        let (block, extra, blocks) = (u64::from(le32(header, 376)), le32(header, 380), le32(header, 384));
        let is_usual = block.is_power_of_two() && (4096..=256 << 20).contains(&block) && extra == 0;
        if !is_usual {
            return Err(ReadError::Damaged(format!("it has blocks of {block} bytes and {extra} more")));
        }
        if bytes.div_ceil(block) > u64::from(blocks) {
            return Err(ReadError::damaged("its map is smaller than its disk"));
        }
        let (map, data) = (Window::new(le32(header, 340).into()), le32(header, 344).into());
        Ok(Self { source, bytes, block, data, map })
    }
}

impl Layer for Vdi {
    fn format(&self) -> Format {
        Format::Vdi
    }

    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn place(&mut self, at: u64) -> Result<(Place, u64), ReadError> {
        let Self { source, bytes, block, data, map } = self;
        let limit = JOINED.min(bytes.div_ceil(*block) - at / *block);
        joined(at, *block, limit, |index| {
            Ok(match u32::from_le_bytes(map.entry(&**source, index)?) {
                FREE | DISCARDED => Place::Zero,
                number => {
                    let offset = u64::from(number).checked_mul(*block).and_then(|it| it.checked_add(*data));
                    Place::Stored(offset.ok_or_else(out_of_bounds)?)
                }
            })
        })
    }

    fn data(&self) -> &dyn Source {
        &*self.source
    }
}
