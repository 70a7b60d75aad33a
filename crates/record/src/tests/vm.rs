//! A VM whose every checkpoint is known.

use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use outlive_epoch::{
    Checkpoint, CheckpointBegin, CheckpointFlags, DeviceInfo, DeviceKind, DiskOp, DiskRecord, Encoder,
    Expect, GfnRange, Hello, Incoming, IncomingLimits, Layout, Limits, Lineage, Message, PAGE_SIZE, PageData,
    PageEntry, Peer, Preface, ProtocolVersion, RecordBuf, SectionReader, StateBuf, StateKind, StateSection,
    VersionRange, VmId,
};

use crate::{Playback, Settled, Source};

const PAGES: u64 = 96;
/// Memory has a hole.
const RANGES: [GfnRange; 2] = [GfnRange { start: 0, pages: 32 }, GfnRange { start: 100, pages: PAGES - 32 }];
pub(super) const DISK_BYTES: u64 = 640 << 10;

pub(super) fn hello() -> Hello {
    let disk = DeviceInfo { size: DISK_BYTES, ..DeviceInfo::new(DeviceKind::Disk, 1) };
    Hello {
        vm: VmId([7; 16]),
        generation: 3,
        vcpus: 1,
        memory_bytes: PAGES * PAGE_SIZE as u64,
        layout: Layout::new(RANGES.to_vec()).unwrap(),
        firmware_bytes: 0,
        devices: vec![DeviceInfo::new(DeviceKind::Net, 2), disk],
        mac: Some([2, 0, 0, 0, 0, 1]),
        limits: Limits { max_pages: 1 << 20, max_state_bytes: 1 << 20, slots: 2, max_disk_bytes: 8 << 20 },
        interval_us: 1000,
        dead_after_us: 100_000,
        name: "vm".into(),
        host: "a".into(),
        tracker: "ring".into(),
        vendor: "x".into(),
        arbiter: String::new(),
        lineage: Lineage::default(),
        versions: VersionRange::CURRENT,
        microcode: 0,
        vcpu: None,
        since: None,
    }
}

/// What can be compared of a VM.
#[derive(Clone)]
pub(super) struct Machine {
    pub(super) number: u64,
    pub(super) memory: Vec<u8>,
    pub(super) disk: Vec<u8>,
    pub(super) state: Vec<u8>,
    pub(super) constants: Vec<u8>,
}

impl Machine {
    fn new() -> Self {
        let (memory, disk) = (vec![0; PAGES as usize * PAGE_SIZE], vec![0; DISK_BYTES as usize]);
        Self { number: 0, memory, disk, state: Vec::new(), constants: Vec::new() }
    }

    pub(super) fn of_base(playback: &Playback) -> Self {
        let mut machine = Self::new();
        playback.memory().read_exact_at(&mut machine.memory, 0).unwrap();
        playback.disk(0).unwrap().read_exact_at(&mut machine.disk, 0).unwrap();
        machine
    }

    pub(super) fn apply(&mut self, checkpoint: &Checkpoint<'_>) {
        self.number = checkpoint.number();
        self.apply_pages(checkpoint);
        for record in checkpoint.disk_writes().iter() {
            carry_out(&mut self.disk, &record);
        }
        for section in checkpoint.state().sections() {
            match section.kind {
                StateKind::VcpuConstant => self.constants = section.bytes.to_vec(),
                _ => self.state = section.bytes.to_vec(),
            }
        }
    }

    fn apply_pages(&mut self, checkpoint: &Checkpoint<'_>) {
        let layout = hello().layout;
        for (gfn, page) in checkpoint.pages() {
            let at = layout.index(gfn).unwrap() as usize * PAGE_SIZE;
            let to = &mut self.memory[at..at + PAGE_SIZE];
            match page {
                PageData::Zero => to.fill(0),
                PageData::Raw(bytes) => to.copy_from_slice(bytes),
                PageData::Granules(granules) => granules
                    .iter()
                    .for_each(|(place, bytes)| to[place..place + bytes.len()].copy_from_slice(bytes)),
            }
        }
    }
}

fn carry_out(disk: &mut [u8], record: &DiskRecord<'_>) {
    let range = record.offset as usize..record.end() as usize;
    match record.op {
        DiskOp::Data(bytes) => disk[range].copy_from_slice(bytes),
        DiskOp::Zero(_) => disk[range].fill(0),
        DiskOp::Flush => {}
    }
}

