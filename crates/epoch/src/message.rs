//! The messages, their payloads and their checks. Every parse function takes plain bytes and can be given
//! anything.

use std::fmt;

use crate::device::{DeviceInfo, MAX_DEVICES};
use crate::disk::{DiskRecords, DiskSums, DiskWant, parse_tagged};
use crate::error::WireError;
use crate::fields::Fields;
use crate::layout::{GfnRange, Layout, MAX_RANGES};
use crate::pages::Pages;
use crate::section::{Kind, MAX_STATE_SECTION, Section};

/// Most bytes of a name or another short text.
pub const MAX_TEXT: usize = 64;
/// Most bytes of the text of a refusal.
pub const MAX_REFUSE_TEXT: usize = 256;

/// The identity of a VM: random, made when the VM is first started, kept over takeovers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmId(pub [u8; 16]);

impl fmt::Display for VmId {
    /// 32 hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for VmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VmId({self})")
    }
}

/// How a VM ends in order. The standby follows it and does not take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum EndReason {
    /// The guest powered itself off.
    PowerOff = 1,
    /// The guest asked for a reset.
    Reset = 2,
    /// The guest crashed (panic or triple fault). A takeover would only crash it again.
    Crash = 3,
    /// The operator stopped the VM.
    Stopped = 4,
}

impl EndReason {
    fn from_wire(number: u8) -> Option<Self> {
        [Self::PowerOff, Self::Reset, Self::Crash, Self::Stopped]
            .into_iter()
            .find(|reason| *reason as u8 == number)
    }
}

impl fmt::Display for EndReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PowerOff => "the guest powered off",
            Self::Reset => "the guest asked for a reset",
            Self::Crash => "the guest crashed",
            Self::Stopped => "the VM was stopped",
        })
    }
}

/// Why a standby leaves although nothing is wrong with the primary. It will not take over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum LeaveReason {
    /// The operator stopped the standby.
    Stopped = 1,
    /// Something came over the link that the standby refuses (damage, wrong order, over a limit).
    BadStream = 2,
    /// Something failed at the standby itself.
    Failed = 3,
    /// The standby followed the VM's orderly end.
    Followed = 4,
}

impl LeaveReason {
    fn from_wire(number: u8) -> Option<Self> {
        [Self::Stopped, Self::BadStream, Self::Failed, Self::Followed]
            .into_iter()
            .find(|reason| *reason as u8 == number)
    }
}

impl fmt::Display for LeaveReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stopped => "the standby was stopped",
            Self::BadStream => "the standby refused what came over the link",
            Self::Failed => "the standby failed",
            Self::Followed => "the standby followed the end of the VM",
        })
    }
}

/// Why a standby does not accept a primary. The numbers are frozen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum RefuseCode {
    /// Another primary is attached, or the standby is just deciding a takeover.
    Busy = 1,
    /// The standby keeps its place for another VM.
    WrongVm = 2,
    /// The VM has been seen in a newer generation: this primary is out of date.
    StaleGeneration = 3,
    /// The versions of the protocol do not fit.
    Version = 4,
    /// Not enough memory, CPUs, or another CPU vendor.
    Resources = 5,
    /// The introduction made no sense.
    Malformed = 6,
    /// The standby is about to end.
    Leaving = 7,
    /// The standby's devices do not fit: a disk is missing, of another size, or in use.
    Devices = 8,
}

impl RefuseCode {
    /// The code with this number.
    pub fn from_wire(number: u16) -> Option<Self> {
        [
            Self::Busy,
            Self::WrongVm,
            Self::StaleGeneration,
            Self::Version,
            Self::Resources,
            Self::Malformed,
            Self::Leaving,
            Self::Devices,
        ]
        .into_iter()
        .find(|code| *code as u16 == number)
    }
}

/// What the primary promises not to exceed. The standby sizes its staging by it, or refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most pages of one checkpoint.
    pub max_pages: u32,
    /// Most bytes of all state sections of one checkpoint.
    pub max_state_bytes: u32,
    /// Most checkpoints sent and not yet acknowledged.
    pub slots: u32,
    /// Most bytes of all disk records of one checkpoint.
    pub max_disk_bytes: u32,
}

