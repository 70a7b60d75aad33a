//! The boot parameters: one page that tells the kernel how it was loaded and where there is memory.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use crate::map::linux::{ACPI, HIGH_START, LOW_END};
use crate::map::{HOLE_END, HOLE_START};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// "A loader without a number."
const LOADER: u8 = 0xff;
const LOADED_HIGH: u8 = 1;

/// The contents of the page.
pub(super) struct Params {
    /// The kernel's own header.
    pub(super) header: setup_header,
    /// Where the command line is.
    pub(super) command_line: u32,
    /// Address and length of the initrd; a length of 0 means no initrd.
    pub(super) initrd: (u32, u32),
    /// Bytes of memory.
    pub(super) memory: u64,
}

/// The page.
pub(super) struct ZeroPage(boot_params);

impl AsRef<[u8]> for ZeroPage {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

impl Params {
    pub(super) fn bytes(&self) -> ZeroPage {
        let mut page = boot_params { hdr: self.header, acpi_rsdp_addr: ACPI.base, ..Default::default() };
        page.hdr.type_of_loader = LOADER;
        page.hdr.loadflags |= LOADED_HIGH;
        page.hdr.cmd_line_ptr = self.command_line;
        (page.hdr.ramdisk_image, page.hdr.ramdisk_size) = self.initrd;
        let map = memory_map(self.memory);
        page.e820_entries = map.len() as u8;
        for (to, (addr, size, kind)) in page.e820_table.iter_mut().zip(map) {
            *to = boot_e820_entry { addr, size, r#type: kind };
        }
        ZeroPage(page)
    }
}

/// Memory of the guest as {address, length, kind}. The region behind it that holds the boot image is left
/// out: the guest must not use it.
pub(super) fn memory_map(bytes: u64) -> Vec<(u64, u64, u32)> {
    let low = bytes.min(HOLE_START);
    let mut map = vec![
        (0, LOW_END, E820_RAM),
        (LOW_END, HIGH_START - LOW_END, E820_RESERVED),
        (HIGH_START, low.saturating_sub(HIGH_START), E820_RAM),
    ];
    if bytes > low {
        map.push((HOLE_END, bytes - low, E820_RAM));
    }
    map
}