/// The standby's copy, and what it was at every checkpoint.
pub(super) struct Vm {
    random: fastrand::Rng,
    /// Memory, and the image of the disk, which is behind.
    copy: Arc<Mutex<Machine>>,
    /// What waits for the image, with its checkpoint.
    waiting: Vec<(u64, RecordBuf)>,
    /// Through which checkpoint the image has everything.
    in_image: Arc<Mutex<u64>>,
    now: Machine,
    past: HashMap<u64, Machine>,
    encoder: Encoder,
    reader: SectionReader,
    state: StateBuf,
    /// How long each read of the copy takes.
    pub(super) reads_take: Duration,
    /// The image has nothing before this checkpoint.
    pub(super) image_waits: u64,
}

impl Vm {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            random: fastrand::Rng::with_seed(seed),
            copy: Arc::new(Mutex::new(Machine::new())),
            waiting: Vec::new(),
            in_image: Arc::default(),
            now: Machine::new(),
            past: HashMap::new(),
            encoder: Encoder::speaking(ProtocolVersion::CURRENT),
            reader: SectionReader::new(Peer::Primary),
            state: StateBuf::default(),
            reads_take: Duration::from_micros(300),
            image_waits: 0,
        }
    }

    /// The next checkpoint, committed: `record` gets it first, then memory, and some time later the image.
    pub(super) fn commit(&mut self, record: impl FnOnce(&Checkpoint<'_>, &dyn Fn() -> Arc<dyn Source>)) {
        let incoming = self.checkpoint();
        let checkpoint = incoming.checkpoint().unwrap();
        self.now.apply(&checkpoint);
        self.past.insert(self.now.number, self.now.clone());
        let before = checkpoint.number() - 1;
        record(&checkpoint, &|| self.source(before));
        lock(&self.copy).apply_pages(&checkpoint);
        let mut writes = RecordBuf::default();
        writes.try_copy_from(checkpoint.disk_writes()).unwrap();
        self.waiting.push((checkpoint.number(), writes));
        if self.random.u8(..4) == 0 && checkpoint.number() >= self.image_waits {
            self.write_image();
        }
    }

    /// Writes what waits to the image.
    pub(super) fn write_image(&mut self) {
        for (number, writes) in self.waiting.drain(..) {
            let mut copy = lock(&self.copy);
            writes.iter().for_each(|record| carry_out(&mut copy.disk, &record));
            *lock(&self.in_image) = number;
        }
    }

    /// What a run begins with whose first checkpoint comes behind `before`.
    fn source(&self, before: u64) -> Arc<dyn Source> {
        let (copy, in_image) = (self.copy.clone(), self.in_image.clone());
        Arc::new(Slow { copy, in_image, before, takes: self.reads_take })
    }

    /// Panics if a machine is not what the VM was.
    pub(super) fn compare(&self, machine: &Machine) {
        let Machine { number, .. } = *machine;
        let was = &self.past[&number];
        let differ = |one: &[u8], other: &[u8]| one.iter().zip(other).position(|(one, other)| one != other);
        assert_eq!(differ(&was.memory, &machine.memory), None, "memory at {number}");
        assert_eq!(differ(&was.disk, &machine.disk), None, "disk at {number}");
        assert!(was.state == machine.state, "state at {number}");
        assert_eq!(machine.constants, [9; 100], "constants at {number}");
    }

    /// Some pages and some writes.
    fn checkpoint(&mut self) -> Incoming {
        let number = self.now.number + 1;
        let (entries, data) = self.pages();
        let writes = self.writes();
        let mut state = StateBuf::default();
        let bytes = [number.to_le_bytes(); 40].concat();
        state.push(StateSection { kind: StateKind::Vcpu, version: 1, index: 0, bytes: &bytes });
        let constant = StateSection { kind: StateKind::VcpuConstant, version: 1, index: 0, bytes: &[9; 100] };
        let base_final = number == 1;
        if base_final {
            state.push(constant);
        }
        let mut out = Vec::new();
        if base_final {
            out.extend_from_slice(&Preface { version: ProtocolVersion::INTRODUCTION }.encode());
        }
        let begin = CheckpointBegin {
            generation: 3,
            number,
            pages: entries.len() as u32,
            state_bytes: state.len() as u32,
            disk_bytes: writes.len() as u32,
            flags: CheckpointFlags { base_final, ..CheckpointFlags::default() },
        };
        self.encoder.checkpoint_begin(&mut out, &begin).unwrap();
        self.encoder.pages_head(&mut out, entries.iter().copied(), &data).unwrap();
        out.extend_from_slice(&data);
        if !self.encoder.state_changes(&mut out, &self.state, &state).unwrap() {
            for section in state.sections() {
                self.encoder.state_head(&mut out, &section).unwrap();
                out.extend_from_slice(section.bytes);
            }
        }
        for records in writes.sections(1 << 20) {
            self.encoder.disk_writes_head(&mut out, records).unwrap();
            out.extend_from_slice(records.bytes());
        }
        self.encoder.checkpoint_end(&mut out, number).unwrap();
        let incoming = self.read(&out, base_final);
        self.state.try_copy_from(&state).unwrap();
        incoming
    }

    fn read(&mut self, mut bytes: &[u8], base_final: bool) -> Incoming {
        let limits = IncomingLimits {
            max_pages: 1 << 20,
            max_state_bytes: 1 << 20,
            max_state_sections: 10,
            max_disk_bytes: 8 << 20,
        };
        let incoming = Incoming::new(limits, hello().layout, 3).unwrap();
        let mut incoming = incoming.with_disks(vec![DISK_BYTES]);
        if base_final {
            self.reader.read_preface(&mut bytes).unwrap();
        } else {
            incoming.reset(Expect::Number(self.now.number + 1));
            incoming.follow(&self.state).unwrap();
        }
        loop {
            let section = self.reader.read_section(&mut bytes).unwrap();
            let message = Message::parse(&section).unwrap();
            if incoming.push(&section, &message).unwrap() {
                return incoming;
            }
        }
    }

    fn pages(&mut self) -> (Vec<PageEntry>, Vec<u8>) {
        let random = &mut self.random;
        let (mut entries, mut data) = (Vec::new(), Vec::new());
        let all = RANGES.iter().flat_map(|range| range.start..range.start + range.pages);
        for gfn in all.filter(|_| random.u8(..16) == 0).collect::<Vec<_>>() {
            match random.u8(..6) {
                0 => entries.push(PageEntry::zero(gfn)),
                1 | 2 => {
                    entries.push(PageEntry::raw(gfn));
                    data.extend((0..PAGE_SIZE).map(|_| random.u8(..)));
                }
                _ => {
                    let mask = random.u64(..) & random.u64(..) | 1;
                    entries.push(PageEntry::granules(gfn, mask));
                    data.extend(mask.to_le_bytes());
                    data.extend((0..mask.count_ones() * 64).map(|_| random.u8(..)));
                }
            }
        }
        (entries, data)
    }

    fn writes(&mut self) -> RecordBuf {
        let mut writes = RecordBuf::with_capacity(1 << 20);
        for _ in 0..self.random.usize(..4) {
            let offset = self.random.u64(..DISK_BYTES / 512) * 512;
            let len = self.random.u64(1..=20_000).min(DISK_BYTES - offset);
            let data = vec![self.random.u8(..); len as usize];
            let op = if self.random.u8(..3) == 0 { DiskOp::Zero(len) } else { DiskOp::Data(&data) };
            assert!(writes.push(DiskRecord { disk: 0, offset, op }));
        }
        writes
    }
}

