//! Reading a segment.

use std::fs::File;
use std::io;

use outlive_epoch::{
    Expect, Hello, Incoming, IncomingError, IncomingLimits, MAX_STATE_BYTES, MAX_STATE_SECTIONS, Message,
    Peer, ReadError, SectionReader, StateBuf, WireError,
};

use super::SegmentName;

/// Why a segment has no further checkpoint.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SegmentError {
    /// It ends here, or in the middle of a checkpoint; or what follows was never written or is damaged.
    #[error(transparent)]
    Ends(#[from] EndsError),
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// There is too little memory for a checkpoint.
    #[error("there is too little memory for a checkpoint of {0} bytes")]
    Memory(u64),
    /// Another release has written it.
    #[error(transparent)]
    Release(WireError),
}

/// How a segment ends.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EndsError {
    /// Behind a whole checkpoint.
    #[error("it ends")]
    Whole,
    /// In the middle of one.
    #[error("it ends in the middle of a checkpoint")]
    Torn,
    /// In bytes that nobody has written so.
    #[error("it is damaged: {0}")]
    Damaged(String),
}

/// A segment that is read from its beginning.
pub(crate) struct SegmentReader {
    file: File,
    sections: SectionReader,
    begun: bool,
    next: u64,
    incoming: Incoming,
    /// The state of the checkpoint before.
    state: StateBuf,
}

impl SegmentReader {
    /// Begins with the segment in this file.
    ///
    /// # Errors
    /// [`SegmentError::Memory`].
    pub(crate) fn open(file: File, name: SegmentName, hello: &Hello) -> Result<Self, SegmentError> {
        let limits = IncomingLimits {
            max_pages: u32::try_from(hello.layout.pages()).unwrap_or(u32::MAX),
            max_state_bytes: MAX_STATE_BYTES as u32,
            max_state_sections: MAX_STATE_SECTIONS as u32,
            max_disk_bytes: hello.limits.max_disk_bytes,
        };
        let disks = disks(hello);
        let incoming = Incoming::new(limits, hello.layout.clone(), hello.generation).map_err(not_taken)?;
        Ok(Self {
            file,
            sections: SectionReader::new(Peer::Primary),
            begun: false,
            next: name.first,
            incoming: incoming.with_disks(disks),
            state: StateBuf::default(),
        })
    }

    /// The next checkpoint, whole and checked.
    ///
    /// # Errors
    /// See [`SegmentError`]. Nothing more can be read then.
    pub(crate) fn next(&mut self) -> Result<&mut Incoming, SegmentError> {
        if !std::mem::replace(&mut self.begun, true) {
            self.sections.read_preface(&mut self.file).map_err(not_read)?;
        }
        self.incoming.reset(Expect::Number(self.next));
        self.incoming.follow(&self.state).map_err(not_taken)?;
        loop {
            let section = match self.sections.read_section(&mut self.file) {
                Ok(section) => section,
                Err(ReadError::Closed) if self.incoming.is_idle() => return Err(EndsError::Whole.into()),
                Err(error) => return Err(not_read(error)),
            };
            let message = Message::parse(&section).map_err(damaged)?;
            if self.incoming.push(&section, &message).map_err(not_taken)? {
                break;
            }
        }
        self.next += 1;
        let state = self.incoming.checkpoint().map(|it| it.state());
        if state.is_none_or(|state| self.state.try_copy_from(state).is_err()) {
            return Err(SegmentError::Memory(MAX_STATE_BYTES as u64));
        }
        Ok(&mut self.incoming)
    }
}

/// Bytes of each disk whose writes are recorded; 0 for the others.
pub(crate) fn disks(hello: &Hello) -> Vec<u64> {
    let disks = hello.devices.iter().filter(|it| it.kind == outlive_epoch::DeviceKind::Disk);
    disks.map(|it| it.replicated_bytes()).collect()
}

fn damaged(error: impl ToString) -> SegmentError {
    EndsError::Damaged(error.to_string()).into()
}

fn not_taken(error: IncomingError) -> SegmentError {
    match error {
        IncomingError::Memory { bytes } => SegmentError::Memory(bytes),
        error => damaged(error),
    }
}

fn not_read(error: ReadError) -> SegmentError {
    match error {
        ReadError::Io(error) => SegmentError::Read(error),
        ReadError::Closed | ReadError::Truncated { .. } => EndsError::Torn.into(),
        ReadError::Wire(error @ (WireError::UnknownProtocol { .. } | WireError::UnknownVersion { .. })) => {
            SegmentError::Release(error)
        }
        ReadError::Wire(error) => damaged(error),
    }
}
