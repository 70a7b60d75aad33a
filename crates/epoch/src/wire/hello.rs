//! The primary's introduction.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::encoder::{Encoder, check_length, put_text};
use super::error::{EncodeError, WireError};
use super::fields::Fields;
use super::kind::SectionKind;
use super::version::{ProtocolVersion, VersionRange};
use crate::image::limits::{
    MAX_ANCESTORS, MAX_DEVICES, MAX_GENERATION, MAX_RANGES, MAX_SERIAL, MAX_TEXT, MAX_VCPU_CONSTANT,
};
use crate::image::{
    Ancestor, DeviceFlags, DeviceInfo, DeviceKind, GfnRange, Layout, Lineage, Moment, VcpuConstant, VmId,
    Wiring,
};

/// What the primary promises not to exceed. The standby sizes its staging accordingly, or refuses.
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

/// The primary's introduction: who it is, which VM it brings, and what the standby must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hello {
    /// Identity of the VM.
    pub vm: VmId,
    /// The generation in which the VM runs, at most [`MAX_GENERATION`].
    pub generation: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Bytes of RAM, as configured.
    pub memory_bytes: u64,
    /// Which frames are RAM.
    pub layout: Layout,
    /// Bytes of guest memory behind the RAM that keep the guest's boot files; 0 without.
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
    /// The identity of the primary's arbiter, at most [`MAX_TEXT`] bytes: both hosts must have the same one.
    pub arbiter: String,
    /// The VMs from which this one descends: their images may be overwritten.
    pub lineage: Lineage,
    /// The versions of the stream that the primary can write. In a `Hello` of version 3 it is the version of
    /// the preface, 2.
    pub versions: VersionRange,
    /// Revision of the microcode of the primary's processor; 0 if unknown, and for releases that do not say
    /// it. A standby with another one may still take over: what differs in features is in the state.
    pub microcode: u64,
    /// What the host must be able to do; `None` from an older release.
    pub vcpu: Option<VcpuConstant>,
    /// The moment from which the VM runs on at the primary, if it knows each page that was written since: a standby
    /// whose memory is of that moment needs only those.
    pub since: Option<Moment>,
}

/// The payload begins with this. Then follow the ranges of the layout and the devices, each list with its
/// count in one byte, the texts, each with its length in two bytes, the ancestors with their count in one
/// byte, the range of versions, and, unless nothing follows, the revision of the microcode and [`RawExtra`]s.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    vm: [u8; 16],
    generation: U64,
    memory_bytes: U64,
    interval_us: U64,
    dead_after_us: U64,
    vcpus: U32,
    max_pages: U32,
    max_state_bytes: U32,
    slots: U32,
    max_disk_bytes: U32,
    firmware_bytes: U64,
    has_mac: u8,
    mac: [u8; 6],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Range {
    start: U64,
    pages: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawAncestor {
    vm: [u8; 16],
    through: U64,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawVersions {
    oldest: U32,
    newest: U32,
}

/// What a later release has added: a number, and bytes that an older release skips.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawExtra {
    number: U16,
    version: U16,
    length: U32,
}

/// The number of [`VcpuConstant`].
const EXTRA_VCPU: u16 = 1;
/// The number of a [`RawMoment`].
const EXTRA_SINCE: u16 = 2;

/// The first version of the payload that has the versions of the stream.
const WITH_VERSIONS: u16 = 4;

/// In the flags of a device: a [`RawWiring`] follows its serial number.
const WIRED: u16 = 1 << 3;

/// How a network card is connected; 0 means none.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawWiring {
    mtu: U16,
    vlan: U16,
}

/// [`Moment`].
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawMoment {
    generation: U64,
    checkpoint: U64,
}

/// A device; its serial number follows as a text.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Device {
    kind: u8,
    zero: u8,
    flags: U16,
    queues: U16,
    size: U64,
}