/// A slow look at the copy.
struct Slow {
    copy: Arc<Mutex<Machine>>,
    in_image: Arc<Mutex<u64>>,
    before: u64,
    takes: Duration,
}

impl Source for Slow {
    fn touched(&self, _: u64) -> u64 {
        u64::MAX
    }

    fn read_page(&self, gfn: u64, to: &mut [u8; PAGE_SIZE]) -> bool {
        std::thread::sleep(self.takes);
        let at = hello().layout.index(gfn).unwrap() as usize * PAGE_SIZE;
        // In two halves, between which a commit may come.
        to[..2048].copy_from_slice(&lock(&self.copy).memory[at..at + 2048]);
        std::thread::yield_now();
        to[2048..].copy_from_slice(&lock(&self.copy).memory[at + 2048..at + 4096]);
        true
    }

    fn settled(&self) -> Settled {
        if *lock(&self.in_image) >= self.before { Settled::Yes } else { Settled::NotYet }
    }

    fn disks(&self) -> Vec<Option<u64>> {
        vec![Some(DISK_BYTES)]
    }

    fn next_data(&self, _: usize, from: u64) -> io::Result<Option<u64>> {
        let copy = lock(&self.copy);
        Ok(copy.disk[from as usize..]
            .iter()
            .position(|byte| *byte != 0)
            .map(|at| (from + at as u64) / 512 * 512))
    }

    fn read_disk(&self, _: usize, to: &mut [u8], at: u64) -> io::Result<()> {
        for (piece, at) in to.chunks_mut(8 << 10).zip((at as usize..).step_by(8 << 10)) {
            std::thread::sleep(self.takes);
            piece.copy_from_slice(&lock(&self.copy).disk[at..at + piece.len()]);
        }
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