/// The primary's introduction: who it is, what VM it brings, what the standby must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Identity of the VM.
    pub vm: VmId,
    /// The generation in which the VM runs.
    pub generation: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes of RAM, as configured.
    pub memory_bytes: u64,
    /// Which frames are RAM.
    pub layout: Layout,
    /// Bytes of guest memory behind the RAM that keep what the guest boots from; 0 without.
    pub firmware_bytes: u64,
    /// The devices in the order of their slots, at most [`MAX_DEVICES`].
    pub devices: Vec<DeviceInfo>,
    /// The MAC address of the network device, if there is one.
    pub mac: Option<[u8; 6]>,
    /// Limits of the checkpoints to come.
    pub limits: Limits,
    /// Length of an epoch in microseconds.
    pub interval_us: u64,
    /// Silence after which a side is taken for dead, in microseconds, as configured at the primary.
    pub dead_after_us: u64,
    /// The VM's name, at most [`MAX_TEXT`] bytes.
    pub name: String,
    /// The primary host's name, at most [`MAX_TEXT`] bytes.
    pub host: String,
    /// How dirty pages are tracked, at most [`MAX_TEXT`] bytes. For logs.
    pub tracker: String,
    /// CPU vendor and KVM module, at most [`MAX_TEXT`] bytes. State of one vendor does not load on another.
    pub vendor: String,
}

impl Hello {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(Kind::Hello, payload);
        let vm = VmId(fields.array()?);
        let generation = fields.u64()?;
        let memory_bytes = fields.u64()?;
        let interval_us = fields.u64()?;
        let dead_after_us = fields.u64()?;
        let vcpus = fields.u32()?;
        let limits = Limits {
            max_pages: fields.u32()?,
            max_state_bytes: fields.u32()?,
            slots: fields.u32()?,
            max_disk_bytes: fields.u32()?,
        };
        let firmware_bytes = fields.u64()?;
        let mac = match fields.u8()? {
            0 => {
                fields.reserved(6)?;
                None
            }
            1 => Some(fields.array()?),
            other => return Err(fields.malformed("the network flag is neither 0 nor 1", other.into())),
        };
        let layout = Self::parse_layout(&mut fields)?;
        let devices = Self::parse_devices(&mut fields)?;
        let name = fields.text(MAX_TEXT)?;
        let host = fields.text(MAX_TEXT)?;
        let tracker = fields.text(MAX_TEXT)?;
        let vendor = fields.text(MAX_TEXT)?;
        fields.end()?;
        let hello = Self {
            vm,
            generation,
            vcpus,
            memory_bytes,
            layout,
            firmware_bytes,
            devices,
            mac,
            limits,
            interval_us,
            dead_after_us,
            name,
            host,
            tracker,
            vendor,
        };
        Ok(hello)
    }

    fn parse_layout(fields: &mut Fields<'_>) -> Result<Layout, WireError> {
        let count = usize::from(fields.u8()?);
        if count > MAX_RANGES {
            return Err(fields.malformed("more memory ranges than a layout has", count as u64));
        }
        let mut ranges = Vec::with_capacity(count);
        for _ in 0..count {
            ranges.push(GfnRange { start: fields.u64()?, pages: fields.u64()? });
        }
        Layout::new(ranges)
            .map_err(|_| fields.malformed("the memory ranges are no layout, count", count as u64))
    }

    fn parse_devices(fields: &mut Fields<'_>) -> Result<Vec<DeviceInfo>, WireError> {
        let count = usize::from(fields.u8()?);
        if count > MAX_DEVICES {
            return Err(fields.malformed("more devices than a VM has", count as u64));
        }
        (0..count).map(|_| DeviceInfo::parse(fields)).collect()
    }
}

/// The standby is ready for base pages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accept {
    /// The generation in which the VM runs, as the primary said it.
    pub generation: u64,
    /// The silence, in microseconds, that both sides use from now on: the larger of the two configured ones.
    pub dead_after_us: u64,
    /// The standby host's name, at most [`MAX_TEXT`] bytes.
    pub host: String,
}

impl Accept {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(Kind::Accept, payload);
        let accept =
            Self { generation: fields.u64()?, dead_after_us: fields.u64()?, host: fields.text(MAX_TEXT)? };
        fields.end()?;
        Ok(accept)
    }
}

/// The standby does not accept this primary, and the connection ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refuse {
    /// The reason, or the number of a reason that this release does not know.
    pub code: Result<RefuseCode, u16>,
    /// The reason in words, at most [`MAX_REFUSE_TEXT`] bytes.
    pub text: String,
}

impl Refuse {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(Kind::Refuse, payload);
        let number = fields.u16()?;
        let refuse =
            Self { code: RefuseCode::from_wire(number).ok_or(number), text: fields.text(MAX_REFUSE_TEXT)? };
        fields.end()?;
        Ok(refuse)
    }
}

