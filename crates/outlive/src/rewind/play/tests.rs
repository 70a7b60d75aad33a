//! What is played is what the VM was, byte for byte.

use fastrand::Rng;
use outlive_epoch::{
    CheckpointBegin, DiskOp, DiskRecord, Encoder, Expect, GfnRange, Incoming, IncomingLimits, Message,
    PageEntry, Peer, Preface, ProtocolVersion, RecordBuf, SectionReader, StateBuf, StateSection,
};

use super::*;

const BYTES: u64 = 64 << 20;
const DISK: u64 = 1 << 20;

fn layout(ram: &Ram) -> Layout {
    let ranges = ram.slots().iter().map(|it| GfnRange { start: it.base.0, pages: it.pages }).collect();
    Layout::new(ranges).unwrap()
}

#[test]
fn memory_is_as_in_the_file_whatever_the_holes() {
    let ram = Ram::new(BYTES, 1 << 16).unwrap();
    let base = tempfile::tempfile().unwrap();
    base.set_len(BYTES).unwrap();
    let mut dice = Rng::with_seed(3);
    let mut written: Vec<u64> = (0..300).map(|_| dice.u64(0..BYTES / 4096)).collect();
    written.extend([0, BYTES / 4096 - 1]);
    for page in &written {
        base.write_all_at(&(page + 1).to_le_bytes().repeat(512), page * 4096).unwrap();
    }
    fill(&ram, &layout(&ram), &base, &|| true).unwrap();
    let mut page = [0; PAGE_SIZE];
    for (index, gfn) in ram.gfns().enumerate() {
        assert!(ram.read_page(gfn, &mut page));
        let wanted = if written.contains(&(index as u64)) { index as u64 + 1 } else { 0 };
        assert!(page[..] == wanted.to_le_bytes().repeat(512), "page {index}");
    }
    assert!(matches!(fill(&ram, &layout(&ram), &base, &|| false), Err(PlayingError::Stopped)));
}

/// A VM with a few pages, a disk and some state, all of which is known.
struct Vm {
    dice: Rng,
    layout: Layout,
    encoder: Encoder,
    reader: SectionReader,
    number: u64,
    pages: Vec<[u8; PAGE_SIZE]>,
    disk: Vec<u8>,
    state: Vec<u8>,
}

/// As many pages as it writes to.
const PAGES: usize = 20;

impl Vm {
    fn new(seed: u64, layout: Layout) -> Self {
        Self {
            dice: Rng::with_seed(seed),
            layout,
            encoder: Encoder::speaking(ProtocolVersion::CURRENT),
            reader: SectionReader::new(Peer::Primary),
            number: 0,
            pages: vec![[0; PAGE_SIZE]; PAGES],
            disk: vec![0; DISK as usize],
            state: Vec::new(),
        }
    }

    /// Runs on to its next checkpoint.
    fn next(&mut self) -> Incoming {
        self.number += 1;
        let (mut entries, mut data, dice) = (Vec::new(), Vec::new(), &mut self.dice);
        for (gfn, page) in self.pages.iter_mut().enumerate() {
            match dice.u8(0..4) {
                0 => {
                    page.fill_with(|| dice.u8(..));
                    entries.push(PageEntry::raw(gfn as u64));
                    data.extend_from_slice(page);
                }
                1 => {
                    page.fill(0);
                    entries.push(PageEntry::zero(gfn as u64));
                }
                2 => {
                    page[64..128].fill_with(|| dice.u8(..));
                    entries.push(PageEntry::granules(gfn as u64, 2));
                    data.extend_from_slice(&2_u64.to_le_bytes());
                    data.extend_from_slice(&page[64..128]);
                }
                _ => {}
            }
        }
        let mut writes = RecordBuf::with_capacity(1 << 20);
        for _ in 0..dice.usize(0..4) {
            let offset = dice.usize(0..DISK as usize / 512 - 64) * 512;
            let bytes = vec![dice.u8(..); dice.usize(1..20_000)];
            let zero = dice.bool();
            let op = if zero { DiskOp::Zero(bytes.len() as u64) } else { DiskOp::Data(&bytes) };
            assert!(writes.push(DiskRecord { disk: 0, offset: offset as u64, op }));
            self.disk[offset..offset + bytes.len()].fill(if zero { 0 } else { bytes[0] });
        }
        self.state = self.number.to_le_bytes().repeat(5);
        self.encode(&entries, &data, &writes)
    }

