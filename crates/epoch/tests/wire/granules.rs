//! Pages of which only granules are sent, and pages that are not sent, from version 4 of the stream on.

use outlive_epoch::{
    CheckpointBegin, CheckpointFlags, EncodeError, Encoder, IncomingError, Message, PAGE_SIZE, PageCodec,
    PageEntry, PageWriter, Peer, ProtocolVersion, ReadError, SectionKind, SectionReader, WireError,
};

use crate::common::{Content, GENERATION, granules, incoming};

const BASE: CheckpointFlags = CheckpointFlags { base_final: true, end: None, hand_over: false };

fn begin(pages: u32) -> CheckpointBegin {
    CheckpointBegin { generation: GENERATION, number: 1, pages, state_bytes: 0, disk_bytes: 0, flags: BASE }
}

/// Appends a section of one page.
fn page(encoder: &mut Encoder, out: &mut Vec<u8>, entry: PageEntry, data: &[u8]) -> Result<(), EncodeError> {
    encoder.pages_head(out, [entry].into_iter(), data)?;
    out.extend_from_slice(data);
    Ok(())
}

fn current() -> (Encoder, Vec<u8>) {
    (Encoder::speaking(ProtocolVersion::CURRENT), Vec::new())
}

/// What became of a checkpoint.
fn received(stream: &[u8]) -> Result<Content, String> {
    let (mut source, mut reader) = (stream, SectionReader::new(Peer::Primary));
    let mut incoming = incoming();
    loop {
        let section = reader.read_section(&mut source).map_err(|error| error.to_string())?;
        let message = Message::parse(&section).map_err(|error| error.to_string())?;
        if incoming.push(&section, &message).map_err(|error| error.to_string())? {
            return Ok(Content::of(&incoming).unwrap());
        }
    }
}

#[test]
fn an_older_version_and_a_base_have_no_granules() {
    let entry = PageEntry::granules(1, 1 | 1 << 63);
    for version in [ProtocolVersion::V2, ProtocolVersion::V3] {
        let mut encoder = Encoder::speaking(version);
        encoder.checkpoint_begin(&mut Vec::new(), &begin(1)).unwrap();
        let error = page(&mut encoder, &mut Vec::new(), entry, &granules());
        let (kind, number) = (SectionKind::Pages, version as u16 - 1);
        assert_eq!(error, Err(EncodeError::Codec { codec: PageCodec::Granules, kind, version: number }));
        let error = encoder.checkpoint_end(&mut Vec::new(), 0);
        assert!(matches!(error, Err(EncodeError::Totals { announced: 1, sent: 0, .. })), "{error:?}");
    }
    let (mut encoder, mut out) = current();
    let error = encoder.base_pages_head(&mut out, 1, [entry].into_iter(), &granules());
    assert!(matches!(error, Err(EncodeError::Codec { .. })), "{error:?}");
    assert!(out.is_empty());
}

#[test]
fn a_side_that_agreed_on_an_older_version_refuses_granules() {
    // The oldest stream that has them begins a checkpoint as older ones do.
    let (mut encoder, mut out) = (Encoder::speaking(ProtocolVersion::V4), Vec::new());
    encoder.checkpoint_begin(&mut out, &begin(1)).unwrap();
    page(&mut encoder, &mut out, PageEntry::granules(1, 1 | 1 << 63), &granules()).unwrap();
    let (mut source, mut reader) = (&out[..], SectionReader::new(Peer::Primary));
    reader.agree(ProtocolVersion::V3);
    reader.read_section(&mut source).unwrap();
    let error = reader.read_section(&mut source).unwrap_err();
    let refused = matches!(error, ReadError::Wire(WireError::UnknownVersion { version: 3, newest: 2, .. }));
    assert!(refused, "{error}");
}

