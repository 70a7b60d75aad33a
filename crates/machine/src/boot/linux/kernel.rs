//! The kernel file: a bzImage, as distributions ship it, or the ELF program inside one (`vmlinux`).
//!
//! The file comes from a user or, at a reboot, from the guest's own memory: every number in it is checked
//! before use.

use std::io::Cursor;

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{self, KernelLoader, bzimage::BzImage, elf::Elf};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::map::linux::HIGH_START;
use crate::memory::GuestMemory;

/// The marks of the boot protocol's header, "HdrS" and "\x55\xaa", with their places.
const MARK_AT: usize = 0x202;
const MARK: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xaa55;
/// Where the header begins in the file.
const HEADER_AT: usize = 0x1f1;
/// The byte that says how far behind [`MARK_AT`] the header ends.
const HEADER_LEN_AT: usize = 0x201;
/// Linux 3.8: from here on the header says whether there is a 64-bit entry.
const LEAST_VERSION: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
/// Offset of the 64-bit entry from the load address.
const ENTRY_64: u64 = 0x200;
/// Assumptions for a 64-bit kernel without a header.
const INITRD_MAX: u32 = 0x7fff_ffff;
const COMMAND_LINE_MAX: u32 = 2047;

const ELF_MARK: [u8; 6] = [0x7f, b'E', b'L', b'F', 2, 1];
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const ELF_HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;

/// Why a kernel file cannot be booted.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The file has neither of the two formats.
    #[error(
        "it is neither a bzImage nor a 64-bit x86 ELF program; take the vmlinuz of an x86-64 distribution"
    )]
    Format,
    /// A header is impossible.
    #[error("the file is damaged or truncated: {0}")]
    Damaged(&'static str),
    /// The kernel is too old, or for 32-bit processors.
    #[error("it has no 64-bit entry (boot protocol {0:#06x}): an x86-64 kernel from Linux 3.8 on is needed")]
    No64Bit(u16),
    /// It needs memory that the VM lacks.
    #[error("it needs memory up to {0:#x}, which this VM does not have")]
    Memory(u64),
    /// The loader's own checks.
    #[error("{0}")]
    Loader(#[from] loader::Error),
}

/// A kernel in memory.
#[derive(Debug)]
pub(super) struct Loaded {
    /// The 64-bit entry.
    pub(super) entry: u64,
    /// First byte after everything that it uses before it reads the memory map.
    pub(super) end: u64,
    /// Its header, for the boot parameters.
    pub(super) header: setup_header,
}

impl Loaded {
    /// First byte after the highest place for an initrd.
    pub(super) fn initrd_limit(&self) -> u64 {
        u64::from(self.header.initrd_addr_max) + 1
    }

    /// Longest command line without the zero at its end.
    pub(super) fn command_line_limit(&self) -> usize {
        // The room between the command line and the memory map's first hole is larger.
        (self.header.cmdline_size).min(0xffff) as usize
    }
}

/// Loads a kernel below `low_end`.
pub(super) fn load(memory: &GuestMemory, image: &[u8], low_end: u64) -> Result<Loaded, KernelError> {
    if image.starts_with(&ELF_MARK) {
        load_elf(memory, image, low_end)
    } else if image.get(MARK_AT..MARK_AT + 4) == Some(&MARK.to_le_bytes()) {
        load_bzimage(memory, image, low_end)
    } else {
        Err(KernelError::Format)
    }
}

fn load_bzimage(memory: &GuestMemory, image: &[u8], low_end: u64) -> Result<Loaded, KernelError> {
    let mut header = header(image)?;
    let version = header.version;
    if version < LEAST_VERSION || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::No64Bit(version));
    }
    let start = header.pref_address;
    let setup = (u64::from(if header.setup_sects == 0 { 4 } else { header.setup_sects }) + 1) * 512;
    let code = (image.len() as u64).checked_sub(setup).ok_or(KernelError::Damaged("it ends in its setup"))?;
    let protected = u64::from(header.syssize) * 16;
    if protected > code || code <= ENTRY_64 {
        return Err(KernelError::Damaged("it is shorter than its header says"));
    }
    let end = start.checked_add(u64::from(header.init_size).max(code));
    let end = end.ok_or(KernelError::Damaged("its load address is invalid"))?;
    if start < HIGH_START {
        return Err(KernelError::Damaged("its load address is below 1 MiB"));
    }
    if end > low_end {
        return Err(KernelError::Memory(end));
    }
    let at = Some(GuestAddress(start));
    BzImage::load(memory, at, &mut Cursor::new(image), None)?;
    // The place is below 3 GiB.
    header.code32_start = start as u32;
    Ok(Loaded { entry: start + ENTRY_64, end, header })
}

