//! Boot of the payload guest: a static ELF in 64-bit mode at CPL3, as `outlive_guest::abi` says.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use outlive_guest::abi::{self, BootInfo};
use vm_memory::{Bytes, GuestAddress};

use crate::map::{HOLE_END, HOLE_START};
use crate::memory::Ram;

/// The payload's boot information.
#[derive(Clone, Debug)]
pub struct PayloadOptions {
    /// Its IPv4 address.
    pub ipv4: [u8; 4],
    /// Length of its network prefix, 0 to 32.
    pub prefix: u8,
    /// Its default gateway; 0.0.0.0 for none.
    pub gateway: [u8; 4],
    /// Fresh random bytes.
    pub random_seed: [u8; 32],
}

/// Why the payload could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Not a static 64-bit x86 ELF program.
    #[error("the payload is not a static x86-64 ELF program: {0}")]
    Elf(&'static str),
    /// It does not fit.
    #[error("the payload needs memory at {0:#x}, which this VM does not have")]
    Memory(u64),
    /// More page tables than there is room for.
    #[error("{0} bytes of memory are more than the payload's page tables can map (230 GiB)")]
    TooLarge(u64),
}

const PRESENT_WRITE_USER: u64 = 0x7;
/// Preset, so that the CPU (or KVM on its behalf) never writes the tables and dirties them.
const ACCESSED_DIRTY: u64 = 0x60;
const LARGE: u64 = 0x80;
const ENTRIES: u64 = 512;
const LARGE_PAGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;

/// Loads the program, page tables, descriptor table and boot information. Returns the entry point.
pub(crate) fn load(
    ram: &Ram,
    elf: &[u8],
    vcpus: u8,
    tsc_khz: u32,
    net: bool,
    options: &PayloadOptions,
) -> Result<u64, BootError> {
    let entry = load_elf(ram, elf)?;
    let put = |address: u64, bytes: &[u8]| {
        ram.memory().write_slice(bytes, GuestAddress(address)).map_err(|_| BootError::Memory(address))
    };
    put_page_tables(ram.bytes(), put)?;
    for (i, descriptor) in DESCRIPTORS.iter().enumerate() {
        put(abi::GDT_ADDR + i as u64 * 8, &descriptor.to_le_bytes())?;
    }
    let low = ram.bytes().min(HOLE_START);
    let info = BootInfo {
        vcpus: u32::from(vcpus),
        memory_bytes: ram.bytes(),
        low_bytes: low,
        high_bytes: ram.bytes() - low,
        tsc_khz: u64::from(tsc_khz),
        random_seed: options.random_seed,
        net_mmio_base: if net { abi::NET_MMIO_ADDR } else { 0 },
        ipv4: options.ipv4,
        gateway: options.gateway,
        prefix: options.prefix,
        ..BootInfo::new()
    };
    put(abi::BOOT_INFO_ADDR, &info.to_bytes())?;
    Ok(entry)
}

fn load_elf(ram: &Ram, elf: &[u8]) -> Result<u64, BootError> {
    let field = |at: usize, len: usize| -> Result<u64, BootError> {
        let bytes = elf.get(at..at + len).ok_or(BootError::Elf("it is truncated"))?;
        Ok(bytes.iter().rev().fold(0, |value, &b| value << 8 | u64::from(b)))
    };
    if elf.get(..6) != Some(&[0x7f, b'E', b'L', b'F', 2, 1]) {
        return Err(BootError::Elf("no 64-bit little-endian ELF header"));
    }
    if field(16, 2)? != 2 || field(18, 2)? != 62 {
        return Err(BootError::Elf("not a fixed-address x86-64 executable"));
    }
    let (entry, table, size, count) = (field(24, 8)?, field(32, 8)?, field(54, 2)?, field(56, 2)?);
    for i in 0..count {
        let at = usize::try_from(table + i * size).map_err(|_| BootError::Elf("bad program headers"))?;
        if field(at, 4)? != 1 {
            continue; // not PT_LOAD
        }
        let (offset, address) = (field(at + 8, 8)? as usize, field(at + 24, 8)?);
        let (in_file, in_memory) = (field(at + 32, 8)? as usize, field(at + 40, 8)?);
        let end = address.checked_add(in_memory).ok_or(BootError::Elf("a segment wraps around"))?;
        if address < abi::IMAGE_ADDR || end > ram.bytes().min(HOLE_START) {
            return Err(BootError::Memory(end));
        }
        let bytes = offset.checked_add(in_file).and_then(|end| elf.get(offset..end));
        let bytes = bytes.ok_or(BootError::Elf("a segment is truncated"))?;
        // The rest of the segment (.bss) is zero because guest memory is fresh.
        ram.memory().write_slice(bytes, GuestAddress(address)).map_err(|_| BootError::Memory(address))?;
    }
    Ok(entry)
}