impl Hello {
    fn put(&self, version: u16, out: &mut Vec<u8>) {
        let start = out.len();
        let limits = &self.limits;
        let head = Head {
            vm: self.vm.0,
            generation: self.generation.into(),
            memory_bytes: self.memory_bytes.into(),
            interval_us: self.interval_us.into(),
            dead_after_us: self.dead_after_us.into(),
            vcpus: self.vcpus.into(),
            max_pages: limits.max_pages.into(),
            max_state_bytes: limits.max_state_bytes.into(),
            slots: limits.slots.into(),
            max_disk_bytes: limits.max_disk_bytes.into(),
            firmware_bytes: self.firmware_bytes.into(),
            has_mac: self.mac.is_some().into(),
            mac: self.mac.unwrap_or_default(),
        };
        out.extend_from_slice(head.as_bytes());
        out.push(self.layout.ranges().len() as u8);
        for range in self.layout.ranges() {
            let range = Range { start: range.start.into(), pages: range.pages.into() };
            out.extend_from_slice(range.as_bytes());
        }
        out.push(self.devices.len() as u8);
        for device in &self.devices {
            put_device(out, device);
        }
        for text in [&self.name, &self.host, &self.tracker, &self.vendor, &self.arbiter] {
            put_text(out, text);
        }
        let ancestors = self.lineage.ancestors();
        out.push(ancestors.len() as u8);
        for Ancestor { vm, through } in ancestors {
            out.extend_from_slice(RawAncestor { vm: vm.0, through: (*through).into() }.as_bytes());
        }
        if version >= WITH_VERSIONS {
            let VersionRange { oldest, newest } = self.versions;
            let versions = RawVersions { oldest: oldest.into(), newest: newest.into() };
            out.extend_from_slice(versions.as_bytes());
            let (microcode, extra) = (size_of::<u64>(), size_of::<RawExtra>());
            // Older releases read no longer introduction, and a standby that does not get it finds out later.
            let room = (SectionKind::Hello.limit() as usize).saturating_sub(out.len() - start);
            let fits = |vcpu: &&VcpuConstant| microcode + extra + vcpu.bytes.len() <= room;
            let vcpu = self.vcpu.as_ref().filter(fits);
            if self.microcode != 0 || vcpu.is_some() || self.since.is_some() {
                out.extend_from_slice(&self.microcode.to_le_bytes());
            }
            if let Some(VcpuConstant { version, bytes }) = vcpu {
                let (number, version) = (EXTRA_VCPU.into(), (*version).into());
                let extra = RawExtra { number, version, length: (bytes.len() as u32).into() };
                out.extend_from_slice(extra.as_bytes());
                out.extend_from_slice(bytes);
            }
            let length = extra + size_of::<RawMoment>();
            let room = (SectionKind::Hello.limit() as usize).saturating_sub(out.len() - start);
            // Without it the standby gets a whole base.
            if let Some(Moment { generation, checkpoint }) = self.since.filter(|_| length <= room) {
                let moment = RawMoment { generation: generation.into(), checkpoint: checkpoint.into() };
                let length = (size_of::<RawMoment>() as u32).into();
                let extra = RawExtra { number: EXTRA_SINCE.into(), version: 1.into(), length };
                out.extend_from_slice(extra.as_bytes());
                out.extend_from_slice(moment.as_bytes());
            }
        }
    }

