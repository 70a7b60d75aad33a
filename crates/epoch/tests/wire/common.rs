//! Streams for the tests, made through the public interface as a sender makes them.

use outlive_epoch::{
    Ancestor, AuditRange, AuditSpan, CheckpointBegin, CheckpointFlags, ChunkRange, DeviceFlags, DeviceInfo,
    DeviceKind, DiskOp, DiskRecord, DiskSums, Encoder, Expect, GfnRange, Hello, Incoming, IncomingLimits,
    Layout, Limits, Lineage, Message, Moment, PAGE_SIZE, PageData, PageEntry, Peer, Preface, ProtocolVersion,
    ReadError, RecordBuf, SectionReader, StateBuf, StateKind, StateSection, TailBuf, TailFrame,
    UncheckedRecords, VersionRange, VmId,
};

pub(crate) const GENERATION: u64 = 3;

pub(crate) const LIMITS: IncomingLimits =
    IncomingLimits { max_pages: 600, max_state_bytes: 4096, max_state_sections: 8, max_disk_bytes: 8192 };

/// The first disk is not replicated.
pub(crate) fn disks() -> Vec<u64> {
    vec![0, 1 << 20, 100_000]
}

pub(crate) fn incoming() -> Incoming {
    Incoming::new(LIMITS, layout(), GENERATION).unwrap().with_disks(disks())
}

fn devices() -> Vec<DeviceInfo> {
    let disk = |read_only, shared, size, serial: &str| DeviceInfo {
        kind: DeviceKind::Disk,
        flags: DeviceFlags { read_only, shared, ..Default::default() },
        size,
        serial: serial.into(),
        ..DeviceInfo::new(DeviceKind::Disk, 2)
    };
    vec![
        DeviceInfo::new(DeviceKind::Net, 1),
        disk(true, false, 1 << 30, ""),
        disk(false, false, 1 << 20, "root"),
        disk(false, true, 100_000, "twenty-bytes-serial-"),
        DeviceInfo::new(DeviceKind::Rng, 1),
        DeviceInfo::new(DeviceKind::Console, 2),
        DeviceInfo::new(DeviceKind::Serial, 0),
    ]
}

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
        limits: Limits { max_pages: 600, max_state_bytes: 4096, slots: 2, max_disk_bytes: 8192 },
        firmware_bytes: 4 << 20,
        devices: devices(),
        interval_us: 1000,
        dead_after_us: 500_000,
        name: "golden".into(),
        host: "host-a".into(),
        tracker: "ring".into(),
        vendor: "GenuineIntel kvm_pvm".into(),
        arbiter: "0123456789abcdef0123456789abcdef".into(),
        lineage: Lineage::new([Ancestor { vm: VmId([7; 16]), through: 12 }]),
        versions: VersionRange::CURRENT,
        microcode: 0,
        vcpu: None,
        since: None,
    }
}

/// A page whose content depends on its GFN; every fifth is zero.
pub(crate) fn page(gfn: u64) -> Option<Vec<u8>> {
    (!gfn.is_multiple_of(5)).then(|| (0..PAGE_SIZE).map(|at| (gfn as usize * 7 + at / 3) as u8).collect())
}

/// The first and the last granule of a page.
pub(crate) fn granules() -> Vec<u8> {
    let mask = 1u64 | 1 << 63;
    mask.to_le_bytes().into_iter().chain((0..128u8).map(|byte| byte ^ 0x5a)).collect()
}

/// What a checkpoint consists of, for comparison.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Content {
    pub(crate) number: u64,
    pub(crate) flags: CheckpointFlags,
    /// GFN and bytes; `None` is a page of zeroes, and less than a page is a mask with its granules.
    pub(crate) pages: Vec<(u64, Option<Vec<u8>>)>,
    /// SectionKind, version, index, bytes.
    pub(crate) state: Vec<(StateKind, u16, u16, Vec<u8>)>,
    /// Records of disk writes.
    pub(crate) writes: Vec<u8>,
    /// Sums of pages.
    pub(crate) audit: Vec<AuditSpan>,
    /// Sums of chunks of disks.
    pub(crate) disk_audit: Vec<AuditRange>,
}

/// One record of each kind, on both replicated disks.
pub(crate) fn writes() -> RecordBuf {
    let data: Vec<u8> = (0..70u8).collect();
    record_buf(&[
        (1, 512, DiskOp::Data(&data)),
        (2, 99_990, DiskOp::Zero(10)),
        (1, 0, DiskOp::Flush),
        (1, (1 << 20) - 70, DiskOp::Data(&data)),
    ])
}