/// What is special about a checkpoint. On the wire a `u32`: bit 0 base_final, bits 8..16 the end reason or 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CheckpointFlags {
    /// The first checkpoint: together with the base pages it makes the standby's first whole copy.
    pub base_final: bool,
    /// The last checkpoint: the VM has ended in order.
    pub end: Option<EndReason>,
}

impl CheckpointFlags {
    pub(crate) fn to_wire(self) -> u32 {
        u32::from(self.base_final) | self.end.map_or(0, |end| (end as u32) << 8)
    }

    fn from_wire(word: u32) -> Option<Self> {
        let number = (word >> 8) as u8;
        let end = EndReason::from_wire(number);
        (word & !0xff01 == 0 && (number == 0 || end.is_some()))
            .then_some(Self { base_final: word & 1 != 0, end })
    }
}

/// A checkpoint begins. The totals are known: the whole checkpoint was captured before the first byte is
/// sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointBegin {
    /// The generation in which the VM runs.
    pub generation: u64,
    /// The checkpoint's number.
    pub number: u64,
    /// Pages in the `Pages` sections that follow.
    pub pages: u32,
    /// Bytes in the `State` sections that follow, without their fixed fields.
    pub state_bytes: u32,
    /// Bytes in the `DiskWrites` sections that follow, without their fixed fields.
    pub disk_bytes: u32,
    /// What is special about it.
    pub flags: CheckpointFlags,
}

impl CheckpointBegin {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(Kind::CheckpointBegin, payload);
        let (generation, number) = (fields.u64()?, fields.u64()?);
        let (pages, state_bytes) = (fields.u32()?, fields.u32()?);
        let word = fields.u32()?;
        let flags = CheckpointFlags::from_wire(word)
            .ok_or_else(|| fields.malformed("unknown checkpoint flags", word.into()))?;
        let disk_bytes = fields.u32()?;
        fields.end()?;
        Ok(Self { generation, number, pages, state_bytes, disk_bytes, flags })
    }
}

/// One state section: opaque bytes of the machine, named by kind, version and index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateRef<'a> {
    /// What it is (registers, LAPIC, a device ...), as the machine numbers it.
    pub kind: u16,
    /// Version of the bytes.
    pub version: u16,
    /// Which vCPU or device.
    pub index: u16,
    /// The state itself, at most [`MAX_STATE_SECTION`] bytes.
    pub bytes: &'a [u8],
}

impl<'a> StateRef<'a> {
    /// Returns the checkpoint's number and the section.
    fn parse(payload: &'a [u8]) -> Result<(u64, Self), WireError> {
        let mut fields = Fields::new(Kind::State, payload);
        let checkpoint = fields.u64()?;
        let (kind, version, index) = (fields.u16()?, fields.u16()?, fields.u16()?);
        fields.reserved(2)?;
        let bytes = fields.rest();
        debug_assert!(bytes.len() <= MAX_STATE_SECTION);
        Ok((checkpoint, Self { kind, version, index, bytes }))
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

impl CheckpointEnd {
    pub(crate) fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(Kind::CheckpointEnd, payload);
        let (number, stamp_us) = (fields.u64()?, fields.u64()?);
        let (pages, state_bytes, chain) = (fields.u32()?, fields.u32()?, fields.u32()?);
        let disk_bytes = fields.u32()?;
        fields.end()?;
        Ok(Self { number, stamp_us, pages, state_bytes, disk_bytes, chain })
    }
}

/// The standby holds all of a checkpoint: it is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    /// The generation of the checkpoint.
    pub generation: u64,
    /// The checkpoint's number.
    pub number: u64,
    /// The newest stamp that the standby has heard.
    pub stamp_us: u64,
}

impl Ack {
    fn parse(payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(Kind::Ack, payload);
        let ack = Self { generation: fields.u64()?, number: fields.u64()?, stamp_us: fields.u64()? };
        fields.end()?;
        Ok(ack)
    }
}

