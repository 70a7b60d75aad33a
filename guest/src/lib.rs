//! The payload guest: a small 64-bit program that runs inside the VM, serves the Redis protocol and needs no
//! kernel.
//!
//! [`abi`] is the contract between the VMM and the payload, [`PAYLOAD`] the program itself. README.md in this
//! folder describes its commands, its memory map and the load it can make.
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate alloc;

pub mod abi;

/// The payload's own modules that need no machine, compiled here for their tests.
#[cfg(test)]
#[path = "../payload/src/logic/mod.rs"]
#[allow(
    missing_docs,
    unreachable_pub,
    dead_code,
    unused_imports,
    reason = "the parts of a program, not the surface of this library"
)]
mod logic;

/// The payload: a static ELF64 executable, to be loaded as [`abi`] says.
pub static PAYLOAD: &[u8] = include_bytes!(env!("OUTLIVE_PAYLOAD_IMAGE"));

#[cfg(test)]
mod tests {
    use super::*;

    fn u16_at(at: usize) -> u64 {
        u16::from_le_bytes(PAYLOAD[at..at + 2].try_into().unwrap()).into()
    }

    fn u32_at(at: usize) -> u64 {
        u32::from_le_bytes(PAYLOAD[at..at + 4].try_into().unwrap()).into()
    }

    fn u64_at(at: usize) -> u64 {
        u64::from_le_bytes(PAYLOAD[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn the_image_is_static_and_lies_where_the_abi_says() {
        assert_eq!(&PAYLOAD[..6], b"\x7fELF\x02\x01", "64-bit little endian ELF");
        assert_eq!((u16_at(16), u16_at(18)), (2, 62), "ET_EXEC (not relocatable) for x86-64");
        let (entry, table, size, count) =
            (u64_at(24), u64_at(32) as usize, u16_at(54) as usize, u16_at(56) as usize);
        let mut entry_found = false;
        for header in (0..count).map(|index| table + index * size) {
            assert_eq!(u32_at(header), 1, "only PT_LOAD segments: no interpreter, no TLS, nothing dynamic");
            let (offset, virt, phys) = (u64_at(header + 8), u64_at(header + 16), u64_at(header + 24));
            let (in_file, in_memory) = (u64_at(header + 32), u64_at(header + 40));
            assert_eq!(virt, phys, "identity mapped");
            assert!(virt >= abi::IMAGE_ADDR && virt + in_memory < abi::IMAGE_ADDR + (4 << 20));
            assert!(in_file <= in_memory && offset + in_file <= PAYLOAD.len() as u64);
            entry_found |= (virt..virt + in_file).contains(&entry);
        }
        assert!(entry_found, "the entry point lies in a segment");
    }

    #[test]
    fn boot_info_lies_in_memory_as_declared() {
        let mut info = abi::BootInfo::new().with_memory(5 << 30);
        assert_eq!((info.low_bytes, info.high_bytes), (3 << 30, 2 << 30));
        info.tsc_khz = 0x1122_3344;
        info.random_seed = core::array::from_fn(|i| i as u8);
        info.net_mmio_base = abi::NET_MMIO_ADDR;
        (info.ipv4, info.gateway, info.prefix) = ([10, 77, 0, 2], [10, 77, 0, 1], 24);
        assert_eq!(info.problem(), None);
        let bytes = info.to_bytes();
        for (at, value) in [
            (core::mem::offset_of!(abi::BootInfo, magic), info.magic),
            (core::mem::offset_of!(abi::BootInfo, low_bytes), info.low_bytes),
            (core::mem::offset_of!(abi::BootInfo, high_bytes), info.high_bytes),
            (core::mem::offset_of!(abi::BootInfo, tsc_khz), info.tsc_khz),
            (core::mem::offset_of!(abi::BootInfo, net_mmio_base), info.net_mmio_base),
        ] {
            assert_eq!(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()), value);
        }
        let at = |field| bytes[field];
        assert_eq!(at(core::mem::offset_of!(abi::BootInfo, random_seed) + 31), 31);
        assert_eq!(at(core::mem::offset_of!(abi::BootInfo, ipv4) + 3), 2);
        assert_eq!(at(core::mem::offset_of!(abi::BootInfo, gateway) + 3), 1);
        assert_eq!(at(core::mem::offset_of!(abi::BootInfo, prefix)), 24);
        assert_eq!(at(core::mem::offset_of!(abi::BootInfo, vcpus)), 1);
    }

    #[test]
    fn the_tables_stacks_and_image_do_not_overlap() {
        assert!(abi::BOOT_INFO_ADDR + abi::BOOT_INFO_LEN as u64 <= abi::GDT_ADDR);
        const { assert!(abi::PAGE_TABLES_END <= abi::STACKS_ADDR) };
        assert!(abi::initial_rsp(abi::MAX_VCPUS - 1) < abi::IMAGE_ADDR);
        assert_eq!(abi::initial_rsp(0) % 16, 8);
    }
}