    pub(crate) fn parse(version: u16, payload: &[u8]) -> Result<Self, WireError> {
        let mut fields = Fields::new(SectionKind::Hello, payload);
        let head: &Head = fields.fixed()?;
        let generation = head.generation.get();
        if generation > MAX_GENERATION {
            return Err(fields.malformed("a generation that no VM comes to", generation));
        }
        let mac = match head.has_mac {
            0 => {
                fields.reserved(&head.mac)?;
                None
            }
            1 => Some(head.mac),
            other => return Err(fields.malformed("the network flag is neither 0 nor 1", other.into())),
        };
        let layout = parse_layout(&mut fields)?;
        let devices = parse_devices(&mut fields, version)?;
        let mut text = || fields.text(MAX_TEXT);
        let (name, host, tracker, vendor, arbiter) = (text()?, text()?, text()?, text()?, text()?);
        let lineage = parse_lineage(&mut fields)?;
        let (versions, microcode, extras) = if version >= WITH_VERSIONS {
            let versions = parse_versions(&mut fields)?;
            let microcode = if fields.len() > 0 { fields.fixed::<U64>()?.get() } else { 0 };
            (versions, microcode, parse_extras(fields)?)
        } else {
            fields.end()?;
            (VersionRange::only(ProtocolVersion::V2), 0, Extras::default())
        };
        let Extras { vcpu, since } = extras;
        Ok(Self {
            vm: VmId(head.vm),
            generation,
            vcpus: head.vcpus.get(),
            memory_bytes: head.memory_bytes.get(),
            layout,
            firmware_bytes: head.firmware_bytes.get(),
            devices,
            mac,
            limits: Limits {
                max_pages: head.max_pages.get(),
                max_state_bytes: head.max_state_bytes.get(),
                slots: head.slots.get(),
                max_disk_bytes: head.max_disk_bytes.get(),
            },
            interval_us: head.interval_us.get(),
            dead_after_us: head.dead_after_us.get(),
            name,
            host,
            tracker,
            vendor,
            arbiter,
            lineage,
            versions,
            microcode,
            vcpu,
            since,
        })
    }
}

/// What this release knows of what a later one than the first has added.
#[derive(Default)]
struct Extras {
    vcpu: Option<VcpuConstant>,
    since: Option<Moment>,
}

/// Takes the extras that this release knows. What a later one has added, in whatever form, is skipped.
fn parse_extras(mut fields: Fields<'_>) -> Result<Extras, WireError> {
    let mut extras = Extras::default();
    while let Ok(RawExtra { number, version, length }) = fields.fixed::<RawExtra>() {
        let length = length.get() as usize;
        if number.get() == EXTRA_VCPU && length > MAX_VCPU_CONSTANT {
            return Err(fields.malformed("the state of a vCPU is longer than its limit", length as u64));
        }
        let Ok(bytes) = fields.bytes(length) else { break };
        match number.get() {
            EXTRA_VCPU => {
                extras.vcpu = Some(VcpuConstant { version: version.get(), bytes: bytes.to_vec() });
            }
            // In another form it is unknown, and the standby gets a whole base.
            EXTRA_SINCE => {
                let moment = RawMoment::ref_from_bytes(bytes).ok().filter(|_| version.get() == 1);
                extras.since = moment
                    .map(|raw| Moment { generation: raw.generation.get(), checkpoint: raw.checkpoint.get() });
            }
            _ => {}
        }
    }
    fields.skip_later();
    Ok(extras)
}

fn parse_versions(fields: &mut Fields<'_>) -> Result<VersionRange, WireError> {
    let RawVersions { oldest, newest } = fields.fixed()?;
    let (oldest, newest) = (oldest.get(), newest.get());
    if oldest > newest {
        return Err(
            fields.malformed("the oldest version of the stream is newer than the newest", oldest.into())
        );
    }
    Ok(VersionRange { oldest, newest })
}

fn parse_lineage(fields: &mut Fields<'_>) -> Result<Lineage, WireError> {
    let count = usize::from(*fields.fixed::<u8>()?);
    if count > MAX_ANCESTORS {
        return Err(fields.malformed("more ancestors than a VM remembers", count as u64));
    }
    let ancestor = |raw: &RawAncestor| Ancestor { vm: VmId(raw.vm), through: raw.through.get() };
    Ok(Lineage::new(fields.row(count)?.iter().map(ancestor)))
}

fn parse_layout(fields: &mut Fields<'_>) -> Result<Layout, WireError> {
    let count = usize::from(*fields.fixed::<u8>()?);
    if count > MAX_RANGES {
        return Err(fields.malformed("more memory ranges than a layout has", count as u64));
    }
    let range = |range: &Range| GfnRange { start: range.start.get(), pages: range.pages.get() };
    let ranges = fields.row(count)?.iter().map(range).collect();
    Layout::new(ranges).map_err(|_| fields.malformed("the memory ranges are no layout, count", count as u64))
}

