//! Sums of pages that the standby compares with its copy, and what comes of it. From version 7 of the stream on.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::{Encoder, check_length};
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;
use crate::image::limits::MAX_AUDIT_SPANS;

/// The checkpoint's number, in front of the spans.
type Head = U64;

pub(super) const HEAD_LEN: usize = size_of::<Head>();

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Span {
    first: U64,
    mask: U64,
    sum: U64,
}

pub(super) const SPAN_LEN: usize = size_of::<Span>();

/// Some of 64 pages, and the sum of their hashes. A hash depends on the page's number; that of a page of zeroes
/// is 0. How the others are computed is agreed on by the version of the stream: xxh3 (64 bits) of the page, with
/// the number of its frame as the seed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AuditSpan {
    /// The first of the 64 pages, a multiple of 64.
    pub first: u64,
    /// Which of them: bit 0 is the first. At least one.
    pub mask: u64,
    /// The wrapping sum of their hashes.
    pub sum: u64,
}

impl AuditSpan {
    /// How many pages a span has room for.
    pub const PAGES: u64 = 64;

    /// The numbers of the pages.
    pub fn gfns(&self) -> impl Iterator<Item = u64> + use<> {
        let Self { first, mask, .. } = *self;
        (0..Self::PAGES).filter(move |at| mask >> at & 1 == 1).map(move |at| first + at)
    }
}

/// Sums of pages as they are at the open checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Audit<'a> {
    /// The checkpoint's number.
    pub checkpoint: u64,
    spans: &'a [[u8; SPAN_LEN]],
}

impl<'a> Audit<'a> {
    pub(super) fn parse(payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::Audit, payload);
        let head: &Head = fields.fixed()?;
        let count = fields.len() / SPAN_LEN;
        if count > MAX_AUDIT_SPANS {
            return Err(fields.malformed("more spans than a section may have", count as u64));
        }
        let audit = Self { checkpoint: head.get(), spans: fields.row(count)? };
        for AuditSpan { first, mask, .. } in audit.spans() {
            if !first.is_multiple_of(AuditSpan::PAGES) || first > u64::MAX - AuditSpan::PAGES {
                return Err(fields.malformed("a span that begins at no multiple of 64", first));
            }
            if mask == 0 {
                return Err(fields.malformed("a span without pages", first));
            }
        }
        fields.end()?;
        Ok(audit)
    }

    /// The spans.
    pub fn spans(&self) -> impl Iterator<Item = AuditSpan> + use<'a> {
        self.spans.iter().map(|bytes| {
            let Span { first, mask, sum } = zerocopy::transmute_ref!(bytes);
            AuditSpan { first: first.get(), mask: mask.get(), sum: sum.get() }
        })
    }
}

/// What the standby has compared since the base, and what differs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Audited {
    /// The newest checkpoint of which pages were compared.
    pub checkpoint: u64,
    /// How many pages were compared.
    pub pages: u64,
    /// How long that took a processor of the standby, in nanoseconds.
    pub spent_ns: u64,
    /// The pages of which at least one differs: the first of 64, and which of them. `None`: all are the VM's.
    pub differs: Option<(u64, u64)>,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Report {
    checkpoint: U64,
    pages: U64,
    spent_ns: U64,
    first: U64,
    /// 0: nothing differs.
    mask: U64,
}

pub(super) const REPORT_LEN: usize = size_of::<Report>();

impl Audited {
    pub(super) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::Audited, payload);
        let Report { checkpoint, pages, spent_ns, first, mask } = fields.fixed()?;
        fields.end()?;
        let differs = (mask.get() != 0).then(|| (first.get(), mask.get()));
        Ok(Self { checkpoint: checkpoint.get(), pages: pages.get(), spent_ns: spent_ns.get(), differs })
    }
}

impl Encoder {
    /// Appends the sums of the open checkpoint; at most one such section belongs to a checkpoint.
    ///
    /// # Errors
    /// [`EncodeError::TooLong`], [`EncodeError::Order`] outside a checkpoint and in an older stream.
    pub fn audit(&mut self, out: &mut Vec<u8>, spans: &[AuditSpan]) -> Result<(), EncodeError> {
        if self.version_of(SectionKind::Audit) == 0 {
            return Err(EncodeError::Order("an audit in a stream that has none"));
        }
        check_length("the spans of an audit", spans.len(), MAX_AUDIT_SPANS)?;
        let number = Head::new(self.open("an audit outside a checkpoint")?.number);
        self.chained(out, SectionKind::Audit, &[], |out| {
            out.extend_from_slice(number.as_bytes());
            for &AuditSpan { first, mask, sum } in spans {
                let span = Span { first: first.into(), mask: mask.into(), sum: sum.into() };
                out.extend_from_slice(span.as_bytes());
            }
        });
        Ok(())
    }

    /// Appends what the standby has compared.
    ///
    /// # Errors
    /// [`EncodeError::Order`] in an older stream.
    pub fn audited(&mut self, out: &mut Vec<u8>, audited: &Audited) -> Result<(), EncodeError> {
        if self.version_of(SectionKind::Audited) == 0 {
            return Err(EncodeError::Order("the result of an audit in a stream that has none"));
        }
        let Audited { checkpoint, pages, spent_ns, differs } = *audited;
        let (first, mask) = differs.unwrap_or_default();
        let report = Report {
            checkpoint: checkpoint.into(),
            pages: pages.into(),
            spent_ns: spent_ns.into(),
            first: first.into(),
            mask: mask.into(),
        };
        self.section(out, SectionKind::Audited, &[], |out| out.extend_from_slice(report.as_bytes()));
        Ok(())
    }
}
