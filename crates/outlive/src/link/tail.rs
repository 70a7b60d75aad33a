//! The frame tail on its way to the standby: copies of frames that no checkpoint has.
//!
//! The sender writes input as it comes, between the pieces of a checkpoint too; output goes in front of the end of
//! its checkpoint. So when the standby has acknowledged a checkpoint, it has all copies of what that lets out.

use std::sync::Arc;

use outlive_epoch::{EncodeError, Encoder, TailBuf, TailFrame};
use outlive_machine::{InputTail, Output, PER_EPOCH, Started};

/// Most bytes of frames of one section.
const SECTION: usize = 64 << 10;

/// Where the copies come from: the network card of the VM.
#[derive(Clone)]
pub(crate) struct FrameTail {
    /// What the guest is given.
    pub(crate) input: Arc<InputTail>,
    /// What it sends.
    pub(crate) output: Arc<Output>,
}

/// The tail of one link. Dropping it ends the copying.
pub(super) struct Writing {
    from: FrameTail,
    started: Started,
    /// Frames of the next section.
    frames: TailBuf,
    /// The frame in hand.
    packet: Vec<u8>,
    /// Through which epoch the standby was last told that output has left.
    told: u64,
}

impl Writing {
    /// Begins to copy what the guest is given; `tell` is called when there is some.
    pub(super) fn start(from: FrameTail, tell: impl Fn() + Send + Sync + 'static) -> Self {
        let started = from.input.start(Arc::new(tell));
        Self { from, started, frames: TailBuf::default(), packet: Vec::new(), told: 0 }
    }

    /// Appends what the guest was given since the last call.
    pub(super) fn put_input(&mut self, encoder: &mut Encoder, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        while let Some((epoch, pair)) = self.from.input.take(&mut self.packet) {
            if !self.frames.is_empty() && self.frames.len() + self.packet.len() > SECTION {
                encoder.input(out, &self.frames)?;
                self.frames.clear();
            }
            // A section without frames has room for any.
            let _ = self.frames.push(TailFrame { epoch, pair, packet: &self.packet });
        }
        if !self.frames.is_empty() {
            encoder.input(out, &self.frames)?;
            self.frames.clear();
        }
        Ok(())
    }

    /// Appends the first frames that the guest has sent in this epoch, whose checkpoint is about to end.
    pub(super) fn put_output(
        &mut self,
        epoch: u64,
        encoder: &mut Encoder,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let (mut from, mut frames, mut bytes) = (0, 0, 0);
        while let Some((number, pair)) = self.from.output.copy_held(epoch, from, &mut self.packet) {
            from = number + 1;
            (frames, bytes) = (frames + 1, bytes + self.packet.len());
            let fits = frames <= PER_EPOCH.frames && bytes <= PER_EPOCH.bytes;
            if !(fits && self.frames.push(TailFrame { epoch, pair, packet: &self.packet })) {
                break;
            }
        }
        if !self.frames.is_empty() {
            encoder.output(out, &self.frames)?;
            self.frames.clear();
        }
        Ok(())
    }

    /// Appends through which epoch output has left, if that is news.
    pub(super) fn put_released(
        &mut self,
        encoder: &mut Encoder,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        let through = self.from.output.released_through();
        if through > self.told {
            self.told = through;
            encoder.released(out, through)?;
        }
        Ok(())
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.from.input.stop(&self.started);
    }
}