pub(crate) fn record_buf(records: &[(u16, u64, DiskOp<'_>)]) -> RecordBuf {
    let mut buffer = RecordBuf::with_capacity(4 << 20);
    for &(disk, offset, op) in records {
        assert!(buffer.push(DiskRecord { disk, offset, op }));
    }
    buffer
}

/// Two frames of this epoch.
pub(crate) fn tail(epoch: u64) -> TailBuf {
    let mut frames = TailBuf::default();
    for (pair, packet) in [(0, &[7; 72][..]), (1, &[8; 13])] {
        assert!(frames.push(TailFrame { epoch, pair, packet }));
    }
    frames
}

impl Content {
    pub(crate) fn new(number: u64, flags: CheckpointFlags, gfns: &[u64]) -> Self {
        Self {
            number,
            flags,
            pages: gfns.iter().map(|gfn| (*gfn, page(*gfn))).collect(),
            state: vec![
                (StateKind::Vcpu, 1, 0, vec![0x5a; 40]),
                (StateKind::Vcpu, 1, 1, vec![0xa5; 41]),
                (StateKind::Device, 2, 0, Vec::new()),
            ],
            writes: writes().records().bytes().to_vec(),
            audit: Vec::new(),
            disk_audit: Vec::new(),
        }
    }

    pub(crate) fn state_bytes(&self) -> u32 {
        self.state.iter().map(|(.., bytes)| bytes.len() as u32).sum()
    }

    /// Appends the checkpoint to a stream, with `per_section` pages in a section and a heartbeat in the
    /// middle.
    pub(crate) fn encode(&self, encoder: &mut Encoder, out: &mut Vec<u8>, per_section: usize) {
        self.encode_after(None, encoder, out, per_section);
    }

    fn state(&self) -> StateBuf {
        let mut table = StateBuf::default();
        for (kind, version, index, bytes) in &self.state {
            table.push(StateSection { kind: *kind, version: *version, index: *index, bytes });
        }
        table
    }

    /// The same after another checkpoint: only the changes of the state, if possible.
    fn encode_after(
        &self,
        before: Option<&Content>,
        encoder: &mut Encoder,
        out: &mut Vec<u8>,
        per_section: usize,
    ) {
        let begin = CheckpointBegin {
            generation: GENERATION,
            number: self.number,
            // From version 4 on this is a limit.
            pages: self.pages.len() as u32 + if encoder.stream() >= ProtocolVersion::V4 { 3 } else { 0 },
            state_bytes: self.state_bytes(),
            disk_bytes: self.writes.len() as u32,
            flags: self.flags,
        };
        encoder.checkpoint_begin(out, &begin).unwrap();
        for pages in self.pages.chunks(per_section) {
            let entries = pages.iter().map(|(gfn, bytes)| match bytes {
                Some(bytes) => match bytes.first_chunk() {
                    Some(mask) if bytes.len() < PAGE_SIZE => {
                        PageEntry::granules(*gfn, u64::from_le_bytes(*mask))
                    }
                    _ => PageEntry::raw(*gfn),
                },
                None => PageEntry::zero(*gfn),
            });
            let data: Vec<u8> =
                pages.iter().filter_map(|(_, bytes)| bytes.as_deref()).flatten().copied().collect();
            encoder.pages_head(out, entries, &data).unwrap();
            out.extend_from_slice(&data);
        }
        encoder.heartbeat(out, 77);
        if encoder.stream() >= ProtocolVersion::V6 {
            encoder.released(out, self.number - 2).unwrap();
            encoder.input(out, &tail(self.number + 1)).unwrap();
        }
        let before = before.map(Content::state).unwrap_or_default();
        let changes = encoder.state_changes(out, &before, &self.state()).unwrap();
        let rest = self.state.iter().filter(|(kind, ..)| !(changes && kind.is_kept()));
        for (kind, version, index, bytes) in rest {
            let state = StateSection { kind: *kind, version: *version, index: *index, bytes };
            encoder.state_head(out, &state).unwrap();
            out.extend_from_slice(bytes);
        }
        if !self.writes.is_empty() {
            let writes = UncheckedRecords::new(&self.writes).check(&disks()).unwrap();
            encoder.disk_writes_head(out, writes).unwrap();
            out.extend_from_slice(&self.writes);
        }
        if encoder.stream() >= ProtocolVersion::V6 {
            encoder.output(out, &tail(self.number)).unwrap();
        }
        if !self.audit.is_empty() {
            encoder.audit(out, &self.audit).unwrap();
        }
        if !self.disk_audit.is_empty() {
            encoder.disk_audit(out, &self.disk_audit).unwrap();
        }
        encoder.checkpoint_end(out, 123_456).unwrap();
    }

    pub(crate) fn of(incoming: &Incoming) -> Option<Self> {
        let checkpoint = incoming.checkpoint()?;
        let pages = checkpoint.pages().map(|(gfn, data)| match data {
            PageData::Raw(bytes) => (gfn, Some(bytes.to_vec())),
            PageData::Zero => (gfn, None),
            PageData::Granules(granules) => {
                let bytes = granules.iter().flat_map(|(_, bytes)| bytes).copied();
                (gfn, Some(granules.mask().to_le_bytes().into_iter().chain(bytes).collect()))
            }
        });
        let state = checkpoint.state().sections().map(|s| (s.kind, s.version, s.index, s.bytes.to_vec()));
        Some(Self {
            number: checkpoint.number(),
            flags: checkpoint.flags(),
            pages: pages.collect(),
            state: state.collect(),
            writes: checkpoint.disk_writes().records().bytes().to_vec(),
            audit: checkpoint.audit().to_vec(),
            disk_audit: checkpoint.disk_audit().to_vec(),
        })
    }
}

/// Why a stream was refused, in words.
pub(crate) type Refusal = String;

/// Receives a whole stream of a primary as a standby does. Returns the checkpoints that it would have
/// acknowledged, and what ended the stream (`None`: a proper end between two sections).
pub(crate) fn receive(stream: &[u8]) -> (Vec<Content>, Option<Refusal>) {
    let mut source = stream;
    let mut reader = SectionReader::new(Peer::Primary);
    let mut incoming = incoming();
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
            Message::Hello(_)
                | Message::BasePages(_)
                | Message::DiskSums(_)
                | Message::DiskBlocks { .. }
                | Message::Heartbeat { .. }
                | Message::Input(_)
                | Message::Output(_)
                | Message::Released { .. }
                | Message::Dismiss
                | Message::End(_)
        ) {
            continue;
        }
        match incoming.push(&section, &message) {
            Ok(false) => {}
            Ok(true) => {
                let content = Content::of(&incoming).unwrap();
                let state = incoming.checkpoint().unwrap().state().clone();
                incoming.reset(Expect::Number(content.number + 1));
                incoming.follow(&state).unwrap();
                done.push(content);
            }
            Err(error) => {
                assert!(incoming.checkpoint().is_none());
                return (done, Some(error.to_string()));
            }
        }
    }
}

