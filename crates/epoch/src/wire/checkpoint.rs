//! The beginning and the end of a checkpoint.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::Encoder;
use super::end::EndReason;
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;
use super::open::{Open, Totals};

/// The first version of the beginning that may have the flag hand_over.
const WITH_HAND_OVER: u16 = 3;

/// What is special about a checkpoint. On the wire a `u32`: bit 0 base_final, bit 1 hand_over, bits
/// 8..16 the end reason or 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct CheckpointFlags {
    /// The first checkpoint: together with the base pages it makes the standby's first whole copy.
    pub base_final: bool,
    /// The last checkpoint: the VM has ended in order.
    pub end: Option<EndReason>,
    /// The VM was stopped for it and does not run on at the primary: it is being handed over to the standby. From
    /// version 8 of the stream on; in an older one nobody is told.
    pub hand_over: bool,
}

impl CheckpointFlags {
    fn to_wire(self) -> u32 {
        u32::from(self.base_final)
            | u32::from(self.hand_over) << 1
            | self.end.map_or(0, |end| (end as u32) << 8)
    }

    fn from_wire(word: u32) -> Option<Self> {
        let number = (word >> 8) as u8;
        let end = EndReason::from_wire(number);
        let known = word & !0xff03 == 0 && (number == 0 || end.is_some());
        known.then_some(Self { base_final: word & 1 != 0, end, hand_over: word & 2 != 0 })
    }
}

/// A checkpoint begins. The totals are known, because the whole checkpoint was captured before its first byte
/// is sent. Only the pages that changed are sent, and the sender finds out while it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointBegin {
    /// The generation in which the VM runs.
    pub generation: u64,
    /// The checkpoint's number.
    pub number: u64,
    /// Pages in the `Pages` sections that follow; from version 4 of the stream on, at most this many.
    pub pages: u32,
    /// Bytes in the `State` sections that follow, without their fixed fields.
    pub state_bytes: u32,
    /// Bytes in the `DiskWrites` sections that follow, without their fixed fields.
    pub disk_bytes: u32,
    /// What is special about it.
    pub flags: CheckpointFlags,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Begin {
    generation: U64,
    number: U64,
    pages: U32,
    state_bytes: U32,
    flags: U32,
    disk_bytes: U32,
}

pub(super) const BEGIN_LEN: usize = size_of::<Begin>();

impl CheckpointBegin {
    pub(super) fn parse(version: u16, payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::CheckpointBegin, payload);
        let begin: &Begin = fields.fixed()?;
        let word = begin.flags.get();
        let flags = CheckpointFlags::from_wire(word)
            .filter(|flags| !flags.hand_over || version >= WITH_HAND_OVER)
            .ok_or_else(|| fields.malformed("unknown checkpoint flags", word.into()))?;
        fields.end()?;
        Ok(Self {
            generation: begin.generation.get(),
            number: begin.number.get(),
            pages: begin.pages.get(),
            state_bytes: begin.state_bytes.get(),
            disk_bytes: begin.disk_bytes.get(),
            flags,
        })
    }
}

/// The checkpoint is complete, if everything in here is true.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointEnd {
    /// The checkpoint's number.
    pub number: u64,
    /// The primary's clock when this was written, in microseconds.
    pub stamp_us: u64,
    /// Pages that were sent.
    pub pages: u32,
    /// Bytes of state that were sent.
    pub state_bytes: u32,
    /// Bytes of disk records that were sent.
    pub disk_bytes: u32,
    /// CRC-32 over the headers (each without its own checksum) of all sections of the checkpoint before this
    /// one, heartbeats left out.
    pub chain: u32,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct End {
    number: U64,
    stamp_us: U64,
    pages: U32,
    state_bytes: U32,
    chain: U32,
    disk_bytes: U32,
}

pub(super) const END_LEN: usize = size_of::<End>();

impl CheckpointEnd {
    pub(super) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::CheckpointEnd, payload);
        let end: &End = fields.fixed()?;
        fields.end()?;
        Ok(Self {
            number: end.number.get(),
            stamp_us: end.stamp_us.get(),
            pages: end.pages.get(),
            state_bytes: end.state_bytes.get(),
            disk_bytes: end.disk_bytes.get(),
            chain: end.chain.get(),
        })
    }
}

impl Encoder {
    /// Appends [`CheckpointBegin`].
    ///
    /// # Errors
    /// [`EncodeError::Order`] if one is open already.
    pub fn checkpoint_begin(
        &mut self,
        out: &mut Vec<u8>,
        begin: &CheckpointBegin,
    ) -> Result<(), EncodeError> {
        self.outside_checkpoint("a checkpoint inside another one")?;
        let told = self.version_of(SectionKind::CheckpointBegin) >= WITH_HAND_OVER;
        let flags = CheckpointFlags { hand_over: begin.flags.hand_over && told, ..begin.flags };
        let payload = Begin {
            generation: begin.generation.into(),
            number: begin.number.into(),
            pages: begin.pages.into(),
            state_bytes: begin.state_bytes.into(),
            flags: flags.to_wire().into(),
            disk_bytes: begin.disk_bytes.into(),
        };
        let CheckpointBegin { number, pages, state_bytes, disk_bytes, .. } = *begin;
        self.open = Some(Open::new(number, Totals { pages, state_bytes, disk_bytes }));
        self.chained(out, SectionKind::CheckpointBegin, &[], |out| out.extend_from_slice(payload.as_bytes()));
        Ok(())
    }

    /// Appends [`CheckpointEnd`]. `stamp_us` is the primary's clock now.
    ///
    /// # Errors
    /// [`EncodeError::Order`]; [`EncodeError::Totals`] if the beginning announced something else (the
    /// checkpoint then stays open, and no standby will ever accept it as whole).
    pub fn checkpoint_end(&mut self, out: &mut Vec<u8>, stamp_us: u64) -> Result<(), EncodeError> {
        let stream = self.stream();
        let open = self.open("the end of a checkpoint that was not begun")?;
        open.check_totals(stream)?;
        let end = End {
            number: open.number.into(),
            stamp_us: stamp_us.into(),
            pages: open.sent.pages.into(),
            state_bytes: open.sent.state_bytes.into(),
            chain: open.chain.clone().finalize().into(),
            disk_bytes: open.sent.disk_bytes.into(),
        };
        self.open = None;
        self.section(out, SectionKind::CheckpointEnd, &[], |out| out.extend_from_slice(end.as_bytes()));
        Ok(())
    }
}
