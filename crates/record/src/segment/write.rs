//! Writing a segment.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use outlive_epoch::{
    CheckpointBegin, CheckpointFlags, EncodeError, Encoder, MAX_PAGES_PER_SECTION, MAX_RECORD_BYTES, Preface,
    ProtocolVersion, StateBuf, StateSection,
};

use super::SegmentName;
use crate::frame::Frame;
use crate::places::create;

/// What is written in one system call, if checkpoints are small.
const BUFFER: usize = 256 << 10;

/// A segment that is being written.
pub(crate) struct SegmentWriter {
    file: BufWriter<File>,
    encoder: Encoder,
    /// What stands in front of the bytes that are not copied.
    heads: Vec<u8>,
    /// The state of the checkpoint before; empty before the first one.
    state: StateBuf,
    /// Bytes that were written.
    bytes: u64,
}

impl SegmentWriter {
    /// Makes a segment in the directory `run` that begins with this frame, and writes that.
    ///
    /// # Errors
    /// The operating system's. A file that is there already is one of them.
    pub(crate) fn begin(run: &Path, frame: &Frame, constants: &StateBuf) -> io::Result<Self> {
        let name = SegmentName { first: frame.number, time_us: frame.time_us };
        let file = create(&name.path(run))?;
        let mut segment = Self {
            file: BufWriter::with_capacity(BUFFER, file),
            encoder: Encoder::speaking(ProtocolVersion::CURRENT),
            heads: Vec::new(),
            state: StateBuf::default(),
            bytes: 0,
        };
        segment.put(&Preface { version: ProtocolVersion::INTRODUCTION }.encode())?;
        segment.checkpoint(frame, constants)?;
        Ok(segment)
    }

    /// Bytes that were written so far.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Writes the next checkpoint.
    ///
    /// # Errors
    /// The operating system's. The segment is good up to the checkpoint before, and can take no other.
    pub(crate) fn push(&mut self, frame: &Frame) -> io::Result<()> {
        self.checkpoint(frame, &StateBuf::default())
    }

    /// Hands everything to the operating system.
    ///
    /// # Errors
    /// Its errors.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }

    /// Makes everything durable.
    ///
    /// # Errors
    /// The operating system's.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.file.flush()?;
        self.file.get_ref().sync_data()
    }

    fn checkpoint(&mut self, frame: &Frame, constants: &StateBuf) -> io::Result<()> {
        let Frame { generation, number, time_us, .. } = *frame;
        let begin = CheckpointBegin {
            generation,
            number,
            pages: frame.entries.len() as u32,
            state_bytes: (frame.state.len() + frame.hashes.len() + constants.len()) as u32,
            disk_bytes: frame.writes.len() as u32,
            flags: CheckpointFlags::default(),
        };
        self.encoder.checkpoint_begin(&mut self.heads, &begin).map_err(encoded)?;
        self.pages(frame)?;
        self.all_state(&frame.state, frame.hashes.sections().chain(constants.sections()))?;
        for records in frame.writes.sections(MAX_RECORD_BYTES) {
            self.encoder.disk_writes_head(&mut self.heads, records).map_err(encoded)?;
            self.put_behind_head(records.bytes())?;
        }
        self.encoder.checkpoint_end(&mut self.heads, time_us).map_err(encoded)?;
        self.put_behind_head(&[])
    }

    fn pages(&mut self, frame: &Frame) -> io::Result<()> {
        let mut data = &frame.data[..];
        for entries in frame.entries.chunks(MAX_PAGES_PER_SECTION) {
            let bytes = entries.iter().map(|entry| entry.data_len()).sum::<usize>();
            // An entry without its data is refused by the encoder.
            let (of_entries, rest) = data.split_at(bytes.min(data.len()));
            self.encoder.pages_head(&mut self.heads, entries.iter().copied(), of_entries).map_err(encoded)?;
            self.put_behind_head(of_entries)?;
            data = rest;
        }
        Ok(())
    }

    fn all_state<'a>(
        &mut self,
        state: &StateBuf,
        others: impl Iterator<Item = StateSection<'a>>,
    ) -> io::Result<()> {
        let changes = self.encoder.state_changes(&mut self.heads, &self.state, state).map_err(encoded)?;
        if !changes {
            for section in state.sections() {
                self.section(section)?;
            }
        }
        for section in others {
            self.section(section)?;
        }
        // Without memory for it the next state is written whole.
        if self.state.try_copy_from(state).is_err() {
            self.state.clear();
        }
        Ok(())
    }

    fn section(&mut self, section: StateSection<'_>) -> io::Result<()> {
        self.encoder.state_head(&mut self.heads, &section).map_err(encoded)?;
        self.put_behind_head(section.bytes)
    }

    /// Writes the heads, and the bytes that belong behind the last one.
    fn put_behind_head(&mut self, bytes: &[u8]) -> io::Result<()> {
        let heads = std::mem::take(&mut self.heads);
        let result = self.put(&heads).and_then(|()| self.put(bytes));
        self.heads = heads;
        self.heads.clear();
        result
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes += bytes.len() as u64;
        self.file.write_all(bytes)
    }
}

/// Everything in a frame has passed the checks of the link, so this is an error in this program.
fn encoded(error: EncodeError) -> io::Error {
    io::Error::other(error)
}
