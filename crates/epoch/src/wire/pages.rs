//! Pages of a checkpoint and of the base synchronisation.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::Encoder;
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;
use crate::codec::{EntryError, PageEntry, is_sound, with_data};
use crate::image::limits::{MAX_PAGES_PER_SECTION, MAX_PAYLOAD};
use crate::image::{PAGE_SIZE, PageData};

/// The payload begins with this; `count` entries follow, then the data of the entries in their order.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    tag: U64,
    count: U32,
    data_len: U32,
}

const _: () =
    assert!(MAX_PAYLOAD == size_of::<Head>() + MAX_PAGES_PER_SECTION * (size_of::<U64>() + PAGE_SIZE));

/// The checked payload of a `Pages` or `BasePages` section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages<'a> {
    /// The checkpoint's number, or the round of the base synchronisation.
    pub tag: u64,
    version: u16,
    entries: &'a [U64],
    data: &'a [u8],
}

impl<'a> Pages<'a> {
    /// Checks a payload: the count, the codecs, and that there are exactly as many bytes as the entries need.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn parse(kind: SectionKind, version: u16, payload: &'a [u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(kind, payload);
        let head: &Head = fields.fixed()?;
        let count = head.count.get() as usize;
        if count > MAX_PAGES_PER_SECTION {
            return Err(fields.malformed("more pages than a section may have", count as u64));
        }
        let entries: &[U64] = fields.row(count)?;
        let mut needed = 0;
        for word in entries {
            let entry = PageEntry::from_wire(version, word.get()).map_err(|error| match error {
                EntryError::Codec(number) => fields
                    .malformed("a page is written by a codec that this release does not know", number.into()),
                EntryError::Length(length) => fields
                    .malformed("a page has data of a length that its codec does not write", length.into()),
                EntryError::Gfn(gfn) => fields.malformed("a page of an impossible frame", gfn),
            })?;
            needed += entry.data_len();
        }
        let data_len = head.data_len.get();
        if needed != data_len as usize {
            return Err(
                fields.malformed("the entries do not add up to the data's length", u64::from(data_len))
            );
        }
        let data = fields.bytes(needed)?;
        let mut rest = data;
        for word in entries {
            let Ok(entry) = PageEntry::from_wire(version, word.get()) else { continue };
            let (of_page, behind) = rest.split_at(entry.data_len());
            if !is_sound(entry, of_page) {
                return Err(fields.malformed("the mask and the granules of a page do not fit", entry.gfn()));
            }
            rest = behind;
        }
        fields.end()?;
        Ok(Self { tag: head.tag.get(), version, entries, data })
    }

    /// Number of pages.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether the section has no page.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The entries in order.
    pub fn entries(&self) -> impl Iterator<Item = PageEntry> + 'a {
        // `parse` has checked them: none is left out.
        let version = self.version;
        self.entries.iter().filter_map(move |word| PageEntry::from_wire(version, word.get()).ok())
    }

    /// The data of all entries, one after another.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// Every page with its content.
    pub fn iter(&self) -> impl Iterator<Item = (u64, PageData<'a>)> + 'a {
        with_data(self.entries(), self.data)
    }
}

fn put(
    out: &mut Vec<u8>,
    version: u16,
    tag: u64,
    entries: impl ExactSizeIterator<Item = PageEntry>,
    data: &[u8],
) {
    let (count, data_len) = (entries.len() as u32, data.len() as u32);
    let head = Head { tag: tag.into(), count: count.into(), data_len: data_len.into() };
    out.extend_from_slice(head.as_bytes());
    for entry in entries {
        out.extend_from_slice(U64::new(entry.to_wire(version)).as_bytes());
    }
}

fn check(
    (kind, version): (SectionKind, u16),
    entries: impl ExactSizeIterator<Item = PageEntry> + Clone,
    data: &[u8],
) -> Result<(), EncodeError> {
    if let Some(codec) = entries.clone().map(PageEntry::codec).find(|it| !it.is_in(version)) {
        return Err(EncodeError::Codec { codec, kind, version });
    }
    if entries.len() > MAX_PAGES_PER_SECTION {
        return Err(EncodeError::TooManyPages(entries.len()));
    }
    let expected = entries.map(PageEntry::data_len).sum();
    if expected != data.len() {
        return Err(EncodeError::DataLength { expected, found: data.len() });
    }
    Ok(())
}

impl Encoder {
    /// Appends the head of a `BasePages` section; `data` (the data of the entries, in order) must follow it.
    ///
    /// # Errors
    /// [`EncodeError::TooManyPages`], [`EncodeError::Codec`], [`EncodeError::DataLength`],
    /// [`EncodeError::Order`] inside a checkpoint.
    pub fn base_pages_head(
        &mut self,
        out: &mut Vec<u8>,
        round: u64,
        entries: impl ExactSizeIterator<Item = PageEntry> + Clone,
        data: &[u8],
    ) -> Result<(), EncodeError> {
        self.outside_checkpoint("base pages inside a checkpoint")?;
        let version = self.version_of(SectionKind::BasePages);
        check((SectionKind::BasePages, version), entries.clone(), data)?;
        self.section(out, SectionKind::BasePages, data, |out| put(out, version, round, entries, data));
        Ok(())
    }

    /// Appends the head of a `Pages` section of the open checkpoint; `data` (the data of the entries, in
    /// order) must follow it. For pages that are all raw: `gfns.iter().map(|gfn| PageEntry::raw(*gfn))`.
    ///
    /// # Errors
    /// [`EncodeError::TooManyPages`], [`EncodeError::Codec`], [`EncodeError::DataLength`],
    /// [`EncodeError::Order`].
    pub fn pages_head(
        &mut self,
        out: &mut Vec<u8>,
        entries: impl ExactSizeIterator<Item = PageEntry> + Clone,
        data: &[u8],
    ) -> Result<(), EncodeError> {
        let version = self.version_of(SectionKind::Pages);
        check((SectionKind::Pages, version), entries.clone(), data)?;
        let number = self.open("pages outside a checkpoint")?.add_pages(entries.len());
        self.chained(out, SectionKind::Pages, data, |out| put(out, version, number, entries, data));
        Ok(())
    }
}