/// Identity tables of 2 MiB pages over the low gigabytes (memory and device window) and the memory above 4
/// GiB: one top table, one second-level table, and one third-level table for each gigabyte.
fn put_page_tables(bytes: u64, put: impl Fn(u64, &[u8]) -> Result<(), BootError>) -> Result<(), BootError> {
    let end = if bytes > HOLE_START { HOLE_END + (bytes - HOLE_START) } else { HOLE_END };
    let gigabytes = end.div_ceil(GIB);
    let second = abi::PAGE_TABLES_ADDR + 4096;
    let third = second + 4096;
    if third + gigabytes * 4096 > abi::PAGE_TABLES_END {
        return Err(BootError::TooLarge(bytes));
    }
    let put_entry = |table: u64, index: u64, value: u64| put(table + index * 8, &value.to_le_bytes());
    put_entry(abi::PAGE_TABLES_ADDR, 0, second | PRESENT_WRITE_USER | ACCESSED_DIRTY)?;
    for gib in 0..gigabytes {
        let table = third + gib * 4096;
        put_entry(second, gib, table | PRESENT_WRITE_USER | ACCESSED_DIRTY)?;
        for i in 0..ENTRIES {
            let page = gib * GIB + i * LARGE_PAGE;
            put_entry(table, i, page | PRESENT_WRITE_USER | ACCESSED_DIRTY | LARGE)?;
        }
    }
    Ok(())
}

/// Null, kernel code and data (unused), user data, user code: 64-bit, flat.
const DESCRIPTORS: [u64; 5] =
    [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
const USER_DATA: u16 = 3 << 3 | 3;
const USER_CODE: u16 = 4 << 3 | 3;

const CR0: u64 = 0x8001_0033; // PG, WP, NE, ET, MP, PE
const CR4: u64 = 0x620; // PAE, OSFXSR, OSXMMEXCPT
const EFER: u64 = 0x500; // LMA, LME
const RFLAGS: u64 = 0x3002; // IOPL 3, interrupts off

fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: 3,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// Registers of vCPU `index` at the payload's first instruction. `fresh` is what KVM gave it at
/// creation: task register, LDT and APIC base stay.
pub(crate) fn start_registers(fresh: kvm_sregs, entry: u64, index: u32) -> (kvm_sregs, kvm_regs) {
    let data = segment(USER_DATA, 3, false);
    let mut sregs = kvm_sregs {
        cs: segment(USER_CODE, 11, true),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        cr0: CR0,
        cr3: abi::PAGE_TABLES_ADDR,
        cr4: CR4,
        efer: EFER,
        ..fresh
    };
    sregs.gdt.base = abi::GDT_ADDR;
    sregs.gdt.limit = (DESCRIPTORS.len() * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    let regs = kvm_regs {
        rip: entry,
        rflags: RFLAGS,
        rsp: abi::initial_rsp(index),
        rdi: abi::BOOT_INFO_ADDR,
        rsi: u64::from(index),
        ..Default::default()
    };
    (sregs, regs)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ram() -> Ram {
        Ram::new(64 << 20, 1024).unwrap()
    }

    #[test]
    fn garbage_is_refused_at_every_length() {
        let ram = ram();
        for len in 0..outlive_guest::PAYLOAD.len().min(400) {
            assert!(load_elf(&ram, &outlive_guest::PAYLOAD[..len]).is_err(), "{len}");
        }
        assert!(load_elf(&ram, &[0; 4096]).is_err());
    }

    #[test]
    fn the_payload_fits_its_place() {
        let entry = load_elf(&ram(), outlive_guest::PAYLOAD).unwrap();
        assert!((abi::IMAGE_ADDR..32 << 20).contains(&entry), "{entry:#x}");
    }

    #[test]
    fn a_segment_outside_memory_is_refused() {
        let mut elf = outlive_guest::PAYLOAD.to_vec();
        let table = u64::from_le_bytes(elf[32..40].try_into().unwrap()) as usize;
        elf[table..table + 4].copy_from_slice(&1u32.to_le_bytes());
        elf[table + 40..table + 48].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(load_elf(&ram(), &elf).is_err());
    }
}
