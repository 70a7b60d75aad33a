//! A disk as it is.

use crate::Format;
use crate::error::ReadError;
use crate::layer::{Layer, Place, disk_bytes};
use crate::source::Source;

/// How many bytes are promised at a time: a hole may begin behind them.
const STEP: u64 = 1 << 20;

pub(crate) struct Raw(Box<dyn Source>);

impl Raw {
    pub(crate) fn open(source: Box<dyn Source>) -> Result<Self, ReadError> {
        disk_bytes(source.bytes())?;
        Ok(Self(source))
    }
}

impl Layer for Raw {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn bytes(&self) -> u64 {
        self.0.bytes()
    }

    fn place(&mut self, at: u64) -> Result<(Place, u64), ReadError> {
        let bytes = self.bytes();
        match self.0.next_data(at)?.filter(|data| *data < bytes) {
            None => Ok((Place::Zero, bytes - at)),
            Some(data) if data > at => Ok((Place::Zero, data - at)),
            Some(_) => Ok((Place::Stored(at), STEP.min(bytes - at))),
        }
    }

    fn data(&self) -> &dyn Source {
        &*self.0
    }
}
