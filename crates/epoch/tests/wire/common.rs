//! Streams for the tests, made through the public interface as a sender makes them.

use outlive_epoch::{
    CheckpointBegin, CheckpointFlags, Encoder, Expect, GfnRange, Hello, Layout, Limits, Message, PAGE_SIZE,
    PageData, PageEntry, Peer, Preface, ReadError, SectionReader, Staging, StagingLimits, StateRef, VmId,
};

pub(crate) const GENERATION: u64 = 3;

pub(crate) const LIMITS: StagingLimits =
    StagingLimits { max_pages: 600, max_state_bytes: 4096, max_state_sections: 8 };

pub(crate) fn layout() -> Layout {
    Layout::new(vec![GfnRange { start: 0, pages: 1000 }, GfnRange { start: 0x10_0000, pages: 1000 }]).unwrap()
}

pub(crate) fn hello() -> Hello {
    Hello {
        vm: VmId(*b"0123456789abcdef"),
        generation: GENERATION,
        vcpus: 2,
        memory_bytes: 2000 * PAGE_SIZE as u64,
        layout: layout(),
        mac: Some([2, 0, 0, 0, 0, 9]),
        limits: Limits { max_pages: 600, max_state_bytes: 4096, slots: 2 },
        interval_us: 1000,
        dead_after_us: 500_000,
        name: "golden".into(),
        host: "host-a".into(),
        tracker: "ring".into(),
        vendor: "GenuineIntel kvm_pvm".into(),
    }
}

/// A page with a content that its GFN tells; every fifth is zero.
pub(crate) fn page(gfn: u64) -> Option<Vec<u8>> {
    (!gfn.is_multiple_of(5)).then(|| (0..PAGE_SIZE).map(|at| (gfn as usize * 7 + at / 3) as u8).collect())
}

/// What a checkpoint consists of, for comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) number: u64,
    pub(crate) flags: CheckpointFlags,
    /// GFN and bytes; `None` is a page of zeroes.
    pub(crate) pages: Vec<(u64, Option<Vec<u8>>)>,
    /// Kind, version, index, bytes.
    pub(crate) state: Vec<(u16, u16, u16, Vec<u8>)>,
}

impl Content {
    pub(crate) fn new(number: u64, flags: CheckpointFlags, gfns: &[u64]) -> Self {
        Self {
            number,
            flags,
            pages: gfns.iter().map(|gfn| (*gfn, page(*gfn))).collect(),
            state: vec![(1, 1, 0, vec![0x5a; 40]), (1, 1, 1, vec![0xa5; 41]), (9, 2, 0, Vec::new())],
        }
    }

    pub(crate) fn state_bytes(&self) -> u32 {
        self.state.iter().map(|(.., bytes)| bytes.len() as u32).sum()
    }

    /// Appends the checkpoint to a stream, `per_section` pages in a section, a heartbeat in the middle.
    pub(crate) fn encode(&self, encoder: &mut Encoder, out: &mut Vec<u8>, per_section: usize) {
        let begin = CheckpointBegin {
            generation: GENERATION,
            number: self.number,
            pages: self.pages.len() as u32,
            state_bytes: self.state_bytes(),
            flags: self.flags,
        };
        encoder.checkpoint_begin(out, &begin).unwrap();
        for pages in self.pages.chunks(per_section) {
            let entries = pages.iter().map(|(gfn, bytes)| match bytes {
                Some(_) => PageEntry::raw(*gfn),
                None => PageEntry::zero(*gfn),
            });
            let data: Vec<u8> =
                pages.iter().filter_map(|(_, bytes)| bytes.as_deref()).flatten().copied().collect();
            encoder.pages_head(out, entries, &data).unwrap();
            out.extend_from_slice(&data);
        }
        encoder.heartbeat(out, 77);
        for (kind, version, index, bytes) in &self.state {
            let state = StateRef { kind: *kind, version: *version, index: *index, bytes };
            encoder.state_head(out, &state).unwrap();
            out.extend_from_slice(bytes);
        }
        encoder.checkpoint_end(out, 123_456).unwrap();
    }

    pub(crate) fn of(staging: &Staging) -> Option<Self> {
        let checkpoint = staging.checkpoint()?;
        let pages = checkpoint.pages().map(|(gfn, data)| match data {
            PageData::Raw(bytes) => (gfn, Some(bytes.to_vec())),
            PageData::Zero => (gfn, None),
        });
        let state = checkpoint.state().map(|s| (s.kind, s.version, s.index, s.bytes.to_vec()));
        Some(Self {
            number: checkpoint.number(),
            flags: checkpoint.flags(),
            pages: pages.collect(),
            state: state.collect(),
        })
    }
}

/// Why a stream was refused, in words.
pub(crate) type Refusal = String;

/// Receives a whole stream of a primary the way a standby does, and returns the checkpoints that it would have
/// acknowledged, and what ended the stream (`None`: a proper end between two sections).
pub(crate) fn receive(stream: &[u8]) -> (Vec<Content>, Option<Refusal>) {
    let mut source = stream;
    let mut reader = SectionReader::new(Peer::Primary);
    let mut staging = Staging::new(LIMITS, layout(), GENERATION).unwrap();
    let mut done = Vec::new();
    if let Err(error) = reader.read_preface(&mut source) {
        return (done, Some(error.to_string()));
    }
    loop {
        let section = match reader.read_section(&mut source) {
            Ok(section) => section,
            Err(ReadError::Closed) => return (done, None),
            Err(error) => return (done, Some(error.to_string())),
        };
        let message = match Message::parse(&section) {
            Ok(message) => message,
            Err(error) => return (done, Some(error.to_string())),
        };
        if matches!(
            message,
            Message::Hello(_) | Message::BasePages(_) | Message::Heartbeat { .. } | Message::End(_)
        ) {
            continue;
        }
        match staging.push(&section, &message) {
            Ok(false) => {}
            Ok(true) => {
                let content = Content::of(&staging).unwrap();
                staging.reset(Expect::Number(content.number + 1));
                done.push(content);
            }
            Err(error) => {
                assert!(staging.checkpoint().is_none());
                return (done, Some(error.to_string()));
            }
        }
    }
}

/// A stream of one preface, Hello, base pages, two checkpoints and the end of the VM; and the two checkpoints.
pub(crate) fn small_stream() -> (Vec<u8>, Vec<Content>) {
    let base_final = CheckpointFlags { base_final: true, end: None };
    let last = CheckpointFlags { base_final: false, end: Some(outlive_epoch::EndReason::PowerOff) };
    let contents = vec![Content::new(40, base_final, &[5, 0x10_0003, 10]), Content::new(41, last, &[15])];
    let mut out = Preface::CURRENT.encode().to_vec();
    let mut encoder = Encoder::new();
    encoder.hello(&mut out, &hello()).unwrap();
    encoder.base_pages_head(&mut out, 1, [PageEntry::zero(0), PageEntry::zero(2)].into_iter(), &[]).unwrap();
    contents.iter().for_each(|content| content.encode(&mut encoder, &mut out, 2));
    encoder.end(&mut out, outlive_epoch::EndReason::PowerOff);
    (out, contents)
}
