//! Frames of the guest's network that no checkpoint has: what the guest was given since, and what it has sent and
//! may not have left. From version 6 of the stream on. Best effort: a standby may drop any of them.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::{Encoder, check_length};
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;
use crate::image::limits::{MAX_FRAMES_BYTES, MAX_PACKET_BYTES};

/// In front of each packet.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    epoch: U64,
    length: U32,
    pair: U16,
    reserved: [u8; 2],
}

const _: () = assert!(size_of::<Head>() + MAX_PACKET_BYTES <= MAX_FRAMES_BYTES);

/// A frame with its virtio-net header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TailFrame<'a> {
    /// The epoch in which the guest was given it, or has sent it: the number of the checkpoint that has this.
    pub epoch: u64,
    /// The guest's queue pair.
    pub pair: u16,
    /// At most [`MAX_PACKET_BYTES`](crate::MAX_PACKET_BYTES), and at least one byte.
    pub packet: &'a [u8],
}

/// The frames of one section, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TailFrames<'a> {
    /// Checked: nothing but heads, each with its packet.
    bytes: &'a [u8],
}

impl<'a> TailFrames<'a> {
    pub(super) fn parse(kind: SectionKind, payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(kind, payload);
        while fields.len() > 0 {
            let head: &Head = fields.fixed()?;
            let length = head.length.get() as usize;
            if !(1..=MAX_PACKET_BYTES).contains(&length) {
                return Err(fields.malformed("a packet of an impossible length", length as u64));
            }
            fields.reserved(&head.reserved)?;
            fields.bytes(length)?;
        }
        Ok(Self { bytes: payload })
    }

    /// The frames.
    pub fn iter(&self) -> impl Iterator<Item = TailFrame<'a>> + use<'a> {
        let mut rest = self.bytes;
        std::iter::from_fn(move || {
            let (head, after) = Head::ref_from_prefix(rest).ok()?;
            let (packet, after) = after.split_at_checked(head.length.get() as usize)?;
            rest = after;
            Some(TailFrame { epoch: head.epoch.get(), pair: head.pair.get(), packet })
        })
    }
}

/// Frames that are put together for one section.
#[derive(Debug, Default)]
pub struct TailBuf {
    bytes: Vec<u8>,
}

impl TailBuf {
    /// Adds a frame. Returns whether there was room; a section without frames has room for any of at most
    /// [`MAX_PACKET_BYTES`](crate::MAX_PACKET_BYTES).
    #[must_use = "a frame that found no room is for the next section"]
    pub fn push(&mut self, frame: TailFrame<'_>) -> bool {
        let TailFrame { epoch, pair, packet } = frame;
        let room = MAX_FRAMES_BYTES - self.bytes.len();
        if !(1..=MAX_PACKET_BYTES).contains(&packet.len()) || size_of::<Head>() + packet.len() > room {
            return false;
        }
        let length = (packet.len() as u32).into();
        let head = Head { epoch: epoch.into(), length, pair: pair.into(), reserved: [0; 2] };
        self.bytes.extend_from_slice(head.as_bytes());
        self.bytes.extend_from_slice(packet);
        true
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// How many bytes they have in a section.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Forgets them.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }
}

impl Encoder {
    /// Appends frames that the guest was given. It is allowed at any time after the introduction, also inside a
    /// checkpoint. From version 6 of the stream on.
    ///
    /// # Errors
    /// [`EncodeError::Order`] in an older stream.
    pub fn input(&mut self, out: &mut Vec<u8>, frames: &TailBuf) -> Result<(), EncodeError> {
        self.tail_frames(out, SectionKind::Input, frames)
    }

    /// Appends frames that the guest has sent, in front of the end of the checkpoint of their epoch. From version 6
    /// of the stream on.
    ///
    /// # Errors
    /// [`EncodeError::Order`] in an older stream.
    pub fn output(&mut self, out: &mut Vec<u8>, frames: &TailBuf) -> Result<(), EncodeError> {
        self.tail_frames(out, SectionKind::Output, frames)
    }

    fn tail_frames(
        &mut self,
        out: &mut Vec<u8>,
        kind: SectionKind,
        frames: &TailBuf,
    ) -> Result<(), EncodeError> {
        if self.version_of(kind) == 0 {
            return Err(EncodeError::Order("frames in a stream that has none"));
        }
        check_length("a section of frames", frames.len(), MAX_FRAMES_BYTES)?;
        self.section(out, kind, &[], |out| out.extend_from_slice(&frames.bytes));
        Ok(())
    }
}