/// The header of a bzImage. Fields that the file's version lacks are 0.
fn header(image: &[u8]) -> Result<setup_header, KernelError> {
    let len = image.get(HEADER_LEN_AT).ok_or(KernelError::Format)?;
    let len = (MARK_AT + usize::from(*len) - HEADER_AT).min(size_of::<setup_header>());
    let bytes = image.get(HEADER_AT..HEADER_AT + len);
    let mut header = setup_header::default();
    header.as_mut_slice()[..len].copy_from_slice(bytes.ok_or(KernelError::Damaged("it ends in its header"))?);
    Ok(header)
}

/// Loads `vmlinux`. Its 64-bit entry is the ELF entry, its addresses are physical.
fn load_elf(memory: &GuestMemory, image: &[u8], low_end: u64) -> Result<Loaded, KernelError> {
    let (entry, segments) = elf_segments(image)?;
    let mut end = 0;
    for segment in &segments {
        let segment_end = segment.address.checked_add(segment.in_memory);
        let segment_end = segment_end.ok_or(KernelError::Damaged("a segment wraps around"))?;
        if segment.address < HIGH_START || segment.in_file > segment.in_memory {
            return Err(KernelError::Damaged("a segment has an impossible address"));
        }
        if segment_end > low_end {
            return Err(KernelError::Memory(segment_end));
        }
        end = end.max(segment_end);
    }
    if !segments.iter().any(|it| (it.address..it.address + it.in_memory).contains(&entry)) {
        return Err(KernelError::Damaged("its entry is outside its segments"));
    }
    // An offset of 0 instead of none: the loader then ignores the notes, whose sizes are unchecked.
    Elf::load(memory, Some(GuestAddress(0)), &mut Cursor::new(image), None)?;
    for segment in &segments {
        let (from, to) = (segment.address + segment.in_file, segment.address + segment.in_memory);
        zero(memory, from, to)?;
    }
    let header = setup_header {
        boot_flag: BOOT_FLAG,
        header: MARK,
        version: LEAST_VERSION,
        initrd_addr_max: INITRD_MAX,
        cmdline_size: COMMAND_LINE_MAX,
        kernel_alignment: 0x20_0000,
        ..Default::default()
    };
    Ok(Loaded { entry, end, header })
}

struct Segment {
    address: u64,
    in_file: u64,
    in_memory: u64,
}

fn elf_segments(image: &[u8]) -> Result<(u64, Vec<Segment>), KernelError> {
    let cut = KernelError::Damaged("it ends in its ELF headers");
    let field = |at: u64, len: usize| -> Option<u64> {
        let at = usize::try_from(at).ok()?;
        let bytes = image.get(at..at.checked_add(len)?)?;
        Some(bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
    };
    let (machine, entry, table, size, count) =
        match (field(18, 2), field(24, 8), field(32, 8), field(54, 2), field(56, 2)) {
            (Some(machine), Some(entry), Some(table), Some(size), Some(count)) => {
                (machine, entry, table, size, count)
            }
            _ => return Err(cut),
        };
    if machine != u64::from(EM_X86_64) {
        return Err(KernelError::Format);
    }
    if size != PROGRAM_HEADER || table < ELF_HEADER {
        return Err(KernelError::Damaged("it has bad program headers"));
    }
    let segment = |at: u64| -> Option<Option<Segment>> {
        if field(at, 4)? as u32 != PT_LOAD {
            return Some(None);
        }
        let (offset, in_file) = (field(at + 8, 8)?, field(at + 32, 8)?);
        if offset.checked_add(in_file)? > image.len() as u64 {
            return None;
        }
        Some(Some(Segment { address: field(at + 24, 8)?, in_file, in_memory: field(at + 40, 8)? }))
    };
    let mut segments = Vec::new();
    for index in 0..count {
        let at =
            table.checked_add(index * PROGRAM_HEADER).filter(|at| at.checked_add(PROGRAM_HEADER).is_some());
        let Some(found) = at.and_then(segment) else { return Err(cut) };
        segments.extend(found);
    }
    Ok((entry, segments))
}

fn zero(memory: &GuestMemory, from: u64, to: u64) -> Result<(), KernelError> {
    static ZEROS: [u8; 64 << 10] = [0; 64 << 10];
    let mut at = from;
    while at < to {
        let len = (to - at).min(ZEROS.len() as u64);
        let written = memory.write_slice(&ZEROS[..len as usize], GuestAddress(at));
        written.map_err(|_| KernelError::Memory(at))?;
        at += len;
    }
    Ok(())
}