/// Any message, parsed and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message<'a> {
    /// See [`Hello`].
    Hello(Hello),
    /// See [`Accept`].
    Accept(Accept),
    /// See [`Refuse`].
    Refuse(Refuse),
    /// Pages of the base synchronisation; their tag is the round.
    BasePages(Pages<'a>),
    /// See [`CheckpointBegin`].
    CheckpointBegin(CheckpointBegin),
    /// Pages of the open checkpoint; their tag is its number.
    Pages(Pages<'a>),
    /// A state section of the open checkpoint.
    State {
        /// The checkpoint's number.
        checkpoint: u64,
        /// The section.
        state: StateRef<'a>,
    },
    /// Writes to disks in the open checkpoint.
    DiskWrites {
        /// The checkpoint's number.
        checkpoint: u64,
        /// The writes, in their order.
        writes: DiskRecords<'a>,
    },
    /// See [`CheckpointEnd`].
    CheckpointEnd(CheckpointEnd),
    /// See [`DiskSums`].
    DiskSums(DiskSums<'a>),
    /// See [`DiskWant`].
    DiskWant(DiskWant),
    /// Chunks of a disk of the base synchronisation.
    DiskBlocks {
        /// The round: 1 for what was wanted by its sum, more for what was written meanwhile.
        round: u64,
        /// The chunks as writes. No flush is among them.
        blocks: DiskRecords<'a>,
    },
    /// See [`Ack`].
    Ack(Ack),
    /// The sender lives. From the primary the stamp is its clock; from the standby it is the newest stamp
    /// heard.
    Heartbeat {
        /// Microseconds of the primary's clock.
        stamp_us: u64,
    },
    /// The VM has ended in order.
    End(EndReason),
    /// The standby leaves and will not take over.
    Leave(LeaveReason),
}

impl<'a> Message<'a> {
    /// Parses the payload of a section.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn parse(section: &Section<'a>) -> Result<Self, WireError> {
        Self::parse_payload(section.kind(), section.payload())
    }

    /// Parses a payload of a kind. Takes any bytes.
    ///
    /// # Errors
    /// [`WireError::Malformed`].
    pub fn parse_payload(kind: Kind, payload: &'a [u8]) -> Result<Self, WireError> {
        Ok(match kind {
            Kind::Hello => Self::Hello(Hello::parse(payload)?),
            Kind::Accept => Self::Accept(Accept::parse(payload)?),
            Kind::Refuse => Self::Refuse(Refuse::parse(payload)?),
            Kind::BasePages => Self::BasePages(Pages::parse(kind, payload)?),
            Kind::CheckpointBegin => Self::CheckpointBegin(CheckpointBegin::parse(payload)?),
            Kind::Pages => Self::Pages(Pages::parse(kind, payload)?),
            Kind::State => {
                let (checkpoint, state) = StateRef::parse(payload)?;
                Self::State { checkpoint, state }
            }
            Kind::DiskWrites => {
                let (checkpoint, writes) = parse_tagged(kind, payload)?;
                Self::DiskWrites { checkpoint, writes }
            }
            Kind::CheckpointEnd => Self::CheckpointEnd(CheckpointEnd::parse(payload)?),
            Kind::DiskSums => Self::DiskSums(DiskSums::parse(payload)?),
            Kind::DiskWant => Self::DiskWant(DiskWant::parse(payload)?),
            Kind::DiskBlocks => {
                let (round, blocks) = parse_tagged(kind, payload)?;
                Self::DiskBlocks { round, blocks }
            }
            Kind::Ack => Self::Ack(Ack::parse(payload)?),
            Kind::Heartbeat => {
                let mut fields = Fields::new(kind, payload);
                let stamp_us = fields.u64()?;
                fields.end()?;
                Self::Heartbeat { stamp_us }
            }
            Kind::End => Self::End(parse_reason(kind, payload, EndReason::from_wire)?),
            Kind::Leave => Self::Leave(parse_reason(kind, payload, LeaveReason::from_wire)?),
        })
    }

    /// The kind of section that carries it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Hello(_) => Kind::Hello,
            Self::Accept(_) => Kind::Accept,
            Self::Refuse(_) => Kind::Refuse,
            Self::BasePages(_) => Kind::BasePages,
            Self::CheckpointBegin(_) => Kind::CheckpointBegin,
            Self::Pages(_) => Kind::Pages,
            Self::State { .. } => Kind::State,
            Self::DiskWrites { .. } => Kind::DiskWrites,
            Self::CheckpointEnd(_) => Kind::CheckpointEnd,
            Self::DiskSums(_) => Kind::DiskSums,
            Self::DiskWant(_) => Kind::DiskWant,
            Self::DiskBlocks { .. } => Kind::DiskBlocks,
            Self::Ack(_) => Kind::Ack,
            Self::Heartbeat { .. } => Kind::Heartbeat,
            Self::End(_) => Kind::End,
            Self::Leave(_) => Kind::Leave,
        }
    }
}

fn parse_reason<T>(kind: Kind, payload: &[u8], from_wire: fn(u8) -> Option<T>) -> Result<T, WireError> {
    let mut fields = Fields::new(kind, payload);
    let number = fields.u8()?;
    let reason = from_wire(number).ok_or_else(|| fields.malformed("unknown reason", number.into()))?;
    fields.reserved(3)?;
    fields.end()?;
    Ok(reason)
}