#[test]
fn a_mask_that_does_not_fit_its_granules_is_refused() {
    // The entry has room for two granules; the mask may have that many bits or not.
    for (mask, fits) in
        [(3u64, true), (1 | 1 << 40, true), (1, false), (7, false), (0, false), (u64::MAX, false)]
    {
        let (mut encoder, mut out) = current();
        encoder.checkpoint_begin(&mut out, &begin(1)).unwrap();
        let data = [&mask.to_le_bytes()[..], &[7; 128]].concat();
        page(&mut encoder, &mut out, PageEntry::granules(9, 3), &data).unwrap();
        encoder.checkpoint_end(&mut out, 0).unwrap();
        let result = received(&out).map(|content| content.pages);
        if fits {
            assert_eq!(result, Ok(vec![(9, Some(data))]));
        } else {
            let words = "section Pages: the mask and the granules of a page do not fit (0x9)";
            assert_eq!(result, Err(words.into()));
        }
    }
}

#[test]
fn fewer_pages_than_the_limit_may_come_but_all_that_the_end_says() {
    let (mut encoder, mut out) = current();
    encoder.checkpoint_begin(&mut out, &begin(3)).unwrap();
    page(&mut encoder, &mut out, PageEntry::raw(9), &[1; PAGE_SIZE]).unwrap();
    let before = out.len();
    encoder.checkpoint_end(&mut out, 0).unwrap();
    assert_eq!(received(&out).map(|content| content.pages.len()), Ok(1));

    // Sections of a checkpoint of two sections.
    let (mut other, mut two) = current();
    other.checkpoint_begin(&mut two, &begin(3)).unwrap();
    for gfn in [9, 10] {
        page(&mut other, &mut two, PageEntry::raw(gfn), &[1; PAGE_SIZE]).unwrap();
    }
    let whole = two.len();
    other.checkpoint_end(&mut two, 0).unwrap();
    let mut end = two[whole..].to_vec();
    // With number 2 in the stream, which it would have without the second page.
    end[16] = 2;
    let crc = crc32fast::hash(&end[..28]);
    end[28..32].copy_from_slice(&crc.to_le_bytes());
    let error = IncomingError::Totals { number: 1, what: "pages", expected: 2, found: 1 };
    assert_eq!(received(&[&out[..before], &end].concat()), Err(error.to_string()));

    let (mut encoder, mut out) = current();
    encoder.checkpoint_begin(&mut out, &begin(1)).unwrap();
    for gfn in [9, 10] {
        page(&mut encoder, &mut out, PageEntry::zero(gfn), &[]).unwrap();
    }
    let error = encoder.checkpoint_end(&mut out, 0);
    assert_eq!(error, Err(EncodeError::Totals { number: 1, what: "pages", announced: 1, sent: 2 }));
}

/// From a writer over the wire to a page.
#[test]
fn a_page_comes_over_the_wire_as_its_granules() {
    let mut writer = PageWriter::remembering(8, || ()).unwrap();
    let old: [u8; PAGE_SIZE] = std::array::from_fn(|at| at as u8);
    let mut new = old;
    new[1000] = 1;
    new[4095] = 1;
    writer.write(5, &mut old.clone(), 0, 0);
    let mut data = new;
    let entry = writer.write(5, &mut data, 0, 0).unwrap();
    let (mut encoder, mut out) = current();
    encoder.checkpoint_begin(&mut out, &begin(1)).unwrap();
    page(&mut encoder, &mut out, entry, &data[..entry.data_len()]).unwrap();
    encoder.checkpoint_end(&mut out, 0).unwrap();
    assert!(out.len() < 400, "{} bytes", out.len());

    let (mut source, mut reader) = (&out[..], SectionReader::new(Peer::Primary));
    let mut incoming = incoming();
    let mut whole = false;
    while let Ok(section) = reader.read_section(&mut source) {
        whole = incoming.push(&section, &Message::parse(&section).unwrap()).unwrap();
    }
    assert!(whole);
    let pages: Vec<_> = incoming.checkpoint().unwrap().pages().collect();
    let [(5, outlive_epoch::PageData::Granules(granules))] = pages[..] else { panic!("{pages:?}") };
    let mut copy = old;
    granules.apply(&mut copy);
    assert!(copy == new);
}