/// A stream of one preface, Hello, base pages, two checkpoints and the end of the VM; and the two
/// checkpoints.
pub(crate) fn small_stream() -> (Vec<u8>, Vec<Content>) {
    stream_of(ProtocolVersion::CURRENT)
}

/// The same in any version, as if the standby had accepted that.
pub(crate) fn stream_of(version: ProtocolVersion) -> (Vec<u8>, Vec<Content>) {
    let base_final = CheckpointFlags { base_final: true, end: None, hand_over: false };
    let last = CheckpointFlags {
        base_final: false,
        end: Some(outlive_epoch::EndReason::PowerOff),
        hand_over: false,
    };
    let mut contents = vec![Content::new(40, base_final, &[5, 0x10_0003, 10]), Content::new(41, last, &[15])];
    if version >= ProtocolVersion::V4 {
        contents[1].pages.extend([(0x10_0003, Some(granules())), (16, Some(vec![0; 8]))]);
        contents[1].state[0].3[7] = 9;
        contents[1].state[1].3 = vec![0xa6; 12];
        contents[1].state.push((StateKind::Check, 1, 0, vec![5; 6]));
    }
    if version >= ProtocolVersion::V7 {
        contents[1].audit = vec![
            AuditSpan { first: 64, mask: 1 << 63 | 5, sum: 0x0123_4567_89ab_cdef },
            AuditSpan { first: 0x10_0000, mask: u64::MAX, sum: u64::MAX },
        ];
        let range = |disk, first, count, sum| AuditRange { chunks: ChunkRange { disk, first, count }, sum };
        contents[1].disk_audit = vec![range(1, 15, 1, 0xfedc_ba98_7654_3210), range(2, 0, 2, 0)];
    }
    let since = (version >= ProtocolVersion::V8).then_some(Moment { generation: 2, checkpoint: 39 });
    contents[1].flags.hand_over = since.is_some();
    let introduction = version.introduction();
    let mut out = Preface { version: introduction }.encode().to_vec();
    let mut encoder = Encoder::speaking(introduction);
    let versions = VersionRange { newest: version as u32, ..VersionRange::CURRENT };
    encoder.hello(&mut out, &Hello { versions, since, ..hello() }).unwrap();
    encoder.speak(version);
    let sums = [[0; 32], [0xb3; 32]];
    encoder.disk_sums(&mut out, &DiskSums { disk: 1, first: 14, count: 2, sums: Some(&sums) }).unwrap();
    encoder.disk_sums(&mut out, &DiskSums { disk: 2, first: 0, count: 2, sums: None }).unwrap();
    let block = record_buf(&[(1, 512, DiskOp::Data(&(0..70u8).collect::<Vec<_>>()))]);
    encoder.disk_blocks_head(&mut out, 1, block.records()).unwrap();
    out.extend_from_slice(block.records().bytes());
    encoder.base_pages_head(&mut out, 1, [PageEntry::zero(0), PageEntry::zero(2)].into_iter(), &[]).unwrap();
    contents[0].encode(&mut encoder, &mut out, 2);
    if version >= ProtocolVersion::V8 {
        encoder.dismiss(&mut out);
    }
    contents[1].encode_after(Some(&contents[0]), &mut encoder, &mut out, 2);
    encoder.end(&mut out, outlive_epoch::EndReason::PowerOff);
    (out, contents)
}