fn parse_devices(fields: &mut Fields<'_>, version: u16) -> Result<Vec<DeviceInfo>, WireError> {
    let count = usize::from(*fields.fixed::<u8>()?);
    if count > MAX_DEVICES {
        return Err(fields.malformed("more devices than a VM has", count as u64));
    }
    (0..count).map(|_| parse_device(fields, version)).collect()
}

fn put_device(out: &mut Vec<u8>, device: &DeviceInfo) {
    let Wiring { mtu, vlan } = device.wiring;
    let is_wired = mtu.is_some() || vlan.is_some();
    let wired = if is_wired { WIRED } else { 0 };
    let fixed = Device {
        kind: device.kind as u8,
        zero: 0,
        flags: (device.flags.to_wire() | wired).into(),
        queues: device.queues.into(),
        size: device.size.into(),
    };
    out.extend_from_slice(fixed.as_bytes());
    put_text(out, &device.serial);
    if is_wired {
        let raw = RawWiring { mtu: mtu.unwrap_or(0).into(), vlan: vlan.unwrap_or(0).into() };
        out.extend_from_slice(raw.as_bytes());
    }
}

fn parse_device(fields: &mut Fields<'_>, version: u16) -> Result<DeviceInfo, WireError> {
    let device: &Device = fields.fixed()?;
    let kind = DeviceKind::from_wire(device.kind)
        .ok_or_else(|| fields.malformed("unknown kind of device", device.kind.into()))?;
    fields.reserved(&[device.zero])?;
    let word = device.flags.get();
    let known = if kind == DeviceKind::Net && version >= WITH_VERSIONS { WIRED } else { 0 };
    let flags = DeviceFlags::from_wire(word & !known)
        .ok_or_else(|| fields.malformed("unknown device flags", word.into()))?;
    let size = device.size.get();
    if size > i64::MAX as u64 {
        return Err(fields.malformed("a disk larger than every disk", size));
    }
    let (queues, serial) = (device.queues.get(), fields.text(MAX_SERIAL)?);
    let wiring = if word & known != 0 { parse_wiring(fields)? } else { Wiring::default() };
    Ok(DeviceInfo { kind, flags, queues, size, serial, wiring })
}

fn parse_wiring(fields: &mut Fields<'_>) -> Result<Wiring, WireError> {
    let RawWiring { mtu, vlan } = fields.fixed()?;
    let (mtu, vlan) = (mtu.get(), vlan.get());
    if mtu != 0 && mtu < Wiring::MIN_MTU {
        return Err(fields.malformed("an MTU smaller than every network's", mtu.into()));
    }
    if vlan > Wiring::MAX_VLAN {
        return Err(fields.malformed("a VLAN larger than every VLAN", vlan.into()));
    }
    let unless_zero = |value: u16| (value != 0).then_some(value);
    Ok(Wiring { mtu: unless_zero(mtu), vlan: unless_zero(vlan) })
}

impl Encoder {
    /// Appends [`Hello`].
    ///
    /// # Errors
    /// [`EncodeError::TooLong`] for a text or the list of devices.
    pub fn hello(&mut self, out: &mut Vec<u8>, hello: &Hello) -> Result<(), EncodeError> {
        for (field, text) in [
            ("the VM's name", &hello.name),
            ("the host's name", &hello.host),
            ("the tracker's name", &hello.tracker),
            ("the vendor's name", &hello.vendor),
            ("the arbiter's identity", &hello.arbiter),
        ] {
            check_length(field, text.len(), MAX_TEXT)?;
        }
        check_length("the list of devices", hello.devices.len(), MAX_DEVICES)?;
        for DeviceInfo { serial, .. } in &hello.devices {
            check_length("a disk's serial number", serial.len(), MAX_SERIAL)?;
        }
        if let Some(vcpu) = &hello.vcpu {
            check_length("the state of a vCPU", vcpu.bytes.len(), MAX_VCPU_CONSTANT)?;
        }
        let version = self.version_of(SectionKind::Hello);
        self.section(out, SectionKind::Hello, &[], |out| hello.put(version, out));
        Ok(())
    }
}