    fn encode(&mut self, entries: &[PageEntry], data: &[u8], writes: &RecordBuf) -> Incoming {
        let mut state = StateBuf::with_capacity(4096, 4);
        state.push(StateSection { kind: StateKind::Vcpu, version: 1, index: 0, bytes: &self.state });
        if self.number == 1 {
            state.push(StateSection { kind: StateKind::VcpuConstant, version: 1, index: 0, bytes: &[9; 70] });
        }
        let begin = CheckpointBegin {
            generation: 1,
            number: self.number,
            pages: entries.len() as u32,
            state_bytes: state.len() as u32,
            disk_bytes: writes.len() as u32,
            flags: Default::default(),
        };
        let mut out = Vec::new();
        if self.number == 1 {
            out.extend_from_slice(&Preface { version: ProtocolVersion::INTRODUCTION }.encode());
        }
        self.encoder.checkpoint_begin(&mut out, &begin).unwrap();
        if !entries.is_empty() {
            self.encoder.pages_head(&mut out, entries.iter().copied(), data).unwrap();
            out.extend_from_slice(data);
        }
        for section in state.sections() {
            self.encoder.state_head(&mut out, &section).unwrap();
            out.extend_from_slice(section.bytes);
        }
        for records in writes.sections(1 << 20) {
            self.encoder.disk_writes_head(&mut out, records).unwrap();
            out.extend_from_slice(records.bytes());
        }
        self.encoder.checkpoint_end(&mut out, self.number).unwrap();
        self.read(&out)
    }

    fn read(&mut self, mut bytes: &[u8]) -> Incoming {
        let limits = IncomingLimits {
            max_pages: 1 << 20,
            max_state_bytes: 1 << 20,
            max_state_sections: 10,
            max_disk_bytes: 8 << 20,
        };
        let incoming = Incoming::new(limits, self.layout.clone(), 1).unwrap();
        let mut incoming = incoming.with_disks(vec![DISK]);
        incoming.reset(Expect::Number(self.number));
        if self.number == 1 {
            self.reader.read_preface(&mut bytes).unwrap();
        }
        loop {
            let section = self.reader.read_section(&mut bytes).unwrap();
            let message = Message::parse(&section).unwrap();
            if incoming.push(&section, &message).unwrap() {
                return incoming;
            }
        }
    }

    /// What a copy that is at a checkpoint has of it.
    fn check(&self, moving: &Moving<'_>) {
        let mut page = [0; PAGE_SIZE];
        for (gfn, wanted) in self.pages.iter().enumerate() {
            assert!(moving.ram.read_page(Gfn(gfn as u64), &mut page));
            assert!(page == *wanted, "page {gfn} at checkpoint {}", self.number);
        }
        let mut disk = vec![0; DISK as usize];
        moving.disks[0].read_exact_at(&mut disk, 0).unwrap();
        assert!(disk == self.disk, "the disk at checkpoint {}", self.number);
        let (constants, sections) = moving.state.parts();
        assert_eq!(constants, [vec![9; 70]], "they come once");
        let of_vcpu: Vec<_> = sections.iter().map(|it| (it.kind, it.bytes)).collect();
        assert_eq!(of_vcpu, [(StateKind::Vcpu, &self.state[..])]);
    }
}

#[test]
fn at_each_checkpoint_memory_disks_and_state_are_the_vms_and_nothing_of_the_next_one() {
    for seed in 0..5 {
        let ram = Ram::new(BYTES, 1 << 16).unwrap();
        let disks = [tempfile::tempfile().unwrap()];
        disks[0].set_len(DISK).unwrap();
        let mut vm = Vm::new(seed, layout(&ram));
        let mut moving = Moving::new(&ram, &disks, 1 << 20);
        for _ in 0..60 {
            let incoming = vm.next();
            moving.follow(&incoming.checkpoint().unwrap()).unwrap();
            vm.check(&moving);
        }
    }
}
